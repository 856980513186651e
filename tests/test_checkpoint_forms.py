"""What people have in place of a whole checkpoint: adapters, steps of a training, files of other
programs, damaged or odd configs. Each is loaded as what it is or named in one line."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import common
from tests.conftest import ROOT
from tests.test_llava_original import make_source, to_original, write_tower
from vlmdiag.cli import UsageError
from vlmdiag.families import llava_original
from vlmdiag.model import adapters
from vlmdiag.model.vision import prefill
from vlmdiag.pictures.samples import AT_HAND, Sample

TINY = ROOT / "checkpoints" / "tiny-llava"
Q = "model.language_model.layers.{}.self_attn.q_proj"
OUT = "model.language_model.layers.{}.self_attn.o_proj"
WIDTH = 128


def written(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def edited(path, **changes):
    """Change the top level of a JSON file."""
    written(path, json.loads(path.read_text()) | changes)


def copied(folder):
    """A copy of tiny-llava, its weights as a link."""
    folder.mkdir(parents=True)
    for file in TINY.iterdir():
        if file.suffix == ".safetensors":
            (folder / file.name).symlink_to(file)
        else:
            shutil.copy(file, folder)
    return folder


@pytest.fixture
def model(tmp_path):
    return copied(tmp_path / "model")


@pytest.fixture(scope="module")
def base():
    return common.load_model(TINY, self_check=False)


@pytest.fixture
def picture(pictures):
    return pictures[0]


@torch.no_grad()
def logits(vlm, picture):
    batch = vlm.encode([Sample("0", AT_HAND, "Is there a red circle in the image?")], [picture])
    return prefill(vlm, batch).logits[0, -1].float()


def refusal(folder, **options):
    """The one line that load_model ends in."""
    with pytest.raises(UsageError) as error:
        common.load_model(folder, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- adapters -------------------------------------------------------------------------------------


def lora(names, rank=4, rows=WIDTH, columns=WIDTH, seed=0):
    """{module: (A, B)}"""
    random = torch.Generator().manual_seed(seed)
    return {
        name: (
            torch.randn(rank, columns, generator=random) / 5,
            torch.randn(rows, rank, generator=random) / 5,
        )
        for name in names
    }


def adapter(folder, pairs, base=TINY, rename=str, more=None, file="safetensors", **settings):
    """A folder as peft saves one."""
    state = dict(more or {})
    for name, (a, b) in pairs.items():
        state[f"base_model.model.{rename(name)}.lora_A.weight"] = a
        state[f"base_model.model.{rename(name)}.lora_B.weight"] = b
    folder.mkdir(parents=True, exist_ok=True)
    if file == "bin":
        torch.save(state, folder / "adapter_model.bin")
    else:
        save_file(state, folder / "adapter_model.safetensors")
    targets = sorted({name.rpartition(".")[2] for name in pairs})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 16}
    config |= {"target_modules": targets, "base_model_name_or_path": base and str(base)}
    written(folder / "adapter_config.json", config | settings)
    return folder


def by_hand(vlm, pairs, scale):
    """{module: W + scale B A}"""
    return {
        name: vlm.model.get_submodule(name).weight + scale * b @ a for name, (a, b) in pairs.items()
    }


def assert_weights(vlm, expected):
    for name, weight in expected.items():
        module = vlm.model.get_submodule(name)
        assert type(module) is torch.nn.Linear
        assert torch.allclose(module.weight, weight, atol=1e-5), name


def test_a_lora_is_merged_as_its_formula_says(tmp_path, base, picture):
    pytest.importorskip("peft")
    pairs = lora([Q.format(0), Q.format(3)])
    folder = adapter(tmp_path / "lora", pairs)
    vlm = common.load_model(folder)
    expected = by_hand(base, pairs, 16 / 4)
    assert_weights(vlm, expected)
    # nothing else has changed, nothing of peft is left
    assert [(name, type(module)) for name, module in vlm.model.named_modules()] == [
        (name, type(module)) for name, module in base.model.named_modules()
    ]
    plain = dict(base.model.named_parameters())
    for name, weight in vlm.model.named_parameters():
        assert not weight.requires_grad
        assert name.removesuffix(".weight") in expected or torch.equal(weight, plain[name]), name
    assert vlm.options["adapter"] == str(folder) and vlm.options["base_model"] == str(TINY)
    assert vlm.path == str(folder) and base.options["adapter"] is None
    assert not torch.allclose(logits(vlm, picture), logits(base, picture))


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name.replace("model.language_model.", "language_model.model."),
        lambda name: name.replace("model.language_model.", "model.layers.", 1).replace(
            "layers.layers", "layers"
        ),
    ],
    ids=["transformers 4", "LLaVA's"],
)
def test_names_of_other_versions_find_their_modules(tmp_path, base, rename):
    pytest.importorskip("peft")
    pairs = lora([Q.format(1)])
    name_of = adapters.names_in(base.model, [llava_original.hf_name])
    assert name_of(f"{rename(Q.format(1))}.weight") == f"{Q.format(1)}.weight"
    assert name_of("model.elsewhere.q_proj.weight") is None
    if rename(Q.format(1)).startswith("language_model"):
        vlm = common.load_model(adapter(tmp_path / "lora", pairs, rename=rename), self_check=False)
        assert_weights(vlm, by_hand(base, pairs, 4))


def test_ranks_scales_and_whole_modules_are_as_peft_has_them(tmp_path, base):
    """A rank and an alpha of its own for a module, scale alpha / sqrt(r), whole modules in the
    place of the base's, and a regular expression that speaks of other names."""
    pytest.importorskip("peft")
    wide = lora([OUT.format(2)], rank=8)
    projector = torch.randn(WIDTH, WIDTH)
    more = {"base_model.model.model.multi_modal_projector.linear_2.weight": projector}
    more["base_model.model.model.multi_modal_projector.linear_2.bias"] = torch.ones(WIDTH)
    settings = {
        "rank_pattern": {"o_proj": 8},
        "alpha_pattern": {"language_model.layers.2.self_attn.o_proj": 32},
        "use_rslora": True,
        "modules_to_save": ["linear_2"],
        "target_modules": r".*language_model\.model\.layers.*proj",
        "layers_to_transform": None,
    }
    narrow = lora([Q.format(2)])
    vlm = common.load_model(
        adapter(tmp_path / "lora", narrow | wide, base=None, more=more, **settings),
        base_model=TINY,
        self_check=False,
    )
    assert_weights(vlm, by_hand(base, wide, 32 / 8**0.5) | by_hand(base, narrow, 16 / 4**0.5))
    saved = vlm.model.get_submodule("model.multi_modal_projector.linear_2")
    assert torch.equal(saved.weight, projector) and (saved.bias == 1).all()
    assert type(saved) is torch.nn.Linear


def test_what_peft_saves_is_what_peft_computes(tmp_path, base, picture):
    peft = pytest.importorskip("peft")
    vlm = common.load_model(TINY, self_check=False)
    config = peft.LoraConfig(
        r=3, target_modules="all-linear", use_dora=True, init_lora_weights=False
    )
    torch.manual_seed(0)
    adapted = peft.get_peft_model(vlm.model, config)
    adapted.save_pretrained(tmp_path / "lora")
    vlm.model = adapted.eval().get_base_model()
    expected = logits(vlm, picture)
    merged = common.load_model(tmp_path / "lora", base_model=TINY, self_check=False)
    assert torch.allclose(logits(merged, picture), expected, atol=1e-4)
    assert not torch.allclose(logits(base, picture), expected, atol=1e-2)


def test_an_adapter_beside_the_weights_is_merged_into_them(model, base):
    pytest.importorskip("peft")
    pairs = lora([Q.format(0)])
    adapter(model, pairs, base="somewhere/else")
    vlm = common.load_model(model, self_check=False)
    assert_weights(vlm, by_hand(base, pairs, 4))
    assert vlm.options["base_model"] == str(model)
    assert "leave --base_model out" in refusal(model, base_model=TINY)


def test_a_lora_on_a_tied_lm_head_leaves_the_embeddings_alone(tmp_path):
    pytest.importorskip("peft")
    model = common.load_model(TINY, self_check=False).model
    model.config.text_config.tie_word_embeddings = model.config.tie_word_embeddings = True
    model.lm_head.weight = model.get_input_embeddings().weight
    before = model.lm_head.weight.detach().clone()
    pairs = lora(["lm_head"], rows=len(before))
    a, b = pairs["lm_head"]
    merged = adapters.merge(model, adapter(tmp_path / "lora", pairs), [])
    assert torch.equal(merged.get_input_embeddings().weight, before)
    assert torch.allclose(merged.lm_head.weight, before + 4 * b @ a, atol=1e-5)


@pytest.fixture(scope="module")
def llava_lora(tmp_path_factory):
    """(folders of LLaVA's own LoRA training: the adapter, its base with the projector, and without
    as Vicuna is, and in transformers' layout; what they are together)"""
    root = tmp_path_factory.mktemp("llava-lora")
    source = make_source(root / "hf", "base")
    write_tower(source, root / "tower")
    whole = to_original(source, root / "llava-base", tower=False, mm_vision_tower="openai/tower")
    plain = root / "vicuna"
    shutil.copytree(whole, plain)
    state = load_file(plain / "model.safetensors")
    state = {key: tensor for key, tensor in state.items() if "mm_projector" not in key}
    save_file(state, plain / "model.safetensors", {"format": "pt"})
    config = json.loads((whole / "config.json").read_text())
    language = {key: value for key, value in config.items() if not key.startswith("mm_")}
    language |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    written(plain / "config.json", language)
    pairs = lora([Q.format(0), OUT.format(1)])
    folder = adapter(
        root / "llava-v1.5-7b-task-lora",
        pairs,
        base=whole,
        rename=lambda name: name.replace("model.language_model.", "model."),
        file="bin",
    )
    shutil.copy(whole / "config.json", folder)
    linear = "model.multi_modal_projector.linear_1.weight"
    names = [("0", "linear_1"), ("2", "linear_2")]
    trained = {
        f"base_model.model.model.mm_projector.{number}.{part}": (
            source.model.get_parameter(f"model.multi_modal_projector.{name}.{part}") + 0.01
        ).detach()
        for number, name in names
        for part in ("weight", "bias")
    }
    torch.save(trained, folder / "non_lora_trainables.bin")
    expected = by_hand(source, pairs, 4)
    expected["model.multi_modal_projector.linear_1"] = source.model.get_parameter(linear) + 0.01
    return {"adapter": folder, "original": whole, "vicuna": plain, "hf": source.folder}, expected


@pytest.mark.parametrize("base", ["original", "vicuna", "hf"])
def test_llavas_own_lora_is_merged_into_its_base_in_any_layout(llava_lora, base, picture):
    pytest.importorskip("peft")
    folders, expected = llava_lora
    vlm = common.load_model(folders["adapter"], base_model=folders[base])
    assert_weights(vlm, expected)
    assert vlm.options["base_model"] == str(folders[base])
    if base == "vicuna":  # the base that adapter_config.json names
        named = common.load_model(folders["adapter"], self_check=False)
        assert torch.allclose(logits(vlm, picture), logits(named, picture), atol=1e-4)


def test_a_lora_of_another_model_is_an_error(tmp_path):
    pytest.importorskip("peft")
    pairs = lora([Q.format(0), Q.format(77)])
    line = refusal(adapter(tmp_path / "deep", pairs))
    assert "layers.77" in line and "match no module" in line
    strange = adapter(tmp_path / "strange", lora(["transformer.h.0.attn.c_attn"]))
    assert "match no module" in refusal(strange)
    assert "size mismatch" in refusal(adapter(tmp_path / "wide", lora([Q.format(0)], columns=64)))
    prompts = adapter(tmp_path / "prompts", pairs, peft_type="PROMPT_TUNING", num_virtual_tokens=3)
    assert "cannot be merged" in refusal(prompts)
    empty = adapter(tmp_path / "empty", pairs)
    (empty / "adapter_model.safetensors").unlink()
    assert "without adapter_model.safetensors" in refusal(empty)


def test_an_adapter_without_its_base_or_peft_is_told_what_is_missing(tmp_path, monkeypatch):
    pairs = lora([Q.format(0)])
    nameless = adapter(tmp_path / "nameless", pairs, base=None)
    assert "names no base: give --base_model" in refusal(nameless)
    lost = adapter(tmp_path / "lost", pairs, base="/train/checkpoints/base")
    assert "/train/checkpoints/base is no folder here: give --base_model" in refusal(lost)
    stacked = adapter(tmp_path / "stacked", pairs, base=nameless)
    assert "merge that one first" in refusal(stacked)
    assert "is no adapter" in refusal(TINY, base_model=TINY)
    monkeypatch.setattr(adapters.importlib.util, "find_spec", lambda name: None)
    assert "pip install peft" in refusal(adapter(tmp_path / "lora", pairs))


# --- a checkpoint's own code ----------------------------------------------------------------------

CODE = """
from transformers import LlavaConfig, LlavaForConditionalGeneration

class OwnConfig(LlavaConfig):
    model_type = "own_llava"

class OwnModel(LlavaForConditionalGeneration):
    config_class = OwnConfig
    ran = True
"""


@pytest.mark.parametrize(
    "auto_class",
    ["AutoModelForImageTextToText", "AutoModelForVision2Seq", "AutoModelForCausalLM", "AutoModel"],
)
def test_a_checkpoints_own_code_runs_where_it_is_trusted(model, base, picture, auto_class):
    written(model / "modeling_own.py", CODE)
    own = {"AutoConfig": "modeling_own.OwnConfig", auto_class: "modeling_own.OwnModel"}
    changes = {"model_type": "own_llava", "architectures": ["OwnModel"], "auto_map": own}
    edited(model / "config.json", **changes)
    (model / "model.safetensors").unlink()  # transformers renames parameters for its own types only
    state = {name: value.clone() for name, value in base.model.state_dict().items()}
    save_file(state, model / "model.safetensors", {"format": "pt"})
    assert "--trust_remote_code" in refusal(model)
    vlm = common.load_model(model, trust_remote_code=True, self_check=auto_class == "AutoModel")
    assert vlm.model.ran and vlm.family.name == "generic"
    ids = vlm.tokenizer("a red circle", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(vlm.model(ids).logits, base.model(ids).logits)

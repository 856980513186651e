"""What people have in place of a whole checkpoint: adapters, steps of a training, files of other
programs, damaged or odd configs. Each is loaded as what it is or named in one line."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig, LlavaForConditionalGeneration

import common
from tests.conftest import ROOT
from tests.test_llava_original import make_source, to_original, write_tower
from vlmdiag.cli import UsageError
from vlmdiag.families import folders, llava_original
from vlmdiag.model import adapters, errors, identity, loading
from vlmdiag.model.decoding import generate
from vlmdiag.model.prompts import prompt_for
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


TEXT = r".*language_model.*\.(q_proj|v_proj)"
# of peft's types one for each way in which it stores an adapter
KINDS = {
    "DoRA": ("LoraConfig", {"r": 3, "target_modules": "all-linear", "use_dora": True}),
    "words": ("LoraConfig", {"r": 3, "target_modules": TEXT, "trainable_token_indices": [5, 6]}),
    "VeRA": ("VeraConfig", {"r": 4, "target_modules": TEXT}),
    "AdaLoRA": ("AdaLoraConfig", {"init_r": 6, "total_step": 10, "target_modules": TEXT}),
    "IA3": ("IA3Config", {"target_modules": TEXT, "feedforward_modules": []}),
    "norms": ("LNTuningConfig", {"target_modules": r".*language_model.*layernorm"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_peft_saves_is_what_peft_computes(tmp_path, base, picture, kind):
    peft = pytest.importorskip("peft")
    vlm = common.load_model(TINY, self_check=False)
    name, settings = KINDS[kind]
    torch.manual_seed(0)
    adapted = peft.get_peft_model(vlm.model, getattr(peft, name)(**settings))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape)
    adapted.save_pretrained(tmp_path / "lora")
    # peft's embedding of trained words lacks an attribute that we ask for
    own = adapted.merge_and_unload() if kind == "words" else adapted.eval().get_base_model()
    vlm.model = own
    expected = logits(vlm, picture)
    merged = common.load_model(tmp_path / "lora", base_model=TINY, self_check=False)
    assert torch.allclose(logits(merged, picture), expected, atol=1e-4)
    assert not torch.allclose(logits(base, picture), expected, atol=1e-2)


@pytest.mark.parametrize("way", ["modules_to_save", "embeddings"])
def test_an_adapter_that_was_trained_with_more_words(tmp_path, picture, way):
    """Its tokenizer lies beside it; the base's embeddings get as many rows."""
    peft = pytest.importorskip("peft")
    vlm = common.load_model(TINY, self_check=False)
    tokenizer = vlm.processor.tokenizer
    assert tokenizer.add_tokens(["<here>", "<there>"]) == 2
    rows = len(tokenizer) + 3
    vlm.model.resize_token_embeddings(rows, mean_resizing=False)
    whole = {"modules_to_save": ["embed_tokens", "lm_head"]} if way == "modules_to_save" else {}
    config = peft.LoraConfig(r=3, target_modules=TEXT, init_lora_weights=False, **whole)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(vlm.model, config)
    adapted.save_pretrained(tmp_path / "lora", save_embedding_layers=not whole)
    vlm.processor.save_pretrained(tmp_path / "lora")
    own = adapted.merge_and_unload()
    merged = common.load_model(tmp_path / "lora", base_model=TINY)
    assert merged.vocabulary == rows
    vlm.model = own
    sample = Sample("0", None, "Is it <here> or <there>?")
    batch = merged.encode([sample], [picture])
    assert tokenizer.convert_tokens_to_ids("<there>") in batch.input_ids[0].tolist()
    with torch.inference_mode():
        mine, theirs = (generate(one, batch, 1).first for one in (merged, vlm))
    assert torch.allclose(mine, theirs, atol=1e-4)


def test_a_prompt_with_words_that_the_model_lacks_is_said(tmp_path, picture):
    vlm = common.load_model(TINY, self_check=False)
    vlm.processor.tokenizer.add_tokens([f"<word{n}>" for n in range(99)])
    vlm.encode([Sample("0", None, "Is it red?")], [picture])
    with pytest.raises(ValueError, match="'<word98>', id .* rows: were they resized"):
        vlm.encode([Sample("0", None, "Is it <word98>?")], [picture])


@pytest.mark.parametrize("kind", ["words", "VeRA", "AdaLoRA"])
def test_an_adapter_that_lost_a_tensor_is_refused(tmp_path, kind):
    peft = pytest.importorskip("peft")
    vlm = common.load_model(TINY, self_check=False)
    name, settings = KINDS[kind]
    adapted = peft.get_peft_model(vlm.model, getattr(peft, name)(**settings))
    adapted.save_pretrained(tmp_path / "lora")
    file = tmp_path / "lora" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors.pop(next(name for name in tensors if ".layers.2." in name))
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(UsageError, match="1 parameters of the adapter are in no file"):
        common.load_model(tmp_path / "lora", base_model=TINY, self_check=False)


def test_an_adapter_beside_the_weights_is_merged_into_them(model, base):
    pytest.importorskip("peft")
    pairs = lora([Q.format(0)])
    adapter(model, pairs, base="somewhere/else")
    vlm = common.load_model(model, self_check=False)
    assert_weights(vlm, by_hand(base, pairs, 4))
    assert vlm.options["base_model"] == str(model)
    assert "leave --base_model out" in refusal(model, base_model=TINY)


@pytest.mark.parametrize("name", [*adapters.FILES, adapters.TRAINED])
def test_parts_of_an_adapter_beside_the_weights_are_never_passed_over(model, name):
    tensors = {f"{Q.format(0)}.lora_A.weight": torch.zeros(4, WIDTH)}
    (save_file if name.endswith("safetensors") else torch.save)(tensors, model / name)
    assert f"has {name} beside whole weights, and no adapter_config.json" in refusal(model)
    (model / name).unlink()
    common.load_model(model, self_check=False)


def test_the_processor_that_was_saved_with_an_adapter_is_heard(tmp_path, base, picture):
    pytest.importorskip("peft")
    pairs = lora([Q.format(0)])
    folder = adapter(tmp_path / "lora", pairs)
    plain = common.load_model(folder, self_check=False)
    before = identity.identity_of(plain)
    template = (ROOT / "checkpoints/tiny-llava/chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text("Answer. " + template)
    vlm = common.load_model(folder, self_check=False)
    assert_weights(vlm, by_hand(base, pairs, 4))
    texts = [prompt_for(one, "Why?", strip_system=True).text for one in (plain, vlm)]
    assert texts[1] == "Answer. " + texts[0]
    assert identity.identity_of(vlm) != before


@pytest.mark.parametrize("of_base", ["chat_template.jinja", "chat_template.json", "key"])
@pytest.mark.parametrize("of_adapter", ["chat_template.jinja", "key"])
def test_an_adapters_template_and_image_processor_win_in_any_form(tmp_path, of_base, of_adapter):
    """transformers prefers some of these files to others, whosever they are."""
    pytest.importorskip("peft")
    base_folder = tmp_path / "base"
    shutil.copytree(TINY, base_folder)
    template = (base_folder / "chat_template.jinja").read_text()
    (base_folder / "chat_template.jinja").unlink()
    place_template(base_folder, of_base, template)
    folder = adapter(tmp_path / "lora", lora([Q.format(0)]), base=str(base_folder))
    place_template(folder, of_adapter, "Answer. " + template)
    images = json.loads((base_folder / "processor_config.json").read_text())["image_processor"]
    (folder / "preprocessor_config.json").write_text(json.dumps(images | {"image_mean": [0, 0, 0]}))
    vlm = common.load_model(folder, self_check=False)
    assert prompt_for(vlm, "Why?", strip_system=True).text.startswith("Answer. ")
    assert list(vlm.processor.image_processor.image_mean) == [0, 0, 0]


def place_template(folder, form, template):
    """Put a chat template into one of the places where it may be."""
    if form == "chat_template.jinja":
        (folder / form).write_text(template)
    elif form == "chat_template.json":
        (folder / form).write_text(json.dumps({"chat_template": template}))
    else:
        file = folder / "tokenizer_config.json"
        source = file if file.exists() else Path(TINY) / "tokenizer_config.json"
        content = json.loads(source.read_text()) | {"chat_template": template}
        file.write_text(json.dumps(content))


@pytest.mark.parametrize("settings", [{"bias": "all"}, {"bias": "lora_only"}, {"words": True}])
def test_what_peft_saves_whole_beside_an_adapter_is_applied(tmp_path, picture, settings):
    peft = pytest.importorskip("peft")
    vlm = common.load_model(TINY, self_check=False)
    targets = ["q_proj", "lm_head"] if settings.pop("words", False) else ["q_proj"]
    config = peft.LoraConfig(r=3, target_modules=targets, init_lora_weights=False, **settings)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(vlm.model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if name.endswith(".bias") and parameter.requires_grad:
                parameter += 0.1
    adapted.save_pretrained(tmp_path / "lora")
    vlm.model = adapted.eval().get_base_model()
    expected = logits(vlm, picture)
    merged = common.load_model(tmp_path / "lora", base_model=TINY, self_check=False)
    assert torch.allclose(logits(merged, picture), expected, atol=1e-4)


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
    places, expected = llava_lora
    vlm = common.load_model(places["adapter"], base_model=places[base])
    assert_weights(vlm, expected)
    assert vlm.options["base_model"] == str(places[base])
    if base == "vicuna":  # the base that adapter_config.json names
        named = common.load_model(places["adapter"], self_check=False)
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


# --- folders that are no whole checkpoint ---------------------------------------------------------

LLAVA = {
    "model_type": "llava_llama",
    "architectures": ["LlavaLlamaForCausalLM"],
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "mm_projector_type": "mlp2x_gelu",
}
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
VILA = {"model_type": "llava_llama", "architectures": ["LlavaLlamaModel"]}
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4\n"
TINY_CONFIG = json.loads((TINY / "config.json").read_text())

# what the line says, {file: content} of the folder
FOLDERS = [
    ("zero_to_fp32.py", {"config.json": TINY_CONFIG, "latest": "x", "global_step5/a.pt": "x"}),
    ("zero_to_fp32.py", {"mp_rank_00_model_states.pt": "x"}),
    ("merge-weights", {"config.json": TINY_CONFIG, "pytorch_model_fsdp_0/__0_0.distcp": "x"}),
    ("projector only", {"mm_projector.bin": "x"}),
    ("projector only", {"config.json": LLAVA, "mm_projector.bin": "x"}),
    ("GGUF", {"ggml-model-q4_k.gguf": "GGUF", "mmproj-model-f16.gguf": "GGUF"}),
    ("GGUF", {"config.json": TINY_CONFIG, "model.gguf": "GGUF"}),
    ("GGUF", {"MODEL.Q4_K_M.GGUF": "GGUF"}),
    ("diffusers", {"model_index.json": {}, "unet/diffusion_pytorch_model.safetensors": "x"}),
    ("another program", {"config.json": TINY_CONFIG, "onnx/decoder.onnx": "x"}),
    ("consolidated", {"params.json": {}, "consolidated.00.pth": "x"}),
    ("checkpoint-<step>", {"trainer_state.json": {}, "checkpoint-5/config.json": TINY_CONFIG}),
    ("such as mine", {"mine/config.json": TINY_CONFIG}),
    ("snapshots/", {"refs/main": "x", "snapshots/abc/config.json": TINY_CONFIG}),
    ("unfinished download", {"config.json": TINY_CONFIG, "model.safetensors.incomplete": "x"}),
    ("config without weights", {"config.json": TINY_CONFIG}),
    ("empty folder", {}),
    ("git lfs pull", {"config.json": TINY_CONFIG, "model.safetensors": POINTER}),
    ("git lfs pull", {"config.json": POINTER, "model.safetensors": POINTER}),
    ("model.safetensors is empty", {"config.json": TINY_CONFIG, "model.safetensors": ""}),
    (
        "2 of 2 weight files .* are missing",
        {
            "config.json": TINY_CONFIG,
            "model.safetensors.index.json": {
                "metadata": {},
                "weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"},
            },
        },
    ),
    ("text only .llama., no vision tower", {"config.json": LLAMA, "model.safetensors": "x"}),
    ("text only", {"config.json": {"model_type": "t5"}}),
    ("vision tower only", {"config.json": {"model_type": "siglip_vision_model"}}),
    ("deepseek-community", {"config.json": {"model_type": "multi_modality"}}),
    ("-hf", {"config.json": {"model_type": "internvl_chat", "auto_map": {"AutoModel": "a.B"}}}),
    ("VILA-1.5", {"config.json": VILA | {"llm_cfg": {}, "vision_tower_cfg": {}}}),
    ("VILA-1.5", {"config.json": VILA}),
    ("llava-hf/", {"config.json": LLAVA | {"image_aspect_ratio": "anyres"}}),
    ("llava-hf/", {"config.json": LLAVA | {"mm_patch_merge_type": "spatial_unpad"}}),
    ("llava_qwen", {"config.json": LLAVA | {"model_type": "llava_qwen"}}),
    ("--trust_remote_code", {"config.json": {"model_type": "x", "auto_map": {"AutoModel": "a.B"}}}),
    ("adapter", {"config.json": LLAVA, "adapter_config.json": {}, "adapter_model.bin": "x"}),
]


@pytest.mark.parametrize(("what", "files"), FOLDERS)
def test_a_folder_is_named_for_what_it_is(tmp_path, what, files):
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, content in files.items():
        written(folder / name, content)
    assert re.search(what, refusal(folder))


def test_a_file_in_place_of_a_folder_is_named_as_one(tmp_path):
    written(tmp_path / "model.Q4_K_M.gguf", "GGUF")
    assert "GGUF" in refusal(tmp_path / "model.Q4_K_M.gguf")
    assert "this is a file" in refusal(TINY / "model.safetensors")
    assert "no such folder" in refusal(tmp_path / "nowhere")


def test_a_tower_that_is_not_needed_is_said_and_one_that_is_nowhere_refused(tmp_path, capsys):
    with pytest.raises(UsageError, match="clip'?: no such folder"):
        common.load_model(TINY, vision_tower_path=str(tmp_path / "clip"), self_check=False)
    common.load_model(TINY, vision_tower_path=str(TINY), self_check=False)
    assert "is in the checkpoint, --vision_tower_path is not read" in capsys.readouterr().out


def test_a_hub_id_is_named_as_a_folder_is(monkeypatch):
    monkeypatch.setattr(folders, "list_repo_files", lambda name: ["README.md", "a.Q4_K_M.gguf"])
    assert "GGUF" in refusal("someone/model-GGUF")


# --- configs and files that are wrong -------------------------------------------------------------

# (file, part of it or None, changes, what the line says)
CONFIG = "config.json"
WRONG = [
    (CONFIG, "text_config", {"hidden_size": "128"}, "hidden_size"),
    (CONFIG, "text_config", {"hidden_size": -1}, "text_config.hidden_size is -1"),
    (CONFIG, "text_config", {"hidden_size": 64}, "shape"),
    (CONFIG, "text_config", {"num_attention_heads": 3}, "attention heads"),
    (CONFIG, "text_config", {"num_attention_heads": 0}, "text_config.num_attention_heads is 0"),
    (CONFIG, "text_config", {"num_hidden_layers": 0}, "num_hidden_layers is 0"),
    (CONFIG, "text_config", {"num_hidden_layers": 10**6}, "the weight files hold"),
    (CONFIG, "text_config", {"vocab_size": 0}, "vocab_size is 0"),
    (CONFIG, "text_config", {"rms_norm_eps": "x"}, "rms_norm_eps"),
    (CONFIG, "text_config", {"rope_parameters": {"rope_type": "x"}}, "KeyError: 'x'"),
    (CONFIG, "text_config", {"hidden_act": "x"}, "KeyError: 'x'"),
    (CONFIG, "vision_config", {"patch_size": 0}, "vision_config.patch_size is 0"),
    (CONFIG, "vision_config", {"image_size": 336}, "position_embedding.*instead of"),
    (CONFIG, None, {"text_config": None}, "text_config is null"),
    (CONFIG, None, {"text_config": "x"}, 'text_config is "x"'),
    (CONFIG, None, {"text_config": {}}, "the weight files hold"),
    (CONFIG, None, {"vision_config": []}, r"vision_config is \[\]"),
    (CONFIG, None, {"image_token_index": "x"}, "image_token_index"),
    (CONFIG, None, {"image_token_index": -5}, "image token's id is -5"),
    (CONFIG, None, {"vision_feature_layer": 99}, "vision_feature_layer is 99"),
    (CONFIG, None, {"vision_feature_select_strategy": "x"}, "vision_feature_select_strategy"),
    (CONFIG, None, {"dtype": "nonsense"}, "nonsense"),
    (
        CONFIG,
        None,
        {"quantization_config": {"quant_method": "modelopt"}},
        "'modelopt' is not known",
    ),
    (CONFIG, None, {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "pip install"),
    (CONFIG, None, {"quantization_config": {"load_in_4bit": True}}, "take quantization_config out"),
    ("generation_config.json", None, {"eos_token_id": "x"}, "wanted are numbers"),
    ("processor_config.json", None, {"image_processor": None}, "image processor"),
]


@pytest.mark.parametrize(("file", "part", "changes", "what"), WRONG)
def test_a_wrong_setting_is_one_line_that_names_it(model, file, part, changes, what):
    if part is not None:
        changes = {part: json.loads((model / file).read_text())[part] | changes}
    edited(model / file, **changes)
    assert re.search(what, refusal(model))


def test_a_config_without_its_decoder_builds_no_model_of_billions(model):
    config = json.loads((model / "config.json").read_text())
    del config["text_config"]
    written(model / "config.json", config)
    assert "has no text_config" in refusal(model)


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "null", "\x00\x01", "[" * 10**5])
@pytest.mark.parametrize(
    "file", ["config.json", "generation_config.json", "tokenizer.json", "processor_config.json"]
)
def test_a_file_that_holds_no_object_is_named(model, file, content):
    written(model / file, content)
    assert re.search(rf"{re.escape(file)} (is not readable JSON|holds a)", refusal(model))


@pytest.mark.parametrize("content", [3, [1], {1: torch.zeros(2)}, {"state_dict": {}}, {}])
def test_a_pickle_of_something_else_is_one_line(model, content):
    (model / "model.safetensors").unlink()
    torch.save(content, model / "pytorch_model.bin")
    assert "cannot be loaded" in refusal(model)


@pytest.mark.parametrize(
    ("template", "what"),
    [
        ("{% for %}", "TemplateSyntaxError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ raise_exception('no pictures') }}", "no pictures"),
        ("{{ messages[7].role }}", "UndefinedError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            "does not end within 0.3 seconds",
        ),
    ],
)
def test_a_template_that_fails_or_loops_is_one_line(model, monkeypatch, template, what):
    if "range" in template:
        monkeypatch.setattr(loading, "PROMPT_SECONDS", 0.3)
    written(model / "chat_template.jinja", template)
    assert re.search(what, refusal(model))


def test_what_is_no_error_of_a_checkpoint_passes():
    for error in (UsageError("as it is"), MemoryError(), torch.OutOfMemoryError(), SystemExit()):
        with pytest.raises(type(error)), errors.as_usage_error("model"):
            raise error


# --- parameters without a place -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "what"),
    [
        (
            "model.language_model.layers.0.self_attn.q_proj.lora_A.default.weight",
            "merge the adapter",
        ),
        ("model.language_model.layers.0.self_attn.q_proj.base_layer.weight", "merge the adapter"),
        ("model.language_model.layers.9.self_attn.q_proj.weight", "layers.9"),
        ("model.language_model.layers.0.self_attn.q_proj.bias", "q_proj.bias"),
        ("model.language_model.layers.0.self_attn.q_proj.weight_scale_inv", "quantised"),
        ("model.vision_tower.embeddings.position_ids", None),
        ("model.language_model.layers.0.self_attn.rotary_emb.inv_freq", None),
        ("model.vision_tower.head.attention.in_proj_weight", None),
    ],
)
def test_a_parameter_without_a_place_is_an_error_unless_it_is_harmless(model, name, what):
    state = load_file(TINY / "model.safetensors")
    (model / "model.safetensors").unlink()
    save_file(state | {name: torch.zeros(2)}, model / "model.safetensors", {"format": "pt"})
    if what is None:
        common.load_model(model, self_check=False)
    else:
        assert re.search(f"1 parameters have no place.*{what}", refusal(model))


def test_layers_that_are_left_out_on_purpose_are_no_error():
    vlm = common.load_model(TINY, decoder_layers=2)
    assert len(vlm.parts.layers) == 2


# --- quantised checkpoints, saved attention -------------------------------------------------------


@pytest.fixture(scope="module")
def quantised(tmp_path_factory):
    """{kind: folder} of tiny-llava saved as bitsandbytes and FP8 checkpoints are."""
    pytest.importorskip("bitsandbytes")
    root = tmp_path_factory.mktemp("quantised")
    made = {}
    for kind, config in (
        ("4bit", BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True)),
        ("int8", BitsAndBytesConfig(load_in_8bit=True)),
    ):
        made[kind] = copied(root / kind)
        (made[kind] / "model.safetensors").unlink()
        whole = LlavaForConditionalGeneration.from_pretrained(
            TINY, quantization_config=config, dtype=torch.bfloat16
        )
        whole.save_pretrained(made[kind])
    made["fp8"] = copied(root / "fp8")
    (made["fp8"] / "model.safetensors").unlink()
    state = {}
    for name, value in load_file(TINY / "model.safetensors").items():
        state[name] = value.to(torch.bfloat16)
        if "language_model.model.layers" in name and "proj" in name:
            scale = value.float().abs().amax() / 448
            state[name] = (value.float() / scale).to(torch.float8_e4m3fn)
            blocks = [-(-side // 128) for side in value.shape]
            state[name.replace("weight", "weight_scale_inv")] = scale.expand(blocks).contiguous()
    save_file(state, made["fp8"] / "model.safetensors", {"format": "pt"})
    whole = ["lm_head", "model.vision_tower", "model.multi_modal_projector"]
    settings = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    settings["modules_to_not_convert"] = whole
    edited(made["fp8"] / "config.json", quantization_config=settings)
    return made


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("kind", ["4bit", "int8", "fp8"])
def test_a_quantised_checkpoint_loads_in_each_dtype(quantised, base, picture, kind, dtype, caplog):
    vlm = common.load_model(quantised[kind], dtype=dtype, self_check=dtype == "float32")
    assert identity.identity_of(vlm)["dtype"] == f"{dtype} {kind}"
    found = torch.stack([logits(vlm, picture), logits(base, picture)])
    assert torch.corrcoef(found)[0, 1] > 0.99
    assert "MatMul8bitLt" not in caplog.text
    assert not any(
        getattr(module, "support_avx512bf16_for_cpu", False) for module in vlm.model.modules()
    )


def test_what_is_quantised_is_not_quantised_again(quantised):
    for kind in ("4bit", "int8"):
        assert "quantised already" in refusal(quantised["int8"], quantize_type=kind)


@pytest.mark.parametrize("name", ["_attn_implementation", "attn_implementation"])
@pytest.mark.parametrize("part", [None, "text_config", "vision_config"])
def test_a_saved_attention_kernel_is_no_obstacle(model, base, picture, part, name):
    saved = {name: "flash_attention_2"}
    config = json.loads((model / "config.json").read_text())
    edited(model / "config.json", **(saved if part is None else {part: config[part] | saved}))
    vlm = common.load_model(model, self_check=False)
    assert vlm.model.config._attn_implementation == "sdpa"
    assert torch.equal(logits(vlm, picture), logits(base, picture))

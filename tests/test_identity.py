"""A run goes on only with the same model: everything of its files that can change a number is in
its fingerprint, and a refusal says which file is another."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import common
from tests.conftest import ROOT
from vlmdiag.cli import UsageError
from vlmdiag.model.identity import file_digests, fingerprint, identity_of
from vlmdiag.runs import rundirs

TINY = ROOT / "checkpoints" / "tiny-llava"


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    return folder


def edited(name, **changes):
    def edit(folder):
        file = folder / name
        content = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(content | changes))

    return edit


def written(name, text):
    def write(folder):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)

    return write


def merged(folder):
    """A low-rank change of one matrix, in place: shapes, header and all other bytes stay."""
    state = load_file(folder / "model.safetensors")
    name = next(name for name in state if name.endswith("layers.2.mlp.down_proj.weight"))
    rows, columns = state[name].shape
    torch.manual_seed(0)
    state[name] += torch.randn(rows, 2) @ torch.randn(2, columns) * 1e-3
    save_file(state, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    "change",
    [
        edited("processor_config.json", patch_size=15),
        edited("preprocessor_config.json", do_resize=False),
        edited("tokenizer_config.json", add_bos_token=False),
        written("vision_tower/config.json", "{}"),
        edited("tokenizer.json", truncation={"max_length": 5}),
        edited("generation_config.json", eos_token_id=0),
        edited("config.json", vision_feature_layer=-1),
        edited("adapter_config.json", r=8),
        written("chat_template.jinja", "{{ messages }}"),
        written("qformer_tokenizer/vocab.txt", "[PAD]"),
        written("modeling_own.py", "x = 1"),
        merged,
    ],
)
def test_what_can_change_a_number_changes_the_fingerprint(model, change):
    before = fingerprint(model)
    assert fingerprint(model) == before
    change(model)
    assert fingerprint(model) != before


@pytest.mark.parametrize(
    "change",
    [
        edited("trainer_state.json", epoch=3),
        written("optimizer.pt", "Adam"),
        written("training_args.bin", "lr"),
        written("rng_state_0.pth", "4"),
        written("README.md", "# Model"),
        written("checkpoint-500/config.json", "{}"),
        written("eval/meta.json", "{}"),
        written("outputs/attention_tiny-llava.json", "{}"),
        written(".gitattributes", "*"),
    ],
)
def test_what_changes_no_number_leaves_the_fingerprint(model, change):
    before = fingerprint(model)
    change(model)
    assert fingerprint(model) == before


def test_one_tensor_of_a_pickle_or_of_one_shard_is_seen(tmp_path):
    state = {f"layer.{i}": torch.randn(300, 300) for i in range(6)}
    changed = state | {"layer.3": state["layer.3"] + 1e-3}
    seen = set()
    for name, tensors in (("a", state), ("b", changed)):
        for save, file in ((torch.save, "pytorch_model.bin"), (save_file, "model.safetensors")):
            folder = tmp_path / name / file.split(".")[0]
            folder.mkdir(parents=True)
            save(tensors, folder / file)
            seen.add(fingerprint(folder))
    assert len(seen) == 4


def test_one_changed_word_of_a_table_is_seen(model):
    state = load_file(model / "model.safetensors")
    before = fingerprint(model)
    name = next(name for name in state if name.endswith("embed_tokens.weight"))
    state[name][700] *= 3
    save_file(state, model / "model.safetensors", {"format": "pt"})
    assert fingerprint(model) != before


def test_a_broken_weight_file_has_a_digest_too(tmp_path):
    for name, content in (("a", b""), ("b", b"\xff" * 30), ("c", b"\x02" + b"\0" * 7 + b"[]")):
        (tmp_path / f"{name}.safetensors").write_bytes(content)
        (tmp_path / f"{name}.bin").write_bytes(content)
    assert len(set(file_digests(tmp_path).values())) >= 3


def test_a_hub_id_that_is_not_in_the_cache_is_its_name():
    assert fingerprint("nobody/no-such-model") == "hub:nobody/no-such-model"


def test_adapter_base_and_aspect_are_part_of_the_identity(model):
    vlm = common.load_model(TINY, self_check=False)
    plain = identity_of(vlm)
    assert set(plain) == {"model_name", "fingerprint", "dtype"}
    vlm.options |= {"adapter": str(model), "base_model": str(TINY), "image_aspect": "pad"}
    assert identity_of(vlm) == plain | {"adapter": fingerprint(model), "image_aspect": "pad"}


def test_a_refusal_names_the_file_and_the_system_prompt_that_goes_on(tmp_path):
    settings = {"fingerprint": "a", "prompt": "Today is 1 May. Q"}
    free = {"model_files": {"config.json": "1"}, "system_prompt": "Today is 1 May."}
    rundirs.open_run(tmp_path / "run", "x", settings, free)
    other = {"fingerprint": "b", "prompt": "Today is 2 May. Q"}
    files = {"model_files": {"config.json": "1", "chat_template.jinja": "2"}}
    with pytest.raises(UsageError) as refused:
        rundirs.open_run(tmp_path / "run", "x", other, files)
    assert "--system_prompt 'Today is 1 May.'" in str(refused.value)
    assert "others now: chat_template.jinja" in str(refused.value)
    rundirs.open_run(tmp_path / "run", "x", settings, files)

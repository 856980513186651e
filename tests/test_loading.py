"""Weights from safetensors and pickles, whole and in shards: what is read, what is refused, and how much memory it takes."""

import json
import os
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, tiny
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import common
from capturing import prefill
from cli import UsageError

SHARD = 16 * 2**20
MEASURE = """
import resource, sys
import common
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
common.load_model({small!r}, self_check=False)  # what is imported on the way
before = peak()
vlm = common.load_model({path!r}, self_check=False, dtype={dtype!r})
print(peak() - before, sum(p.numel() * p.element_size() for p in vlm.model.parameters()))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A LLaVA of some 140 MB in float32, in shards of 16 MB."""
    folder = tmp_path_factory.mktemp("large") / "llava"
    folder.mkdir()
    tokenizer = tiny.make_tokenizer(folder)
    known = tiny.make_config(tokenizer)
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=640, intermediate_size=1728, num_hidden_layers=7, num_attention_heads=10, eos_token_id=2, bos_token_id=1
    )
    config = LlavaConfig(
        vision_config=known.vision_config, text_config=text, image_token_index=known.image_token_index, vision_feature_layer=-2,
        vision_feature_select_strategy="default", image_seq_length=known.image_seq_length,
    )  # fmt: skip
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).save_pretrained(folder, max_shard_size=SHARD)
    tiny.make_processor(tokenizer).save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 5
    return folder


def as_pickles(folder, out):
    """The same checkpoint as pytorch_model-0000n.bin files."""
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("*.safetensors*"))
    index = folder / "model.safetensors.index.json"
    name_of = lambda file: file.replace("model", "pytorch_model").replace(".safetensors", ".bin")
    for file in folder.glob("*.safetensors"):
        torch.save(load_file(file), out / name_of(file.name))
    if index.exists():
        found = json.loads(index.read_text())
        found["weight_map"] = {key: name_of(file) for key, file in found["weight_map"].items()}
        (out / "pytorch_model.bin.index.json").write_text(json.dumps(found))
    return out


@pytest.mark.parametrize(("layout", "dtype"), [("safetensors", "float32"), ("bin", "bfloat16")])
def test_loading_takes_the_weights_and_one_shard(large, folders, tmp_path, layout, dtype):
    path = large if layout == "safetensors" else as_pickles(large, tmp_path / "bins")
    program = MEASURE.format(small=str(folders["llava"]), path=str(path), dtype=dtype)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    grown, weights = map(int, done.stdout.split())
    on_disk = sum(file.stat().st_size for file in path.iterdir() if file.suffix in (".safetensors", ".bin"))
    assert on_disk > 7 * SHARD
    assert grown < weights + 1.6 * SHARD, f"{grown / 2**20:.0f} MiB for {weights / 2**20:.0f} MiB of weights"  # a tensor as it is converted, and the allocator


def test_pickles_are_read_as_safetensors_are(folders, tmp_path, batch_of):
    plain, pickled = (common.load_model(path, self_check=False) for path in (folders["llava"], as_pickles(folders["llava"], tmp_path / "bin")))
    assert (tmp_path / "bin" / "pytorch_model.bin").exists()
    with torch.no_grad():
        assert torch.allclose(prefill(plain, batch_of(plain)).logits, prefill(pickled, batch_of(pickled)).logits, atol=1e-5)


class Runs:
    """What a pickle would call when it is opened without care."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


def test_a_pickle_that_runs_code_is_refused_and_does_not_run(folders, tmp_path):
    folder = as_pickles(folders["llava"], tmp_path / "bin")
    made = tmp_path / "made"
    with open(folder / "pytorch_model.bin", "wb") as file:
        pickle.dump({"model.language_model.norm.weight": Runs(made)}, file)
    with pytest.raises(UsageError, match="cannot be loaded"):
        common.load_model(folder)
    assert not made.exists()
    with open(folder / "pytorch_model.bin", "rb") as file:
        pickle.load(file)
    assert made.exists(), "the same file runs code where it is opened without care"


def test_a_parameter_that_no_file_fills_is_named(folders, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(folders["llava"], folder)
    state = load_file(folder / "model.safetensors")
    save_file({key: value for key, value in state.items() if not key.endswith("layers.2.mlp.up_proj.weight")}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match=r"layers\.2\.mlp\.up_proj\.weight"):
        common.load_model(folder)


def test_a_device_map_gives_the_same_model(folders, batch_of):
    """Without GPUs everything stays on the CPU; the path through accelerate is the one that several GPUs take."""
    plain, mapped = common.load_model(folders["llava"]), common.load_model(folders["llava"], device_map="auto")
    with torch.no_grad():
        assert torch.allclose(prefill(plain, batch_of(plain)).logits, prefill(mapped, batch_of(mapped)).logits, atol=1e-5)

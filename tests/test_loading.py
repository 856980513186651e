"""Weights from safetensors and pickles, whole and in shards: what is read, what is refused, and how
much memory it takes."""

import importlib
import json
import os
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import common
from tests.conftest import ROOT
from vlmdiag.cli import UsageError
from vlmdiag.model.vision import prefill
from vlmdiag.scenes import tiny_llava as tiny

SHARD = 16  # MiB
MEASURE = '''
import json, threading, time
import common
def held():
    """Pages of mapped files do not count: they can be dropped."""
    return int(open("/proc/self/status").read().split("RssAnon:")[1].split()[0]) / 2**10
def watch():
    while watching:
        seen.append(held())
        time.sleep(0.001)
def load(path):
    return common.load_model(path, self_check=False, dtype={dtype!r})
load({small!r})  # what is imported on the way
before, seen, watching = held(), [], True
thread = threading.Thread(target=watch, daemon=True)
thread.start()
vlm = load({path!r})
seen.append(held())  # the other thread may have been asleep
watching = False
thread.join()
weights = sum(p.numel() * p.element_size() for p in vlm.model.parameters()) / 2**20
print(json.dumps([max(seen) - before, weights]))
'''


def measured(path, small, dtype):
    """(MiB that loading takes at its peak, mapped files apart, MiB of the weights) in a process of
    its own."""
    if not os.path.exists("/proc/self/status"):
        pytest.skip("the memory of a process cannot be read here")
    program = MEASURE.format(small=str(small), path=str(path), dtype=dtype)
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    grown, weights = json.loads(done.stdout.splitlines()[-1])
    assert grown > 0.9 * weights or dtype == "float32", (
        "the peak is that of loading; weights that stay as they are stay in their file"
    )
    return grown, weights


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A LLaVA of some 140 MB in float32, in shards of 16 MB."""
    folder = tmp_path_factory.mktemp("large") / "llava"
    folder.mkdir()
    tokenizer = tiny.make_tokenizer(folder)
    known = tiny.make_config(tokenizer)
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=640,
        intermediate_size=1728,
        num_hidden_layers=7,
        num_attention_heads=10,
        eos_token_id=2,
        bos_token_id=1,
    )
    config = LlavaConfig(
        vision_config=known.vision_config,
        text_config=text,
        image_token_index=known.image_token_index,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=known.image_seq_length,
    )
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).save_pretrained(folder, max_shard_size=SHARD * 2**20)
    tiny.make_processor(tokenizer).save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 5
    return folder


def as_pickles(folder, out):
    """The same checkpoint as pytorch_model-0000n.bin files."""
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("*.safetensors*"))
    index = folder / "model.safetensors.index.json"

    def name_of(file):
        return file.replace("model", "pytorch_model").replace(".safetensors", ".bin")

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
    grown, weights = measured(path, folders["llava"], dtype)
    assert (
        sum(
            file.stat().st_size
            for file in path.iterdir()
            if file.suffix in (".safetensors", ".bin")
        )
        > 7 * SHARD * 2**20
    )
    assert grown < weights + SHARD, f"{grown:.0f} MiB for {weights:.0f} MiB of weights"


# inside the MLPs of a decoder whose other parts are tiny: some 140 MB of weights in float32
WIDE = 60_000


def wide(config):
    return lambda *args, **options: config(*args, **options | {"intermediate_size": WIDE})


def widened(monkeypatch, name):
    """(file of random_models, what is made large there)."""
    if name.startswith("llava_original"):
        monkeypatch.setattr(tiny, "make_config", widened_config(tiny.make_config))
        return "llava_original"
    file = {"nvila-lite": "nvila", "molmo-d": "molmo"}.get(name, name)
    module = importlib.import_module(f"tests.random_models.{file}")
    if file == "molmo":
        monkeypatch.setattr(module, "HIDDEN", WIDE)
    elif file in ("nvila", "minigpt4"):
        text = "Qwen2Config" if file == "nvila" else "LlamaConfig"
        monkeypatch.setattr(module, text, wide(getattr(module, text)))
    else:
        monkeypatch.setitem(module.TEXT, "intermediate_size", WIDE)
    return file


def widened_config(make):
    def made(*args, **options):
        config = make(*args, **options)
        config.text_config.intermediate_size = WIDE // 2
        return config

    return made


@pytest.mark.types
@pytest.mark.parametrize(
    "name", ["llava_original-base", "convllava", "minigpt4", "mplug_owl2", "nvila-lite", "molmo-d"]
)
def test_the_authors_layouts_take_no_more(tmp_path, folders, monkeypatch, name):
    """Their files are mapped, and tensors are converted one by one."""
    path = importlib.import_module(f"tests.random_models.{widened(monkeypatch, name)}").MODELS[
        name
    ](tmp_path / name)
    grown, weights = measured(path, folders["llava"], "bfloat16")
    # one tensor as it is converted
    assert grown < weights + 0.15 * weights, f"{grown:.0f} MiB for {weights:.0f} MiB of weights"


def test_pickles_are_read_as_safetensors_are(folders, tmp_path, batch_of):
    plain, pickled = (
        common.load_model(path, self_check=False)
        for path in (folders["llava"], as_pickles(folders["llava"], tmp_path / "bin"))
    )
    assert (tmp_path / "bin" / "pytorch_model.bin").exists()
    with torch.no_grad():
        assert torch.allclose(
            prefill(plain, batch_of(plain)).logits,
            prefill(pickled, batch_of(pickled)).logits,
            atol=1e-5,
        )


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
    save_file(
        {
            key: value
            for key, value in state.items()
            if not key.endswith("layers.2.mlp.up_proj.weight")
        },
        folder / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(UsageError, match=r"layers\.2\.mlp\.up_proj\.weight"):
        common.load_model(folder)


def test_a_device_map_gives_the_same_model(folders, batch_of):
    """Without GPUs everything stays on the CPU; the path through accelerate is the one that several
    GPUs take."""
    plain = common.load_model(folders["llava"])
    mapped = common.load_model(folders["llava"], device_map="auto")
    with torch.no_grad():
        assert torch.allclose(
            prefill(plain, batch_of(plain)).logits,
            prefill(mapped, batch_of(mapped)).logits,
            atol=1e-5,
        )

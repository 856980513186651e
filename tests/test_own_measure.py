"""The recipe of docs/own_measure.md: its files and commands, as they are printed there, on
tiny-llava."""

import os
import random
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import common
from tests.conftest import ROOT
from vlmdiag.pictures.samples import Sample, load_image
from vlmdiag.runs import rundirs
from vlmdiag.scenes.scene import floor_scene, render

PAGE = (ROOT / "docs" / "own_measure.md").read_text()
MODEL = ROOT / "checkpoints" / "tiny-llava"
NAME = "attention_entropy"


def run(words, folder, warnings="error"):
    """A command of the page, in the folder of its files, with warnings as errors."""
    settings = {"PYTHONWARNINGS": warnings, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *map(str, words[1:])],
        cwd=folder,
        env=os.environ | settings,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def commands():
    """The commands of the page: the one that measures, the one that draws."""
    (block,) = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    return [shlex.split(line) for line in block.splitlines()]


def write_page(path):
    """The page's files beside two pictures, in a folder."""
    files = re.findall(r"^`(\w+\.py)`:\n\n```python\n(.*?)```", PAGE, re.DOTALL | re.MULTILINE)
    assert len(files) == 3
    for name, source in files:
        (path / name).write_text(source)
    (path / "checkpoints").symlink_to(MODEL.parent)
    (path / "pictures").mkdir()
    rng = random.Random(1)
    for name, objects in (("two", 2), ("four", 4)):
        render(floor_scene(rng, objects)).save(path / "pictures" / f"{name}.png")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, commands):
    """The page's files beside two pictures, after its first command."""
    path = tmp_path_factory.mktemp("own_measure")
    write_page(path)
    assert "2 computed" in run(commands[0], path)
    return path


@pytest.fixture(scope="module")
def measured(folder):
    return rundirs.read_run(folder / "runs" / NAME / "tiny-llava", NAME)


@pytest.fixture(scope="module")
def vlm():
    loaded = common.load_model(MODEL, self_check=False)
    loaded.model.set_attn_implementation("eager")
    return loaded


def slow_entropy(vlm, picture, ids, moved=0, late=0):
    """(L, H), one number after the other, from the eager maps of one pass over prompt and answer.
    moved: positions by which the vision tokens are mistaken; late: rows by which the query is."""
    batch = vlm.encode([Sample("0", None, "Describe the image.")], [picture])
    answer = torch.tensor([ids])
    tokens = torch.cat([batch.input_ids, answer], 1)
    with torch.inference_mode():
        maps = vlm.model(input_ids=tokens, output_attentions=True, **batch.image_inputs).attentions
    vision = batch.vision_positions(0) + moved
    producing = [batch.input_ids.shape[1] - 1 + step + late for step in range(len(ids))]
    result = np.zeros((len(maps), maps[0].shape[1]))
    for layer, attention in enumerate(maps):
        for head in range(attention.shape[1]):
            entropies = []
            for row in producing:
                a = attention[0, head, row, vision].double()
                p = a / a.sum()
                entropies.append(float(-(p * p.log()).sum() / np.log(len(vision))))
            result[layer, head] = np.mean(entropies)
    return result


def test_the_recipe_measures_what_a_slow_computation_from_eager_maps_gives(folder, measured, vlm):
    lengths = set()
    for id in ("two", "four"):
        ids = measured.record(id)["generated_ids"]
        lengths.add(len(ids))
        picture = load_image(folder / "pictures" / f"{id}.png")
        entropy = measured.arrays(id)["vision_entropy"]
        np.testing.assert_allclose(entropy, slow_entropy(vlm, picture, ids), atol=1e-5, rtol=0)
        for mistake in ({"moved": 1}, {"late": 1}):
            wrong = slow_entropy(vlm, picture, ids, **mistake)
            assert np.abs(entropy - wrong).max() > 1e-3, mistake
    # one answer of the batch ended before the other, so that steps after an EOS were there to cut
    assert len(lengths) == 2


def test_the_recipe_goes_on_with_equal_bytes(folder, measured, commands):
    items = measured.path / "per_image"
    before = {file.name: file.read_bytes() for file in items.iterdir()}
    assert len(before) == 4
    for name in ("two.json", "two.npz"):
        (items / name).unlink()
    assert "1 computed, 1 done before" in run(commands[0], folder)
    assert {file.name: file.read_bytes() for file in items.iterdir()} == before


@pytest.mark.ray
def test_the_recipe_gives_the_same_bytes_by_ray(folder, measured, commands, tmp_path):
    pytest.importorskip("ray", reason="pip install 'vlm-diagnostics[ray]'")
    flags = ["--engine", "ray", "--ray_workers", 2, "--cpus_per_worker", 1, "--gpus_per_worker", 0]
    # warnings of Ray's own processes are none of ours
    said = run([*commands[0], "--out_root", tmp_path, *flags], folder, warnings="default")
    assert "2 Ray workers" in said and "2 computed" in said
    items = [
        {file.name: file.read_bytes() for file in path.iterdir()}
        for path in (measured.path / "per_image", tmp_path / NAME / "tiny-llava" / "per_image")
    ]
    assert len(items[0]) == 4 and items[0] == items[1]


def test_the_recipe_draws_its_figure(folder, measured, commands):
    assert "wrote entropy.png" in run(commands[1], folder)
    with Image.open(folder / "entropy.png") as figure:
        assert "attention_entropy" in figure.info["settings"]
        pixels = np.asarray(figure.convert("RGB"))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20
    assert (folder / "entropy.pdf").read_bytes().startswith(b"%PDF")

"""check_model.py --propose_grid: on models whose grid is known it finds that grid or none, on
models without one it finds none."""

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common import load_model
from tests.conftest import ROOT, in_process
from vlmdiag.model import grid_proposal
from vlmdiag.pictures.samples import AT_HAND, Sample

MODELS = Path(__file__).parent / "random_models"
# of most files one model; what it is found to be, None: that there is no grid to trust
WORDS = {
    "llava": "12 x 12 tokens over the picture, padded on all sides to a square",
    "internvl-qwen2": "3 x 3 tokens on each of tiles of the picture, then the whole of it",
    "qwen2_5_vl": "one token per 2 x 2 of `image_grid_thw` over the whole picture",
    "gemma3": "6 x 6 tokens over the whole picture",
    "pixtral": "one token per 14 x 14 of `pixel_values` over the whole picture",
    "blip2-opt": None,
    "minigpt4": None,
    "mplug_owl2": None,
}
# proportions that tell stretched from cropped and padded, rows from columns, and tiles apart
PROPORTIONS = ((1.5, 1.1), (1.0, 2.1))


@pytest.fixture(scope="module")
def random_model(tmp_path_factory):
    """random_model(file, name) -> a loaded one of tests/random_models."""
    root = tmp_path_factory.mktemp("models")

    def load(file, name):
        folder = root / name
        if not folder.exists():
            importlib.import_module(f"tests.random_models.{file}").MODELS[name](folder)
        return load_model(str(folder), self_check=False)

    return load


def first_models():
    files = [path.stem for path in sorted(MODELS.glob("[a-z]*.py"))]
    names = [next(iter(importlib.import_module(f"tests.random_models.{f}").MODELS)) for f in files]
    return [pytest.param(*pair, id=pair[1]) for pair in zip(files, names, strict=True)]


@pytest.fixture
def two_sizes(monkeypatch):
    monkeypatch.setattr(grid_proposal, "PROPORTIONS", PROPORTIONS)


@pytest.mark.types
@pytest.mark.parametrize(("file", "name"), first_models())
def test_the_grid_of_the_family_is_found_or_none(random_model, two_sizes, file, name):
    vlm = random_model(file, name)
    proposal = grid_proposal.propose(vlm)
    record = grid_proposal.record_of(vlm, proposal)
    if vlm.family.grid is None or "grid" not in vlm.family.has:
        assert proposal.layout is None, proposal.why
    assert record["as_the_family"] in (None, True), proposal.why
    if name in WORDS:
        assert record["layout"] == WORDS[name], proposal
    if proposal.layout is None:
        assert proposal.why.startswith("no trustworthy grid: ")


def test_a_tower_that_mixes_the_whole_picture_has_no_grid_to_trust(random_model, two_sizes):
    vlm = random_model("llava", "llava")
    with torch.no_grad():
        for name, parameter in vlm.parts.tower.named_parameters():
            if "out_proj" in name or "v_proj" in name:
                parameter *= 30**0.5
    proposal = grid_proposal.propose(vlm)
    assert proposal.layout is None
    assert min(proposal.inside) < grid_proposal.INSIDE


def test_tokens_in_another_order_have_no_known_layout(random_model, two_sizes, monkeypatch):
    """Row by row is what a layout says; the same tokens in a drawn order must not pass."""
    vlm = random_model("llava", "llava")
    order = torch.randperm(144, generator=torch.Generator().manual_seed(0))
    plain = grid_proposal._features
    monkeypatch.setattr(grid_proposal, "_features", lambda *args: plain(*args)[:, order])
    assert grid_proposal.propose(vlm).layout is None


def test_the_command_writes_a_family_that_gives_the_grid(folders, tmp_path, monkeypatch):
    """A family of the user's without a grid, in place of the one that knows it."""
    monkeypatch.setattr(grid_proposal, "PROPORTIONS", PROPORTIONS)
    bare = tmp_path / "bare.py"
    bare.write_text(
        "from dataclasses import replace\n\nfrom vlmdiag.families import generic\n\n"
        'FAMILY = replace(generic.FAMILY, name="bare", model_types=("llava",))\n'
    )
    check_model = in_process(ROOT / "diagnostic_tools" / "check_model.py")
    written, drawn = tmp_path / "proposed.py", tmp_path / "grid.png"
    flags = ("--family", bare, "--out", drawn, "--no_self_check")
    done = check_model(folders["llava"], *flags, "--propose_grid", written)
    assert done.returncode == 0, done.stderr
    assert WORDS["llava"] in done.stdout
    assert f"wrote {written}" in done.stdout
    with Image.open(drawn) as picture:
        picture.verify()
    known = load_model(str(folders["llava"]), self_check=False)
    proposed = load_model(str(folders["llava"]), family=str(written))
    for size in ((200, 120), (90, 300)):
        picture, sample = Image.new("RGB", size), Sample("0", AT_HAND, "x")
        grids = [vlm.encode([sample], [picture]).grids[0] for vlm in (known, proposed)]
        assert np.allclose(grids[0].boxes, grids[1].boxes, atol=1)


def test_without_weights_there_is_nothing_to_measure(capsys):
    check_model = in_process(ROOT / "diagnostic_tools" / "check_model.py")
    done = check_model("x", "--no_weights", "--propose_grid", "family.py")
    assert done.returncode == 2
    assert "needs its weights" in done.stderr

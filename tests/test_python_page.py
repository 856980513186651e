"""The recipes of docs/python.md and the walkthrough, as they are printed, on tiny-llava; their
numbers against eager attention and plain forward passes."""

import base64
import io
import json
import random
import re

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import ROOT, command_module
from tests.test_report import plant_coco
from vlmdiag.groups import GROUPS, VISION
from vlmdiag.model.vision import prefill
from vlmdiag.scenes.scene import floor_scene, render

PAGE = (ROOT / "docs" / "python.md").read_text()
FIRST, *RECIPES = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("python")
    (path / "checkpoints").symlink_to(ROOT / "checkpoints")
    render(floor_scene(random.Random(3), 3)).save(path / "picture.jpg")
    return path


@pytest.fixture(scope="module")
def beginning(folder):
    """The names of the first block."""
    names = {"__name__": "page"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        exec(FIRST, names)
    return names


@pytest.fixture
def run(folder, beginning, monkeypatch):
    monkeypatch.chdir(folder)

    def of(number):
        names = dict(beginning)
        exec(RECIPES[number - 1], names)
        return names

    return of


def eager(vlm, batch):
    """Attention maps (L, B, H, T, T) and hidden states of one plain pass."""
    decoder = vlm.parts.decoder
    before = decoder.config._attn_implementation
    decoder.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            out = vlm.model(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                position_ids=batch.position_ids,
                output_attentions=True,
                output_hidden_states=True,
                **batch.image_inputs,
            )
    finally:
        decoder.set_attn_implementation(before)
    return torch.stack(out.attentions), out.hidden_states, out.logits


def test_there_are_ten():
    assert len(RECIPES) == 10 and len(re.findall(r"^## \d+\.", PAGE, re.MULTILINE)) == 10


def test_1_the_spans_are_those_of_the_question(run):
    names = run(1)
    words = names["vlm"].tokenizer.convert_tokens_to_string(
        names["tokens"][names["first"] : names["last"]]
    )
    assert words.strip() == "Describe the image."


def test_2_the_share_of_the_first_step_is_that_of_eager_attention(run):
    names = run(2)
    maps, _, _ = eager(names["mine"], names["batch"])
    wanted = maps[:, 0, :, -1][..., (names["batch"].groups[0] == VISION)].sum(-1).mean(1)
    assert torch.allclose(names["of_steps"][0][..., VISION].mean(2)[:, 0], wanted, atol=1e-5)
    assert names["share"].shape == (len(names["mine"].parts.layers),)


def test_3_the_balance_is_between_reading_and_looking(run):
    names = run(3)
    balance = names["balance"]
    assert ((balance >= 0) & (balance <= 1)).all()
    assert balance[names["layer"], names["head"]] == balance.max()


def test_4_the_map_has_the_pictures_size_and_the_attention_of_its_patches(run):
    names = run(4)
    width, height = names["picture"].size
    assert names["heat"].shape == (height, width)
    assert np.isclose(names["heat"].max(), names["weights"].max().item())


def test_5_norms_are_those_of_plain_hidden_states(run):
    names = run(5)
    _, states, _ = eager(names["vlm"], names["batch"])
    wanted = torch.stack([state[0].norm(dim=-1) for state in states[:-1]])  # the last one is normed
    assert torch.allclose(names["norms"][:-1], wanted, rtol=1e-5)


def test_6_the_last_state_says_what_the_model_says_there(run):
    names = run(6)
    _, _, logits = eager(names["vlm"], names["batch"])
    assert names["ids"][-1, 0] == logits[0, names["position"]].argmax()


def test_7_the_cut_is_that_of_a_masked_pass(run):
    names = run(7)
    vlm, batch = names["vlm"], names["batch"]
    with torch.no_grad():
        assert torch.allclose(
            names["plain"], prefill(vlm, batch).logits[0, -1].log_softmax(-1), atol=1e-5
        )
    assert not torch.allclose(names["cut"], names["plain"], atol=1e-3)
    assert names["late"] == {3, 4, 5}


def test_8_other_tokens_are_as_they_were(run):
    names = run(8)
    plain = names["vlm"].vision(names["batch"]).pooler_output[0]
    same = torch.isclose(names["tokens"], plain).all(1)
    assert set(torch.flatten((~same).nonzero()).tolist()) == set(names["chosen"])


def test_9_the_answers_probability_is_that_of_one_pass_over_it(run):
    names = run(9)
    vlm, batch, given = names["vlm"], names["batch"], names["given"]
    ids = torch.cat([batch.input_ids, torch.tensor([given[:-1]])], 1)
    with torch.no_grad():
        logits = vlm.model(
            input_ids=ids, attention_mask=torch.ones_like(ids), **batch.image_inputs
        ).logits
    logprobs = logits[0, -len(given) :].log_softmax(-1)
    wanted = logprobs[range(len(given)), given]
    assert torch.allclose(names["forced"].logprobs[0], wanted, atol=1e-4)


def test_10_a_probes_first_step_is_that_of_eager_attention(run):
    names = run(10)
    maps, _, _ = eager(names["vlm"], names["batch"])
    wanted = maps[:, 0, :, -1].max(-1).values.mean(1)
    first = torch.stack(names["sharpness"].steps[0])[:, 0]
    assert torch.allclose(first, wanted, atol=1e-5)
    assert len(GROUPS) == 7


def test_a_run_is_read_as_the_page_on_files_says(folder, monkeypatch, capsys):
    (block,) = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs" / "files.md").read_text(), re.DOTALL
    )
    run = plant_coco(folder / "runs", "tiny-llava", 10.0, 0.01)
    monkeypatch.chdir(folder)
    exec(block, {})
    means = [run.arrays(id)["head_vision_share"].mean() for id in run.ids()]
    said = capsys.readouterr().out
    assert said.startswith(f"{np.mean(means):.3f} [") and said.endswith("n = 12\n")


# ---- the walkthrough ----

NOTEBOOK = ROOT / "diagnostic_tools" / "Diagnostic_Tools_Walkthrough.ipynb"


def test_the_walkthrough_runs_and_the_notebook_shows_what_it_shows(tmp_path, monkeypatch):
    """The stored notebook has the page's cells, and its numbers are those of a new run but for
    rounding."""
    monkeypatch.chdir(tmp_path)
    walkthrough = command_module(ROOT / "diagnostic_tools" / "make_walkthrough.py")
    try:
        assert walkthrough.main(["--out", str(tmp_path / "again.ipynb")]) == 0
    finally:
        torch.set_grad_enabled(True)
    again, kept = (json.loads(path.read_text()) for path in (tmp_path / "again.ipynb", NOTEBOOK))
    assert (kept["nbformat"], kept["nbformat_minor"]) == (4, 5)
    assert len(again["cells"]) == len(kept["cells"])
    pictures = 0
    for new, old in zip(again["cells"], kept["cells"], strict=True):
        assert new["source"] == old["source"], "run python diagnostic_tools/make_walkthrough.py"
        for one, other in zip(new.get("outputs", ()), old.get("outputs", ()), strict=True):
            assert one.get("text") == other.get("text")
            if "data" in one:
                shown = [base64.b64decode(each["data"]["image/png"]) for each in (one, other)]
                sizes = [Image.open(io.BytesIO(data)).size for data in shown]
                assert np.allclose(*sizes, rtol=0.5)  # the process's style of figures
                pictures += 1
    assert pictures >= 6 and NOTEBOOK.stat().st_size < 10**6


def test_a_cut_where_the_answer_is_read_takes_the_answer_away():
    """The walkthrough's last look, against the same cut of other tokens."""
    names = {}
    blocks = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs" / "walkthrough.md").read_text(), re.DOTALL
    )
    try:
        for block in (blocks[0], blocks[6], blocks[7]):
            exec(block, names)
        assert min(names["left"].values()) < 0.1 < 0.9 < max(names["left"].values())
        others = (names["batch"].groups == VISION) & ~names["keys"]
        others[0, names["batch"].vision_positions(0)[names["touched"][-1] + 1 :]] = False
        with names["edit"](names["vlm"], blocks=[names["Block"](names["queries"], others)]):
            kept = names["generate"](names["vlm"], names["batch"], 1).first[0, names["first"]].exp()
        assert kept > 0.9
    finally:
        torch.set_grad_enabled(True)
        plt.close("all")

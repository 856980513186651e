"""The stethoscope: its parts agree with slow, plain computations, its limits hold, and the page
works in a real browser for two people at once.

The browser is Debian's Chromium; without it these tests fail."""

import base64
import contextlib
import importlib
import io
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import zipfile
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image
from selenium.webdriver import ActionChains, Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

import common
from diagnostic_tools import demo_meta, hallucination_warning
from diagnostic_tools.viz_attention_image import demo_scene
from tests.conftest import in_process
from vlmdiag.cli import UsageError
from vlmdiag.figures import plots
from vlmdiag.model.decoding import extended, generate
from vlmdiag.pictures import overlay
from vlmdiag.pictures.samples import Sample
from vlmdiag.relevancy import gradients, rules
from vlmdiag.relevancy import methods as attribution
from vlmdiag.runs import rundirs
from vlmdiag.scenes.scene import floor_scene, render
from vlmdiag.stethoscope import analysis as stethoscope
from vlmdiag.stethoscope import figures, sessions, views
from vlmdiag.stethoscope.analysis import Analysis, Decoding, Model
from vlmdiag.stethoscope.export import Shown, export
from vlmdiag.stethoscope.sessions import Session

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "checkpoints" / "tiny-llava"
QUESTION = "Describe the image."
HOSTILE = '</script><img src=x onerror="window.pwned=1">\'`&lt;\u202e <image> </s>'


@pytest.fixture(scope="module")
def model():
    return Model(common.load_model(TINY, self_check=False))


def random_model(file):
    """{name: builder} of a family's random models."""
    return importlib.import_module(f"tests.random_models.{file}").MODELS


def asked(model, picture, question=QUESTION, decoding=None):
    analysis = Analysis(model, picture, question, decoding or Decoding(max_new_tokens=24))
    for _ in analysis.answer():
        pass
    return analysis


@pytest.fixture(scope="module")
def analysis(model):
    return asked(model, render(demo_scene()))


@pytest.fixture(scope="module")
def run(analysis):
    return gradients.trace(analysis.model.vlm, analysis.batch, analysis.ids)


# --- parts ----------------------------------------------------------------------------------------


def test_the_warning_is_the_calibration_of_the_measured_signals(analysis, monkeypatch):
    assert stethoscope.hallucination_warning(analysis).startswith("not calibrated")
    fitted = {"mean": [0] * 5, "std": [1] * 5, "weights": [-1, 0, 0, 0, 0], "bias": 0.5}
    monkeypatch.setattr(
        analysis.model,
        "calibration",
        {
            "names": ["green square", "red cross"],
            "kinds": {"captions": {"models": {"all": fitted}}},
        },
    )
    text = stethoscope.hallucination_warning(analysis)
    start = analysis.text.index("green square")
    named = [
        t
        for t, (a, b) in enumerate(analysis.spans)
        if a < start + len("green square") and b > start
    ]
    risk = 1 / (1 + np.exp(-(0.5 - np.log(analysis.probabilities[named]).mean())))
    assert f"green square {risk:.0%}" in text and "red cross" not in text


def test_probabilities_are_those_of_the_generated_tokens_sampled_ones_too(model, analysis):
    for decoding in (Decoding(max_new_tokens=24), Decoding(True, 5.0, 1.0, 12, 3)):
        some = (
            analysis
            if not decoding.do_sample
            else asked(model, analysis.picture, QUESTION, decoding)
        )
        vlm = model.vlm
        batch = vlm.encode([Sample("0", None, QUESTION)], [analysis.picture])
        found = generate(
            vlm,
            batch,
            decoding.max_new_tokens,
            decoding.do_sample,
            decoding.temperature,
            decoding.top_p,
            decoding.seed,
        )
        assert some.ids == found.ids[0] and len(some.tokens) == len(some.ids)
        assert np.allclose(some.probabilities, found.logprobs[0].exp(), atol=1e-6)
        greedy = some.evolution().ids[:, -1, 0].tolist()
        # at temperature 5 not every token is the likeliest one, which is where a maximum is wrong
        assert (greedy == some.ids) == (not decoding.do_sample)


def test_the_answer_is_streamed_and_ends_when_nobody_listens(model, analysis):
    again = Analysis(model, analysis.picture, QUESTION, Decoding(max_new_tokens=24))
    pieces = list(again.answer())
    assert (
        len(pieces) == len(again.ids)
        and all(b.startswith(a) for a, b in zip(pieces, pieces[1:]))
        and pieces[-1].strip() == again.text.strip()
    )
    assert list(again.answer()) == [again.text]  # kept
    left = Analysis(model, analysis.picture, QUESTION, Decoding(max_new_tokens=24))
    stream = left.answer()
    next(stream)
    stream.close()
    with model.lock:  # the generation has given it free
        assert left.ids is None


def test_evolution_ends_in_the_models_own_distribution(analysis, run):
    lens, probs = analysis.evolution(), run.logits.softmax(-1)
    count, depth = len(analysis.ids), analysis.model.depth
    assert lens.ids.shape == (count, depth + 1, stethoscope.TOP) and np.allclose(
        lens.probs[:, -1], probs.topk(stethoscope.TOP).values, atol=1e-5
    )
    assert np.allclose(lens.chosen[:, -1], analysis.probabilities, atol=1e-5)
    assert lens.rank[:, -1].tolist() == [
        int((probs[t] > probs[t, i]).sum()) + 1 for t, i in enumerate(analysis.ids)
    ]
    vlm = analysis.model.vlm
    vlm.model.set_attn_implementation("eager")
    try:
        whole = extended(analysis.batch, analysis.ids)
        states = vlm.model(
            input_ids=whole.input_ids,
            attention_mask=whole.attention_mask,
            pixel_values=whole.image_inputs["pixel_values"],
            output_hidden_states=True,
        )
        maps = vlm.model(
            input_ids=whole.input_ids,
            attention_mask=whole.attention_mask,
            pixel_values=whole.image_inputs["pixel_values"],
            output_attentions=True,
        )
    finally:
        vlm.model.set_attn_implementation("sdpa")
    for index in (0, 3):  # the final norm once, on every state
        wanted = (
            vlm.parts.lm_head(vlm.parts.norm(states.hidden_states[index][0, analysis.producing]))
            .softmax(-1)
            .detach()
        )
        assert np.allclose(lens.probs[:, index], wanted.topk(stethoscope.TOP).values, atol=1e-5)
        without = (
            vlm.parts.lm_head(states.hidden_states[index][0, analysis.producing])
            .softmax(-1)
            .detach()
        )
        assert not np.allclose(
            lens.probs[:, index], without.topk(stethoscope.TOP).values, atol=1e-3
        )
    assert set(lens.ids.ravel().tolist()) <= set(lens.words)
    for layer in (0, depth - 1):
        wanted = (
            maps.attentions[layer][0][:, analysis.producing][..., analysis.vision]
            .transpose(0, 1)
            .detach()
        )
        assert np.allclose(analysis.attention(layer), wanted, atol=1e-5)
        assert not np.allclose(
            analysis.attention(layer),
            maps.attentions[layer][0][:, analysis.producing + 1][..., analysis.vision]
            .transpose(0, 1)
            .detach(),
            atol=1e-3,
        )


def test_relevancy_in_chunks_is_that_of_all_tokens_together_and_says_how_far_it_is(
    model, analysis, run, monkeypatch
):
    monkeypatch.setattr(stethoscope, "CHUNK", 3)
    some = asked(model, analysis.picture)
    shares = list(some.relevancy_steps())
    assert (
        shares[0] == 0
        and shares == sorted(shares)
        and shares[-1] == 1
        and len(shares) == 1 + -(-len(some.ids) // 3)
    )
    assert list(some.relevancy_steps()) == []  # kept
    whole = attribution.relevancy(run, range(len(some.ids)))
    for name in ("rows", "image", "cells"):
        assert np.allclose(
            getattr(some.relevancy(), name), getattr(whole, name), rtol=1e-3, atol=1e-7
        )


def test_one_who_leaves_does_not_spoil_the_computation_of_another(model, analysis, monkeypatch):
    monkeypatch.setattr(stethoscope, "CHUNK", 4)
    some = asked(model, analysis.picture)
    leaving, staying = some.relevancy_steps(), some.relevancy_steps()
    next(leaving), next(staying), next(leaving)
    leaving.close()
    assert list(staying)[-1] == 1 and np.allclose(
        some.relevancy().rows, analysis.relevancy().rows, rtol=1e-3, atol=1e-7
    )


def test_visual_contribution_counts_the_text_that_a_token_sees(analysis):
    found, groups = analysis.relevancy(), np.array(analysis.groups)
    for t in (0, 5):
        rows = found.rows[t]
        seen = [i for i in range(analysis.producing[t] + 1) if groups[i] in ("user", "generated")]
        assert np.allclose(
            analysis.contribution("sum", "ratio")[t],
            found.image[t].sum(-1) / rows[:, seen].sum(-1),
            rtol=1e-4,
        )
        assert np.allclose(
            analysis.contribution("mean", "ratio")[t],
            found.image[t].mean(-1) / rows[:, seen].mean(-1),
            rtol=1e-4,
        )
        top, text = found.image[t].max(-1), rows[:, seen].max(-1)
        assert np.allclose(analysis.contribution("max", "share")[t], top / (top + text), rtol=1e-4)
    all_text = torch.from_numpy(found.rows[..., np.isin(groups, ("user", "generated"))])
    assert np.allclose(
        analysis.contribution("max"),
        rules.share(torch.from_numpy(found.image), all_text),
        rtol=1e-4,
    )  # zeros after a token change no maximum
    assert not np.allclose(
        analysis.contribution("mean", "ratio"),
        rules.ratio_of(torch.from_numpy(found.image), all_text, "mean"),
        rtol=1e-2,
    )  # but a mean


def test_heads_are_compared_by_what_they_give_to_picture_and_question(analysis):
    vlm, whole = analysis.model.vlm, extended(analysis.batch, analysis.ids)
    vlm.model.set_attn_implementation("eager")
    try:
        maps = vlm.model(
            input_ids=whole.input_ids,
            attention_mask=whole.attention_mask,
            pixel_values=whole.image_inputs["pixel_values"],
            output_attentions=True,
        ).attentions
    finally:
        vlm.model.set_attn_implementation("sdpa")
    rows = np.stack([of_layer[0].detach().numpy() for of_layer in maps])  # (L, H, N, N)
    rows = rows[:, :, analysis.producing].transpose(2, 0, 1, 3)  # (T, L, H, N)
    picture = rows[..., analysis.groups == "vision"].sum(-1)
    question = rows[..., np.isin(analysis.groups, ("user", "template"))].sum(-1)
    with_answer = question + rows[..., analysis.groups == "generated"].sum(-1)
    heads = analysis.looking_heads()
    assert heads.mass.shape == (len(analysis.ids), analysis.model.depth, analysis.model.heads)
    assert np.allclose(heads.mass, picture, atol=1e-5)
    assert np.allclose(heads.balance, picture / (picture + question), atol=1e-5)
    assert not np.allclose(heads.balance, picture / (picture + with_answer), atol=1e-3)
    counts = [(analysis.groups == name).sum() for name in ("vision", "user", "template")]
    assert heads.chance == pytest.approx(counts[0] / sum(counts))


def test_the_map_of_heads_does_not_depend_on_the_memory_for_maps(model, analysis, monkeypatch):
    some = asked(model, analysis.picture)
    monkeypatch.setattr(stethoscope, "ATTENTION_BUDGET", analysis.attention(0).nbytes)
    some.attention(2)
    assert np.allclose(some.looking_heads().mass, analysis.looking_heads().mass, atol=1e-6)
    assert list(some._attention) == [2]


def test_entropy_is_that_of_the_models_own_distribution(analysis, run):
    probs = run.logits.double().softmax(-1)
    bits = -(probs * probs.clamp_min(1e-300).log2()).sum(-1)
    assert np.allclose(analysis.evolution().entropy[:, -1], bits, atol=1e-4)
    nats = bits * np.log(2)
    assert not np.allclose(analysis.evolution().entropy[:, -1], nats, atol=1e-4)


def test_words_that_looked_at_patches_are_those_whose_rows_did(analysis):
    chosen, layer = {40, 41, 52}, 3
    maps = analysis.attention(layer)
    assert np.allclose(
        analysis.looked_at(chosen, "attention", layer),
        [sum(maps[t, :, p].mean() for p in chosen) for t in range(len(maps))],
        atol=1e-6,
    )
    assert np.allclose(
        analysis.looked_at(chosen, "attention", layer, 2),
        [sum(maps[t, 2, p] for p in chosen) for t in range(len(maps))],
        atol=1e-6,
    )
    cells = analysis.relevancy().cells[:, layer]
    assert np.allclose(
        analysis.looked_at(chosen, "relevancy", layer),
        [sum(c[p] for p in chosen) / c.sum() for c in cells],
        rtol=1e-4,
    )
    picture = analysis.place(len(analysis.vision))
    thing = next(thing for thing in demo_scene().things if thing.color == "green")
    centre = np.array([thing.x, thing.y]) / analysis.picture.size
    cell = views.canvas(analysis, len(analysis.vision)).cell(*centre)
    x0, y0, x1, y1 = picture.boxes[cell]
    assert x0 <= thing.x < x1 and y0 <= thing.y < y1
    around = {cell + dx + dy * picture.shape[1] for dx in (-1, 0, 1) for dy in (-1, 0, 1)}
    looked = analysis.looked_at(around, "relevancy")
    assert (
        analysis.tokens[int(looked.argmax())].strip() == "green"
    )  # the colour word came from the object of that colour
    assert analysis.looked_at(range(len(cells[0])), "relevancy") == pytest.approx(1)


def test_raw_attention_stays_within_its_memory(model, analysis, monkeypatch):
    some = asked(model, analysis.picture)
    monkeypatch.setattr(stethoscope, "ATTENTION_BUDGET", 2 * analysis.attention(0).nbytes)
    for layer in (0, 3, 5, 3):
        assert (
            np.allclose(some.attention(layer), analysis.attention(layer), atol=1e-6)
            and len(some._attention) <= 2
        )
    monkeypatch.setattr(stethoscope, "ROWS_BUDGET", 1000)
    with pytest.raises(UsageError, match="generate fewer tokens"):
        some.relevancy()


def test_models_without_tower_maps_or_a_grid_show_the_rest(load, blip_folders, pictures):
    qwen = asked(Model(load("qwen")), pictures[1], decoding=Decoding(max_new_tokens=3))
    assert qwen.relevancy().cells is None and "tower" in qwen.missing()[0]
    assert "data:image" in views.relevancy_panel(qwen, 1, 2, 100, True)[0]
    blip = asked(
        Model(common.load_model(blip_folders("instructblip-llama"), self_check=False)),
        pictures[1],
        decoding=Decoding(max_new_tokens=3),
    )
    assert (
        "unknown" in blip.missing()[0]
        and "unknown" in views.attention_panel(blip, 0, 0, None, 100)
        and "head 0" in views.attention_panel(blip, 0, 0, None, 100)
    )
    overlay, words = views.relevancy_panel(blip, 1, 2, 100, False)
    assert (
        "data:image" in overlay
        and "Q-Former" in overlay
        and "Relevancy to Previous Answer" in words
    )
    assert "Choose relevancy" in views.patch_panel(blip, "attention", 0, None)[1]
    blip.patches = {3}
    assert "data:image" in views.patch_panel(blip, "relevancy", 0, None)[
        0
    ] and "data:image" in views.compare_panel(blip, (0, 1), (1, 2), 100)
    with pytest.raises(UsageError, match="decoder-only"):
        Model(common.load_model(blip_folders("blip2-t5"), self_check=False))


@pytest.mark.parametrize(
    "name", ["llava_next", "blip2-opt", "instructblip-llama", "minigpt4", "convllava", "mplug_owl2"]
)
def test_the_models_of_the_published_table_are_shown(tmp_path, pictures, name):
    """Every panel's numbers for each family that LVLM-Stethoscope names, done or to do, and one
    with tiles."""
    builders = {
        key: build
        for file in ("llava_next", "blip2", "minigpt4", "convllava", "mplug_owl2")
        for key, build in random_model(file).items()
    }
    shown = asked(
        Model(common.load_model(builders[name](tmp_path / name), self_check=False)),
        pictures[1],
        "Is it red?",
        Decoding(max_new_tokens=4),
    )
    found, depth = shown.relevancy(), shown.model.depth
    count = len(shown.ids)
    assert (
        found.picture.shape[:2] == (count, depth)
        and found.picture.min() >= 0
        and found.picture.max() > 0
    )
    assert shown.contribution("max", "share").shape == (count, depth)
    place = shown.place(found.picture.shape[-1])
    assert (
        place is not None and np.isfinite(place.paint(found.picture[0, -1], smooth=False)).any()
    ), "the map lies on the picture"
    assert (shown.place(len(found.image[0, 0])) is None) == (
        "grid" not in shown.model.vlm.family.has
    )
    assert shown.looked_at({0, 1}, "relevancy").shape == (count,)


def test_a_part_that_computes_elsewhere_gives_the_same_answer(analysis):
    vlm = common.load_model(
        TINY, dtype="bfloat16", self_check=False
    )  # no second device here: another floating type stands for it
    plain = asked(Model(vlm), analysis.picture)
    assert not stethoscope.part_on_cpu(vlm)
    stethoscope.compute_on(
        [vlm.parts.tower, vlm.parts.connector, None],
        torch.device("cpu"),
        torch.float32,
        vlm.device,
        vlm.dtype,
    )
    assert {p.dtype for p in vlm.parts.tower.parameters()} == {torch.float32} and {
        p.dtype for p in vlm.parts.layers[0].parameters()
    } == {torch.bfloat16}
    some = asked(Model(vlm), analysis.picture)
    assert (
        some.ids == plain.ids == analysis.ids
        and some.relevancy().cells.shape == analysis.relevancy().cells.shape
    )
    assert np.corrcoef(some.relevancy().cells[4, -1], analysis.relevancy().cells[4, -1])[0, 1] > 0.9


# --- limits and sessions --------------------------------------------------------------------------


def test_what_is_too_large_or_no_picture_is_refused_in_one_line(
    model, analysis, tmp_path, monkeypatch
):
    (tmp_path / "no.png").write_text("no picture")
    (tmp_path / "ok.png").write_bytes(b"")
    for name in ("no.png", "ok.png"):
        with pytest.raises(UsageError, match="not a readable picture"):
            stethoscope.read_picture(tmp_path / name)
    buffer = io.BytesIO()
    Image.new("1", (8000, 8000)).save(buffer, "PNG")  # 64 million pixels in a few bytes
    (tmp_path / "wide.png").write_bytes(buffer.getvalue())
    with pytest.raises(UsageError, match="8000 x 8000 pixels"):
        stethoscope.read_picture(tmp_path / "wide.png")
    Image.new("1", (20000, 1)).save(tmp_path / "strip.png")
    with pytest.raises(UsageError, match="20000 x 1 pixels, one side more than 1000 times"):
        stethoscope.read_picture(tmp_path / "strip.png")
    monkeypatch.setattr(stethoscope, "FILE_LIMIT", 100)
    with pytest.raises(UsageError, match="MiB"):
        stethoscope.read_picture(tmp_path / "wide.png")
    with pytest.raises(UsageError, match="type a question"):
        Analysis(model, analysis.picture, " \n")
    with pytest.raises(UsageError, match="1537 characters"):
        Analysis(model, analysis.picture, "a" * 1537)
    with pytest.raises(UsageError, match="can be generated"):
        Analysis(model, analysis.picture, QUESTION, Decoding(max_new_tokens=5000))


def test_a_session_keeps_a_few_analyses_and_finds_the_same_question_again(model, analysis):
    session, other = Session(), Session()
    some = [
        session.analysis(model, analysis.picture, f"Question {i}?", Decoding())
        for i in range(sessions.KEPT)
    ]
    assert session.analysis(model, analysis.picture.copy(), "Question 0?", Decoding()) is some[0]
    assert other.analysis(model, analysis.picture, "Question 0?", Decoding()) is not some[0]
    assert (
        session.analysis(model, analysis.picture, "Question 0?", Decoding(seed=1, do_sample=True))
        is not some[0]
    )
    assert (
        len(session.kept) == sessions.KEPT
        and session.analysis(model, analysis.picture, "Question 1?", Decoding()) is not some[1]
    )  # the oldest went


def test_people_at_once_get_their_own_answers(model, pictures):
    wanted = [asked(model, picture).ids for picture in pictures]
    got, threads = {}, []

    def work(i):
        some = asked(model, pictures[i])
        got[i] = (
            some.ids,
            some.evolution().chosen[:, -1],
            some.relevancy().rows.shape,
            some.attention(2).sum(-1).max(),
        )

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(pictures))]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    for i, ids in enumerate(wanted):
        assert got[i][0] == ids and got[i][2][0] == len(ids) and got[i][3] <= 1.0001
    assert model.vlm.parts.decoder.config._attn_implementation == "sdpa"


# --- views and export -----------------------------------------------------------------------------


def test_text_from_outside_is_text_in_the_page(model, analysis):
    some = asked(model, analysis.picture, HOSTILE, Decoding(max_new_tokens=3))
    some.tokens[0] = some.labels[-len(some.tokens)] = HOSTILE
    some.evolution().words.update(dict.fromkeys(some.evolution().words, HOSTILE))
    some.text, some.spans, some.patches = HOSTILE, [(0, len(HOSTILE))] * len(some.ids), {1}
    pages = [
        views.probability_panel(some, 0),
        views.contribution_panel(some, 0, 1, "sum", "ratio", 50),
        views.evolution_panel(some, 0),
        *views.relevancy_panel(some, 1, 1, 100, True),
        views.attention_panel(some, 0, 0, 1, 100),
        views.heads_panel(some, 0, 0, 1, "balance"),
        *views.patch_panel(some, "attention", 0, None),
        views.compare_panel(some, (0, 0), (1, 1), 100),
    ]
    for page in pages:
        tags = set(re.findall(r"<\s*/?([a-zA-Z0-9]+)", page))
        assert tags <= set("div p h4 small bdi i span table tr td img progress".split()), tags
        assert (
            all(
                src.startswith("data:image/jpeg;base64,")
                for src in re.findall(r'src="([^"]*)"', page)
            )
            and 'onerror="' not in page
        )
    assert (
        views.shown("\n") == "↵"
        and views.shown("  ") == "␣␣"
        and views.shown("") == "∅"
        and "\u202e" not in views.shown(HOSTILE)
    )


def test_every_token_has_the_colour_of_the_chosen_measure(analysis):
    ends = {"probability": 1, "contribution": 1, "entropy": analysis.evolution().entropy[:, -1]}
    values = {
        "probability": analysis.probabilities,
        "contribution": analysis.contribution("max", "share")[:, -1],
        "entropy": analysis.evolution().entropy[:, -1],
    }
    sheets = []
    for by, (colors, what) in views.MEASURES.items():
        page = views.token_colors(analysis, by)
        found = re.findall(r"#tokens label:nth-child\((\d+)\)\{background:rgb\(([\d,]+)\)", page)
        assert [int(number) for number, _ in found] == [*range(1, len(analysis.ids) + 1)]
        wanted = views.color(values[by], np.max(ends[by]), colors)
        assert [tuple(map(int, rgb.split(","))) for _, rgb in found] == [*map(tuple, wanted)]
        assert what in page
        sheets.append([rgb for _, rgb in found])
    assert sheets[0] != sheets[1] != sheets[2]


def test_every_alternative_is_seen_on_the_log_axis_and_read_as_a_number(analysis):
    page, lens = views.probability_panel(analysis, 4), analysis.evolution()
    page = page[page.index("Alternatives") :]
    widths = [
        float(width) for width in re.findall(r'class="bar" style="[^"]*width:([\d.]+)%', page)
    ]
    probs = lens.probs[4, -1]
    decades = np.ceil(-np.log10(probs.min()))
    assert np.allclose(widths, 100 * (1 + np.log10(probs) / decades), atol=0.06)
    assert (np.diff(widths) <= 0).all() and (100 * probs < 1).sum() == 9  # a linear axis hid nine
    assert sum(width > 1 for width in widths) >= 9
    assert "0.992" in page and all(views.probability(float(p)) in page for p in probs)
    assert re.findall(r'<span style="left:0.0%">1e-(\d+)<', page) == [f"{decades:.0f}"]


def test_the_map_of_heads_has_a_cell_per_head_and_frames_the_chosen_one(analysis):
    heads, token = analysis.looking_heads(), 4
    for measure, values in (("mass", heads.mass[token]), ("balance", heads.balance[token])):
        page = views.heads_panel(analysis, token, 3, 2, measure)
        written = re.search('data-values="([^"]*)"', page)[1].split()
        assert np.allclose(np.array(written, float).reshape(values.shape), values, atol=6e-4)
        data = re.search('base64,([^"]*)', page)[1]
        image = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))), float)
        side = image.shape[0] // len(values)
        assert image.shape[:2] == (side * values.shape[0], side * values.shape[1])
        centres = image[side // 2 :: side, side // 2 :: side]
        if measure == "mass":
            wanted = views.color(values, values.max(), "Blues")
        else:
            reach = min(heads.chance, 1 - heads.chance)
            wanted = views.color(values - heads.chance + reach, 2 * reach, "RdBu")
        assert np.abs(centres - wanted).max() < 12  # JPEG
        edges = image[1::side, side // 2 :: side]  # of the upper ends of cells
        far = np.abs(edges - np.array(views.CHOSEN)).sum(-1)
        assert np.unravel_index(far.argmin(), far.shape) == (3, 2)
    assert f"{(heads.balance[token] > heads.chance).sum()} of {values.size} heads" in page


def test_maps_are_as_opaque_and_as_smooth_as_asked(analysis):
    canvas = views.canvas(analysis, len(analysis.vision))
    values = analysis.relevancy().picture[4, -1]

    def drawn(**look):
        return np.asarray(canvas.overlay(values, values.max(), views.Look(**look)), float)

    pale = (canvas._pale * 255).astype(np.uint8)
    assert np.abs(drawn(opacity=0) - pale).max() <= 1
    assert (drawn() == drawn(opacity=90, smooth=False)).all()
    away = [np.abs(drawn(opacity=percent) - pale).mean() for percent in (10, 50, 100)]
    assert away[0] < away[1] < away[2]
    x0, y0, x1, y1 = canvas.grid.boxes[int(values.argmax())].round().astype(int)
    heat = overlay.painted(canvas.grid, values)[y0:y1, x0:x1]
    smooth = overlay.painted(canvas.grid, values, smooth=True)[y0:y1, x0:x1]
    assert np.ptp(heat) == 0 < np.ptp(smooth)
    assert (drawn(smooth=True) != drawn()).any()
    page = views.relevancy_panel(analysis, 4, 5, 100, False)[0]
    assert 'alt="The picture itself"' in page  # beside the map


def test_where_it_is_not_calibrated_the_command_is_for_this_model(tmp_path):
    some = tmp_path / "my model"
    args = demo_meta.parse_args(
        [
            "--model-name",
            str(some),
            "--load-4bit",
            "--out_root",
            str(tmp_path),
            "--image_aspect",
            "pad",
        ]
    )
    line = demo_meta.to_calibrate(args).splitlines()[-1]
    program, script, *flags = shlex.split(line)
    assert program == "python" and Path(script).samefile(
        ROOT / "diagnostic_tools" / "hallucination_warning.py"
    )
    fit = hallucination_warning.parse_args(flags)
    assert (fit.command, fit.model_path, fit.out_root) == ("fit", str(some), str(tmp_path))
    assert fit.quantize_type == "4bit" and fit.image_aspect == "pad"
    assert fit.image_dir.endswith("COCO/val2017") and fit.ann_file.endswith("_val2017.json")
    tiny = demo_meta.to_calibrate(demo_meta.parse_args([]))
    assert "data/shapes/val2017" in tiny and "--out_root" not in tiny
    words = shlex.split(tiny.splitlines()[-1])
    assert Path(words[words.index("--model_path") + 1]).samefile(TINY)
    args.auth = "me:secret"  # visitors from elsewhere see no path of this machine
    assert "/" not in demo_meta.to_calibrate(args)


def test_the_top_candidates_of_every_layer_stand_in_its_title(analysis):
    page, lens = views.evolution_panel(analysis, 4), analysis.evolution()
    titles = re.findall(r'class="cell" style="[^"]*" title="([^"]*)"', page)
    assert (
        len(titles) == analysis.model.depth + 1
        and titles[0].startswith("embeddings")
        and titles[-1].splitlines()[1].startswith("1. green")
    )
    assert (
        all(len(title.splitlines()) == 1 + stethoscope.TOP for title in titles)
        and f"{lens.probs[4, -1, 0]:.4f}" in titles[-1]
    )


def test_exported_maps_have_the_colour_ceilings_of_the_page(analysis):
    maps = analysis.relevancy().picture[4]  # (layers, cells)
    attention = analysis.attention(2)[4].mean(0)
    most = float(attention.max())
    canvas = views.Canvas(analysis.picture, analysis.place(maps.shape[-1]), figures.PICTURE)

    def drawn(draw, **settings):
        figure = draw(analysis, figures.Shown(token=4, **settings))
        image = np.asarray(figure.axes[0].images[0].get_array())
        plots.plt.close(figure)
        return image

    for percent in (100, 30):
        # of the largest of the token in any layer, as the page's slider says
        of_page = np.asarray(canvas.overlay(maps[1], float(maps.max()) * percent / 100))
        of_layer = np.asarray(canvas.overlay(maps[1], maps[1].max()))
        found = drawn(figures.draw_relevancy, rel_layer=1, rel_ceiling=percent)
        assert (found == of_page).all() and (found != of_layer).any()
        of_page = np.asarray(canvas.overlay(attention, most * percent / 100))
        assert (drawn(figures.draw_attention, att_layer=2, att_ceiling=percent) == of_page).all()
    both = float(max(maps[1].max(), analysis.relevancy().picture[8, 3].max())) / 2
    compared = {"cmp_layer": 1, "cmp_token": 8, "cmp_other": 3, "cmp_ceiling": 50}
    found = drawn(figures.draw_compare, **compared)
    assert (found == np.asarray(canvas.overlay(maps[1], both))).all()
    figure = figures.draw_contribution(analysis, figures.Shown(vc_ceiling=40))
    assert figure.axes[0].images[0].get_clim() == (0, 0.4)
    plots.plt.close(figure)


def test_an_export_is_a_run_that_viz_relevancy_reads(analysis, tmp_path):
    analysis.patches = {40, 41}
    found, archive = export(
        analysis, Shown(token=4, cmp_token=8, att_head=1), str(TINY), tmp_path / "runs", tmp_path
    )
    run = rundirs.read_run(found, "relevancy")
    assert run.ids() == ["picture"] and run.record("picture")["caption"] == analysis.text.strip()
    assert np.allclose(run.arrays("picture")["rows"], analysis.relevancy().rows) and run.arrays(
        "picture"
    )["raw_attention"].shape == (len(analysis.ids), 6, 144)
    shown = json.loads((found / "analysis" / "picture_shown.json").read_text())
    assert (
        shown["alternatives"][4][0][0].strip() == "green"
        and len(shown["evolution"]["top"][4]) == 7
        and shown["patches"]["selected"] == [40, 41]
    )
    names = {
        f"{panel}"
        for panel in (
            "probabilities",
            "contribution",
            "evolution",
            "relevancy",
            "attention",
            "patches",
            "compare",
        )
    }
    assert {
        path.stem.removeprefix("picture_") for path in (found / "analysis").glob("*.png")
    } == names
    with zipfile.ZipFile(archive) as bundle:
        assert {
            f"{found.name}/meta.json",
            f"{found.name}/per_image/picture.npz",
            f"{found.name}/pictures/picture.png",
        } <= set(bundle.namelist())
    done = in_process(ROOT / "diagnostic_tools" / "viz_relevancy.py")(
        "--run_dir", found, "--image_folder", found / "pictures", "--token", 4
    )
    assert done.returncode == 0, done.stderr
    assert (found / "analysis" / "picture_token4.png").exists()
    assert (
        export(analysis, Shown(), str(TINY), tmp_path / "runs", tmp_path)[0] != found
    )  # never somebody else's folder


# --- the command line -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--num-beams 2", "only 1"),
        ("--cfg-path a.yaml", "--model-name"),
        ("--options a=b", "--model-name"),
        ("--host 0.0.0.0", "--password_file"),
        ("--host 192.168.1.2", "--password_file"),
        ("--password_file nowhere", "cannot be read"),
        ("--password_file README.md --auth a:b", "exclude"),
        ("--session_minutes nan", "no number above 0"),
        ("--session_memory 0", "no number above 0"),
        ("--max-length 0", "from 1 to"),
        ("--temperature 0", "from 0.1 to 2"),
        ("--load-8bit --load_4bit", "exclude"),
        ("--model-name nowhere/at/all", "no such folder"),
    ],
)
def test_wrong_flags_end_in_one_line(flags, message, capsys):
    command = in_process(ROOT / "diagnostic_tools" / "demo_meta.py")
    done = command(*flags.split())
    assert (
        done.returncode == 2
        and message in done.stderr
        and len(done.stderr.strip().splitlines()) == 1
    ), done.stderr


# --- the page -------------------------------------------------------------------------------------


@contextlib.contextmanager
def serving(root, *flags):
    """(address, where exports go, log file) of the real app."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Gradio's own: event loops left to the garbage collector, what pandas 3 deprecates
    own = [
        "ignore::ResourceWarning",
        "ignore:'future.no_silent_downcasting' is deprecated",
        "ignore:::gradio.queueing",
    ]
    ignored = [part for rule in own for part in ("-W", rule)]
    command = [
        sys.executable,
        "-W",
        "error",
        *ignored,
        str(ROOT / "diagnostic_tools" / "demo_meta.py"),
        "--port",
        str(port),
        "--out_root",
        str(root / "runs"),
    ]
    environment = os.environ | {"TMPDIR": str(root)}
    with open(root / "log", "w+") as log:
        process = subprocess.Popen(
            [*command, *map(str, flags)], stdout=log, stderr=log, env=environment, cwd=root
        )
        try:
            end = time.monotonic() + 200
            while "open http" not in (root / "log").read_text():
                assert process.poll() is None and time.monotonic() < end, (root / "log").read_text()
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}/", root / "runs", root / "log"
        finally:
            process.terminate()  # an interrupt may be ignored, as it is below nohup
            process.wait(60)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("app")) as served:
        yield served


@pytest.fixture
def browse(open_browser):
    """browse() -> a new browser, empty again after the test."""
    browsers = []

    def make():
        browser = open_browser("1500,1200", {"browser": "ALL"})
        browser.set_script_timeout(60)
        browsers.append(browser)
        return browser

    yield make
    for browser in browsers:
        browser.get("about:blank")


class Visitor:
    """What a person does in the page."""

    def __init__(self, driver, address):
        self.driver = driver
        driver.get(address)
        self.until(lambda: self.all("#question textarea"))

    def all(self, css):
        return self.driver.find_elements(By.CSS_SELECTOR, css)

    def until(self, holds, seconds=100):
        return WebDriverWait(self.driver, seconds, 0.1, ignored_exceptions=(Exception,)).until(
            lambda _: holds()
        )

    def click(self, css, index=0):
        self.driver.execute_script("arguments[0].click()", self.all(css)[index])

    def text(self, id):
        return self.driver.execute_script(
            "return document.getElementById(arguments[0])?.innerText ?? ''", id
        )

    def html(self, id):
        """What the panel draws, without Gradio's own signs of progress."""
        return self.driver.execute_script(
            "return [...document.querySelectorAll('#' + arguments[0] + ' .st')].map(e =>"
            " e.outerHTML).join()",
            id,
        )

    def value(self, id):
        return self.driver.execute_script(
            "return document.querySelector('#' + arguments[0] + ' textarea, #' + arguments[0] + '"
            " input')?.value ?? ''",
            id,
        )

    def upload(self, path):
        for clear in self.all(
            "#upload button[aria-label='Clear'], #upload button[aria-label='Remove this file']"
        ):
            self.driver.execute_script("arguments[0].click()", clear)
        self.until(lambda: self.all("#upload input[type=file]"))[0].send_keys(str(path))

    def ask(self, question=None):
        if question is not None:
            box = self.all("#question textarea")[0]
            box.send_keys(Keys.CONTROL, "a")
            box.send_keys(question or Keys.DELETE)
        self.click("#ask")

    def tab(self, name):
        button = next(b for b in self.all("button[role=tab]") if b.text.strip() == name)
        self.driver.execute_script("arguments[0].click()", button)

    def move(self, id, key=Keys.ARROW_LEFT):
        """Move a slider by one step."""
        self.all(f"#{id} input[type=range]")[0].send_keys(key)

    def message(self):
        """The message that the page shows, which is closed then."""
        read = (
            "return [...document.querySelectorAll('.toast-body')].map(toast =>"
            " toast.textContent).join(' ').trim()"
        )
        found = self.until(lambda: self.driver.execute_script(read))
        for close in self.all(".toast-close"):
            self.driver.execute_script("arguments[0].click()", close)
        self.until(lambda: not self.all(".toast-body"))
        return found


SLIDERS = {
    "Visual Contribution": ("contribution", ["vc_layer", "vc_ceiling"]),
    "Relevancy Analysis": ("rel_picture", ["rel_layer", "rel_ceiling"]),
    "Raw Attention": ("attention", ["att_layer", "att_head", "att_ceiling"]),
    "Compare": ("compare", ["cmp_layer", "cmp_other", "cmp_ceiling"]),
}


def test_the_page_from_upload_to_export(page, browse, tmp_path):
    address, runs, log = page
    first, second = render(demo_scene()), render(floor_scene(Random(7), 3, square=True))
    first.save(tmp_path / "first.png")
    second.save(tmp_path / "second.png")
    (tmp_path / "bad.png").write_text("no picture at all")
    one, two = Visitor(browse(), address), Visitor(browse(), address)

    one.ask()
    assert "choose a picture first" in one.message()  # an error is a message, and the page goes on
    one.upload(tmp_path / "bad.png")
    assert "not a readable picture" in one.message()
    one.upload(tmp_path / "first.png")
    one.until(lambda: one.all("#preview img"))
    one.ask("")
    assert "type a question" in one.message()

    two.upload(tmp_path / "second.png")
    two.until(lambda: two.all("#preview img"))
    one.ask(QUESTION), two.ask(QUESTION)  # at once
    for visitor in (one, two):
        visitor.until(lambda v=visitor: v.all("#probability .cell"))
    assert (
        "green square" in one.value("answer")
        and "green square" not in two.value("answer")
        and one.value("warning").startswith("not calibrated")
    )
    assert len(one.all("#tokens label")) == 16 and "Alternatives to token 0" in one.text(
        "probability"
    )

    one.click("#tokens input[type=radio]", 4)
    one.until(lambda: "token 4: green" in one.text("probability"))
    one.tab("Prediction Evolution in LLM")
    one.until(lambda: "token 4: green" in one.text("evolution"))
    assert len(one.all("#evolution .cell")) == 7 and "1. green" in one.all("#evolution .cell")[
        -1
    ].get_attribute("title")
    for name, (id, sliders) in SLIDERS.items():
        one.tab(name)
        one.until(lambda id=id: one.all(f"#{id} .cells, #{id} img"))
        for slider in sliders:
            before = one.html(id)
            one.move(slider, Keys.ARROW_RIGHT if slider == "att_head" else Keys.ARROW_LEFT)
            one.until(
                lambda id=id, before=before: (
                    one.html(id) != before and one.all(f"#{id} .cells, #{id} img")
                )
            )
    assert "layer 4, head 0" in one.text("attention") and "token 4: green, layer 4" in one.text(
        "compare"
    )

    one.tab("Patch Selector")
    image = one.until(lambda: one.all("#pat_picture img"))[0]
    thing = next(thing for thing in demo_scene().things if thing.color == "green")
    for dx in (0, 30):
        one.driver.execute_script(
            "arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", image
        )
        at = [
            (place / side - 0.5) * size
            for place, side, size in zip(
                (thing.x + dx, thing.y), first.size, (image.rect["width"], image.rect["height"])
            )
        ]
        ActionChains(one.driver).move_to_element_with_offset(
            image, round(at[0]), round(at[1])
        ).click().perform()
        image = one.until(
            lambda dx=dx: one.all(f"#pat_picture img[alt*='{1 if dx == 0 else 2} selected']")
        )[0]
    for slider in ("pat_layer", "pat_head"):
        before = one.html("pat_words")
        one.move(slider, Keys.ARROW_RIGHT if slider == "pat_head" else Keys.ARROW_LEFT)
        one.until(lambda before=before: one.html("pat_words") != before)
    assert one.all("#pat_words .answer span") and "2 patches, layer 4, head 0" in one.text(
        "pat_words"
    )

    one.tab("Export")
    one.until(lambda: one.all("#export_all"))
    one.click("#export_all")
    one.until(lambda: one.all("#exported code"), 200)
    found = Path(one.all("#exported code")[0].text)
    found = found if found.is_absolute() else log.parent / found
    shown = json.loads((found / "analysis" / "picture_shown.json").read_text())
    assert (
        shown["settings"]["token"] == 4
        and len(shown["patches"]["selected"]) == 2
        and rundirs.read_run(found, "relevancy").ids() == ["picture"]
    )
    link = one.until(lambda: one.all("#exported a[download]"))[0].get_attribute("href")
    with pytest.raises(urllib.error.HTTPError, match="404"):  # another browser
        urllib.request.urlopen(link)
    cookie = one.driver.get_cookie("stethoscope")["value"]
    asking = urllib.request.Request(link, headers={"Cookie": f"stethoscope={cookie}"})
    with urllib.request.urlopen(asking) as archive:
        assert f"{found.name}/meta.json" in zipfile.ZipFile(io.BytesIO(archive.read())).namelist()

    two.click("#tokens input[type=radio]", 4)
    two.tab("Patch Selector")  # nothing of the other's: own picture, no selection, own answer
    two.until(lambda: two.all("#pat_picture img[alt*='0 selected']"))
    assert "green square" not in two.value("answer")
    two.upload(tmp_path / "first.png")  # a new picture: what belonged to the old one is gone
    two.until(
        lambda: not two.all("#tokens label") and "Choose a picture" in two.text("pat_picture")
    )

    for visitor in (one, two):
        assert not visitor.driver.execute_script("return window.pwned")
        outside = (
            "return performance.getEntriesByType('resource').map(e => e.name).filter(n =>"
            " !n.startsWith(arguments[0]) && !n.startsWith('data:') && !n.startsWith('blob:'))"
        )
        assert visitor.driver.execute_script(outside, address) == []  # works without a network
        # nothing that the page does offends its own policy
        said = [entry["message"] for entry in visitor.driver.get_log("browser")]
        assert not [line for line in said if "Content Security Policy" in line]
    assert "Traceback" not in log.read_text()


def test_the_result_is_above_the_fold_and_every_head_is_a_click_away(page, browse, tmp_path):
    driver = browse()
    size = {"width": 1440, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    one = Visitor(driver, page[0])
    render(demo_scene()).save(tmp_path / "picture.png")
    one.upload(tmp_path / "picture.png")
    one.until(lambda: one.all("#preview img"))
    one.ask(QUESTION)
    one.until(lambda: one.all("#probability .cell") and one.all("#token_colors style"))

    def box(css):
        return driver.execute_script(
            "return document.querySelector(arguments[0]).getBoundingClientRect().toJSON()", css
        )

    def background(index):
        labels = one.all("#tokens label")
        rgb = labels[index].value_of_css_property("background-color")
        return [int(number) for number in re.findall(r"\d+", rgb)[:3]]

    assert driver.execute_script("return scrollY") == 0
    for css in ("#preview img", "#ask", "#answer", "#tokens", "#probability .bars"):
        assert box(css)["top"] >= 0 and box(css)["bottom"] <= 900, css
    assert box("#tokens")["left"] > box("#preview img")["right"]  # beside the picture
    assert abs(box("#upload")["left"] - box("#examples")["left"]) < 2  # in one column with it
    assert box("#preview img")["right"] < box("#upload")["right"] + 2
    assert 0 < box("#preview")["top"] - box("#examples")["bottom"] < 40  # without a hole
    for width in (900, 420):
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size | {"width": width})
        one.until(lambda width=width: box("body")["width"] <= width)
        assert driver.execute_script("return document.documentElement.scrollWidth") <= width
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    sure = background(4)
    assert np.allclose(background(0), (0, 68, 27), atol=4)  # a probability near 1 in Greens
    one.click("#color_by input", 1)
    one.until(lambda: "from the picture" in one.text("token_colors"))
    one.until(lambda: background(4) != sure)
    assert background(4) != background(5)  # green comes from the picture, square from green

    one.tab("Raw Attention")
    one.until(lambda: one.all("#att_heads .heads img") and one.all("#attention img"))
    assert "layer 5, mean over heads" in one.text("attention")
    grid = one.all("#att_heads .heads img")[0]
    driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", grid)
    width, height = grid.rect["width"], grid.rect["height"]
    place = ((3 + 0.5) / 4 - 0.5) * width, ((2 + 0.5) / 6 - 0.5) * height
    ActionChains(driver).move_to_element_with_offset(grid, *map(round, place)).click().perform()
    one.until(lambda: "layer 2, head 3" in one.text("attention"))

    def controls():
        ranges = [one.all(f"#{id} input[type=range]")[0] for id in ("att_layer", "att_head")]
        return [slider.get_attribute("value") for slider in ranges]

    one.until(lambda: controls() == ["2", "3"])
    driver.execute_script("document.querySelector('#att_heads .heads').focus()")
    for key, title in (
        (Keys.ARROW_UP, "layer 1, head 3"),
        (Keys.ARROW_LEFT, "layer 1, head 2"),
        (Keys.ARROW_DOWN, "layer 2, head 2"),
    ):
        ActionChains(driver).send_keys(key).perform()  # the map keeps the keyboard
        one.until(lambda title=title: title in one.text("attention"))
    one.until(lambda: controls() == ["2", "2"])
    one.click("#att_measure input", 1)
    one.until(lambda: "chance" in one.text("att_heads"))
    assert "layer 2, head 2" in one.text("attention")

    for control in ("#map_opacity input[type=range]", "#map_drawn_as input"):
        before = one.html("attention")
        if control.endswith("range]"):
            one.move("map_opacity")
        else:
            one.click(control, 1)
        one.until(lambda before=before: one.html("attention") != before)
    shown = (
        "return [...document.querySelectorAll('.help')].filter(e => e.offsetParent)"
        ".map(e => e.textContent.trim())"
    )
    helps = set()

    def read_another():
        before = len(helps)
        helps.update(driver.execute_script(shown))
        return len(helps) > before

    for button in one.all("button[role=tab]"):
        driver.execute_script("arguments[0].click()", button)
        one.until(read_another)
    assert len(helps) == 8 and all(text.endswith(".") for text in helps)
    assert one.value("warning").splitlines()[-1].startswith("python ")
    said = [entry["message"] for entry in driver.get_log("browser")]
    assert not [line for line in said if "Content Security Policy" in line]


def test_what_was_chosen_last_is_drawn_last(page, browse, tmp_path):
    """All within one moment, before the page has answered: heads, layers, a token, another tab."""
    one = Visitor(browse(), page[0])
    render(demo_scene()).save(tmp_path / "picture.png")
    one.upload(tmp_path / "picture.png")
    one.until(lambda: one.all("#preview img"))
    one.ask(QUESTION)
    one.until(lambda: one.all("#probability .cell") and one.all("#token_colors style"))
    one.tab("Raw Attention")
    one.until(lambda: one.all("#att_heads .heads img"))
    one.driver.execute_script("""
        const slide = (id, value) => {
          const slider = document.querySelector(`#${id} input[type=range]`);
          slider.value = value;
          slider.dispatchEvent(new Event('input', {bubbles: true}));
        };
        window.pause = () => new Promise(done => setTimeout(done, 20));
        window.press = key => document.querySelector('#att_heads .heads')
          .dispatchEvent(new KeyboardEvent('keydown', {key, bubbles: true}));
        window.slide = slide;
    """)
    acts = """
        const done = arguments[arguments.length - 1];
        (async () => {
          for (const act of [%s]) { act(); await pause(); }
          done();
        })();
    """
    # from layer 5, mean over heads, which is left of head 0
    keys = [f"() => press('Arrow{way}')" for way in ("Right", "Right", "Right", "Up", "Up")]
    token = "() => document.querySelectorAll('#tokens input')[4].click()"
    moves = [*keys, "() => slide('att_ceiling', 40)", token]
    one.driver.execute_async_script(acts % ", ".join(moves))
    one.until(lambda: "layer 3, head 2" in one.text("attention"))
    time.sleep(1)  # whatever is still under way arrives
    assert "layer 3, head 2" in one.text("attention") and "green" in one.text("attention")
    assert [
        one.all(f"#{id} input[type=range]")[0].get_attribute("value")
        for id in ("att_layer", "att_head", "att_ceiling")
    ] == ["3", "2", "40"]
    settled = one.html("attention")
    one.move("att_ceiling")
    one.until(lambda: one.html("attention") != settled)
    one.move("att_ceiling", Keys.ARROW_RIGHT)  # alone: what was drawn has all of the choices
    one.until(lambda: one.html("attention") == settled)

    # relevancy is computed for the first time, and does not hold up what is looked at meanwhile
    tabs = {b.text.strip(): i for i, b in enumerate(one.all("button[role=tab]"))}
    open_tab = "() => document.querySelectorAll('button[role=tab]')[%d].click()"
    last = [open_tab % tabs[name] for name in ("Relevancy Analysis", "Compare", "Raw Attention")]
    one.driver.execute_async_script(acts % ", ".join([*last, "() => press('ArrowLeft')"]))
    one.until(lambda: "layer 3, head 1" in one.text("attention"))
    one.tab("Compare")
    one.until(lambda: one.all("#compare img"))
    one.tab("Relevancy Analysis")
    one.until(lambda: one.all("#rel_picture img"))
    assert "Traceback" not in page[2].read_text()


@pytest.mark.slow
def test_a_password_is_asked_for_and_stop_ends_an_answer(tmp_path, folders, browse):
    """A random model hardly ever ends an answer by itself."""
    with serving(
        tmp_path,
        "--auth",
        "me:a-long-password",
        "--model-name",
        folders["llava"],
        "--max-length",
        512,
    ) as (address, _, log):
        driver = browse()
        driver.get(address)

        def fields():
            return driver.find_elements(By.CSS_SELECTOR, "input[type=password]")

        WebDriverWait(driver, 60).until(lambda _: fields())
        assert not driver.find_elements(By.CSS_SELECTOR, "#question textarea"), (
            "nothing is shown before the password"
        )
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(address + "config")
        for password in ("wrong", "a-long-password"):
            name, secret = driver.find_elements(By.CSS_SELECTOR, "input")[:2]
            for field, text in ((name, "me"), (secret, password)):
                field.send_keys(Keys.CONTROL, "a")
                field.send_keys(text)
            secret.send_keys(Keys.ENTER)
            if password == "wrong":
                WebDriverWait(driver, 60).until(lambda _: "Incorrect" in driver.page_source)
                assert fields()
        visitor = Visitor.__new__(Visitor)
        visitor.driver = driver
        visitor.until(lambda: visitor.all("#question textarea"))
        render(demo_scene()).save(tmp_path / "picture.png")
        visitor.upload(tmp_path / "picture.png")
        visitor.until(lambda: visitor.all("#preview img"))
        visitor.ask("Describe the image.")
        visitor.until(lambda: len(visitor.value("answer")) > 20)
        visitor.click("#stop")
        said = visitor.until(
            lambda: (
                (first := visitor.value("answer"))
                and time.sleep(1.5) is None
                and first == visitor.value("answer")
                and first
            )
        )
        assert 20 < len(said) < 4000, (
            "512 tokens are 5,783 characters, and nothing else ends this answer"
        )
        visitor.ask("Is it red?")  # the model is free again
        visitor.until(
            lambda: visitor.value("answer") and visitor.value("answer")[: len(said)] != said
        )
        assert "Traceback" not in log.read_text()

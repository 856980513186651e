"""Attention overlays: the right row of the right token over the right place of the picture, against
eager attention maps and planted maps."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import common
from diagnostic_tools import viz_attention_image as viz
from vlmdiag.answers import find_word, token_spans
from vlmdiag.beyond_semantics import token_attention
from vlmdiag.beyond_semantics.attention_overlay import (
    AttentionVisualizationResult,
    plot_attention_comparison,
    save_attention_overlay,
    visualize_attention_overlay,
)
from vlmdiag.cli import UsageError
from vlmdiag.figures import plots
from vlmdiag.groups import GROUPS
from vlmdiag.model.decoding import answer_ids, generate
from vlmdiag.pictures.grid import PatchGrid
from vlmdiag.pictures.overlay import SHOWN
from vlmdiag.pictures.samples import Sample
from vlmdiag.pictures.spread import normalized_entropy

TOOLS = Path(__file__).resolve().parents[1] / "diagnostic_tools"
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}
CAPTION = "The image shows a red circle, a blue square and a green circle."


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def saying(monkeypatch):
    """saying(text): every model answers with this text (teacher forcing through the real
    passes)."""

    def force(text):
        monkeypatch.setattr(
            token_attention,
            "generate",
            lambda vlm, batch, limit: generate(
                vlm, batch, limit, answers=[answer_ids(vlm, batch.prompts[0], text)]
            ),
        )

    return force


# --- pure functions -------------------------------------------------------------------------------


def test_entropy_is_one_for_uniform_and_zero_for_one_token():
    assert (
        normalized_entropy(np.full(576, 0.3)) == pytest.approx(1)
        and normalized_entropy(np.eye(144)[7]) == 0
    )
    assert (
        normalized_entropy(np.full((12, 12), 1 / 144), 1e-10) == pytest.approx(1)
        and 0 < normalized_entropy(np.eye(144)[7], 1e-10) < 1e-6
    )
    assert normalized_entropy([0.5, 0.5, 0, 0]) == pytest.approx(0.5)
    assert (
        np.isnan(normalized_entropy([1.0]))
        and np.isnan(normalized_entropy([0, 0, 0]))
        and np.isnan(normalized_entropy([]))
    )


@given(
    st.lists(st.floats(0, 1), min_size=2, max_size=40).filter(lambda w: sum(w) > 1e-3),
    st.floats(0.01, 100),
)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_entropy_lies_in_0_1_and_ignores_scale_and_order(weights, scale):
    found = normalized_entropy(weights)
    assert 0 <= found <= 1 + 1e-12
    assert normalized_entropy(np.array(weights[::-1]) * scale) == pytest.approx(found, abs=1e-9)


def test_words_are_found_whole_in_any_case_and_mapped_to_all_their_tokens():
    pieces = ["A", " Ted", "dy", " bear", ",", " ted", "dy", "bears", "."]
    text, spans = token_spans(range(9), lambda ids: "".join(pieces[i] for i in ids))
    assert text == "A Teddy bear, teddybears." and spans[1] == (1, 5) and spans[2] == (5, 7)
    assert find_word(text, spans, "teddy") == [[1, 2]] and find_word(
        text, spans, "TEDDY  bear"
    ) == [[1, 2, 3]]
    assert find_word(text, spans, "bear") == [[3]]
    assert all(find_word(text, spans, word) == [] for word in ("bears", "dy", "", " "))
    assert token_spans([], lambda ids: "") == ("", [])


def test_tokens_that_make_a_character_together_share_its_span(load):
    tokenizer = load("llava").tokenizer
    ids = tokenizer("the café, 日本 circle", add_special_tokens=False)["input_ids"] + [
        tokenizer.eos_token_id
    ]
    text, spans = token_spans(
        ids,
        lambda some: tokenizer.decode(
            some, skip_special_tokens=True, clean_up_tokenization_spaces=False
        ),
    )
    assert text == "the café, 日本 circle" and spans[-1] == (len(text), len(text))
    for word in ("café", "日本", "circle"):
        (tokens,) = find_word(text, spans, word)
        assert word in tokenizer.decode([ids[i] for i in tokens]) and len(
            tokenizer.decode([ids[i] for i in tokens]).strip(" ,")
        ) == len(word)


@given(st.text(max_size=25))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_the_spans_of_any_decoding_cover_the_text_in_order(text):
    data = list(text.encode("utf-8", "ignore"))
    decoded, spans = token_spans(data, lambda some: bytes(some).decode("utf-8", "replace"))
    assert len(spans) == len(data)
    assert not data or (spans[0][0] == 0 and spans[-1][1] == len(decoded))
    assert all(a <= b and a <= c and b <= d for (a, b), (c, d) in zip(spans, spans[1:]))


# --- the row --------------------------------------------------------------------------------------


def eager_rows(vlm, batch, ids, leave_out_bos=True):
    """(steps, P): the definition, computed slowly from eager maps of one pass over prompt and
    answer."""
    tokens = torch.cat([batch.input_ids, torch.tensor([ids])], 1)
    more = batch.next_position[:, None] + torch.arange(len(ids))
    positions = torch.cat(
        [
            batch.position_ids,
            more if batch.position_ids.ndim == 2 else more[None].expand(3, -1, -1),
        ],
        -1,
    )
    vlm.parts.decoder.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            maps = vlm.model(
                input_ids=tokens,
                position_ids=positions,
                mm_encoder_outputs={"image": vlm.vision(batch)},
                output_attentions=True,
            ).attentions
    finally:
        vlm.parts.decoder.set_attn_implementation("sdpa")
    prompt, rows = batch.input_ids.shape[1], []
    for step in range(len(ids)):
        layers = []
        for attention in maps:
            row = attention[0, :, prompt - 1 + step].mean(0)
            if leave_out_bos:
                row = row.clone()
                row[(batch.groups[0] == GROUPS.index("bos")).nonzero()[:, 0]] = 0
                row = row / row.sum()
            layers.append(row)
        rows.append(torch.stack(layers).mean(0)[batch.vision_positions(0)])
    return torch.stack(rows).numpy()


@pytest.mark.parametrize("name", ["llava", "llava-gqa", "qwen"])
def test_the_map_is_the_row_that_predicted_the_token_or_the_one_where_it_asks(
    name, load, pictures, monkeypatch
):
    vlm = load(name)
    batch = vlm.encode([Sample("0", None, "Describe the image.")], [pictures[1]])
    ids = [300, 411, 522, 333, 444, 355]  # of unlike tokens, so that no two rows are alike
    monkeypatch.setattr(
        token_attention,
        "generate",
        lambda vlm, batch, limit: generate(vlm, batch, limit, answers=[ids]),
    )
    expected = eager_rows(vlm, batch, ids)
    for position in (0, 3, len(ids) - 1):
        for step in ("producing", "query"):
            row = position + (step == "query")
            if row == len(ids):
                with pytest.raises(
                    UsageError,
                    match=(
                        f"ended with token {position}.*use --step producing or more"
                        " --max_new_tokens"
                    ),
                ):
                    viz.extract_attention_for_token(
                        vlm, pictures[1], token_position=position, max_new_tokens=6, step=step
                    )
                continue
            found = viz.extract_attention_for_token(
                vlm, pictures[1], token_position=position, max_new_tokens=6, step=step
            )
            assert (
                np.allclose(found.attention_map.ravel(), expected[row], atol=1e-6)
                and found.step == step
            )
            assert found.attention_map.shape == batch.grids[0].shape and len(found.tokens) == 6
            assert found.normalized_entropy == pytest.approx(
                normalized_entropy(expected[row]), abs=1e-5
            )
            wrong = [expected[other] for other in range(len(ids)) if other != row] + [
                np.roll(expected[row], 1)
            ]
            wrong += (
                [eager_rows(vlm, batch, ids, leave_out_bos=False)[row]]
                if "bos" in batch.spans(0)
                else []
            )
            assert all(
                np.abs(found.attention_map.ravel() - mutant).max() > 2e-5 for mutant in wrong
            )


def test_the_published_indexing_takes_the_query_row_and_the_published_normalisation(
    load, pictures, saying
):
    saying(CAPTION)
    vlm = load("llava")
    plain = viz.extract_attention_for_token(vlm, pictures[0], target_word="circle", step="query")
    published = viz.extract_attention_for_token(
        vlm, pictures[0], target_word="circle", paper_compat=True
    )
    weights = plain.attention_map
    assert published.step == "query" and published.token_position == plain.token_position
    assert (
        np.allclose(
            published.attention_map,
            (weights - weights.min()) / (weights.max() - weights.min() + 1e-10),
        )
        and published.attention_map.min() == 0
    )
    assert published.normalized_entropy == normalized_entropy(weights, 1e-10)
    with pytest.raises(UsageError, match="query row"):
        viz.extract_attention_for_token(
            vlm, pictures[0], target_word="circle", paper_compat=True, step="producing"
        )
    with pytest.raises(UsageError, match="'cir'.*not there"):
        viz.extract_attention_for_token(vlm, pictures[0], target_word="cir", paper_compat=True)


# --- the token ------------------------------------------------------------------------------------


def test_a_word_is_found_in_the_answer_by_its_occurrence(load, pictures, saying):
    saying(CAPTION)
    vlm = load("llava")

    def find(word, **options):
        return viz.extract_attention_for_token(vlm, pictures[0], target_word=word, **options)

    first, second = find("Circle"), find("circle", occurrence=2)
    assert first.generated_text == CAPTION and second.token_position > first.token_position
    assert (
        first.tokens[first.token_position].strip()
        == second.tokens[second.token_position].strip()
        == "circle"
    )
    assert (
        CAPTION[slice(*find("blue square").answer_span)].strip() == "blue square"
        and find("blue square").token_position == find("blue").token_position
    )
    assert (
        first.prompt.endswith("ASSISTANT:")
        and first.model_name == "llava"
        and first.image_array.shape == (336, 336, 3)
    )
    with pytest.raises(
        UsageError,
        match=r"'triangle'.*not there; the generated tokens are 0 'The', 1 'image'.*'</s>'",
    ):
        find("triangle")
    with pytest.raises(UsageError, match="2 times, and occurrence 3 was asked for"):
        find("circle", occurrence=3)
    with pytest.raises(UsageError, match="'circ'.*not there"):
        find("circ")
    with pytest.raises(
        UsageError, match=r"--token_position 99: .* generated \d+ tokens, counted from 0: 0 'The'"
    ):
        viz.extract_attention_for_token(vlm, pictures[0], token_position=99)
    last = len(first.tokens) - 1
    assert (
        viz.extract_attention_for_token(vlm, pictures[0], token_position=last).token_position
        == last
    )
    with pytest.raises(
        UsageError,
        match=(
            r"ended with token \d+ \('</s>'\), so no later step has it as query; use --step"
            r" producing$"
        ),
    ):
        viz.extract_attention_for_token(vlm, pictures[0], token_position=last, step="query")
    for both in ({}, {"target_word": "circle", "token_position": 1}):
        with pytest.raises(UsageError, match="one of the two"):
            viz.extract_attention_for_token(vlm, pictures[0], **both)


def test_the_system_prompt_is_left_out_where_there_is_one(load, pictures, saying):
    saying(CAPTION)
    vlm = load("llava")
    stripped = viz.extract_attention_for_token(
        vlm, pictures[0], target_word="circle", strip_system_prompt=True
    )
    kept = viz.extract_attention_for_token(vlm, pictures[0], target_word="circle")
    assert stripped.prompt.startswith("USER") and not np.allclose(
        stripped.attention_map, kept.attention_map
    )
    without = common.VLM(
        vlm.model,
        vlm.processor,
        vlm.family,
        vlm.path,
        {"prompt_template": "USER: {image} {question} ASSISTANT:"},
    )
    with pytest.raises(UsageError, match="has no system prompt to leave out"):
        viz.extract_attention_for_token(
            without, pictures[0], target_word="circle", strip_system_prompt=True
        )


def test_a_model_whose_grid_is_unknown_is_named(load, pictures):
    from vlmdiag.families import generic

    vlm = load("llava")
    with pytest.raises(
        UsageError, match=f"{vlm.path}: this measure needs grid, which the family generic lacks"
    ):
        viz.extract_attention_for_token(
            common.VLM(vlm.model, vlm.processor, generic.FAMILY, vlm.path),
            pictures[0],
            token_position=0,
        )


# --- the picture ----------------------------------------------------------------------------------


def planted(size, token, rows=6, columns=6, region=None):
    grid = PatchGrid.regular(rows, columns, region or (0, 0, *size), size)
    weights = np.full(rows * columns, 0.001)
    weights[token] = 0.2
    pixels = np.full((size[1], size[0], 3), 128, np.uint8)
    tokens = ["a", " [red]", " circle", " costs", " $5"]
    return AttentionVisualizationResult(
        "".join(tokens),
        weights.reshape(rows, columns),
        pixels,
        0.5,
        2,
        "circle",
        "producing",
        tokens,
        (7, 14),
        grid,
        0.0,
        "model",
        "prompt",
    )


@pytest.mark.parametrize("size", [(336, 336), (420, 336), (40, 25), (3000, 1100), (7, 300), (1, 1)])
def test_the_hottest_place_of_the_figure_is_the_box_of_the_token_with_the_weight(size):
    for token in (0, 8, 35):
        result = planted(size, token)
        figure = visualize_attention_overlay(result)
        picture, heat = (image.get_array() for image in figure.axes[0].images)
        assert picture.shape[:2] == heat.shape and max(heat.shape) <= SHOWN
        y, x = np.unravel_index(np.ma.argmax(heat), heat.shape)
        x0, y0, x1, y1 = result.grid.boxes[token] * np.array(
            [heat.shape[1] / size[0], heat.shape[0] / size[1]] * 2
        )
        assert x0 - 1 <= x + 0.5 <= x1 + 1 and y0 - 1 <= y + 0.5 <= y1 + 1
        assert figure.axes[0].images[1].get_clim() == pytest.approx((heat.min(), heat.max())) and (
            size == (1, 1) or heat.max() == pytest.approx(0.2, rel=0.4)
        )
        plots.plt.close(figure)


def test_what_the_model_did_not_see_is_not_painted_and_padding_is_not_in_the_picture():
    cropped = visualize_attention_overlay(planted((600, 300), 14, region=(150, 0, 450, 300)))
    heat = cropped.axes[0].images[1].get_array()
    assert (
        heat.shape == (300, 600)
        and heat.mask[:, :150].all()
        and heat.mask[:, 450:].all()
        and not heat.mask[:, 150:450].any()
    )
    plots.plt.close(cropped)
    padded = visualize_attention_overlay(
        planted((600, 300), 2, region=(0, -150, 600, 450))
    )  # the weight is on padding
    assert (
        not padded.axes[0].images[1].get_array().mask.any()
        and padded.axes[0].images[1].get_clim()[1] < 0.15
    )
    plots.plt.close(padded)


def test_compared_models_share_one_colour_range_and_leave_the_picture_its_colours():
    results = [planted((336, 336), token) for token in (0, 8)]
    results[1].attention_map = results[1].attention_map * 0.5
    figure = plot_attention_comparison(results, "Where?")
    maps = [axis.images[1] for axis in figure.axes if len(axis.images) == 2]
    heats = [image.get_array() for image in maps]
    ends = (min(heat.min() for heat in heats), max(heat.max() for heat in heats))
    assert len(maps) == 2 and {image.get_clim() for image in maps} == {ends}
    assert heats[0].max() == pytest.approx(2 * heats[1].max())
    clear, strong = maps[0].cmap(0.0), maps[0].cmap(1.0)
    assert clear[3] == 0 and 0.5 < strong[3] < 1  # no veil where nothing is looked at
    assert "mean over all layers and heads" in figure.get_suptitle()
    assert len(np.unique(np.asarray(heats[0]))) <= 36  # a patch is one square of one colour
    plots.plt.close(figure)


def test_an_answer_of_any_characters_can_be_drawn(tmp_path):
    result = planted((60, 40), 2)
    result.generated_text, result.answer_span = (
        "\x0e 日本 $5 and $6 \ue000 " + "word " * 200,
        (2, 4),
    )
    result.target_word = "日\x0e$x$"
    assert len(save_attention_overlay(result, tmp_path / "figure")) == 2
    figure = visualize_attention_overlay(result)
    text = figure.axes[0].get_xlabel()
    assert (
        "\N{WHITE SQUARE}" in text
        and "日" not in text
        and text.endswith("...")
        and text.count("\n") <= 4
    )
    plots.plt.close(figure)


def test_the_share_on_padding_is_measured(load, pictures):
    vlm = load("llava")  # pads to a square
    square = viz.extract_attention_for_token(vlm, pictures[0], token_position=0, max_new_tokens=1)
    wide = viz.extract_attention_for_token(
        vlm, Image.new("RGB", (400, 100), "grey"), token_position=0, max_new_tokens=1
    )
    assert square.outside_share == pytest.approx(0, abs=1e-9) and 0.3 < wide.outside_share < 0.95
    weights = wide.attention_map
    assert wide.outside_share == pytest.approx(
        (weights[:4].sum() + weights[8:].sum() + 0.5 * (weights[4].sum() + weights[7].sum()))
        / weights.sum(),
        abs=1e-6,
    )


# --- the script -----------------------------------------------------------------------------------

FILES = {
    f"attention_{name}"
    for name in (
        "llava.json",
        "llava.npz",
        "overlay_llava.png",
        "overlay_llava.pdf",
        "comparison.png",
        "comparison.pdf",
    )
}


def test_without_arguments_the_tiny_models_that_exist_are_compared(
    load, saying, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(viz, "CHECKPOINTS", tmp_path / "checkpoints")
    with pytest.raises(UsageError, match="checkpoints/train_tiny.py"):
        viz.main([])
    for name in ("tiny-llava", "tiny-llava-multilayerNorm"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "config.json").write_text("{}")
    monkeypatch.setattr(
        viz,
        "load_from_args",
        lambda args, path: common.VLM(
            load("llava").model, load("llava").processor, load("llava").family, path
        ),
    )
    things = viz.demo_scene().things
    assert len({thing.shape for thing in things}) == 3
    saying(f"The image shows a {things[1].name}, a {things[0].name} and a {things[2].name}.")
    assert viz.main(["--out_dir", str(tmp_path / "out")]) == 0
    assert len(list((tmp_path / "out").iterdir())) == 2 * 4 + 2
    records = [
        json.loads((tmp_path / "out" / f"attention_{name}.json").read_text())
        for name in ("tiny-llava", "tiny-llava-multilayerNorm")
    ]
    assert all(
        record["target_word"] == things[0].shape
        and record["step"] == "producing"
        and record["image"] is None
        for record in records
    )
    assert "normalised entropy" in capsys.readouterr().out
    saying("Nothing.")
    with pytest.raises(UsageError, match="none of the models"):
        viz.main(["--out_dir", str(tmp_path / "none")])
    assert not (tmp_path / "none").exists()


def test_models_of_one_name_are_told_apart_and_one_model_twice_is_refused():
    args = viz.parse_args(["--model_path", "a/tiny", "--model_path", "b/tiny", "--model-path", "c"])
    assert viz.model_paths(args)[1] == ["a_tiny", "b_tiny", "c"]
    with pytest.raises(UsageError, match="given twice"):
        viz.model_paths(viz.parse_args(["--model_path", "a/tiny", "--model_path", "a/tiny"]))


@pytest.mark.parametrize(
    "flags",
    [
        ["--image", "a.jpg"],
        ["--alpha", "1.5"],
        ["--occurrence", "0"],
        ["--max_new_tokens", "0"],
        ["--step", "both"],
    ],
)
def test_flags_that_make_no_sense_are_refused(flags):
    with pytest.raises(SystemExit, match="2"):
        viz.parse_args(flags)


def test_the_real_command_line_writes_the_figures_and_numbers_and_lists_tokens_for_a_wrong_word(
    folders, pictures, tmp_path, warm_python
):
    pictures[1].save(tmp_path / "picture.png")
    command = [
        warm_python,
        "-W",
        "error",
        str(TOOLS / "viz_attention_image.py"),
        "--model_path",
        str(folders["llava"]),
        "--image",
        "picture.png",
    ]
    command += ["--max-new-tokens", "4", "--no_self_check"]

    def call(*flags):
        return subprocess.run(
            [*command, *flags],
            check=False,
            capture_output=True,
            text=True,
            env=ONE_THREAD,
            cwd=tmp_path,
        )

    done = call(
        "--token-position", "1", "--out_dir", "out", "--step", "query", "--strip_system_prompt"
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    record = json.loads((tmp_path / "out/attention_llava.json").read_text())
    with np.load(tmp_path / "out/attention_llava.npz", allow_pickle=False) as arrays:
        weights, boxes = arrays["map"], arrays["boxes"]
    assert (
        record["step"] == "query" and record["token_position"] == 1 and len(record["tokens"]) == 4
    )
    assert record["map_shape"] == [12, 12] and record["prompt"].startswith("USER")
    assert (
        weights.shape == (144,)
        and boxes.shape == (144, 4)
        and (record["min"], record["max"]) == (weights.min(), weights.max())
    )
    assert record["normalized_entropy"] == normalized_entropy(weights)
    with Image.open(tmp_path / "out/attention_comparison.png") as figure:
        assert json.loads(figure.info["settings"])["step"] == "query"
    wrong = call("--target_word", "zeppelin")
    assert (
        wrong.returncode == 2
        and wrong.stdout == ""
        and wrong.stderr.startswith("error: the word 'zeppelin'")
        and wrong.stderr.count("\n") == 1
    )
    assert "the generated tokens are 0 '" in wrong.stderr and ", 3 '" in wrong.stderr
    with pytest.raises(UsageError, match="^gone.png: no such picture$"):
        viz.main(
            ["--model_path", str(folders["llava"]), "--image", "gone.png", "--target_word", "x"]
        )


def test_a_model_whose_answer_lacks_the_word_does_not_stop_the_others(
    load, monkeypatch, tmp_path, capsys, pictures
):
    says = {"llava": CAPTION, "qwen": "A picture."}

    def answer(vlm, batch, limit):
        return generate(
            vlm,
            batch,
            limit,
            answers=[answer_ids(vlm, batch.prompts[0], says[Path(vlm.path).name])],
        )

    monkeypatch.setattr(token_attention, "generate", answer)
    monkeypatch.setattr(viz, "load_from_args", lambda args, path: load(Path(path).name))
    pictures[2].save(tmp_path / "picture.png")
    flags = [
        "--model_path",
        "qwen",
        "--model_path",
        "llava",
        "--image",
        str(tmp_path / "picture.png"),
        "--out_dir",
        str(tmp_path / "out"),
    ]
    assert viz.main([*flags, "--target_word", "circle"]) == 3
    assert {
        path.name for path in (tmp_path / "out").iterdir()
    } == FILES and "'circle' in the answer of" in capsys.readouterr().err
    with pytest.raises(UsageError, match="none of the models"):
        viz.main([*flags, "--target_word", "zeppelin"])


def test_two_calls_give_the_same_bytes(load, saying, monkeypatch, tmp_path, pictures):
    saying(CAPTION)
    monkeypatch.setattr(viz, "load_from_args", lambda args, path: load("qwen"))
    pictures[2].save(tmp_path / "picture.png")
    for folder in ("a", "b"):
        monkeypatch.chdir(tmp_path)
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
        assert (
            viz.main(
                [
                    "--model_path",
                    str(load("qwen").path),
                    "--image",
                    "../picture.png",
                    "--target_word",
                    "circle",
                    "--occurrence",
                    "2",
                ]
            )
            == 0
        )
    first, second = (
        {path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()}
        for folder in ("a", "b")
    )
    assert len(first) == 6 and first == second

"""The pages and maps of one instance of the critique loop: the right tokens, weights, colours and
places, from made-up attention whose answer is known."""

import base64
import csv
import hashlib
import html.parser
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import visualize.image_attention_heatmap as maps_script
import visualize.text_attention_heatmap as text_script
from tests.conftest import in_process
from vlmdiag.cli import UsageError
from vlmdiag.figures import plots
from vlmdiag.pictures.grid import PatchGrid
from vlmdiag.scenes.scene import floor_scene, render
from vlmdiag.volcano import image_figure, text_figure, text_page
from vlmdiag.volcano import panels as panels_module
from vlmdiag.volcano.tensors import (
    Stage,
    find_span,
    find_spans,
    join_target,
    read_instance,
    split_target,
    strongest_spans,
    token_maps,
    token_weights,
)

VISUALIZE = Path(__file__).resolve().parents[1] / "visualize"
text_heatmap = in_process(VISUALIZE / "text_attention_heatmap.py")
image_heatmap = in_process(VISUALIZE / "image_attention_heatmap.py")
TEXTS = {
    "initial": ["The", " image", " shows", " a", " red", " circle", ".", "</s>"],
    "feedback": [
        "It",
        " names",
        " the",
        " red",
        " cir",
        "cle",
        ",",
        " not",
        " the",
        " red",
        " square",
        " &",
        " ran",
        "ber",
        "ries",
        ".",
        "\n",
        "Look",
        " again",
        ".",
        "</s>",
    ],
    "revision": ["A", " red", " circle", " and", " a", " square", "."],  # cut off at the limit
}
HOSTILE = [
    "<script>alert(1)</script>",
    " <0x0A>",
    " &",
    "</p>",
    " \"'",
    "@@STYLE@@",
    "\u202etxt",
    "\x07",
    "😀",
    " 好",
    "$x^2$",
    "{x}",
    "\t",
    "  two",
    "</s>",
]


def located(tokens, ended):
    """Text and spans of tokens; the stop token has none."""
    spans, at = [], 0
    for i, token in enumerate(tokens):
        length = 0 if ended and i == len(tokens) - 1 else len(token)
        spans.append((at, at + length))
        at += length
    return "".join(tokens)[:at], spans


def attention(tokens, k, heads, patches, seed):
    return -np.sort(
        -np.random.default_rng(seed).gamma(0.5, 0.002, (tokens, k, heads, patches)), axis=1
    )


def make_instance(
    root,
    index=8,
    image_id="scene",
    texts=TEXTS,
    k=3,
    heads=4,
    shape=(4, 6),
    region=None,
    topk=None,
    **facts,
):
    """A folder as the runner leaves it, with its picture. topk: {stage: (T, K, H, P)} in place of
    random attention."""
    folder = Path(root) / f"{index}_{image_id}"
    folder.mkdir(parents=True)
    picture = render(floor_scene(Random(54), 3, square=False))
    picture.save(folder / "picture.png")
    grid = PatchGrid.regular(*shape, region or (0, 0, *picture.size), picture.size)
    arrays, stages = {"boxes": grid.boxes}, dict.fromkeys(TEXTS)
    for seed, (name, tokens) in enumerate(texts.items()):
        ended = tokens[-1] == "</s>"
        text, spans = located(tokens, ended)
        stages[name] = {
            "text": text,
            "tokens": tokens,
            "spans": spans,
            "ids": list(range(len(tokens))),
            "ended": ended,
            "prompt": "USER: x",
        }
        arrays[f"{name}_topk"] = (
            (topk or {})
            .get(name, attention(len(tokens), k, heads, len(grid.boxes), seed))
            .astype(np.float32)
        )
    record = {
        "schema": 1,
        "index": index,
        "image_id": image_id,
        "image": str(folder / "picture.png"),
        "question": "What is <b>this</b>?",
        "gold_answer": "a & b",
        "model": "tiny-llava",
        "hidden_top_k": k,
        "grid": {"shape": shape, "size": picture.size},
        "vision_encoder": {"image_size": 336, "patch_size": 56},
        "accepted": [1] if "feedback" in texts else [],
        "stages": stages,
    }
    np.savez(folder / "visualization_tensors.npz", **arrays)
    (folder / "tokens.json").write_text(json.dumps(record | facts))
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("volcano")
    make_instance(root)
    return root


@pytest.fixture
def no_figures(monkeypatch):
    monkeypatch.setattr(plots, "save", lambda fig, *rest, **options: plots.plt.close(fig))


def arguments(root, out, *more, index=8):
    return ["--input-dir", root, "--output-dir", out, "--instance-idx", index, *more]


def fails(result, *words):
    assert (
        result.returncode == 2
        and result.stderr.startswith("error: ")
        and result.stderr.count("\n") == 1
    ), result.stderr
    assert all(word in result.stderr for word in words), result.stderr


# --- spans ----------------------------------------------------------------------------------------


def found(wanted, tokens=TEXTS["feedback"], ended=True):
    text, spans = located(tokens, ended)
    return find_spans(tokens, spans, text, wanted)


@pytest.mark.parametrize(
    "wanted, places",
    [
        ("the,red,cir", [[2, 3, 4]]),  # pieces that equal tokens
        ("the,red", [[2, 3], [8, 9]]),
        ("red", [[3], [9]]),
        ("red,circle", [[3, 4, 5]]),  # characters, over other token borders
        ("ranberries", [[12, 13, 14]]),
        ("ran,ber,ries,.", [[12, 13, 14, 15]]),
        ("ran,berries,.", [[12, 13, 14, 15]]),
        (r"cle,\,,not", [[5, 6, 7]]),
        (r"circle\, not", [[4, 5, 6, 7]]),
        ("berries", [[13, 14]]),  # begins in a word, but where a token does
        ("ries,.,,Look", [[14, 15, 16, 17]]),  # an empty piece: the line break
        (".,</s>", [[19, 20]]),  # end of the text
        ("again,.", [[18, 19]]),
        ("the,red,c", []),  # the last piece counts too
        ("the,red,X", []),
        ("h", []),
        ("he", []),
        ("T", []),  # not any word that they are a part of
        ("square,&,ran,ber,ries,.,,Look,again,.,</s>,more", []),  # past the end
        ("red,the", []),  # order
    ],
)
def test_a_span_is_found_where_all_its_pieces_are(wanted, places):
    assert found(wanted) == places


def test_occurrences_overlap_and_are_counted_from_1():
    tokens = ["a", " a", " a", " b"]
    text, spans = located(tokens, False)
    assert found("a,a", tokens, False) == [[0, 1], [1, 2]]
    assert find_span(tokens, spans, text, "a,a", 2) == [1, 2]
    assert found("一个", ["这", "一", "个", "红"], False) == [[1, 2]] and found(
        "红色", ["一个红", "色的"], False
    ) == [[0, 1]]
    for wanted, occurrence, words in (
        ("a,a", 3, "2 times"),
        ("c", 1, "not in the text"),
        ("a,b", 0, "1 time "),
    ):
        with pytest.raises(UsageError, match=words) as error:
            find_span(tokens, spans, text, wanted, occurrence)
        assert "0 'a', 1 ' a'" in str(error.value) and "3 ' b'" in str(error.value)
    with pytest.raises(UsageError, match="names no token"):
        find_span(tokens, spans, text, " , ")


@given(st.lists(st.text(max_size=5), min_size=1, max_size=6))
def test_a_comma_list_is_taken_apart_as_it_was_joined(tokens):
    assert split_target(join_target(tokens)) == [token.strip() for token in tokens]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.sampled_from([" a", "a", " b", ",", "\\", "\n", " ", "-", "好", "'"]),
        min_size=1,
        max_size=12,
    ),
    st.integers(1, 4),
    st.integers(0, 99),
)
def test_the_printed_spans_name_exactly_the_strongest_tokens(tokens, length, seed):
    weights = np.random.default_rng(seed).random(len(tokens))
    text, spans = located(tokens, False)
    stage = Stage("feedback", text, tokens, spans, False, "", np.zeros((len(tokens), 1, 1, 1)))
    taken, before = set(), np.inf
    for target, occurrence, start, end, weight in text_page.named_spans(stage, weights, 5, length):
        assert find_span(tokens, spans, text, target, occurrence) == list(
            range(start, end)
        ) and end - start == min(length, len(tokens))
        assert weight == weights[start:end].mean() <= before and not taken & set(range(start, end))
        taken, before = taken | set(range(start, end)), weight


def test_strongest_spans_do_not_overlap_and_leave_blanks_out():
    weights = np.array([1, 5, 1, 1, 9, 9, 0, 4.0])
    assert strongest_spans(weights, list("abcdefgh"), 3, 2) == [(4, 6), (0, 2), (6, 8)]
    assert strongest_spans(weights, list("abcd\n\n\tx"), 2, 1) == [(1, 2), (7, 8)]
    assert (
        strongest_spans(weights[:2], ["a", "b"], 5, 3) == [(0, 2)]
        and strongest_spans(weights[:0], [], 5, 3) == []
    )


# --- attention ------------------------------------------------------------------------------------


def slow_map(topk, t, k, p):
    """c[t, p], number by number."""
    heads = [
        sum(
            sorted(
                (float(topk[t, layer, head, p]) for layer in range(topk.shape[1])), reverse=True
            )[:k]
        )
        / k
        for head in range(topk.shape[2])
    ]
    return sum(sorted(heads, reverse=True)[:k]) / k


@pytest.mark.parametrize("k", [1, 2, 3])
def test_weights_equal_a_slow_reference_for_every_k_up_to_the_stored_one(made, monkeypatch, k):
    monkeypatch.setattr("vlmdiag.volcano.tensors.STEPS_AT_ONCE", 3)
    instance = read_instance(made, 8)
    for name, stage in instance.stages.items():
        slow = np.array(
            [[slow_map(stage.topk, t, k, p) for p in range(24)] for t in range(len(TEXTS[name]))]
        )
        np.testing.assert_allclose(token_maps(instance, name, k), slow, rtol=1e-12)
        np.testing.assert_allclose(
            token_weights(token_maps(instance, name, k)), slow.mean(1), rtol=1e-12
        )


def test_a_k_that_was_not_stored_is_refused(made, tmp_path):
    for command in (text_heatmap, image_heatmap):
        fails(
            command(*arguments(made, tmp_path, "--hidden-top-k", 4)),
            "holds the 3 largest over layers",
        )
        assert not list(tmp_path.iterdir())
    make_instance(tmp_path / "in", heads=2)
    fails(text_heatmap(*arguments(tmp_path / "in", tmp_path)), "2 heads")


def test_maps_of_texts_are_plain_means_and_on_request_the_published_ones(made):
    instance = read_instance(made, 8)
    c = {name: token_maps(instance, name, 3) for name in TEXTS}
    args = maps_script.parse_args(
        [
            *map(
                str,
                arguments(
                    made,
                    "x",
                    "--feedback-target-tokens",
                    "the,red",
                    "red,square",
                    "--occurrence",
                    2,
                    1,
                ),
            )
        ]
    )
    panels = panels_module.panels_of(instance, args)
    assert [panel.title for panel in panels] == [
        "Initial (all tokens)",
        "Feedback (all tokens)",
        "Revision (all tokens)",
        "Feedback “the red”",
        "Feedback “red square”",
    ]
    for panel, wanted in zip(
        panels,
        [
            c["initial"][:7],
            c["feedback"][:20],
            c["revision"],
            c["feedback"][[8, 9]],
            c["feedback"][[9, 10]],
        ],
    ):
        np.testing.assert_allclose(panel.values, wanted.mean(0), rtol=1e-12)
    args.paper_compat = True
    panels = panels_module.panels_of(instance, args)
    largest = [
        sum(sorted(c["feedback"][:20, p], reverse=True)[:7]) / 7 for p in range(24)
    ]  # 7: tokens of the initial response
    assert len(panels) == 4 and "7 largest of 20" in panels[1].statistic
    np.testing.assert_allclose(
        [panels[0].values, panels[1].values], [c["initial"][:7].mean(0), largest], rtol=1e-12
    )
    np.testing.assert_allclose(panels[2].values, c["feedback"][[8, 9]].mean(0), rtol=1e-12)


# --- files ----------------------------------------------------------------------------------------


def test_an_instance_is_found_by_its_exact_index(tmp_path, no_figures):
    for index in (80, 88, 3):
        make_instance(tmp_path / "in", index)
    for command in (text_heatmap, image_heatmap):
        fails(
            command(*arguments(tmp_path / "in", tmp_path)),
            "no folder of instance 8; there are 3_scene, 80_scene, 88_scene",
        )
    make_instance(tmp_path / "in")
    assert read_instance(tmp_path / "in", 8).index == 8
    make_instance(tmp_path / "in", image_id="other")
    fails(
        text_heatmap(*arguments(tmp_path / "in", tmp_path)),
        "several folders of instance 8; there are 8_other, 8_scene",
    )
    fails(text_heatmap(*arguments(tmp_path / "nowhere", tmp_path)), "no such folder")
    (tmp_path / "empty").mkdir()
    fails(image_heatmap(*arguments(tmp_path / "empty", tmp_path)), "no folder of an instance")
    make_instance(tmp_path / "renamed", 9)
    (tmp_path / "renamed" / "9_scene").rename(tmp_path / "renamed" / "8_scene")
    fails(text_heatmap(*arguments(tmp_path / "renamed", tmp_path)), "of instance 9")


def rewrite(folder, arrays=None, **facts):
    """Change the files of an instance: arrays with None leave, others are put in."""
    with np.load(folder / "visualization_tensors.npz") as archive:
        kept = {name: archive[name] for name in archive.files} | (arrays or {})
    np.savez(
        folder / "visualization_tensors.npz",
        **{name: array for name, array in kept.items() if array is not None},
    )
    record = json.loads((folder / "tokens.json").read_text())
    (folder / "tokens.json").write_text(json.dumps(record | facts))


def broken(change, *words):
    return pytest.param(change, words, id=words[0])


@pytest.mark.parametrize(
    "change, words",
    [
        broken(lambda f: (f / "tokens.json").unlink(), "tokens.json: no such file"),
        broken(
            lambda f: (f / "tokens.json").write_text('{"schema": 1,'),
            "tokens.json is not readable JSON",
        ),
        broken(lambda f: rewrite(f, schema=2), "schema 2"),
        broken(
            lambda f: (f / "visualization_tensors.npz").unlink(),
            "visualization_tensors.npz: no such file",
        ),
        broken(
            lambda f: (f / "visualization_tensors.npz").write_bytes(
                (f / "visualization_tensors.npz").read_bytes()[:500]
            ),
            "visualization_tensors.npz cannot be read",
        ),
        broken(
            lambda f: rewrite(f, {"feedback_topk": np.array([{"a": 1}], object)}),
            "cannot be read",
            "allow_pickle",
        ),
        broken(lambda f: rewrite(f, {"feedback_topk": None}), "'feedback_topk' is missing"),
        broken(
            lambda f: rewrite(f, {"feedback_topk": np.zeros((21, 3, 4, 23))}),
            "feedback: float64 of shape (21, 3, 4, 23)",
        ),
        broken(
            lambda f: rewrite(f, {"feedback_topk": np.zeros((20, 3, 4, 24))}),
            "for 21 tokens, wanted (21, 3, 4, 24)",
        ),
        broken(
            lambda f: rewrite(f, {"initial_topk": np.full((8, 3, 4, 24), np.nan)}),
            "initial: attention that is not finite",
        ),
        broken(
            lambda f: rewrite(f, {"initial_topk": np.arange(8 * 3 * 96.0).reshape(8, 3, 4, 24)}),
            "not sorted by layer",
        ),
        broken(lambda f: rewrite(f, {"boxes": np.zeros((24, 3))}), "boxes of shape (24, 3)"),
        broken(
            lambda f: rewrite(f, grid={"shape": [5, 6], "size": [420, 336]}),
            "a grid of (5, 6) for 24 vision tokens",
        ),
        broken(lambda f: rewrite(f, hidden_top_k=2), "wanted (8, 2, 4, 24)"),
        broken(lambda f: rewrite(f, stages={"initial": None}), "initial"),
        broken(lambda f: rewrite(f, stages=None), "NoneType"),
    ],
)
def test_a_broken_file_is_named_in_one_line(tmp_path, change, words):
    change(make_instance(tmp_path / "in"))
    result = text_heatmap(*arguments(tmp_path / "in", tmp_path / "out"))
    fails(result, *words, "8_scene", "--output-visualization-tensors again")
    assert not (tmp_path / "out").exists()


def test_arrays_that_the_pages_do_not_need_are_not_read(tmp_path):
    folder = make_instance(tmp_path)
    rewrite(folder, {"initial_layers": np.array([{}], object)})
    assert read_instance(tmp_path, 8).stages["initial"].topk.shape == (8, 3, 4, 24)


def test_without_an_accepted_revision_the_pages_that_exist_are_written(tmp_path, no_figures):
    make_instance(tmp_path / "in", texts={"initial": TEXTS["initial"]})
    result = text_heatmap(*arguments(tmp_path / "in", tmp_path / "out"))
    assert (
        result.returncode == 0
        and result.stderr
        == "no f2i and r2i page: feedback and revision of instance 8: not stored, because no"
        " revision was accepted\n"
    )
    assert [path.name for path in (tmp_path / "out").iterdir()] == [
        "text_heatmap_8_q2i_attention.html"
    ]
    result = image_heatmap(*arguments(tmp_path / "in", tmp_path / "out"))
    assert result.returncode == 0 and "no map of feedback and revision" in result.stderr
    assert [
        row["panel"] for row in csv.DictReader(open(tmp_path / "out" / "image_heatmap_8_all.csv"))
    ] == ["Initial (all tokens)"]
    fails(
        image_heatmap(*arguments(tmp_path / "in", tmp_path, "--feedback-target-tokens", "red")),
        "no revision was accepted",
        "--stage initial",
    )
    fails(
        image_heatmap(*arguments(tmp_path / "in", tmp_path, "--paper_compat")),
        "no revision was accepted",
    )
    assert (
        image_heatmap(
            *arguments(
                tmp_path / "in", tmp_path, "--feedback-target-tokens", "red", "--stage", "initial"
            )
        ).returncode
        == 0
    )


def test_texts_that_the_model_did_not_accept_are_marked(tmp_path, no_figures):
    make_instance(tmp_path / "in", accepted=[])
    result = text_heatmap(*arguments(tmp_path / "in", tmp_path))
    assert (
        "feedback (not accepted): 20 tokens" in result.stdout
        and "initial response: 7 tokens" in result.stdout
        and not result.stderr
    )
    assert (
        "while writing the revision (not accepted)</h1>"
        in (tmp_path / "text_heatmap_8_r2i_attention.html").read_text()
    )
    figure = drawn(read_instance(tmp_path / "in", 8))
    assert "no revision accepted" in figure.get_suptitle()
    plots.plt.close(figure)


def test_texts_of_a_stop_token_alone_and_models_without_grid(tmp_path, no_figures):
    make_instance(tmp_path / "in", texts=TEXTS | {"revision": ["</s>"]})
    assert text_heatmap(*arguments(tmp_path / "in", tmp_path / "out")).stdout.count("wrote") == 3
    assert image_heatmap(*arguments(tmp_path / "in", tmp_path / "out")).returncode == 0
    assert [
        row["stage"] for row in csv.DictReader(open(tmp_path / "out" / "image_heatmap_8_all.csv"))
    ] == ["initial", "feedback"]
    make_instance(tmp_path / "stop", texts={"initial": ["</s>"]})
    assert text_heatmap(*arguments(tmp_path / "stop", tmp_path / "out")).returncode == 0
    fails(
        image_heatmap(*arguments(tmp_path / "stop", tmp_path / "out")),
        "no text has a token that counts",
    )
    rewrite(make_instance(tmp_path / "bare"), {"boxes": None}, grid=None)
    assert text_heatmap(*arguments(tmp_path / "bare", tmp_path / "out")).returncode == 0
    fails(image_heatmap(*arguments(tmp_path / "bare", tmp_path / "out")), "unknown")


# --- text pages -----------------------------------------------------------------------------------


class Page(html.parser.HTMLParser):
    """Elements of a page with their attributes, and the tokens of its text: (shown, title,
    classes)."""

    def __init__(self, path):
        super().__init__()
        self.source, self.elements, self.tokens, self.within = (
            Path(path).read_text(encoding="utf-8"),
            [],
            [],
            False,
        )
        self.style = re.search(r"<style>(.*?)</style>", self.source, re.DOTALL)[1]
        self.feed(self.source)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.elements.append((tag, attributes))
        if tag == "span" and "title" in attributes:
            self.tokens.append(["", attributes["title"], attributes["class"].split()])
            self.within = True
        elif tag == "br":
            self.tokens[-1][0] += "\n"

    def handle_endtag(self, tag):
        self.within = self.within and tag != "span"

    def handle_data(self, data):
        if self.within:
            self.tokens[-1][0] += data

    def color(self, i):
        level = next(name for name in self.tokens[i][2] if re.fullmatch(r"c\d+", name))
        return re.search(rf"\.{level} {{ background: (#\w+)", self.style)[1]


@pytest.fixture(scope="module")
def pages(made, tmp_path_factory):
    """{page: Page} with shared and with own scale."""
    out = tmp_path_factory.mktemp("pages")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "save", lambda fig, *rest, **options: plots.plt.close(fig))
        for name, more in (("shared", []), ("own", ["--own_scale"])):
            result = text_heatmap(*arguments(made, out / name, *more))
            assert result.returncode == 0 and not result.stderr, result.stderr
    return {
        (scale, page): Page(out / scale / f"text_heatmap_8_{page}_attention.html")
        for scale in ("shared", "own")
        for page in ("q2i", "f2i", "r2i")
    }


def test_a_page_shows_the_text_as_it_is_and_each_weight_in_numbers(made, pages):
    weights = token_weights(token_maps(read_instance(made, 8), "feedback", 3))
    page = pages["shared", "f2i"]
    assert [shown for shown, *_ in page.tokens] == [
        token.replace("\n", "↵\n") for token in TEXTS["feedback"]
    ]
    for i, (_, title, classes) in enumerate(page.tokens):
        assert (
            f"token {i} " in title
            and f"{weights[i]:.3g}" in title
            and f'<td class="n">{weights[i]:.4g}' in page.source
        )
        assert ("stop" in classes) == (i == 20) == ("not counted" in title)
    assert not any(
        "stop" in classes for *_, classes in pages["shared", "r2i"].tokens
    )  # cut off, so the last token is one like the others
    for words in (
        "What is &lt;b&gt;this&lt;/b&gt;?",
        "a &amp; b",
        "tiny-llava",
        "20, and the stop token",
        f"{weights[:20].mean():.3g}",
    ):
        assert words in page.source


def test_colours_compare_between_pages_unless_each_has_its_own_scale(made, pages):
    instance = read_instance(made, 8)
    weights = {
        page: token_weights(token_maps(instance, name, 3))
        for name, page in text_script.PAGES.items()
    }
    counting = {
        page: weights[page][: instance.stages[name].steps]
        for name, page in text_script.PAGES.items()
    }

    def color(share):
        return plots.plt.matplotlib.colors.to_hex(
            text_page.COLORS(round(255 * min(1, max(0, share))))
        )

    for (scale, name), page in pages.items():
        own = counting[name] if scale == "own" else np.concatenate(list(counting.values()))
        low, high = own.min(), own.max()
        assert [page.color(i) for i in range(len(weights[name]))] == [
            color((weight - low) / (high - low)) for weight in weights[name]
        ]
        shown = [page.color(i) for i in range(len(counting[name]))]
        assert scale == "shared" or {color(0), color(1)} <= set(shown)
        assert (
            f"<span>{low:.3g}</span><span>{(low + high) / 2:.3g}</span><span>{high:.3g}</span>"
            in page.source
        )
    darkest = [
        name
        for name in counting
        if color(1) in [pages["shared", name].color(i) for i in range(len(counting[name]))]
    ]
    assert darkest == [max(counting, key=lambda name: counting[name].max())]


def test_the_stop_token_does_not_set_the_scale(tmp_path, no_figures):
    topk = {name: attention(len(tokens), 3, 4, 24, 3) for name, tokens in TEXTS.items()}
    topk["feedback"][-1] *= 50
    make_instance(tmp_path / "in", topk=topk)
    text_heatmap(*arguments(tmp_path / "in", tmp_path))
    page = Page(tmp_path / "text_heatmap_8_f2i_attention.html")
    weights = token_weights(token_maps(read_instance(tmp_path / "in", 8), "feedback", 3))
    assert (
        f"<span>{weights[20]:.3g}</span>" not in page.source
        and f"{weights[20]:.3g}, stop token" in page.tokens[20][1]
    )


def test_nothing_in_a_page_runs_or_leads_outside(tmp_path, no_figures):
    make_instance(
        tmp_path / "in",
        texts={"initial": HOSTILE},
        question="<img src=x onerror=alert(1)> https://example.org",
    )
    result = text_heatmap(
        *arguments(tmp_path / "in", tmp_path, "--span_length", 1, "--top_spans", 99)
    )
    assert result.returncode == 0, result.stderr
    page = Page(tmp_path / "text_heatmap_8_q2i_attention.html")
    allowed = {
        "html",
        "head",
        "meta",
        "title",
        "style",
        "body",
        "main",
        "h1",
        "h2",
        "dl",
        "dt",
        "dd",
        "p",
        "span",
        "br",
        "div",
        "table",
        "tr",
        "th",
        "td",
        "code",
        "details",
        "summary",
    }
    assert {tag for tag, _ in page.elements} <= allowed
    assert {name for tag, attributes in page.elements for name in attributes} <= {
        "lang",
        "charset",
        "http-equiv",
        "content",
        "name",
        "class",
        "title",
    }
    assert "url(" not in page.style and "@import" not in page.style
    policy = next(
        attributes["content"]
        for tag, attributes in page.elements
        if attributes.get("http-equiv") == "Content-Security-Policy"
    )
    digest = base64.b64encode(hashlib.sha256(page.style.encode()).digest()).decode()
    assert (
        policy
        == f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    shown = [text for text, *_ in page.tokens]
    assert (
        shown[:6] == HOSTILE[:6]
        and shown[-1] == "</s>"
        and "\u202e" not in page.source
        and "\x07" not in page.source
    )
    assert shown[-2] == "\N{NO-BREAK SPACE}\N{NO-BREAK SPACE}two"


def test_the_bytes_of_one_character_are_shown_once(tmp_path):
    folder = make_instance(tmp_path, texts={"initial": ["a", "é", "é", " b", "</s>"]})
    record = json.loads((folder / "tokens.json").read_text())
    record["stages"]["initial"] |= {
        "text": "aé b",
        "spans": [[0, 1], [1, 2], [1, 2], [2, 4], [4, 4]],
    }
    rewrite(folder, stages=record["stages"])
    assert read_instance(tmp_path, 8).stages["initial"].pieces() == ["a", "é", "·", " b", "</s>"]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            [
                " the",
                " ran",
                "ber",
                "ries",
                "\n",
                ".",
                " W" * 30,
                "好",
                "\u0301",
                "$_$",
                " ",
                "x" * 90,
            ]
        ),
        min_size=1,
        max_size=40,
    ),
    st.booleans(),
)
def test_the_figure_breaks_lines_between_words_and_loses_nothing(tokens, ended):
    tokens = [*tokens, "</s>"] if ended else tokens
    text, spans = located(tokens, ended)
    stage = Stage("initial", text, tokens, spans, ended, "", np.zeros((len(tokens), 1, 1, 1)))
    placed, lines = text_figure.boxes_of(stage, 4.0)
    assert (
        sorted({i for i, *_ in placed}) == list(range(len(tokens)))
        and 1 + max(line for *_, line in placed) == lines
    )
    for i, token in enumerate(tokens):
        assert (
            "".join(part for j, part, *_ in placed if j == i).strip()
            == text_figure.drawable(token).strip()
        )
    for (i, part, x, line), (j, _, after, below) in zip(placed, placed[1:]):
        assert x + text_figure.advance(part) <= 4.0001 or len(part) == 1
        assert (
            below == line
            and after >= x + text_figure.advance(part) - 1e-9
            or below == line + 1
            and after == 0
        )
        if below > line and i != j and not (ended and j == len(tokens) - 1):
            starts = [
                n
                for n, token in enumerate(tokens)
                if n == 0 or token[0] == " " or tokens[n - 1] == "\n"
            ]
            word = tokens[
                max(n for n in starts if n <= j) : min(
                    (n for n in starts if n > j), default=len(tokens) - ended
                )
            ]
            assert (
                j in starts
                or text_figure.advance(text_figure.drawable("".join(word).strip(" "))) > 4
            )


def test_the_printed_command_shows_the_spans_it_names(made, tmp_path, no_figures):
    result = text_heatmap(*arguments(made, tmp_path, "--top_spans", 3, "--span_length", 2))
    lines = [
        shlex.split(line)
        for line in result.stdout.splitlines()
        if "--feedback-target-tokens" in line
    ]
    assert len(lines) == 3
    for line, stage in zip(lines, TEXTS):
        assert image_heatmap(*arguments(made, tmp_path, *line)).returncode == 0
        assert (["--stage", stage] == line[-2:]) == (stage != "feedback")


# --- maps -----------------------------------------------------------------------------------------


def planted(places, tokens=TEXTS["initial"], patches=24):
    """Attention of every step 1e-4 but for 1e-2 on some patches."""
    topk = np.full((len(tokens), 3, 4, patches), 1e-4)
    topk[..., places] = 1e-2
    return topk


def test_coverage_in_numbers_of_planted_maps(tmp_path, no_figures):
    even, one = np.full((8, 3, 4, 24), 0.01), np.zeros((21, 3, 4, 24))
    one[..., 7] = 0.5
    half = np.zeros((7, 3, 4, 24))
    half[..., :12] = 0.02
    make_instance(tmp_path / "in", topk={"initial": even, "feedback": one, "revision": half})
    assert image_heatmap(*arguments(tmp_path / "in", tmp_path)).returncode == 0
    rows = list(csv.DictReader(open(tmp_path / "image_heatmap_8_all.csv")))
    names = [
        "mean",
        "max",
        "normalized_entropy",
        "share_of_patches_with_50_percent",
        "share_of_patches_with_90_percent",
    ]
    wanted = [
        [0.01, 0.01, 1, 12 / 24, 22 / 24],
        [0.5 / 24, 0.5, 0, 1 / 24, 1 / 24],
        [0.01, 0.02, np.log(12) / np.log(24), 6 / 24, 11 / 24],
    ]
    np.testing.assert_allclose(
        [[float(row[name]) for name in names] for row in rows], wanted, rtol=1e-6, atol=1e-12
    )
    assert {(row["vmin"], float(row["vmax"])) for row in rows} == {("0.0", 0.5)} and [
        row["steps"] for row in rows
    ] == ["7", "20", "7"]


def test_one_scale_for_all_panels_with_the_quantile_at_its_top(made, tmp_path, no_figures):
    instance = read_instance(made, 8)
    args = maps_script.parse_args(
        [*map(str, arguments(made, "x", "--quantile", "0.9", "--feedback-target-tokens", "red"))]
    )
    panels = panels_module.panels_of(instance, args)
    values = sorted(np.concatenate([panel.values for panel in panels]))
    low, high = panels_module.scale_of(panels, instance.grid, 0.9)
    assert low == values[0] and high == values[round(0.9 * (len(values) - 1))]
    figure = image_figure.draw(instance, panels, (low, high), args)
    assert {
        (image.norm.vmin, image.norm.vmax) for axis in figure.axes for image in axis.images[1:]
    } == {(low, high)}
    plots.plt.close(figure)


def drawn(instance, *more):
    args = maps_script.parse_args([*map(str, arguments("in", "out", *more))])
    panels = panels_module.panels_of(instance, args)
    return image_figure.draw(
        instance, panels, panels_module.scale_of(panels, instance.grid, 1.0), args
    )


@pytest.mark.parametrize("row, column", [(0, 0), (1, 4), (3, 5)])
def test_a_hot_patch_lies_on_its_place_in_the_picture(tmp_path, row, column):
    """The grid covers the middle of the picture only, as after a centre crop, and the picture is
    shown enlarged."""
    region = (42, 21, 378, 315)
    make_instance(
        tmp_path,
        topk={"initial": planted(row * 6 + column)},
        texts={"initial": TEXTS["initial"]},
        region=region,
    )
    instance = read_instance(tmp_path, 8)
    figure = drawn(instance)
    grey, heat = (np.ma.filled(image.get_array(), np.nan) for image in figure.axes[1].images)
    times = 1024 // 420
    assert heat.shape == grey.shape[:2] == (336 * times, 420 * times)
    x0, y0, x1, y1 = instance.grid.boxes[row * 6 + column] * times
    ys, xs = np.nonzero(heat == np.nanmax(heat))
    assert (
        x0 <= xs.min() + 0.5
        and xs.max() + 0.5 <= x1
        and y0 <= ys.min() + 0.5
        and ys.max() + 0.5 <= y1
    )
    assert heat[round((y0 + y1) / 2), round((x0 + x1) / 2)] == pytest.approx(1e-2, rel=0.02)
    seen = ~np.isnan(heat)
    assert [np.nonzero(seen.any(axis))[0][[0, -1]].tolist() for axis in (0, 1)] == [
        [84, 755],
        [42, 629],
    ]
    assert np.ptp(grey) <= 0.5 and figure.axes[0].get_title() == "Picture"
    plots.plt.close(figure)
    figure = drawn(instance, "--no_overlay")
    (image,) = figure.axes[0].images
    assert np.argwhere(image.get_array() > 1e-3).tolist() == [
        [row, column]
    ] and image.get_extent() == [42, 378, 315, 21]
    plots.plt.close(figure)


def test_tokens_without_a_box_and_tiles_that_are_no_grid(tmp_path):
    folder = make_instance(
        tmp_path, topk={"initial": planted([3, 23])}, texts={"initial": TEXTS["initial"]}
    )
    boxes = read_instance(tmp_path, 8).grid.boxes
    boxes[23] = np.nan
    rewrite(folder, {"boxes": boxes}, grid={"shape": None, "size": [420, 336]})
    instance = read_instance(tmp_path, 8)
    figure = drawn(instance, "--no_overlay")
    (image,) = figure.axes[0].images
    x0, y0, x1, y1 = map(round, boxes[3])
    hot = np.ma.filled(image.get_array(), np.nan) > 1e-3
    assert hot[y0:y1, x0:x1].all() and hot.sum() == (y1 - y0) * (x1 - x0)
    plots.plt.close(figure)
    args = maps_script.parse_args([*map(str, arguments("in", "out"))])
    (panel,) = panels_module.panels_of(instance, args)
    numbers = panels_module.numbers_of(panel, instance.grid)
    assert (
        numbers["mean"] == pytest.approx((1e-2 + 22e-4) / 23)
        and numbers["share_of_patches_with_50_percent"] == 1 / 23
    )


@pytest.mark.parametrize(
    "name, side",
    [
        ("openai/clip-vit-large-patch14-336", 24),
        ("openai/clip-vit-large-patch14", 16),
        ("google/siglip-so400m-patch14-384", 27),
        ("/my/patch32/clip-vit-base-patch16-224/", 14),
    ],
)
def test_patches_per_side_from_the_name_of_an_encoder(name, side):
    assert panels_module.side_of(name) == side


def test_an_encoder_that_contradicts_the_stored_grid_is_refused(made, tmp_path, no_figures):
    fails(
        image_heatmap(
            *arguments(made, tmp_path, "--vision-encoder-name", "openai/clip-vit-large-patch14-336")
        ),
        "means 24 x 24",
        "4 x 6",
        "image size 336",
    )
    fails(
        image_heatmap(*arguments(made, tmp_path, "--vision-encoder-name", "dinov2-large")),
        "no patch size in the name",
    )
    make_instance(tmp_path / "in", shape=(24, 24), heads=3, k=3, texts={"initial": ["a"]})
    assert (
        image_heatmap(
            *arguments(
                tmp_path / "in",
                tmp_path,
                "--vision-encoder-name",
                "openai/clip-vit-large-patch14-336",
            )
        ).returncode
        == 0
    )


def test_file_names_keep_the_spans_and_tell_what_else_differs(made):
    def tag(*more):
        return panels_module.tag_of(
            maps_script.parse_args([*map(str, arguments(made, "x", *more))])
        )

    spans = ["--feedback-target-tokens", "rather,silver,.", "the,red,c"]
    assert (
        tag(*spans) == "rather,silver,._the,red,c"
        and tag() == "all"
        and tag("--stage", "initial") == "all"
    )
    assert (
        tag(*spans, "--occurrence", 1, 2, "--stage", "revision")
        == "rather,silver,._the,red,c~2__revision"
    )
    assert (
        tag("--feedback-target-tokens", "../a/b,<0x0A>,\n", "--paper_compat", "--no_overlay")
        == "..-a-b,-0x0A-,-__paper_compat__no_overlay"
    )
    long = [tag("--feedback-target-tokens", "好" * 90 + end) for end in "ab"]
    assert long[0] != long[1] and all(len(name.encode()) < 120 for name in long)


@pytest.mark.parametrize(
    "more, words",
    [
        (["--occurrence", "1", "2", "--feedback-target-tokens", "red"], "2 numbers for 1 spans"),
        (["--occurrence", "0"], "from 1 to"),
        (["--quantile", "0"], "--quantile"),
        (["--instance-idx", "-1"], "--instance-idx"),
        (["--stage", "decide"], "invalid choice"),
        (
            ["--feedback-target-tokens", "blue"],
            "not in the text; the tokens are 0 'It', 1 ' names'",
        ),
        (["--feedback-target-tokens", "red", "--occurrence", "3"], "2 times"),
    ],
)
def test_wrong_usage_is_one_line(made, tmp_path, more, words):
    fails(image_heatmap(*arguments(made, tmp_path, *more)), words)
    assert not list(tmp_path.iterdir())


def test_a_picture_that_is_gone_or_another_is_named(tmp_path, no_figures):
    folder = make_instance(tmp_path / "in")
    Image.new("RGB", (50, 40)).save(folder / "picture.png")
    fails(
        image_heatmap(*arguments(tmp_path / "in", tmp_path)), "50 x 40", "420 x 336", "--no_overlay"
    )
    (folder / "picture.png").unlink()
    fails(image_heatmap(*arguments(tmp_path / "in", tmp_path)), "no such picture", "--no_overlay")
    assert not list(tmp_path.glob("image_heatmap*"))
    assert image_heatmap(*arguments(tmp_path / "in", tmp_path, "--no_overlay")).returncode == 0


# --- real command lines ---------------------------------------------------------------------------


def test_files_have_reproducible_bytes_and_carry_their_settings(made, tmp_path):
    outputs = []
    for _ in range(2):
        assert text_heatmap(*arguments(made, tmp_path / "out")).returncode == 0
        result = image_heatmap(
            *arguments(
                made, tmp_path / "out", "--feedback-target-tokens", "the,red", "ran,ber,ries"
            )
        )
        assert result.returncode == 0 and not result.stderr, result.stderr
        outputs.append({path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()})
        shutil.rmtree(tmp_path / "out")
    names = [f"text_heatmap_8_{page}_attention" for page in ("q2i", "f2i", "r2i")]
    images = [
        f"{stem}.{ending}"
        for stem in (*names, "image_heatmap_8_the,red_ran,ber,ries")
        for ending in ("png", "pdf")
    ]
    assert outputs[0] == outputs[1] and set(outputs[0]) == {
        *images,
        *(f"{name}.html" for name in names),
        "image_heatmap_8_the,red_ran,ber,ries.csv",
    }
    (tmp_path / "image.png").write_bytes(outputs[0]["image_heatmap_8_the,red_ran,ber,ries.png"])
    kept = json.loads(Image.open(tmp_path / "image.png").text["settings"])
    row = next(
        csv.DictReader(outputs[0]["image_heatmap_8_the,red_ran,ber,ries.csv"].decode().splitlines())
    )
    assert (
        (kept["vmin"], kept["vmax"]) == (float(row["vmin"]), float(row["vmax"]))
        and kept["hidden_top_k"] == 3
        and kept["model"] == "tiny-llava"
    )
    (tmp_path / "text.png").write_bytes(outputs[0]["text_heatmap_8_f2i_attention.png"])
    assert json.loads(Image.open(tmp_path / "text.png").text["settings"])["stage"] == "feedback"


def test_hostile_text_is_drawn_without_a_warning(tmp_path):
    make_instance(
        tmp_path / "in", texts={"initial": HOSTILE}, question="$\\frac$ 好 <b> " + "long " * 60
    )
    assert text_heatmap(*arguments(tmp_path / "in", tmp_path)).returncode == 0
    result = image_heatmap(
        *arguments(
            tmp_path / "in",
            tmp_path,
            "--stage",
            "initial",
            "--feedback-target-tokens",
            "$x^2$",
            "好",
            "😀",
        )
    )
    assert result.returncode == 0, result.stderr


def test_the_commands_run_from_their_folder_without_torch(made, tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    for name, more in (
        ("text_attention_heatmap", []),
        ("image_attention_heatmap", ["--feedback-target-tokens", "the,red,cir", "ran,ber,ries"]),
    ):
        code = (
            "import runpy, sys; sys.argv ="
            f" {[f'{name}.py', *map(str, arguments(made, tmp_path, *more))]!r}\ntry:\n   "
            f" runpy.run_path('{name}.py', run_name='__main__')\nfinally:\n    assert 'torch' not"
            " in sys.modules"
        )
        result = subprocess.run(
            [sys.executable, "-W", "error", "-c", code],
            cwd=VISUALIZE,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr
    assert (tmp_path / "image_heatmap_8_the,red,cir_ran,ber,ries.png").exists() and (
        tmp_path / "text_heatmap_8_f2i_attention.html"
    ).exists()
    result = subprocess.run(
        [sys.executable, "image_attention_heatmap.py"],
        cwd=VISUALIZE,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2 and result.stderr.count("\n") == 1

"""Swap pairs from both tables, their strata and quads, the reading of answers, and the states:
against single plain passes."""

import base64
import io
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from data import make_shapes
from vlmdiag.cli import UsageError
from vlmdiag.pictures import table
from vlmdiag.swap import pairs
from vlmdiag.swap.relations import CATEGORIES, GROUP_OF
from vlmdiag.swap.states import make_process, open_states

SHAPES = ("Is the red circle to the left or right of the blue square?", "left")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("swap") / "set"
    assert (
        make_shapes.main(
            [
                "--out_dir",
                str(folder),
                "--num_images",
                "12",
                "--num_train",
                "1",
                "--seed",
                "4",
                "--num_workers",
                "1",
            ]
        )
        == 0
    )
    return folder


def picture(color="red"):
    Image.new("RGB", (8, 6), color).save(stream := io.BytesIO(), "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def written(path, columns, rows):
    lines = [
        "\t".join(columns),
        *("\t".join(str(row.get(name, "")) for name in columns) for row in rows),
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


COLUMNS = ("index", "question_id", "category", "question", "image", "answer", "A", "B", "C", "D")


def test_both_tables_of_the_shapes_give_the_same_directional_pairs(shapes):
    ready, _ = pairs.read_pairs(shapes / "swap_pairs_ready.tsv", limit=0)
    other, left_out = pairs.read_pairs(shapes / "swap_pairs.tsv", limit=0)
    assert left_out == {} and len(ready) >= 12
    by_id = {pair["question_id"]: pair for pair in other if pair["group"] != "distance"}
    shared = [pair for pair in ready if pair["question_id"] in by_id]
    assert shared
    for pair in shared:
        twin = by_id[pair["question_id"]]
        assert (pair["category"], pair["questions"], pair["image_id"]) == (
            twin["category"],
            twin["questions"],
            twin["image_id"],
        )
    for pair in ready + other:
        assert pair["group"] == GROUP_OF[pair["category"]] and len(set(pair["questions"])) == 2
        assert (
            pair["objects"][0] in pair["questions"][0]
            and pair["objects"][1] in pair["questions"][0]
        )
    found = table.picture_at(shapes / "swap_pairs.tsv", other[3]["offset"])
    assert found.mode == "RGB" and min(found.size) > 100


@pytest.mark.parametrize(
    ("question", "names"),
    [
        (
            "What is the relative location of red circle and pink cross in the image?",
            ("red circle", "pink cross"),
        ),
        (
            "How are chest of drawers and bed positioned in relation to each other in the image?",
            ("chest of drawers", "bed"),
        ),
        (
            "What is the spatial relationship between the tv and a sofa in this picture?",
            ("tv", "sofa"),
        ),
        ("How do the positions of lamp and desk interact?", ("lamp", "desk")),
        ("Describe the arrangement of cup and plate within the image.", ("cup", "plate")),
        ("Where is the cup?", None),
    ],
)
def test_names_are_read_from_the_known_phrasings(question, names):
    assert pairs.names_in(question) == names


def test_rows_that_give_no_pair_are_reported_and_none_stays_text(tmp_path):
    base = {"image": picture(), "answer": "A", "A": "None", "B": "cup", "C": "n/a", "D": "pan"}
    rows = [
        base
        | {
            "question_id": "q0",
            "category": "far",
            "question": "Which is the farthest?",
        },  # the target is no object
        base
        | {
            "question_id": "q1",
            "category": "close",
            "question": "Which is the nearest?",
            "answer": "B",
        },
        base | {"question_id": "q2", "category": "left", "question": "Where is it?"},
        base
        | {
            "question_id": "q3",
            "category": "beneath",
            "question": "How are cup and pan positioned in the image?",
        },
        base
        | {
            "question_id": "q4",
            "category": "inside",
            "question": "How are cup and pan positioned in the image?",
        },
        base
        | {"question_id": "q5", "category": "far", "question": "?", "answer": "B", "image": ""},
    ]
    found, left_out = pairs.read_pairs(written(tmp_path / "t.tsv", COLUMNS, rows))
    assert [(pair["question_id"], pair["category"], pair["objects"]) for pair in found] == [
        ("q1", "close", ("cup", "pan")),
        ("q3", "under", ("cup", "pan")),
    ]
    assert (
        found[1]["questions"][0].startswith("Is the cup above or below the pan?")
        and sum(left_out.values()) == 4
    )
    again, _ = pairs.read_pairs(written(tmp_path / "u.tsv", COLUMNS, rows[::-1]))
    assert {pair["question_id"]: pair["questions"] for pair in again} == {
        pair["question_id"]: pair["questions"] for pair in found
    }


def test_the_limit_is_drawn_by_the_seed(shapes):
    one, left_out = pairs.read_pairs(shapes / "swap_pairs_ready.tsv", seed=1, limit=2)
    assert (
        all(sum(pair["category"] == category for pair in one) == 2 for category in CATEGORIES)
        and left_out
    )
    assert [pair["id"] for pair in one] == [
        pair["id"] for pair in pairs.read_pairs(shapes / "swap_pairs_ready.tsv", seed=1, limit=2)[0]
    ]
    assert [pair["id"] for pair in one] == sorted(pair["id"] for pair in one)


def test_strata_and_quads_follow_the_heights(shapes):
    found, _ = pairs.read_pairs(shapes / "swap_pairs_ready.tsv", limit=0)
    boxes = pairs.read_boxes(shapes / "bboxes.json")[0]
    heights = {
        pair["id"]: table.picture_at(shapes / "swap_pairs_ready.tsv", pair["offset"]).height
        for pair in found
    }
    quads, _ = pairs.place(found, boxes, heights)
    assert quads
    for quad in quads:
        pair = next(pair for pair in found if pair["id"] == quad["id"])
        (asked,), (reference,) = (
            [box for name, box in boxes[pair["question_id"]] if name == wanted]
            for wanted in pair["objects"]
        )
        higher = asked[1] + asked[3] / 2 < reference[1] + reference[3] / 2
        assert quad["vertical"] == ("above" if higher else "under") and quad["signs"] == [
            1 if higher else -1,
            1 if pair["category"] == "far" else -1,
        ]
        assert pair["split"] == (
            "consistent" if higher == (pair["category"] == "far") else "counter"
        )
    pairs.place(found, boxes, heights, band=2.0)
    assert {pair["split"] for pair in found if pair["group"] == "distance"} == {"ambiguous"}
    listed = [
        {
            "question_id": key,
            "objects": {"name": [name for name, _ in some], "bbox": [list(box) for _, box in some]},
        }
        for key, some in boxes.items()
    ]
    (shapes / "records.json").write_text(json.dumps(listed))
    assert pairs.read_boxes(shapes / "records.json") == (boxes, {})


def test_a_pair_whose_boxes_are_of_another_picture_gets_no_stratum(shapes, tmp_path):
    """Resized pictures keep theirs, for the boxes' own height counts."""
    path = shapes / "swap_pairs_ready.tsv"
    header, *rows = [line.split("\t") for line in path.read_text().splitlines()]
    place, group = header.index("image_base64"), header.index("group")
    rows = [row for row in rows if row[group] == "distance"][:6]

    def saved(picture, **options):
        picture.save(stream := io.BytesIO(), "JPEG", **options)
        return base64.b64encode(stream.getvalue()).decode()

    turned = Image.Exif()
    turned[0x0112] = 6
    for n, row in enumerate(rows):
        shown = Image.open(io.BytesIO(base64.b64decode(row[place])))
        row[place] = [
            row[place],
            saved(shown.resize((shown.width // 2, shown.height // 2))),
            saved(shown.crop((0, 0, shown.width, shown.height // 2))),
            saved(shown, exif=turned),
            base64.b64encode(b"no picture").decode() * 9,
            "!" * 99,
        ][n]
    (tmp_path / "t.tsv").write_text("\n".join("\t".join(row) for row in [header, *rows]))
    found, left_out = pairs.read_pairs(tmp_path / "t.tsv", limit=0)
    assert len(found) == 6 and not left_out
    boxes, sizes = pairs.read_boxes(shapes / "bboxes.json")
    heights = pairs.heights_of(tmp_path / "t.tsv", found, sizes)
    assert [pair["id"] for pair in found if pair["id"] in heights] == ["000000", "000001"]
    assert heights["000001"] == sizes[found[1]["question_id"]][1]
    _, left_out = pairs.place(found, boxes, heights)
    assert left_out["no picture of the shape that the boxes are of"] == 4
    # without sizes the picture's own height counts, unless it is turned
    heights = pairs.heights_of(tmp_path / "t.tsv", found, {})
    assert set(heights) == {"000000", "000001", "000002"}


@pytest.mark.parametrize(
    "content",
    [
        "3",
        '"text"',
        "[]",
        "[3, null]",
        '{"q": 3}',
        '{"q": {"objects": 3}}',
        '{"q": {"objects": [null]}}',
        '{"q": {"objects": [{"name": "cup", "bbox": "1234"}]}}',
        '{"q": {"objects": [{"name": "cup", "bbox": [1, 2, 3, "4"]}]}}',
        '{"q": {"objects": [{"name": "cup", "bbox": [1, 2, 3, NaN]}]}}',
        '{"q": {"objects": [{"bbox": [1, 2, 3, 4]}]}}',
        '{"q": {"objects": {"name": 3, "bbox": null}}}',
        "[" * 100_000,
        "",
        "{",
    ],
)
def test_boxes_that_are_none_are_one_line(tmp_path, content):
    (tmp_path / "boxes.json").write_text(content)
    with pytest.raises(UsageError, match=r"boxes\.json") as caught:
        pairs.read_boxes(tmp_path / "boxes.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "category", "read"),
    [
        ("left", "left", "left"),
        ("To the RIGHT.", "left", "right"),
        ("It is not left.", "left", "right"),
        ("left or right", "left", None),
        ("Beneath it", "above", "under"),
        ("It is under, not above", "above", "under"),
        ("neither left nor right", "left", None),
        ("", "far", None),
        ("very close by", "far", "close"),
        ("The leftmost one", "left", None),
        ("nearer", "close", "close"),
        ("leftover", "left", None),
        ("It isn't far", "far", "close"),
        ("not left but right", "left", "right"),
    ],
)
def test_answers_are_read_by_whole_words(text, category, read):
    assert pairs.read_answer(text, category)[0] == read


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("A", "left"),
        ("b.", "right"),
        ("(B) right", "right"),
        ("A) left", "left"),
        ("Answer: B", "right"),
        ("A red circle is to the right", "right"),
        ("left", "left"),
        ("C", None),
    ],
)
def test_letters_of_options_are_read(text, read):
    assert pairs.read_answer(text, "left", {"A": "left", "B": "right"})[0] == read
    mirrored = (
        {"left": "right", "right": "left", None: None}[read] if pairs.LETTER.match(text) else read
    )
    assert pairs.read_answer(text, "left", {"A": "right", "B": "left"})[0] == mirrored


def test_multiple_choice_offers_both_words_in_both_orders(shapes):
    short, _ = pairs.read_pairs(shapes / "swap_pairs.tsv", limit=0)
    found, _ = pairs.read_pairs(shapes / "swap_pairs.tsv", limit=0, multiple_choice=True)
    assert [pair["id"] for pair in found] == [pair["id"] for pair in short]
    for group, names in {
        "horizontal": ("left", "right"),
        "vertical": ("above", "under"),
        "distance": ("far", "close"),
    }.items():
        own = [pair for pair in found if pair["group"] == group]
        assert {tuple(pair["letters"].values()) for pair in own} == {names, names[::-1]}
        assert abs(sum(pair["letters"]["A"] == names[0] for pair in own) - len(own) / 2) <= 0.5
    for pair, plain in zip(found, short, strict=True):
        for asked, before in zip(pair["questions"], plain["questions"], strict=True):
            assert asked.startswith(before.removesuffix(pairs.ONE_WORD)) and asked.index(
                "(A)"
            ) < asked.index("(B)")
        assert set(pairs.spellings(pair).values()) == {("A",), ("B",)} and pairs.spellings(pair)[
            pair["letters"]["A"]
        ] == ("A",)
    quads, _ = pairs.place(
        found, pairs.read_boxes(shapes / "bboxes.json")[0], {pair["id"]: 336 for pair in found}
    )
    assert quads and all("(A)" in quad["questions"][0] for quad in quads)


def test_unnamed_objects_stay_only_when_asked_for_and_occurrence_tells_equal_names_apart(tmp_path):
    base = {"image": picture(), "category": "far", "question": "?"}
    rows = [
        base
        | {"question_id": "q0", "answer": "A", "A": "unknown", "B": "cup", "C": "n/a", "D": ""},
        base | {"question_id": "q1", "answer": "B", "A": "cup", "B": "cup", "C": "pan", "D": "n/a"},
        base | {"question_id": "q2", "answer": "C", "A": "cup", "B": "cup", "C": "pan", "D": "n/a"},
    ]
    path = written(tmp_path / "t.tsv", COLUMNS, rows)
    assert [pair["question_id"] for pair in pairs.read_pairs(path)[0]] == ["q1", "q2"]
    assert [pair["objects"][0] for pair in pairs.read_pairs(path, keep_unnamed=True)[0]] == [
        "unknown",
        "cup",
        "pan",
    ]
    found, _ = pairs.read_pairs(path)
    boxes = {
        key: [("cup", (0, 0, 2, 2)), ("cup", (0, 40, 2, 2)), ("pan", (0, 20, 2, 2))]
        for key in ("q1", "q2")
    }
    quads, left_out = pairs.place(found, boxes, {pair["id"]: 100 for pair in found})
    assert [quad["vertical"] for quad in quads] == ["under"] and found[0][
        "split"
    ] == "counter"  # q1 asks for the second cup, which is lower than the pan
    assert found[1]["split"] is None and left_out == {
        "an object without a box of its own": 1
    }  # q2's reference may be either cup


def test_tables_that_are_none_are_refused(tmp_path):
    for content, why in (
        ("", "is empty"),
        (
            "a\tb\n1\t2\n",
            "its first line is 'a, b' and lacks a picture's column, category, original_answer",
        ),
        ("a\tb\n1\n", "1 cells where the header has 2"),
        ("\t".join(COLUMNS) + "\n", "no swap pair"),
    ):
        (tmp_path / "t.tsv").write_text(content)
        with pytest.raises(UsageError, match=re.escape(why)):
            pairs.read_pairs(tmp_path / "t.tsv")
    with pytest.raises(UsageError, match="cannot be read"):
        pairs.read_pairs(tmp_path / "none.tsv")


# --- states ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llava-gqa", "qwen"])
def test_states_are_those_of_single_plain_passes(load, shapes, tmp_path, name):
    vlm, path = load(name), shapes / "swap_pairs_ready.tsv"
    found, _ = pairs.read_pairs(path, limit=2)
    boxes = pairs.read_boxes(shapes / "bboxes.json")[0]
    quads, _ = pairs.place(
        found, boxes, {pair["id"]: table.picture_at(path, pair["offset"]).height for pair in found}
    )
    quad_of = {quad["id"]: quad | {"row": row} for row, quad in enumerate(quads)}
    layers, width = [0, 2], vlm.model.get_input_embeddings().weight.shape[1]
    states = open_states(tmp_path / "states.npy", (len(found), 2, 2, width), "float32")
    quad_states = open_states(tmp_path / "quads.npy", (len(quads), 4, 2, width), "float32")
    process = make_process(vlm, layers, states, quad_states, quad_of, 3)
    items = [SimpleNamespace(pair=pair, row=row, id=pair["id"]) for row, pair in enumerate(found)]
    loaded = [(item, table.picture_at(path, item.pair["offset"])) for item in items]
    records = [
        record
        for start in range(0, len(items), 5)
        for record, _ in process(loaded[start : start + 5])
    ]
    states, quad_states = np.load(states.path), np.load(quad_states.path)

    def plain(question, image):
        from vlmdiag.pictures.samples import Sample

        batch, kept = vlm.encode([Sample("0", None, question)], [image]), []
        hooks = [
            layer.register_forward_hook(
                lambda m, a, out: kept.append((out[0] if isinstance(out, tuple) else out)[0, -1])
            )
            for layer in vlm.parts.layers
        ]
        with torch.no_grad():
            out = vlm.model(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                attention_mask=batch.attention_mask,
                mm_encoder_outputs={"image": vlm.vision(batch)},
            )
        for hook in hooks:
            hook.remove()
        return torch.stack([kept[layer] for layer in layers]).numpy(), out.logits[0, -1]

    for item, image in loaded[::3]:
        for k in (0, 1):
            wanted, logits = plain(item.pair["questions"][k], image)
            assert np.allclose(states[item.row, k], wanted, atol=1e-4 * np.abs(wanted).max())
        if item.id in quad_of:
            wanted, _ = plain(quad_of[item.id]["questions"][1], image)
            row = quad_of[item.id]["row"]
            assert np.allclose(
                quad_states[row, 1], wanted, atol=1e-4 * np.abs(wanted).max()
            ) and np.array_equal(quad_states[row, 2:], states[item.row])
    assert all(isinstance(record["margin_orig"], float) for record in records)


def test_states_of_another_shape_are_refused(tmp_path):
    open_states(tmp_path / "s.npy", (3, 2, 1, 4), "float16")
    with pytest.raises(ValueError, match="wanted"):
        open_states(tmp_path / "s.npy", (4, 2, 1, 4), "float16")


def ready(path, *changes):
    """A ready table without a group, of a row for each change."""
    row = {
        "original_question": "Is the cup left of the pan?",
        "swapped_question": "Is the pan left of the cup?",
        "original_answer": "left",
        "swapped_answer": "right",
        "category": "left",
        "image": picture(),
    }
    rows = [row | {"question_id": f"q{n}"} | change for n, change in enumerate(changes)]
    return written(path, (*row, "question_id"), rows)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"swapped_question": ""}, "an empty question"),
        ({"original_question": "NaN"}, "an empty question"),
        ({"swapped_question": "Is it?", "original_question": " Is it? "}, "the original one"),
    ],
)
def test_a_row_without_two_questions_is_left_out(tmp_path, change, why):
    found, left_out = pairs.read_pairs(ready(tmp_path / "t.tsv", change, {}))
    assert [pair["question_id"] for pair in found] == ["q1"]
    (reason,) = left_out
    assert why in reason


def test_a_ready_table_needs_no_group_and_answers_may_end_with_a_stop(tmp_path):
    answers = {"original_answer": "Left.", "swapped_answer": "right."}
    (pair,), left_out = pairs.read_pairs(ready(tmp_path / "t.tsv", answers))
    assert pair["group"] == "horizontal" and not left_out

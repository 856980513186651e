"""The generated sets: equal bytes, COCO's layout, and answers that follow from objects.json
alone."""

import base64
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from pycocotools.coco import COCO

from data import make_shapes
from vlmdiag.cli import UsageError
from vlmdiag.pictures import coco, questions
from vlmdiag.scenes import annotations, shape_set
from vlmdiag.scenes.scene import FAR, NEAR, Scene, instance_map, outline

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "data" / "make_shapes.py"
KINDS = ("floor", "corridor")


def make(out, *flags, **options):
    command = [sys.executable, "-W", "error", str(SCRIPT), "--out_dir", str(out), *map(str, flags)]
    return subprocess.run(
        command,
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        **options,
    )


def bytes_of(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def read(path):
    return json.loads(Path(path).read_text())


def table(path):
    return pd.read_csv(path, sep="\t", keep_default_na=False)


def scenes_of(kind, count, correlation=0.8, part="val", seed=0):
    settings = {"scene": kind, "seed": seed, "height_depth_correlation": correlation}
    return [shape_set.make_scene(settings, part, n) for n in range(count)]


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """{kind: folder} of a set of 40 + 6 pictures, made by one process."""
    root = tmp_path_factory.mktemp("sets")
    for kind in KINDS:
        assert (
            make_shapes.main(
                [
                    "--out_dir",
                    str(root / kind),
                    "--scene",
                    kind,
                    "--num-images",
                    "40",
                    "--num_train",
                    "6",
                    "--num_workers",
                    "1",
                ]
            )
            == 0
        )
    return {kind: root / kind for kind in KINDS}


# ---- the set as files ----


def test_equal_flags_give_equal_bytes_with_any_number_of_workers(sets, tmp_path):
    done = make(tmp_path / "again", "--num_images", 40, "--num-train", 6, "--num_workers", 2)
    assert done.returncode == 0, done.stderr
    assert bytes_of(tmp_path / "again") == bytes_of(sets["floor"])
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_scene_does_not_depend_on_the_size_of_the_set(sets, tmp_path):
    make_shapes.main(
        [
            "--out_dir",
            str(tmp_path / "small"),
            "--num_images",
            "3",
            "--num_train",
            "1",
            "--num_workers",
            "1",
        ]
    )
    large, small = bytes_of(sets["floor"]), bytes_of(tmp_path / "small")
    pictures = [name for name in small if name.endswith(".jpg")]
    assert len(pictures) == 4
    assert all(small[name] == large[name] for name in pictures)
    assert read(tmp_path / "small/questions.json") == [
        row for row in read(sets["floor"] / "questions.json") if row["image_id"] <= 3
    ]


def test_a_finished_set_is_left_alone_and_a_lost_file_is_made_again(sets, tmp_path, capsys):
    out, flags = tmp_path / "set", ["--num_images", "40", "--num_train", "6", "--num_workers", "1"]
    shutil.copytree(sets["floor"], out)
    before = bytes_of(out)
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*.*")}
    assert make_shapes.main(["--out_dir", str(out), *flags]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert all(path.stat().st_mtime_ns == then for path, then in times.items())
    (out / "val2017/000000000007.jpg").unlink()
    (out / "swap_pairs.tsv").unlink()
    make_shapes.main(["--out_dir", str(out), *flags])
    assert bytes_of(out) == before


def test_an_interrupted_run_goes_on(sets, tmp_path):
    flags = ["--num_images", "500", "--num_train", "0", "--seed", "3", "--num_workers", "2"]
    command = [sys.executable, str(SCRIPT), "--out_dir", str(tmp_path / "set"), *flags]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        text=True,
        start_new_session=True,
        # a shell's background job ignores Ctrl-C, and so would its children
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    pictures = tmp_path / "set/val2017"
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and not (
        pictures.is_dir() and len(os.listdir(pictures)) > 40
    ):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # what Ctrl-C does
    _, told = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "run the same command again" in told
    assert "Traceback" not in told
    kept = {path: path.stat().st_mtime_ns for path in pictures.glob("*.jpg")}
    assert 40 < len(kept) < 500
    assert read(tmp_path / "set/manifest.json")["complete"] is False
    assert make(tmp_path / "set", *flags).returncode == 0
    assert all(path.stat().st_mtime_ns == then for path, then in kept.items())
    assert len(list(pictures.glob("*.jpg"))) == 500
    for n in (0, 300, 499):
        shape_set.draw(
            {"scene": "floor", "seed": 3, "height_depth_correlation": 0.8},
            ("val", n, tmp_path / "x.jpg"),
        )
        assert (tmp_path / "x.jpg").read_bytes() == (
            pictures / annotations.file_name(n + 1)
        ).read_bytes()
        (tmp_path / "x.jpg").unlink()


def test_other_settings_and_foreign_folders_are_refused(tmp_path):
    few = ["--num_images", "2", "--num_train", "0", "--num_workers", "1"]
    make_shapes.main(["--out_dir", str(tmp_path / "set"), *few])
    with pytest.raises(UsageError, match="seed 0 there, 5 asked.*--overwrite"):
        make_shapes.main(["--out_dir", str(tmp_path / "set"), *few, "--seed", "5"])
    before = bytes_of(tmp_path / "set")
    assert (
        make_shapes.main(["--out_dir", str(tmp_path / "set"), *few, "--seed", "5", "--overwrite"])
        == 0
    )
    assert set(bytes_of(tmp_path / "set")) == set(before)
    assert (
        bytes_of(tmp_path / "set")["val2017/000000000001.jpg"] != before["val2017/000000000001.jpg"]
    )
    make_shapes.main(
        [
            "--out_dir",
            str(tmp_path / "set"),
            "--num_images",
            "1",
            "--num_train",
            "0",
            "--overwrite",
            "--num_workers",
            "1",
        ]
    )
    assert [path.name for path in (tmp_path / "set/val2017").iterdir()] == ["000000000001.jpg"]
    (tmp_path / "photos/val2017").mkdir(parents=True)
    (tmp_path / "photos/val2017/000000000001.jpg").write_bytes(b"mine")
    with pytest.raises(UsageError, match="no manifest.json of this script"):
        make_shapes.main(["--out_dir", str(tmp_path / "photos"), *few, "--overwrite"])
    (tmp_path / "photos/manifest.json").write_text("[]")
    with pytest.raises(UsageError, match="not a manifest of this script"):
        make_shapes.main(["--out_dir", str(tmp_path / "photos"), *few, "--overwrite"])
    assert (tmp_path / "photos/val2017/000000000001.jpg").read_bytes() == b"mine"


@pytest.mark.parametrize(
    "flags, words",
    [
        (
            ["--height_depth_correlation", "0.99"],
            "--height_depth_correlation 0.99: possible are 0 to 0.9",
        ),
        (["--scene", "corridor", "--height-depth-correlation", "0.5"], "is for --scene floor"),
    ],
)
def test_wrong_flags_are_named(tmp_path, flags, words):
    with pytest.raises(UsageError, match=re.escape(words)):
        make_shapes.parse_args(["--out_dir", str(tmp_path), *flags])


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--num_images", "0"], "argument --num_images/--num-images: '0' is no whole number"),
        (["--num-train", "-1"], "argument --num_train/--num-train: '-1' is no whole number"),
        (["--num_workers", "-2"], "'-2' is no whole number"),
        (["--height_depth_correlation", "nan"], "'nan' is no number"),
        (["--scene", "tunnel", "--instances", "0"], "argument --instances: '0'"),
        (["--scene", "tunnel", "--sweep_scenes", "-1"], "'-1' is no whole number from 0"),
    ],
)
def test_numbers_out_of_range_are_named(tmp_path, flags, words, capsys):
    with pytest.raises(SystemExit):
        make_shapes.parse_args(["--out_dir", str(tmp_path), *flags])
    assert words in capsys.readouterr().err


def test_wrong_usage_is_one_line_and_exit_code_2(tmp_path):
    (tmp_path / "file").touch()
    found = make(tmp_path / "file", "--num_images", 1)
    assert found.returncode == 2
    assert found.stderr.count("\n") == 1
    assert found.stderr.startswith("error:")
    assert "not a folder" in found.stderr


# ---- COCO ----


# pycocotools with numpy 2
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_pycocotools_reads_the_set_and_its_masks_are_what_is_seen(sets, kind):
    coco = COCO(sets[kind] / "annotations/instances_val2017.json")
    assert len(coco.getImgIds()) == 40
    assert coco.getCatIds() == list(range(1, 25 if kind == "floor" else 15))
    for n, scene in enumerate(scenes_of(kind, 40, 0.8 if kind == "floor" else None)):
        picture = coco.loadImgs([n + 1])[0]
        with Image.open(sets[kind] / "val2017" / picture["file_name"]) as image:
            assert image.format == "JPEG"
            assert (
                image.size == (picture["width"], picture["height"]) == (scene.width, scene.height)
            )
            assert image.mode == "RGB"
            assert image.layer[1][1:3] == (1, 1)  # colours are not subsampled
        seen, found = instance_map(scene), coco.loadAnns(coco.getAnnIds(imgIds=[n + 1]))
        assert len(found) == len(scene.things)
        for i, (thing, shown) in enumerate(zip(scene.things, found), 1):
            mask = coco.annToMask(shown).astype(bool)
            inner = np.all(
                [np.roll(seen == i, (dy, dx), (0, 1)) for dy in (-1, 0, 1) for dx in (-1, 0, 1)], 0
            )
            # Pillow's polygons are up to a pixel wider
            assert mask[inner].all()
            assert mask[seen == i].mean() > 0.85
            own = instance_map(Scene(scene.kind, scene.width, scene.height, (thing,))) == 1
            assert (mask & own).sum() / (mask | own).sum() > 0.85
            assert abs(shown["area"] / mask.sum() - 1) < 0.06
            x, y, w, h = shown["bbox"]
            assert x >= 0
            assert y >= 0
            assert x + w <= scene.width
            assert y + h <= scene.height
            rows, columns = np.nonzero(mask)
            extent = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            # the tip of a triangle is thinner than a pixel
            assert np.abs(extent - [x, y, x + w, y + h]).max() < 2
            category = coco.loadCats([shown["category_id"]])[0]
            assert category["name"] == thing.name == f"{shown['color']} {shown['shape']}"
            assert category["supercategory"] == thing.shape
            assert shown["depth"] == pytest.approx(thing.z, abs=1e-4)
            assert shown["iscrowd"] == 0


def test_a_polygon_is_clipped_to_the_picture():
    # of the diamond the picture less its corner x + y > 10
    diamond = annotations.clipped([(-4, 2), (2, -4), (8, 2), (2, 8)], 6, 6)
    assert annotations.area(diamond) == 34
    assert annotations.box(diamond) == [0, 0, 6, 6]
    assert annotations.clipped([(-3, 0), (-1, 0), (-1, 2)], 6, 6) == []
    inside = [(1.0, 1.0), (3.0, 1.0), (1.0, 4.0)]
    assert annotations.clipped(inside, 6, 6) == inside
    assert annotations.area(inside) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_five_different_captions_name_every_object(sets, kind):
    told, known = {}, read(sets[kind] / "objects.json")
    content = read(sets[kind] / "annotations/captions_val2017.json")
    for caption in content["annotations"]:
        told.setdefault(caption["image_id"], []).append(caption["caption"])
    assert len({caption["id"] for caption in content["annotations"]}) == 5 * len(told) == 200
    for picture in known.values():
        captions = told[picture["image_id"]]
        assert len(set(captions)) == 5
        for caption in captions:
            assert all(thing["name"] in caption.lower() for thing in picture["objects"])
            assert caption.endswith(".")
    assert (
        len(
            coco.read_coco(sets[kind] / "val2017", sets[kind] / "annotations/captions_val2017.json")
        )
        == 40
    )


@pytest.mark.parametrize("kind", KINDS)
def test_train_and_val_share_neither_ids_nor_pictures(sets, kind):
    ids = [
        {
            image["id"]
            for image in read(sets[kind] / f"annotations/instances_{part}2017.json")["images"]
        }
        for part in ("val", "train")
    ]
    assert len(ids[0]) == 40
    assert len(ids[1]) == 6
    assert not ids[0] & ids[1]
    hashes = [digest for name, digest in bytes_of(sets[kind]).items() if name.endswith(".jpg")]
    assert len(hashes) == len(set(hashes)) == 46
    # val ids end before train ids begin: parse_args allows no larger part
    assert max(shape_set.FIRST_ID.values()) - 1 == 500_000
    assert make_shapes.parse_args(["--num_images", "500000"]).num_images == 500_000


# ---- the scenes ----


@pytest.mark.parametrize("wanted, tolerance", [(0.8, 0.08), (0.0, 0.05)])
def test_height_and_depth_go_together_as_asked(wanted, tolerance):
    assert annotations.height_depth_correlation(scenes_of("floor", 1500, wanted)) == pytest.approx(
        wanted, abs=tolerance
    )
    assert annotations.height_depth_correlation(scenes_of("floor", 300, wanted)) == pytest.approx(
        wanted, abs=2 * tolerance
    )
    assert annotations.height_depth_correlation(scenes_of("floor", 1)[:0]) is None


def test_objects_cover_few_tokens_and_hardly_hide_each_other():
    shares = []
    for scene in scenes_of("floor", 150):
        side = max(scene.width, scene.height)
        top, left = (side - scene.height) // 2, (side - scene.width) // 2
        seen = instance_map(scene)
        padded = np.zeros((side, side), int)
        padded[top : top + scene.height, left : left + scene.width] = seen
        edges = np.linspace(0, side, 13).round().astype(int)
        for i, thing in enumerate(scene.things, 1):
            touched = (
                np.add.reduceat(
                    np.add.reduceat(padded == i, edges[:-1], 0, int), edges[:-1], 1, int
                )
                > 0
            )
            around = np.pad(touched, 1)
            shares.append(
                np.any(
                    [around[r : r + 12, c : c + 12] for r in range(3) for c in range(3)], 0
                ).mean()
            )
            own = instance_map(Scene("floor", scene.width, scene.height, (thing,)))
            assert (seen == i).sum() > 0.94 * (own == 1).sum()
            assert all(
                0 <= x <= scene.width and 0 <= y <= scene.height for x, y in outline(thing, scene)
            )
    assert np.mean(shares) <= 0.15


# ---- questions, from objects.json alone ----


def relation_of(kind, a, b):
    return {
        "left_right": "left" if a["center"][0] < b["center"][0] else "right",
        "above_below": "above" if a["center"][1] < b["center"][1] else "below",
        "far_close": "far" if a["depth"] > b["depth"] else "close",
    }[kind]


PATTERNS = {
    "left_right": r"Is the (?P<a>\w+ \w+) to the left or right of the (?P<b>\w+ \w+)\?",
    "above_below": r"Is the (?P<a>\w+ \w+) above or below the (?P<b>\w+ \w+)\?",
    "far_close": r"Compared to (?P<b>\w+ \w+), is (?P<a>\w+ \w+) far or close from you\?",
    "camera": (
        r"Is the (?P<a>\w+ \w+) (?P<how>closer to|farther from) the camera than the (?P<b>\w+"
        r" \w+)\?"
    ),
    "yes_no": r"Is there an? (?P<a>\w+ \w+) in (the|this) image\?",
    "color": r"What color is the (?P<shape>\w+)\?",
    "shape": r"What shape is the (?P<color>\w+) object\?",
    "count": r"How many (?P<color>\w+ )?objects are in the image\?",
    "caption": r"Describe (the|this) image\.",
}


def answer(question, things):
    """The answer, worked out from the question's words and objects.json."""
    kind, match = next(
        (kind, match)
        for kind, pattern in PATTERNS.items()
        if (match := re.fullmatch(f"({pattern})( Answer with only one word\\.)?", question))
    )
    named = {thing["name"]: thing for thing in things}
    if kind in ("left_right", "above_below", "far_close"):
        return relation_of(kind, named[match["a"]], named[match["b"]])
    if kind == "camera":
        return (
            "Yes"
            if (named[match["a"]]["depth"] < named[match["b"]]["depth"])
            == (match["how"] == "closer to")
            else "No"
        )
    if kind == "yes_no":
        return "Yes" if match["a"] in named else "No"
    if kind in ("color", "shape"):
        (found,) = [
            thing
            for thing in things
            if thing["color" if kind == "shape" else "shape"]
            == match["color" if kind == "shape" else "shape"]
        ]
        return found[kind]
    if kind == "count":
        return str(sum(match["color"] in (None, thing["color"] + " ") for thing in things))
    names = [
        ("an " if thing["name"][0] in "aeiou" else "a ") + thing["name"]
        for thing in sorted(things, key=lambda thing: thing["center"][0])
    ]
    return f"The image shows {', '.join(names[:-1])}{' and ' if names[1:] else ''}{names[-1]}."


@pytest.mark.parametrize("kind", KINDS)
def test_answers_follow_from_the_objects(sets, kind):
    known, rows = read(sets[kind] / "objects.json"), read(sets[kind] / "questions.json")
    for row in rows + read(sets[kind] / "mmhal_shapes.json"):
        things = known[f"{int(row['image_id']):012d}"]["objects"]
        assert answer(row["question"], things) == row.get("answer", row.get("gold_answer")), row
    found = questions.read_questions(sets[kind] / "questions.json") + questions.read_mmhal(
        sets[kind] / "mmhal_shapes.json"
    )
    assert all(sample.image.is_file() for sample in found)
    assert len(found) == len(rows) + 40


def test_floor_questions_are_balanced(sets):
    known, rows = read(sets["floor"] / "objects.json"), read(sets["floor"] / "questions.json")
    counts = Counter((row["kind"], row["answer"]) for row in rows)
    assert counts["yes_no", "Yes"] == counts["yes_no", "No"] == 40
    for kind, first, second in (
        ("left_right", "left", "right"),
        ("above_below", "above", "below"),
        ("far_close", "far", "close"),
    ):
        assert abs(counts[kind, first] - counts[kind, second]) <= 1
        assert counts[kind, first] > 8
        ending = [
            row["question"].endswith("? Answer with only one word.")
            for row in rows
            if row["kind"] == kind
        ]
        assert 0.4 < np.mean(ending) < 0.6
    sharing = []
    for row in rows:
        if row["kind"] == "yes_no" and row["answer"] == "No":
            color, shape = row["about"][0].split()
            sharing.append(
                any(
                    color == thing["color"] or shape == thing["shape"]
                    for thing in known[f"{row['image_id']:012d}"]["objects"]
                )
            )
    assert abs(sum(sharing) - 20) <= 1
    assert set(Counter(row["kind"] for row in rows)) == {
        "yes_no",
        "color",
        "shape",
        "count",
        "left_right",
        "above_below",
        "far_close",
    }
    assert set(
        Counter(row["question_type"] for row in read(sets["floor"] / "mmhal_shapes.json"))
    ) == {"attribute", "adversarial", "comparison", "counting", "relation", "holistic"}


def test_corridor_questions_are_the_four_camera_wordings_with_their_split(sets):
    known, rows = read(sets["corridor"] / "objects.json"), read(sets["corridor"] / "questions.json")
    assert len(rows) == 160
    assert Counter(row["answer"] for row in rows) == {"Yes": 80, "No": 80}
    for n, row in enumerate(rows):
        picture = known[f"{row['image_id']:012d}"]
        assert row["image_id"] == n // 4 + 1
        far, near = sorted(picture["objects"], key=lambda thing: -thing["depth"])
        higher = (near["center"][1] - far["center"][1]) / picture["height"]
        expected = "consistent" if higher > 0.05 else "counter"
        assert row["split"] == (expected if abs(higher) > 0.05 else "ambiguous")
    assert (
        len(
            {
                row["question"].replace(row["about"][0], "X").replace(row["about"][1], "Y")
                for row in rows
            }
        )
        == 2
    )
    assert all(len({row["question"] for row in rows[n : n + 4]}) == 4 for n in range(0, 160, 4))


# ---- swap tables ----


def distance(kind, a, b, picture):
    if kind == "far_close":
        return abs(a["depth"] - b["depth"]) / (FAR - NEAR if picture["scene"] == "floor" else 3.0)
    return (
        abs(a["center"][kind == "above_below"] - b["center"][kind == "above_below"])
        / picture["height" if kind == "above_below" else "width"]
    )


def picture_of(text, folder, picture):
    """The row's picture is the set's, byte for byte."""
    content = base64.b64decode(text, validate=True)
    assert content == (folder / picture["image"]).read_bytes()
    assert Image.open(io.BytesIO(content)).size == (picture["width"], picture["height"])


@pytest.mark.parametrize("kind", KINDS)
def test_ready_swap_pairs_are_right_and_balanced(sets, kind):
    rows, known = table(sets[kind] / "swap_pairs_ready.tsv"), read(sets[kind] / "objects.json")
    assert (
        " ".join(rows)
        == "index question_id image_base64 original_question swapped_question original_answer"
        " swapped_answer group category"
    )
    assert list(rows["index"]) == list(range(len(rows)))
    assert rows["question_id"].is_unique
    counts = rows["category"].value_counts()
    assert set(counts.index) == {"left", "right", "above", "under", "far", "close"}
    assert counts.nunique() == 1
    assert counts.iloc[0] >= 8
    opposite = {
        "left": "right",
        "right": "left",
        "above": "below",
        "below": "above",
        "far": "close",
        "close": "far",
    }
    boxes = read(sets[kind] / "bboxes.json")
    for row in rows.itertuples():
        picture = known[f"{int(row.question_id.split('_')[1]):012d}"]
        asked = {"horizontal": "left_right", "vertical": "above_below", "distance": "far_close"}[
            row.group
        ]
        matches = [
            re.fullmatch(PATTERNS[asked] + r" Answer with only one word\.", text)
            for text in (row.original_question, row.swapped_question)
        ]
        assert (matches[0]["a"], matches[0]["b"]) == (matches[1]["b"], matches[1]["a"])
        assert (
            answer(row.original_question, picture["objects"])
            == row.original_answer
            == opposite[row.swapped_answer]
        )
        assert row.category == {"below": "under"}.get(row.original_answer, row.original_answer)
        named = {thing["name"]: thing for thing in picture["objects"]}
        assert distance(asked, named[matches[0]["a"]], named[matches[0]["b"]], picture) > 0.1199
        picture_of(row.image_base64, sets[kind], picture)
        entry = boxes[row.question_id]
        assert entry["relation"] == row.category
        assert entry["data_source"] == "shapes"
        assert (entry["image_width"], entry["image_height"]) == (
            picture["width"],
            picture["height"],
        )
        assert entry["objects"] == [
            {"name": thing["name"], "bbox": thing["bbox"]} for thing in picture["objects"]
        ]


# the five patterns by which readers find the names, in their order:
# docs/studies/swap_analysis.md, section 1.3
NAMES = (
    r"between (.+?) and (.+?) in",
    r"of (.+?) and (.+?) in",
    r"positions of (.+?) and (.+?) interact",
    r"How are (.+?) and (.+?) positioned",
    r"arrangement of (.+?) and (.+?) in",
)


@pytest.mark.parametrize("kind", KINDS)
def test_embspatial_rows_are_right(sets, kind):
    rows, known = table(sets[kind] / "swap_pairs.tsv"), read(sets[kind] / "objects.json")
    ready = table(sets[kind] / "swap_pairs_ready.tsv").set_index("question_id")
    assert " ".join(rows) == "index question_id category question image answer A B C D"
    assert rows["category"].value_counts().nunique() == 1
    assert set(rows["category"]) == {"left", "right", "above", "under", "far", "close"}
    assert set(rows["question_id"]) <= set(read(sets[kind] / "bboxes.json"))
    assert rows["question_id"].is_unique
    forms, missing = Counter(), Counter()
    for row in rows.itertuples():
        picture = known[f"{int(row.question_id.split('_')[1]):012d}"]
        picture_of(row.image, sets[kind], picture)
        named, options = (
            {thing["name"]: thing for thing in picture["objects"]},
            [row.A, row.B, row.C, row.D],
        )
        right = options["ABCD".index(row.answer)]
        if row.category in ("far", "close"):
            there = [option for option in options if option in named]
            assert right in there
            assert sorted(there) == sorted(named)
            depths = [named[name]["depth"] for name in there]
            assert named[right]["depth"] == (max(depths) if row.category == "far" else min(depths))
            assert row.question.endswith(
                "the farthest?" if row.category == "far" else "the nearest?"
            )
            missing.update(option for option in options if option not in named)
        else:
            first, second = next(
                match
                for pattern in NAMES
                if (match := re.search(pattern, row.question, re.IGNORECASE))
            ).groups()
            asked = "left_right" if row.category in ("left", "right") else "above_below"
            assert {"below": "under"}.get(
                said := relation_of(asked, named[first], named[second]), said
            ) == row.category
            words = {"left": "left", "right": "right", "above": "above", "under": "beneath"}[
                row.category
            ]
            assert right.startswith(f"The {first} is ")
            assert words in right
            assert right.endswith(f"the {second}.")
            assert len(set(options)) == 4
            assert ready.loc[row.question_id, "category"] == row.category
            forms[re.sub(f"{first}|{second}", "X", row.question)] += 1
    assert len(forms) == 5
    assert min(forms.values()) >= 2
    assert set(missing) == {"None", "n/a", "unknown", ""}
    assert missing["None"] > 1


# ---- download_coco.sh ----


def run_shell(script, *arguments, path=None):
    env = {"PATH": str(path)} if path else dict(os.environ)
    return subprocess.run(
        ["/bin/bash", str(script), *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=20,
        env=env,
    )


def test_download_coco_names_what_is_wrong(tmp_path):
    script = ROOT / "data/download_coco.sh"
    helped = run_shell(script, "-h")
    assert helped.returncode == 0
    assert all(word in helped.stdout for word in ("val", "train", "annotations", "all"))
    for arguments, words in ([], "say what to fetch"), (["test"], "'test' is not one of"):
        found = run_shell(script, *arguments)
        assert found.returncode == 2
        assert found.stderr.splitlines()[-1].startswith("error: ")
        assert words in found.stderr
    (tmp_path / "dirname").symlink_to(shutil.which("dirname"))
    found = run_shell(script, "val", path=tmp_path)
    assert found.returncode == 2
    assert found.stderr.startswith("error: unzip is not installed")
    assert found.stderr.count("\n") == 1
    (tmp_path / "unzip").symlink_to("/bin/true")
    assert "neither wget nor curl" in run_shell(script, "val", path=tmp_path).stderr


@pytest.mark.skipif(not shutil.which("unzip"), reason="the script itself asks for unzip")
@pytest.mark.parametrize("tool", ["wget", "curl"])
def test_download_coco_unpacks_once_and_goes_on_after_a_failure(tmp_path, tool):
    (tmp_path / "data").mkdir()
    (tmp_path / "bin").mkdir()
    script = shutil.copy(ROOT / "data/download_coco.sh", tmp_path / "data")
    for name in ("dirname", "mkdir", "mv", "rm", "unzip", "cp", "cat"):
        (tmp_path / "bin" / name).symlink_to(shutil.which(name))
    # stands in for the network: notes the URL, puts the archive in place
    fake = tmp_path / "bin" / tool
    there, zipped = tmp_path / "data/COCO", tmp_path / "val2017.zip"
    fake.write_text(
        f'#!/bin/bash\necho "${{@: -1}}" >> {tmp_path}/urls\n[ -e {zipped} ] || exit 4\ncp {zipped}'
        f" {there}/\n"
    )
    fake.chmod(0o755)
    failed = run_shell(script, "val", path=tmp_path / "bin")
    assert failed.returncode == 1
    assert "could not be downloaded; run the same command again" in failed.stderr
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("val2017/000000000139.jpg", b"picture")
    assert "is ready" in run_shell(script, "val", path=tmp_path / "bin").stdout
    assert sorted(path.name for path in there.iterdir()) == ["val2017"]
    assert "nothing to do" in run_shell(script, "val", path=tmp_path / "bin").stdout
    assert (tmp_path / "urls").read_text().split() == [
        "http://images.cocodataset.org/zips/val2017.zip"
    ] * 2

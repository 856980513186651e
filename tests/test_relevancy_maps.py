"""relevancy_maps.py and viz_relevancy.py by their command lines on a tiny model: files, resume,
refusals, and maps that lie on what the words name."""

import json

import numpy as np
import pytest

from data import make_shapes
from tests.conftest import ROOT, in_process
from vlmdiag.pictures.coco import read_instances
from vlmdiag.pictures.grid import PatchGrid
from vlmdiag.runs import rundirs

maps = in_process(ROOT / "diagnostic_tools" / "relevancy_maps.py")
figures = in_process(ROOT / "diagnostic_tools" / "viz_relevancy.py")
TINY = ROOT / "checkpoints" / "tiny-llava"
COLORS = ("red", "green", "blue", "yellow", "purple", "pink")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("relevancy") / "set"
    assert (
        make_shapes.main(
            [
                "--out_dir",
                str(folder),
                "--num_images",
                "4",
                "--num_train",
                "1",
                "--seed",
                "7",
                "--num_workers",
                "1",
            ]
        )
        == 0
    )
    return folder


@pytest.fixture(scope="module")
def run(shapes, tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    done = maps(
        "--model_path",
        TINY,
        "--image_folder",
        shapes / "val2017",
        "--out_root",
        root,
        "--layers",
        5,
        2,
        "--no_self_check",
    )
    assert done.returncode == 0, done.stderr
    return rundirs.read_run(root / "relevancy" / "tiny-llava", "relevancy")


def test_a_record_says_what_its_arrays_are(run):
    for id in run.ids():
        record, arrays = run.record(id), run.arrays(id)
        tokens, positions = len(record["tokens"]), len(record["labels"])
        assert (
            record["layers"] == [2, 5]
            and arrays["rows"].shape == (tokens, 2, positions)
            and len(record["groups"]) == positions
        )
        assert (
            arrays["cells"].shape == (tokens, 2, 144)
            and arrays["raw_attention"].shape == (tokens, 2, 144)
            and arrays["boxes"].shape == (144, 4)
        )
        assert (
            record["groups"].count("vision") == 144
            and record["groups"][-tokens:] == ["generated"] * tokens
        )
        shares, text = (
            np.array(record["visual_share"], float),
            np.array([group in ("user", "generated") for group in record["groups"]]),
        )
        vision = np.array([group == "vision" for group in record["groups"]])
        image, words = arrays["rows"][..., vision].max(-1), arrays["rows"][..., text].max(-1)
        assert np.allclose(shares, image / (image + words), atol=1e-5) and shares.shape == (
            tokens,
            2,
        )
        assert all(0 < probability <= 1 for probability in record["probabilities"])


def test_colour_words_light_up_their_object(run, shapes):
    annotations, hits = read_instances(shapes / "annotations" / "instances_val2017.json"), []
    for id in run.ids():
        record, arrays = run.record(id), run.arrays(id)
        grid = PatchGrid(
            arrays["boxes"], tuple(record["grid"]["shape"]), tuple(record["grid"]["size"])
        )
        for token, word in enumerate(record["tokens"]):
            named = [
                one
                for one in annotations[int(id)]
                if one["category"].startswith(word.strip() + " ")
            ]
            if word.strip() not in COLORS or len(named) != 1:
                continue
            x, y, width, height = named[0]["bbox"]
            inside = np.zeros(grid.size[::-1], bool)
            inside[int(y) : int(y + height) + 1, int(x) : int(x + width) + 1] = True
            hits.append(grid.coverage(inside)[arrays["cells"][token, 1].argmax()] > 0.2)
    assert len(hits) >= 6 and np.mean(hits) > 0.8


def test_an_interrupted_run_gives_the_same_bytes_and_other_settings_are_refused(run, shapes):
    before = {path.name: path.read_bytes() for path in (run.path / "per_image").iterdir()}
    flags = (
        "--model_path",
        TINY,
        "--image_folder",
        shapes / "val2017",
        "--out_root",
        run.path.parent.parent,
        "--no_self_check",
        "--layers",
    )
    for id in run.ids()[1:3]:
        (run.path / "per_image" / f"{id}.json").unlink()
    assert maps(*flags, 2, 5).returncode == 0
    assert {path.name: path.read_bytes() for path in (run.path / "per_image").iterdir()} == before
    done = maps(*flags, 5)
    assert done.returncode == 2 and "layers" in done.stderr
    assert (
        maps(*flags, 6).returncode == 2
        and maps("--model_path", TINY, "--image_folder", shapes, "--use_answers").returncode == 2
    )


def test_given_answers_are_measured_as_they_are(shapes, tmp_path):
    entries = [{"image": "000000000001.jpg", "question": "Describe the image.", "answer": "A cat."}]
    (tmp_path / "q.json").write_text(json.dumps(entries))
    flags = (
        "--question_file",
        tmp_path / "q.json",
        "--use_answers",
        "--no_tower",
        "--layers",
        5,
        "--no_self_check",
    )
    done = maps(
        "--model_path", TINY, "--image_folder", shapes / "val2017", "--out_root", tmp_path, *flags
    )
    assert done.returncode == 0, done.stderr
    found = rundirs.read_run(tmp_path / "relevancy" / "tiny-llava", "relevancy")
    (id,) = found.ids()
    assert found.record(id)["caption"] == "A cat." and "cells" not in found.arrays(id)
    assert (
        figures("--run_dir", found.path, "--image_folder", shapes / "val2017").returncode == 0
    )  # over the vision tokens then


def test_figures_of_all_tokens_and_of_one(run, shapes):
    flags = ("--run_dir", run.path, "--image_folder", shapes / "val2017")
    assert figures(*flags, "--num_images", 1, "--max_tokens", 5).returncode == 0
    id = run.ids()[0]
    assert (run.path / "analysis" / f"{id}_tokens.png").exists()
    assert (
        figures(*flags, "--image_key", id, "--token", 4, "--layer", 2, "--sinks", "hide").returncode
        == 0
    )
    assert (run.path / "analysis" / f"{id}_token4.pdf").exists()
    for more, why in (
        (("--layer", 3), "holds layers 2, 5"),
        (("--image_key", id, "--token", 99), "counted from 0"),
        (("--image_key", "none"), "--image_key"),
    ):
        done = figures(*flags, *more)
        assert done.returncode == 2 and why in done.stderr and done.stderr.count("\n") == 1


def test_text_that_the_figures_font_cannot_draw_is_boxes():
    from vlmdiag.relevancy.map_figures import shown

    for text, wanted in {
        "\x1b": "□",
        "红 a": "□ a",
        "\n": "↵",
        "$x$": r"\$x\$",
        " ": "' '",
        "‮x": "□x",
    }.items():
        assert shown(text) == wanted

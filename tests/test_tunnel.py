"""The SpatialTunnel set: a full grid of angles in which height says nothing of depth, a sweep of
sizes over the same scenes, equal bytes."""

import hashlib
import json
import math
import re
import shutil
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from data import make_shapes
from vlmdiag.cli import UsageError
from vlmdiag.pictures import coco
from vlmdiag.scenes import shape_set, tunnel
from vlmdiag.scenes.scene import CORRIDOR_COLORS

pytestmark = pytest.mark.fast

SMALL = ("--scene", "tunnel", "--instances", "1", "--sweep_scenes", "4")


def make(out, *flags, workers=1):
    return make_shapes.main(
        ["--out_dir", str(out), "--num_workers", str(workers), *map(str, flags)]
    )


def bytes_of(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def read(path):
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tunnel") / "set"
    assert make(folder, *SMALL) == 0
    return folder


@pytest.fixture(scope="module")
def rows(made):
    return read(made / "tunnel.json")


def part(rows, name):
    return [row for row in rows if row["part"] == name]


def sweeps(rows):
    """The sweep scene by scene, each a list of 11 records."""
    found = {}
    for row in part(rows, "sizes"):
        found.setdefault(row["instance"], []).append(row)
    return list(found.values())


# ---- the grid ----


def height(theta, size, z):
    """Height above the middle, a fraction of the picture's: the square path of half side 1 - size
    at depth z, focal length 1.014."""
    return (
        1.014 * (1 - size) * math.sin(theta) / max(abs(math.sin(theta)), abs(math.cos(theta))) / z
    )


def test_the_masks_have_116_116_and_24_cells_for_every_size_of_the_grid():
    reference = tunnel.split_grid()
    assert Counter(reference.ravel()) == {"consistent": 116, "counter": 116, "ambiguous": 24}
    for far_size in np.linspace(0.2, 0.3, 11):
        for near_size in np.linspace(0.1, 0.15, 6):
            assert (tunnel.split_grid((far_size, near_size)) == reference).all()
            for far in range(16):
                for near in range(16):
                    dy = height(far * math.pi / 8, far_size, 4.4) - height(
                        near * math.pi / 8, near_size, 2.25
                    )
                    expected = "consistent" if dy > 0.05 else "counter"
                    assert reference[far, near] == (expected if abs(dy) > 0.05 else "ambiguous")
                    assert abs(abs(dy) - 0.05) > 0.015  # no cell is near the band


def test_the_ambiguous_cells_are_those_of_the_paper():
    """Both objects at mid-height, or the far one on ceiling (floor) with the near one just above
    (below) mid-height on a side wall."""
    middle = {(far, near) for far in (0, 8) for near in (0, 8)}
    above = {(far, near) for far in range(2, 7) for near in (1, 7)}
    below = {(far + 8, near + 8) for far, near in above}
    assert {
        tuple(cell) for cell in np.argwhere(tunnel.split_grid() == "ambiguous").tolist()
    } == middle | above | below


def test_upside_down_consistent_and_counter_change_places():
    grid, turned = tunnel.split_grid(), [-k % 16 for k in range(16)]
    swapped = np.vectorize(
        {"consistent": "counter", "counter": "consistent", "ambiguous": "ambiguous"}.get
    )(grid)
    assert (grid[np.ix_(turned, turned)] == swapped).all()


def test_every_cell_has_its_pictures(rows):
    found = part(rows, "angles")
    assert Counter(tuple(row["cell"]) for row in found) == {
        (far, near): 1 for far in range(16) for near in range(16)
    }
    assert [row["image_id"] for row in found] == list(range(1, 257))
    assert {row["instance"] for row in found} == {0}
    grid = tunnel.split_grid()
    for row in found:
        far, near = row["far"], row["near"]
        assert row["split"] == grid[tuple(row["cell"])]
        assert row["degrees"] == [22.5 * place for place in row["cell"]]
        assert (far["depth"], near["depth"]) == (4.4, 2.25)
        assert 0.2 <= far["size"] <= 0.3
        assert 0.1 <= near["size"] <= 0.15
        for thing, z in ((far, 4.4), (near, 2.25)):
            assert math.degrees(thing["theta"]) == pytest.approx(
                22.5 * row["cell"][thing is near], abs=0.01
            )
            assert 0.5 - thing["center"][1] / row["height"] == pytest.approx(
                height(thing["theta"], thing["size"], z), abs=1e-3
            )
            assert thing["color"] in CORRIDOR_COLORS
            assert thing["shape"] in ("sphere", "cube")
            assert thing["visible"] == 1
        assert far["name"] != near["name"]
        assert row["dy"] == pytest.approx(
            (near["center"][1] - far["center"][1]) / row["height"], abs=1e-4
        )
    # names are drawn for every picture
    assert len({(row["far"]["name"], row["near"]["name"]) for row in found}) > 100
    assert 0.2 < np.mean([row["far"]["size"] > 0.25 for row in found]) < 0.8


# ---- the sweep ----


def test_the_sweep_keeps_the_scene_while_the_objects_trade_their_sizes(made, rows):
    found = sweeps(rows)
    assert len(found) == 4
    assert [row["image_id"] for row in part(rows, "sizes")] == list(range(100_001, 100_045))
    for number, scene in enumerate(found):
        assert [row["far"]["size"] for row in scene] == [
            0.1,
            0.12,
            0.14,
            0.16,
            0.18,
            0.2,
            0.22,
            0.24,
            0.26,
            0.28,
            0.3,
        ]
        assert [row["near"]["size"] for row in scene] == [
            0.3,
            0.28,
            0.26,
            0.24,
            0.22,
            0.2,
            0.18,
            0.16,
            0.14,
            0.12,
            0.1,
        ]
        same = [
            (
                row["cell"],
                row["degrees"],
                row["far"]["name"],
                row["near"]["name"],
                row["questions"],
                row["split"],
            )
            for row in scene
        ]
        assert all(other == same[0] for other in same)
        assert scene[0]["split"] == ("consistent", "counter")[number % 2]
        sky = {
            Image.open(made / row["image"]).getpixel((140, 196))
            for row in scene
            if row["far"]["size"] < 0.2
        }
        assert len(sky) == 1  # the open end, drawn alike
        assert min(row["far"]["visible"] for row in scene) >= 0.6


def test_a_scene_that_some_size_hides_is_drawn_again():
    first = [tunnel._sweep_scene(0, number, 0, tunnel.SIZES[0]) for number in range(60)]
    kept = [tunnel.scene(0, "sizes", number * len(tunnel.SIZES)) for number in range(60)]
    assert sum(tunnel._visible(scene) < 0.6 for scene in first) >= 3
    assert min(tunnel._visible(scene) for scene in kept) >= 0.6


# ---- questions ----


def test_the_four_questions_stand_in_the_papers_order_in_the_words_of_the_training(rows):
    for row in rows:
        far, near = row["far"]["name"], row["near"]["name"]
        wanted = [
            (far, "closer to", near),
            (near, "closer to", far),
            (near, "farther from", far),
            (far, "farther from", near),
        ]
        for (asked, how, other), found in zip(wanted, row["questions"], strict=True):
            assert found["question"] == f"Is the {asked} {how} the camera than the {other}?"
            assert found["answer"] == ("Yes" if (asked == near) == (how == "closer to") else "No")
        assert [found["answer"] for found in row["questions"]] == ["No", "Yes", "No", "Yes"]


# ---- the set as files ----


def test_equal_flags_give_equal_bytes_with_any_number_of_workers(made, tmp_path):
    assert make(tmp_path / "again", *SMALL, workers=2) == 0
    assert bytes_of(tmp_path / "again") == bytes_of(made)


def test_a_picture_does_not_depend_on_how_many_there_are(made, tmp_path):
    for index in (0, 77, 255):
        path = tmp_path / f"{index}.jpg"
        shape_set.draw(
            {"scene": "tunnel", "seed": 0, "instances": 12, "sweep_scenes": 100},
            ("angles", index, path),
        )
        assert path.read_bytes() == (made / f"val2017/{1 + index:012d}.jpg").read_bytes()
    # the paper's numbers
    assert tunnel.count("angles", 12, 100) == 3072
    assert tunnel.count("sizes", 12, 100) == 1100
    assert tunnel.FIRST_ID["sizes"] > 256 * tunnel.MOST["instances"]
    assert tunnel.FIRST_ID["sizes"] + 11 * tunnel.MOST["sweep_scenes"] <= 500_001


def test_it_is_a_coco_set(made, rows):
    found = coco.read_coco(made / "val2017", made / "annotations/captions_val2017.json")
    assert [int(sample.id) for sample in found] == [row["image_id"] for row in rows]
    shown = coco.read_instances(made / "annotations/instances_val2017.json")
    for row in rows[::40]:
        assert [
            (thing["category"], thing["bbox"], thing["depth"]) for thing in shown[row["image_id"]]
        ] == [(thing["name"], thing["bbox"], thing["depth"]) for thing in (row["far"], row["near"])]
    assert sorted(path.name for path in made.iterdir()) == [
        "annotations",
        "manifest.json",
        "tunnel.json",
        "val2017",
    ]
    assert read(made / "manifest.json") == {
        "complete": True,
        "settings": {"schema": 1, "scene": "tunnel", "seed": 0, "instances": 1, "sweep_scenes": 4},
        "rows": {"angles": 256, "sizes": 44},
    }


def test_what_is_lost_is_made_again_and_a_finished_set_is_left_alone(made, tmp_path, capsys):
    shutil.copytree(made, tmp_path / "set")
    before = bytes_of(tmp_path / "set")
    for name in ("tunnel.json", "val2017/000000000009.jpg", "val2017/000000100003.jpg"):
        (tmp_path / "set" / name).unlink()
    assert make(tmp_path / "set", *SMALL) == 0
    assert bytes_of(tmp_path / "set") == before
    capsys.readouterr()
    assert make(tmp_path / "set", *SMALL) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_other_settings_are_refused_and_overwrite_leaves_nothing_of_them(made, tmp_path):
    out = tmp_path / "set"
    shutil.copytree(made, out)
    with pytest.raises(UsageError, match="sweep_scenes 4 there, 0 asked.*--overwrite"):
        make(out, "--scene", "tunnel", "--instances", 1, "--sweep_scenes", 0)
    with pytest.raises(
        UsageError, match="scene tunnel there, floor asked.*num_images None there, 2 asked"
    ):
        make(out, "--num_images", 2, "--num_train", 1)
    assert make(out, "--num_images", 2, "--num_train", 1, "--overwrite") == 0
    assert not (out / "tunnel.json").exists()
    assert len(list((out / "val2017").iterdir())) == 2
    assert list(read(out / "manifest.json")["settings"]) == [
        "schema",
        "scene",
        "num_images",
        "num_train",
        "seed",
        "height_depth_correlation",
    ]
    assert make(out, *SMALL, "--overwrite") == 0
    assert bytes_of(out) == bytes_of(made)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ["--scene", "tunnel", "--num_images", "5"],
            "--num_images is for --scene floor and corridor; --instances and --sweep_scenes say",
        ),
        (
            ["--scene", "tunnel", "--num-train", "0"],
            "--num_train is for --scene floor and corridor",
        ),
        (
            ["--instances", "3"],
            "--instances is for --scene tunnel; --num_images and --num_train say",
        ),
        (["--scene", "corridor", "--sweep-scenes", "3"], "--sweep_scenes is for --scene tunnel"),
        (["--scene", "tunnel", "--instances", "391"], "--instances 391: 1 to 390"),
        (["--scene", "tunnel", "--sweep_scenes", "36364"], "--sweep_scenes 36364: 0 to 36363"),
        (["--scene", "tunnel", "--height_depth_correlation", "0.5"], "is for --scene floor"),
    ],
)
def test_flags_of_another_scene_are_named(tmp_path, flags, words):
    with pytest.raises(UsageError, match=re.escape(words)):
        make_shapes.parse_args(["--out_dir", str(tmp_path), *flags])

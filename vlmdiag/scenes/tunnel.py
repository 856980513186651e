"""SpatialTunnel: two objects on the walls of a corridor at fixed depths, every pair of 16 x 16
angles, so that height in the picture says nothing of depth.

Parts: "angles", `instances` pictures of each cell of the grid, and "sizes", scenes whose objects
trade their sizes while angles, colours, shapes and wall stay. "Why Far Looks Up" (arXiv
2605.30161), appendix C. Angles count counter-clockwise from +x in steps of 22.5 degrees; a cell is
(far, near): the place of the far object's angle, then of the near one's. Image ids do not depend on
how many pictures are made.
"""

import functools
import itertools
import math
from random import Random

import numpy as np

from vlmdiag.scenes import annotations, questions
from vlmdiag.scenes.scene import FOCAL, Scene, corridor_scene, instance_map, wall_point

ANGLES = 16
DEPTHS = (4.4, 2.25)  # metres: far, near
INSTANCES, SWEEP_SCENES = 12, 100  # as published
SIZES = tuple(
    (k / 100, (40 - k) / 100) for k in range(10, 31, 2)
)  # part "sizes": half extent in metres of the far and of the near object
LEAST_VISIBLE = 0.6  # of the far object's area
FOLDER = "val2017"
FIRST_ID = {"angles": 1, "sizes": 100_001}
MOST = {
    "instances": (FIRST_ID["sizes"] - 1) // ANGLES**2,
    "sweep_scenes": 400_000 // len(SIZES),
}  # so that ids stay below those of train2017
WORDINGS = (
    "far closer",
    "near closer",
    "near farther",
    "far farther",
)  # the paper's order: which object is asked about, and what


def angle(place):
    """Radians."""
    return 2 * math.pi * place / ANGLES


def cell_of(scene):
    """(far, near) places of the two angles, 0 to 15."""
    return tuple(round(thing.theta * ANGLES / (2 * math.pi)) % ANGLES for thing in scene.things)


def split_grid(sizes=(0.2, 0.1), band=0.05):
    """'consistent', 'counter' or 'ambiguous' of each cell, (16, 16) text, rows: the far object. The
    same grid for every size that part "angles" draws."""
    heights = [
        [FOCAL * wall_point(angle(k), size)[1] / depth for k in range(ANGLES)]
        for size, depth in zip(sizes, DEPTHS, strict=True)
    ]
    higher = np.subtract.outer(*heights)
    return np.where(higher > band, "consistent", np.where(higher < -band, "counter", "ambiguous"))


# --- scenes ---------------------------------------------------------------------------------------


def count(part, instances, sweep_scenes):
    """How many pictures a part has."""
    return instances * ANGLES**2 if part == "angles" else sweep_scenes * len(SIZES)


def scene(seed, part, index):
    """Picture number `index` of a part: instance by instance all cells, or scene by scene all
    sizes."""
    if part == "angles":
        far, near = divmod(index % ANGLES**2, ANGLES)
        return corridor_scene(
            Random(f"shapes-tunnel-{part}-{seed}-{index}"), (angle(far), angle(near)), DEPTHS
        )
    number, size = divmod(index, len(SIZES))
    return _sweep_scene(seed, number, _accepted(seed, number), SIZES[size])


def _sweep_scene(seed, number, attempt, sizes):
    rng = Random(f"shapes-tunnel-sizes-{seed}-{number}-{attempt}")
    thetas = angle(rng.randrange(ANGLES)), angle(rng.randrange(ANGLES))
    return corridor_scene(rng, thetas, DEPTHS, sizes)


@functools.lru_cache
def _accepted(seed, number):
    """The first draw of a scene with the far object higher (even numbers) or lower (odd ones) and
    no size that hides too much of it."""
    wanted, grid = ("consistent", "counter")[number % 2], split_grid()
    for attempt in itertools.count():
        scenes = [_sweep_scene(seed, number, attempt, sizes) for sizes in SIZES]
        if grid[cell_of(scenes[0])] == wanted and all(
            _visible(scene) >= LEAST_VISIBLE for scene in scenes
        ):
            return attempt


def _visible(scene):
    """Share of the far object's area that the near one does not hide."""
    alone = instance_map(Scene(scene.kind, scene.width, scene.height, scene.things[:1]))
    return (instance_map(scene) == 1).sum() / (alone == 1).sum()


# --- what is written ------------------------------------------------------------------------------


def ask(far, near):
    """The four questions in the order of WORDINGS; the right answers are No, Yes, No, Yes."""
    far_closer, far_farther, near_closer, near_farther = questions.camera_questions(far, near)
    return [far_closer, near_closer, near_farther, far_farther]


def records(scenes):
    """Entries of tunnel.json for {image id: Scene}. dy: by how much the far object is higher, a
    fraction of the picture's height."""
    found = []
    for known in annotations.objects(scenes, FOLDER).values():
        scene, part = (
            scenes[known["image_id"]],
            ("sizes" if known["image_id"] >= FIRST_ID["sizes"] else "angles"),
        )
        (far, near), cell = scene.things, cell_of(scene)
        number = (known["image_id"] - FIRST_ID[part]) // (
            ANGLES**2 if part == "angles" else len(SIZES)
        )
        row = {key: known[key] for key in ("image_id", "image", "width", "height")} | {
            "part": part,
            "instance": number,
            "cell": cell,
        }
        row |= {
            "degrees": [360 * place / ANGLES for place in cell],
            "far": known["objects"][0],
            "near": known["objects"][1],
        }
        row |= {
            "dy": round((near.y - far.y) / scene.height, 5),
            "split": questions.split(far, near, scene),
        }
        found.append(
            row | {"questions": [{"question": q.text, "answer": q.answer} for q in ask(far, near)]}
        )
    return found

"""SpatialTunnel: two objects on the walls of a corridor at fixed depths, every pair of 16 x 16
angles, so that height in the picture says nothing of depth.

Parts: "angles", `instances` pictures of each cell of the grid, and "sizes", scenes whose objects
trade their sizes while angles, colours, shapes and wall stay. "Why Far Looks Up" (arXiv
2605.30161), appendix C. Angles count counter-clockwise from +x in steps of 22.5 degrees; a cell is
(far, near): the place of the far object's angle, then of the near one's. Image ids do not depend on
how many pictures are made.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from random import Random
from typing import TYPE_CHECKING

import numpy as np

from vlmdiag.scenes import questions
from vlmdiag.scenes.annotations import objects
from vlmdiag.scenes.scene import (
    FOCAL,
    LEAST_SEEN,
    Scene,
    Thing,
    corridor_scene,
    instance_map,
    only,
    wall_point,
)
from vlmdiag.types import Record

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from vlmdiag.scenes.questions import Question

ANGLES = 16
DEPTHS = (4.4, 2.25)  # metres: far, near
INSTANCES = 12  # pictures of a cell, as published
SWEEP_SCENES = 100  # as published
# part "sizes": half extent in metres of the far and of the near object
SIZES = tuple((k / 100, (40 - k) / 100) for k in range(10, 31, 2))
FOLDER = "val2017"
FIRST_ID = {"angles": 1, "sizes": 100_001}
# so that ids stay below those of train2017
MOST = {"instances": (FIRST_ID["sizes"] - 1) // ANGLES**2, "sweep_scenes": 400_000 // len(SIZES)}
# the paper's order: which object is asked about, and what
WORDINGS = ("far closer", "near closer", "near farther", "far farther")


def angle(place: int) -> float:
    """Radians."""
    return 2 * math.pi * place / ANGLES


def cell_of(scene: Scene) -> tuple[int, int]:
    """(far, near) places of the two angles, 0 to 15."""
    far, near = (round(thing.theta * ANGLES / (2 * math.pi)) % ANGLES for thing in scene.things)
    return far, near


def split_grid(sizes: tuple[float, float] = (0.2, 0.1), band: float = 0.05) -> NDArray[np.str_]:
    """'consistent', 'counter' or 'ambiguous' of each cell, (16, 16) text, rows: the far object. The
    same grid for every size that part "angles" draws."""
    far, near = (
        [FOCAL * wall_point(angle(place), size)[1] / depth for place in range(ANGLES)]
        for size, depth in zip(sizes, DEPTHS, strict=True)
    )
    higher = np.subtract.outer(far, near)  # by how much the far object is higher
    if_not_higher = np.where(higher < -band, "counter", "ambiguous")
    return np.where(higher > band, "consistent", if_not_higher)


# --- scenes ---------------------------------------------------------------------------------------


def pictures_per(part: str) -> int:
    """Pictures of one instance of the grid, or of one scene of the sweep."""
    return ANGLES**2 if part == "angles" else len(SIZES)


def count(part: str, instances: int, sweep_scenes: int) -> int:
    """How many pictures a part has."""
    return pictures_per(part) * (instances if part == "angles" else sweep_scenes)


def scene(seed: int, part: str, index: int) -> Scene:
    """Picture number `index` of a part: instance by instance all cells, or scene by scene all
    sizes."""
    if part == "angles":
        far, near = divmod(index % ANGLES**2, ANGLES)
        rng = Random(f"shapes-tunnel-{part}-{seed}-{index}")
        return corridor_scene(rng, (angle(far), angle(near)), DEPTHS)
    number, size = divmod(index, len(SIZES))
    return _sweep_scene(seed, number, _accepted(seed, number), SIZES[size])


def _sweep_scene(seed: int, number: int, attempt: int, sizes: tuple[float, float]) -> Scene:
    rng = Random(f"shapes-tunnel-sizes-{seed}-{number}-{attempt}")
    thetas = (angle(rng.randrange(ANGLES)), angle(rng.randrange(ANGLES)))
    return corridor_scene(rng, thetas, DEPTHS, sizes)


@functools.lru_cache
def _accepted(seed: int, number: int) -> int:
    """The first draw of a scene with the far object higher (even numbers) or lower (odd ones) and
    no size that hides too much of it."""
    wanted = ("consistent", "counter")[number % 2]
    attempt = 0
    while not _is_fit([_sweep_scene(seed, number, attempt, sizes) for sizes in SIZES], wanted):
        attempt += 1
    return attempt


def _is_fit(scenes: Sequence[Scene], wanted: str) -> bool:
    """Whether the scenes of a sweep are of the wanted split, and show enough of the far object."""
    if split_grid()[cell_of(scenes[0])] != wanted:
        return False
    return all(_visible(scene) >= LEAST_SEEN for scene in scenes)


def _visible(scene: Scene) -> float:
    """Share of the far object's area that the near one does not hide."""
    alone = instance_map(only(scene, scene.things[0])) == 1
    return float((instance_map(scene) == 1).sum() / alone.sum())


# --- what is written ------------------------------------------------------------------------------


def ask(far: Thing, near: Thing) -> list[Question]:
    """The four questions in the order of WORDINGS; the right answers are No, Yes, No, Yes."""
    far_closer, far_farther, near_closer, near_farther = questions.camera_questions(far, near)
    return [far_closer, near_closer, near_farther, far_farther]


def records(scenes: Mapping[int, Scene]) -> list[Record]:
    """Entries of tunnel.json for {image id: Scene}. dy: by how much the far object is higher, a
    fraction of the picture's height."""
    entries = []
    for picture in objects(scenes, FOLDER).values():
        image_id = picture["image_id"]
        scene = scenes[image_id]
        part = "sizes" if image_id >= FIRST_ID["sizes"] else "angles"
        far, near = scene.things
        far_object, near_object = picture["objects"]
        cell = cell_of(scene)
        entry = {key: picture[key] for key in ("image_id", "image", "width", "height")}
        entry |= {
            "part": part,
            "instance": (image_id - FIRST_ID[part]) // pictures_per(part),
            "cell": cell,
            "degrees": [360 * place / ANGLES for place in cell],
            "far": far_object,
            "near": near_object,
            "dy": round((near.y - far.y) / scene.height, 5),
            "split": questions.split(far, near, scene),
            "questions": [
                {"question": question.text, "answer": question.answer}
                for question in ask(far, near)
            ],
        }
        entries.append(entry)
    return entries

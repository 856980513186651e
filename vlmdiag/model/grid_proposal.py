"""Where do the vision tokens lie of a model whose family has no grid?

Stripes of a picture are replaced, one at a time, and each vision token answers most where it looks.
That is held against the layouts that processors have: one grid over the picture, stretched, cropped
or padded, or a grid on each of several tiles. A layout is proposed only if on pictures of several
proportions nearly every token answers inside its box, and no other layout does as well. A connector
that mixes the picture, such as a Q-Former, has no layout; nor has a tower in which every patch
answers to everything, and both end in "no trustworthy grid". What is proposed is source code to be
reviewed, in the form of a family file.

Used by diagnostic_tools/check_model.py. P: vision tokens of a picture, S: stripes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vlmdiag.pictures.samples import AT_HAND, Sample
from vlmdiag.types import Record

if TYPE_CHECKING:
    from jaxtyping import Float

    from vlmdiag.batch import Batch
    from vlmdiag.pictures.grid import PatchGrid
    from vlmdiag.types import VLM

STRIPES = 32
DRAWS = 2  # pictures of each size
BATCH = 8
CONTRAST = 1.5  # of a token that answers to a place: its strongest answer over its usual one
INSIDE = 0.9  # share of tokens that answer inside their boxes, on every size
# width and height of the pictures in sides of what the tower reads, so that tiles come in rows
PROPORTIONS = ((1.5, 1.1), (1.1, 1.6), (2.4, 1.0), (1.0, 1.0))
SIDE = 336  # where the processor does not say what the tower reads
LARGEST = 1024


class Answers(NamedTuple):
    """How much each token answers to each stripe of pictures of one size."""

    size: tuple[int, int]
    x: Float[np.ndarray, "S P"]  # stripes from left to right
    y: Float[np.ndarray, "S P"]  # from top to bottom
    inputs: Mapping[str, Tensor]  # image inputs of one picture

    @property
    def contrast(self) -> Float[np.ndarray, " P"]:
        """The smaller one of both axes."""
        both = [of.max(0) / np.maximum(np.median(of, 0), 1e-9) for of in (self.x, self.y)]
        return np.minimum(*both)


@dataclass(frozen=True)
class Layout:
    """A rule for boxes, as source code."""

    words: str  # what it says of the picture
    body: str  # of grid(vlm, size, inputs), after width and height

    @property
    def source(self) -> str:
        """The function grid() of a family file."""
        lines = ["width, height = size", *self.body.strip().splitlines()]
        head = "def grid(vlm, size, inputs):\n"
        head += '    """A box per vision token; size: (width, height) of the picture."""\n'
        return head + "".join(f"    {line}\n" if line else "\n" for line in lines)

    def grid(
        self, vlm: VLM, size: tuple[int, int], inputs: Mapping[str, Tensor]
    ) -> PatchGrid | None:
        """Boxes of a picture, by the very source that is written; None where it does not apply."""
        names: dict[str, Any] = {}
        exec(IMPORTS + self.source, names)
        try:
            grid: PatchGrid = names["grid"](vlm, size, inputs)
        except (KeyError, ValueError, ZeroDivisionError):
            return None
        return grid

    def on(self, vlm: VLM, answers: Answers) -> PatchGrid | None:
        """Boxes of a measured picture; None also where they are not as many as its tokens."""
        grid = self.grid(vlm, answers.size, answers.inputs)
        return grid if grid is not None and len(grid.boxes) == answers.x.shape[1] else None


class Proposal(NamedTuple):
    """What was found. layout is None where nothing can be trusted, and why says it."""

    layout: Layout | None
    why: str
    sizes: list[tuple[int, int]]
    inside: list[float]  # share of tokens that answer inside their boxes, of each size
    contrast: float  # median over tokens


# --- measuring ------------------------------------------------------------------------------------


def sizes_for(vlm: VLM) -> list[tuple[int, int]]:
    """Sizes of the pictures that are tried."""
    inputs = _encoded(vlm, [Image.new("RGB", (SIDE, SIDE))]).image_rows[0]
    pixels = inputs.get("pixel_values")
    side = SIDE
    if torch.is_tensor(pixels) and pixels.ndim >= 4:
        side = pixels.shape[-1]
    side = min(side, int(LARGEST / max(max(pair) for pair in PROPORTIONS)))
    return [(round(side * wide), round(side * tall)) for wide, tall in PROPORTIONS]


def _encoded(vlm: VLM, pictures: Sequence[Image.Image]) -> Batch:
    samples = [Sample(str(i), AT_HAND, "Describe the image.") for i in range(len(pictures))]
    return vlm.encode(samples, pictures)


def _features(vlm: VLM, pictures: Sequence[Image.Image]) -> Float[np.ndarray, "n P d"]:
    """What the decoder gets of each picture."""
    found = []
    for start in range(0, len(pictures), BATCH):
        batch = _encoded(vlm, pictures[start : start + BATCH])
        found += [tokens.float().cpu().numpy() for tokens in vlm.vision(batch).pooler_output]
    return np.stack(found)


@torch.inference_mode()
def answers_of(vlm: VLM, size: tuple[int, int], seed: int = 0) -> Answers:
    """Answers to every stripe, the mean over DRAWS pictures of coarse noise."""
    width, height = size
    rng = np.random.default_rng([seed, width, height])
    of_axis = {axis: np.zeros(0) for axis in "xy"}
    for draw in range(DRAWS):
        small = rng.integers(0, 256, (-(-height // 4), -(-width // 4), 3))
        picture = np.kron(small, np.ones((4, 4, 1))).astype(np.uint8)[:height, :width]
        other = 255 - picture if draw % 2 == 0 else np.roll(picture, 1, -1)
        plain = _features(vlm, [Image.fromarray(picture)])
        usual = np.linalg.norm(plain, axis=-1).mean()
        for axis, length in (("x", width), ("y", height)):
            edges = np.linspace(0, length, STRIPES + 1).round().astype(int)
            changed = []
            for first, last in zip(edges, edges[1:]):
                copy = picture.copy()
                stripe = (slice(None), slice(first, last)) if axis == "x" else slice(first, last)
                copy[stripe] = other[stripe]
                changed.append(Image.fromarray(copy))
            moved = np.linalg.norm(_features(vlm, changed) - plain, axis=-1) / usual
            of_axis[axis] = of_axis[axis] + moved if of_axis[axis].size else moved
    inputs = _encoded(vlm, [Image.new("RGB", size)]).image_rows[0]
    return Answers(size, of_axis["x"], of_axis["y"], inputs)


def share_inside(grid: PatchGrid, answers: Answers) -> float:
    """Share of the tokens with a box on the picture whose strongest answers, along both axes, are
    to stripes that their boxes touch, and stand out."""
    boxes = grid.boxes
    inside = answers.contrast >= CONTRAST
    visible = grid.has_box.copy()
    for axis, (of, length) in enumerate(zip((answers.x, answers.y), answers.size, strict=True)):
        begin, end = (np.clip(boxes[:, axis + shift], 0, length) for shift in (0, 2))
        visible &= end - begin > 1
        edges = np.linspace(0, length, STRIPES + 1)
        strongest = of.argmax(0)
        inside &= (edges[strongest] < end) & (edges[strongest + 1] > begin)
    return float(inside[visible].mean()) if visible.any() else 0.0


# --- layouts --------------------------------------------------------------------------------------

IMPORTS = "import math\nimport numpy as np\nfrom vlmdiag.pictures.grid import PatchGrid, cells\n"
SQUARE = (
    "region = ((width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2)"
)
REGIONS = {
    "the whole picture": "region = (0, 0, width, height)",
    "a square from the middle of the picture": f"side = min(size)\n{SQUARE}",
    "the picture, padded on all sides to a square": f"side = max(size)\n{SQUARE}",
    "the picture, padded on the right and below to a square": (
        "side = max(size)\nregion = (0, 0, side, side)"
    ),
}
REGULAR = "return PatchGrid.regular(rows, columns, region, size)"
WITH_FIRST = """\
boxes = np.concatenate([np.full((1, 4), np.nan), cells(rows, columns, region).reshape(-1, 4)])
return PatchGrid(boxes, None, size)"""
WITH_LINE_ENDS = """\
boxes = np.full((rows, columns + 1, 4), np.nan)
boxes[:, :-1] = cells(rows, columns, region)
return PatchGrid(boxes.reshape(-1, 4), None, size)"""


class Extra(NamedTuple):
    """Further tokens that have no place."""

    words: str
    code: str
    first: int  # before the grid
    each_row: int  # at the end of each row


EXTRAS = (
    Extra("", REGULAR, 0, 0),
    Extra(" behind a first token without a place", WITH_FIRST, 1, 0),
    Extra(", each row with an end without a place", WITH_LINE_ENDS, 0, 1),
)
TILES = """\
count = inputs["pixel_values"].shape[{dim}]
pieces = count - {extra} if count > 1 else 1
shapes = [(rows, pieces // rows) for rows in range(1, pieces + 1) if pieces % rows == 0]
rows, columns = min(shapes, key=lambda shape: abs(math.log(shape[1] / shape[0] * height / width)))
tiles = [tuple(tile) for tile in cells(rows, columns, (0, 0, width, height)).reshape(-1, 4)]
if count > 1:
    tiles = {order}
boxes = [cells({side}, {side}, tile).reshape(-1, 4) for tile in tiles]
return PatchGrid(np.concatenate(boxes), None, size)"""
ORDERS = {
    "tiles of the picture": (0, "tiles"),
    "tiles of the picture, then the whole of it": (1, "[*tiles, (0, 0, width, height)]"),
    "the whole picture, then tiles of it": (1, "[(0, 0, width, height), *tiles]"),
}


def layouts_for(answers: Answers) -> Iterator[Layout]:
    """The layouts that give as many tokens as the model has on a picture of this size."""
    count = answers.x.shape[1]
    for shape_words, shape_code, rows, columns in _shapes(count, answers.inputs):
        for extra in EXTRAS:
            if rows * columns + extra.first + rows * extra.each_row != count:
                continue
            for region_words, region in REGIONS.items():
                words = f"{shape_words} over {region_words}{extra.words}"
                yield Layout(words, f"{shape_code}\n{region}\n{extra.code}")
    pixels = answers.inputs.get("pixel_values")
    if pixels is None or pixels.ndim < 4:
        return
    for dim in range(pixels.ndim - 3):
        side = math.isqrt(count // pixels.shape[dim])
        if side * side * pixels.shape[dim] != count:
            continue
        for words, (whole, order) in ORDERS.items():
            code = TILES.format(dim=dim, extra=whole, order=order, side=side)
            yield Layout(f"{side} x {side} tokens on each of {words}", code)


def _shapes(count: int, inputs: Mapping[str, Tensor]) -> Iterator[tuple[str, str, int, int]]:
    """(words, code, rows, columns) of one grid: a fixed square, or as the processor says it for a
    picture."""
    for square in (count, count - 1):
        side = math.isqrt(square)
        if side > 1 and side * side == square:
            yield f"{side} x {side} tokens", f"rows = columns = {side}", side, side
    side = math.isqrt(count)
    if side > 1 and side * (side + 1) == count:
        yield f"{side} x {side} tokens", f"rows = columns = {side}", side, side
    for name, value in inputs.items():
        if name == "pixel_values" and value.ndim >= 3:
            code, sides = f'inputs["{name}"].shape[-2:]', list(value.shape[-2:])
        elif not value.is_floating_point() and 2 <= value.numel() <= 3:
            code, sides = f'inputs["{name}"].flatten()[-2:].tolist()', value.flatten()[-2:].tolist()
        else:
            continue
        for factor in range(1, min(sides) + 1):
            rows, columns = (side // factor for side in sides)
            is_exact = all(side % factor == 0 for side in sides)
            if is_exact and rows * columns in (count, count - 1, count - rows):
                words = f"one token per {factor} x {factor} of `{name}`"
                yield words, f"rows, columns = (side // {factor} for side in {code})", rows, columns


# --- deciding -------------------------------------------------------------------------------------


def propose(vlm: VLM, sizes: Sequence[tuple[int, int]] | None = None) -> Proposal:
    """The layout that the model's vision tokens follow on pictures of every size, or why there is
    none to trust."""
    measured = [answers_of(vlm, size) for size in (sizes or sizes_for(vlm))]
    tried = [answers.size for answers in measured]
    contrast = float(np.median(np.concatenate([answers.contrast for answers in measured])))
    scores: dict[Layout, list[float]] = {}
    candidates = {layout: None for answers in measured for layout in layouts_for(answers)}
    for layout in candidates:
        grids = [layout.on(vlm, answers) for answers in measured]
        scores[layout] = [
            0.0 if grid is None else share_inside(grid, answers)
            for grid, answers in zip(grids, measured, strict=True)
        ]

    def nothing(why: str, inside: list[float]) -> Proposal:
        return Proposal(None, f"no trustworthy grid: {why}", tried, inside, contrast)

    if not scores:
        return nothing("no known layout has as many tokens", [])
    ranked = sorted(scores, key=lambda layout: (-min(scores[layout]), -sum(scores[layout])))
    best = ranked[0]
    inside = scores[best]
    if min(inside) < INSIDE:
        return nothing(
            f"at best {min(inside):.0%} of the tokens answer where {best.words} has them, and their"
            f" answer to one place is {contrast:.1f} times that to any other",
            inside,
        )
    rivals = [
        layout
        for layout in ranked[1:]
        if min(scores[layout]) >= INSIDE and not _same(best, layout, vlm, measured)
    ]
    if rivals:
        return nothing(f"{best.words} and {rivals[0].words} fit equally well", inside)
    return Proposal(best, best.words, tried, inside, contrast)


def _same(one: Layout, other: Layout, vlm: VLM, measured: Sequence[Answers]) -> bool:
    """Whether two layouts have the same boxes on all sizes."""
    for answers in measured:
        boxes = [layout.on(vlm, answers) for layout in (one, other)]
        if boxes[0] is None or boxes[1] is None:
            return False
        if not np.allclose(boxes[0].boxes, boxes[1].boxes, atol=0.5, equal_nan=True):
            return False
    return True


def grid_on(vlm: VLM, layout: Layout, picture: Image.Image) -> PatchGrid | None:
    """The layout's boxes on a picture."""
    return layout.grid(vlm, picture.size, _encoded(vlm, [picture]).image_rows[0])


def record_of(vlm: VLM, proposal: Proposal) -> Record:
    """A proposal as JSON has it. as_the_family: whether the family's own grid, where it has one,
    has the same boxes, up to half of one."""
    sizes = [f"{width} x {height}" for width, height in proposal.sizes]
    as_the_family = None
    if proposal.layout is not None and vlm.family.grid is not None:
        as_the_family = True
        for size in proposal.sizes:
            picture = Image.new("RGB", size)
            own = vlm.family.grid(vlm, size, _encoded(vlm, [picture]).image_rows[0])
            grid = grid_on(vlm, proposal.layout, picture)
            as_the_family &= own is not None and grid is not None and _alike(own, grid)
    return {
        "layout": proposal.layout and proposal.layout.words,
        "why": proposal.why,
        "inside": dict(zip(sizes, proposal.inside)),
        "contrast": proposal.contrast,
        "as_the_family": as_the_family,
    }


def _alike(own: PatchGrid, grid: PatchGrid) -> bool:
    """Whether the centres of all boxes lie in each other's boxes, and the same tokens have none."""
    if own.boxes.shape != grid.boxes.shape or (own.has_box != grid.has_box).any():
        return False
    for one, other in ((own.boxes, grid.boxes), (grid.boxes, own.boxes)):
        centres = (one[own.has_box, :2] + one[own.has_box, 2:]) / 2
        boxes = other[own.has_box]
        if not ((boxes[:, :2] <= centres) & (centres <= boxes[:, 2:])).all():
            return False
    return True


# --- the family file ------------------------------------------------------------------------------

FILE = '''\
"""{kind}: {words}.

Proposed by `check_model.py --propose_grid` of {model}: on pictures of
{sizes} pixels at least {inside} of the
vision tokens answered to changes inside their boxes. Read it against the model's image processor
before you rely on it, look at the picture that check_model.py draws, and move it to models/, where
it is found.
"""

{imports}


{source}


FAMILY = replace(
    generic.FAMILY,
    name="{kind}",
    model_types=("{kind}",),
    grid=grid,
    has=frozenset({has}),
)
'''


def family_file(vlm: VLM, proposal: Proposal) -> str:
    """Source of a family file with the proposed layout."""
    assert proposal.layout is not None
    kind, body = vlm.model.config.model_type, proposal.layout.body
    of_python = ["import math"] * ("math." in body) + ["from dataclasses import replace"]
    of_numpy = ["", "import numpy as np"] * ("np." in body)
    names = "PatchGrid, cells" if "cells(" in body else "PatchGrid"
    ours = ["from vlmdiag.families import generic", f"from vlmdiag.pictures.grid import {names}"]
    return FILE.format(
        kind=kind,
        words=proposal.why,
        model=vlm.path,
        sizes=", ".join(f"{width} x {height}" for width, height in proposal.sizes),
        inside=f"{min(proposal.inside):.0%}",
        imports="\n".join([*of_python, *of_numpy, "", *ours]),
        source=proposal.layout.source.rstrip(),
        has=_set_of({*vlm.family.has, "grid"}),
    )


def _set_of(names: set[str]) -> str:
    return "{" + ", ".join(f'"{name}"' for name in sorted(names)) + "}"

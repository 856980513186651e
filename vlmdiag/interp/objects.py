"""Which vision tokens stand for an object, and the token sets it is compared with. Pure functions
on masks, grids and norms, no model.

Token ablation and attention knockout on objects of COCO (arXiv 2410.07149;
docs/studies/llava_interp.md, sections 2.4 to 2.7). A set of tokens is a sorted integer array of
indices into the P vision tokens of one picture, in the order of grid.PatchGrid. All places are in
pixels of the original picture.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from vlmdiag.cli import UsageError
from vlmdiag.pictures.samples import PIXEL_LIMIT, TURN, annotated_as
from vlmdiag.types import Fields, Record

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from numpy.typing import ArrayLike

    from vlmdiag.pictures.grid import PatchGrid

Annotation = Fields  # of COCO
Tokens = np.ndarray[Any, np.dtype[np.int64]]  # sorted indices of vision tokens

# boxes touch across a gap of so many of the smaller box's sides: tile borders are rounded to pixels
EDGE = 0.02
NOISE = 1e-9  # of a box's area: rounding of the summed mask

# --- masks and targets ----------------------------------------------------------------------------


def object_mask(
    annotation: Annotation, size: tuple[int, int], turn: int = 1
) -> Bool[np.ndarray, "height width"]:
    """The object's pixels from COCO's `segmentation`. size: (width, height) of the upright picture;
    turn: the EXIF orientation by which it was brought upright, see samples.turn_of().

    Polygons (their union), run lengths as a list (crowds) or as COCO's compressed text, drawn at
    the size that the file says the picture has: read_instances' 'listed_size', else the run
    lengths' own. A picture of another size but of the same shape, up to a pixel, has the mask
    resized; one that was turned has it turned too where the file's size is that of the stored one.
    ValueError, which fails the item, where the sizes disagree or cannot tell which of the two was
    annotated, and for what is missing or malformed; the bounding box is never used in its place.
    The published code drops polygon vertices outside its crop and fails on run lengths.
    """
    drawn = _annotated_size(annotation, size, turn)
    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, dict):
        mask = _pixels(_checked_runs(annotation, segmentation, drawn), drawn)
    elif isinstance(segmentation, list) and segmentation:
        polygons = [_checked_polygon(annotation, polygon, drawn) for polygon in segmentation]
        width, height = drawn
        union = coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))
        runs = _runs(union["counts"])
        assert runs is not None  # pycocotools' own
        mask = _pixels(runs, drawn)
    else:
        raise _malformed(annotation, "it has no segmentation (polygons or run lengths)")
    if _is_of_stored(annotation, drawn, size, turn):
        upright = Image.fromarray(mask.astype(np.uint8)).transpose(TURN[turn])
        mask = np.asarray(upright) > 0
    return _resized(mask, size)


def _annotated_size(annotation: Annotation, size: tuple[int, int], turn: int) -> tuple[int, int]:
    """(width, height) of the picture that the segmentation was drawn on."""
    listed = annotation.get("listed_size")
    segmentation = annotation.get("segmentation")
    own = segmentation.get("size") if isinstance(segmentation, dict) else None
    if own is not None:
        own = list(own)[::-1] if isinstance(own, (list, tuple)) else [own]
    if listed is None:
        listed = own
    elif own is not None and list(own) != list(listed):
        raise _malformed(
            annotation,
            f"its run lengths are for [width, height] {own}, the file says that the picture has"
            f" {list(listed)}",
        )
    if listed is None and turn != 1:
        raise _malformed(
            annotation,
            "EXIF turns the picture, and the file says no size that would tell which way up it was"
            " annotated",
        )
    sides = list(listed or size)
    numbers = [side for side in sides if isinstance(side, (int, float)) and side >= 1]
    if len(sides) != 2 or sides != numbers or any(side % 1 for side in numbers):
        raise _malformed(annotation, f"{sides!r:.60} is no [width, height] of its picture")
    if math.prod(numbers) > PIXEL_LIMIT:
        raise _malformed(
            annotation,
            f"a picture of {numbers} has more than {PIXEL_LIMIT // 10**6} million pixels",
        )
    return int(numbers[0]), int(numbers[1])


def _is_of_stored(
    annotation: Annotation, drawn: tuple[int, int], size: tuple[int, int], turn: int
) -> bool:
    """Whether the segmentation was drawn on the picture as it is stored, not as it is shown.
    ValueError where it was drawn on neither, or where that cannot be told."""
    which = annotated_as(drawn, size, turn)
    if which == "either":
        raise _malformed(
            annotation,
            f"EXIF turns the picture, and {list(drawn)} fits it both ways; save it upright",
        )
    if which == "neither":
        raise _malformed(
            annotation,
            f"the file says that the picture has [width, height] {list(drawn)}, but it has"
            f" {list(size)}, which is no resized copy",
        )
    return which == "stored"


def _resized(
    mask: Bool[np.ndarray, "h w"], size: tuple[int, int]
) -> Bool[np.ndarray, "height width"]:
    """The mask at the picture's size: each pixel has the value at its centre."""
    if mask.shape == size[::-1]:
        return mask
    rows, columns = (
        ((np.arange(count) + 0.5) * of / count).astype(int)
        for count, of in zip(size[::-1], mask.shape, strict=True)
    )
    return mask[np.ix_(rows, columns)]


def _checked_runs(annotation: Annotation, segmentation: Fields, size: tuple[int, int]) -> list[int]:
    """Run lengths of a segmentation. ValueError where they do not make up its picture."""
    width, height = size
    counts = segmentation.get("counts")
    if not isinstance(segmentation.get("size"), (list, tuple)):
        raise _malformed(annotation, "its run lengths say no size [height, width]")
    runs = counts if isinstance(counts, list) else None
    if isinstance(counts, (str, bytes)):
        runs = _runs(counts)
    are_lengths = runs and all(type(run) is int and run >= 0 for run in runs)
    if not runs or not are_lengths or sum(runs) != width * height:
        raise _malformed(
            annotation,
            f"its run lengths do not add up to the {width * height} pixels of the picture",
        )
    return runs


def _checked_polygon(annotation: Annotation, polygon: object, size: tuple[int, int]) -> list[float]:
    """[x, y, x, y, ...] of at least three points. ValueError for another form."""
    width, height = size
    try:
        points = np.asarray(polygon, float)
    except (TypeError, ValueError):
        points = np.empty(0)
    # of four numbers pycocotools would make a box
    if points.ndim != 1 or len(points) < 6 or len(points) % 2:
        raise _malformed(
            annotation, "a polygon is not a list [x, y, x, y, x, y, ...] of at least three points"
        )
    if not (np.abs(points) <= 2 * max(width, height)).all():
        raise _malformed(
            annotation, f"a polygon reaches far out of the picture of {width} x {height} pixels"
        )
    return list(points.tolist())


def _pixels(runs: Sequence[int], size: tuple[int, int]) -> Bool[np.ndarray, "height width"]:
    """Run lengths, off first, down the columns -> (height, width) bool. (pycocotools' decode warns
    on numpy 2.)"""
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(size).T


def _runs(text: str | bytes) -> list[int] | None:
    """Run lengths from COCO's compressed text: six bits a character from '0' on, the lower five of
    them data, from the third run on as differences to the run before last. None if the text ends
    within a number. (pycocotools leaves pixels past a too short text undefined.)
    """
    runs: list[int] = []
    value = shift = 0
    for code in text.encode() if isinstance(text, str) else text:
        bits = code - 48
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (bits & 16) << (shift - 4)  # the highest bit is the sign
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return None if shift else runs


def _malformed(annotation: Annotation, what: str) -> ValueError:
    return ValueError(
        f"annotation {annotation.get('id')} of image {annotation.get('image_id')} cannot be used:"
        f" {what}"
    )


def find_target(
    annotations: Sequence[Record],
    min_area: float = 1000,
    max_area: float = 2000,
    max_annotations: int = 3,
) -> Record | None:
    """The annotation of one image that ablations aim at, or None: the image is left out.
    docs/studies/llava_interp.md, section 2.4.

    The image has 1 to max_annotations annotations, crowds counted; the target is the first whose
    category occurs once among them, is no crowd, and has min_area < area < max_area. area: COCO's,
    in pixels of the picture that was annotated."""
    if not 1 <= len(annotations) <= max_annotations:
        return None
    times = Counter(annotation["category_id"] for annotation in annotations)
    for annotation in annotations:
        is_alone = times[annotation["category_id"]] == 1 and not annotation.get("iscrowd")
        if is_alone and min_area < annotation["area"] < max_area:
            return annotation
    return None


# --- tokens ---------------------------------------------------------------------------------------


def object_tokens(
    grid: PatchGrid, mask: Bool[np.ndarray, "height width"], threshold: float = 0.0
) -> Tokens:
    """Tokens of whose box the mask covers more than `threshold`, a share in [0, 1); 0: any overlap,
    as published. Tokens without a box never count.

    A box is exact, the published one is cut to whole
    pixels and drifts.
    """
    if not 0 <= threshold < 1:
        raise UsageError(
            f"a threshold of {threshold}: a share of a token's box, from 0 up to but not including"
            " 1, is wanted"
        )
    return np.flatnonzero(grid.coverage(mask) > threshold + NOISE)


def visible(grid: PatchGrid, mask: Bool[np.ndarray, "height width"]) -> float:
    """Share of a mask's pixels whose centre some token's box holds: what preprocessing did not crop
    away. In [0, 1]; 0 for an empty mask."""
    seen = ~np.isnan(grid.paint(np.ones(len(grid.boxes)), smooth=False))
    return float((mask & seen).sum() / max(mask.sum(), 1))


def touching(grid: PatchGrid, tokens: Sequence[int] | Tokens, own_scale: bool = False) -> Tokens:
    """`tokens` and every token beside them: the 8 neighbours in a regular grid, else tokens whose
    boxes touch or overlap in the original picture.

    own_scale: only boxes of at most twice and at least half the area, so that a thumbnail's token
    brings none of the many that its box lies over.
    """
    near = np.zeros(len(grid.boxes), bool)
    near[tokens] = True
    if grid.shape is not None and not grid.has_box[grid.shape[0] * grid.shape[1] :].any():
        rows, columns = grid.shape
        cells = np.pad(near[: rows * columns].reshape(rows, columns), 1)
        around = [cells[i : i + rows, j : j + columns] for i in range(3) for j in range(3)]
        near[: rows * columns] = np.any(around, axis=0).ravel()
        return np.flatnonzero(near)
    # comparisons with NaN, of tokens without a box, are false
    low, high = grid.boxes[:, :2], grid.boxes[:, 2:]
    area = (high - low).prod(1)
    for token in tokens:
        gap = EDGE * np.minimum(high - low, high[token] - low[token])
        beside = ((low <= high[token] + gap) & (low[token] <= high + gap)).all(1)
        if own_scale:
            beside &= (area <= 2 * area[token]) & (area >= area[token] / 2)
        near |= beside
    return np.flatnonzero(near)


def buffered(grid: PatchGrid, tokens: ArrayLike, n: int) -> Tokens:
    """`tokens` and a rim of n tokens around them, of each scale its own, cut at the grid's borders.
    n = 0: the tokens themselves, sorted."""
    grown = np.unique(np.asarray(tokens, int))
    for _ in range(n):
        grown = touching(grid, grown, own_scale=True)
    return grown


# --- what objects are compared with ---------------------------------------------------------------


def register_tokens(norms: Float[np.ndarray, " P"]) -> Tokens:
    """Tokens whose norm is above mean + 2 * unbiased std of all tokens of the picture; norms: L2,
    after the connector. May be empty."""
    norms = np.asarray(norms, float)
    if len(norms) < 2:
        return np.empty(0, int)
    return np.flatnonzero(norms > norms.mean() + 2 * norms.std(ddof=1))


def rng_for(seed: int, *names: object) -> np.random.Generator:
    """numpy Generator that depends on the seed and the names (item id, condition, draw) only: equal
    in every process and order of work."""
    digest = hashlib.sha256(json.dumps([str(part) for part in (seed, *names)]).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest, "big"))


def random_tokens(rng: np.random.Generator, count: int, candidates: ArrayLike) -> Tokens | None:
    """`count` distinct tokens drawn from the candidates, each as likely; None where the candidates
    are fewer."""
    distinct = np.unique(np.asarray(candidates, int))
    if count > len(distinct):
        return None
    return np.sort(rng.choice(distinct, count, replace=False))


def random_blob(
    rng: np.random.Generator, grid: PatchGrid, count: int, candidates: ArrayLike
) -> Tokens | None:
    """A compact connected set of exactly `count` candidates, grown around a random one; None where
    no connected part of the candidates has so many.

    The next token is always the nearest candidate that touches the set, ties at random; nearest:
    centre to centre, in sides of the first token's box. Tokens without a box are no candidates."""
    if count == 0:
        return np.empty(0, int)
    distinct = np.unique(np.asarray(candidates, int))
    free = np.zeros(len(grid.boxes), bool)
    free[distinct[grid.has_box[distinct]]] = True
    low, high = grid.boxes[:, :2], grid.boxes[:, 2:]
    centres = (low + high) / 2
    for seed in rng.permutation(np.flatnonzero(free)):
        if not free[seed]:  # in a part that was too small
            continue
        sides = high[seed] - low[seed]
        distance = np.linalg.norm((centres - centres[seed]) / sides, axis=1).round(6)
        order = np.lexsort((rng.random(len(free)), distance))
        rank = np.argsort(order)  # place of each token in the order of distance
        blob: list[int] = []
        edge = {int(seed)}
        while edge and len(blob) < count:
            nearest = min(edge, key=lambda token: rank[token])
            blob.append(nearest)
            edge |= {int(token) for token in touching(grid, [nearest]) if free[token]}
            edge -= set(blob)
        if len(blob) == count:
            return np.sort(blob)
        free[blob] = False
    return None

"""Which vision tokens stand for an object, and the token sets it is compared with. Pure functions
on masks, grids and norms, no model.

Token ablation and attention knockout on objects of COCO (arXiv 2410.07149; our study's 2.4 to 2.7).
A set of tokens is a sorted integer array of indices into the P vision tokens of one picture, in the
order of grid.PatchGrid. All places are in pixels of the original picture.
"""

import hashlib
import json
from collections import Counter

import numpy as np
from pycocotools import mask as coco_mask

from vlmdiag.cli import UsageError

# boxes touch across a gap of so many of the smaller box's sides: tile borders are rounded to pixels
EDGE = 0.02
NOISE = 1e-9  # of a box's area: rounding of the summed mask

# --- masks and targets ----------------------------------------------------------------------------


def object_mask(annotation, size):
    """The object's pixels from COCO's `segmentation`: (height, width) bool. size: (width, height)
    of the picture.

    Polygons (their union), run lengths as a list (crowds) or as COCO's compressed text. UsageError
    for what is missing or malformed; the bounding box is never used in its place. The published
    code drops polygon vertices outside its crop and fails on run lengths.
    """
    segmentation, (width, height) = annotation.get("segmentation"), size
    if isinstance(segmentation, dict):
        counts = segmentation.get("counts")
        if list(segmentation.get("size") or ()) != [height, width]:
            raise _malformed(
                annotation,
                f"its run lengths are for [height, width] {segmentation.get('size')}, the picture"
                f" has [{height}, {width}]",
            )
        runs = (
            _runs(counts)
            if isinstance(counts, (str, bytes))
            else counts
            if isinstance(counts, list)
            else None
        )
        if (
            not runs
            or not all(type(run) is int and run >= 0 for run in runs)
            or sum(runs) != width * height
        ):
            raise _malformed(
                annotation,
                f"its run lengths do not add up to the {width * height} pixels of the picture",
            )
        return _pixels(runs, size)
    if not isinstance(segmentation, list) or not segmentation:
        raise _malformed(annotation, "it has no segmentation (polygons or run lengths)")
    polygons = []
    for polygon in segmentation:
        try:
            points = np.asarray(polygon, float)
        except (TypeError, ValueError):
            points = np.empty(0)
        if (
            points.ndim != 1 or len(points) < 6 or len(points) % 2
        ):  # of four numbers pycocotools would make a box
            raise _malformed(
                annotation,
                "a polygon is not a list [x, y, x, y, x, y, ...] of at least three points",
            )
        if not (np.abs(points) <= 2 * max(width, height)).all():
            raise _malformed(
                annotation, f"a polygon reaches far out of the picture of {width} x {height} pixels"
            )
        polygons.append(points.tolist())
    return _pixels(
        _runs(coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))["counts"]), size
    )


def _pixels(runs, size):
    """Run lengths, off first, down the columns -> (height, width) bool. (pycocotools' decode warns
    on numpy 2.)"""
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(size).T


def _runs(text):
    """Run lengths from COCO's compressed text: six bits a character from '0' on, the lower five of
    them data, from the third run on as differences to the run before last. None if the text ends
    within a number. (pycocotools leaves pixels past a too short text undefined.)
    """
    runs, value, shift = [], 0, 0
    for code in text.encode() if isinstance(text, str) else text:
        bits = code - 48
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (bits & 16) << (shift - 4)  # the highest bit is the sign
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return None if shift else runs


def _malformed(annotation, what):
    return UsageError(
        f"annotation {annotation.get('id')} of image {annotation.get('image_id')} cannot be used:"
        f" {what}"
    )


def find_target(annotations, min_area=1000, max_area=2000, max_annotations=3):
    """The annotation of one image that ablations aim at, or None: the image is left out. Our
    study's 2.4.

    The image has 1 to max_annotations annotations, crowds counted; the target is the first whose
    category occurs once among them, is no crowd, and has min_area < area < max_area. area: COCO's,
    in pixels of the original picture."""
    if not 1 <= len(annotations) <= max_annotations:
        return None
    times = Counter(annotation["category_id"] for annotation in annotations)
    return next(
        (
            a
            for a in annotations
            if times[a["category_id"]] == 1
            and not a.get("iscrowd")
            and min_area < a["area"] < max_area
        ),
        None,
    )


# --- tokens ---------------------------------------------------------------------------------------


def object_tokens(grid, mask, threshold=0.0):
    """Tokens of whose box the mask covers more than `threshold`, a share in [0, 1); 0: any overlap,
    as published (2.5). Tokens without a box never count.

    grid: PatchGrid; mask (height, width) bool. A box is exact, the published one is cut to whole
    pixels and drifts.
    """
    if not 0 <= threshold < 1:
        raise UsageError(
            f"a threshold of {threshold}: a share of a token's box, from 0 up to but not including"
            " 1, is wanted"
        )
    return np.flatnonzero(grid.coverage(mask) > threshold + NOISE)


def visible(grid, mask):
    """Share of a mask's pixels whose centre some token's box holds: what preprocessing did not crop
    away. In [0, 1]; 0 for an empty mask."""
    seen = ~np.isnan(grid.paint(np.ones(len(grid.boxes)), smooth=False))
    return float((mask & seen).sum() / max(mask.sum(), 1))


def touching(grid, tokens, own_scale=False):
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
    low, high = grid.boxes[:, :2], grid.boxes[:, 2:]  # comparisons with NaN are false
    area = (high - low).prod(1)
    for token in tokens:
        gap = EDGE * np.minimum(high - low, high[token] - low[token])
        beside = ((low <= high[token] + gap) & (low[token] <= high + gap)).all(1)
        near |= (
            beside & (area <= 2 * area[token]) & (area >= area[token] / 2) if own_scale else beside
        )
    return np.flatnonzero(near)


def buffered(grid, tokens, n):
    """`tokens` and a rim of n tokens around them, of each scale its own, cut at the grid's borders
    (2.6). n = 0: the tokens themselves, sorted."""
    tokens = np.unique(np.asarray(tokens, int))
    for _ in range(n):
        tokens = touching(grid, tokens, own_scale=True)
    return tokens


# --- what objects are compared with ---------------------------------------------------------------


def register_tokens(norms):
    """Tokens whose norm is above mean + 2 * unbiased std of all tokens of the picture (2.7); norms
    (P,) L2, after the connector. May be empty."""
    norms = np.asarray(norms, float)
    return (
        np.flatnonzero(norms > norms.mean() + 2 * norms.std(ddof=1))
        if len(norms) > 1
        else np.empty(0, int)
    )


def rng_for(seed, *names):
    """numpy Generator that depends on the seed and the names (item id, condition, draw) only: equal
    in every process and order of work."""
    digest = hashlib.sha256(json.dumps([str(part) for part in (seed, *names)]).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest, "big"))


def random_tokens(rng, count, candidates):
    """`count` distinct tokens drawn from the candidates, each as likely; None where the candidates
    are fewer."""
    candidates = np.unique(np.asarray(candidates, int))
    return (
        np.sort(rng.choice(candidates, count, replace=False)) if count <= len(candidates) else None
    )


def random_blob(rng, grid, count, candidates):
    """A compact connected set of exactly `count` candidates, grown around a random one; None where
    no connected part of the candidates has so many.

    The next token is always the nearest candidate that touches the set, ties at random; nearest:
    centre to centre, in sides of the first token's box. Tokens without a box are no candidates."""
    candidates = np.unique(np.asarray(candidates, int))
    free = np.zeros(len(grid.boxes), bool)
    free[candidates[grid.has_box[candidates]]] = True
    if count == 0:
        return np.empty(0, int)
    for seed in rng.permutation(np.flatnonzero(free)):
        if not free[seed]:  # in a part that was too small
            continue
        low, high = grid.boxes[:, :2], grid.boxes[:, 2:]
        distance = np.linalg.norm(
            ((low + high) / 2 - (low[seed] + high[seed]) / 2) / (high[seed] - low[seed]), axis=1
        ).round(6)
        order = np.lexsort((rng.random(len(free)), distance))
        rank = np.argsort(order)  # place of each token in the order of distance
        blob, edge = [], {int(seed)}
        while edge and len(blob) < count:
            nearest = min(edge, key=lambda token: rank[token])
            blob.append(nearest)
            edge |= {int(token) for token in touching(grid, [nearest]) if free[token]}
            edge -= set(blob)
        if len(blob) == count:
            return np.sort(blob)
        free[blob] = False
    return None

"""Shuffles of vision tokens and the position sensitivity index (PSI).

Beyond Semantics (arXiv 2503.17349); docs/studies/beyond_semantics.md, section 2.8. Pure
numpy; the model runs in shuffled_answers.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random
from typing import TYPE_CHECKING

import numpy as np

from vlmdiag.figures import stats
from vlmdiag.figures.stats import Interval
from vlmdiag.types import Record

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from vlmdiag.pictures.grid import PatchGrid


def permutation(seed: int, item_id: str, k: int, count: int) -> list[int]:
    """The k-th shuffle of `count` things for an item: place i gets thing permutation[i].

    Depends on (seed, item id, k) only.
    """
    order = list(range(count))
    Random(f"{seed}|{item_id}|{k}").shuffle(order)
    return order


def shuffled(grid: PatchGrid, seed: int, item_id: str, k: int) -> Int[np.ndarray, " P"]:
    """Which vision token's content each place gets; tokens that stand for no place (row ends)
    stay."""
    order = np.arange(len(grid.boxes))
    places = np.flatnonzero(grid.has_box)
    order[places] = places[permutation(seed, item_id, k, len(places))]
    return order


def psi(
    original: Float[np.ndarray, "*shape"], permuted: Float[np.ndarray, "*shape"]
) -> Float[np.ndarray, "*shape"]:
    """(original - permuted) / original, NaN where original is 0. Accuracies of any equal shape."""
    original = np.asarray(original, float)
    permuted = np.asarray(permuted, float)
    undefined = np.full(original.shape, np.nan)
    return np.divide(original - permuted, original, out=undefined, where=original > 0)


def psi_interval(
    original: Float[np.ndarray, " n"],
    permuted: Float[np.ndarray, " n"],
    level: float = 0.95,
    num_resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """PSI of the mean accuracies with its interval. original, permuted (n,): the accuracy of each
    image, in the same order.

    1 - stats.ratio_interval(), whole images drawn; where all images lost the same share, or so few
    lost any that resamples give no end, what their difference allows for others
    (stats.paired_difference()); where all had the same accuracy, such as all right, also what both
    accuracies allow. Within what accuracies allow.
    """
    original = np.asarray(original, float)
    permuted = np.asarray(permuted, float)
    images = len(original)
    value = float(psi(original.mean(), permuted.mean()))

    if images < 2 or np.isnan(value):
        return stats.interval_of(value, np.nan, np.nan, images)
    kept = stats.ratio_interval(permuted, original, level, num_resamples, seed)
    low, high = 1 - float(kept.high), 1 - float(kept.low)
    lost = stats.paired_difference(
        original, permuted, level, num_resamples, seed, stats.DIFFERENCES, discrete=True
    )
    of_lost = [float(end / original.mean()) for end in (lost.low, lost.high)]
    is_same = not low < high
    low = of_lost[0] if is_same or np.isinf(low) else low
    # on the logarithm's scale the end that is missing is a ratio of 0
    high = of_lost[1] if is_same or np.isinf(high) or kept.low == 0 else high
    before, shuffled = (
        stats.mean_interval(values, level, num_resamples, seed, stats.SHARES, discrete=True)
        for values in (original, permuted)
    )
    if np.ptp(original) == 0 and before.low > 0:  # no resample knows an image that was another
        least_kept, most_kept = _ratio(shuffled, before)
        low, high = min(low, 1 - most_kept), max(high, 1 - least_kept)
    # shuffled answers that are all right, beside as few that were right before as there may be
    least = float(1 - 1 / before.low) if before.low > 0 else -np.inf
    return stats.interval_of(value, min(value, max(low, least)), max(value, min(high, 1.0)), images)


def _ratio(over: Interval, under: Interval) -> tuple[float, float]:
    """Limits of a ratio of two means from the limits of each: Donner and Zou 2012 (Statistical
    Methods in Medical Research 21, 347), MOVER-R, as if they were independent."""
    above, below = float(over.mean), float(under.mean)

    def limit(end: float, other: float, sign: int) -> float:
        inside = (above * below) ** 2 - end * other * (2 * above - end) * (2 * below - other)
        root = math.sqrt(inside) if inside > 0 else 0.0
        return (above * below + sign * root) / (other * (2 * below - other))

    return (
        limit(float(over.low), float(under.high), -1),
        limit(float(over.high), float(under.low), 1),
    )


def summarise(records: Sequence[Record]) -> Record:
    """Accuracy, accuracy with shuffled tokens and PSI of some items, each image counting once.

    records: as those of shuffled_answers.py. Means and intervals over images.
    """
    correct = np.array([record["original"]["correct"] for record in records], float)
    correct_permuted = np.array(
        [[answer["correct"] for answer in record["permuted"]] for record in records], float
    )
    image_ids = [str(record["image_id"]) for record in records]
    image = np.unique(image_ids, return_inverse=True)[1]

    def per_image(item_values: Float[np.ndarray, " items"]) -> Float[np.ndarray, " images"]:
        return np.bincount(image, item_values) / np.bincount(image)

    original = per_image(correct)
    permuted = per_image(correct_permuted.mean(1))
    unread = np.array([_unread(record) for record in records], float)
    return {
        "questions": len(records),
        "images": len(original),
        "accuracy": stats.mean_interval(original, bounds=stats.SHARES, discrete=True),
        "accuracy_permuted": stats.mean_interval(permuted, bounds=stats.SHARES, discrete=True),
        "psi": psi_interval(original, permuted),
        "accuracy_by_permutation": [per_image(column).mean() for column in correct_permuted.T],
        "share_without_a_known_answer": {
            "original": unread[:, 0].mean(),
            "permuted": unread[:, 1:].mean(),
        },
    }


def _unread(record: Record) -> list[bool]:
    """For the original answer and each shuffled one: is it none of the known answers?"""
    answers = [record["original"], *record["permuted"]]
    return [answer["read_as"] is None for answer in answers]

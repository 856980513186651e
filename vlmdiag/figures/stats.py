"""Means over images with bootstrap intervals, paired differences, intervals of accuracies. Pure
numpy, seeded: the same numbers on every call.

A resample draws whole images with replacement. It is a vector w of weights: w_k says how often
image k was drawn. What is measured is written in sums over images, so that many resamples are one
product of matrices.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from statistics import NormalDist
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Float
    from numpy.typing import ArrayLike

Array = np.ndarray

RESAMPLES = 2000
CELLS = 4096  # quantities resampled at once: 4096 x 2000 numbers are 64 MiB
WEIGHTS = 2_000_000  # numbers of a weight matrix at once: 16 MB


class Interval(NamedTuple):
    """A mean over images with its interval. mean, low, high: float, shape of one image's value; n:
    int of the same shape, the images that each cell has."""

    mean: Array
    low: Array
    high: Array
    n: Array


def interval_of(mean: float, low: float, high: float, n: int) -> Interval:
    """The interval of one number; NumPy's scalars are arrays of shape () that print as numbers."""
    scalars = (np.float64(mean), np.float64(low), np.float64(high), np.int64(n))
    return Interval(*(cast("Array", scalar) for scalar in scalars))


# --- resampling -----------------------------------------------------------------------------------


@lru_cache(maxsize=16)
def draws(
    num_images: int, num_resamples: int = RESAMPLES, seed: int = 0
) -> Float[np.ndarray, "B n"]:
    """How often each of n images is drawn in each of B resamples; the same matrix for the same
    arguments, so that everything measured on the same images is resampled alike."""
    if not num_images:
        return np.zeros((num_resamples, 0))
    even = np.full(num_images, 1 / num_images)
    drawn = np.random.default_rng(seed).multinomial(num_images, even, num_resamples)
    weights = drawn.astype(np.float64)
    weights.flags.writeable = False
    return weights


def limits(resampled: Float[np.ndarray, "B ..."], level: float = 0.95) -> tuple[Array, Array]:
    """(low, high) percentiles over resamples, of the resamples that have a finite value; NaN where
    fewer than half of them do."""
    resampled = np.asarray(resampled, dtype=np.float64)
    known = np.isfinite(resampled)
    enough = 2 * known.sum(axis=0) >= max(len(resampled), 2)
    ends = [(1 - level) / 2, (1 + level) / 2]
    if known.all():
        low, high = np.quantile(resampled, ends, axis=0)
    else:
        finite = np.where(known, resampled, np.nan)
        # nanquantile warns of columns without a value, whose limits are NaN anyway
        low, high = np.nanquantile(np.where(enough, finite, 0.0), ends, axis=0)
    return np.where(enough, low, np.nan)[()], np.where(enough, high, np.nan)[()]


def bootstrap(
    statistic: Callable[[Float[np.ndarray, "b n"]], Float[np.ndarray, "b ..."]],
    num_images: int,
    level: float = 0.95,
    num_resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[Array, Array]:
    """Percentile-bootstrap interval (low, high) of a statistic of weighted images.

    statistic: weights of some resamples -> its value for each; NaN in a resample that has none.
    """
    weights = draws(num_images, num_resamples, seed)
    at_once = max(1, WEIGHTS // max(num_images, 1))
    starts = range(0, num_resamples, at_once)
    blocks = [statistic(weights[start : start + at_once]) for start in starts]
    return limits(np.concatenate(blocks), level)


# --- means and differences ------------------------------------------------------------------------


def measured_mean(values: ArrayLike, axis: int | tuple[int, ...] = 0) -> Array:
    """Mean along an axis or axes over the cells that are not NaN; NaN, without a warning, where
    none is."""
    numbers = np.asarray(values, dtype=np.float64)
    measured = ~np.isnan(numbers)
    with np.errstate(invalid="ignore"):  # 0/0 where nothing was measured, inf - inf
        return np.where(measured, numbers, 0.0).sum(axis=axis) / measured.sum(axis=axis)


def mean_interval(
    values: ArrayLike, level: float = 0.95, num_resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Mean over axis 0 (images) with its percentile-bootstrap interval. values (n, ...) float ->
    Interval of shape (...).

    Whole images are resampled, the same draw for every cell. A NaN cell counts as not measured in
    that image: it is left out of the sum and of n. One measured image gives a mean with a NaN
    interval, none gives NaN throughout; an infinite value gives an infinite mean and a NaN
    interval.
    """
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim == 0:
        raise ValueError("mean_interval needs an axis of images, got a single number")
    if not 0 < level < 1:
        raise ValueError(f"level={level}: a fraction between 0 and 1 is wanted, such as 0.95")
    images = len(numbers)
    shape = numbers.shape[1:]
    cells = numbers.reshape(images, int(np.prod(shape)))
    measured = ~np.isnan(cells)
    counts = measured.sum(axis=0)
    mean = measured_mean(cells)
    low = np.full_like(mean, np.nan)
    high = np.full_like(mean, np.nan)
    usable = np.flatnonzero((counts > 1) & np.isfinite(mean))
    for start in range(0, len(usable), CELLS):
        block = usable[start : start + CELLS]
        statistic = _weighted_mean(cells[:, block], measured[:, block])
        low[block], high[block] = bootstrap(statistic, images, level, num_resamples, seed)
    return Interval(*(array.reshape(shape)[()] for array in (mean, low, high, counts)))


def _weighted_mean(cells: Array, measured: Array) -> Callable[[Array], Array]:
    """The mean of cells (n, C) over the images that have them, as a statistic for bootstrap(). A
    resample may miss every image that a sparse cell has: it says nothing about the cell."""
    filled = np.where(measured, cells, 0.0)
    is_complete = bool(measured.all())

    def statistic(weights: Array) -> Array:
        if is_complete:
            return (weights @ filled) / len(filled)
        with np.errstate(invalid="ignore"):
            return (weights @ filled) / (weights @ measured)

    return statistic


def paired_difference(
    a: ArrayLike, b: ArrayLike, level: float = 0.95, num_resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Mean over images of a - b with its interval, a and b (n, ...) measured on the same images in
    the same order. An image that lacks either is left out."""
    first = np.asarray(a, dtype=np.float64)
    second = np.asarray(b, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(f"paired values need equal shapes, got {first.shape} and {second.shape}")
    return mean_interval(first - second, level, num_resamples, seed)


def wilson_interval(successes: ArrayLike, n: ArrayLike, level: float = 0.95) -> Interval:
    """Accuracy with Wilson's score interval; successes, n counts of any equal shape. n = 0 gives
    NaN. Wilson 1927."""
    right = np.asarray(successes, dtype=np.float64)
    count = np.asarray(n)
    if np.any((right < 0) | (right > count)):
        raise ValueError("successes must lie between 0 and n")
    z = NormalDist().inv_cdf((1 + level) / 2)
    with np.errstate(invalid="ignore", divide="ignore"):
        share = right / count
        shrink = 1 + z**2 / count
        centre = (share + z**2 / (2 * count)) / shrink
        half = z * np.sqrt(share * (1 - share) / count + z**2 / (4 * count**2)) / shrink
    low = np.maximum(centre - half, 0.0)
    high = np.minimum(centre + half, 1.0)
    return Interval(share[()], low[()], high[()], count[()])

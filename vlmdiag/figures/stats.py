"""Means over images with bootstrap intervals, paired differences, intervals of accuracies. Pure
numpy, seeded: the same numbers on every call."""

from statistics import NormalDist
from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    """A mean over images with its interval. mean, low, high: float, shape of one image's value; n:
    int of the same shape, the images that each cell has."""

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    n: np.ndarray


def mean_interval(values, level=0.95, num_resamples=2000, seed=0):
    """Mean over axis 0 (images) with its percentile-bootstrap interval. values (n, ...) float ->
    Interval of shape (...).

    Whole images are resampled, the same draw for every cell. A NaN cell counts as not measured in
    that image: it is left out of the sum and of n. One measured image gives a mean with a NaN
    interval, none gives NaN throughout; an infinite value gives an infinite mean and a NaN
    interval.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim == 0:
        raise ValueError("mean_interval needs an axis of images, got a single number")
    if not 0 < level < 1:
        raise ValueError(f"level={level}: a fraction between 0 and 1 is wanted, such as 0.95")
    images, shape = len(values), values.shape[1:]
    cells = values.reshape(images, int(np.prod(shape)))
    measured = ~np.isnan(cells)
    counts = measured.sum(axis=0)
    mean = measured_mean(cells)
    low, high = np.full_like(mean, np.nan), np.full_like(mean, np.nan)
    usable = np.flatnonzero((counts > 1) & np.isfinite(mean))
    for block in (
        np.array_split(usable, -(-len(usable) // 4096)) if len(usable) else []
    ):  # 4096 cells x 2000 resamples = 64 MiB
        resampled = _resampled_means(
            cells[:, block], measured[:, block], num_resamples, np.random.default_rng(seed)
        )
        # A resample may miss every image that a sparse cell has: that resample says nothing about
        # the cell.
        quantile = np.nanquantile if np.isnan(resampled).any() else np.quantile
        low[block], high[block] = quantile(resampled, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return Interval(*(array.reshape(shape)[()] for array in (mean, low, high, counts)))


def _resampled_means(cells, measured, num_resamples, rng):
    """Means of bootstrap resamples as products of weight matrices with the values. cells, measured
    (n, C) -> (num_resamples, C)."""
    images = len(cells)
    filled, complete = np.where(measured, cells, 0.0), measured.all()
    means = np.empty((num_resamples, cells.shape[1]))
    rows_at_once = max(1, 2_000_000 // images)  # a weight matrix of at most 16 MB
    for start in range(0, num_resamples, rows_at_once):
        rows = min(rows_at_once, num_resamples - start)
        drawn = rng.integers(0, images, size=(rows, images)) + images * np.arange(rows)[:, None]
        weights = (
            np.bincount(drawn.ravel(), minlength=rows * images)
            .reshape(rows, images)
            .astype(np.float64)
        )
        with np.errstate(invalid="ignore"):
            means[start : start + rows] = (weights @ filled) / (
                images if complete else weights @ measured
            )
    return means


def measured_mean(values, axis=0):
    """Mean along an axis or axes over the cells that are not NaN; NaN, without a warning, where
    none is."""
    values = np.asarray(values, dtype=np.float64)
    measured = ~np.isnan(values)
    with np.errstate(invalid="ignore"):  # 0/0 where nothing was measured, inf - inf
        return np.where(measured, values, 0.0).sum(axis=axis) / measured.sum(axis=axis)


def paired_difference(a, b, level=0.95, num_resamples=2000, seed=0):
    """Mean over images of a - b with its interval, a and b (n, ...) measured on the same images in
    the same order. An image that lacks either is left out."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"paired values need equal shapes, got {a.shape} and {b.shape}")
    return mean_interval(a - b, level, num_resamples, seed)


def wilson_interval(successes, n, level=0.95):
    """Accuracy with Wilson's score interval; successes, n counts of any equal shape. n = 0 gives
    NaN. Wilson 1927."""
    successes, n = np.asarray(successes, dtype=np.float64), np.asarray(n)
    if np.any((successes < 0) | (successes > n)):
        raise ValueError("successes must lie between 0 and n")
    z = NormalDist().inv_cdf((1 + level) / 2)
    with np.errstate(invalid="ignore", divide="ignore"):
        share = successes / n
        centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
        half = z * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    return Interval(
        share[()], np.maximum(centre - half, 0.0)[()], np.minimum(centre + half, 1.0)[()], n[()]
    )

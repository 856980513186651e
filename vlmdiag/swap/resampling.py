"""Bootstrap intervals of the swap analysis: whole images are drawn, each row its own image where no
ids are given. docs/studies/swap_analysis.md, section 5.2.4.

A resample is a vector w of weights: w_k says how often image k was drawn. What is measured is
written in sums over the rows of each image, so that all resamples are one product of matrices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from vlmdiag.figures import stats
from vlmdiag.figures.stats import draws

if TYPE_CHECKING:
    from jaxtyping import Float, Int

RESAMPLES = 1000

__all__ = [
    "RESAMPLES",
    "ImageSums",
    "draws",
    "image_codes",
    "limits",
    "mean_limits",
    "sums_by_image",
]


class ImageSums(NamedTuple):
    """Sums over the rows of each of the k images that occur."""

    images: Int[np.ndarray, " k"]  # codes
    sums: Float[np.ndarray, "k ..."]
    counts: Float[np.ndarray, " k"]


def image_codes(images: Sequence[object] | np.ndarray | None, n: int) -> Int[np.ndarray, " n"]:
    """Codes 0..K-1 of image ids; each row its own image where images is None."""
    if images is None:
        return np.arange(n)
    if len(images) != n:
        raise ValueError(f"{len(images)} image ids for {n} rows")
    return np.unique(np.asarray(images, dtype=str), return_inverse=True)[1].reshape(n)


def sums_by_image(values: Float[np.ndarray, "n ..."], codes: Int[np.ndarray, " n"]) -> ImageSums:
    """Sums of values over the rows of each image."""
    if not len(codes):
        return ImageSums(codes, values, np.zeros(0))
    order = np.argsort(codes, kind="stable")
    present, starts, counts = np.unique(codes[order], return_index=True, return_counts=True)
    sums = np.add.reduceat(values[order], starts, axis=0)
    return ImageSums(present, sums, counts.astype(np.float64))


def limits(values: Float[np.ndarray, " B"], level: float = 0.95) -> tuple[float, float]:
    """(low, high) of resampled values, over the resamples that have one; NaN where fewer than half
    do."""
    if not len(values):
        return math.nan, math.nan
    low, high = stats.limits(values, level)
    return float(low), float(high)


def mean_limits(
    values: Float[np.ndarray, " n"],
    codes: Int[np.ndarray, " n"],
    num_resamples: int = RESAMPLES,
    seed: int = 0,
    bounds: tuple[float, float] | None = None,
    discrete: bool = False,
) -> tuple[float, float]:
    """(low, high) of the mean of values over rows, by stats.grouped_mean_interval(); NaN with fewer
    than two images, or no resamples."""
    _, sums, counts = sums_by_image(np.asarray(values, dtype=np.float64), codes)
    if len(sums) < 2 or not num_resamples:
        return math.nan, math.nan
    columns = sums[:, None], counts[:, None]
    found = stats.grouped_mean_interval(
        *columns, num_resamples=num_resamples, seed=seed, bounds=bounds, discrete=discrete
    )
    return float(found.low[0]), float(found.high[0])

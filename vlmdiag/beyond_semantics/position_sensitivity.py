"""Shuffles and the position sensitivity index. Pure functions. Beyond Semantics (arXiv 2503.17349),
section 2.8 of our study."""

import math
from random import Random

import numpy as np

from vlmdiag.figures.stats import Interval


def permutation(seed, item_id, k, count):
    """The k-th shuffle of `count` things for an item: place i gets thing permutation[i]. Depends on
    (seed, item id, k) only."""
    order = list(range(count))
    Random(f"{seed}|{item_id}|{k}").shuffle(order)
    return order


def psi(original, permuted):
    """(original - permuted) / original, NaN where original is 0. Accuracies of any equal shape."""
    original, permuted = np.asarray(original, float), np.asarray(permuted, float)
    return np.divide(
        original - permuted, original, out=np.full(original.shape, np.nan), where=original > 0
    )


def psi_interval(original, permuted, level=0.95, num_resamples=2000, seed=0):
    """PSI of the mean accuracies with a paired percentile-bootstrap interval. original, permuted
    (n,): accuracy of each image, in the same order.

    Whole images are drawn, and the ratio is formed anew in each resample; resamples without a right
    answer have none and are left out.
    """
    original, permuted = np.asarray(original, float), np.asarray(permuted, float)
    value, low, high = float(psi(original.mean(), permuted.mean())), np.nan, np.nan
    if len(original) > 1 and not math.isnan(value):
        drawn = np.random.default_rng(seed).integers(
            0, len(original), (num_resamples, len(original))
        )
        low, high = np.nanquantile(
            psi(original[drawn].mean(1), permuted[drawn].mean(1)),
            [(1 - level) / 2, (1 + level) / 2],
        )
    return Interval(value, float(low), float(high), len(original))

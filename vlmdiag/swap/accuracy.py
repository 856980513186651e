"""How often the answers of swap pairs are right, by group, category and stratum. Why Far Looks Up
(arXiv 2605.30161), table 2; docs/studies/swap_analysis.md, sections 1.8 and 2."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vlmdiag.figures import stats
from vlmdiag.figures.stats import proportion_interval
from vlmdiag.swap.relations import CATEGORIES, GROUP_OF, GROUPS, SPLITS
from vlmdiag.swap.resampling import RESAMPLES, image_codes, mean_limits
from vlmdiag.types import Record

if TYPE_CHECKING:
    from jaxtyping import Bool, Int

    Flags = Bool[np.ndarray, " n"]
    Codes = Int[np.ndarray, " n"]
    Labels = Sequence[Any] | np.ndarray


def accuracy(
    correct: Flags, codes: Codes | None = None, num_resamples: int = RESAMPLES, seed: int = 0
) -> Record:
    """{n, value, low, high (exact, n questions), image_low, image_high (whole images drawn),
    too_few}; NaN for n = 0."""
    correct = np.asarray(correct, dtype=bool)
    codes = np.arange(len(correct)) if codes is None else codes
    interval = proportion_interval(int(correct.sum()), len(correct))
    value, low, high, n = (float(number) for number in interval)
    image_low, image_high = mean_limits(
        correct, codes, num_resamples, seed, stats.SHARES, discrete=True
    )
    return {
        "n": int(n),
        "value": value,
        "low": low,
        "high": high,
        "image_low": image_low,
        "image_high": image_high,
        "too_few": n < 1,
    }


def category_validity(
    categories: Labels, correct_orig: Labels, correct_swap: Labels, images: Labels | None = None
) -> dict[str, Record]:
    """{category: {n, acc_orig, acc_swap, reliable, too_few, acc_*_low, acc_*_high}}; reliable =
    both at least half. All (n,)."""
    categories = np.asarray(categories, dtype=str)
    codes = image_codes(images, len(categories))
    correct = {"orig": np.asarray(correct_orig, bool), "swap": np.asarray(correct_swap, bool)}
    validity = {}
    for category in CATEGORIES:
        cell = _accuracies(correct, codes, categories == category)
        is_reliable = cell["n"] and cell["acc_orig"] >= 0.5 and cell["acc_swap"] >= 0.5
        validity[category] = cell | {"reliable": bool(is_reliable)}
    return validity


def _accuracies(correct: Mapping[str, Flags], codes: Codes, mine: Flags) -> Record:
    """{n, too_few, acc_<order>, acc_<order>_low, _high, _image_low, _image_high} of the rows
    `mine`."""
    cell: Record = {}
    for order, flags in correct.items():
        measured = accuracy(flags[mine], codes[mine])
        cell["n"] = measured["n"]
        cell["too_few"] = measured["too_few"]
        cell[f"acc_{order}"] = measured["value"]
        for end in ("low", "high", "image_low", "image_high"):
            cell[f"acc_{order}_{end}"] = measured[end]
    return cell


def prediction_stats(
    categories: Labels,
    correct_orig: Labels,
    correct_swap: Labels,
    images: Labels | None = None,
    splits: Labels | None = None,
    num_resamples: int = RESAMPLES,
    seed: int = 0,
) -> Record:
    """{<part>_n, <part>_acc_orig, _acc_swap, _acc_both and their intervals}, part = horizontal,
    vertical, distance, overall, and distance_<split>; then gap_<orig|swap|both>: {value, low, high,
    too_few} = accuracy of consistent minus that of counter distance pairs, whole images drawn. All
    (n,); splits may hold None.
    """
    categories = np.asarray(categories, dtype=str)
    codes = image_codes(images, len(categories))
    orig = np.asarray(correct_orig, bool)
    swap = np.asarray(correct_swap, bool)
    correct = {"orig": orig, "swap": swap, "both": orig & swap}
    groups = np.array([GROUP_OF[category] for category in categories.tolist()], dtype=str)
    split_names = [None] * len(groups) if splits is None else splits
    split = np.array([str(name) for name in split_names], dtype=str)

    parts = {group: groups == group for group in GROUPS}
    parts["overall"] = np.ones(len(groups), bool)
    for name in SPLITS:
        parts[f"distance_{name}"] = (groups == "distance") & (split == name)
    found: Record = {}
    for part, mine in parts.items():
        for field, value in _accuracies(correct, codes, mine).items():
            found[f"{part}_{field}"] = value
    consistent = parts["distance_consistent"]
    counter = parts["distance_counter"]
    for order, flags in correct.items():
        found[f"gap_{order}"] = _gap(flags, consistent, counter, codes, num_resamples, seed)
    return found


def _gap(
    values: Flags, first: Flags, second: Flags, codes: Codes, num_resamples: int, seed: int
) -> Record:
    """Mean of values where first minus that where second, with the limits that the two means'
    intervals over images give (stats.difference_limits); too_few with fewer than FEW images on a
    side."""
    sides = (first, second)
    gap = {
        "value": math.nan,
        "low": math.nan,
        "high": math.nan,
        "n": [int(side.sum()) for side in sides],
        "too_few": min(len(np.unique(codes[side])) for side in sides) < stats.FEW,
    }
    if not (first.any() and second.any()):
        return gap
    means = [float(values[side].mean()) for side in sides]
    gap["value"] = means[0] - means[1]
    if not gap["too_few"]:
        ends = [
            mean_limits(values[side], codes[side], num_resamples, seed, stats.SHARES, discrete=True)
            for side in sides
        ]
        gap["low"], gap["high"] = stats.difference_limits(means, ends)
    return gap

"""Means over images with their intervals, paired differences, accuracies. Seeded: the same numbers
on every call.

What an interval promises, and how often it keeps it, is in docs/intervals.md, measured by
benchmarks/coverage.py: 95 % intervals of means are bootstrap-t (Efron and Tibshirani 1993, chapter
12.5), as are those of ratios of means and of mean cosines of pairs; those of proportions are exact
(Clopper and Pearson 1934), other statistics have percentiles of the bootstrap.

A resample draws whole images with replacement. It is a vector w of weights: w_k says how often
image k was drawn. What is measured is written in sums over images, so that many resamples are one
product of matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np
from scipy.special import betaincinv, stdtrit

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from numpy.typing import ArrayLike

Array = np.ndarray

RESAMPLES = 2000
CELLS = 1024  # quantities resampled at once: 1024 x 2000 numbers are 16 MiB
SHARES = (0.0, 1.0)  # bounds of shares and accuracies
DIFFERENCES = (-1.0, 1.0)  # of differences of shares, and of cosines
FAR = 1e30  # stands for a ratio without an end; one that has an end is below its root
# of a sample's error: a resample's that is smaller is of nearly equal images and counts as none
# (six values such as 0 0 0 0.0001 1 11 would have a limit of 300,000)
ALIKE = 1e-2
WIDEST = 3  # times Student's half width that a limit may lie from the mean
FEW = 5  # images; below, resamples are too much alike, and Student's t stands in
WHOLE = 2**25  # numbers of a weight matrix that is kept as it is: 256 MB
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


@lru_cache(maxsize=1)
def _many_draws(num_images: int, num_resamples: int, seed: int) -> np.ndarray:
    """draws() of many images, in one byte each; made in parts, which the generator draws alike."""
    even = np.full(num_images, 1 / num_images)
    rng = np.random.default_rng(seed)
    drawn = np.empty((num_resamples, num_images), np.uint8)
    for row in range(num_resamples):
        drawn[row] = rng.multinomial(num_images, even)  # some 1e-500 for more than 255
    return drawn


def _blocks(
    num_images: int, num_resamples: int, seed: int, at_once: int
) -> Iterator[Float[np.ndarray, "b n"]]:
    """draws() in blocks of so many resamples, of fewer where all of them would take gigabytes."""
    if num_images * num_resamples <= WHOLE:
        drawn = draws(num_images, num_resamples, seed)
    else:
        drawn = _many_draws(num_images, num_resamples, seed)
        at_once = min(at_once, max(1, WEIGHTS // num_images))
    for start in range(0, num_resamples, at_once):
        block = drawn[start : start + at_once]
        yield block if block.dtype == np.float64 else block.astype(np.float64)


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
    at_once = max(1, WEIGHTS // max(num_images, 1))
    blocks = [statistic(block) for block in _blocks(num_images, num_resamples, seed, at_once)]
    return limits(np.concatenate(blocks), level)


def studentized_limits(
    value: float,
    error: float,
    resampled: Float[np.ndarray, " B"],
    errors: Float[np.ndarray, " B"],
    level: float = 0.95,
) -> tuple[float, float]:
    """Bootstrap-t limits of any statistic: (resampled - value) / its error in that resample has the
    percentiles that (value - truth) / error has (Efron and Tibshirani 1993, 12.5). Infinite where
    too many resamples have no error; NaN without one of the value."""
    if not error > 0:
        return np.nan, np.nan
    distance = resampled - value
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = np.where(errors > ALIKE * error, distance / errors, np.sign(distance) * FAR)
    low, high = limits(ratio, level)
    far = FAR**0.5
    return (
        -np.inf if high > far else float(value - high * error),
        np.inf if low < -far else float(value - low * error),
    )


def ratio_interval(
    numerators: Float[np.ndarray, " n"],
    denominators: Float[np.ndarray, " n"],
    level: float = 0.95,
    num_resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Ratio of two means over the same images, with its bootstrap-t interval: whole images are
    drawn, and the error is the delta method's, sqrt(sum (y - r x)^2 / (n (n - 1))) / mean x. On the
    logarithm's scale where all values are positive, so that the interval of 1 / r is that of r
    turned over. NaN limits of fewer than two images; images that all have the same ratio have it as
    both limits."""
    over = np.asarray(numerators, dtype=np.float64)
    under = np.asarray(denominators, dtype=np.float64)
    n = len(over)
    value = float(over.sum() / under.sum()) if n and under.sum() else np.nan
    if n < 2 or not np.isfinite(value):
        return interval_of(value, np.nan, np.nan, n)
    is_log = bool((over > 0).all() and (under > 0).all())

    def measured(weights: Float[np.ndarray, "b n"]) -> tuple[Array, Array]:
        """(ratio, its error) in resamples, of the logarithm where that is asked for."""
        with np.errstate(invalid="ignore", divide="ignore"):
            total = weights @ under
            ratio = (weights @ over) / total
            squares = weights @ over**2 - 2 * ratio * (weights @ (over * under))
            squares = np.maximum(squares + ratio**2 * (weights @ under**2), 0.0)
            error = np.sqrt(squares * n / (n - 1)) / total
            return (np.log(ratio), error / ratio) if is_log else (ratio, error)

    (middle,), (error,) = measured(np.ones((1, n)))
    if error <= 1e-7 * abs(middle if middle else 1.0):  # equal ratios, but for rounding
        return interval_of(value, value, value, n)
    if n < FEW:
        half = stdtrit(n - 1, (1 + level) / 2) * error
        low, high = middle - half, middle + half
    else:
        resampled, errors = measured(draws(n, num_resamples, seed))
        low, high = studentized_limits(middle, error, resampled, errors, level)
    ends = (np.exp(low), np.exp(high)) if is_log else (low, high)
    return interval_of(value, float(ends[0]), float(ends[1]), n)


# --- means and differences ------------------------------------------------------------------------


def measured_mean(values: ArrayLike, axis: int | tuple[int, ...] = 0) -> Array:
    """Mean along an axis or axes over the cells that are not NaN; NaN, without a warning, where
    none is."""
    numbers, measured = _measured(values)
    with np.errstate(invalid="ignore"):  # 0/0 where nothing was measured, inf - inf
        return numbers.sum(axis=axis) / measured.sum(axis=axis)


def _measured(values: ArrayLike) -> tuple[Array, Array]:
    """(values in float64 with 0 in place of NaN, which of them are not NaN)."""
    numbers = np.array(values, dtype=np.float64)
    measured = ~np.isnan(numbers)
    numbers[~measured] = 0.0
    return numbers, measured


class MeasuredMean:
    """measured_mean() of images that come in parts: the same sums in the same order."""

    def __init__(self) -> None:
        self._sums: Array | None = None
        self._counts: Array | int = 0

    def add(self, values: Float[np.ndarray, "n ..."]) -> None:
        """Some more images."""
        numbers, measured = _measured(values)
        if self._sums is not None:
            numbers = np.concatenate([self._sums[None], numbers])
        with np.errstate(invalid="ignore"):
            self._sums = numbers.sum(axis=0)
        self._counts = self._counts + measured.sum(axis=0)

    def mean(self) -> Array:
        """Over all images so far, of which there is one at least."""
        assert self._sums is not None
        with np.errstate(invalid="ignore"):
            return self._sums / self._counts


def mean_interval(
    values: ArrayLike,
    level: float = 0.95,
    num_resamples: int = RESAMPLES,
    seed: int = 0,
    bounds: tuple[float, float] | None = None,
    discrete: bool = False,
) -> Interval:
    """Mean over axis 0 (images) with its interval. values (n, ...) float -> Interval of shape
    (...).

    Whole images are resampled, the same draw for every cell. A NaN cell counts as not measured in
    that image: it is left out of the sum and of n. One measured image gives a mean with a NaN
    interval, none gives NaN throughout; an infinite value gives an infinite mean and a NaN
    interval. bounds: the least and the greatest value that an image can have; limits stay within.
    discrete: of few possible values, such as right and wrong; images that are all alike are then
    no proof that others are, and the interval allows for these. Between 0 and 1, cells of nothing
    else are proportions, see proportion_interval().
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
    sums = np.where(measured, cells, 0.0)
    found = grouped_mean_interval(sums, measured, level, num_resamples, seed, bounds, discrete)
    if discrete and bounds == SHARES:
        counts = found.n
        is_proportion = ((cells == 0) | (cells == 1) | ~measured).all(axis=0) & (counts > 1)
        exact = proportion_interval(sums.sum(axis=0), counts, level)
        low = np.where(is_proportion, exact.low, found.low)
        high = np.where(is_proportion, exact.high, found.high)
        found = found._replace(low=low, high=high)
    return Interval(*(array.reshape(shape)[()] for array in found))


def grouped_mean_interval(
    sums: Float[np.ndarray, "n C"],
    counts: Float[np.ndarray, "n C"],
    level: float = 0.95,
    num_resamples: int = RESAMPLES,
    seed: int = 0,
    bounds: tuple[float, float] | None = None,
    discrete: bool = False,
) -> Interval:
    """Mean over all rows of n images, of which each has `counts` rows that add up to `sums`, for C
    quantities; the interval is over images, see mean_interval(). n of the interval: images with a
    row."""
    counts = np.asarray(counts, dtype=np.float64)
    images = (counts > 0).sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = sums.sum(axis=0) / counts.sum(axis=0)
    low = np.full_like(mean, np.nan)
    high = np.full_like(mean, np.nan)
    usable = np.flatnonzero((images > 1) & np.isfinite(mean))
    for start in range(0, len(usable), CELLS):
        block = usable[start : start + CELLS]
        chosen = (sums[:, block], counts[:, block])
        low[block], high[block] = _mean_limits(
            *chosen, bounds, discrete, level, num_resamples, seed
        )
    return Interval(mean, low, high, images)


def _mean_limits(
    sums: Float[np.ndarray, "n C"],
    counts: Float[np.ndarray, "n C"],
    bounds: tuple[float, float] | None,
    discrete: bool,
    level: float,
    num_resamples: int,
    seed: int,
) -> tuple[Float[np.ndarray, " C"], Float[np.ndarray, " C"]]:
    """Limits of means of two images at least: bootstrap-t, Student's t for few images, and for
    equal ones what their bounds allow."""
    images = (counts > 0).sum(axis=0)
    rows = counts.sum(axis=0)
    mean = sums.sum(axis=0) / rows
    apart = sums - mean * counts
    error = np.sqrt((apart**2).sum(axis=0) * images / (images - 1)) / rows
    is_same = error <= 1e-14 * np.abs(mean)  # but for rounding
    half = stdtrit(images - 1, (1 + level) / 2) * error
    low, high = mean - half, mean + half
    many = np.flatnonzero((images >= FEW) & ~is_same)
    if len(many):
        ends = _studentized(apart[:, many], counts[:, many], level, num_resamples, seed)
        below, above = (mean[many] - end * error[many] for end in ends[::-1])
        # values in two clumps have resamples of one clump, whose error says nothing
        widest = WIDEST * half[many]
        below = np.where(np.isfinite(below), np.maximum(below, mean[many] - widest), below)
        above = np.where(np.isfinite(above), np.minimum(above, mean[many] + widest), above)
        # a limit without an end, from resamples of equal values
        last = (low[many], high[many])
        if bounds is not None:
            last = _rare_limits(sums[:, many], counts[:, many], bounds, level)
        low[many] = np.where(np.isfinite(below), below, last[0])
        high[many] = np.where(np.isfinite(above), above, last[1])
    if bounds is not None and discrete:
        # n equal images: others have a share of at most 1 - q, or n equal ones were unlikely
        others = 1 - ((1 - level) / 2) ** (1 / images)
        low = np.where(is_same, mean - others * (mean - bounds[0]), low)
        high = np.where(is_same, mean + others * (bounds[1] - mean), high)
    if bounds is not None:
        low, high = np.maximum(low, bounds[0]), np.minimum(high, bounds[1])
    # a mean that is rounded past its bound is no reason for limits that leave it out
    return np.minimum(low, mean), np.maximum(high, mean)


def _rare_limits(
    sums: Float[np.ndarray, "n C"],
    counts: Float[np.ndarray, "n C"],
    bounds: tuple[float, float],
    level: float,
) -> tuple[Float[np.ndarray, " C"], Float[np.ndarray, " C"]]:
    """Limits of means of images that are nearly all alike: at most as many images have another
    value than the middle one as those that do allow (exact limits of their share), and these could
    have the bounds'."""
    measured = counts > 0
    values = np.where(measured, sums / np.where(measured, counts, 1.0), np.nan)
    middle = np.nanmedian(values, axis=0)
    others = (measured & (np.abs(values - middle) > 1e-12)).sum(axis=0)
    share = proportion_interval(others, measured.sum(axis=0), level).high
    return middle - share * (middle - bounds[0]), middle + share * (bounds[1] - middle)


def _studentized(
    apart: Float[np.ndarray, "n C"],
    counts: Float[np.ndarray, "n C"],
    level: float,
    num_resamples: int,
    seed: int,
) -> tuple[Float[np.ndarray, " C"], Float[np.ndarray, " C"]]:
    """The percentiles over resamples of (mean - true mean) / its error, where the images are all
    there is. apart: an image's sum minus what it would be at the mean. Infinite where too many
    resamples have equal images only."""
    values = [apart, apart**2]
    is_plain = bool((counts == 1).all())  # the products with counts are then known
    if not is_plain:
        values += [apart * counts, counts**2, counts, counts > 0]
    blocks = _blocks(len(apart), num_resamples, seed, num_resamples)
    products = [[weights @ value for value in values] for weights in blocks]
    sums, of_squares, *others = map(np.concatenate, zip(*products))
    if is_plain:
        number = np.full_like(sums, len(apart))
        others = [sums, number, number, number]
    of_both, of_counts, rows, drawn = others
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = sums / rows
        # of the images' sums around what they would be at the resample's mean
        squares = of_squares - 2 * mean * of_both
        squares = np.maximum(squares + mean**2 * of_counts, 0.0)
        error = np.sqrt(squares * drawn / (drawn - 1)) / rows
        ratio = mean / error
        scale = np.sqrt((apart**2).sum(axis=0) * drawn / len(apart)) / rows
    ratio = np.where(error <= ALIKE * scale, np.sign(mean) * FAR, ratio)
    low, high = limits(np.where(drawn > 1, ratio, np.nan), level)
    far = FAR**0.5
    return np.where(low < -far, -np.inf, low), np.where(high > far, np.inf, high)


def paired_difference(
    a: ArrayLike,
    b: ArrayLike,
    level: float = 0.95,
    num_resamples: int = RESAMPLES,
    seed: int = 0,
    bounds: tuple[float, float] | None = None,
    discrete: bool = False,
) -> Interval:
    """Mean over images of a - b with its interval, a and b (n, ...) measured on the same images in
    the same order. An image that lacks either is left out. bounds: of a difference, such as -1 and
    1 of shares. discrete: of few possible values; shares have the limits of their difference, and
    answers that are right or wrong, 0 or 1, those of a difference of proportions."""
    first = np.asarray(a, dtype=np.float64)
    second = np.asarray(b, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(f"paired values need equal shapes, got {first.shape} and {second.shape}")
    found = mean_interval(first - second, level, num_resamples, seed, bounds, discrete)
    known = ~np.isnan(first - second)
    if discrete and bounds == DIFFERENCES:
        both = np.stack([first, second])
        are_shares = (((both >= 0) & (both <= 1)) | ~known).all((0, 1)) & (found.n > 1)
        ends = _paired_shares(np.where(known, both, np.nan), level, num_resamples, seed)
        low, high = (
            np.where(are_shares, end, other)[()]
            for end, other in zip(ends, (found.low, found.high), strict=True)
        )
        found = found._replace(low=low, high=high)
    are_proportions = (((first * (first - 1) == 0) & (second * (second - 1) == 0)) | ~known).all(0)
    are_proportions &= (found.n > 1) & discrete
    low, high = _paired_proportions(first, second, known, level)
    return found._replace(
        low=np.where(are_proportions, low, found.low)[()],
        high=np.where(are_proportions, high, found.high)[()],
    )


def _paired_shares(
    both: Float[np.ndarray, "2 n ..."], level: float, num_resamples: int, seed: int
) -> tuple[Array, Array]:
    """Limits of a mean difference of shares, such as means of a few draws, of the same images: as
    difference_limits(), with the correlation of the two (Zou and Donner 2008)."""
    one, other = (
        mean_interval(values, level, num_resamples, seed, SHARES, discrete=True) for values in both
    )
    apart = np.nan_to_num(both - np.stack([one.mean, other.mean])[:, None])
    product = (apart[0] * apart[1]).sum(0)
    size = np.sqrt((apart[0] ** 2).sum(0) * (apart[1] ** 2).sum(0))
    correlation = np.where(size > 0, product / np.where(size > 0, size, 1), 0)

    def reach(mine: Array, theirs: Array) -> Array:
        return np.sqrt(np.maximum(mine**2 - 2 * correlation * mine * theirs + theirs**2, 0))

    value = one.mean - other.mean
    low = value - reach(one.mean - one.low, other.high - other.mean)
    return low, value + reach(one.high - one.mean, other.mean - other.low)


def _paired_proportions(
    first: Float[np.ndarray, "n ..."],
    second: Float[np.ndarray, "n ..."],
    known: Bool[np.ndarray, "n ..."],
    level: float,
) -> tuple[Array, Array]:
    """Limits of a difference of two proportions of the same images: Newcombe 1998 (Statistics in
    Medicine 17, 2635), method 10, with exact limits in place of Wilson's. NaN without an image."""
    counts = known.sum(0)
    both, only_first, only_second = (
        np.where(known, one, 0.0).sum(0)
        for one in (first * second, first * (1 - second), (1 - first) * second)
    )
    neither = counts - both - only_first - only_second
    # correlation of the two answers, with Newcombe's correction for continuity
    product = both * neither - only_first * only_second
    product = np.where(product > counts / 2, product - counts / 2, np.minimum(product, 0.0))
    margins = (both + only_first) * (only_second + neither)
    margins = margins * (both + only_second) * (only_first + neither)
    with np.errstate(invalid="ignore", divide="ignore"):
        correlation = np.where(margins > 0, product / np.sqrt(margins), 0.0)
    # sums of fractions, whose limits are used by nobody, may be rounded past the bounds
    right = [np.clip(count, 0, counts) for count in (both + only_first, both + only_second)]
    of_first, of_second = (proportion_interval(count, counts, level) for count in right)
    difference = of_first.mean - of_second.mean

    def reach(one: Array, other: Array) -> Array:
        return np.sqrt(np.maximum(one**2 - 2 * correlation * one * other + other**2, 0.0))

    low = difference - reach(of_first.mean - of_first.low, of_second.high - of_second.mean)
    high = difference + reach(of_first.high - of_first.mean, of_second.mean - of_second.low)
    return low, high


def permutation_p(observed: float, null: Float[np.ndarray, " B"]) -> float:
    """Two-sided p: share of B drawn permutations at least as far from their mean as the observed
    value, itself counted as one, so never below 1 / (B + 1)."""
    distance = np.abs(null - null.mean())
    rounding = 1e-12 * np.abs(null).max(initial=0.0)
    as_far = np.count_nonzero(distance >= abs(observed - null.mean()) - rounding)
    return float((1 + as_far) / (1 + len(null)))


def p_text(p: float, permutations: int) -> str:
    """'0.012', or '<= 0.005' where no permutation was as far."""
    floor = 1 / (permutations + 1)
    return f"<= {floor:.2g}" if p <= floor * (1 + 1e-9) else f"{p:.2g}"


def holm(p_values: Sequence[float]) -> list[float]:
    """p values of a family of comparisons that are read together, corrected for their number (Holm
    1979); NaN stays NaN and is no member."""
    ps = np.asarray(p_values, dtype=np.float64)
    corrected = np.full(len(ps), np.nan)
    known = np.flatnonzero(~np.isnan(ps))
    order = known[np.argsort(ps[known], kind="stable")]
    factors = np.arange(len(order), 0, -1)
    corrected[order] = np.minimum(np.maximum.accumulate(ps[order] * factors), 1.0)
    return [float(p) for p in corrected]


def proportion_interval(successes: ArrayLike, n: ArrayLike, level: float = 0.95) -> Interval:
    """A proportion with its exact interval, which covers at least as often as it says; successes, n
    counts of any equal shape, successes may be fractions (means of several draws). n = 0 gives NaN.
    Clopper and Pearson 1934."""
    right = np.asarray(successes, dtype=np.float64)
    count = np.asarray(n)
    if np.any((right < 0) | (right > count)):
        raise ValueError("successes must lie between 0 and n")
    tail = (1 - level) / 2
    with np.errstate(invalid="ignore", divide="ignore"):
        share = right / count
        low = np.where(right > 0, betaincinv(right, count - right + 1, tail), 0.0)
        high = np.where(right < count, betaincinv(right + 1, count - right, 1 - tail), 1.0)
    low, high = (np.where(count > 0, end, np.nan) for end in (low, high))
    return Interval(share[()], low[()], high[()], count[()])


def difference_limits(
    means: Sequence[float], ends: Sequence[tuple[float, float]]
) -> tuple[float, float]:
    """(low, high) of the first minus the second of two means of different images, from the (low,
    high) of each (Newcombe 1998, method 10, for any two intervals)."""
    (first, second), ((low, high), (other_low, other_high)) = means, ends
    difference = first - second
    below = np.hypot(first - low, other_high - second)
    above = np.hypot(high - first, second - other_low)
    return float(difference - below), float(difference + above)


def difference_of(one: Interval, other: Interval) -> Interval:
    """one - other, two numbers each with its interval, by difference_limits(). Measures of the same
    images mostly go together, which makes it wider than it need be."""
    means = float(one.mean), float(other.mean)
    ends = (float(one.low), float(one.high)), (float(other.low), float(other.high))
    fewest = int(min(one.n, other.n))
    return interval_of(means[0] - means[1], *difference_limits(means, ends), fewest)

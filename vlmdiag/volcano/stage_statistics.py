"""Does one text's attention to the picture exceed another's, whatever their lengths? Pure functions
on c[t, p] of vlmdiag/volcano/maps.py.

Volcano (arXiv 2311.07362); docs/studies/volcano.md, sections 2.3, 2.4 and N3. Texts come without
the token that ended them: c of the initial answer (T, P), of the other text (U, P), m = min(T, U);
mass (T,), (U,). Each statistic is one number per text:

    top_l          mean over patches of the mean of the m largest over tokens: published. The longer
                   text's is near a maximum, the shorter's a mean
    token_mean     mean over patches and tokens
    image_mass     mean over tokens of the attention on all vision tokens (plain mean over layers
                   and heads)
    equal_length   both texts cut to m tokens at random, then top_l with l = ceil(m / 2): peaks
                   count, length does not. Exact mean over all draws

top_l of m tokens with l = m is their plain mean, so subsampling to m with the published l would
only be a noisy token_mean: hence the upper half.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from vlmdiag.figures import stats
from vlmdiag.figures.stats import paired_difference
from vlmdiag.types import Record

if TYPE_CHECKING:
    from jaxtyping import Float, Int

STATISTICS = ("top_l", "token_mean", "image_mass", "equal_length")


def checked(c: Float[np.ndarray, "T P"], name: str) -> Float[np.ndarray, "T P"]:
    """c as it is; ValueError unless it is a table of finite numbers with a patch."""
    if c.ndim != 2 or not c.shape[1]:
        raise ValueError(f"{name} has shape {c.shape}, (tokens, patches) was wanted")
    if not np.isfinite(c).all():
        raise ValueError(
            f"{name} has {np.count_nonzero(~np.isfinite(c))} of {c.size} values that are NaN or"
            " infinite"
        )
    return c


def profile(c: Float[np.ndarray, "T P"]) -> Float[np.ndarray, " T"]:
    """Mean over patches of the largest over tokens, of the second largest, ... Every statistic of c
    but the mass is a weighted sum of it."""
    # sorting along rows is faster
    falling = np.sort(np.ascontiguousarray(c.T), axis=1)[:, ::-1]
    return falling.mean(0, dtype=np.float64)


@lru_cache(maxsize=4096)
def subsample_weights(
    tokens: int,
    size: int,
    l: int,  # noqa: E741 -- the paper's letter
) -> Float[np.ndarray, " T"]:
    """w: w @ profile(c) is the mean, over all choices of `size` of the tokens, of the mean of the l
    largest chosen. 1 <= l <= size <= tokens.

    The i-th largest counts where it is chosen with fewer than l larger ones: w_i = sum_{j<l} C(i-1,
    j) C(tokens-i, size-1-j) / C(tokens, size) / l.
    """
    if not 1 <= l <= size <= tokens:
        raise ValueError(f"the {l} largest of {size} of {tokens} tokens")
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, tokens + 1)))])

    def log_choose(
        n: Int[np.ndarray, "*n"], k: Int[np.ndarray, "*k"]
    ) -> Float[np.ndarray, "*broadcast"]:
        fits = (k >= 0) & (k <= n)
        k = np.where(fits, k, 0)
        return np.where(fits, log_factorial[n] - log_factorial[k] - log_factorial[n - k], -np.inf)

    # (tokens, l): i - 1 larger tokens, j of them chosen
    larger = np.arange(tokens)[:, None]
    j = np.arange(l)[None]
    log_share = (
        log_choose(larger, j)
        + log_choose(tokens - 1 - larger, size - 1 - j)
        - log_choose(np.array(tokens), np.array(size))
    )
    return np.exp(log_share).sum(1) / l


def weights(tokens: int, shorter: int) -> Float[np.ndarray, "3 T"]:
    """Rows by which profile(c) gives top_l, token_mean, equal_length of a text; shorter = m tokens
    of the shorter text."""
    top = np.where(np.arange(tokens) < shorter, 1 / shorter, 0.0)
    plain = np.full(tokens, 1 / tokens)
    return np.stack([top, plain, subsample_weights(tokens, shorter, (shorter + 1) // 2)])


def compare(
    initial: Float[np.ndarray, "T P"],
    other: Float[np.ndarray, "U P"],
    mass_initial: Float[np.ndarray, " T"],
    mass_other: Float[np.ndarray, " U"],
    num_permutations: int,
    rng: np.random.Generator,
) -> tuple[Float[np.ndarray, "2 4"], Float[np.ndarray, "B 2 4"]]:
    """(observed, null): the four STATISTICS of initial and of other, and the same after their
    tokens were pooled and split again at random into texts of the same lengths. ValueError for a
    text without a token."""
    lengths = len(initial), len(other)
    if not min(lengths):
        raise ValueError(f"texts of {lengths[0]} and {lengths[1]} counted tokens; both need one")
    rows = [weights(tokens, min(lengths)) for tokens in lengths]
    pooled = np.concatenate([initial, other])
    mass = np.concatenate([mass_initial, mass_other]).astype(np.float64)

    def statistics(order: Int[np.ndarray, " T+U"]) -> Float[np.ndarray, "2 4"]:
        """Of the two texts that the tokens in this order make."""
        of_texts = []
        for tokens, weights_of_text in zip((order[: lengths[0]], order[lengths[0] :]), rows):
            top, plain, equal = weights_of_text @ profile(pooled[tokens])
            of_texts.append([top, plain, mass[tokens].mean(), equal])
        return np.array(of_texts)

    null = np.empty((num_permutations, 2, len(STATISTICS)))
    for n in range(num_permutations):
        null[n] = statistics(rng.permutation(sum(lengths)))
    return statistics(np.arange(sum(lengths))), null


def by_image(
    values: Float[np.ndarray, "n ..."], images: Sequence[str]
) -> Float[np.ndarray, "m ..."]:
    """Mean over the instances of each image, images in sorted order; images: n ids."""
    names, index = np.unique(np.asarray(images, dtype=str), return_inverse=True)
    sums = np.zeros((len(names), *values.shape[1:]))
    np.add.at(sums, index, values)
    return sums / np.bincount(index).reshape(-1, *[1] * (values.ndim - 1))


def ratio(
    other: Float[np.ndarray, "*shape"], initial: Float[np.ndarray, "*shape"]
) -> Float[np.ndarray, "*shape"]:
    """other / initial, NaN where initial is 0."""
    other = np.asarray(other, float)
    initial = np.asarray(initial, float)
    return np.divide(other, initial, out=np.full(other.shape, np.nan), where=initial != 0)


def _spread(values: Float[np.ndarray, " B"]) -> Record:
    """Mean and central 95 %."""
    low, high = np.quantile(values, [0.025, 0.975])
    return {"mean": values.mean(), "low": low, "high": high}


def toss_p(values: Float[np.ndarray, " m"], tosses: Float[np.ndarray, "B m"]) -> float:
    """Two-sided p of images' values against 0: share of B tosses of their signs whose sum is at
    least as far from 0 as theirs, itself counted as one. The least of m images is 2 / 2^m."""
    rounding = 1e-12 * np.abs(values).sum()
    as_far = np.count_nonzero(np.abs(tosses @ values) >= abs(values.sum()) - rounding)
    return float((1 + as_far) / (1 + len(tosses)))


def statistics_over_images(
    observed: Float[np.ndarray, "n 2 4"], null: Float[np.ndarray, "n B 2 4"], images: Sequence[str]
) -> dict[str, Record]:
    """{statistic: {initial, other, ratio, difference, null_ratio, null_difference, p,
    permutations}} over n instances, each image counting once: means over images, Intervals as
    dicts, mean and central 95 % of the null. observed, null: of compare(); images: n ids.

    ratio: of the means, not the mean of ratios, which is above 1 already where a short text's value
    scatters; it is the ratio of Fig. 5's panels. p: of each image's difference minus the mean of
    its own null, which takes a text's length out of it, the sign is tossed. That tokens are
    exchanged would not do for p: those of a text are alike, so that it would say "different" of a
    third of equal texts.
    """
    observed = by_image(observed, images)
    of_images = by_image(null, images)  # (m, B, 2, 4)
    null = of_images.mean(0)
    tosses = np.random.default_rng(0).choice([-1.0, 1.0], (of_images.shape[1], len(observed)))
    statistics = {}
    for n, name in enumerate(STATISTICS):
        initial, other = observed[..., n].T
        null_initial, null_other = null[..., n].T
        null_difference = null_other - null_initial
        expected = (of_images[..., 1, n] - of_images[..., 0, n]).mean(1)
        beyond = other - initial - expected  # (m,)
        statistics[name] = {
            "initial": initial.mean(),
            "other": other.mean(),
            "ratio": stats.ratio_interval(other, initial)._asdict(),
            "difference": paired_difference(other, initial)._asdict(),
            "null_ratio": _spread(ratio(null_other, null_initial)),
            "null_difference": _spread(null_difference),
            "p": toss_p(beyond, tosses),
            "permutations": len(null_difference),
        }
    return statistics

"""Does one text's attention to the picture exceed another's, whatever their lengths? Pure functions
on c[t, p] of vlmdiag/volcano/maps.py.

Volcano (arXiv 2311.07362), sections 2.3, 2.4 and N3 of our study. Texts come without the token that
ended them: c of the initial answer (T, P), of the other text (U, P), m = min(T, U); mass (T,),
(U,). Each statistic is one number per text:

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

from functools import lru_cache

import numpy as np

from vlmdiag.figures.stats import Interval, paired_difference

STATISTICS = ("top_l", "token_mean", "image_mass", "equal_length")


def checked(c, name):
    """c (T, P) as it is; ValueError unless it is a table of finite numbers with a patch."""
    if c.ndim != 2 or not c.shape[1]:
        raise ValueError(f"{name} has shape {c.shape}, (tokens, patches) was wanted")
    if not np.isfinite(c).all():
        raise ValueError(
            f"{name} has {np.count_nonzero(~np.isfinite(c))} of {c.size} values that are NaN or"
            " infinite"
        )
    return c


def profile(c):
    """(T,): mean over patches of the largest over tokens, of the second largest, ... Every
    statistic of c but the mass is a weighted sum of it. c (T, P)."""
    return np.sort(np.ascontiguousarray(c.T), axis=1)[:, ::-1].mean(
        0, dtype=np.float64
    )  # sorting along rows is faster


@lru_cache(maxsize=4096)
def subsample_weights(tokens, size, l):  # noqa: E741 -- the paper's letter
    """(tokens,) w: w @ profile(c) is the mean, over all choices of `size` of the tokens, of the
    mean of the l largest chosen. 1 <= l <= size <= tokens.

    The i-th largest counts where it is chosen with fewer than l larger ones: w_i = sum_{j<l} C(i-1,
    j) C(tokens-i, size-1-j) / C(tokens, size) / l.
    """
    if not 1 <= l <= size <= tokens:
        raise ValueError(f"the {l} largest of {size} of {tokens} tokens")
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, tokens + 1)))])

    def log_choose(n, k):
        fits = (k >= 0) & (k <= n)
        k = np.where(fits, k, 0)
        return np.where(fits, log_factorial[n] - log_factorial[k] - log_factorial[n - k], -np.inf)

    larger, chosen = np.arange(tokens)[:, None], np.arange(l)[None]
    found = (
        log_choose(larger, chosen)
        + log_choose(tokens - 1 - larger, size - 1 - chosen)
        - log_choose(np.array(tokens), np.array(size))
    )
    return np.exp(found).sum(1) / l


def weights(tokens, shorter):
    """(3, tokens): rows by which profile(c) gives top_l, token_mean, equal_length of a text,
    shorter = m tokens of the shorter text."""
    top = np.where(np.arange(tokens) < shorter, 1 / shorter, 0.0)
    return np.stack(
        [top, np.full(tokens, 1 / tokens), subsample_weights(tokens, shorter, (shorter + 1) // 2)]
    )


def compare(initial, other, mass_initial, mass_other, num_permutations, rng):
    """(observed (2, 4), null (num_permutations, 2, 4)): the four STATISTICS of initial and of
    other, and the same after their tokens were pooled and split again at random into texts of the
    same lengths. ValueError for a text without a token."""
    lengths = len(initial), len(other)
    if not min(lengths):
        raise ValueError(f"texts of {lengths[0]} and {lengths[1]} counted tokens; both need one")
    rows = [weights(tokens, min(lengths)) for tokens in lengths]
    pooled, mass = (
        np.concatenate([initial, other]),
        np.concatenate([mass_initial, mass_other]).astype(np.float64),
    )

    def statistics(order):
        parts = order[: lengths[0]], order[lengths[0] :]
        top, plain, equal = np.transpose(
            [row @ profile(pooled[part]) for row, part in zip(rows, parts)]
        )
        return np.stack([top, plain, [mass[part].mean() for part in parts], equal], axis=1)

    null = np.empty((num_permutations, 2, len(STATISTICS)))
    for n in range(num_permutations):
        null[n] = statistics(rng.permutation(sum(lengths)))
    return statistics(np.arange(sum(lengths))), null


def by_image(values, images):
    """Mean over the instances of each image, images in sorted order. values (n, ...), images (n,)
    ids -> (images, ...)."""
    names, index = np.unique(np.asarray(images, dtype=str), return_inverse=True)
    sums = np.zeros((len(names), *values.shape[1:]))
    np.add.at(sums, index, values)
    return sums / np.bincount(index).reshape(-1, *[1] * (values.ndim - 1))


def ratio(other, initial):
    """other / initial, NaN where initial is 0. Arrays of equal shape."""
    other, initial = np.asarray(other, float), np.asarray(initial, float)
    return np.divide(other, initial, out=np.full(other.shape, np.nan), where=initial != 0)


def ratio_interval(other, initial, level=0.95, num_resamples=2000, seed=0):
    """Ratio of the means over images with its percentile-bootstrap interval; whole images are
    drawn. other, initial (n,) of the same images.

    Of the means, not the mean of ratios, which is above 1 already where a short text's value
    scatters; it is the ratio of Fig. 5's panels.
    """
    value, low, high = float(ratio(other.mean(), initial.mean())), np.nan, np.nan
    if len(other) > 1 and np.isfinite(value):
        drawn = np.random.default_rng(seed).multinomial(
            len(other), np.full(len(other), 1 / len(other)), num_resamples
        )
        low, high = np.nanquantile(
            ratio(drawn @ other, drawn @ initial), [(1 - level) / 2, (1 + level) / 2]
        )
    return Interval(value, float(low), float(high), len(other))


def p_value(observed, null):
    """Two-sided: share of permutations at least as far from the null's mean as the observed value,
    itself counted as one. null (B,).

    Holds for biased statistics too: null and observed share the lengths. Tokens are taken as
    exchangeable; those of one text resemble each other, so a small p says that the two texts
    differ, and the interval over images whether the difference is systematic.
    """
    distance = np.abs(null - null.mean())
    return float(
        (1 + np.count_nonzero(distance >= abs(observed - null.mean()) - 1e-12 * np.abs(null).max()))
        / (1 + len(null))
    )


def statistics_over_images(observed, null, images):
    """{statistic: {initial, other, ratio, difference, null_ratio, null_difference, p}} over n
    instances, each image counting once: means over images, Intervals as dicts, mean and central 95
    % of the null. observed (n, 2, 4), null (n, B, 2, 4) of compare(), images (n,) ids.
    """
    observed, null = by_image(observed, images), by_image(null, images).mean(0)

    def spread(values):
        return dict(
            zip(("mean", "low", "high"), (values.mean(), *np.quantile(values, [0.025, 0.975])))
        )

    found = {}
    for n, name in enumerate(STATISTICS):
        (initial, other), (null_initial, null_other) = observed[..., n].T, null[..., n].T
        row = {
            "initial": initial.mean(),
            "other": other.mean(),
            "ratio": ratio_interval(other, initial)._asdict(),
        }
        row |= {
            "difference": paired_difference(other, initial)._asdict(),
            "null_ratio": spread(ratio(null_other, null_initial)),
        }
        row |= {
            "null_difference": spread(null_other - null_initial),
            "p": p_value((other - initial).mean(), null_other - null_initial),
        }
        found[name] = row
    return found

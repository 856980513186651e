"""From measured signals to the probability that an object word is hallucinated, and how well that
works.

    P(hallucinated) = sigmoid(b + sum_j w_j (x_j - mean_j) / std_j), L2-penalised maximum likelihood
    AUROC = P(score of a hallucinated word > score of a grounded one), ties count half (Mann and
            Whitney 1947)
    ECE = sum over bins of share x |mean prediction - observed share|, bins of equal count

The fit is scikit-learn's, an extra; what a calibration says of new words needs numpy alone.
Intervals are 95 % over images, so that a word goes with its image.

Shapes: n words, J signals.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy.special import expit, logit, stdtr, stdtrit

from vlmdiag.cli import UsageError
from vlmdiag.figures import stats
from vlmdiag.types import Fields, Record

if TYPE_CHECKING:
    from jaxtyping import Float
    from numpy.typing import ArrayLike
    from sklearn.linear_model import LogisticRegression

Model = Record  # of fit(): mean, std, weights (J,) as lists, bias
Score = dict[str, float]  # value, low, high


# ---- the calibration ----


def fit(signals: ArrayLike, labels: ArrayLike, penalty: float = 1.0) -> Model:
    """{mean, std, weights (J,), bias} of signals (n, J) and labels (n,), 1 hallucinated and 0
    grounded. ValueError unless both occur; UsageError without scikit-learn."""
    rows = np.asarray(signals, float)
    truth = np.asarray(labels, float)
    if not 0 < truth.sum() < len(truth):
        raise ValueError(
            f"{int(truth.sum())} hallucinated of {len(truth)} words: both kinds are needed to"
            " calibrate"
        )
    mean = rows.mean(0)
    std = rows.std(0)
    std = np.where(std > 0, std, 1.0)
    regression = logistic_regression()(
        C=1 / penalty, solver="newton-cholesky", tol=1e-12, max_iter=1000
    )
    regression.fit((rows - mean) / std, truth)
    return {
        "mean": mean.tolist(),
        "std": std.tolist(),
        "weights": regression.coef_[0].tolist(),
        "bias": float(regression.intercept_[0]),
    }


def logistic_regression() -> type[LogisticRegression]:
    """scikit-learn's class; UsageError where it is not installed."""
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise UsageError(
            "a calibration is fitted by scikit-learn: pip install 'vlm-diagnostics[calibration]'"
        ) from error
    return LogisticRegression


def predict(model: Fields, signals: ArrayLike) -> Float[np.ndarray, " n"]:
    """Probabilities of fit()'s model for signals (n, J)."""
    scaled = (np.asarray(signals, float) - np.array(model["mean"])) / np.array(model["std"])
    logits = model["bias"] + scaled @ np.array(model["weights"])
    return 1 / (1 + np.exp(-np.clip(logits, -700, 700)))


# ---- how well it works ----


def auroc_interval(scores: ArrayLike, labels: ArrayLike, images: ArrayLike) -> Score:
    """AUROC with its interval over images (n,) ids: Student's t on the logit scale with the error
    of _auroc_parts(). All pairs ordered, or none: as if each image were one right answer."""
    value, parts, count = _auroc_parts(scores, labels, images)
    error = _error(parts, count)
    low = high = np.nan
    if value in (0.0, 1.0) and count > 1:
        exact = stats.proportion_interval(value * count, count)
        low, high = float(exact.low), float(exact.high)
    elif error >= 0:
        half = stdtrit(count - 1, 0.975) * error / (value * (1 - value))
        low, high = (float(end) for end in expit(logit(value) + half * np.array([-1, 1])))
    return {"value": value, "low": low, "high": high}


def auroc_difference(
    scores: ArrayLike, others: ArrayLike, labels: ArrayLike, images: ArrayLike
) -> Score:
    """AUROC of scores minus that of others on the same words, with its interval over images, and p,
    by Student's t. Where one of the two is 0 or 1, its error is unknown: what both intervals allow,
    and no p."""
    if {_auroc_parts(one, labels, images)[0] for one in (scores, others)} & {0.0, 1.0}:
        of_both = [auroc_interval(one, labels, images) for one in (scores, others)]
        count = len(np.unique(np.asarray(images, str)))
        found = stats.difference_of(
            *(stats.interval_of(one["value"], one["low"], one["high"], count) for one in of_both)
        )
        limits = {"low": float(found.low), "high": float(found.high)}
        return {"value": float(found.mean), **limits, "p": np.nan}
    first, parts, count = _auroc_parts(scores, labels, images)
    second, other_parts, _ = _auroc_parts(others, labels, images)
    value, error = first - second, _error(parts - other_parts, count)
    if not error >= 0:
        return {"value": value, "low": np.nan, "high": np.nan, "p": np.nan}
    half = stdtrit(count - 1, 0.975) * error
    p = 2 * float(stdtr(count - 1, -abs(value) / error)) if error > 0 else 1.0
    low, high = max(value - half, -1.0), min(value + half, 1.0)
    return {"value": value, "low": float(low), "high": float(high), "p": p}


def _shares_of_pairs(scores: ArrayLike, labels: ArrayLike) -> Float[np.ndarray, " n"]:
    """For each word the share of the words of the other kind that it is ordered rightly with."""
    is_positive = np.asarray(labels, bool)
    # words of each kind at each distinct score, ascending
    place = np.unique(np.asarray(scores, float), return_inverse=True)[1]
    size = place.max(initial=-1) + 1
    positive = np.bincount(place[is_positive], minlength=size)
    negative = np.bincount(place[~is_positive], minlength=size)
    below = np.cumsum(negative) - negative / 2
    above = positive.sum() - np.cumsum(positive) + positive / 2
    with np.errstate(invalid="ignore"):
        return np.where(is_positive, below[place] / negative.sum(), above[place] / positive.sum())


def _auroc_parts(
    scores: ArrayLike, labels: ArrayLike, images: ArrayLike
) -> tuple[float, Float[np.ndarray, " images"], int]:
    """(AUROC, what each image adds to its error, how many images have each kind of word at least).

    An image's part is its words' shares of rightly ordered pairs minus what they would be at the
    AUROC, over the number of words of their kind: the linear form of a Mann-Whitney statistic of
    clustered data (Obuchowski 1997, Biometrics 53, 567).
    """
    is_positive = np.asarray(labels, bool)
    shares = _shares_of_pairs(scores, labels)
    image = np.unique(np.asarray(images, str), return_inverse=True)[1]
    parts = np.zeros(image.max(initial=-1) + 1)
    fewest = len(parts)
    value = np.nan
    for kind in (is_positive, ~is_positive):
        if not kind.any():
            return np.nan, parts, 0
        value = float(shares[kind].mean())
        parts += np.bincount(image[kind], shares[kind] - value, len(parts)) / kind.sum()
        fewest = min(fewest, len(np.unique(image[kind])))
    return value, parts, fewest


def _error(parts: Float[np.ndarray, " images"], count: int) -> float:
    """The standard error of a sum of images' parts; NaN with fewer than two images."""
    return float(np.sqrt((parts**2).sum() * count / (count - 1))) if count > 1 else np.nan


def reliability(
    predicted: Float[np.ndarray, " n"], labels: ArrayLike, bins: int = 10
) -> list[Record]:
    """[{n, predicted, observed}, ...] over bins of equal count, by rising prediction."""
    truth = np.asarray(labels)
    order = np.argsort(predicted, kind="stable")
    return [
        {
            "n": len(words),
            "predicted": float(predicted[words].mean()),
            "observed": float(truth[words].mean()),
        }
        for words in np.array_split(order, min(bins, len(order)))
        if len(words)
    ]


def expected_calibration_error(predicted: ArrayLike, labels: ArrayLike, bins: int = 10) -> float:
    """ECE over bins of equal count."""
    truth = np.asarray(labels, float)
    of_bins = reliability(np.asarray(predicted, float), truth, bins)
    total = sum(words["n"] * abs(words["predicted"] - words["observed"]) for words in of_bins)
    return float(total / len(truth))

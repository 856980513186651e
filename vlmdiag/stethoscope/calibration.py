"""From measured signals to the probability that an object word is hallucinated, and how well that
works.

    P(hallucinated) = sigmoid(b + sum_j w_j (x_j - mean_j) / std_j), L2-penalised maximum likelihood
    AUROC = P(score of a hallucinated word > score of a grounded one), ties count half (Mann and
            Whitney 1947)
    ECE = sum over bins of share x |mean prediction - observed share|, bins of equal count

The fit is scikit-learn's, an extra; what a calibration says of new words needs numpy alone.
Intervals are 95 % percentile bootstraps that draw whole images, so that a word goes with its image.
AUROC is written out here because a bootstrap asks for it thousands of times: 0.1 ms in place of the
library's 5 ms.

Shapes: n words, J signals, R resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from vlmdiag.cli import UsageError
from vlmdiag.figures import stats
from vlmdiag.types import Fields, Record

if TYPE_CHECKING:
    from jaxtyping import Float
    from numpy.typing import ArrayLike
    from sklearn.linear_model import LogisticRegression

RESAMPLES = 1000
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
    regression = _logistic_regression()(
        C=1 / penalty, solver="newton-cholesky", tol=1e-12, max_iter=1000
    )
    regression.fit((rows - mean) / std, truth)
    return {
        "mean": mean.tolist(),
        "std": std.tolist(),
        "weights": regression.coef_[0].tolist(),
        "bias": float(regression.intercept_[0]),
    }


def _logistic_regression() -> type[LogisticRegression]:
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


def auroc(scores: ArrayLike, labels: ArrayLike, weights: ArrayLike | None = None) -> float:
    """AUROC of scores (n,) for labels (n,); weights (n,): how often each word counts. NaN where one
    kind is missing."""
    is_positive = np.asarray(labels, bool)
    values = np.asarray(scores, float)
    times = np.ones(len(values)) if weights is None else np.asarray(weights, float)
    # words of each kind at each distinct score, ascending
    place = np.unique(values, return_inverse=True)[1]
    size = place.max(initial=-1) + 1
    positive = np.bincount(place[is_positive], times[is_positive], size)
    negative = np.bincount(place[~is_positive], times[~is_positive], size)
    pairs = positive.sum() * negative.sum()
    if not pairs > 0:
        return float("nan")
    below = np.cumsum(negative) - negative
    return float((positive * (below + negative / 2)).sum() / pairs)


def draws(images: ArrayLike, seed: int = 0, resamples: int = RESAMPLES) -> Float[np.ndarray, "R n"]:
    """How often each word counts when whole images are drawn. images (n,): ids."""
    ids, image_of = np.unique(np.asarray(images, str), return_inverse=True)
    return stats.draws(len(ids), resamples, seed)[:, image_of]


def interval(value: float, resampled: Sequence[float] | np.ndarray) -> Score:
    """{value, low, high}; no interval where fewer than half of the resamples have a value."""
    low, high = stats.limits(np.asarray(resampled))
    return {"value": float(value), "low": float(low), "high": float(high)}


def auroc_interval(scores: ArrayLike, labels: ArrayLike, drawn: Float[np.ndarray, "R n"]) -> Score:
    """AUROC with its interval. drawn: of draws()."""
    return _interval_of(lambda weights: auroc(scores, labels, weights), drawn)


def auroc_difference(
    scores: ArrayLike, others: ArrayLike, labels: ArrayLike, drawn: Float[np.ndarray, "R n"]
) -> Score:
    """AUROC of scores minus that of others on the same words, with its interval, and p: the level
    at which an interval would just reach 0 (from the resamples, so never below 2 / (R + 1))."""

    def difference(weights: ArrayLike | None) -> float:
        return auroc(scores, labels, weights) - auroc(others, labels, weights)

    resampled = np.array([difference(weights) for weights in drawn])
    known = resampled[np.isfinite(resampled)]
    tail = min(np.count_nonzero(known <= 0), np.count_nonzero(known >= 0))
    p = min(1.0, 2 * (1 + tail) / (1 + len(known))) if len(known) else float("nan")
    return interval(difference(None), resampled) | {"p": p}


def _interval_of(
    statistic: Callable[[ArrayLike | None], float], drawn: Float[np.ndarray, "R n"]
) -> Score:
    return interval(statistic(None), [statistic(weights) for weights in drawn])


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

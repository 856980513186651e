"""From measured signals to the probability that an object word is hallucinated, and how well that
works. Pure numpy.

    P(hallucinated) = sigmoid(b + sum_j w_j (x_j - mean_j) / std_j), L2-penalised maximum likelihood
    (Newton's method)
    AUROC = P(score of a hallucinated word > score of a grounded one), ties count half (Mann and
    Whitney 1947)
    ECE = sum over bins of share x |mean prediction - observed share|, bins of equal count

Intervals are 95 % percentile bootstraps that draw whole images; each bootstrap keeps a word's image
together.
"""

import numpy as np

RESAMPLES = 1000


def fit(signals, labels, penalty=1.0, steps=50):
    """{mean, std, weights (J,), bias} of signals (n, J), labels (n,) of 1 hallucinated and 0
    grounded. ValueError unless both occur."""
    signals, labels = np.asarray(signals, float), np.asarray(labels, float)
    if not 0 < labels.sum() < len(labels):
        raise ValueError(
            f"{int(labels.sum())} hallucinated of {len(labels)} words: both kinds are needed to"
            " calibrate"
        )
    mean, std = signals.mean(0), signals.std(0)
    std = np.where(std > 0, std, 1.0)
    inputs = np.column_stack([np.ones(len(labels)), (signals - mean) / std])
    weights, ridge = np.zeros(inputs.shape[1]), penalty * np.r_[0.0, np.ones(inputs.shape[1] - 1)]
    for _ in range(steps):
        predicted = _sigmoid(inputs @ weights)
        slope = inputs.T @ (predicted - labels) + ridge * weights
        curve = (
            (inputs * (predicted * (1 - predicted))[:, None]).T @ inputs
            + np.diag(ridge)
            + 1e-9 * np.eye(len(weights))
        )
        change = np.linalg.solve(curve, slope)
        weights = weights - change
        if np.abs(change).max() < 1e-10:
            break
    return {
        "mean": mean.tolist(),
        "std": std.tolist(),
        "weights": weights[1:].tolist(),
        "bias": float(weights[0]),
    }


def predict(model, signals):
    """(n,) probabilities of fit()'s model for signals (n, J)."""
    scaled = (np.asarray(signals, float) - np.array(model["mean"])) / np.array(model["std"])
    return _sigmoid(model["bias"] + scaled @ np.array(model["weights"]))


def _sigmoid(x):
    return 1 / (1 + np.exp(-np.clip(x, -700, 700)))


def auroc(scores, labels, weights=None):
    """AUROC of scores (n,) for labels (n,); weights (n,): how often each word counts. NaN where one
    kind is missing."""
    scores, labels = np.asarray(scores, float), np.asarray(labels, bool)
    weights = np.ones(len(scores)) if weights is None else np.asarray(weights, float)
    _, place = np.unique(scores, return_inverse=True)
    size = place.max(initial=-1) + 1
    positive = np.bincount(place[labels], weights[labels], size)
    negative = np.bincount(place[~labels], weights[~labels], size)
    total = positive.sum() * negative.sum()
    below = np.cumsum(negative) - negative
    return float((positive * (below + negative / 2)).sum() / total) if total > 0 else float("nan")


def draws(images, seed=0, resamples=RESAMPLES):
    """(resamples, n) how often each word counts when whole images are drawn. images (n,) ids."""
    _, codes = np.unique(np.asarray(images, str), return_inverse=True)
    count = codes.max(initial=-1) + 1
    return np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), resamples)[
        :, codes
    ]


def interval(value, resampled):
    """{value, low, high}; no interval where fewer than half of the resamples have a value."""
    known = np.asarray(resampled)[np.isfinite(resampled)]
    low, high = (
        np.quantile(known, [0.025, 0.975]) if 2 * len(known) >= len(resampled) else (np.nan, np.nan)
    )
    return {"value": float(value), "low": float(low), "high": float(high)}


def auroc_interval(scores, labels, drawn):
    return interval(auroc(scores, labels), [auroc(scores, labels, weights) for weights in drawn])


def auroc_difference(scores, others, labels, drawn):
    """AUROC of scores minus that of others on the same words."""
    resampled = [
        auroc(scores, labels, weights) - auroc(others, labels, weights) for weights in drawn
    ]
    return interval(auroc(scores, labels) - auroc(others, labels), resampled)


def reliability(predicted, labels, bins=10):
    """[{n, predicted, observed}, ...] over bins of equal count, by rising prediction."""
    order = np.argsort(predicted, kind="stable")
    parts = [part for part in np.array_split(order, min(bins, len(order))) if len(part)]
    return [
        {
            "n": len(part),
            "predicted": float(predicted[part].mean()),
            "observed": float(np.asarray(labels)[part].mean()),
        }
        for part in parts
    ]


def expected_calibration_error(predicted, labels, bins=10):
    """ECE over bins of equal count."""
    rows = reliability(np.asarray(predicted, float), np.asarray(labels, float), bins)
    return sum(row["n"] * abs(row["predicted"] - row["observed"]) for row in rows) / len(labels)

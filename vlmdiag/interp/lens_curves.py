"""What a run of lens_accuracy.py says: how often the tokens on an object decode to its name, by
layer, and what choosing a layer does to that. Kept free of torch.

arXiv 2410.07149, section 5; docs/studies/llava_interp.md, section 2.3. n pictures, L layers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vlmdiag.cli import UsageError
from vlmdiag.figures import stats
from vlmdiag.figures.stats import Interval

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from vlmdiag.runs.rundirs import Run


def name_shares(run: Run, seed: int) -> dict[str, Float[np.ndarray, "n L+1"]]:
    """{own, shuffled, elsewhere}: share of vision tokens whose likeliest token names the object, of
    a run's pictures. shuffled: names of another picture whose object has another category; NaN
    without one. UsageError for a run without a finished picture."""
    ids = run.ids()
    if not ids:
        raise UsageError(
            f"{run.path} has no finished picture yet; run the command that makes it again, without"
            " --analyze_only"
        )
    records = [run.record(id) for id in ids]
    shares: dict[str, list[Any]] = {"own": [], "shuffled": [], "elsewhere": []}
    for row, id in enumerate(ids):
        record, arrays = records[row], run.arrays(id)
        top1, tokens = arrays["top1"], arrays["tokens"]
        unknown = np.full(len(top1), np.nan)
        others = [other for other in records if other["category"] != record["category"]]
        rng = np.random.default_rng([seed, row])
        elsewhere = np.setdiff1d(np.arange(top1.shape[1]), tokens)
        shares["own"].append(np.isin(top1[:, tokens], record["name_ids"]).mean(1))
        shuffled = on_others = unknown
        if others:
            other_ids = others[rng.integers(len(others))]["name_ids"]
            shuffled = np.isin(top1[:, tokens], other_ids).mean(1)
        if len(elsewhere):
            on_others = np.isin(top1[:, elsewhere], record["name_ids"]).mean(1)
        shares["shuffled"].append(shuffled)
        shares["elsewhere"].append(on_others)
    return {name: np.stack(of_pictures) for name, of_pictures in shares.items()}


class Choice(NamedTuple):
    """What choosing a layer gives: the share of each picture, and the hidden state that was chosen
    for it: 0 the embeddings, l + 1 the output of layer l."""

    shares: Float[np.ndarray, " n"]
    states: Int[np.ndarray, " n"]

    @property
    def state(self) -> float:
        """The mean hidden state."""
        return float(self.states.mean())


def best_layers(own: Float[np.ndarray, "n L+1"], seed: int) -> dict[str, Choice]:
    """What choosing a layer does to the figure.

    per_picture: the paper's, a picture without a hit has its embeddings; overall: one for all
    pictures; cross_fitted: for each half of the pictures the layer chosen on the other.
    """
    pictures = np.arange(len(own))
    of_picture = own.argmax(1)
    overall = int(own.mean(0).argmax())
    halves = np.array_split(np.random.default_rng(seed).permutation(len(own)), 2)
    fitted = np.empty(len(own), int)
    for half, other in (halves, halves[::-1]):
        fitted[half] = own[other].mean(0).argmax() if len(other) else overall
    return {
        "per_picture": Choice(own[pictures, of_picture], of_picture),
        "overall": Choice(own[:, overall], np.full(len(own), overall)),
        "cross_fitted": Choice(own[pictures, fitted], fitted),
    }


def curves_of(run: Run, seed: int) -> tuple[dict[str, Interval], dict[str, tuple[Interval, float]]]:
    """({own, shuffled, elsewhere: intervals of shape (L + 1,)}, {way to choose a layer: what it
    gives, and its mean hidden state}) of a run."""
    shares = name_shares(run, seed)

    def over_pictures(values: Float[np.ndarray, "n ..."]) -> Interval:
        return stats.mean_interval(values, bounds=stats.SHARES, discrete=True)

    curves = {name: over_pictures(of_pictures) for name, of_pictures in shares.items()}
    chosen = {
        name: (over_pictures(choice.shares), choice.state)
        for name, choice in best_layers(shares["own"], seed).items()
    }
    return curves, chosen

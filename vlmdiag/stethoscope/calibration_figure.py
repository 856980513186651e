"""Which signals tell hallucinated object words from grounded ones, and can the probability be
believed? The figure of diagnostic_tools/viz_hallucination.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt

from vlmdiag.figures import plots
from vlmdiag.types import Fields

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BASELINE = "log_probability"
LABELS = {
    "log_probability": "token probability",
    "llr": "log-likelihood ratio",
    "visual_share": "visual share",
    "relevancy_mass": "relevancy mass",
    "lens": "logit lens",
    "all": "all together",
}


def draw(numbers: Fields, kind: str, title: str) -> Figure:
    """AUROC of each signal, and predicted against observed share. numbers: one kind of a report of
    hallucination.report()."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), width_ratios=(3, 2))
    draw_signals(left, numbers["signals"])
    draw_reliability(right, numbers["reliability"], numbers["signals"]["all"]["ece"])
    hallucinated = f"{numbers['n_hallucinated']} of {numbers['n_words']}"
    figure.suptitle(
        f"{title}, {kind}: {hallucinated} object words hallucinated in {numbers['n_images']}"
        " pictures",
        fontsize=10,
    )
    return figure


def draw_signals(axis: Axes, signals: Fields) -> None:
    """AUROC of each signal with its interval, and the difference to plain token probability."""
    names = [name for name in LABELS if name in signals][::-1]
    for row, name in enumerate(names):
        score = signals[name]["auroc"]
        gain = signals[name]["over_baseline"]
        better = signals[name].get("beats_baseline", False)
        difference = f"{gain['value']:+.2f} ({gain['low']:+.2f} to {gain['high']:+.2f})"
        color = plots.SKY
        if name == BASELINE:
            color = plots.EVEN_COLOR
            difference = ""
        elif better:
            color = plots.BLUE
            difference += " *"
        axis.barh(
            row,
            score["value"],
            color=color,
            xerr=[[score["value"] - score["low"]], [score["high"] - score["value"]]],
            error_kw={"elinewidth": 1},
            height=0.65,
        )
        axis.text(1.02, row, difference, va="center", fontsize=8)
    axis.axvline(signals[BASELINE]["auroc"]["value"], color=plots.EVEN_COLOR, linestyle=":")
    axis.axvline(0.5, color=plots.EVEN_COLOR, linewidth=0.8)
    axis.set_yticks(range(len(names)), [LABELS[name] for name in names])
    axis.set(
        xlim=(0, 1),
        xlabel="AUROC (0.5: chance)",
        title="hallucinated or not; right: over token probability (* after Holm)",
    )
    axis.grid(axis="y", visible=False)


def draw_reliability(axis: Axes, bins: Sequence[Fields], ece: float) -> None:
    """Predicted against observed share of hallucinated words, in bins of equal count."""
    axis.plot([0, 1], [0, 1], color=plots.EVEN_COLOR, linestyle=":", label="calibrated")
    axis.plot(
        [words["predicted"] for words in bins],
        [words["observed"] for words in bins],
        "o-",
        color=plots.BLUE,
        label=plots.with_n("all together", [words["n"] for words in bins]),
    )
    axis.set(
        xlim=(0, 1),
        ylim=(0, 1),
        xlabel="predicted",
        ylabel="observed share",
        title=f"calibration, ECE {ece:.3f}",
        aspect="equal",
    )
    axis.legend(loc="upper left")

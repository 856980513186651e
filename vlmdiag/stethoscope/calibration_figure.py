"""Which signals tell hallucinated object words from grounded ones, and can the probability be
believed? The figure of diagnostic_tools/viz_hallucination.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np

from vlmdiag.figures import plots, stats
from vlmdiag.types import Fields

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BASELINE = "log_probability"
CHANCE = 0.5  # AUROC
KINDS = {"captions": "captions", "pope": "POPE's questions"}
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
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.4), width_ratios=(3, 2))
    draw_signals(left, numbers["signals"])
    draw_reliability(right, numbers["reliability"], numbers["signals"]["all"]["ece"])
    hallucinated = f"{numbers['n_hallucinated']} of {numbers['n_words']}"
    figure.suptitle(
        f"Warning of {title.replace('__', ', ')}, words of {KINDS[kind]}: {hallucinated} object"
        f" words hallucinated in {numbers['n_images']} pictures",
        fontsize=10,
    )
    return figure


def draw_signals(axis: Axes, signals: Fields) -> None:
    """AUROC of each signal with its interval, from chance on, and the difference to plain token
    probability behind its name."""
    names = [name for name in LABELS if name in signals][::-1]
    rows = []
    for row, name in enumerate(names):
        score = signals[name]["auroc"]
        gain = signals[name]["over_baseline"]
        better = signals[name].get("beats_baseline", False)
        color = plots.SKY
        difference = f"{gain['value']:+.2f} ({gain['low']:+.2f} to {gain['high']:+.2f})"
        if name == BASELINE:
            color = plots.EVEN_COLOR
            difference = "(what the others are compared with)"
        elif better:
            color = plots.BLUE
            difference += " *"
        axis.barh(
            row,
            score["value"] - CHANCE,
            left=CHANCE,
            color=color,
            xerr=[[score["value"] - score["low"]], [score["high"] - score["value"]]],
            error_kw={"elinewidth": 1, "capsize": 2.5},
            height=0.65,
        )
        rows.append(f"{LABELS[name]}\n{difference}")
    axis.axvline(signals[BASELINE]["auroc"]["value"], color=plots.EVEN_COLOR, linestyle=":")
    axis.axvline(CHANCE, color=plots.EVEN_COLOR, linewidth=0.8)
    axis.set_yticks(range(len(names)), rows, fontsize=8.5)
    low = min(score["auroc"]["low"] for score in (signals[name] for name in names))
    axis.set(
        xlim=(min(0.45, low - 0.02), 1.01),
        xlabel="AUROC (0.5: chance; dotted: token probability), 95 % interval over pictures",
        title="hallucinated or not; below a name: over token probability (* after Holm)",
    )
    axis.grid(axis="y", visible=False)


def draw_reliability(axis: Axes, bins: Sequence[Fields], ece: float) -> None:
    """Predicted against observed share of hallucinated words, in bins of equal count."""
    axis.plot([0, 1], [0, 1], color=plots.EVEN_COLOR, linestyle=":", label="calibrated")
    n = np.array([words["n"] for words in bins])
    observed = np.array([words["observed"] for words in bins])
    interval = stats.proportion_interval(np.round(observed * n), n)
    axis.errorbar(
        [words["predicted"] for words in bins],
        observed,
        yerr=np.clip([observed - interval.low, interval.high - observed], 0, None),
        fmt="o",
        color=plots.BLUE,
        elinewidth=1,
        capsize=2.5,
        label=plots.with_n("words in a bin, exact 95 %", n),
    )
    axis.set(
        xlim=(0, 1),
        ylim=(0, 1),
        xlabel="predicted",
        ylabel="observed share",
        title=f"calibration, ECE {ece:.3f}",
        aspect="equal",
    )
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), frameon=False)

"""Norms of vision and text tokens as violins over a logarithmic axis, of one model or of several.

Beyond Semantics (arXiv 2503.17349), figure 3. The densities are of log10 norms (the published
script estimates them of the norms themselves and shows those on a logarithmic axis).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.ticker import LogLocator

from vlmdiag.beyond_semantics.token_norms import GROUPS
from vlmdiag.figures import plots
from vlmdiag.types import Fields

if TYPE_CHECKING:
    from jaxtyping import Float
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from scipy.stats import gaussian_kde

    Norms = Float[np.ndarray, " tokens"]

SPIKE = 0.02  # decades: norms within so little are one value, drawn as a line and not as a density
HALF = 0.33  # half the width of a violin; rows are 1 apart
COLORS = {"text": plots.color_of("user"), "vision": plots.color_of("vision")}
KEY = (
    "width: density per decade, scaled to its peak (a line: all tokens have one norm)\n"
    "lines: quartiles; mark below: mean over images, 95 % interval"
)


def bandwidth(kde: gaussian_kde) -> float:
    """Silverman's bandwidth of log10 norms in units of their deviation."""
    logs = kde.dataset[0]
    deviation = float(logs.std(ddof=1))
    quartile_range = np.subtract(*np.quantile(logs, (0.75, 0.25)))
    spread = min(deviation, quartile_range / 1.349 or np.inf)
    return float(0.9 * spread * len(logs) ** -0.2 / deviation)


def draw(measured: Mapping[str, tuple[Mapping[str, Norms], Fields]]) -> Figure:
    """A violin for each group of each model on one axis, each as wide as its own peak; quartiles
    inside, mean over images with its interval below. measured: {model: (the norms of all tokens by
    group, {group: summarize()})}."""
    rows = [(model, group) for model in reversed(list(measured)) for group in GROUPS]
    figure, axis = plt.subplots(figsize=(8.4, 1.5 + 0.95 * len(rows)))
    draw_violins(axis, [(group, measured[model][0][group]) for model, group in rows])
    labels = []
    for row, (model, group) in enumerate(rows):
        numbers = measured[model][1][group]
        mean = numbers["mean_over_images"]
        sides = None
        if numbers["low"] is not None:
            sides = [[mean - numbers["low"]], [numbers["high"] - mean]]
        axis.errorbar([mean], [row - 0.41], xerr=sides, color=COLORS[group], marker="|", capsize=3)
        name = f"{model}\n" if len(measured) > 1 else ""
        what = "vision tokens" if group == "vision" else "text tokens"
        labels.append(
            f"{name}{what}, mean {numbers['mean']:.3g}\n{numbers['tokens']:,} tokens,"
            f" {numbers['images']} images"
        )
    of_model = "" if len(measured) > 1 else f", {next(iter(measured))}"
    axis.set(
        ylim=(-0.65, len(rows) - 0.5),
        xlabel=f"L2 norm of a token at the decoder's input (log scale)\n{KEY}",
        ylabel="",
        title=f"Norms of vision and text tokens as they enter the language model{of_model}",
    )
    axis.set_yticks(range(len(rows)), labels, fontsize=8.5)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    axis.xaxis.set_minor_formatter("{x:g}")
    axis.grid(axis="y", visible=False)
    for edge in range(2, len(rows), 2):
        axis.axhline(edge - 0.57, color=plots.EVEN_COLOR, linewidth=0.6)
    return figure


def draw_violins(axis: Axes, rows: Sequence[tuple[str, Norms]]) -> None:
    """(group, norms) of each row, row 0 at the bottom, as a violin with its quartiles, or as a line
    where all norms are one. A norm of 0 has no logarithm and is left out."""
    axis.set_xscale("log")
    broad = {}
    for row, (group, norms) in enumerate(rows):
        positive = norms[norms > 0]
        low, middle, high = np.quantile(positive, (0, 0.5, 1))
        if np.log10(high / low) < SPIKE:
            axis.plot([middle] * 2, [row - HALF, row + HALF], color=COLORS[group], linewidth=2.5)
        else:
            broad[row] = positive
    before = len(axis.lines)
    if broad:
        sns.violinplot(
            broad,
            ax=axis,
            orient="h",
            native_scale=True,
            log_scale=(True, False),
            bw_method=bandwidth,
            cut=4,
            gridsize=512,
            density_norm="width",
            width=2 * HALF / min(np.diff(list(broad)), default=1),
            inner="quart",
            inner_kws={"color": "#222222"},
            palette=[COLORS[rows[row][0]] for row in broad],
            saturation=1,
            linewidth=0,
        )
    for violin in axis.collections:
        violin.set_alpha(0.55)
    # seaborn draws three lines a violin: first quartile, median, third quartile
    for i, line in enumerate(axis.lines[before:]):
        median = i % 3 == 1
        line.set(linestyle="-" if median else "--", linewidth=1.6 if median else 0.9)

"""Norms of vision and text tokens as two violins over a logarithmic axis.

Beyond Semantics (arXiv 2503.17349), figure 3. The densities are of log10 norms (the published
script estimates them of the norms themselves and shows those on a logarithmic axis).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator

from vlmdiag.beyond_semantics.token_norms import GROUPS
from vlmdiag.figures import plots
from vlmdiag.types import Fields

if TYPE_CHECKING:
    from jaxtyping import Float
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from scipy.stats import gaussian_kde

NARROWEST = 0.01  # decades: the least bandwidth, so that equal norms are a spike that is seen
COLORS = {"text": plots.color_of("user"), "vision": plots.color_of("vision")}
KEY = (
    "width: density per decade, scaled to its peak; lines: quartiles; dot: mean over images, 95 %"
    " interval"
)


def bandwidth(kde: gaussian_kde) -> float:
    """Silverman's bandwidth of log10 norms in units of their deviation, at least NARROWEST."""
    logs = kde.dataset[0]
    deviation = logs.std(ddof=1)
    quartile_range = np.subtract(*np.quantile(logs, (0.75, 0.25)))
    spread = min(deviation, quartile_range / 1.349 or np.inf)
    return max(0.9 * spread * len(logs) ** -0.2, NARROWEST) / deviation


def draw(pooled: Mapping[str, Float[np.ndarray, " tokens"]], summary: Fields, model: str) -> Figure:
    """One violin a group, each as wide as its own peak; quartiles inside, mean over images with its
    interval below. pooled: the norms of all tokens; summary: {group: summarize()}."""
    figure, axis = plt.subplots(figsize=(8.4, 4.6))
    draw_violins(axis, pooled)
    handles = []
    for row, group in enumerate(GROUPS):
        numbers = summary[group]
        label = (
            f"{group}: n = {numbers['tokens']:,} tokens of {numbers['images']} images, mean"
            f" {numbers['mean']:.3g}"
        )
        handles.append(Patch(color=COLORS[group], alpha=0.55, label=label))
        mean = numbers["mean_over_images"]
        sides = None
        if numbers["low"] is not None:
            sides = [[mean - numbers["low"]], [numbers["high"] - mean]]
        axis.errorbar(
            [mean],
            [row - 0.45],
            xerr=sides,
            color=COLORS[group],
            marker="o",
            markersize=4,
            capsize=3,
            linestyle="none",
        )
    axis.set(
        ylim=(-0.6, len(GROUPS) - 0.45),
        xlabel="L2 norm of a token at the decoder's input (log scale)",
        ylabel="",
        title=f"Norms of vision and text tokens as they enter the language model, {model}",
    )
    axis.set_yticks(
        range(len(GROUPS)),
        ["text tokens\n(embedding table)", "vision tokens\n(after the connector)"],
    )
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    axis.xaxis.set_minor_formatter("{x:g}")
    axis.grid(axis="y", visible=False)
    # in the order of the rows, top first
    figure.legend(handles=handles[::-1], loc="outside lower center", title=KEY, title_fontsize=8.5)
    return figure


def draw_violins(axis: Axes, pooled: Mapping[str, Float[np.ndarray, " tokens"]]) -> None:
    """The violins with their quartiles, row 0 for the first group. A norm of 0 has no logarithm and
    is left out."""
    norms = {group: pooled[group][pooled[group] > 0] for group in GROUPS}
    sns.violinplot(
        norms,
        ax=axis,
        orient="h",
        log_scale=True,
        bw_method=bandwidth,
        cut=4,
        gridsize=512,
        density_norm="width",
        width=0.76,
        inner="quart",
        inner_kws={"color": "#222222"},
        palette=COLORS,
        saturation=1,
        linewidth=0,
    )
    for violin in axis.collections:
        violin.set_alpha(0.55)
    # seaborn draws three lines a violin: first quartile, median, third quartile
    for i, line in enumerate(axis.lines):
        median = i % 3 == 1
        line.set(linestyle="-" if median else "--", linewidth=1.6 if median else 0.9)

"""Perturbation curves, the areas under them and localisation of every method as figures. Used by
diagnostic_tools/relevancy_evaluation_plot.py; the numbers: evaluation_tables.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np

from vlmdiag.figures import plots, stats
from vlmdiag.relevancy import perturbation
from vlmdiag.relevancy.evaluation_tables import LOCAL, against

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from vlmdiag.figures.stats import Interval
    from vlmdiag.relevancy.evaluation_tables import Chosen, Evaluation

COLORS = {
    "relevancy": plots.VERMILION,
    "relevancy_decoder": plots.ORANGE,
    "gradient_attention": plots.YELLOW,
    "raw_attention": plots.BLUE,
    "rollout": plots.SKY,
    "input_gradient": plots.GREEN,
    "integrated_gradients": plots.PURPLE,
    "random": plots.EVEN_COLOR,
    "centre": "#999999",
    "object": "#332288",
}
WORDS = {
    "relevancy": "relevancy",
    "relevancy_decoder": "relevancy, decoder only",
    "gradient_attention": "gradient x attention",
    "raw_attention": "attention",
    "rollout": "attention rollout",
    "input_gradient": "input x gradient",
    "integrated_gradients": "integrated gradients",
    "random": "random order",
    "centre": "distance from the centre",
    "object": "the object's own mask",
}
BANDED = ("relevancy", "random")  # curves whose bands are drawn; the areas have every interval
STYLES = {"random": "--", "centre": ":", "object": "-."}
HOW = {
    "mean": "replaced by the picture's mean",
    "drop": "left out of the sequence",
    "blur": "blurred in the picture",
}
WAYS = (
    "positive: most relevant first, lower is better",
    "negative: least relevant first, higher is better",
)
AREA_TITLES = (
    "positive area (lower is better)",
    "negative area (higher is better)",
    "gap: negative - positive",
    "gap - gap of random, paired",
)


def at(interval: Interval, *cell: int | slice | list[int]) -> Interval:
    """The part of an interval's arrays at an index."""
    return stats.Interval(*(bound[cell] for bound in interval))


def curves_figure(evaluation: Evaluation, label: str, chosen: Chosen, title: str) -> Figure:
    """p(s) / p(0) over s: a row of axes for each way of removal, positive and negative beside each
    other. Bands of BANDED only: those of all would hide each other."""
    rows = len(evaluation.removal)
    size = (10.5, 3.4 * rows + 1.6)
    figure, axes = plt.subplots(rows, 2, figsize=size, sharex=True, sharey=True, squeeze=False)
    for axis_row, removal in zip(axes, evaluation.removal, strict=True):
        ratios = [perturbation.ratio(curves) for curves in evaluation.curves[removal]]
        means = stats.mean_interval(evaluation.per_image(ratios, chosen))  # (M, 2, K)
        for way, axis in enumerate(axis_row):
            for m, method in enumerate(evaluation.methods):
                if means.n[m].max() > 0:
                    _curve(axis, evaluation, method, at(means, m, way))
            axis.set_title(f"{WAYS[way]}\n{HOW[removal]}")
            axis.set_ylabel("p(s) / p(0) of the token" if way == 0 else "")
    for axis in axes[-1]:
        axis.set_xlabel("share s of the vision tokens removed")
    top = max(line.get_ydata().max() for axis in axes.flat for line in axis.lines)
    axes[0, 0].set_ylim(0, 1.08 * top)  # of the means; an interval of few images may reach beyond
    handles = {}
    for axis in axes[:, 0]:
        for handle, name in zip(*axis.get_legend_handles_labels(), strict=True):
            handles[name] = handle
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False
    )
    about = f"Faithfulness of relevancy maps, {label}: {title}"
    figure.suptitle(f"{about}\nbands: 95 % intervals over images", fontsize=10.5)
    return figure


def _curve(axis: Axes, evaluation: Evaluation, method: str, interval: Interval) -> None:
    color = COLORS[method]
    axis.plot(
        evaluation.shares,
        interval.mean,
        color=color,
        linestyle=STYLES.get(method, "-"),
        linewidth=2.4 if method in BANDED else 1.3,
        label=plots.with_n(WORDS[method], interval.n),
    )
    if method in BANDED:
        axis.fill_between(
            evaluation.shares, interval.low, interval.high, color=color, alpha=0.18, linewidth=0
        )


def areas_figure(evaluation: Evaluation, label: str, chosen: Chosen, title: str) -> Figure:
    """Areas of p(s) / p(0): positive, negative, gap, and the gap's paired difference to random."""
    rows = len(evaluation.removal)
    size = (13, 1.1 + rows * (0.4 + 0.26 * len(evaluation.methods)))
    figure, axes = plt.subplots(rows, 4, figsize=size, sharex="col", sharey=True, squeeze=False)
    for axis_row, removal in zip(axes, evaluation.removal, strict=True):
        values = evaluation.areas(removal, chosen)  # (n, M, 3)
        means = stats.mean_interval(values)
        for index, axis in enumerate(axis_row[:3]):
            of_measure = at(means, slice(None), index)
            if index < 2:  # no ratio of probabilities is below 0
                of_measure = of_measure._replace(low=np.maximum(of_measure.low, 0))
            _points(axis, evaluation.methods, of_measure)
        change = against(values, evaluation.methods, "random")
        if change is not None:
            _points(axis_row[3], evaluation.methods, at(change, slice(None), 2))
            axis_row[3].axvline(0, color=plots.EVEN_COLOR, linestyle="--", linewidth=1.2)
        axis_row[0].set_ylabel(f"{HOW[removal]}\nn = {means.n.max()} images", fontsize=8.5)
    for index, name in enumerate(AREA_TITLES):
        axes[0, index].set_title(name)
        axes[-1, index].set_xlabel("difference" if index == 3 else "mean of p(s) / p(0) over s")
    figure.suptitle(f"Faithfulness of relevancy maps, {label}: {title}", fontsize=10.5)
    return figure


def local_figure(evaluation: Evaluation, label: str, chosen: Chosen, title: str) -> Figure:
    """Pointing and energy of every method; the priors are lines."""
    methods = [method for method in evaluation.methods if method not in ("centre", "object")]
    rows = [evaluation.methods.index(method) for method in methods]
    size = (10.5, 1.6 + 0.3 * len(methods))
    figure, axes = plt.subplots(1, 2, figsize=size, sharey=True)
    for axis, (measure, xlabel) in zip(axes, LOCAL.items(), strict=True):
        values, prior = evaluation.located(measure, chosen)
        means = stats.mean_interval(values, bounds=stats.SHARES, discrete=measure == "pointing")
        _points(axis, methods, at(means, rows))
        colors = [COLORS[method] for method in methods]
        axis.barh(range(len(methods)), means.mean[rows], color=colors, alpha=0.45)
        lines = {
            "area prior": (stats.measured_mean(prior), "--"),
            "centre prior": (means.mean[evaluation.methods.index("centre")], ":"),
        }
        if measure == "energy":
            of_object = means.mean[evaluation.methods.index("object")]
            lines["the object's own mask"] = (of_object, "-.")
        for name, (value, style) in lines.items():
            axis.axvline(
                value, color="black", linestyle=style, linewidth=1.2, label=f"{name} {value:.3f}"
            )
        game = "pointing game" if measure == "pointing" else "mask energy"
        axis.set(xlabel=xlabel, title=f"{game}, n = {means.n.max()} images", xlim=(0, None))
    plots.legends(list(axes), below=True)
    figure.suptitle(f"Maps and the masks of objects, {label}: {title}", fontsize=10.5)
    return figure


def _points(axis: Axes, methods: Sequence[str], means: Interval) -> None:
    """A mean with its interval for each method, one below the other."""
    for m, method in enumerate(methods):
        mean, low, high, n = at(means, m)
        axis.errorbar(
            mean,
            m,
            xerr=[[mean - low], [high - mean]] if n > 1 else None,
            fmt="o",
            color=COLORS[method],
            capsize=3,
            markersize=5,
        )
    axis.set_ylim(len(methods) - 0.5, -0.5)
    axis.set_yticks(range(len(methods)), [WORDS[method] for method in methods])

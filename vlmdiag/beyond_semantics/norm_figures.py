"""How much longer the hidden states of image tokens are than those of text tokens: norms of several
runs, from the embeddings to the last layer.

Beyond Semantics (arXiv 2503.17349), figure 4; docs/studies/beyond_semantics.md, sections 1.7 and
2.3. Used by diagnostic_tools/viz_hidden_norms.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter

from vlmdiag.figures import plots, stats
from vlmdiag.figures.layers import STATE_AXIS
from vlmdiag.runs import selection

if TYPE_CHECKING:
    from jaxtyping import Float
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from vlmdiag.figures.stats import Interval
    from vlmdiag.runs.rundirs import Run

UNITS = {"l2": "L2", "rms": "root mean square"}  # by the run's hidden_norm_kind


class Norms(NamedTuple):
    """Mean norms of a run's images at each of the L + 1 hidden states."""

    ids: list[str]
    user: Float[np.ndarray, "n states"]
    vision: Float[np.ndarray, "n states"]


class NormCurves(NamedTuple):
    """Intervals over images, (states,) each."""

    user_text: Interval
    vision: Interval
    ratio: Interval  # of the two norms within an image


def read_norms(run: Run) -> Norms:
    """The norms of one run, of its images in the order of their ids."""
    names = ["hidden_norms_user_text", "hidden_norms_vision"]
    advice = "make them with run_coco_diagnostics.py --probe_hidden_norms"
    ids, arrays = selection.read_arrays(run, names, advice)
    user, vision = (arrays[name].astype(np.float64) for name in names)
    return Norms(ids, user, vision)


def curves_of(norms: Norms, shown: list[str]) -> NormCurves:
    """Curves over the shown images."""
    rows = np.isin(norms.ids, shown)
    user = norms.user[rows]
    vision = norms.vision[rows]
    undefined = np.full_like(vision, np.nan)
    ratio = np.divide(vision, user, out=undefined, where=user > 0)
    return NormCurves(*(stats.mean_interval(values) for values in (user, vision, ratio)))


def log10(interval: Interval) -> Interval:
    """The interval of log10 of a positive mean: log10 is monotone, so the bounds carry over."""
    with np.errstate(divide="ignore"):
        mean, low, high = (np.log10(bound) for bound in interval[:3])
    return stats.Interval(mean, low, high, interval.n)


def early_mean(ratio: Interval, early_k: int) -> float:
    """Mean log10 ratio over the first early_k hidden states."""
    return float(stats.measured_mean(log10(ratio).mean[:early_k]))


def shade(axis: Axes, early_k: int) -> None:
    """Mark the first hidden states; none for early_k = 0."""
    if early_k:
        axis.axvspan(-0.5, early_k - 0.5, color="#000000", alpha=0.07, linewidth=0, zorder=0)


def scale_norms(axes: Sequence[Axes], unit: str, logy: bool) -> None:
    """The same axis of norms for all of a row of panels, which share it."""
    for axis in axes:
        axis.set_yscale("log" if logy else "linear")
        if logy:
            _plain_ticks(axis)
        else:
            axis.set_ylim(bottom=0)
    axes[0].set_ylabel(f"mean norm of a token ({unit})")


def _plain_ticks(axis: Axes) -> None:
    """1, 2, 5, 10 on a logarithmic axis."""
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())


def average_figure(
    norms: Mapping[str, NormCurves],
    colors: Mapping[str, str],
    unit: str,
    early_k: int,
    logy: bool = False,
    linear_ratio: bool = False,
    system_prompt: bool = True,
) -> Figure:
    """Three panels, a line a run: user text norm and vision norm on one axis, ratio. norms, colors:
    by title."""
    figure = plt.figure(figsize=(14, 4.9))
    user_axis, vision_axis, ratio_axis = figure.subplots(1, 3)
    vision_axis.sharey(user_axis)
    vision_axis.tick_params(labelleft=False)
    handles = []
    for title, curves in norms.items():
        states = np.arange(len(curves.ratio.mean))
        color = colors[title]
        line = plots.line_with_band(user_axis, states, curves.user_text, title, color)
        plots.line_with_band(vision_axis, states, curves.vision, title, color)
        ratio = curves.ratio if linear_ratio else log10(curves.ratio)
        plots.line_with_band(ratio_axis, states, ratio, title, color)
        early = f": {early_mean(curves.ratio, early_k):+.2f}" if early_k else ""
        handles.append(Line2D([], [], color=color, label=f"{line.get_label()}{early}"))
    shade(ratio_axis, early_k)
    equal = 1 if linear_ratio else 0
    ratio_axis.axhline(equal, color=plots.EVEN_COLOR, linestyle="--", linewidth=1)
    user_axis.set_title("User text tokens")
    vision_axis.set_title("Vision tokens")
    scale_norms((user_axis, vision_axis), unit, logy)
    ratio_axis.set(
        title="Vision norm / user text norm (dashed: equal)",
        ylabel="mean ratio" if linear_ratio else "log10 of the mean ratio",
    )
    for axis in (user_axis, vision_axis, ratio_axis):
        axis.set_xlabel(f"{STATE_AXIS}\nbefore the final norm", fontsize=9)
    early = f"; number: mean log10 ratio over the first {early_k} (shaded)" if early_k else ""
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=3,
        title=f"mean over images, band: 95 % interval{early}",
        title_fontsize=8.5,
    )
    prompt = "with" if system_prompt else "without"
    figure.suptitle(f"Hidden-state norms by token group, {prompt} the system prompt", fontsize=10.5)
    return figure


def image_figure(
    norms: Mapping[str, NormCurves], unit: str, early_k: int, id: str, logy: bool = False
) -> Figure:
    """One column a run: the two norms of one image above, their ratio on a logarithmic axis below;
    each row has one axis."""
    size = (max(3.6 * len(norms) + 0.8, 5.6), 6.4)
    figure, axes = plt.subplots(
        2, len(norms), figsize=size, sharex="col", sharey="row", squeeze=False, height_ratios=(3, 2)
    )
    for axis, below, (title, curves) in zip(*axes, norms.items()):
        states = np.arange(len(curves.ratio.mean))
        for group, interval in (("user", curves.user_text), ("vision", curves.vision)):
            label = "user text" if group == "user" else group
            plots.line_of(axis, states, interval.mean, color=plots.color_of(group), label=label)
        plots.line_of(below, states, curves.ratio.mean, color=plots.EVEN_COLOR)
        below.axhline(1, color=plots.EVEN_COLOR, linestyle="--", linewidth=1)
        shade(below, early_k)
        if early_k:
            early = early_mean(curves.ratio, early_k)
            title = f"{title}\nmean log10 ratio, first {early_k}: {early:+.2f}"
        axis.set_title(title)
        below.set_xlabel("hidden state (0: embeddings)", fontsize=9)
        plots.layer_ticks(below)
    scale_norms(list(axes[0]), unit, logy)
    for below in axes[1]:
        below.set_yscale("log")
        _plain_ticks(below)
    axes[1, 0].set_ylabel("vision / user text")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    figure.suptitle(f"Hidden-state norms before the final norm, image {id}")
    return figure

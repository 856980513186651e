"""How much longer the hidden states of image tokens are than those of text tokens: norms of several
runs, from the embeddings to the last layer.

Beyond Semantics (arXiv 2503.17349), figure 4; docs/studies/beyond_semantics.md, sections 1.7 and
2.3. Used by diagnostic_tools/viz_hidden_norms.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import matplotlib.pyplot as plt
import numpy as np

from vlmdiag.figures import plots, stats
from vlmdiag.figures.layers import STATE_AXIS
from vlmdiag.runs import selection

if TYPE_CHECKING:
    from jaxtyping import Float
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

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


def shade(axis: Axes, early_k: int) -> list[Patch]:
    """Mark the first hidden states; [the patch], or [] for early_k = 0."""
    if not early_k:
        return []
    patch = axis.axvspan(
        -0.5,
        early_k - 0.5,
        color="#000000",
        alpha=0.07,
        linewidth=0,
        label=f"first {early_k} hidden states",
        zorder=0,
    )
    return [patch]


def average_figure(
    norms: Mapping[str, NormCurves],
    colors: Mapping[str, str],
    unit: str,
    early_k: int,
    logy: bool = False,
    linear_ratio: bool = False,
) -> Figure:
    """Three panels, a line a run: user text norm, vision norm, ratio. norms, colors: by title."""
    figure, axes = plt.subplots(1, 3, figsize=(16, 4.8))
    user_axis, vision_axis, ratio_axis = axes
    for title, curves in norms.items():
        states = np.arange(len(curves.ratio.mean))
        color = colors[title]
        plots.line_with_band(user_axis, states, curves.user_text, title, color)
        plots.line_with_band(vision_axis, states, curves.vision, title, color)
        ratio = curves.ratio if linear_ratio else log10(curves.ratio)
        label = f"{title}: {early_mean(curves.ratio, early_k):+.2f}" if early_k else title
        plots.line_with_band(ratio_axis, states, ratio, label, color)
    shade(ratio_axis, early_k)
    ratio_axis.axhline(
        1 if linear_ratio else 0,
        color=plots.EVEN_COLOR,
        linestyle="--",
        linewidth=1,
        label="equal norms",
    )
    for axis, name in ((user_axis, "User text tokens"), (vision_axis, "Vision tokens")):
        axis.set(title=name, ylabel=f"mean norm of a token ({unit})")
        axis.set_yscale("log" if logy else "linear")
        if not logy:
            axis.set_ylim(bottom=0)
    ratio_axis.set(
        title="Vision norm / user text norm of an image",
        ylabel="mean ratio" if linear_ratio else "log10 of the mean ratio",
    )
    for axis in axes:
        axis.set_xlabel(f"{STATE_AXIS}\nbefore the final norm", fontsize=9)
    early = f"mean log10 ratio over the first {early_k}" if early_k else None
    plots.legends(axes, [None, None, early])
    return figure


def image_figure(
    norms: Mapping[str, NormCurves], unit: str, early_k: int, id: str, logy: bool = False
) -> Figure:
    """One panel a run: the two norms of one image, their ratio on the right axis."""
    columns = min(len(norms), 3)
    rows = -(-len(norms) // columns)
    size = (max(5.6 * columns, 8), 4.4 * rows + 0.4)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
    for axis in axes.flat[len(norms) :]:
        axis.remove()
    for axis, (title, curves) in zip(axes.flat, norms.items()):
        states = np.arange(len(curves.ratio.mean))
        user_color, vision_color = plots.color_of("user"), plots.color_of("vision")
        lines = axis.plot(states, curves.user_text.mean, color=user_color, label="user text")
        lines += axis.plot(
            states, curves.vision.mean, color=vision_color, linestyle="--", label="vision"
        )
        right = axis.twinx()
        lines += right.plot(
            states,
            curves.ratio.mean,
            color=plots.EVEN_COLOR,
            linestyle=":",
            label="vision / user text (right axis)",
        )
        right.spines["right"].set_visible(True)
        right.grid(False)
        right.set(ylabel="ratio of the norms", ylim=(0, None))
        lines += shade(axis, early_k)
        if early_k:
            early = early_mean(curves.ratio, early_k)
            title = f"{title}\nmean log10 ratio over the first {early_k}: {early:+.2f}"
        axis.set(title=title, ylabel=f"mean norm of a token ({unit})")
        axis.set_yscale("log" if logy else "linear")
        axis.set_xlabel(f"{STATE_AXIS}\nbefore the final norm", fontsize=9)
        plots.layer_ticks(axis)
    figure.legend(handles=lines, loc="outside lower center", ncols=4)
    figure.suptitle(f"Hidden-state norms, image {id}")
    return figure

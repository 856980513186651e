"""Colours, words and axes that all figures of the swap analysis share. Palette of
docs/studies/swap_analysis.md, section 3.4."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import to_hex
from matplotlib.lines import Line2D

from vlmdiag.figures import plots
from vlmdiag.figures.layers import LAYER_AXIS
from vlmdiag.swap.relations import GROUPS
from vlmdiag.swap.saved import CONDITIONS, samples_seen
from vlmdiag.types import Record

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from vlmdiag.swap.saved import Curve

# {category: (acc_orig, acc_swap)} of unreliable(); a scale's name where only that is marked
Marked = Mapping[str, tuple[float, float]]

CATEGORY_COLORS = {
    "left": "#ff7f0e",
    "right": "#ffbb78",
    "above": "#2ca02c",
    "under": "#98df8a",
    "far": "#9467bd",
    "close": "#c5b0d5",
}
GROUP_COLORS = {group: CATEGORY_COLORS[canonical] for group, (canonical, _) in GROUPS.items()}
SCALE_MAP = "viridis_r"  # scales with an amount of data: more is darker
OTHER_SCALES = [plots.VERMILION, plots.PURPLE, plots.ORANGE, plots.SKY, "#661100"]
SPLIT_COLORS = {"consistent": plots.BLUE, "counter": plots.VERMILION, "ambiguous": plots.EVEN_COLOR}
WORDS = {
    "all": "all pairs",
    "both_correct": "pairs answered right in both orders",
    "all_with_validity": "all pairs",
}
ALIGNMENT_COLORS = {
    "per_sample_mean": plots.VERMILION,
    "mean_delta_alignment": plots.PURPLE,
    "permutation": plots.EVEN_COLOR,
}
UNRELIABLE = "\u2020 accuracy under 0.5 in the original or the swapped order: "
ALL_RELIABLE = "every category shown is reliable, so this is the figure of plots/all"


def model_of(folder: str | Path) -> str:
    """The model of a results folder in words: 'tiny, corridor' of results/tiny__corridor."""
    return Path(folder).name.replace("__", ", ")


def scale_colors(scales: Sequence[str]) -> dict[str, str]:
    """{scale: colour}: those with an amount of data from light to dark in its order, the others,
    such as another model's, in colours that stand out from these."""
    ordered = sorted(
        (scale for scale in set(scales) if not np.isnan(samples_seen(scale))),
        key=lambda scale: (samples_seen(scale), scale),
    )
    places = np.linspace(1, 0.15, len(ordered))[::-1]
    colors = {
        scale: to_hex(plt.get_cmap(SCALE_MAP)(place))
        for scale, place in zip(ordered, places, strict=True)
    }
    for number, scale in enumerate(sorted(set(scales) - set(ordered))):
        colors[scale] = OTHER_SCALES[number % len(OTHER_SCALES)]
    return {scale: colors[scale] for scale in scales}


def scale_legend(fig: Figure, colors: Mapping[str, str], null: str | None = None) -> None:
    """One legend of the scales for all panels, below them. null: what the dotted lines are."""
    handles = [
        Line2D([], [], color=color, marker="o", markersize=3, label=scale)
        for scale, color in colors.items()
    ]
    if null:
        handles.append(
            Line2D([], [], color=plots.EVEN_COLOR, linestyle=":", linewidth=1, label=null)
        )
    fig.legend(handles=handles, loc="outside lower center", ncols=8, frameon=False)


def note_below(ax: Axes, notes: Sequence[str]) -> None:
    """Lines under the label of the x axis, empty ones left out."""
    lines = [ax.get_xlabel(), *(textwrap.fill(note, 64) for note in notes if note)]
    ax.set_xlabel("\n".join(lines), fontsize=9)


def curve_label(name: str, curve: Curve, gap: str = "too few") -> str:
    """The legend's words of one series: n, and where too few pairs left a gap."""
    measured = measured_n(curve)
    gaps = gaps_of(curve, gap)
    if np.isnan(curve["mean"]).all():
        return f"{name}: {gaps}"
    label = plots.with_n(name, measured) if len(measured) else name
    return f"{label}; {gaps}" if gaps else label


def measured_n(curve: Curve) -> np.ndarray:
    """n of a series where it has a value; empty where n is unknown."""
    n = curve.get("n", np.array([]))
    return n[~np.isnan(n) & ~np.isnan(curve["mean"])].astype(int) if n.size else n


def gaps_of(curve: Curve, gap: str = "too few") -> str:
    """Where too few pairs left a gap in a series, '' where there is none."""
    mean = curve["mean"]
    gaps = curve["layer"][np.isnan(mean)]
    if len(gaps) == len(mean):
        n = curve.get("n", np.array([]))
        return f"too few pairs (n = {n[~np.isnan(n)].astype(int).max(initial=0)})"
    shown = [f"L{layer}" for layer in gaps[:3]]
    if len(gaps) > 3:
        shown.append("...")
    return f"{gap} at {', '.join(shown)}" if shown else ""


def path_of(folder: str | Path, condition: str, *parts: str) -> Path:
    """Where a figure goes."""
    return Path(folder, "plots", condition, *parts)


def settings_of(folder: str | Path, condition: str, **more: object) -> Record:
    """What a figure's metadata say."""
    tag = CONDITIONS.get(condition)
    return {"results": Path(folder).name, "condition": condition, "tag": tag} | more


def listed(marked: Marked) -> str:
    """The unreliable categories with their accuracies."""
    words = []
    for name, (orig, swap) in marked.items():
        is_empty = np.isnan(orig) and np.isnan(swap)
        words.append(f"{name} (no pairs)" if is_empty else f"{name} {orig:.2f} / {swap:.2f}")
    return ", ".join(words)


def footnote(fig: Figure, condition: str, marked: Marked) -> None:
    """What a figure of all_with_validity says of its categories; nothing for other conditions."""
    if condition == "all_with_validity":
        text = UNRELIABLE + listed(marked) if marked else ALL_RELIABLE
        fig.supxlabel(text, fontsize=8, color="#444444")


def legend(ax: Axes, columns: int = 3) -> None:
    """Inside the axes while it is short, else below in columns."""
    handles, labels = ax.get_legend_handles_labels()
    if len(handles) > 4 or max(map(len, labels)) > 40:
        legend_below(ax, handles, columns)
    else:
        ax.legend()


def legend_below(ax: Axes, handles: Sequence[Artist] | None = None, columns: int = 3) -> None:
    """Below the axes; handles: all of the axes by default."""
    ax.legend(
        handles=ax.get_legend_handles_labels()[0] if handles is None else handles,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.14),
        ncol=columns,
        frameon=False,
        handletextpad=0.3,
        columnspacing=1.0,
        fontsize=8,
    )


def dagger(name: str, marked: Collection[str]) -> str:
    """The name, with a dagger where it or a category of its group is marked."""
    members = GROUPS.get(name, (name,))
    return f"{name} \u2020" if any(member in marked for member in members) else name


def say(ax: Axes, text: str) -> None:
    """A line in the middle of empty axes."""
    ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center", color="#555555")


def draw_curve(ax: Axes, curve: Curve, label: str, color: str, **line: Any) -> bool:
    """One series over layers with its interval and, dotted with two standard deviations, its null.
    Returns whether the null was drawn."""
    layer = curve["layer"]
    ax.plot(layer, curve["mean"], color=color, label=label, marker="o", markersize=3, **line)
    if "low" in curve and "high" in curve:
        ax.fill_between(layer, curve["low"], curve["high"], color=color, alpha=0.18, linewidth=0)
    null = curve.get("null_mean")
    if null is None or np.isnan(null).all():
        return False
    spread = 2 * np.nan_to_num(curve.get("null_std", np.zeros(len(null))))
    ax.plot(layer, null, color=color, linestyle=":", linewidth=1)
    low, high = null - spread, null + spread
    ax.fill_between(layer, low, high, color=plots.EVEN_COLOR, alpha=0.1, linewidth=0)
    return True


def within_cosines(curve: Curve) -> Curve:
    """The series with its interval cut at -1 and 1, which no cosine and no mean of them leaves."""
    return curve | {end: np.clip(curve[end], -1, 1) for end in ("low", "high") if end in curve}


def null_handle(ax: Axes, text: str) -> None:
    """A legend entry for the nulls."""
    ax.plot([], [], color=plots.EVEN_COLOR, linestyle=":", linewidth=1, label=text)


def layer_axes(ax: Axes, title: str, ylabel: str) -> None:
    """Axes of a figure over layers, with a line at 0."""
    ax.axhline(0, color=plots.EVEN_COLOR, linewidth=0.8, zorder=1)
    ax.set(title=title, xlabel=LAYER_AXIS, ylabel=ylabel)
    plots.layer_ticks(ax)

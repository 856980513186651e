"""Colours, words and axes that all figures of the swap analysis share. Palette of
docs/studies/swap_analysis.md, section 3.4."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.colors import to_rgb

from vlmdiag.figures import plots
from vlmdiag.figures.layers import LAYER_AXIS
from vlmdiag.swap.relations import GROUPS
from vlmdiag.swap.saved import CONDITIONS
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
SCALE_COLORS = {
    "vanilla": "#1f77b4",
    "80k": "#ff7f0e",
    "400k": "#2ca02c",
    "800k": "#d62728",
    "2m": "#9467bd",
    "roborefer": "#8c564b",
}
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


def scale_colors(scales: Sequence[str]) -> dict[str, str]:
    """{scale: colour}: the published ones' own, any other from plots.CYCLE, far from the colours
    that the figure's other scales have."""
    colors = {scale: SCALE_COLORS[scale] for scale in scales if scale in SCALE_COLORS}
    # grey is for nulls
    cycle = [color for color in plots.CYCLE if len(set(to_rgb(color))) > 1]
    for scale in sorted(set(scales) - set(colors)):
        start = zlib.crc32(scale.encode()) % len(cycle)
        candidates = cycle[start:] + cycle[:start]
        used = [np.array(to_rgb(color)) for color in colors.values()]
        distances = [
            min((float(np.linalg.norm(to_rgb(color) - other)) for other in used), default=9.0)
            for color in candidates
        ]
        clear = [color for color, distance in zip(candidates, distances) if distance > 0.3]
        colors[scale] = clear[0] if clear else candidates[int(np.argmax(distances))]
    return {scale: colors[scale] for scale in scales}


def curve_label(name: str, curve: Curve, gap: str = "too few") -> str:
    """The legend's words of one series: n, and where too few pairs left a gap."""
    mean = curve["mean"]
    n = curve.get("n", np.array([]))
    gaps = curve["layer"][np.isnan(mean)]
    if len(gaps) == len(mean):
        counts = n[~np.isnan(n)].astype(int)
        return f"{name}: too few pairs (n = {counts.max(initial=0)})"
    counts = n[~np.isnan(n) & ~np.isnan(mean)].astype(int) if n.size else n
    label = plots.with_n(name, counts) if len(counts) else name
    if not len(gaps):
        return label
    shown = [f"L{layer}" for layer in gaps[:3]]
    if len(gaps) > 3:
        shown.append("...")
    return f"{label}; {gap} at {', '.join(shown)}"


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


def footnote(fig: Figure, marked: Marked) -> None:
    """The footnote of all_with_validity."""
    if marked:
        fig.supxlabel(UNRELIABLE + listed(marked), fontsize=8, color="#444444")


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


def null_handle(ax: Axes, text: str) -> None:
    """A legend entry for the nulls."""
    ax.plot([], [], color=plots.EVEN_COLOR, linestyle=":", linewidth=1, label=text)


def layer_axes(ax: Axes, title: str, ylabel: str) -> None:
    """Axes of a figure over layers, with a line at 0."""
    ax.axhline(0, color=plots.EVEN_COLOR, linewidth=0.8, zorder=1)
    ax.set(title=title, xlabel=LAYER_AXIS, ylabel=ylabel)
    plots.layer_ticks(ax)

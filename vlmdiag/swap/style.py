"""Colours, words and axes that all figures of the swap analysis share. Palette of our study's
section 3.4."""

import zlib
from pathlib import Path

import numpy as np
from matplotlib.colors import to_rgb

from vlmdiag.figures import plots
from vlmdiag.swap.saved import CONDITIONS, GROUPS

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


def scale_colors(scales):
    """{scale: colour}: the published ones' own, any other from plots.CYCLE, far from the colours
    that the figure's other scales have."""
    colors = {scale: SCALE_COLORS[scale] for scale in scales if scale in SCALE_COLORS}
    for scale in sorted(set(scales) - set(colors)):
        cycle = [color for color in plots.CYCLE if len(set(to_rgb(color))) > 1]  # grey is for nulls
        start = zlib.crc32(scale.encode()) % len(cycle)
        turn = cycle[start:] + cycle[:start]
        used = [np.array(to_rgb(color)) for color in colors.values()]
        nearest = [
            min((np.linalg.norm(to_rgb(color) - other) for other in used), default=9)
            for color in turn
        ]
        clear = [color for color, distance in zip(turn, nearest) if distance > 0.3]
        colors[scale] = clear[0] if clear else turn[int(np.argmax(nearest))]
    return {scale: colors[scale] for scale in scales}


def curve_label(name, curve, gap="too few"):
    """The legend's words of one series: n, and where too few pairs left a gap."""
    mean, n = curve["mean"], curve.get("n", np.array([]))
    gaps = curve["layer"][np.isnan(mean)]
    counts = n[~np.isnan(n)].astype(int)
    if len(gaps) == len(mean):
        return f"{name}: too few pairs (n = {counts.max(initial=0)})"
    counts = n[~np.isnan(n) & ~np.isnan(mean)].astype(int) if n.size else n
    label = plots.with_n(name, counts) if len(counts) else name
    where = ", ".join(f"L{layer}" for layer in gaps[:3]) + ", ..." * (len(gaps) > 3)
    return f"{label}; {gap} at {where}" if len(gaps) else label


def path_of(folder, condition, *parts):
    return Path(folder, "plots", condition, *parts)


def settings_of(folder, condition, **more):
    return {
        "results": Path(folder).name,
        "condition": condition,
        "tag": CONDITIONS.get(condition),
    } | more


def listed(marked):
    return ", ".join(
        f"{name} " + ("(no pairs)" if np.isnan(both).all() else f"{both[0]:.2f} / {both[1]:.2f}")
        for name, both in marked.items()
    )


def footnote(fig, marked):
    """The footnote of all_with_validity: {category: (acc_orig, acc_swap)}."""
    if marked:
        fig.supxlabel(UNRELIABLE + listed(marked), fontsize=8, color="#444444")


def legend(ax, columns=3):
    """Inside the axes while it is short, else below in columns."""
    handles, labels = ax.get_legend_handles_labels()
    if len(handles) > 4 or max(map(len, labels)) > 40:
        legend_below(ax, handles, columns)
    else:
        ax.legend()


def legend_below(ax, handles, columns=3):
    look = {"frameon": False, "handletextpad": 0.3, "columnspacing": 1.0, "fontsize": 8}
    ax.legend(
        handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncol=columns, **look
    )


def dagger(name, marked):
    members = GROUPS.get(name, (name,))
    return f"{name} \u2020" if any(member in marked for member in members) else name


def say(ax, text):
    ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center", color="#555555")


def draw_curve(ax, curve, label, color, **line):
    """One series over layers with its interval and, dotted with two standard deviations, its null.
    -> the null was drawn."""
    layer, mean = curve["layer"], curve["mean"]
    ax.plot(layer, mean, color=color, label=label, marker="o", markersize=3, **line)
    if "low" in curve and "high" in curve:
        ax.fill_between(layer, curve["low"], curve["high"], color=color, alpha=0.18, linewidth=0)
    null = curve.get("null_mean")
    if null is None or np.isnan(null).all():
        return False
    spread = 2 * np.nan_to_num(curve.get("null_std", np.zeros(len(null))))
    ax.plot(layer, null, color=color, linestyle=":", linewidth=1)
    ax.fill_between(
        layer, null - spread, null + spread, color=plots.EVEN_COLOR, alpha=0.1, linewidth=0
    )
    return True


def null_handle(ax, text):
    ax.plot([], [], color=plots.EVEN_COLOR, linestyle=":", linewidth=1, label=text)


def layer_axes(ax, title, ylabel):
    ax.axhline(0, color=plots.EVEN_COLOR, linewidth=0.8, zorder=1)
    ax.set(title=title, xlabel="decoder layer", ylabel=ylabel)
    plots.layer_ticks(ax)

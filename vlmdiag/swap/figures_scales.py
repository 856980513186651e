"""Figures that compare scales, drawn from saved files only: accuracy, curves of all scales,
entanglement, the ablation summary.

draw_merge(folder, scales) draws the summary, with all_figures every one; each function returns the
files that it wrote. arXiv 2605.30161; docs/studies/swap_analysis.md, sections 2 and 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np

from vlmdiag.cli import UsageError
from vlmdiag.figures import plots
from vlmdiag.swap.relations import GROUPS, SPLITS
from vlmdiag.swap.saved import (
    CONDITIONS,
    FAMILIES,
    alignment_file,
    curve_of,
    number,
    read_curves,
    read_json,
    read_layers,
    samples_seen,
    unreliable,
)
from vlmdiag.swap.style import (
    ALIGNMENT_COLORS,
    ALL_RELIABLE,
    GROUP_COLORS,
    SPLIT_COLORS,
    UNRELIABLE,
    WORDS,
    dagger,
    draw_curve,
    gaps_of,
    layer_axes,
    legend,
    legend_below,
    measured_n,
    model_of,
    note_below,
    path_of,
    say,
    scale_colors,
    scale_legend,
    settings_of,
    within_cosines,
)
from vlmdiag.types import Fields, Record

if TYPE_CHECKING:
    from jaxtyping import Float
    from matplotlib.axes import Axes

    from vlmdiag.swap.saved import Curve

    OverScales = Float[np.ndarray, " S"]
    # {"n", "orig", "swap", "both", "both_low", ...: (S,)}
    Accuracy = dict[str, np.ndarray]

# panel -> (form in the cells of vd_ei_{scale}.json, its value; the interval is in <low>, <high>)
ENTANGLEMENT_PANELS = {
    "index: equation 3 of the mean deltas": ("eq3_raw", "value", "low", "high"),
    "equation 3, cross-fitted": ("eq3_raw", "crossfit", "crossfit_low", "crossfit_high"),
    "cosine of the groups' mean deltas": ("group_cosine_raw", "value", "low", "high"),
}
AXIS = 1.05  # of entanglement, which is made of cosines
BAR_PLACES = (-0.27, 0, 0.27)
BAR_STYLE: Record = {"error_kw": {"elinewidth": 0.9, "ecolor": "#222222"}, "capsize": 2}
BOTH_CHANCE = 0.25  # of pairs right in both orders, by two coin tosses
CHANCE_LINE: Record = {"color": plots.EVEN_COLOR, "linewidth": 1, "linestyle": "--", "zorder": 1}


def _scale_settings(folder: str | Path, scales: Sequence[str]) -> Record:
    return {"results": Path(folder).name, "scales": list(scales)}


# ---- accuracy ----


def read_accuracy(folder: str | Path, scales: Sequence[str]) -> dict[str, Accuracy]:
    """Accuracies of each group and "overall" over S scales, NaN where a scale has no pair of the
    group. UsageError without the files."""
    stats = []
    for scale in scales:
        content = read_json(folder, f"pred_stats_{scale}")
        if content is None:
            raise UsageError(
                f"{folder}/json has no pred_stats_{scale}.json; run swap_analysis.py for scale"
                f" {scale}"
            )
        stats.append(content)

    def over_scales(field: str) -> OverScales:
        return np.array([number(of_scale.get(field)) for of_scale in stats])

    accuracy = {}
    for group in (*GROUPS, "overall"):
        n = over_scales(f"{group}_n")
        of_group = {"n": np.nan_to_num(n).astype(int)}
        for order in ("orig", "swap", "both"):
            of_group[order] = np.where(n == 0, np.nan, over_scales(f"{group}_acc_{order}"))
            for end in ("_low", "_high"):
                over_questions = over_scales(f"{group}_acc_{order}{end}")
                over_images = over_scales(f"{group}_acc_{order}_image{end}")
                # of one image there is no interval over images
                values = np.where(np.isnan(over_images), over_questions, over_images)
                of_group[f"{order}{end}"] = np.where(n == 0, np.nan, values)
        accuracy[group] = of_group
    return accuracy


def _bars(
    ax: Axes,
    x: OverScales,
    value: OverScales,
    low: OverScales,
    high: OverScales,
    color: str,
    label: str,
) -> None:
    """A bar with its interval where there is a value, none where there is no pair."""
    there = np.isfinite(value)
    reach = np.maximum([value - low, high - value], 0)[:, there]
    intervals = None if np.isnan(reach).all() else np.nan_to_num(reach)
    ax.bar(x[there], value[there], 0.25, yerr=intervals, color=color, label=label, **BAR_STYLE)


def _scale_ticks(ax: Axes, scales: Sequence[str]) -> None:
    is_crowded = len(scales) > 6 or max(map(len, scales)) > 9
    ax.set_xticks(
        range(len(scales)),
        scales,
        rotation=30 if is_crowded else 0,
        ha="right" if is_crowded else "center",
    )
    ax.grid(axis="x", visible=False)


def draw_accuracy_bars(
    folder: str | Path,
    scales: Sequence[str],
    name: str = "accuracy_group_bars",
    quiet: bool = False,
) -> list[Path]:
    """Accuracy in the original order, the swapped order and both, by group and scale -> files."""
    accuracy = read_accuracy(folder, scales)
    size = (max(9, 3.6 + 2.2 * len(scales)), 4.2)
    fig, axes = plt.subplots(1, 3, figsize=size, sharey=True)
    x = np.arange(len(scales))
    for ax, group in zip(axes, GROUPS):
        of_group = accuracy[group]
        orders = (
            ("orig", "original order", "#c9c9c9"),
            ("swap", "swapped order", "#8a8a8a"),
            ("both", "both orders (colour of the relation)", GROUP_COLORS[group]),
        )
        for place, (order, label, color) in zip(BAR_PLACES, orders):
            value, low, high = (of_group[f"{order}{end}"] for end in ("", "_low", "_high"))
            _bars(ax, x + place, value, low, high, color, label)
        for position in x[np.isnan(of_group["both"])]:
            ax.text(position, 0.02, "no pairs", ha="center", fontsize=8, color="#555555")
        ax.axhline(0.5, **CHANCE_LINE, label="chance, one order")
        ax.axhline(BOTH_CHANCE, **(CHANCE_LINE | {"linestyle": ":"}), label="chance, both orders")
        ax.set_axisbelow(True)
        title = plots.with_n(group, of_group["n"])
        ax.set(title=title, ylim=(0, 1.05), xlim=(-0.6, len(scales) - 0.4))
        _scale_ticks(ax, scales)
    handles, labels = axes[0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    axes[0].set_ylabel("share of pairs answered right")
    fig.suptitle(f"Right answers of {model_of(folder)}, 95 % intervals", fontsize=10.5)
    path = path_of(folder, "accuracy", name)
    return plots.save(fig, path, _scale_settings(folder, scales), quiet=quiet)


def _over_scales(
    ax: Axes,
    scales: Sequence[str],
    values: OverScales,
    color: str,
    label: str,
    low: OverScales | None = None,
    high: OverScales | None = None,
    **line: Any,
) -> None:
    """A line over scales: joined where the scale has a data scale, a separate point (such as
    another model's) where it has none."""
    x = np.arange(len(scales))
    has_size = ~np.isnan([samples_seen(scale) for scale in scales])
    joined = has_size if has_size.any() else np.ones(len(scales), bool)
    style: Record = {"marker": "o", "markersize": 5} | line
    ax.plot(x[joined], values[joined], color=color, label=label, **style)
    ax.plot(x[~joined], values[~joined], color=color, **(style | {"linestyle": ""}))
    if low is not None and high is not None and np.isfinite(low).any():
        reach = np.nan_to_num(np.maximum([values - low, high - values], 0))
        ax.errorbar(x, values, yerr=reach, fmt="none", ecolor=color, elinewidth=1, capsize=2.5)


def _trajectory(ax: Axes, accuracy: Mapping[str, Accuracy], scales: Sequence[str]) -> None:
    """Share of pairs right in both orders, a line a group and a dashed one overall."""
    for group in (*GROUPS, "overall"):
        of_group = accuracy[group]
        look = {"linestyle": "--", "marker": "s"} if group == "overall" else {}
        _over_scales(
            ax,
            scales,
            of_group["both"],
            GROUP_COLORS.get(group, plots.EVEN_COLOR),
            plots.with_n(group, of_group["n"]),
            of_group["both_low"],
            of_group["both_high"],
            **look,
        )
    ax.axhline(BOTH_CHANCE, **CHANCE_LINE, label=f"chance, two coin tosses: {BOTH_CHANCE}")
    ax.set(ylim=(0, 1.05), ylabel="share of pairs", xlim=(-0.3, len(scales) - 0.7))
    _scale_ticks(ax, scales)


def draw_accuracy_trajectory(
    folder: str | Path, scales: Sequence[str], quiet: bool = False
) -> list[Path]:
    """Share of pairs answered right in both orders, against the scale -> files."""
    fig, ax = plt.subplots(figsize=(7.5, 4.6))
    _trajectory(ax, read_accuracy(folder, scales), scales)
    ax.set(title=f"Right in both orders, {model_of(folder)}", xlabel="data scale")
    legend(ax)
    path = path_of(folder, "accuracy", "accuracy_trajectory")
    return plots.save(fig, path, _scale_settings(folder, scales), quiet=quiet)


def draw_accuracy_strata(
    folder: str | Path, scales: Sequence[str], quiet: bool = False
) -> list[Path]:
    """Share of distance pairs right in both orders by stratum and scale, with the gap consistent -
    counter -> files, [] without strata."""
    stats = [read_json(folder, f"pred_stats_{scale}") or {} for scale in scales]
    counts = {
        split: [int(of_scale.get(f"distance_{split}_n") or 0) for of_scale in stats]
        for split in SPLITS
    }
    if not any(n for of_split in counts.values() for n in of_split):
        return []
    x = np.arange(len(scales))
    fig, ax = plt.subplots(figsize=(max(6.5, 2.4 + 1.3 * len(scales)), 4.6))
    for place, split in zip(BAR_PLACES, SPLITS, strict=True):
        field = f"distance_{split}_acc_both"
        value, low, high, image_low, image_high = (
            np.array([number(of_scale.get(f"{field}{end}")) for of_scale in stats])
            for end in ("", "_low", "_high", "_image_low", "_image_high")
        )
        low, high = (  # of one image there is no interval over images
            np.where(np.isnan(over_images), exact, over_images)
            for over_images, exact in ((image_low, low), (image_high, high))
        )
        label = plots.with_n(split, counts[split])
        _bars(ax, x + place, value, low, high, SPLIT_COLORS[split], label)
        for empty in (x + place)[np.isnan(value)]:
            ax.text(empty, 0.01, "none", ha="center", va="bottom", rotation=90, fontsize=7)
    for position, of_scale in enumerate(stats):
        text = _gap_text(of_scale.get("gap_both") or {})
        ax.text(position, 1.02, text, ha="center", va="bottom", fontsize=7.5)
    ax.axhline(BOTH_CHANCE, **CHANCE_LINE, label=f"chance, two coin tosses: {BOTH_CHANCE}")
    ax.set_axisbelow(True)
    ax.set(
        ylim=(0, 1.18),
        xlim=(-0.6, len(scales) - 0.4),
        ylabel="share of distance pairs",
        yticks=np.linspace(0, 1, 6),
    )
    ax.set_title(
        f"Distance pairs right in both orders, {model_of(folder)}; gap: consistent - counter"
    )
    _scale_ticks(ax, scales)
    legend_below(ax, columns=2)
    path = path_of(folder, "accuracy", "accuracy_strata")
    return plots.save(fig, path, _scale_settings(folder, scales), quiet=quiet)


def _gap_text(gap: Fields) -> str:
    """The gap and its interval; none of fewer images than an interval needs."""
    if gap.get("value") is None or gap.get("low") is None:
        return "gap: too\nfew pairs"
    return f"gap {gap['value']:+.2f}\n({gap['low']:+.2f} to {gap['high']:+.2f})"


# ---- curves of all scales ----


def draw_cross_consistency(
    folder: str | Path, scales: Sequence[str], condition: str, family: str, quiet: bool = False
) -> list[Path]:
    """One panel a group (coherence) or category (consistency), one line a scale, over layers ->
    files."""
    consistency = FAMILIES[family]
    by_scale = {}
    for scale in scales:
        curves = read_curves(folder, f"{consistency.stem}_{scale}_{CONDITIONS[condition]}")
        if curves:
            by_scale[scale] = curves
    if not by_scale:
        return []
    colors = scale_colors(scales)
    marks_unreliable = condition == "all_with_validity"
    marked = {scale: unreliable(folder, scale) if marks_unreliable else {} for scale in by_scale}
    by_group = family == "sign_corrected_consistency"
    canonical_first = [pair[side] for side in (0, 1) for pair in GROUPS.values()]
    panels = list(GROUPS) if by_group else canonical_first
    fig, axes = plt.subplots(
        len(panels) // 3, 3, figsize=(14, 4.4 if by_group else 7.6), sharey=True, squeeze=False
    )
    has_null = False
    for ax, series in zip(axes.flat, panels):
        curves = {scale: found[series] for scale, found in by_scale.items() if series in found}
        of_marked = [scale for scale in curves if dagger(series, marked[scale]) != series]
        for scale, curve in curves.items():
            look = {"alpha": 0.5, "linestyle": "--"} if scale in of_marked else {}
            has_null |= draw_curve(ax, curve, scale, colors[scale], **look)
        layer_axes(ax, series, consistency.ylabel if ax in axes[:, 0] else "")
        _say_counts(ax, curves)
        if of_marked:
            note_below(ax, [f"\u2020 {', '.join(of_marked)}"])
        if not curves:
            say(ax, "too few pairs")
    scale_legend(fig, colors, "shuffled labels (band: 2 s.d.)" if has_null else None)
    title = f"{consistency.title}, {model_of(folder)}, {WORDS[condition]}"
    fig.suptitle(title, fontsize=10.5)
    if marks_unreliable:
        has_marks = any(marked.values())
        text = f"{UNRELIABLE}dashed and faint" if has_marks else ALL_RELIABLE
        fig.supxlabel(text, fontsize=8, color="#444444")
    path = path_of(folder, condition, "cross_scale", consistency.figure)
    settings = settings_of(folder, condition, scales=list(scales))
    return plots.save(fig, path, settings, quiet=quiet)


def _say_counts(ax: Axes, curves: Mapping[str, Curve], gap: str = "too few") -> None:
    """n behind the title of a panel, and below it which scales have gaps."""
    counts = [n for curve in curves.values() for n in measured_n(curve)]
    if counts:
        ax.set_title(plots.with_n(ax.get_title(), counts))
    gaps = {scale: gaps_of(curve, gap) for scale, curve in curves.items()}
    note_below(ax, ["; ".join(f"{scale}: {text}" for scale, text in gaps.items() if text)])


def _read_alignment(folder: str | Path, scale: str, condition: str) -> Curve:
    """The curve of cross_alignment, {} without the file. low and high are those of
    per_sample_mean."""
    return (read_curves(folder, alignment_file(scale, condition)) or {}).get("", {})


def draw_cross_alignment(
    folder: str | Path, scales: Sequence[str], condition: str = "all", quiet: bool = False
) -> list[Path]:
    """Alignment of height and distance over layers, one line a scale; left over scenes, right of
    the mean deltas -> files."""
    curves = {scale: _read_alignment(folder, scale, condition) for scale in scales}
    curves = {scale: curve for scale, curve in curves.items() if "per_sample_mean" in curve}
    if not curves:
        return []
    colors = scale_colors(scales)
    fig, axes = plt.subplots(1, 2, figsize=(12, 4.6), sharey=True)
    panels = (
        ("per_sample_mean", "mean over scenes of cos(vertical delta, distance delta)"),
        ("mean_delta_alignment", "cosine of the mean deltas"),
    )
    has_null = False
    for ax, (field, title) in zip(axes, panels):
        drawn = {}
        for scale, curve in curves.items():
            shown = {
                "layer": curve["layer"],
                "mean": curve.get(field, np.full(len(curve["layer"]), np.nan)),
            }
            names: dict[str, tuple[str, ...]] = {"n": ("n_samples",)}
            if field == "per_sample_mean":
                names |= {
                    "low": ("per_sample_low", "low"),
                    "high": ("per_sample_high", "high"),
                    "null_mean": ("permutation_mean",),
                    "null_std": ("permutation_std",),
                }
            for name, sources in names.items():
                present = [source for source in sources if source in curve]
                if present:
                    shown[name] = curve[present[0]]
            has_null |= draw_curve(ax, shown, scale, colors[scale])
            drawn[scale] = shown
        layer_axes(ax, title, "cosine" if ax is axes[0] else "")
        _say_counts(ax, drawn)
    scale_legend(fig, colors, "scenes permuted (band: 2 s.d.)" if has_null else None)
    title = f"Alignment of height and distance, {model_of(folder)}, {WORDS[condition]}"
    fig.suptitle(f"{title}; n: scenes", fontsize=10.5)
    path = path_of(folder, condition, "cross_scale", "cross_alignment")
    settings = settings_of(folder, condition, scales=list(scales))
    return plots.save(fig, path, settings, quiet=quiet)


def read_entanglement(folder: str | Path, scale: str, condition: str) -> dict[str, Curve]:
    """{panel: curve} of json/vd_ei_{scale}.json: those of ENTANGLEMENT_PANELS from cells with
    {form: {value, low, ...}} or with the same flat ({form: value, form_low: low, ...}), or one
    curve, "index", of bare numbers (all pairs only); {} where there is nothing."""
    cells = (read_layers(folder, f"vd_ei_{scale}") or {}).get("", {})
    if condition == "both_correct":
        cells = {
            layer: (cell.get("both_correct") or {}) if isinstance(cell, dict) else {}
            for layer, cell in cells.items()
        }
    layers = list(cells)
    curves = {}
    for panel, (form, *fields) in ENTANGLEMENT_PANELS.items():
        rows = []
        for cell in cells.values():
            row = cell if isinstance(cell, dict) else {}
            values = [_entry(row, form, field) for field in fields]
            rows.append(dict(zip(("mean", "low", "high"), values)) | {"n": row.get("n_images")})
        curves[panel] = curve_of(layers, rows)
    curves["index"] = curve_of(layers, [{"mean": cell} for cell in cells.values()])
    return {panel: curve for panel, curve in curves.items() if np.isfinite(curve["mean"]).any()}


def _entry(cell: Fields, form: str, field: str) -> object:
    """A form's field in a cell that is nested or flat."""
    nested = cell.get(form)
    if isinstance(nested, dict):
        return nested.get(field)
    return cell.get(form if field == "value" else f"{form}_{field}")


def _outside(curves: Mapping[str, Curve]) -> str:
    """Which estimates lie where no cosine can, as one of few pairs may by cross-fitting."""
    found = [
        f"{scale}: {value:.1f} at L{layer}"
        for scale, curve in curves.items()
        for layer, value in zip(curve["layer"], curve["mean"])
        if abs(value) > AXIS
    ]
    return f"beyond the axis: {', '.join(found)}" if found else ""


def draw_vd_ei(
    folder: str | Path, scales: Sequence[str], condition: str = "all", quiet: bool = False
) -> list[Path]:
    """Vertical-distance entanglement index over layers, one line a scale, one panel a definition ->
    files."""
    by_scale = {scale: read_entanglement(folder, scale, condition) for scale in scales}
    panels = [
        panel
        for panel in (*ENTANGLEMENT_PANELS, "index")
        if any(panel in curves for curves in by_scale.values())
    ]
    if not panels:
        return []
    colors = scale_colors(scales)
    size = (max(7.5, 4.7 * len(panels)), 4.6)
    fig, axes = plt.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False)
    for ax, panel in zip(axes[0], panels):
        shown = {scale: curves[panel] for scale, curves in by_scale.items() if panel in curves}
        for scale, curve in shown.items():
            draw_curve(ax, within_cosines(curve), scale, colors[scale])
        layer_axes(ax, panel, "entanglement" if ax is axes[0, 0] else "")
        _say_counts(ax, shown, "undefined")
        note_below(ax, [_outside(shown)])
        absent = []
        for scale in [scale for scale in scales if scale not in shown]:
            is_absent = read_json(folder, f"vd_ei_{scale}") is None
            absent.append(f"{scale}: {'not measured' if is_absent else 'too few pairs'}")
        note_below(ax, ["; ".join(absent)])
    axes[0, 0].set_ylim(-AXIS, AXIS)
    scale_legend(fig, colors)
    title = (
        f"Entanglement of vertical and distance deltas (VD-EI), {model_of(folder)},"
        f" {WORDS[condition]}"
    )
    if any("n" in curve for curves in by_scale.values() for curve in curves.values()):
        title += "; n: images"
    fig.suptitle(title, fontsize=10.5)
    path = path_of(folder, condition, "cross_scale", "vd_ei")
    settings = settings_of(folder, condition, scales=list(scales))
    return plots.save(fig, path, settings, quiet=quiet)


# ---- the ablation summary ----


def summary_layer(folder: str | Path, scales: Sequence[str]) -> int | None:
    """The layer of the ablation summary where none is named: three quarters of the depth that was
    measured, close to the paper's choice for most models."""
    layers: set[int] = set()
    for scale in scales:
        curves = read_curves(folder, f"sign_corrected_consistency_{scale}_all_pairs") or {}
        for curve in curves.values():
            layers |= set(curve["layer"].tolist())
    if not layers:
        return None
    deepest = max(layers)
    return min(sorted(layers), key=lambda layer: abs(layer - 0.75 * deepest))


def _at(curves: Sequence[Curve], field: str, layer: int | None) -> OverScales:
    """A field of the curves of S scales at a layer, NaN where one has none."""
    values = []
    for curve in curves:
        present = curve[field][curve["layer"] == layer] if field in curve else np.array([])
        values.append(present[0] if present.size else np.nan)
    return np.array(values)


def _draw_coherence_at(
    ax: Axes, scales: Sequence[str], curves: Sequence[Mapping[str, Curve]], layer: int | None
) -> None:
    """Axis coherence of each group at one layer, against the scale."""
    for group, color in GROUP_COLORS.items():
        of_group = [of_scale.get(group, {}) for of_scale in curves]
        values = _at(of_group, "mean", layer)
        n = np.nan_to_num(_at(of_group, "n", layer)[np.isfinite(values)]).astype(int)
        label = plots.with_n(group, n)
        too_few = [scale for scale, value in zip(scales, values) if np.isnan(value)]
        if too_few:
            label += f"; too few in {', '.join(too_few)}"
        low = _at(of_group, "low", layer)
        high = _at(of_group, "high", layer)
        _over_scales(ax, scales, values, color, label, low, high)
    ax.set(title=f"axis coherence, layer {layer}", ylabel="mean pairwise cosine")


def _draw_alignment_at(
    ax: Axes, scales: Sequence[str], curves: Sequence[Curve], layer: int | None
) -> None:
    """Alignment of height and distance at one layer, against the scale, with its null."""
    mean = _at(curves, "per_sample_mean", layer)
    if np.isfinite(mean).any():
        low, high = (
            np.where(np.isnan(of_samples), of_mean, of_samples)
            for of_samples, of_mean in (
                (_at(curves, f"per_sample_{end}", layer), _at(curves, end, layer))
                for end in ("low", "high")
            )
        )
        n = np.nan_to_num(_at(curves, "n_samples", layer)).astype(int)
        label = plots.with_n("mean over scenes", n)
        color = ALIGNMENT_COLORS["per_sample_mean"]
        _over_scales(ax, scales, mean, color, label, low, high)
        _over_scales(
            ax,
            scales,
            _at(curves, "mean_delta_alignment", layer),
            ALIGNMENT_COLORS["mean_delta_alignment"],
            "cosine of the mean deltas",
            linestyle="--",
            marker="s",
            markersize=4,
        )
        ax.errorbar(
            np.arange(len(scales)),
            _at(curves, "permutation_mean", layer),
            yerr=2 * np.nan_to_num(_at(curves, "permutation_std", layer)),
            label="scenes permuted (2 s.d.)",
            fmt="_",
            color=ALIGNMENT_COLORS["permutation"],
            elinewidth=6,
            alpha=0.4,
            markersize=14,
        )
    else:
        say(ax, f"not measured at layer {layer}" if any(curves) else "not measured")
    ax.set(
        title=f"alignment of height and distance, layer {layer}",
        ylabel="cosine of vertical and distance delta",
    )


def draw_ablation(
    folder: str | Path,
    scales: Sequence[str],
    condition: str = "all",
    layer: int | None = None,
    quiet: bool = False,
) -> list[Path]:
    """Accuracy, axis coherence and cross alignment against the data scale, the last two at one
    layer -> files."""
    layer = summary_layer(folder, scales) if layer is None else layer
    accuracy = read_accuracy(folder, scales)
    tag = CONDITIONS[condition]
    coherence = [
        read_curves(folder, f"sign_corrected_consistency_{scale}_{tag}") or {} for scale in scales
    ]
    alignment = [_read_alignment(folder, scale, condition) for scale in scales]
    size = (max(14, 3 * (1 + 0.8 * len(scales))), 4.6)
    fig, axes = plt.subplots(1, 3, figsize=size)
    _trajectory(axes[0], accuracy, scales)
    axes[0].set_title("right in both orders")
    _draw_coherence_at(axes[1], scales, coherence, layer)
    _draw_alignment_at(axes[2], scales, alignment, layer)
    for ax in axes[1:]:
        ax.axhline(0, color=plots.EVEN_COLOR, linewidth=0.8, zorder=1)
        ax.set_xlim(-0.3, len(scales) - 0.7)
        _scale_ticks(ax, scales)
    for ax in axes:
        ax.set_xlabel("data scale")
        if ax.get_legend_handles_labels()[0]:
            legend_below(ax, columns=2)
    fig.suptitle(
        f"What more spatial data changes, {model_of(folder)}, states of {WORDS[condition]}",
        fontsize=10.5,
    )
    path = path_of(folder, condition, "cross_scale", "ablation_summary")
    settings = settings_of(folder, condition, scales=list(scales), layer=layer)
    return plots.save(fig, path, settings, quiet=quiet)


# ---- everything ----


def draw_merge(
    folder: str | Path,
    scales: Sequence[str],
    layer: int | None = None,
    quiet: bool = False,
    all_figures: bool = False,
) -> list[Path]:
    """The summary over scales, or every figure that compares them -> files. layer: that of the
    ablation summary, three quarters of the depth where None.

    The summary: answers, and of all pairs coherence, alignment, entanglement and the ablation
    summary.
    """
    scales = list(scales)
    if not scales:
        raise UsageError(f"no scale of {folder} to compare; name some with --scales")
    written = []
    if all_figures:
        written += draw_accuracy_bars(folder, scales, quiet=quiet)
    written += draw_accuracy_trajectory(folder, scales, quiet)
    written += draw_accuracy_strata(folder, scales, quiet)
    for condition in CONDITIONS if all_figures else ("all",):
        for family in FAMILIES if all_figures else ("sign_corrected_consistency",):
            written += draw_cross_consistency(folder, scales, condition, family, quiet)
        if condition != "all_with_validity":
            written += draw_cross_alignment(folder, scales, condition, quiet)
            written += draw_vd_ei(folder, scales, condition, quiet)
            written += draw_ablation(folder, scales, condition, layer, quiet)
    return written

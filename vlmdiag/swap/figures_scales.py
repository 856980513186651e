"""Figures that compare scales, drawn from saved files only: accuracy, curves of all scales,
entanglement, the ablation summary.

draw_merge(folder, scales) draws them all; every function returns the files that it wrote. arXiv
2605.30161; our study's sections 2 and 3.
"""

import re
from pathlib import Path

import numpy as np

from vlmdiag.cli import UsageError
from vlmdiag.figures import plots
from vlmdiag.swap.saved import (
    CONDITIONS,
    FAMILIES,
    GROUPS,
    SPLITS,
    alignment_file,
    number,
    read_curves,
    read_json,
    samples_seen,
    unreliable,
)
from vlmdiag.swap.style import (
    ALIGNMENT_COLORS,
    GROUP_COLORS,
    SPLIT_COLORS,
    UNRELIABLE,
    WORDS,
    curve_label,
    dagger,
    draw_curve,
    layer_axes,
    legend,
    legend_below,
    null_handle,
    path_of,
    say,
    scale_colors,
    settings_of,
)

ENDS = {"value": "", "low": "_image_low", "high": "_image_high"}
VD_FORMS = {  # panel -> field in vd_ei_{scale}.json, its interval in <field>_low and _high
    "equation 3": "eq3_raw",
    "equation 3, cross-fitted": "eq3_raw_crossfit",
    "cosine of the groups' mean deltas": "group_cosine_raw",
}


# ---- accuracy ----


def read_accuracy(folder, scales):
    """{group or "overall": {"n", "orig", "swap", "both", "both_low", ...: (S,)}}, NaN where a scale
    has no pair of the group. UsageError without the files."""
    stats = {scale: read_json(folder, f"pred_stats_{scale}") for scale in scales}
    missing = [scale for scale, found in stats.items() if found is None]
    if missing:
        raise UsageError(
            f"{folder}/json has no pred_stats_{missing[0]}.json; run swap_analysis.py for scale"
            f" {missing[0]}"
        )
    accuracy = {}
    for group in (*GROUPS, "overall"):
        n = np.array([number(stats[scale].get(f"{group}_n")) for scale in scales])
        accuracy[group] = {"n": np.nan_to_num(n).astype(int)}
        for name in [
            f"{order}{end}" for order in ("orig", "swap", "both") for end in ("", "_low", "_high")
        ]:
            values = np.array([number(stats[scale].get(f"{group}_acc_{name}")) for scale in scales])
            accuracy[group][name] = np.where(n == 0, np.nan, values)
    return accuracy


def _whiskers(cell, name):
    reach = np.array([cell[name] - cell[f"{name}_low"], cell[f"{name}_high"] - cell[name]])
    return np.where(np.isnan(reach), 0, np.maximum(reach, 0)) if np.isfinite(reach).any() else None


def _scale_ticks(ax, scales):
    crowded = len(scales) > 6 or max(map(len, scales)) > 9
    ax.set_xticks(
        range(len(scales)),
        scales,
        rotation=30 if crowded else 0,
        ha="right" if crowded else "center",
    )
    ax.grid(axis="x", visible=False)


def draw_accuracy_bars(folder, scales, name="accuracy_group_bars", quiet=False):
    """Accuracy in the original order, the swapped order and both, by group and scale -> files."""
    accuracy = read_accuracy(folder, scales)
    fig, axes = plots.plt.subplots(
        1, 3, figsize=(max(9, 3.6 + 2.2 * len(scales)), 4.2), sharey=True
    )
    for ax, group in zip(axes, GROUPS):
        cell, x = accuracy[group], np.arange(len(scales))
        styles = {
            "orig": ("original", "#c9c9c9"),
            "swap": ("swapped", "#8a8a8a"),
            "both": ("both", GROUP_COLORS[group]),
        }
        for place, (order, (label, color)) in zip((-0.27, 0, 0.27), styles.items()):
            whiskers = _whiskers(cell, order)
            style = {"error_kw": {"elinewidth": 0.9, "ecolor": "#222222"}, "capsize": 2}
            ax.bar(
                x + place,
                np.nan_to_num(cell[order]),
                0.25,
                yerr=whiskers,
                color=color,
                label=label,
                **style,
            )
        for position in x[np.isnan(cell["both"])]:
            ax.text(position, 0.02, "no pairs", ha="center", fontsize=8, color="#555555")
        ax.axhline(0.5, color=plots.EVEN_COLOR, linewidth=1, linestyle="--", zorder=1)
        ax.set_axisbelow(True)
        ax.set(title=plots.with_n(group, cell["n"]), ylim=(0, 1.05), xlim=(-0.6, len(scales) - 0.4))
        _scale_ticks(ax, scales)
        legend_below(ax, ax.get_legend_handles_labels()[0])
    axes[0].set_ylabel("accuracy (share of pairs)")
    fig.suptitle(f"Answers of {Path(folder).name}", fontsize=10.5)
    return plots.save(
        fig,
        path_of(folder, "accuracy", name),
        {"results": Path(folder).name, "scales": list(scales)},
        quiet=quiet,
    )


def _over_scales(ax, scales, values, color, label, low=None, high=None, **line):
    """A line over scales: joined where the scale has a data scale, a separate point (such as
    another model's) where it has none."""
    x, sized = np.arange(len(scales)), ~np.isnan([samples_seen(scale) for scale in scales])
    joined = sized if sized.any() else np.ones(len(scales), bool)
    style = {"marker": "o", "markersize": 5} | line
    ax.plot(x[joined], values[joined], color=color, label=label, **style)
    ax.plot(x[~joined], values[~joined], color=color, **(style | {"linestyle": ""}))
    if low is not None and np.isfinite(low).any():
        reach = np.nan_to_num(np.maximum([values - low, high - values], 0))
        ax.errorbar(x, values, yerr=reach, fmt="none", ecolor=color, elinewidth=1, capsize=2.5)


def _trajectory(ax, accuracy, scales):
    for group in (*GROUPS, "overall"):
        cell, color = accuracy[group], GROUP_COLORS.get(group, plots.EVEN_COLOR)
        more = {"linestyle": "--", "marker": "s"} if group == "overall" else {}
        _over_scales(
            ax,
            scales,
            cell["both"],
            color,
            plots.with_n(group, cell["n"]),
            cell["both_low"],
            cell["both_high"],
            **more,
        )
    ax.axhline(0.5, color=plots.EVEN_COLOR, linewidth=0.8, linestyle=":", zorder=1)
    ax.set(ylim=(0, 1.05), ylabel="share of pairs", xlim=(-0.3, len(scales) - 0.7))
    _scale_ticks(ax, scales)


def draw_accuracy_trajectory(folder, scales, quiet=False):
    """Share of pairs answered right in both orders, against the scale -> files."""
    fig, ax = plots.plt.subplots(figsize=(7.5, 4.6))
    _trajectory(ax, read_accuracy(folder, scales), scales)
    ax.set(title=f"Right in both orders, {Path(folder).name}", xlabel="data scale")
    legend(ax)
    return plots.save(
        fig,
        path_of(folder, "accuracy", "accuracy_trajectory"),
        {"results": Path(folder).name, "scales": list(scales)},
        quiet=quiet,
    )


def draw_accuracy_strata(folder, scales, quiet=False):
    """Share of distance pairs right in both orders by stratum and scale, with the gap consistent -
    counter -> files, [] without strata."""
    stats = {scale: read_json(folder, f"pred_stats_{scale}") or {} for scale in scales}
    if not any(stats[scale].get(f"distance_{split}_n") for scale in scales for split in SPLITS):
        return []
    fig, ax = plots.plt.subplots(figsize=(max(6.5, 2.4 + 1.3 * len(scales)), 4.6))
    for place, split in zip((-0.27, 0, 0.27), SPLITS, strict=True):
        cells = [
            {
                field: number(stats[scale].get(f"distance_{split}_acc_both{end}"))
                for field, end in ENDS.items()
            }
            for scale in scales
        ]
        value, low, high = (np.array([cell[field] for cell in cells]) for field in ENDS)
        reach = np.nan_to_num(np.maximum([value - low, high - value], 0))
        counts = [int(stats[scale].get(f"distance_{split}_n") or 0) for scale in scales]
        style = {"error_kw": {"elinewidth": 0.9, "ecolor": "#222222"}, "capsize": 2}
        ax.bar(
            np.arange(len(scales)) + place,
            np.nan_to_num(value),
            0.25,
            yerr=reach,
            color=SPLIT_COLORS[split],
            label=plots.with_n(split, counts),
            **style,
        )
    for x, scale in enumerate(scales):
        gap = stats[scale].get("gap_both") or {}
        if gap.get("value") is not None:
            between = (
                f"\n({gap['low']:+.2f} to {gap['high']:+.2f})" if gap.get("low") is not None else ""
            )
            ax.text(
                x, 1.02, f"gap {gap['value']:+.2f}{between}", ha="center", va="bottom", fontsize=7.5
            )
    ax.axhline(
        0.25, color=plots.EVEN_COLOR, linewidth=1, linestyle="--", zorder=1, label="two coin tosses"
    )
    ax.set_axisbelow(True)
    ax.set(
        ylim=(0, 1.18),
        xlim=(-0.6, len(scales) - 0.4),
        ylabel="share of distance pairs",
        yticks=np.linspace(0, 1, 6),
    )
    ax.set_title(f"Distance pairs right in both orders, {Path(folder).name}")
    _scale_ticks(ax, scales)
    legend_below(ax, ax.get_legend_handles_labels()[0], 2)
    return plots.save(
        fig,
        path_of(folder, "accuracy", "accuracy_strata"),
        {"results": Path(folder).name, "scales": list(scales)},
        quiet=quiet,
    )


# ---- curves of all scales ----


def draw_cross_consistency(folder, scales, condition, family, quiet=False):
    """One panel a group (coherence) or category (consistency), one line a scale, over layers ->
    files."""
    stem, name, title, ylabel = FAMILIES[family]
    found = {
        scale: read_curves(folder, f"{stem}_{scale}_{CONDITIONS[condition]}") for scale in scales
    }
    found = {scale: curves for scale, curves in found.items() if curves}
    if not found:
        return []
    colors, by_group = scale_colors(scales), family == "sign_corrected_consistency"
    panels = (
        list(GROUPS) if by_group else [pair[side] for side in (0, 1) for pair in GROUPS.values()]
    )
    fig, axes = plots.plt.subplots(
        len(panels) // 3, 3, figsize=(14, 4.4 if by_group else 7.6), sharey=True, squeeze=False
    )
    for ax, series in zip(axes.flat, panels):
        null = False
        for scale, curves in found.items():
            marked = unreliable(folder, scale) if condition == "all_with_validity" else {}
            if series in curves:
                faded = (
                    {"alpha": 0.5, "linestyle": "--"} if dagger(series, marked) != series else {}
                )
                label = curve_label(dagger(scale, {scale} if faded else ()), curves[series])
                null |= draw_curve(ax, curves[series], label, colors[scale], **faded)
        if null:
            null_handle(ax, "shuffled labels (band: 2 s.d.)")
        layer_axes(ax, series, ylabel if ax in axes[:, 0] else "")
        if not ax.get_legend_handles_labels()[0]:
            say(ax, "too few pairs")
    with_lines = [ax for ax in axes.flat if ax.get_legend_handles_labels()[0]]
    for ax in with_lines:
        if by_group:
            legend_below(ax, ax.get_legend_handles_labels()[0], 2)
        else:
            ax.legend(fontsize=7)
    fig.suptitle(f"{title}, {Path(folder).name}, {WORDS[condition]}", fontsize=10.5)
    if condition == "all_with_validity":
        fig.supxlabel(UNRELIABLE + "dashed and faint", fontsize=8, color="#444444")
    return plots.save(
        fig,
        path_of(folder, condition, "cross_scale", name),
        settings_of(folder, condition, scales=list(scales)),
        quiet=quiet,
    )


def draw_cross_alignment(folder, scales, condition="all", quiet=False):
    """Alignment of height and distance over layers, one line a scale; left over scenes, right of
    the mean deltas -> files."""
    found = {
        scale: (read_curves(folder, alignment_file(folder, scale, condition)) or {}).get("", {})
        for scale in scales
    }
    found = {scale: curve for scale, curve in found.items() if "per_sample_mean" in curve}
    if not found:
        return []
    colors = scale_colors(scales)
    fig, axes = plots.plt.subplots(1, 2, figsize=(12, 4.6), sharey=True)
    titles = {
        "per_sample_mean": "mean over scenes of cos(vertical delta, distance delta)",
        "mean_delta_alignment": "cosine of the mean deltas",
    }
    for ax, (field, title) in zip(axes, titles.items()):
        for scale, curve in found.items():
            n = {"n": curve["n_samples"]} if "n_samples" in curve else {}
            shown = {
                "layer": curve["layer"],
                "mean": curve.get(field, np.full(len(curve["layer"]), np.nan)),
            } | n
            if field == "per_sample_mean":
                interval = {
                    end: curve.get(f"per_sample_{end}", curve.get(end)) for end in ("low", "high")
                }
                null = {
                    "null_mean": curve.get("permutation_mean"),
                    "null_std": curve.get("permutation_std"),
                }
                shown |= {
                    name: values for name, values in (interval | null).items() if values is not None
                }
            null = draw_curve(ax, shown, curve_label(scale, shown), colors[scale])
        if null:
            null_handle(ax, "scenes permuted (band: 2 s.d.)")
        layer_axes(ax, title, "cosine" if ax is axes[0] else "")
    for ax in axes:
        legend_below(ax, ax.get_legend_handles_labels()[0])
    fig.suptitle(f"Alignment of height and distance, {Path(folder).name}", fontsize=10.5)
    return plots.save(
        fig,
        path_of(folder, condition, "cross_scale", "cross_alignment"),
        settings_of(folder, condition, scales=list(scales)),
        quiet=quiet,
    )


def read_entanglement(folder, scale, condition):
    """{title: curve} of json/vd_ei_{scale}.json: the forms of VD_FORMS, or one curve of bare
    numbers (all pairs only); {} where there is nothing."""
    values = read_json(folder, f"vd_ei_{scale}") or {}
    cells = {
        int(key.removeprefix("L")): value
        for key, value in values.items()
        if re.fullmatch(r"L?\d+", key)
    }
    if condition == "both_correct":
        cells = {
            layer: cell.get("both_correct") if isinstance(cell, dict) else None
            for layer, cell in cells.items()
        }
    layers, curves = sorted(cells), {}
    rows = [_flat(cells[layer]) if isinstance(cells[layer], dict) else {} for layer in layers]
    for title, field in VD_FORMS.items():
        names = {"mean": field, "low": f"{field}_low", "high": f"{field}_high", "n": "n_images"}
        curves[title] = {"layer": np.array(layers)} | {
            name: np.array([number(row.get(key)) for row in rows]) for name, key in names.items()
        }
    bare = np.array([number(cells[layer]) for layer in layers])
    curves["index"] = {"layer": np.array(layers), "mean": bare}
    return {title: curve for title, curve in curves.items() if np.isfinite(curve["mean"]).any()}


def _flat(cell):
    """{form: {"value": v, "low": l, ...}} as {form: v, form_low: l, ...}; what is flat stays."""
    inner = {
        f"{form}_{part}".removesuffix("_value"): value
        for form, parts in cell.items()
        if isinstance(parts, dict)
        for part, value in parts.items()
    }
    return inner | {name: value for name, value in cell.items() if not isinstance(value, dict)}


def draw_vd_ei(folder, scales, condition="all", quiet=False):
    """Vertical-distance entanglement index over layers, one line a scale, one panel a definition ->
    files."""
    found = {scale: read_entanglement(folder, scale, condition) for scale in scales}
    panels = [
        title for title in (*VD_FORMS, "index") if any(title in curves for curves in found.values())
    ]
    if not panels:
        return []
    colors = scale_colors(scales)
    fig, axes = plots.plt.subplots(
        1, len(panels), figsize=(max(7.5, 4.7 * len(panels)), 4.6), sharey=True, squeeze=False
    )
    for ax, title in zip(axes[0], panels):
        for scale, curves in found.items():
            if title in curves:
                draw_curve(
                    ax, curves[title], curve_label(scale, curves[title], "undefined"), colors[scale]
                )
            else:
                ax.plot(
                    [],
                    [],
                    color=colors[scale],
                    marker="o",
                    markersize=3,
                    label=(
                        f"{scale}:"
                        f" {'not measured' if read_json(folder, f'vd_ei_{scale}') is None else 'too few pairs'}"
                    ),
                )
        layer_axes(ax, title, "entanglement index" if ax is axes[0, 0] else "")
        legend_below(ax, ax.get_legend_handles_labels()[0], 2)
    n = (
        "; n: images"
        if any("n" in curve for curves in found.values() for curve in curves.values())
        else ""
    )
    fig.suptitle(
        f"Entanglement of vertical and distance deltas (VD-EI), {Path(folder).name},"
        f" {WORDS[condition]}{n}",
        fontsize=10.5,
    )
    return plots.save(
        fig,
        path_of(folder, condition, "cross_scale", "vd_ei"),
        settings_of(folder, condition, scales=list(scales)),
        quiet=quiet,
    )


def summary_layer(folder, scales):
    """The layer of the ablation summary where none is named: three quarters of the depth that was
    measured, close to the paper's choice for most models."""
    curves = [
        read_curves(folder, f"sign_corrected_consistency_{scale}_all_pairs") or {}
        for scale in scales
    ]
    layers = sorted(
        {int(layer) for found in curves for curve in found.values() for layer in curve["layer"]}
    )
    return min(layers, key=lambda layer: abs(layer - 0.75 * layers[-1])) if layers else None


def _at(curve, field, layer):
    here = curve[field][curve["layer"] == layer] if curve and field in curve else np.array([])
    return here[0] if here.size else np.nan


def draw_ablation(folder, scales, condition="all", layer=None, quiet=False):
    """Accuracy, axis coherence and cross alignment against the data scale, the last two at one
    layer -> files."""
    layer = summary_layer(folder, scales) if layer is None else layer
    accuracy, tag = read_accuracy(folder, scales), CONDITIONS[condition]
    coherence = [
        read_curves(folder, f"sign_corrected_consistency_{scale}_{tag}") or {} for scale in scales
    ]
    alignment = [
        (read_curves(folder, alignment_file(folder, scale, condition)) or {}).get("")
        for scale in scales
    ]
    fig, axes = plots.plt.subplots(1, 3, figsize=(max(14, 3 * (1 + 0.8 * len(scales))), 4.6))
    _trajectory(axes[0], accuracy, scales)
    axes[0].set_title("right in both orders")
    for group, color in GROUP_COLORS.items():
        values, low, high, n = (
            np.array([_at(curves.get(group), field, layer) for curves in coherence])
            for field in ("mean", "low", "high", "n")
        )
        few = (
            "; too few in"
            f" {', '.join(scale for scale, value in zip(scales, values) if np.isnan(value))}"
            if np.isnan(values).any()
            else ""
        )
        _over_scales(
            axes[1],
            scales,
            values,
            color,
            plots.with_n(group, np.nan_to_num(n[np.isfinite(values)]).astype(int)) + few,
            low,
            high,
        )
    axes[1].set(title=f"axis coherence, layer {layer}", ylabel="mean pairwise cosine")
    names = (
        "per_sample_mean",
        "low",
        "high",
        "mean_delta_alignment",
        "permutation_mean",
        "permutation_std",
        "n_samples",
        "per_sample_low",
        "per_sample_high",
    )
    found = {name: np.array([_at(curve, name, layer) for curve in alignment]) for name in names}
    if np.isfinite(found["per_sample_mean"]).any():
        low, high = (
            np.where(np.isnan(found[f"per_sample_{end}"]), found[end], found[f"per_sample_{end}"])
            for end in ("low", "high")
        )
        label = plots.with_n("mean over scenes", np.nan_to_num(found["n_samples"]).astype(int))
        _over_scales(
            axes[2],
            scales,
            found["per_sample_mean"],
            ALIGNMENT_COLORS["per_sample_mean"],
            label,
            low,
            high,
        )
        look = {"linestyle": "--", "marker": "s", "markersize": 4}
        _over_scales(
            axes[2],
            scales,
            found["mean_delta_alignment"],
            ALIGNMENT_COLORS["mean_delta_alignment"],
            "cosine of the mean deltas",
            **look,
        )
        x, null, spread = (
            np.arange(len(scales)),
            found["permutation_mean"],
            2 * np.nan_to_num(found["permutation_std"]),
        )
        style = {
            "fmt": "_",
            "color": ALIGNMENT_COLORS["permutation"],
            "elinewidth": 6,
            "alpha": 0.4,
            "markersize": 14,
        }
        axes[2].errorbar(x, null, yerr=spread, label="scenes permuted (2 s.d.)", **style)
    else:
        say(axes[2], f"not measured at layer {layer}" if any(alignment) else "not measured")
    axes[2].set(
        title=f"alignment of height and distance, layer {layer}",
        ylabel="cosine of vertical and distance delta",
    )
    for ax in axes[1:]:
        ax.axhline(0, color=plots.EVEN_COLOR, linewidth=0.8, zorder=1)
        ax.set_xlim(-0.3, len(scales) - 0.7)
        _scale_ticks(ax, scales)
    for ax in axes:
        ax.set_xlabel("data scale")
        if ax.get_legend_handles_labels()[0]:
            legend_below(ax, ax.get_legend_handles_labels()[0], 2)
    fig.suptitle(
        f"What more spatial data changes, {Path(folder).name}, states of {WORDS[condition]}",
        fontsize=10.5,
    )
    settings = settings_of(folder, condition, scales=list(scales), layer=layer)
    return plots.save(
        fig, path_of(folder, condition, "cross_scale", "ablation_summary"), settings, quiet=quiet
    )


# ---- everything ----


def draw_merge(folder, scales, layer=None, quiet=False):
    """Every figure that compares scales -> files. layer: that of the ablation summary, three
    quarters of the depth where None."""
    scales = list(scales)
    if not scales:
        raise UsageError(f"no scale of {folder} to compare; name some with --scales")
    written = (
        draw_accuracy_bars(folder, scales, quiet=quiet)
        + draw_accuracy_trajectory(folder, scales, quiet)
        + draw_accuracy_strata(folder, scales, quiet)
    )
    for condition in CONDITIONS:
        for family in FAMILIES:
            written += draw_cross_consistency(folder, scales, condition, family, quiet)
        if condition != "all_with_validity":
            written += draw_cross_alignment(folder, scales, condition, quiet)
            written += draw_vd_ei(folder, scales, condition, quiet)
            written += draw_ablation(folder, scales, condition, layer, quiet)
    return written

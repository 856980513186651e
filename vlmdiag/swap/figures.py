"""Figures of one scale of the swap-pair analysis, drawn from saved files only:
results/<model>/{json,csv,npz} -> results/<model>/plots.

draw_scale(folder, scale) draws them all; every function returns the files that it wrote. A value
that is null (too few pairs) is a gap, and the legend says so. Figures of arXiv 2605.30161; names
and layout by our study of it, sections 2, 3 and 5.3."""

import re
from pathlib import Path

import numpy as np

from vlmdiag.cli import UsageError
from vlmdiag.figures import plots
from vlmdiag.swap.figures_pca import draw_pca
from vlmdiag.swap.figures_scales import draw_accuracy_bars
from vlmdiag.swap.saved import (
    CONDITIONS,
    FAMILIES,
    GROUPS,
    SPLITS,
    alignment_file,
    number,
    read_curves,
    read_json,
    read_matrix,
    representative,
    unreliable,
)
from vlmdiag.swap.style import (
    ALIGNMENT_COLORS,
    CATEGORY_COLORS,
    GROUP_COLORS,
    SPLIT_COLORS,
    WORDS,
    curve_label,
    dagger,
    draw_curve,
    footnote,
    layer_axes,
    legend,
    legend_below,
    null_handle,
    path_of,
    settings_of,
)

# ---- curves over layers ----


def consistency_range(folder, scales):
    """(low, high) that holds every mean, interval and null of both families in all scales and
    conditions, with 5 % to spare; None if nothing is measured."""
    seen = [0.0]
    for scale in scales:
        for stem, *_ in FAMILIES.values():
            for tag in ("all_pairs", "both_correct"):
                for curve in (read_curves(folder, f"{stem}_{scale}_{tag}") or {}).values():
                    spread = 2 * np.nan_to_num(curve.get("null_std", 0.0))
                    seen += [curve[field] for field in ("mean", "low", "high") if field in curve]
                    seen += (
                        [curve["null_mean"] - spread, curve["null_mean"] + spread]
                        if "null_mean" in curve
                        else []
                    )
    values = np.concatenate([np.atleast_1d(value) for value in seen])
    low, high = np.nanmin(values), np.nanmax(values)
    return None if low == high else (low - 0.05 * (high - low), high + 0.05 * (high - low))


def draw_consistency(folder, scale, condition, family, ylim=None, quiet=False):
    """Coherence of the groups' or consistency of the categories' deltas over layers, one figure ->
    files, [] where there is nothing to read."""
    stem, name, title, ylabel = FAMILIES[family]
    curves = read_curves(folder, f"{stem}_{scale}_{CONDITIONS[condition]}")
    if not curves:
        return []
    marked = unreliable(folder, scale) if condition == "all_with_validity" else {}
    colors = GROUP_COLORS if family == "sign_corrected_consistency" else CATEGORY_COLORS
    fig, ax = plots.plt.subplots(figsize=(7.5, 4.6))
    null = False
    for series in [series for series in colors if series in curves] + sorted(
        set(curves) - set(colors)
    ):
        faded = (
            {"alpha": 0.45}
            if any(member in marked for member in GROUPS.get(series, (series,)))
            else {}
        )
        style = "--" if series in ("right", "under", "close") else "-"
        label = curve_label(dagger(series, marked), curves[series])
        null |= draw_curve(
            ax,
            curves[series],
            label,
            colors.get(series, plots.EVEN_COLOR),
            linestyle=style,
            **faded,
        )
    if null:
        null_handle(ax, "shuffled labels (band: 2 s.d.)")
    layer_axes(ax, f"{title}, {Path(folder).name} {scale}, {WORDS[condition]}", ylabel)
    if ylim:
        ax.set_ylim(*ylim)
    legend(ax)
    footnote(fig, marked)
    return plots.save(
        fig,
        path_of(folder, condition, family, f"{name}_{scale}"),
        settings_of(folder, condition, scale=scale, ylim=ylim),
        quiet=quiet,
    )


def _alignment(ax, curve):
    layer, mean = curve["layer"], curve["per_sample_mean"]
    n = curve.get("n_samples", np.array([np.nan]))
    color, blank = ALIGNMENT_COLORS["per_sample_mean"], np.full(len(layer), np.nan)
    label = curve_label("mean over scenes", {"mean": mean, "layer": layer, "n": n})
    ax.plot(layer, mean, color=color, label=label)
    p_values = curve.get("p_value", blank)
    for chosen, face, text in (
        (~(p_values >= 0.05), color, None),
        (p_values >= 0.05, "white", r"permutation p $\geq$ 0.05"),
    ):
        if chosen.any():
            ax.plot(
                layer[chosen],
                mean[chosen],
                "o",
                markersize=5,
                color=color,
                markerfacecolor=face,
                label=text,
            )
    low, high = (curve.get(f"per_sample_{end}", curve.get(end, blank)) for end in ("low", "high"))
    ax.fill_between(layer, low, high, color=color, alpha=0.18, linewidth=0)
    if "mean_delta_alignment" in curve:
        ax.plot(
            layer,
            curve["mean_delta_alignment"],
            "s--",
            markersize=3.5,
            color=ALIGNMENT_COLORS["mean_delta_alignment"],
            label="cosine of the mean deltas",
        )
    if "sign_flip_std" in curve:
        spread = 2 * np.nan_to_num(curve["sign_flip_std"])
        ax.fill_between(
            layer,
            -spread,
            spread,
            color=plots.SKY,
            alpha=0.25,
            linewidth=0,
            label="signs tossed (band: 2 s.d.)",
        )
    if "permutation_mean" in curve:
        null, spread = (
            curve["permutation_mean"],
            2 * np.nan_to_num(curve.get("permutation_std", 0.0)),
        )
        ax.plot(
            layer,
            null,
            ":",
            color=ALIGNMENT_COLORS["permutation"],
            label="scenes permuted (band: 2 s.d.)",
        )
        ax.fill_between(
            layer,
            null - spread,
            null + spread,
            color=ALIGNMENT_COLORS["permutation"],
            alpha=0.18,
            linewidth=0,
        )


def draw_alignment(folder, scale, condition, quiet=False):
    """Cosine of the vertical and the distance delta of one scene over layers, with its permutation
    band -> files."""
    curves = read_curves(folder, alignment_file(folder, scale, condition))
    if not curves or "per_sample_mean" not in curves.get("", {}):
        return []
    marked = unreliable(folder, scale) if condition == "all_with_validity" else {}
    marked = {name: found for name, found in marked.items() if name not in GROUPS["horizontal"]}
    axes = " and ".join(dagger(group, marked) for group in ("vertical", "distance"))
    fig, ax = plots.plt.subplots(figsize=(7.5, 4.6))
    _alignment(ax, curves[""])
    layer_axes(
        ax,
        f"Alignment of {axes} deltas, {Path(folder).name} {scale}, {WORDS[condition]}",
        "cosine of vertical and distance delta",
    )
    legend(ax)
    footnote(fig, marked)
    path = path_of(folder, condition, "cross_alignment", f"cross_alignment_{scale}")
    return plots.save(fig, path, settings_of(folder, condition, scale=scale), quiet=quiet)


# ---- heatmap ----


def draw_heatmaps(folder, scale, condition, quiet=False):
    """Cosines between the categories' mean deltas, one figure a representative layer; grey where a
    category has too few pairs -> files."""
    written, tag = [], CONDITIONS[condition]
    names = list(CATEGORY_COLORS)
    counts = read_curves(folder, f"within_cat_consistency_{scale}_{tag}") or {}
    marked = unreliable(folder, scale) if condition == "all_with_validity" else {}
    found = [
        re.fullmatch(rf"delta_similarity_{re.escape(scale)}_L(\d+)_{tag}", path.stem)
        for path in Path(folder, "csv").glob("delta_similarity_*.csv")
    ]
    shown = representative(folder, scale)
    for layer in sorted(
        int(match[1]) for match in found if match and (shown is None or int(match[1]) in shown)
    ):
        matrix = read_matrix(Path(folder, "csv", f"delta_similarity_{scale}_L{layer}_{tag}.csv"))
        fig, ax = plots.plt.subplots(figsize=(6.6, 5.6))
        image = plots.heatmap(
            ax,
            matrix,
            f"Cosine between mean deltas\n{Path(folder).name} {scale}, layer {layer},"
            f" {WORDS[condition]}",
            -1,
            1,
            "",
            "",
            "RdBu_r",
        )
        ax.set_aspect("equal")
        for (row, column), value in np.ndenumerate(matrix):
            if np.isfinite(value):
                ax.text(
                    column,
                    row,
                    f"{value:.2f}".replace("-", "\u2212"),
                    ha="center",
                    va="center",
                    color="white" if abs(value) > 0.62 else "black",
                    fontsize=9.5,
                )
        labels = [dagger(name, marked) for name in names]
        sizes = [_count_at(counts.get(name), layer) for name in names]
        ax.set_xticks(range(6), labels)
        ax.set_yticks(
            range(6),
            [
                label if size is None else f"{label}\nn = {size}"
                for label, size in zip(labels, sizes)
            ],
        )
        ax.tick_params(length=0)
        for edge in (1.5, 3.5):
            ax.axhline(edge, color="white", linewidth=2.5)
            ax.axvline(edge, color="white", linewidth=2.5)
        fig.colorbar(image, ax=ax, label="cosine", shrink=0.85)
        absent = [name for name, value in zip(names, np.diag(matrix)) if np.isnan(value)]
        if absent:
            ax.set_xlabel(f"grey: too few pairs ({', '.join(absent)})", fontsize=8.5)
        footnote(fig, marked)
        path = path_of(folder, condition, "heatmap", f"heatmap_{scale}_L{layer}")
        written += plots.save(
            fig, path, settings_of(folder, condition, scale=scale, layer=layer), quiet=quiet
        )
    return written


def _count_at(curve, layer):
    here = curve["n"][curve["layer"] == layer] if curve and "n" in curve else np.array([])
    return int(here[0]) if here.size and np.isfinite(here[0]) else None


# ---- strata, outlier dimensions ----


def _strata_curves(folder, name, of_cell, field):
    """{split: curve} from the "strata" of json/<name>.json; of_cell takes an entry to the one that
    has them, field names the value in a stratum."""
    cells = {
        key: (of_cell(cell) or {}).get("strata", {})
        for key, cell in (read_json(folder, name) or {}).items()
        if isinstance(cell, dict)
    }
    cells = {
        int(found[1]): cell
        for key, cell in cells.items()
        if (found := re.fullmatch(r"(?:distance_)?L(\d+)", key))
    }
    curves = {}
    for split in SPLITS:
        rows = [cells[layer].get(split, {}) for layer in sorted(cells)]
        inner = [
            row.get(field, {}) if field != "mean" else row | {"value": row.get("mean")}
            for row in rows
        ]
        curves[split] = {"layer": np.array(sorted(cells))} | {
            name: np.array([number(row.get(key)) for row in inner])
            for name, key in (("mean", "value"), ("low", "low"), ("high", "high"))
        }
        counts = [row.get("n", {}) for row in rows]
        curves[split]["n"] = np.array(
            [
                number(n) if not isinstance(n, dict) else n.get("far", 0) + n.get("close", 0)
                for n in counts
            ],
            float,
        )
    return {
        split: curve for split, curve in curves.items() if len(curve["layer"]) and curve["n"].any()
    }


def draw_strata(folder, scale, quiet=False):
    """Coherence of the distance axis and its entanglement with the vertical one, over layers, one
    line a stratum -> files, [] without strata."""
    coherence = _strata_curves(
        folder, f"sign_corrected_consistency_{scale}_all_pairs", lambda cell: cell, "mean"
    )
    entanglement = _strata_curves(folder, f"vd_ei_{scale}", lambda cell: cell, "eq3_raw")
    if not coherence and not entanglement:
        return []
    fig, axes = plots.plt.subplots(1, 2, figsize=(11, 4.6))
    panels = (
        ("coherence of the distance axis", "mean pairwise cosine of deltas"),
        ("entanglement of distance with all vertical pairs", "equation 3"),
    )
    for ax, curves, (title, ylabel) in zip(axes, (coherence, entanglement), panels, strict=True):
        for split, curve in curves.items():
            draw_curve(ax, curve, curve_label(split, curve), SPLIT_COLORS[split])
        layer_axes(ax, title, ylabel)
        legend_below(ax, ax.get_legend_handles_labels()[0])
    fig.suptitle(
        f"Distance pairs by stratum, {Path(folder).name} {scale}; consistent: the farther object is"
        " higher in the picture",
        fontsize=10.5,
    )
    return plots.save(
        fig,
        path_of(folder, "all", "strata", f"strata_{scale}"),
        settings_of(folder, "all", scale=scale),
        quiet=quiet,
    )


def draw_outliers(folder, scale, quiet=False):
    """How much of the deltas' energy few dimensions hold, and the coherence with and without them,
    over layers -> files."""
    found = {
        int(key[1:]): cell for key, cell in (read_json(folder, f"outliers_{scale}") or {}).items()
    }
    if not found:
        return []
    layers = np.array(sorted(found))
    share = np.array([[number(value) for value in found[layer]["share"]] for layer in layers])
    top = share.shape[1]
    fig, axes = plots.plt.subplots(1, 2, figsize=(11, 4.6))
    for count in sorted({1, top}):
        axes[0].plot(
            layers,
            share[:, count - 1],
            marker="o",
            markersize=3,
            label=f"the {count} largest" if count > 1 else "the largest",
        )
    layer_axes(axes[0], "energy of the deltas in single dimensions", "share of the sum of squares")
    axes[0].set_ylim(0, 1)
    for group, color in GROUP_COLORS.items():
        for name, style in (("coherence", "-"), ("coherence_without", "--")):
            values = np.array([number(found[layer][name][group]) for layer in layers])
            axes[1].plot(
                layers,
                values,
                style,
                color=color,
                marker="o",
                markersize=3,
                label=group if style == "-" else None,
            )
    axes[1].plot(
        [], [], "--", color=plots.EVEN_COLOR, label=f"without the {top} largest dimensions"
    )
    layer_axes(axes[1], "axis coherence", "mean pairwise cosine of deltas")
    for ax in axes:
        legend_below(ax, ax.get_legend_handles_labels()[0])
    fig.suptitle(
        plots.with_n(
            f"Outlier dimensions, {Path(folder).name} {scale}, all pairs",
            [found[layer]["n"] for layer in layers],
        ),
        fontsize=10.5,
    )
    return plots.save(
        fig,
        path_of(folder, "all", "outliers", f"outliers_{scale}"),
        settings_of(folder, "all", scale=scale),
        quiet=quiet,
    )


# ---- everything ----


def draw_scale(folder, scale, quiet=False):
    """Every figure of one scale, from the files that are there -> files. UsageError where there are
    none."""
    written = []
    for condition in CONDITIONS:
        for family in FAMILIES:
            written += draw_consistency(folder, scale, condition, family, quiet=quiet)
        written += draw_alignment(folder, scale, condition, quiet=quiet)
        written += draw_heatmaps(folder, scale, condition, quiet=quiet)
    written += draw_strata(folder, scale, quiet) + draw_outliers(folder, scale, quiet)
    if Path(folder, "npz", f"vectors_{scale}.npz").exists():
        written += draw_pca(folder, scale, quiet=quiet)
    if read_json(folder, f"pred_stats_{scale}") is not None:
        written += draw_accuracy_bars(folder, [scale], f"accuracy_group_bars_{scale}", quiet)
    if not written:
        raise UsageError(
            f"{folder} has no results of scale {scale}; make them with swap_analysis.py --scales"
            f" {scale}"
        )
    return written

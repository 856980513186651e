"""Figures of one scale of the swap-pair analysis, drawn from saved files only:
results/<model>/{json,csv,npz} -> results/<model>/plots.

draw_scale(folder, scale) draws the summary, with all_figures every one; each function returns the
files that it wrote. A value that is null (too few pairs) is a gap, and the legend says so. Figures
of arXiv 2605.30161; names and layout as in docs/studies/swap_analysis.md, sections 2, 3 and 5.3.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np

from vlmdiag.cli import UsageError
from vlmdiag.figures import plots
from vlmdiag.swap.figures_pca import draw_pca
from vlmdiag.swap.figures_scales import draw_accuracy_bars, summary_layer
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
    model_of,
    null_handle,
    path_of,
    settings_of,
    within_cosines,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from vlmdiag.swap.saved import Curve
    from vlmdiag.swap.style import Marked


def marked_of(folder: str | Path, scale: str, condition: str) -> Marked:
    """The unreliable categories where a condition marks them."""
    return unreliable(folder, scale) if condition == "all_with_validity" else {}


# ---- curves over layers ----


def consistency_range(folder: str | Path, scales: Sequence[str]) -> tuple[float, float] | None:
    """(low, high) that holds every mean, interval and null of both families in all scales and
    conditions, with 5 % to spare; None if nothing is measured."""
    values = [np.zeros(1)]
    for scale in scales:
        for family in FAMILIES.values():
            for tag in ("all_pairs", "both_correct"):
                curves = read_curves(folder, f"{family.stem}_{scale}_{tag}") or {}
                for curve in curves.values():
                    values += _reach(curve)
    together = np.concatenate(values)
    low, high = np.nanmin(together), np.nanmax(together)
    if low == high:
        return None
    return low - 0.05 * (high - low), high + 0.05 * (high - low)


def _reach(curve: Curve) -> list[np.ndarray]:
    """All that is drawn of a curve: mean, interval, null with two standard deviations."""
    values = [curve[field] for field in ("mean", "low", "high") if field in curve]
    if "null_mean" in curve:
        spread = 2 * np.nan_to_num(curve.get("null_std", np.zeros(1)))
        values += [curve["null_mean"] - spread, curve["null_mean"] + spread]
    return values


def draw_consistency(
    folder: str | Path,
    scale: str,
    condition: str,
    family: str,
    ylim: tuple[float, float] | None = None,
    quiet: bool = False,
) -> list[Path]:
    """Coherence of the groups' or consistency of the categories' deltas over layers, one figure ->
    files, [] where there is nothing to read."""
    consistency = FAMILIES[family]
    curves = read_curves(folder, f"{consistency.stem}_{scale}_{CONDITIONS[condition]}")
    if not curves:
        return []
    marked = marked_of(folder, scale, condition)
    colors = GROUP_COLORS if family == "sign_corrected_consistency" else CATEGORY_COLORS
    fig, ax = plt.subplots(figsize=(7.5, 4.6))
    has_null = False
    known = [series for series in colors if series in curves]
    for series in known + sorted(set(curves) - set(colors)):
        is_marked = any(member in marked for member in GROUPS.get(series, (series,)))
        has_null |= draw_curve(
            ax,
            curves[series],
            curve_label(dagger(series, marked), curves[series]),
            colors.get(series, plots.EVEN_COLOR),
            linestyle="--" if series in ("right", "under", "close") else "-",
            **({"alpha": 0.45} if is_marked else {}),
        )
    if has_null:
        null_handle(ax, "shuffled labels (band: 2 s.d.)")
    title = f"{consistency.title}, {model_of(folder)} {scale}, {WORDS[condition]}"
    layer_axes(ax, title, consistency.ylabel)
    if ylim:
        ax.set_ylim(*ylim)
    legend(ax)
    footnote(fig, condition, marked)
    path = path_of(folder, condition, family, f"{consistency.figure}_{scale}")
    settings = settings_of(folder, condition, scale=scale, ylim=ylim)
    return plots.save(fig, path, settings, quiet=quiet)


def _draw_alignment(ax: Axes, curve: Curve) -> None:
    """Mean over scenes with its interval, filled where the permutation p is below 0.05; the cosine
    of the mean deltas; both nulls."""
    layer = curve["layer"]
    mean = curve["per_sample_mean"]
    blank = np.full(len(layer), np.nan)
    color = ALIGNMENT_COLORS["per_sample_mean"]
    n = curve.get("n_samples", np.array([np.nan]))
    label = curve_label("mean over scenes", {"mean": mean, "layer": layer, "n": n})
    ax.plot(layer, mean, color=color, label=label)
    p_values = curve.get("p_value", blank)
    markers = (
        (~(p_values >= 0.05), color, None),
        (p_values >= 0.05, "white", r"permutation p $\geq$ 0.05"),
    )
    for chosen, face, text in markers:
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
        null = curve["permutation_mean"]
        spread = 2 * np.nan_to_num(curve.get("permutation_std", np.zeros(1)))
        color = ALIGNMENT_COLORS["permutation"]
        ax.plot(layer, null, ":", color=color, label="scenes permuted (band: 2 s.d.)")
        low, high = null - spread, null + spread
        ax.fill_between(layer, low, high, color=color, alpha=0.18, linewidth=0)


def draw_alignment(
    folder: str | Path, scale: str, condition: str, quiet: bool = False
) -> list[Path]:
    """Cosine of the vertical and the distance delta of one scene over layers, with its permutation
    band -> files."""
    curve = (read_curves(folder, alignment_file(scale, condition)) or {}).get("", {})
    if "per_sample_mean" not in curve:
        return []
    horizontal = GROUPS["horizontal"]
    marked = {
        name: accuracies
        for name, accuracies in marked_of(folder, scale, condition).items()
        if name not in horizontal
    }
    axes = " and ".join(dagger(group, marked) for group in ("vertical", "distance"))
    fig, ax = plt.subplots(figsize=(7.5, 4.6))
    _draw_alignment(ax, curve)
    title = f"Alignment of {axes} deltas, {model_of(folder)} {scale}, {WORDS[condition]}"
    layer_axes(ax, title, "cosine of vertical and distance delta")
    legend(ax)
    footnote(fig, condition, marked)
    path = path_of(folder, condition, "cross_alignment", f"cross_alignment_{scale}")
    return plots.save(fig, path, settings_of(folder, condition, scale=scale), quiet=quiet)


# ---- heatmap ----


def draw_heatmaps(
    folder: str | Path,
    scale: str,
    condition: str,
    quiet: bool = False,
    layers: Sequence[int] | None = None,
) -> list[Path]:
    """Cosines between the categories' mean deltas, one figure a layer, of the representative ones
    where layers is None; grey where a category has too few pairs -> files."""
    tag = CONDITIONS[condition]
    counts = read_curves(folder, f"within_cat_consistency_{scale}_{tag}") or {}
    marked = marked_of(folder, scale, condition)
    shown = representative(folder, scale) if layers is None else layers
    written = []
    for layer, path in sorted(_similarity_files(folder, scale, tag).items()):
        if shown is not None and layer not in shown:
            continue
        fig, ax = plt.subplots(figsize=(6.6, 5.6))
        title = (
            f"Cosine between mean deltas\n{model_of(folder)} {scale}, layer {layer},"
            f" {WORDS[condition]}"
        )
        n = {name: _count_at(counts.get(name), layer) for name in CATEGORY_COLORS}
        _draw_heatmap(ax, read_matrix(path), title, n, marked)
        footnote(fig, condition, marked)
        figure_path = path_of(folder, condition, "heatmap", f"heatmap_{scale}_L{layer}")
        settings = settings_of(folder, condition, scale=scale, layer=layer)
        written += plots.save(fig, figure_path, settings, quiet=quiet)
    return written


def _similarity_files(folder: str | Path, scale: str, tag: str) -> dict[int, Path]:
    """{layer: csv/delta_similarity_{scale}_L{layer}_{tag}.csv}."""
    name = re.compile(rf"delta_similarity_{re.escape(scale)}_L(\d+)_{tag}")
    paths = Path(folder, "csv").glob("delta_similarity_*.csv")
    matches = ((name.fullmatch(path.stem), path) for path in paths)
    return {int(match[1]): path for match, path in matches if match}


def _draw_heatmap(
    ax: Axes, matrix: np.ndarray, title: str, n: Mapping[str, int | None], marked: Marked
) -> None:
    """A 6 x 6 matrix with its values written in, lines between the groups. n: pairs by
    category."""
    image = plots.heatmap(ax, matrix, title, -1, 1, "", "", "RdBu_r")
    ax.set_aspect("equal")
    for (row, column), value in np.ndenumerate(matrix):
        if np.isfinite(value):
            text = f"{value:.2f}".replace("-", "\u2212")
            color = "white" if abs(value) > 0.62 else "black"
            ax.text(column, row, text, ha="center", va="center", color=color, fontsize=9.5)
    with_counts = [
        dagger(name, marked) + ("" if count is None else f"\nn = {count}")
        for name, count in n.items()
    ]
    ax.set_xticks(range(6), with_counts)
    ax.set_yticks(range(6), with_counts)
    ax.tick_params(length=0)
    for edge in (1.5, 3.5):
        ax.axhline(edge, color="white", linewidth=2.5)
        ax.axvline(edge, color="white", linewidth=2.5)
    ax.figure.colorbar(image, ax=ax, label="cosine", shrink=0.85)
    absent = [name for name, value in zip(n, np.diag(matrix)) if np.isnan(value)]
    notes = "n: pairs behind a mean delta; cosines of means, without intervals"
    if absent:
        notes += f"\ngrey: too few pairs ({', '.join(absent)})"
    ax.set_xlabel(notes, fontsize=8.5)


def _count_at(curve: Curve | None, layer: int) -> int | None:
    """n of a curve at a layer, None where there is none."""
    if curve is None or "n" not in curve:
        return None
    n = curve["n"][curve["layer"] == layer]
    return int(n[0]) if n.size and np.isfinite(n[0]) else None


# ---- strata, outlier dimensions ----


def _strata_curves(
    folder: str | Path, name: str, series: str, form: str | None
) -> dict[str, Curve]:
    """{split: curve} from the "strata" in the cells of one series of json/<name>.json. form: the
    field of a stratum that holds {value, low, high}; None: the stratum itself, its mean."""
    cells = (read_layers(folder, name) or {}).get(series, {})
    strata = {
        layer: cell.get("strata", {}) for layer, cell in cells.items() if isinstance(cell, dict)
    }
    curves = {}
    for split in SPLITS:
        rows = []
        for of_layer in strata.values():
            stratum = of_layer.get(split, {})
            measured = stratum if form is None else stratum.get(form, {})
            n = stratum.get("n", {})
            if isinstance(n, dict):
                n = n.get("far", 0) + n.get("close", 0)
            mean = measured.get("mean" if form is None else "value")
            rows.append(
                {"mean": mean, "low": measured.get("low"), "high": measured.get("high"), "n": n}
            )
        curve = curve_of(list(strata), rows)
        if rows and curve["n"].any():
            curves[split] = curve
    return curves


def draw_strata(folder: str | Path, scale: str, quiet: bool = False) -> list[Path]:
    """Coherence of the distance axis and its entanglement with the vertical one, over layers, one
    line a stratum -> files, [] without strata."""
    coherence = _strata_curves(
        folder, f"sign_corrected_consistency_{scale}_all_pairs", "distance", None
    )
    entanglement = _strata_curves(folder, f"vd_ei_{scale}", "", "eq3_raw")
    if not coherence and not entanglement:
        return []
    fig, axes = plt.subplots(1, 2, figsize=(11, 4.6))
    panels = (
        (coherence, "coherence of the distance axis", "mean pairwise cosine of deltas"),
        (
            entanglement,
            "entanglement of distance with all vertical pairs",
            "entanglement index (equation 3)",
        ),
    )
    for ax, (curves, title, ylabel) in zip(axes, panels, strict=True):
        for split, curve in curves.items():
            draw_curve(ax, within_cosines(curve), curve_label(split, curve), SPLIT_COLORS[split])
        layer_axes(ax, title, ylabel)
        legend_below(ax)
    fig.suptitle(
        f"Distance pairs by stratum, {model_of(folder)} {scale}; consistent: the farther object is"
        " higher in the picture",
        fontsize=10.5,
    )
    path = path_of(folder, "all", "strata", f"strata_{scale}")
    return plots.save(fig, path, settings_of(folder, "all", scale=scale), quiet=quiet)


def draw_outliers(folder: str | Path, scale: str, quiet: bool = False) -> list[Path]:
    """How much of the deltas' energy few dimensions hold, and the coherence with and without them,
    over layers -> files."""
    cells = (read_layers(folder, f"outliers_{scale}") or {}).get("", {})
    if not cells:
        return []
    layers = np.array(list(cells))
    share = np.array([[number(value) for value in cell["share"]] for cell in cells.values()])
    top = share.shape[1]
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6))
    for count in sorted({1, top}):
        label = f"the {count} largest" if count > 1 else "the largest"
        left.plot(layers, share[:, count - 1], marker="o", markersize=3, label=label)
    layer_axes(left, "energy of the deltas in single dimensions", "share of the sum of squares")
    left.set_ylim(0, 1)
    for group, color in GROUP_COLORS.items():
        for field, style in (("coherence", "-"), ("coherence_without", "--")):
            values = np.array([number(cell[field][group]) for cell in cells.values()])
            look = {"color": color, "marker": "o", "markersize": 3}
            if style == "-":
                look["label"] = group
            right.plot(layers, values, style, **look)
    without = f"without the {top} largest dimensions"
    right.plot([], [], "--", color=plots.EVEN_COLOR, label=without)
    layer_axes(right, "axis coherence", "mean pairwise cosine of deltas")
    for ax in (left, right):
        legend_below(ax)
    title = f"Outlier dimensions, {model_of(folder)} {scale}, all pairs"
    fig.suptitle(plots.with_n(title, [cell["n"] for cell in cells.values()]), fontsize=10.5)
    path = path_of(folder, "all", "outliers", f"outliers_{scale}")
    return plots.save(fig, path, settings_of(folder, "all", scale=scale), quiet=quiet)


# ---- everything ----


def draw_scale(
    folder: str | Path, scale: str, quiet: bool = False, all_figures: bool = False
) -> list[Path]:
    """The summary of one scale, or every figure that its files allow -> files. UsageError where
    there are none.

    The summary: answers, axis coherence, strata, alignment, and of the layer at three quarters of
    the depth the cosines between categories and the PCA, all of all pairs.
    """
    written = []
    for condition in CONDITIONS if all_figures else ("all",):
        for family in FAMILIES if all_figures else ("sign_corrected_consistency",):
            written += draw_consistency(folder, scale, condition, family, quiet=quiet)
        written += draw_alignment(folder, scale, condition, quiet=quiet)
    written += draw_strata(folder, scale, quiet)
    if all_figures:
        for condition in CONDITIONS:
            written += draw_heatmaps(folder, scale, condition, quiet)
        written += draw_outliers(folder, scale, quiet)
        if Path(folder, "npz", f"vectors_{scale}.npz").exists():
            written += draw_pca(folder, scale, quiet=quiet)
    else:
        layers = shown_layer(folder, scale)
        written += draw_heatmaps(folder, scale, "all", quiet, layers)
        if layers:
            written += draw_pca(folder, scale, ["all"], ["pca"], quiet, layers)
    if read_json(folder, f"pred_stats_{scale}") is not None:
        written += draw_accuracy_bars(folder, [scale], f"accuracy_group_bars_{scale}", quiet)
    if not written:
        raise UsageError(
            f"{folder} has no results of scale {scale}; make them with swap_analysis.py --scales"
            f" {scale}"
        )
    return written


def shown_layer(folder: str | Path, scale: str) -> list[int]:
    """[the saved layer nearest to summary_layer()], [] where no vectors are saved."""
    layers = representative(folder, scale)
    wanted = summary_layer(folder, [scale])
    if not layers:
        return []
    return [layers[-1] if wanted is None else min(layers, key=lambda layer: abs(layer - wanted))]

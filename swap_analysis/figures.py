"""Figures of the swap-pair analysis, drawn from saved files only: results/<model>/{json,csv,npz} -> results/<model>/plots.

draw_scale(folder, scale) draws one scale, draw_merge(folder, scales) what compares scales; every function returns the files that it wrote. A value that is null
(too few pairs) is a gap, and the legend says so. Figures of arXiv 2605.30161; palette, names and layout by our study of it, sections 2, 3 and 5.3."""

import csv
import json
import re
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.lines import Line2D

import plots
from cli import UsageError

CATEGORY_COLORS = {"left": "#ff7f0e", "right": "#ffbb78", "above": "#2ca02c", "under": "#98df8a", "far": "#9467bd", "close": "#c5b0d5"}
GROUPS = {"horizontal": ("left", "right"), "vertical": ("above", "under"), "distance": ("far", "close")}  # the canonical category first
GROUP_COLORS = {group: CATEGORY_COLORS[canonical] for group, (canonical, _) in GROUPS.items()}
SCALE_COLORS = {"vanilla": "#1f77b4", "80k": "#ff7f0e", "400k": "#2ca02c", "800k": "#d62728", "2m": "#9467bd", "roborefer": "#8c564b"}
SAME = {"below": "under", "beneath": "under", "near": "close"}
CONDITIONS = {"all": "all_pairs", "both_correct": "both_correct", "all_with_validity": "all_pairs"}  # folder under plots/ -> tag of the files it reads
WORDS = {"all": "all pairs", "both_correct": "pairs answered right in both orders", "all_with_validity": "all pairs"}
FAMILIES = {  # the two consistency families: folder under plots/ -> (JSON file, file name, title, y axis)
    "sign_corrected_consistency": ("sign_corrected_consistency", "sign_corrected", "Axis coherence (sign-corrected)", "mean pairwise cosine of deltas"),
    "within_cat_consistency": ("within_cat_consistency", "within_cat", "Within-category consistency", "mean pairwise cosine of deltas"),
}
VD_FORMS = {  # panel -> field in vd_ei_{scale}.json, its interval in <field>_low and _high
    "equation 3": "eq3_raw",
    "equation 3, cross-fitted": "eq3_raw_crossfit",
    "cosine of the groups' mean deltas": "group_cosine_raw",
}
DELTA = "delta = state(swapped) \u2212 state(original)"
UNRELIABLE = "\u2020 accuracy under 0.5 in the original or the swapped order: "
ALIGNMENT_COLORS = {"per_sample_mean": plots.VERMILION, "mean_delta_alignment": plots.PURPLE, "permutation": plots.EVEN_COLOR}


# ---- reading ----


def models(results_dir, model=None):
    """The model folders under results_dir, or the one that --model names. UsageError where there is none."""
    root = Path(results_dir)
    if model is not None:
        if not (root / model).is_dir():
            there = ", ".join(sorted(path.name for path in root.glob("*/"))) or "nothing" if root.is_dir() else "no such folder"
            raise UsageError(f"--model {model}: {root} has {there}; make it with swap_analysis.py --output_dir {root}")
        return [root / model]
    found = sorted(path for path in root.glob("*/") if (path / "json").is_dir() or (path / "npz").is_dir())
    if not found:
        raise UsageError(f"{root} holds no model's results (folders with json/ or npz/); make them with swap_analysis.py --output_dir {root}")
    return found


def find_scales(folder, wanted=None, kind="json/pred_stats"):
    """The scales that have a file <kind>_{scale}, in the order of --scales, else by data scale with names that hold no number last."""
    family, stem = kind.split("/")
    there = [path.stem[len(stem) + 1 :] for path in Path(folder, family).glob(f"{stem}_*.{family}")]
    there = sorted(there, key=lambda scale: (np.isnan(samples_seen(scale)), np.nan_to_num(samples_seen(scale)), scale))
    missing = [scale for scale in wanted or () if scale not in there]
    if missing or not there:
        what = f"--scales {' '.join(missing)}: " if missing else ""
        raise UsageError(f"{what}{folder} has {kind}_* for {', '.join(there) or 'no scale'}; run swap_analysis.py for the scales that are wanted")
    return list(dict.fromkeys(wanted)) if wanted else there


def samples_seen(scale):
    """Fine-tuning samples by a scale's name: vanilla 0, 80k 80000, 2m 2000000, step50 50, full infinite; NaN for any other name."""
    number = re.fullmatch(r"[^\d]*?(\d+(?:\.\d+)?)([km]?)", scale.lower())
    if scale in ("vanilla", "full"):
        return {"vanilla": 0.0, "full": np.inf}[scale]
    return float(number[1]) * {"": 1, "k": 1e3, "m": 1e6}[number[2]] if number else np.nan


def read_json(folder, name):
    """json/<name>.json as a dict, None where there is no such file, UsageError where it is broken."""
    path = Path(folder, "json", f"{name}.json")
    if not path.exists():
        return None
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read ({error}); delete it and run swap_analysis.py again") from error
    if not isinstance(value, dict):
        raise UsageError(f"{path} holds a {type(value).__name__} where an object was wanted; delete it and run swap_analysis.py again")
    return value


def _number(value):
    return float(value) if isinstance(value, (int, float)) else np.nan


def read_curves(folder, name):
    """{series: {"layer": (K,), field: (K,) float}} of json/<name>.json with keys "series_L{n}", "L{n}" or "{n}" (series ""); every series has every
    layer of the file, NaN where it has no value. None without the file."""
    values, found = read_json(folder, name), {}
    for key, value in (values or {}).items():
        parts = re.fullmatch(r"(?:(.+)_)?L?(\d+)", key)
        if parts:
            series = SAME.get(parts[1], parts[1]) or ""
            found.setdefault(series, {})[int(parts[2])] = value if isinstance(value, dict) else {"mean": value}
    layers = sorted({layer for cells in found.values() for layer in cells})
    curves = {}
    for series, cells in found.items():
        fields = {field for cell in cells.values() for field in cell}
        curves[series] = {field: np.array([_number(cells.get(layer, {}).get(field)) for layer in layers]) for field in fields}
        curves[series] = {"mean": np.full(len(layers), np.nan)} | curves[series] | {"layer": np.array(layers)}
    return None if values is None else curves


def unreliable(folder, scale):
    """{category: (acc_orig, acc_swap)} of those that category_validity calls unreliable."""
    validity = read_json(folder, f"category_validity_{scale}") or {}
    flagged = {SAME.get(name, name): cell for name, cell in validity.items() if isinstance(cell, dict) and not cell.get("reliable", True)}
    return {name: (_number(flagged[name].get("acc_orig")), _number(flagged[name].get("acc_swap"))) for name in CATEGORY_COLORS if name in flagged}


def read_matrix(path):
    """A labelled square CSV -> (6, 6) float in the order of CATEGORY_COLORS, NaN for what it lacks."""
    try:
        with open(path, newline="") as file:
            header, *rows = [row for row in csv.reader(file) if row]
        cells = {(SAME.get(row[0], row[0]), SAME.get(name, name)): float(cell or "nan") for row in rows for name, cell in zip(header[1:], row[1:])}
    except (OSError, ValueError, IndexError) as error:
        raise UsageError(f"{path} is no labelled matrix ({error}); delete it and run swap_analysis.py again") from error
    return np.array([[cells.get((row, column), np.nan) for column in CATEGORY_COLORS] for row in CATEGORY_COLORS])


def read_vectors(folder, scale):
    """npz/vectors_{scale}.npz -> iterator of (layer, {"orig", "swap", "delta" (N, d) float64, "groups", "categories" (N,) str, "both" (N,) bool}). Pairs with a
    value that is not finite are left out."""
    path = Path(folder, "npz", f"vectors_{scale}.npz")
    try:
        with np.load(path, allow_pickle=False) as archive:
            layers = sorted(int(key[7:]) for key in archive.files if re.fullmatch(r"delta_L\d+", key))
            for layer in layers:
                cell = {name: archive[f"{name}_L{layer}"] for name in ("orig", "swap", "delta", "groups", "categories", "is_correct_orig", "is_correct_swap")}
                states = {name: cell[name].astype(np.float64) for name in ("orig", "swap", "delta")}
                keep = np.logical_and.reduce([np.isfinite(values).all(axis=1) for values in states.values()])
                labels = {"groups": cell["groups"], "categories": np.array([SAME.get(str(name), str(name)) for name in cell["categories"]], dtype="U16")}
                labels["both"] = cell["is_correct_orig"] & cell["is_correct_swap"]
                yield layer, {name: values[keep] for name, values in (states | labels).items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else f"{type(error).__name__}: {error}"
        raise UsageError(f"{path} cannot be read ({reason}); run swap_analysis.py for scale {scale} again") from error


# ---- colours and words ----


def scale_colors(scales):
    """{scale: colour}: the published ones' own, any other from plots.CYCLE, far from the colours that the figure's other scales have."""
    colors = {scale: SCALE_COLORS[scale] for scale in scales if scale in SCALE_COLORS}
    for scale in sorted(set(scales) - set(colors)):
        cycle = [color for color in plots.CYCLE if len(set(to_rgb(color))) > 1]  # grey is for nulls
        start = zlib.crc32(scale.encode()) % len(cycle)
        turn = cycle[start:] + cycle[:start]
        used = [np.array(to_rgb(color)) for color in colors.values()]
        nearest = [min((np.linalg.norm(to_rgb(color) - other) for other in used), default=9) for color in turn]
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


def _path(folder, condition, *parts):
    return Path(folder, "plots", condition, *parts)


def _settings(folder, condition, **more):
    return {"results": Path(folder).name, "condition": condition, "tag": CONDITIONS.get(condition)} | more


def _listed(marked):
    return ", ".join(f"{name} " + ("(no pairs)" if np.isnan(both).all() else f"{both[0]:.2f} / {both[1]:.2f}") for name, both in marked.items())


def _note(fig, marked):
    """The footnote of all_with_validity: {category: (acc_orig, acc_swap)}."""
    if marked:
        fig.supxlabel(UNRELIABLE + _listed(marked), fontsize=8, color="#444444")


def _legend(ax, columns=3):
    """Inside the axes while it is short, else below in columns."""
    handles, labels = ax.get_legend_handles_labels()
    if len(handles) > 4 or max(map(len, labels)) > 40:
        _below(ax, handles, columns)
    else:
        ax.legend()


def _below(ax, handles, columns=3):
    look = {"frameon": False, "handletextpad": 0.3, "columnspacing": 1.0, "fontsize": 8}
    ax.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncol=columns, **look)


def _dagger(name, marked):
    members = GROUPS.get(name, (name,))
    return f"{name} \u2020" if any(member in marked for member in members) else name


def _say(ax, text):
    ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center", color="#555555")


# ---- curves over layers ----


def _curve(ax, curve, label, color, **line):
    """One series over layers with its interval and, dotted with two standard deviations, its null. -> the null was drawn."""
    layer, mean = curve["layer"], curve["mean"]
    ax.plot(layer, mean, color=color, label=label, marker="o", markersize=3, **line)
    if "low" in curve and "high" in curve:
        ax.fill_between(layer, curve["low"], curve["high"], color=color, alpha=0.18, linewidth=0)
    null = curve.get("null_mean")
    if null is None or np.isnan(null).all():
        return False
    spread = 2 * np.nan_to_num(curve.get("null_std", np.zeros(len(null))))
    ax.plot(layer, null, color=color, linestyle=":", linewidth=1)
    ax.fill_between(layer, null - spread, null + spread, color=plots.EVEN_COLOR, alpha=0.1, linewidth=0)
    return True


def _null_handle(ax, text):
    ax.plot([], [], color=plots.EVEN_COLOR, linestyle=":", linewidth=1, label=text)


def _layers(ax, title, ylabel):
    ax.axhline(0, color=plots.EVEN_COLOR, linewidth=0.8, zorder=1)
    ax.set(title=title, xlabel="decoder layer", ylabel=ylabel)
    plots.layer_ticks(ax)


def consistency_range(folder, scales):
    """(low, high) that holds every mean, interval and null of both families in all scales and conditions, with 5 % to spare; None if nothing is measured."""
    seen = [0.0]
    for scale in scales:
        for stem, *_ in FAMILIES.values():
            for tag in ("all_pairs", "both_correct"):
                for curve in (read_curves(folder, f"{stem}_{scale}_{tag}") or {}).values():
                    spread = 2 * np.nan_to_num(curve.get("null_std", 0.0))
                    seen += [curve[field] for field in ("mean", "low", "high") if field in curve]
                    seen += [curve["null_mean"] - spread, curve["null_mean"] + spread] if "null_mean" in curve else []
    values = np.concatenate([np.atleast_1d(value) for value in seen])
    low, high = np.nanmin(values), np.nanmax(values)
    return None if low == high else (low - 0.05 * (high - low), high + 0.05 * (high - low))


def draw_consistency(folder, scale, condition, family, ylim=None, quiet=False):
    """Coherence of the groups' or consistency of the categories' deltas over layers, one figure -> files, [] where there is nothing to read."""
    stem, name, title, ylabel = FAMILIES[family]
    curves = read_curves(folder, f"{stem}_{scale}_{CONDITIONS[condition]}")
    if not curves:
        return []
    marked = unreliable(folder, scale) if condition == "all_with_validity" else {}
    colors = GROUP_COLORS if family == "sign_corrected_consistency" else CATEGORY_COLORS
    fig, ax = plots.plt.subplots(figsize=(7.5, 4.6))
    null = False
    for series in [series for series in colors if series in curves] + sorted(set(curves) - set(colors)):
        faded = {"alpha": 0.45} if any(member in marked for member in GROUPS.get(series, (series,))) else {}
        style = "--" if series in ("right", "under", "close") else "-"
        label = curve_label(_dagger(series, marked), curves[series])
        null |= _curve(ax, curves[series], label, colors.get(series, plots.EVEN_COLOR), linestyle=style, **faded)
    if null:
        _null_handle(ax, "shuffled labels (band: 2 s.d.)")
    _layers(ax, f"{title}, {Path(folder).name} {scale}, {WORDS[condition]}", ylabel)
    if ylim:
        ax.set_ylim(*ylim)
    _legend(ax)
    _note(fig, marked)
    return plots.save(fig, _path(folder, condition, family, f"{name}_{scale}"), _settings(folder, condition, scale=scale, ylim=ylim), quiet=quiet)


def _alignment_file(folder, scale, condition):
    return f"cross_alignment_{scale}" + "_both_correct" * (condition == "both_correct")


def _alignment(ax, curve):
    layer, mean = curve["layer"], curve["per_sample_mean"]
    n = curve.get("n_samples", np.array([np.nan]))
    color, blank = ALIGNMENT_COLORS["per_sample_mean"], np.full(len(layer), np.nan)
    label = curve_label("mean over scenes", {"mean": mean, "layer": layer, "n": n})
    ax.plot(layer, mean, color=color, label=label)
    p_values = curve.get("p_value", blank)
    for chosen, face, text in ((~(p_values >= 0.05), color, None), (p_values >= 0.05, "white", r"permutation p $\geq$ 0.05")):
        if chosen.any():
            ax.plot(layer[chosen], mean[chosen], "o", markersize=5, color=color, markerfacecolor=face, label=text)
    low, high = (curve.get(f"per_sample_{end}", curve.get(end, blank)) for end in ("low", "high"))
    ax.fill_between(layer, low, high, color=color, alpha=0.18, linewidth=0)
    if "mean_delta_alignment" in curve:
        ax.plot(layer, curve["mean_delta_alignment"], "s--", markersize=3.5, color=ALIGNMENT_COLORS["mean_delta_alignment"], label="cosine of the mean deltas")
    if "sign_flip_std" in curve:
        spread = 2 * np.nan_to_num(curve["sign_flip_std"])
        ax.fill_between(layer, -spread, spread, color=plots.SKY, alpha=0.25, linewidth=0, label="signs tossed (band: 2 s.d.)")
    if "permutation_mean" in curve:
        null, spread = curve["permutation_mean"], 2 * np.nan_to_num(curve.get("permutation_std", 0.0))
        ax.plot(layer, null, ":", color=ALIGNMENT_COLORS["permutation"], label="scenes permuted (band: 2 s.d.)")
        ax.fill_between(layer, null - spread, null + spread, color=ALIGNMENT_COLORS["permutation"], alpha=0.18, linewidth=0)


def draw_alignment(folder, scale, condition, quiet=False):
    """Cosine of the vertical and the distance delta of one scene over layers, with its permutation band -> files."""
    curves = read_curves(folder, _alignment_file(folder, scale, condition))
    if not curves or "per_sample_mean" not in curves.get("", {}):
        return []
    marked = unreliable(folder, scale) if condition == "all_with_validity" else {}
    marked = {name: found for name, found in marked.items() if name not in GROUPS["horizontal"]}
    axes = " and ".join(_dagger(group, marked) for group in ("vertical", "distance"))
    fig, ax = plots.plt.subplots(figsize=(7.5, 4.6))
    _alignment(ax, curves[""])
    _layers(ax, f"Alignment of {axes} deltas, {Path(folder).name} {scale}, {WORDS[condition]}", "cosine of vertical and distance delta")
    _legend(ax)
    _note(fig, marked)
    path = _path(folder, condition, "cross_alignment", f"cross_alignment_{scale}")
    return plots.save(fig, path, _settings(folder, condition, scale=scale), quiet=quiet)


# ---- heatmap ----


def draw_heatmaps(folder, scale, condition, quiet=False):
    """Cosines between the categories' mean deltas, one figure a representative layer; grey where a category has too few pairs -> files."""
    written, tag = [], CONDITIONS[condition]
    names = list(CATEGORY_COLORS)
    counts = read_curves(folder, f"within_cat_consistency_{scale}_{tag}") or {}
    marked = unreliable(folder, scale) if condition == "all_with_validity" else {}
    found = [re.fullmatch(rf"delta_similarity_{re.escape(scale)}_L(\d+)_{tag}", path.stem) for path in Path(folder, "csv").glob("delta_similarity_*.csv")]
    for layer in sorted(int(match[1]) for match in found if match):
        matrix = read_matrix(Path(folder, "csv", f"delta_similarity_{scale}_L{layer}_{tag}.csv"))
        fig, ax = plots.plt.subplots(figsize=(6.6, 5.6))
        image = plots.heatmap(
            ax, matrix, f"Cosine between mean deltas\n{Path(folder).name} {scale}, layer {layer}, {WORDS[condition]}", -1, 1, "", "", "RdBu_r"
        )
        ax.set_aspect("equal")
        for (row, column), value in np.ndenumerate(matrix):
            if np.isfinite(value):
                ax.text(
                    column, row, f"{value:.2f}".replace("-", "\u2212"), ha="center", va="center", color="white" if abs(value) > 0.62 else "black", fontsize=9.5
                )
        labels = [_dagger(name, marked) for name in names]
        sizes = [_count_at(counts.get(name), layer) for name in names]
        ax.set_xticks(range(6), labels)
        ax.set_yticks(range(6), [label if size is None else f"{label}\nn = {size}" for label, size in zip(labels, sizes)])
        ax.tick_params(length=0)
        for edge in (1.5, 3.5):
            ax.axhline(edge, color="white", linewidth=2.5)
            ax.axvline(edge, color="white", linewidth=2.5)
        fig.colorbar(image, ax=ax, label="cosine", shrink=0.85)
        absent = [name for name, value in zip(names, np.diag(matrix)) if np.isnan(value)]
        if absent:
            ax.set_xlabel(f"grey: too few pairs ({', '.join(absent)})", fontsize=8.5)
        _note(fig, marked)
        path = _path(folder, condition, "heatmap", f"heatmap_{scale}_L{layer}")
        written += plots.save(fig, path, _settings(folder, condition, scale=scale, layer=layer), quiet=quiet)
    return written


def _count_at(curve, layer):
    here = curve["n"][curve["layer"] == layer] if curve and "n" in curve else np.array([])
    return int(here[0]) if here.size and np.isfinite(here[0]) else None


# ---- PCA ----


class Pca(NamedTuple):
    """points (N, k) projections; explained (k,) shares of the variance, NaN where there is none; axes (k, d) unit directions."""

    points: np.ndarray
    explained: np.ndarray
    axes: np.ndarray


def pca(vectors, deltas, categories, components=3):
    """Principal components of vectors (N, d) by full SVD of the centred rows, with signs that depend on what the data mean and not on their order.

    deltas (M, d) and categories (M,) orient each component: of left, above, far the first whose mean delta reaches at least half as far along it as the
    farthest of the three projects positively; without any, the largest loading is positive. Components beyond the rank are zero."""
    vectors = np.asarray(vectors, dtype=np.float64)
    centred = vectors - vectors.mean(axis=0)
    _, singular, rows = np.linalg.svd(centred, full_matrices=False)
    total, k = (singular**2).sum(), min(components, len(singular))
    meaningful = singular[:k] > 1e-10 * max(singular[0], np.abs(vectors).max(), 1e-300)
    axes = np.zeros((components, vectors.shape[1]))
    axes[:k] = np.where(meaningful[:, None], rows[:k], 0)
    means = [deltas[categories == name].mean(axis=0) for name, _ in GROUPS.values() if np.any(categories == name)]
    for axis in axes[:k]:
        reach = np.array([mean @ axis for mean in means])
        size = max((np.linalg.norm(mean) for mean in means), default=0)
        far = np.abs(reach).max(initial=0)
        decides = reach[np.argmax(np.abs(reach) >= 0.5 * far)] if far > 1e-9 * size else axis[np.argmax(np.abs(axis))]
        axis *= -1 if decides < 0 else 1
    explained = np.zeros(components)
    explained[:k] = singular[:k] ** 2
    return Pca(centred @ axes.T, explained / total if meaningful.any() else np.full(components, np.nan), axes)


def _axis(number, explained):
    return f"PC{number + 1}" + ("" if np.isnan(explained) else f" ({100 * explained:.1f} %)")


def _scatter(ax, points, names, colors, marker, marked, order):
    """One call for all categories in a mixed order, so that none lies on top; unreliable ones are fainter."""
    shade = np.array([(*to_rgb(colors.get(name, "#7f7f7f")), 0.25 if name in marked else 0.75) for name in names])
    drawn = {"linewidths": 0.9} if marker == "x" else {"linewidths": 0}
    more = {"depthshade": False} if ax.name == "3d" else {}
    ax.scatter(*points[order].T, c=shade[order], marker=marker, s=16, **drawn, **more)


def _means(ax, points, categories):
    """The mean of each category, joined to its opposite's."""
    for pair in GROUPS.values():
        means = [points[categories == name].mean(axis=0) for name in pair if np.any(categories == name)]
        if len(means) == 2:
            ax.plot(*np.array(means).T, color="#333333", linewidth=1.2, zorder=4)
        for name in pair:
            if np.any(categories == name):
                mean = points[categories == name].mean(axis=0)
                ax.plot(*mean[:, None], "D", color=CATEGORY_COLORS[name], markeredgecolor="#222222", markersize=7, zorder=5)


def _handles(names, labels, colors, marked, markers=()):
    dots = [
        Line2D([], [], marker="o", linestyle="", color=colors.get(name, "#7f7f7f"), label=plots.with_n(_dagger(name, marked), [np.sum(labels == name)]))
        for name in names
        if np.any(labels == name)
    ]
    return dots + [Line2D([], [], marker=marker, linestyle="", color="#444444", label=text) for marker, text in markers]


def _pca_2d(cell, states, deltas, title, marked, path, settings, quiet):
    categories, groups = cell["categories"], cell["groups"]
    order = np.random.default_rng(0).permutation(len(categories))
    fig, axes = plots.plt.subplots(1, 3, figsize=(15, 5.4))
    panels = (states, deltas, deltas)
    titles = ("States at the last prompt token, by category", "Deltas, by group", "Deltas, by category")
    for ax, found, text in zip(axes, panels, titles):
        ax.set_title(text)
        if found is None:
            _say(ax, f"too few pairs (n = {len(categories)})")
            continue
        ax.set(xlabel=_axis(0, found.explained[0]), ylabel=_axis(1, found.explained[1]))
    if states is not None:
        n = len(categories)
        for part, marker in ((slice(0, n), "o"), (slice(n, None), "x")):
            _scatter(axes[0], states.points[part, :2], categories, CATEGORY_COLORS, marker, marked, order)
        _below(axes[0], _handles(CATEGORY_COLORS, categories, CATEGORY_COLORS, marked, (("o", "original"), ("x", "swapped"))), 4)
    if deltas is not None:
        _scatter(axes[1], deltas.points[:, :2], groups, GROUP_COLORS, "o", (), order)
        _below(axes[1], _handles(GROUPS, groups, GROUP_COLORS, marked))
        _scatter(axes[2], deltas.points[:, :2], categories, CATEGORY_COLORS, "o", marked, order)
        _means(axes[2], deltas.points[:, :2], categories)
        _below(axes[2], _handles(CATEGORY_COLORS, categories, CATEGORY_COLORS, marked, (("D", "category mean"),)), 4)
    fig.suptitle(f"{title}; {DELTA}", fontsize=10)
    _note(fig, marked)
    return plots.save(fig, path, settings, quiet=quiet)


def _pca_3d(cell, deltas, title, marked, path, settings, quiet):
    categories = cell["categories"]
    fig = plots.plt.figure(figsize=(7.6, 6.9))
    fig.set_layout_engine("none")  # the constrained one does not know 3-D labels
    ax = fig.add_axes((0.0, 0.1, 0.95, 0.86), projection="3d")
    fig.suptitle(f"{title}\n{DELTA}", fontsize=10)
    if deltas is None:
        ax.text2D(0.5, 0.5, f"too few pairs (n = {len(categories)})", transform=ax.transAxes, ha="center", color="#555555")
    else:
        _scatter(ax, deltas.points, categories, CATEGORY_COLORS, "o", marked, np.arange(len(categories)))
        _means(ax, deltas.points, categories)
        for number, name in enumerate("xyz"):
            getattr(ax, f"set_{name}label")(_axis(number, deltas.explained[number]), labelpad=6)
        handles = _handles(CATEGORY_COLORS, categories, CATEGORY_COLORS, marked, (("D", "category mean"),))
        fig.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.5, 0.035), ncol=4, frameon=False, handletextpad=0.2)
    ax.set_box_aspect(None, zoom=1.06)
    ax.view_init(elev=22, azim=-58)
    for axis in (ax.xaxis, ax.yaxis, ax.zaxis):
        axis.pane.set_facecolor("white")
        axis.set_major_locator(plots.MaxNLocator(5))
    ax.tick_params(labelsize=8, pad=1)
    if marked:
        fig.text(0.5, 0.012, UNRELIABLE + _listed(marked), ha="center", fontsize=7.5, color="#444444")
    return plots.save(fig, path, settings, quiet=quiet)


def draw_pca(folder, scale, conditions=tuple(CONDITIONS), kinds=("pca", "pca_3d"), quiet=False):
    """2-D and 3-D PCA of every representative layer -> files. 2-D: states by category, deltas by group and by category; 3-D: deltas by category."""
    written, marked = [], unreliable(folder, scale)
    for layer, pairs in read_vectors(folder, scale):
        for tag in dict.fromkeys(CONDITIONS[condition] for condition in conditions):
            chosen = pairs["both"] if tag == "both_correct" else np.ones(len(pairs["both"]), bool)
            cell = {name: values[chosen] for name, values in pairs.items()}
            enough = len(cell["categories"]) > 1
            deltas = pca(cell["delta"], cell["delta"], cell["categories"]) if enough else None
            states = pca(np.concatenate([cell["orig"], cell["swap"]]), cell["delta"], cell["categories"], 2) if enough and "pca" in kinds else None
            for condition in [name for name in conditions if CONDITIONS[name] == tag]:
                title = f"{Path(folder).name} {scale}, layer {layer}, {WORDS[condition]}"
                settings, flagged = _settings(folder, condition, scale=scale, layer=layer), marked if condition == "all_with_validity" else {}
                for kind in kinds:
                    path = _path(folder, condition, kind, f"pca_{scale}_L{layer}")
                    if kind == "pca":
                        written += _pca_2d(cell, states, deltas, title, flagged, path, settings, quiet)
                    else:
                        written += _pca_3d(cell, deltas, title, flagged, path, settings, quiet)
    return written


# ---- accuracy ----


def read_accuracy(folder, scales):
    """{group or "overall": {"n", "orig", "swap", "both", "both_low", ...: (S,)}}, NaN where a scale has no pair of the group. UsageError without the files."""
    stats = {scale: read_json(folder, f"pred_stats_{scale}") for scale in scales}
    missing = [scale for scale, found in stats.items() if found is None]
    if missing:
        raise UsageError(f"{folder}/json has no pred_stats_{missing[0]}.json; run swap_analysis.py for scale {missing[0]}")
    accuracy = {}
    for group in (*GROUPS, "overall"):
        n = np.array([_number(stats[scale].get(f"{group}_n")) for scale in scales])
        accuracy[group] = {"n": np.nan_to_num(n).astype(int)}
        for name in [f"{order}{end}" for order in ("orig", "swap", "both") for end in ("", "_low", "_high")]:
            values = np.array([_number(stats[scale].get(f"{group}_acc_{name}")) for scale in scales])
            accuracy[group][name] = np.where(n == 0, np.nan, values)
    return accuracy


def _whiskers(cell, name):
    reach = np.array([cell[name] - cell[f"{name}_low"], cell[f"{name}_high"] - cell[name]])
    return np.where(np.isnan(reach), 0, np.maximum(reach, 0)) if np.isfinite(reach).any() else None


def _scale_ticks(ax, scales):
    crowded = len(scales) > 6 or max(map(len, scales)) > 9
    ax.set_xticks(range(len(scales)), scales, rotation=30 if crowded else 0, ha="right" if crowded else "center")
    ax.grid(axis="x", visible=False)


def draw_accuracy_bars(folder, scales, name="accuracy_group_bars", quiet=False):
    """Accuracy in the original order, the swapped order and both, by group and scale -> files."""
    accuracy = read_accuracy(folder, scales)
    fig, axes = plots.plt.subplots(1, 3, figsize=(max(9, 3.6 + 2.2 * len(scales)), 4.2), sharey=True)
    for ax, group in zip(axes, GROUPS):
        cell, x = accuracy[group], np.arange(len(scales))
        styles = {"orig": ("original", "#c9c9c9"), "swap": ("swapped", "#8a8a8a"), "both": ("both", GROUP_COLORS[group])}
        for place, (order, (label, color)) in zip((-0.27, 0, 0.27), styles.items()):
            whiskers = _whiskers(cell, order)
            style = {"error_kw": {"elinewidth": 0.9, "ecolor": "#222222"}, "capsize": 2}
            ax.bar(x + place, np.nan_to_num(cell[order]), 0.25, yerr=whiskers, color=color, label=label, **style)
        for position in x[np.isnan(cell["both"])]:
            ax.text(position, 0.02, "no pairs", ha="center", fontsize=8, color="#555555")
        ax.axhline(0.5, color=plots.EVEN_COLOR, linewidth=1, linestyle="--", zorder=1)
        ax.set_axisbelow(True)
        ax.set(title=plots.with_n(group, cell["n"]), ylim=(0, 1.05), xlim=(-0.6, len(scales) - 0.4))
        _scale_ticks(ax, scales)
        _below(ax, ax.get_legend_handles_labels()[0])
    axes[0].set_ylabel("accuracy (share of pairs)")
    fig.suptitle(f"Answers of {Path(folder).name}", fontsize=10.5)
    return plots.save(fig, _path(folder, "accuracy", name), {"results": Path(folder).name, "scales": list(scales)}, quiet=quiet)


def _over_scales(ax, scales, values, color, label, low=None, high=None, **line):
    """A line over scales: joined where the scale has a data scale, a separate point (such as another model's) where it has none."""
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
        _over_scales(ax, scales, cell["both"], color, plots.with_n(group, cell["n"]), cell["both_low"], cell["both_high"], **more)
    ax.axhline(0.5, color=plots.EVEN_COLOR, linewidth=0.8, linestyle=":", zorder=1)
    ax.set(ylim=(0, 1.05), ylabel="share of pairs", xlim=(-0.3, len(scales) - 0.7))
    _scale_ticks(ax, scales)


def draw_accuracy_trajectory(folder, scales, quiet=False):
    """Share of pairs answered right in both orders, against the scale -> files."""
    fig, ax = plots.plt.subplots(figsize=(7.5, 4.6))
    _trajectory(ax, read_accuracy(folder, scales), scales)
    ax.set(title=f"Right in both orders, {Path(folder).name}", xlabel="data scale")
    _legend(ax)
    return plots.save(fig, _path(folder, "accuracy", "accuracy_trajectory"), {"results": Path(folder).name, "scales": list(scales)}, quiet=quiet)


# ---- across scales ----


def draw_cross_consistency(folder, scales, condition, family, quiet=False):
    """One panel a group (coherence) or category (consistency), one line a scale, over layers -> files."""
    stem, name, title, ylabel = FAMILIES[family]
    found = {scale: read_curves(folder, f"{stem}_{scale}_{CONDITIONS[condition]}") for scale in scales}
    found = {scale: curves for scale, curves in found.items() if curves}
    if not found:
        return []
    colors, by_group = scale_colors(scales), family == "sign_corrected_consistency"
    panels = list(GROUPS) if by_group else [pair[side] for side in (0, 1) for pair in GROUPS.values()]
    fig, axes = plots.plt.subplots(len(panels) // 3, 3, figsize=(14, 4.4 if by_group else 7.6), sharey=True, squeeze=False)
    for ax, series in zip(axes.flat, panels):
        null = False
        for scale, curves in found.items():
            marked = unreliable(folder, scale) if condition == "all_with_validity" else {}
            if series in curves:
                faded = {"alpha": 0.5, "linestyle": "--"} if _dagger(series, marked) != series else {}
                label = curve_label(_dagger(scale, {scale} if faded else ()), curves[series])
                null |= _curve(ax, curves[series], label, colors[scale], **faded)
        if null:
            _null_handle(ax, "shuffled labels (band: 2 s.d.)")
        _layers(ax, series, ylabel if ax in axes[:, 0] else "")
        if not ax.get_legend_handles_labels()[0]:
            _say(ax, "too few pairs")
    with_lines = [ax for ax in axes.flat if ax.get_legend_handles_labels()[0]]
    for ax in with_lines:
        if by_group:
            _below(ax, ax.get_legend_handles_labels()[0], 2)
        else:
            ax.legend(fontsize=7)
    fig.suptitle(f"{title}, {Path(folder).name}, {WORDS[condition]}", fontsize=10.5)
    if condition == "all_with_validity":
        fig.supxlabel(UNRELIABLE + "dashed and faint", fontsize=8, color="#444444")
    return plots.save(fig, _path(folder, condition, "cross_scale", name), _settings(folder, condition, scales=list(scales)), quiet=quiet)


def draw_cross_alignment(folder, scales, condition="all", quiet=False):
    """Alignment of height and distance over layers, one line a scale; left over scenes, right of the mean deltas -> files."""
    found = {scale: (read_curves(folder, _alignment_file(folder, scale, condition)) or {}).get("", {}) for scale in scales}
    found = {scale: curve for scale, curve in found.items() if "per_sample_mean" in curve}
    if not found:
        return []
    colors = scale_colors(scales)
    fig, axes = plots.plt.subplots(1, 2, figsize=(12, 4.6), sharey=True)
    titles = {"per_sample_mean": "mean over scenes of cos(vertical delta, distance delta)", "mean_delta_alignment": "cosine of the mean deltas"}
    for ax, (field, title) in zip(axes, titles.items()):
        for scale, curve in found.items():
            n = {"n": curve["n_samples"]} if "n_samples" in curve else {}
            shown = {"layer": curve["layer"], "mean": curve.get(field, np.full(len(curve["layer"]), np.nan))} | n
            if field == "per_sample_mean":
                interval = {end: curve.get(f"per_sample_{end}", curve.get(end)) for end in ("low", "high")}
                null = {"null_mean": curve.get("permutation_mean"), "null_std": curve.get("permutation_std")}
                shown |= {name: values for name, values in (interval | null).items() if values is not None}
            null = _curve(ax, shown, curve_label(scale, shown), colors[scale])
        if null:
            _null_handle(ax, "scenes permuted (band: 2 s.d.)")
        _layers(ax, title, "cosine" if ax is axes[0] else "")
    for ax in axes:
        _below(ax, ax.get_legend_handles_labels()[0])
    fig.suptitle(f"Alignment of height and distance, {Path(folder).name}", fontsize=10.5)
    return plots.save(fig, _path(folder, condition, "cross_scale", "cross_alignment"), _settings(folder, condition, scales=list(scales)), quiet=quiet)


def read_entanglement(folder, scale, condition):
    """{title: curve} of json/vd_ei_{scale}.json: the forms of VD_FORMS, or one curve of bare numbers (all pairs only); {} where there is nothing."""
    values = read_json(folder, f"vd_ei_{scale}") or {}
    cells = {int(key.removeprefix("L")): value for key, value in values.items() if re.fullmatch(r"L?\d+", key)}
    if condition == "both_correct":
        cells = {layer: cell.get("both_correct") if isinstance(cell, dict) else None for layer, cell in cells.items()}
    layers, curves = sorted(cells), {}
    rows = [_flat(cells[layer]) if isinstance(cells[layer], dict) else {} for layer in layers]
    for title, field in VD_FORMS.items():
        names = {"mean": field, "low": f"{field}_low", "high": f"{field}_high", "n": "n_images"}
        curves[title] = {"layer": np.array(layers)} | {name: np.array([_number(row.get(key)) for row in rows]) for name, key in names.items()}
    bare = np.array([_number(cells[layer]) for layer in layers])
    curves["index"] = {"layer": np.array(layers), "mean": bare}
    return {title: curve for title, curve in curves.items() if np.isfinite(curve["mean"]).any()}


def _flat(cell):
    """{form: {"value": v, "low": l, ...}} as {form: v, form_low: l, ...}; what is flat stays."""
    inner = {f"{form}_{part}".removesuffix("_value"): value for form, parts in cell.items() if isinstance(parts, dict) for part, value in parts.items()}
    return inner | {name: value for name, value in cell.items() if not isinstance(value, dict)}


def draw_vd_ei(folder, scales, condition="all", quiet=False):
    """Vertical-distance entanglement index over layers, one line a scale, one panel a definition -> files."""
    found = {scale: read_entanglement(folder, scale, condition) for scale in scales}
    panels = [title for title in (*VD_FORMS, "index") if any(title in curves for curves in found.values())]
    if not panels:
        return []
    colors = scale_colors(scales)
    fig, axes = plots.plt.subplots(1, len(panels), figsize=(max(7.5, 4.7 * len(panels)), 4.6), sharey=True, squeeze=False)
    for ax, title in zip(axes[0], panels):
        for scale, curves in found.items():
            if title in curves:
                _curve(ax, curves[title], curve_label(scale, curves[title], "undefined"), colors[scale])
            else:
                ax.plot(
                    [],
                    [],
                    color=colors[scale],
                    marker="o",
                    markersize=3,
                    label=f"{scale}: {'not measured' if read_json(folder, f'vd_ei_{scale}') is None else 'too few pairs'}",
                )
        _layers(ax, title, "entanglement index" if ax is axes[0, 0] else "")
        _below(ax, ax.get_legend_handles_labels()[0], 2)
    n = "; n: images" if any("n" in curve for curves in found.values() for curve in curves.values()) else ""
    fig.suptitle(f"Entanglement of vertical and distance deltas (VD-EI), {Path(folder).name}, {WORDS[condition]}{n}", fontsize=10.5)
    return plots.save(fig, _path(folder, condition, "cross_scale", "vd_ei"), _settings(folder, condition, scales=list(scales)), quiet=quiet)


def summary_layer(folder, scales):
    """The layer of the ablation summary where none is named: three quarters of the depth that was measured, close to the paper's choice for most models."""
    curves = [read_curves(folder, f"sign_corrected_consistency_{scale}_all_pairs") or {} for scale in scales]
    layers = sorted({int(layer) for found in curves for curve in found.values() for layer in curve["layer"]})
    return min(layers, key=lambda layer: abs(layer - 0.75 * layers[-1])) if layers else None


def _at(curve, field, layer):
    here = curve[field][curve["layer"] == layer] if curve and field in curve else np.array([])
    return here[0] if here.size else np.nan


def draw_ablation(folder, scales, condition="all", layer=None, quiet=False):
    """Accuracy, axis coherence and cross alignment against the data scale, the last two at one layer -> files."""
    layer = summary_layer(folder, scales) if layer is None else layer
    accuracy, tag = read_accuracy(folder, scales), CONDITIONS[condition]
    coherence = [read_curves(folder, f"sign_corrected_consistency_{scale}_{tag}") or {} for scale in scales]
    alignment = [(read_curves(folder, _alignment_file(folder, scale, condition)) or {}).get("") for scale in scales]
    fig, axes = plots.plt.subplots(1, 3, figsize=(max(14, 3 * (1 + 0.8 * len(scales))), 4.6))
    _trajectory(axes[0], accuracy, scales)
    axes[0].set_title("right in both orders")
    for group, color in GROUP_COLORS.items():
        values, low, high, n = (np.array([_at(curves.get(group), field, layer) for curves in coherence]) for field in ("mean", "low", "high", "n"))
        few = f"; too few in {', '.join(scale for scale, value in zip(scales, values) if np.isnan(value))}" if np.isnan(values).any() else ""
        _over_scales(axes[1], scales, values, color, plots.with_n(group, np.nan_to_num(n[np.isfinite(values)]).astype(int)) + few, low, high)
    axes[1].set(title=f"axis coherence, layer {layer}", ylabel="mean pairwise cosine")
    names = ("per_sample_mean", "low", "high", "mean_delta_alignment", "permutation_mean", "permutation_std", "n_samples", "per_sample_low", "per_sample_high")
    found = {name: np.array([_at(curve, name, layer) for curve in alignment]) for name in names}
    if np.isfinite(found["per_sample_mean"]).any():
        low, high = (np.where(np.isnan(found[f"per_sample_{end}"]), found[end], found[f"per_sample_{end}"]) for end in ("low", "high"))
        label = plots.with_n("mean over scenes", np.nan_to_num(found["n_samples"]).astype(int))
        _over_scales(axes[2], scales, found["per_sample_mean"], ALIGNMENT_COLORS["per_sample_mean"], label, low, high)
        look = {"linestyle": "--", "marker": "s", "markersize": 4}
        _over_scales(axes[2], scales, found["mean_delta_alignment"], ALIGNMENT_COLORS["mean_delta_alignment"], "cosine of the mean deltas", **look)
        x, null, spread = np.arange(len(scales)), found["permutation_mean"], 2 * np.nan_to_num(found["permutation_std"])
        style = {"fmt": "_", "color": ALIGNMENT_COLORS["permutation"], "elinewidth": 6, "alpha": 0.4, "markersize": 14}
        axes[2].errorbar(x, null, yerr=spread, label="scenes permuted (2 s.d.)", **style)
    else:
        _say(axes[2], f"not measured at layer {layer}" if any(alignment) else "not measured")
    axes[2].set(title=f"alignment of height and distance, layer {layer}", ylabel="cosine of vertical and distance delta")
    for ax in axes[1:]:
        ax.axhline(0, color=plots.EVEN_COLOR, linewidth=0.8, zorder=1)
        ax.set_xlim(-0.3, len(scales) - 0.7)
        _scale_ticks(ax, scales)
    for ax in axes:
        ax.set_xlabel("data scale")
        if ax.get_legend_handles_labels()[0]:
            _below(ax, ax.get_legend_handles_labels()[0], 2)
    fig.suptitle(f"What more spatial data changes, {Path(folder).name}, states of {WORDS[condition]}", fontsize=10.5)
    settings = _settings(folder, condition, scales=list(scales), layer=layer)
    return plots.save(fig, _path(folder, condition, "cross_scale", "ablation_summary"), settings, quiet=quiet)


# ---- everything ----


def draw_scale(folder, scale, quiet=False):
    """Every figure of one scale, from the files that are there -> files. UsageError where there are none."""
    written = []
    for condition in CONDITIONS:
        for family in FAMILIES:
            written += draw_consistency(folder, scale, condition, family, quiet=quiet)
        written += draw_alignment(folder, scale, condition, quiet=quiet)
        written += draw_heatmaps(folder, scale, condition, quiet=quiet)
    if Path(folder, "npz", f"vectors_{scale}.npz").exists():
        written += draw_pca(folder, scale, quiet=quiet)
    if read_json(folder, f"pred_stats_{scale}") is not None:
        written += draw_accuracy_bars(folder, [scale], f"accuracy_group_bars_{scale}", quiet)
    if not written:
        raise UsageError(f"{folder} has no results of scale {scale}; make them with swap_analysis.py --scales {scale}")
    return written


def draw_merge(folder, scales, layer=None, quiet=False):
    """Every figure that compares scales -> files. layer: that of the ablation summary, three quarters of the depth where None."""
    scales = list(scales)
    if not scales:
        raise UsageError(f"no scale of {folder} to compare; name some with --scales")
    written = draw_accuracy_bars(folder, scales, quiet=quiet) + draw_accuracy_trajectory(folder, scales, quiet)
    for condition in CONDITIONS:
        for family in FAMILIES:
            written += draw_cross_consistency(folder, scales, condition, family, quiet)
        if condition != "all_with_validity":
            written += draw_cross_alignment(folder, scales, condition, quiet)
            written += draw_vd_ei(folder, scales, condition, quiet)
            written += draw_ablation(folder, scales, condition, layer, quiet)
    return written

"""PCA of the states and deltas that results.py saved, 2-D and 3-D. Full SVD, signs by meaning:
docs/studies/swap_analysis.md, sections 2 and 5.2.7."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from vlmdiag.figures import plots
from vlmdiag.swap.relations import GROUPS
from vlmdiag.swap.saved import CONDITIONS, read_vectors, unreliable
from vlmdiag.swap.style import (
    ALL_RELIABLE,
    CATEGORY_COLORS,
    GROUP_COLORS,
    UNRELIABLE,
    WORDS,
    dagger,
    footnote,
    legend_below,
    listed,
    model_of,
    path_of,
    say,
    settings_of,
)
from vlmdiag.types import Fields, Record

if TYPE_CHECKING:
    from jaxtyping import Float
    from matplotlib.axes import Axes

    from vlmdiag.swap.saved import Vectors
    from vlmdiag.swap.style import Marked

    Labels = np.ndarray  # (N,) str

DELTA = "delta = state(swapped) \u2212 state(original)"


class Pca(NamedTuple):
    """Projections, shares of the variance (NaN where there is none) and unit directions."""

    points: Float[np.ndarray, "N k"]
    explained: Float[np.ndarray, " k"]
    axes: Float[np.ndarray, "k d"]


def pca(
    vectors: Float[np.ndarray, "N d"],
    deltas: Float[np.ndarray, "M d"],
    categories: Labels,
    components: int = 3,
) -> Pca:
    """Principal components by full SVD of the centred rows, with signs that depend on what the data
    mean and not on their order.

    deltas and their categories (M,) orient each component: of left, above, far the first whose mean
    delta reaches at least half as far along it as the farthest of the three projects positively;
    without any, the largest loading is positive. Components beyond the rank are zero.
    """
    vectors = np.asarray(vectors, dtype=np.float64)
    centred = vectors - vectors.mean(axis=0)
    _, singular, directions = np.linalg.svd(centred, full_matrices=False)
    k = min(components, len(singular))
    smallest = 1e-10 * max(singular[0], np.abs(vectors).max(), 1e-300)
    is_meaningful = singular[:k] > smallest
    axes = np.zeros((components, vectors.shape[1]))
    axes[:k] = np.where(is_meaningful[:, None], directions[:k], 0)
    means = [
        deltas[categories == canonical].mean(axis=0)
        for canonical, _ in GROUPS.values()
        if np.any(categories == canonical)
    ]
    for axis in axes[:k]:
        if _direction(axis, means) < 0:
            axis *= -1
    explained = np.full(components, np.nan)
    if is_meaningful.any():
        explained[:k] = singular[:k] ** 2 / (singular**2).sum()
        explained[k:] = 0
    return Pca(centred @ axes.T, explained, axes)


def _direction(axis: Float[np.ndarray, " d"], means: Sequence[Float[np.ndarray, " d"]]) -> float:
    """A number whose sign says where an axis points; means: of left, above and far deltas."""
    reach = np.array([mean @ axis for mean in means])
    size = max((np.linalg.norm(mean) for mean in means), default=0)
    farthest = np.abs(reach).max(initial=0)
    if farthest > 1e-9 * size:
        return float(reach[np.argmax(np.abs(reach) >= 0.5 * farthest)])
    return float(axis[np.argmax(np.abs(axis))])


# ---- parts of a figure ----


def _axis_label(number: int, explained: float) -> str:
    name = f"PC{number + 1}"
    return name if np.isnan(explained) else f"{name} ({100 * explained:.1f} %)"


def _scatter(
    ax: Axes,
    points: Float[np.ndarray, "N k"],
    names: Labels,
    colors: Mapping[str, str],
    marker: str,
    marked: Collection[str],
    order: np.ndarray,
) -> None:
    """One call for all categories in a mixed order, so that none lies on top; unreliable ones are
    fainter."""
    shade = np.array(
        [(*to_rgb(colors.get(name, "#7f7f7f")), 0.25 if name in marked else 0.75) for name in names]
    )
    look: Record = {"c": shade[order], "marker": marker, "s": 16}
    look["linewidths"] = 0.9 if marker == "x" else 0
    if ax.name == "3d":
        look["depthshade"] = False
    ax.scatter(*points[order].T, **look)


def _draw_means(ax: Axes, points: Float[np.ndarray, "N k"], categories: Labels) -> None:
    """The mean of each category, joined to its opposite's."""
    for pair in GROUPS.values():
        means = {
            category: points[categories == category].mean(axis=0)
            for category in pair
            if np.any(categories == category)
        }
        if len(means) == 2:
            ax.plot(*np.array(list(means.values())).T, color="#333333", linewidth=1.2, zorder=4)
        for category, mean in means.items():
            ax.plot(
                *mean[:, None],
                "D",
                color=CATEGORY_COLORS[category],
                markeredgecolor="#222222",
                markersize=7,
                zorder=5,
            )


def _handles(
    labels: Labels,
    colors: Mapping[str, str],
    marked: Collection[str] = (),
    markers: Iterable[tuple[str, str]] = (),
) -> list[Line2D]:
    """Legend of the colours with n of each, and of the markers."""
    handles = []
    for name, color in colors.items():
        count = int(np.sum(labels == name))
        if count:
            text = plots.with_n(dagger(name, marked), [count])
            handles.append(Line2D([], [], marker="o", linestyle="", color=color, label=text))
    for marker, text in markers:
        handles.append(Line2D([], [], marker=marker, linestyle="", color="#444444", label=text))
    return handles


# ---- figures ----


def _draw_2d(
    vectors: Vectors,
    states: Pca | None,
    deltas: Pca | None,
    title: str,
    marked: Marked,
    path: Path,
    settings: Fields,
    quiet: bool,
) -> list[Path]:
    """States by category, deltas by group and by category."""
    categories = vectors.categories
    n = len(categories)
    order = np.random.default_rng(0).permutation(n)
    fig, axes = plt.subplots(1, 3, figsize=(15, 5.4))
    panels = (
        (states, "States at the last prompt token, by category"),
        (deltas, "Deltas, by group"),
        (deltas, "Deltas, by category"),
    )
    for ax, (shown, text) in zip(axes, panels):
        ax.set_title(text)
        if shown is None:
            say(ax, f"too few pairs (n = {n})")
            continue
        x, y = (_axis_label(number, shown.explained[number]) for number in (0, 1))
        ax.set(xlabel=x, ylabel=y)
    of_states, of_groups, of_categories = axes
    if states is not None:
        for part, marker in ((slice(0, n), "o"), (slice(n, None), "x")):
            points = states.points[part, :2]
            _scatter(of_states, points, categories, CATEGORY_COLORS, marker, marked, order)
        orders = (("o", "original"), ("x", "swapped"))
        legend_below(of_states, _handles(categories, CATEGORY_COLORS, marked, orders), 4)
    if deltas is not None:
        points = deltas.points[:, :2]
        _scatter(of_groups, points, vectors.groups, GROUP_COLORS, "o", (), order)
        legend_below(of_groups, _handles(vectors.groups, GROUP_COLORS, marked))
        _scatter(of_categories, points, categories, CATEGORY_COLORS, "o", marked, order)
        _draw_means(of_categories, points, categories)
        markers = (("D", "category mean"),)
        legend_below(of_categories, _handles(categories, CATEGORY_COLORS, marked, markers), 4)
    fig.suptitle(f"{title}; {DELTA}", fontsize=10)
    footnote(fig, str(settings["condition"]), marked)
    return plots.save(fig, path, settings, quiet=quiet)


def _draw_3d(
    vectors: Vectors,
    deltas: Pca | None,
    title: str,
    marked: Marked,
    path: Path,
    settings: Fields,
    quiet: bool,
) -> list[Path]:
    """Deltas by category."""
    categories = vectors.categories
    n = len(categories)
    fig = plt.figure(figsize=(7.6, 6.9))
    # the constrained layout does not know 3-D labels
    fig.set_layout_engine("none")
    ax = fig.add_axes((0.0, 0.1, 0.95, 0.86), projection="3d")
    fig.suptitle(f"{title}\n{DELTA}", fontsize=10)
    if deltas is None:
        ax.text2D(
            0.5,
            0.5,
            f"too few pairs (n = {n})",
            transform=ax.transAxes,
            ha="center",
            color="#555555",
        )
    else:
        _scatter(ax, deltas.points, categories, CATEGORY_COLORS, "o", marked, np.arange(n))
        _draw_means(ax, deltas.points, categories)
        for number, name in enumerate("xyz"):
            label = _axis_label(number, deltas.explained[number])
            getattr(ax, f"set_{name}label")(label, labelpad=6)
        fig.legend(
            handles=_handles(categories, CATEGORY_COLORS, marked, (("D", "category mean"),)),
            loc="lower center",
            bbox_to_anchor=(0.5, 0.035),
            ncol=4,
            frameon=False,
            handletextpad=0.2,
        )
    ax.set_box_aspect(None, zoom=1.06)
    ax.view_init(elev=22, azim=-58)
    for axis in (ax.xaxis, ax.yaxis, ax.zaxis):
        axis.pane.set_facecolor("white")
        axis.set_major_locator(MaxNLocator(5))
    ax.tick_params(labelsize=8, pad=1)
    if settings["condition"] == "all_with_validity":
        text = UNRELIABLE + listed(marked) if marked else ALL_RELIABLE
        fig.text(0.5, 0.012, text, ha="center", fontsize=7.5, color="#444444")
    return plots.save(fig, path, settings, quiet=quiet)


def draw_pca(
    folder: str | Path,
    scale: str,
    conditions: Sequence[str] = tuple(CONDITIONS),
    kinds: Sequence[str] = ("pca", "pca_3d"),
    quiet: bool = False,
    layers: Collection[int] | None = None,
) -> list[Path]:
    """2-D and 3-D PCA of the given layers, of every saved one where layers is None -> files. 2-D:
    states by category, deltas by group and by category; 3-D: deltas by category."""
    unreliable_categories = unreliable(folder, scale)
    written = []
    for layer, of_layer in read_vectors(folder, scale):
        if layers is not None and layer not in layers:
            continue
        for tag in dict.fromkeys(CONDITIONS[condition] for condition in conditions):
            vectors = of_layer.of(of_layer.both) if tag == "both_correct" else of_layer
            categories = vectors.categories
            deltas = states = None
            if len(categories) > 1:
                deltas = pca(vectors.delta, vectors.delta, categories)
                if "pca" in kinds:
                    both_states = np.concatenate([vectors.orig, vectors.swap])
                    states = pca(both_states, vectors.delta, categories, 2)
            for condition in conditions:
                if CONDITIONS[condition] != tag:
                    continue
                title = f"{model_of(folder)} {scale}, layer {layer}, {WORDS[condition]}"
                settings = settings_of(folder, condition, scale=scale, layer=layer)
                marked = unreliable_categories if condition == "all_with_validity" else {}
                for kind in kinds:
                    path = path_of(folder, condition, kind, f"pca_{scale}_L{layer}")
                    more = title, marked, path, settings, quiet
                    if kind == "pca":
                        written += _draw_2d(vectors, states, deltas, *more)
                    else:
                        written += _draw_3d(vectors, deltas, *more)
    return written

"""PCA of the states and deltas that results.py saved, 2-D and 3-D. Full SVD, signs by meaning; our
study's sections 2 and 5.2.7."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.lines import Line2D

from vlmdiag.figures import plots
from vlmdiag.swap.saved import CONDITIONS, GROUPS, read_vectors, unreliable
from vlmdiag.swap.style import (
    CATEGORY_COLORS,
    GROUP_COLORS,
    UNRELIABLE,
    WORDS,
    dagger,
    footnote,
    legend_below,
    listed,
    path_of,
    say,
    settings_of,
)

DELTA = "delta = state(swapped) \u2212 state(original)"


class Pca(NamedTuple):
    """points (N, k) projections; explained (k,) shares of the variance, NaN where there is none;
    axes (k, d) unit directions."""

    points: np.ndarray
    explained: np.ndarray
    axes: np.ndarray


def pca(vectors, deltas, categories, components=3):
    """Principal components of vectors (N, d) by full SVD of the centred rows, with signs that
    depend on what the data mean and not on their order.

    deltas (M, d) and categories (M,) orient each component: of left, above, far the first whose
    mean delta reaches at least half as far along it as the farthest of the three projects
    positively; without any, the largest loading is positive. Components beyond the rank are zero.
    """
    vectors = np.asarray(vectors, dtype=np.float64)
    centred = vectors - vectors.mean(axis=0)
    _, singular, rows = np.linalg.svd(centred, full_matrices=False)
    total, k = (singular**2).sum(), min(components, len(singular))
    meaningful = singular[:k] > 1e-10 * max(singular[0], np.abs(vectors).max(), 1e-300)
    axes = np.zeros((components, vectors.shape[1]))
    axes[:k] = np.where(meaningful[:, None], rows[:k], 0)
    means = [
        deltas[categories == name].mean(axis=0)
        for name, _ in GROUPS.values()
        if np.any(categories == name)
    ]
    for axis in axes[:k]:
        reach = np.array([mean @ axis for mean in means])
        size = max((np.linalg.norm(mean) for mean in means), default=0)
        far = np.abs(reach).max(initial=0)
        decides = (
            reach[np.argmax(np.abs(reach) >= 0.5 * far)]
            if far > 1e-9 * size
            else axis[np.argmax(np.abs(axis))]
        )
        axis *= -1 if decides < 0 else 1
    explained = np.zeros(components)
    explained[:k] = singular[:k] ** 2
    return Pca(
        centred @ axes.T,
        explained / total if meaningful.any() else np.full(components, np.nan),
        axes,
    )


def _axis(number, explained):
    return f"PC{number + 1}" + ("" if np.isnan(explained) else f" ({100 * explained:.1f} %)")


def _scatter(ax, points, names, colors, marker, marked, order):
    """One call for all categories in a mixed order, so that none lies on top; unreliable ones are
    fainter."""
    shade = np.array(
        [(*to_rgb(colors.get(name, "#7f7f7f")), 0.25 if name in marked else 0.75) for name in names]
    )
    drawn = {"linewidths": 0.9} if marker == "x" else {"linewidths": 0}
    more = {"depthshade": False} if ax.name == "3d" else {}
    ax.scatter(*points[order].T, c=shade[order], marker=marker, s=16, **drawn, **more)


def _means(ax, points, categories):
    """The mean of each category, joined to its opposite's."""
    for pair in GROUPS.values():
        means = [
            points[categories == name].mean(axis=0) for name in pair if np.any(categories == name)
        ]
        if len(means) == 2:
            ax.plot(*np.array(means).T, color="#333333", linewidth=1.2, zorder=4)
        for name in pair:
            if np.any(categories == name):
                mean = points[categories == name].mean(axis=0)
                ax.plot(
                    *mean[:, None],
                    "D",
                    color=CATEGORY_COLORS[name],
                    markeredgecolor="#222222",
                    markersize=7,
                    zorder=5,
                )


def _handles(names, labels, colors, marked, markers=()):
    dots = [
        Line2D(
            [],
            [],
            marker="o",
            linestyle="",
            color=colors.get(name, "#7f7f7f"),
            label=plots.with_n(dagger(name, marked), [np.sum(labels == name)]),
        )
        for name in names
        if np.any(labels == name)
    ]
    return dots + [
        Line2D([], [], marker=marker, linestyle="", color="#444444", label=text)
        for marker, text in markers
    ]


def _pca_2d(cell, states, deltas, title, marked, path, settings, quiet):
    categories, groups = cell["categories"], cell["groups"]
    order = np.random.default_rng(0).permutation(len(categories))
    fig, axes = plots.plt.subplots(1, 3, figsize=(15, 5.4))
    panels = (states, deltas, deltas)
    titles = (
        "States at the last prompt token, by category",
        "Deltas, by group",
        "Deltas, by category",
    )
    for ax, found, text in zip(axes, panels, titles):
        ax.set_title(text)
        if found is None:
            say(ax, f"too few pairs (n = {len(categories)})")
            continue
        ax.set(xlabel=_axis(0, found.explained[0]), ylabel=_axis(1, found.explained[1]))
    if states is not None:
        n = len(categories)
        for part, marker in ((slice(0, n), "o"), (slice(n, None), "x")):
            _scatter(
                axes[0], states.points[part, :2], categories, CATEGORY_COLORS, marker, marked, order
            )
        legend_below(
            axes[0],
            _handles(
                CATEGORY_COLORS,
                categories,
                CATEGORY_COLORS,
                marked,
                (("o", "original"), ("x", "swapped")),
            ),
            4,
        )
    if deltas is not None:
        _scatter(axes[1], deltas.points[:, :2], groups, GROUP_COLORS, "o", (), order)
        legend_below(axes[1], _handles(GROUPS, groups, GROUP_COLORS, marked))
        _scatter(axes[2], deltas.points[:, :2], categories, CATEGORY_COLORS, "o", marked, order)
        _means(axes[2], deltas.points[:, :2], categories)
        legend_below(
            axes[2],
            _handles(
                CATEGORY_COLORS, categories, CATEGORY_COLORS, marked, (("D", "category mean"),)
            ),
            4,
        )
    fig.suptitle(f"{title}; {DELTA}", fontsize=10)
    footnote(fig, marked)
    return plots.save(fig, path, settings, quiet=quiet)


def _pca_3d(cell, deltas, title, marked, path, settings, quiet):
    categories = cell["categories"]
    fig = plots.plt.figure(figsize=(7.6, 6.9))
    fig.set_layout_engine("none")  # the constrained one does not know 3-D labels
    ax = fig.add_axes((0.0, 0.1, 0.95, 0.86), projection="3d")
    fig.suptitle(f"{title}\n{DELTA}", fontsize=10)
    if deltas is None:
        ax.text2D(
            0.5,
            0.5,
            f"too few pairs (n = {len(categories)})",
            transform=ax.transAxes,
            ha="center",
            color="#555555",
        )
    else:
        _scatter(
            ax, deltas.points, categories, CATEGORY_COLORS, "o", marked, np.arange(len(categories))
        )
        _means(ax, deltas.points, categories)
        for number, name in enumerate("xyz"):
            getattr(ax, f"set_{name}label")(_axis(number, deltas.explained[number]), labelpad=6)
        handles = _handles(
            CATEGORY_COLORS, categories, CATEGORY_COLORS, marked, (("D", "category mean"),)
        )
        fig.legend(
            handles=handles,
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
        axis.set_major_locator(plots.MaxNLocator(5))
    ax.tick_params(labelsize=8, pad=1)
    if marked:
        fig.text(
            0.5, 0.012, UNRELIABLE + listed(marked), ha="center", fontsize=7.5, color="#444444"
        )
    return plots.save(fig, path, settings, quiet=quiet)


def draw_pca(folder, scale, conditions=tuple(CONDITIONS), kinds=("pca", "pca_3d"), quiet=False):
    """2-D and 3-D PCA of every representative layer -> files. 2-D: states by category, deltas by
    group and by category; 3-D: deltas by category."""
    written, marked = [], unreliable(folder, scale)
    for layer, pairs in read_vectors(folder, scale):
        for tag in dict.fromkeys(CONDITIONS[condition] for condition in conditions):
            chosen = pairs["both"] if tag == "both_correct" else np.ones(len(pairs["both"]), bool)
            cell = {name: values[chosen] for name, values in pairs.items()}
            enough = len(cell["categories"]) > 1
            deltas = pca(cell["delta"], cell["delta"], cell["categories"]) if enough else None
            states = (
                pca(
                    np.concatenate([cell["orig"], cell["swap"]]),
                    cell["delta"],
                    cell["categories"],
                    2,
                )
                if enough and "pca" in kinds
                else None
            )
            for condition in [name for name in conditions if CONDITIONS[name] == tag]:
                title = f"{Path(folder).name} {scale}, layer {layer}, {WORDS[condition]}"
                settings, flagged = (
                    settings_of(folder, condition, scale=scale, layer=layer),
                    (marked if condition == "all_with_validity" else {}),
                )
                for kind in kinds:
                    path = path_of(folder, condition, kind, f"pca_{scale}_L{layer}")
                    if kind == "pca":
                        written += _pca_2d(
                            cell, states, deltas, title, flagged, path, settings, quiet
                        )
                    else:
                        written += _pca_3d(cell, deltas, title, flagged, path, settings, quiet)
    return written

"""Figures of SpatialTunnel: where on the grid of angles a model tells far from near, and whether it
follows height or size. Why Far Looks Up (arXiv 2605.30161), figure 4; used by
swap_analysis/spatial_tunnel_plot.py."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.lines import Line2D

from vlmdiag.cli import UsageError
from vlmdiag.figures import plots, stats
from vlmdiag.scenes.tunnel import ANGLES, DEPTHS, split_grid
from vlmdiag.types import Fields

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from vlmdiag.runs.rundirs import Run

BARS = {
    "v": "all",
    "v_consistent": "consistent:\nfar is higher",
    "v_counter": "counter:\nfar is lower",
    "v_ambiguous": "ambiguous:\nequal heights",
}
OUTLINES: dict[str, tuple[Any, str]] = {
    "counter": ((0, (1.5, 1.5)), "far object lower (counter)"),
    "consistent": ("-", "far object higher (consistent)"),
}
HEATMAPS_A_ROW = 5


@dataclass(frozen=True)
class Summary:
    """What the figures show of analysis/summary.json."""

    measures: dict[str, stats.Interval]  # of BARS, and the gap
    cells: stats.Interval  # v (16, 16) by the far and the near object's angle
    s1: Float[np.ndarray, " s"]  # sizes of the far object
    sizes: stats.Interval  # v (s,) by s1


def read_summary(run: Run) -> Summary:
    """analysis/summary.json of a run. UsageError where it cannot be read."""
    path = run.path / "analysis" / "summary.json"
    try:
        content = json.loads(path.read_bytes())
        summary = Summary(
            {name: _interval(content[name]) for name in (*BARS, "gap")},
            _interval(content["cells"]),
            np.array(content["sizes"]["s1"]),
            _interval(content["sizes"]["v_by_s1"]),
        )
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        raise UsageError(
            f"{path} cannot be read ({type(error).__name__}: {error}); run spatial_tunnel.py again,"
            " which writes it at the end"
        ) from error
    if summary.cells.mean.shape != (ANGLES, ANGLES):
        raise UsageError(
            f"{path} has cells of shape {summary.cells.mean.shape}, {ANGLES} x {ANGLES} was"
            " wanted; run spatial_tunnel.py again"
        )
    return summary


def _interval(content: Fields) -> stats.Interval:
    """An interval from its JSON form; a null is NaN."""
    mean, low, high = (np.array(content[name], float) for name in ("mean", "low", "high"))
    return stats.Interval(mean, low, high, np.array(content["n"], int))


Line = tuple[tuple[float, float], tuple[float, float]]


def edges(mask: Bool[np.ndarray, "rows columns"]) -> Iterator[Line]:
    """Lines around the true cells of a mask, as ((x, x), (y, y)) in cells."""
    padded = np.pad(mask, 1)
    rows, columns = mask.shape
    for row in range(rows):
        for column in range(columns + 1):
            if padded[row + 1, column] != padded[row + 1, column + 1]:
                yield (column - 0.5, column - 0.5), (row - 0.5, row + 0.5)
    for row in range(rows + 1):
        for column in range(columns):
            if padded[row, column + 1] != padded[row + 1, column + 1]:
                yield (column - 0.5, column + 0.5), (row - 0.5, row - 0.5)


def draw_cells(summaries: Mapping[str, Summary]) -> Figure:
    """One heatmap a run, all on one scale."""
    columns = min(HEATMAPS_A_ROW, len(summaries))
    rows = -(-len(summaries) // columns)
    fig, axes = plt.subplots(
        rows, columns, figsize=(1.9 + 2.9 * columns, 0.9 + 3.3 * rows), squeeze=False
    )
    far = f"angle of the far object ({DEPTHS[0]} m)"
    near = f"angle of the near object ({DEPTHS[1]} m)"
    quarter = range(0, ANGLES, ANGLES // 4)
    degrees = [f"{360 * angle // ANGLES}\u00b0" for angle in quarter]
    for number, (ax, (label, summary)) in enumerate(zip(axes.flat, summaries.items())):
        measures = summary.measures
        title = (
            f"{plots.with_n(label, measures['v'].n)}\n"
            f"consistent {measures['v_consistent'].mean:.2f},"
            f" counter {measures['v_counter'].mean:.2f}"
        )
        is_first = number % columns == 0
        image = plots.heatmap(
            ax,
            summary.cells.mean,
            title,
            0,
            1,
            xlabel=near,
            ylabel=far if is_first else "",
            cmap="RdBu",
        )
        _outline_splits(ax)
        ax.set(
            aspect="equal", xticks=quarter, yticks=quarter, xticklabels=degrees, yticklabels=degrees
        )
    for ax in list(axes.flat)[len(summaries) :]:
        ax.set_visible(False)
    fig.suptitle("SpatialTunnel: share of the right answer", fontsize=11)
    fig.colorbar(image, ax=axes, label="v (0.5: chance)", shrink=0.8)
    handles = [
        Line2D([], [], color="black", linestyle=style, linewidth=1.2, label=words)
        for style, words in OUTLINES.values()
    ]
    fig.legend(handles=handles, loc="outside lower center", ncols=min(2, columns), frameon=False)
    return fig


def _outline_splits(ax: Axes) -> None:
    """Lines, black on white, around the cells of OUTLINES."""
    ground = {"color": "white", "linewidth": 2.6, "solid_capstyle": "projecting"}
    for split, (style, _) in OUTLINES.items():
        for look in (ground, {"color": "black", "linewidth": 1.2, "linestyle": style}):
            for x, y in edges(split_grid() == split):
                ax.plot(x, y, **look)


def draw_bars(summaries: Mapping[str, Summary], colors: Mapping[str, str]) -> Figure:
    """v in all pictures and by split, one group of bars each, a bar a run."""
    fig, ax = plt.subplots(figsize=(6.2 + 0.7 * len(summaries), 4))
    width = 0.8 / len(summaries)
    for number, (label, summary) in enumerate(summaries.items()):
        x = np.arange(len(BARS)) + (number - (len(summaries) - 1) / 2) * width
        intervals = [summary.measures[name] for name in BARS]
        mean = np.array([interval.mean for interval in intervals])
        low = np.array([interval.low for interval in intervals])
        high = np.array([interval.high for interval in intervals])
        # + 0.0: no -0.00
        gap = round(float(summary.measures["gap"].mean), 2) + 0.0
        n = summary.measures["v"].n
        text = f"{plots.with_n(label, n)}, gap {gap:+.2f}"
        ax.bar(x, mean, 0.9 * width, color=colors[label], label=text)
        reach = [mean - low, high - mean]
        ax.errorbar(x, mean, reach, fmt="none", ecolor="black", elinewidth=1, capsize=2)
    ax.axhline(0.5, color=plots.EVEN_COLOR, linestyle="--", linewidth=1, label="chance")
    ax.set(
        title="SpatialTunnel: does height decide? (95 % intervals over pictures)",
        ylabel="v, share of the right answer",
        ylim=(0, 1),
        xticks=range(len(BARS)),
        xticklabels=BARS.values(),
    )
    ax.grid(False, axis="x")
    plots.legends([ax], below=True)
    return fig


def draw_sizes(summaries: Mapping[str, Summary], colors: Mapping[str, str]) -> Figure:
    """v by the far object's size, a line a run."""
    fig, ax = plt.subplots(figsize=(5.5, 4))
    for label, summary in summaries.items():
        v = summary.sizes
        ax.plot(
            summary.s1,
            v.mean,
            color=colors[label],
            marker="o",
            markersize=3.5,
            label=plots.with_n(label, v.n),
        )
        ax.fill_between(summary.s1, v.low, v.high, color=colors[label], alpha=0.2, linewidth=0)
    ax.axhline(0.5, color=plots.EVEN_COLOR, linestyle="--", linewidth=1, label="chance")
    ax.set(
        title="SpatialTunnel: does size decide?",
        xlabel="half extent of the far object, m (that of the near one: 0.4 m less it)",
        ylabel="v, share of the right answer",
        ylim=(0, 1.02),
        xticks=summary.s1[::2],
    )
    plots.legends([ax], below=True)
    return fig


def table_of(summaries: Mapping[str, Summary]) -> dict[str, list[object]]:
    """The bars and the gap as columns of a CSV."""
    table: dict[str, list[object]] = {"run": [], "measure": [], "mean": [], "low": [], "high": []}
    for label, summary in summaries.items():
        for name, interval in summary.measures.items():
            table["run"].append(label)
            table["measure"].append(name)
            for end in ("mean", "low", "high"):
                table[end].append(float(getattr(interval, end)))
    return table

"""Where on the grid of angles does a model tell far from near, and does it follow height or size?
Figures of runs of spatial_tunnel.py; no model is loaded.

    python swap_analysis/spatial_tunnel_plot.py --run_dir runs/spatial_tunnel/tiny-llava
    python swap_analysis/spatial_tunnel_plot.py \\
        --run_dir runs/spatial_tunnel/tiny-llava-scale* runs/spatial_tunnel/tiny-llava

Reads analysis/summary.json; writes spatial_tunnel_cells (v by the far and the near object's angle,
cells whose far object is higher, and lower, outlined), spatial_tunnel_v (v in all pictures and by
split) and, where the sweep was measured, spatial_tunnel_sizes (v by the far object's size) as PNG
and PDF: for one run in its analysis/, for several beside the first one. v is the mean share of the
right answer, 0.5 is chance; bands and whiskers are bootstrap 95 % intervals over pictures. A model
that follows height is blue within one outline and red within the other. Why Far Looks Up (arXiv
2605.30161), figure 4.
"""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.lines import Line2D

from vlmdiag import cli
from vlmdiag.cli import UsageError
from vlmdiag.figures import plots, stats
from vlmdiag.runs import rundirs
from vlmdiag.scenes.tunnel import ANGLES, DEPTHS, split_grid

EXPERIMENT = "spatial_tunnel"
BARS = {
    "v": "all",
    "v_consistent": "consistent:\nfar is higher",
    "v_counter": "counter:\nfar is lower",
    "v_ambiguous": "ambiguous:\nequal heights",
}
OUTLINES = {
    "counter": ((0, (1.5, 1.5)), "far object lower (counter)"),
    "consistent": ("-", "far object higher (consistent)"),
}
A_ROW = 5  # heatmaps


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--run_dir", nargs="+", required=True, help="run directories of spatial_tunnel.py"
    )
    parser.add_argument(
        "--out_dir",
        default=None,
        help="folder of the figures; None: one run's analysis/, or beside the first of several",
    )
    parser.add_argument(
        "--save_csv", action="store_true", help="also write the plotted numbers as CSV"
    )
    parser.add_argument("--show", action="store_true", help="open windows as well")
    return parser.parse_args(argv)


def read_summary(run):
    """analysis/summary.json with its intervals as stats.Interval."""
    path = run.path / "analysis" / "summary.json"
    try:
        summary = json.loads(path.read_bytes())
        names = [*BARS, "gap", "cells"]
        found = {name: interval(summary[name]) for name in names}
        found |= {
            "s1": np.array(summary["sizes"]["s1"]),
            "sizes": interval(summary["sizes"]["v_by_s1"]),
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{path} cannot be read ({type(error).__name__}: {error}); run spatial_tunnel.py again,"
            " which writes it at the end"
        ) from error
    if found["cells"].mean.shape != (ANGLES, ANGLES):
        raise UsageError(
            f"{path} has cells of shape {found['cells'].mean.shape}, {ANGLES} x {ANGLES} was"
            " wanted; run spatial_tunnel.py again"
        )
    return found


def interval(told):
    return stats.Interval(
        *(np.array(told[name], float) for name in ("mean", "low", "high")), np.array(told["n"], int)
    )


# --- figures --------------------------------------------------------------------------------------


def edges(mask):
    """Lines around the true cells of a mask (rows, columns), as ((x, x), (y, y)) in cells."""
    padded = np.pad(mask, 1)
    rows, columns = mask.shape
    upright = [
        ((c - 0.5,) * 2, (r - 0.5, r + 0.5))
        for r in range(rows)
        for c in range(columns + 1)
        if padded[r + 1, c] != padded[r + 1, c + 1]
    ]
    level = [
        ((c - 0.5, c + 0.5), (r - 0.5,) * 2)
        for r in range(rows + 1)
        for c in range(columns)
        if padded[r, c + 1] != padded[r + 1, c + 1]
    ]
    return upright + level


def draw_cells(summaries):
    """One heatmap a run, all on one scale."""
    columns = min(A_ROW, len(summaries))
    rows = -(-len(summaries) // columns)
    fig, axes = plt.subplots(
        rows, columns, figsize=(1.9 + 2.9 * columns, 0.9 + 3.3 * rows), squeeze=False
    )
    quarter = range(0, ANGLES, ANGLES // 4)
    for number, (ax, (label, found)) in enumerate(zip(axes.flat, summaries.items())):
        title = (
            f"{plots.with_n(label, found['v'].n)}\nconsistent {found['v_consistent'].mean:.2f},"
            f" counter {found['v_counter'].mean:.2f}"
        )
        near, far = (
            f"angle of the near object ({DEPTHS[1]} m)",
            f"angle of the far object ({DEPTHS[0]} m)",
        )
        image = plots.heatmap(
            ax,
            found["cells"].mean,
            title,
            0,
            1,
            xlabel=near,
            ylabel=far if number % columns == 0 else "",
            cmap="RdBu",
        )
        for name, (style, _) in OUTLINES.items():
            for look in (
                {"color": "white", "linewidth": 2.6, "solid_capstyle": "projecting"},
                {"color": "black", "linewidth": 1.2, "linestyle": style},
            ):
                for x, y in edges(split_grid() == name):
                    ax.plot(x, y, **look)
        degrees = [f"{360 * k // ANGLES}\u00b0" for k in quarter]
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


def draw_bars(summaries, colors):
    """v in all pictures and by split, one group of bars each, a bar a run."""
    fig, ax = plt.subplots(figsize=(3.5 + 0.7 * len(summaries), 4))
    width = 0.8 / len(summaries)
    for k, (label, found) in enumerate(summaries.items()):
        x = np.arange(len(BARS)) + (k - (len(summaries) - 1) / 2) * width
        mean, low, high = (
            np.array([getattr(found[name], end) for name in BARS])
            for end in ("mean", "low", "high")
        )
        ax.bar(
            x,
            mean,
            0.9 * width,
            color=colors[label],
            label=(
                f"{plots.with_n(label, found['v'].n)}, gap"
                f" {round(float(found['gap'].mean), 2) + 0.0:+.2f}"
            ),
        )
        ax.errorbar(
            x, mean, [mean - low, high - mean], fmt="none", ecolor="black", elinewidth=1, capsize=2
        )
    ax.axhline(0.5, color=plots.EVEN_COLOR, linestyle="--", linewidth=1, label="chance")
    ax.set(
        title="SpatialTunnel: does height decide?",
        ylabel="v, share of the right answer",
        ylim=(0, 1),
        xticks=range(len(BARS)),
        xticklabels=BARS.values(),
    )
    ax.grid(False, axis="x")
    plots.legends([ax], below=True)
    return fig


def draw_sizes(summaries, colors):
    """v by the far object's size, a line a run."""
    fig, ax = plt.subplots(figsize=(5.5, 4))
    for label, found in summaries.items():
        values = found["sizes"]
        ax.plot(
            found["s1"],
            values.mean,
            color=colors[label],
            marker="o",
            markersize=3.5,
            label=plots.with_n(label, values.n),
        )
        ax.fill_between(
            found["s1"], values.low, values.high, color=colors[label], alpha=0.2, linewidth=0
        )
    ax.axhline(0.5, color=plots.EVEN_COLOR, linestyle="--", linewidth=1, label="chance")
    ax.set(
        title="SpatialTunnel: does size decide?",
        xlabel="half extent of the far object, m (that of the near one: 0.4 m less it)",
    )
    ax.set(ylabel="v, share of the right answer", ylim=(0, 1.02), xticks=found["s1"][::2])
    plots.legends([ax], below=True)
    return fig


def columns_of(summaries):
    """The bars as columns of a CSV."""
    rows = [
        (label, name, found[name]) for label, found in summaries.items() for name in (*BARS, "gap")
    ]
    return {"run": [row[0] for row in rows], "measure": [row[1] for row in rows]} | {
        end: [float(getattr(row[2], end)) for row in rows] for end in ("mean", "low", "high")
    }


def main(argv=None):
    args = parse_args(argv)
    if args.show:
        plots.use_windows()
    runs = [rundirs.read_run(path, EXPERIMENT) for path in args.run_dir]
    summaries = {label: read_summary(run) for label, run in zip(plots.run_labels(runs), runs)}
    colors = plots.model_colors(list(summaries))
    folder = (
        Path(args.out_dir)
        if args.out_dir
        else (
            runs[0].path / "analysis"
            if len(runs) == 1
            else plots.comparison_path(runs, "spatial_tunnel").parent
        )
    )
    settings = {
        "runs": [run.label for run in runs],
        "settings": [run.meta["settings"] for run in runs],
    }
    plots.save(draw_cells(summaries), folder / "spatial_tunnel_cells", settings, args.show)
    plots.save(draw_bars(summaries, colors), folder / "spatial_tunnel_v", settings, args.show)
    swept = {label: found for label, found in summaries.items() if found["sizes"].n.any()}
    if swept:
        plots.save(draw_sizes(swept, colors), folder / "spatial_tunnel_sizes", settings, args.show)
    if args.save_csv:
        plots.save_csv(folder / "spatial_tunnel_v.csv", columns_of(summaries))
    return 0


if __name__ == "__main__":
    cli.run(main)

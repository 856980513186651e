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

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from vlmdiag import cli
from vlmdiag.runs import rundirs, selection

EXPERIMENT = "spatial_tunnel"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
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


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    from vlmdiag.figures import plots
    from vlmdiag.swap import figures_tunnel

    if args.show:
        plots.use_windows()
    runs = [rundirs.read_run(path, EXPERIMENT) for path in args.run_dir]
    summaries = {
        label: figures_tunnel.read_summary(run)
        for label, run in zip(selection.run_labels(runs), runs, strict=True)
    }
    colors = plots.model_colors(list(summaries))
    if args.out_dir:
        folder = Path(args.out_dir)
    elif len(runs) == 1:
        folder = runs[0].path / "analysis"
    else:
        folder = selection.comparison_path(runs, EXPERIMENT).parent
    settings = {
        "runs": [run.label for run in runs],
        "settings": [run.meta["settings"] for run in runs],
    }
    cells = figures_tunnel.draw_cells(summaries)
    plots.save(cells, folder / "spatial_tunnel_cells", settings, args.show)
    bars = figures_tunnel.draw_bars(summaries, colors)
    plots.save(bars, folder / "spatial_tunnel_v", settings, args.show)
    swept = {label: summary for label, summary in summaries.items() if summary.sizes.n.any()}
    if swept:
        sizes = figures_tunnel.draw_sizes(swept, colors)
        plots.save(sizes, folder / "spatial_tunnel_sizes", settings, args.show)
    if args.save_csv:
        table = figures_tunnel.table_of(summaries)
        plots.save_csv(folder / "spatial_tunnel_v.csv", table)
    return 0


if __name__ == "__main__":
    cli.run(main)

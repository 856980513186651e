"""How do time and memory of each experiment grow with the picture's tokens, layers, batch and new
tokens?

    # nine experiments on small random models, about ten minutes of one core; and the figure
    python benchmarks/bench_growth.py --threads 1 --out bench_growth.json --figure growth.png
    # very few and small sizes, only to see that it runs
    python benchmarks/bench_growth.py --quick

Each experiment is our own function, as in the other benchmarks. From a base of 576 tokens of the
picture, 4 layers x 128, one picture and 8 new tokens, one of the four grows at a time. An exponent
is the slope in log-log between the two largest sizes: 2 means that twice the size takes four times
as much.

    exponent = log(y2 / y1) / log(x2 / x1)

Expected at most: time 2 with the picture's tokens (attention; linear layers 1) and 1 with the rest;
memory 1. Fixed costs make an exponent smaller. What is more than 0.25 above is marked in the table.
CPU time of the process and its peak above what was held before; a process per experiment, whose
allocator gives freed blocks back at once.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks import measuring
from benchmarks.cases import Case, Size, build, make_samples
from vlmdiag import cli

if TYPE_CHECKING:
    from benchmarks.variants_growth import Point, Work

Curve = dict[str, Any]  # size, seconds, mib: one each per size

WIDTH = (128, 4, 344)  # hidden size, heads, intermediate size of a layer
TOWER = (2, 64, 2, 96)
TEXT = 40  # about how many tokens of a prompt are not of the picture
# of each axis the base and the sizes
SIZES = {
    "picture": (576, [144, 576, 1296, 2916]),
    "layers": (4, [2, 4, 8, 16]),
    "batch": (1, [1, 2, 4, 8]),
    "new_tokens": (8, [8, 32, 128]),
}
QUICK = {
    "picture": (36, [36, 81]),
    "layers": (1, [1, 2]),
    "batch": (1, [1, 2]),
    "new_tokens": (2, [2, 4]),
}
TITLES = {
    "picture": "tokens of the picture",
    "layers": "layers",
    "batch": "batch",
    "new_tokens": "new tokens",
}
QUANTITIES = {"seconds": "CPU s", "mib": "extra MiB"}
ABOVE = 0.25


def expected(axis: str, quantity: str) -> int:
    """The largest exponent that the work itself asks for."""
    return 2 if axis == "picture" and quantity == "seconds" else 1


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The slope in log-log between the last two."""
    rise = np.log(values[-1] / values[-2])
    return float(rise / np.log(sizes[-1] / sizes[-2]))


def points_of(experiment: str, sizes: Mapping[str, tuple[int, list[int]]]) -> dict[str, Curve]:
    """What the process of one experiment prints: {axis: {size, seconds, mib: one each per size}}.
    Seconds are the least of two runs."""
    from benchmarks.variants_growth import EXPERIMENTS, Point

    base = Point(**{axis: at for axis, (at, _) in sizes.items()})
    make, axes = EXPERIMENTS[experiment]
    measured: dict[Point, tuple[float, float | None]] = {}
    for axis in axes:
        for size in sizes[axis][1]:
            point = base._replace(**{axis: size})
            if point not in measured:
                measured[point] = measure(make, point)
    curves = {}
    for axis in axes:
        of_axis = sizes[axis][1]
        values = [measured[base._replace(**{axis: size})] for size in of_axis]
        curves[axis] = {
            "size": of_axis,
            "seconds": [seconds for seconds, _ in values],
            "mib": [mib for _, mib in values],
        }
    return curves


def measure(make: Callable[[Case], Work], point: Point) -> tuple[float, float | None]:
    """(CPU seconds, MiB above what was held before) of an experiment at a point."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        shape = Size((point.layers, *WIDTH), TOWER)
        vlm = build(shape, point.picture + TEXT, "cpu", folder)
        work = make(Case(vlm, make_samples(folder, point.batch), point.new_tokens, folder))
        seconds: list[float] = []

        def timed() -> None:
            seconds.append(measuring.times_of(work)[1])

        peak = measuring.peak_of(timed, timed)
    return min(seconds), peak


# --- report ---------------------------------------------------------------------------------------


def rows_of(curves: Mapping[str, Mapping[str, Curve]]) -> list[measuring.Row]:
    """A row per experiment, axis and quantity, with its exponent, but for what could not be read or
    was too little."""
    rows: list[measuring.Row] = []
    for experiment, of_axes in curves.items():
        for axis, curve in of_axes.items():
            for quantity in QUANTITIES:
                if not all(curve[quantity][-2:]):
                    continue
                fitted = exponent(curve["size"], curve[quantity])
                limit = expected(axis, quantity)
                rows.append(
                    {
                        "experiment": experiment,
                        "axis": axis,
                        "quantity": quantity,
                        "sizes": curve["size"],
                        "values": curve[quantity],
                        "exponent": fitted,
                        "expected": limit,
                        "above": bool(fitted > limit + ABOVE),
                    }
                )
    return rows


def table(rows: Sequence[measuring.Row]) -> str:
    """Exponents of time and memory of each experiment as a Markdown table, those above the expected
    ones in bold."""
    cells = {(row["experiment"], row["quantity"], row["axis"]): row for row in rows}
    lines = [
        f"| experiment | of | {' | '.join(TITLES.values())} |",
        "|---|---|" + "---|" * len(TITLES),
    ]
    for experiment, quantity in dict.fromkeys((key[0], key[1]) for key in cells):
        shown = []
        for axis in TITLES:
            row = cells.get((experiment, quantity, axis))
            if row is None:
                shown.append("")
                continue
            text = f"{row['exponent']:.2f} of {row['expected']}"
            shown.append(f"**{text}**" if row["above"] else text)
        lines.append(f"| {experiment} | {QUANTITIES[quantity]} | {' | '.join(shown)} |")
    return "\n".join(lines)


def draw(rows: Sequence[measuring.Row], path: str) -> None:
    """Above CPU time of each experiment, below the exponents of time and memory beside the expected
    ones."""
    from vlmdiag.figures import plots
    from vlmdiag.figures.plots import plt

    experiments = list(dict.fromkeys(row["experiment"] for row in rows))
    colors = dict(zip(experiments, plots.CYCLE, strict=False))
    widest = max(2.5, *(row["exponent"] + 0.2 for row in rows))
    figure, axes = plt.subplots(2, len(TITLES), figsize=(13, 7.5), sharey="row")
    for (axis, title), above, below in zip(TITLES.items(), *axes, strict=True):
        for row in rows:
            if row["axis"] != axis:
                continue
            experiment, color = row["experiment"], colors[row["experiment"]]
            is_time = row["quantity"] == "seconds"
            if is_time:
                above.plot(row["sizes"], row["values"], "o-", color=color, label=experiment, ms=4)
            height = experiments.index(experiment) + (-0.15 if is_time else 0.15)
            fill = color if is_time else "none"
            below.plot(row["exponent"], height, "o" if is_time else "s", color=color, mfc=fill)
            below.plot([row["expected"]] * 2, [height - 0.14, height + 0.14], "k-", lw=1.5)
        above.set(xscale="log", yscale="log", title=title)
        above.set_xticks(row_sizes := sizes_of(rows, axis), labels=map(str, row_sizes))
        above.minorticks_off()
        below.set(xlim=(-0.3, widest), xlabel="exponent")
        below.set_yticks(range(len(experiments)), labels=experiments)
    axes[0, 0].set_ylabel("CPU time of one run (s)")
    axes[0, 0].legend(ncols=2, fontsize=7)
    axes[1, 0].invert_yaxis()
    marks = [
        plt.Line2D([], [], color="k", marker="o", ls="", label="time"),
        plt.Line2D([], [], color="k", marker="s", mfc="none", ls="", label="memory"),
        plt.Line2D([], [], color="k", marker="|", ms=9, ls="", label="expected at most"),
    ]
    figure.legend(handles=marks, loc="outside lower center", ncols=3)
    figure.suptitle("Growth with the size of the work (small random LLaVA, shorter of two runs)")
    plots.save(figure, path, {"sizes": {axis: sizes_of(rows, axis) for axis in TITLES}}, quiet=True)


def sizes_of(rows: Sequence[measuring.Row], axis: str) -> list[int]:
    return next((row["sizes"] for row in rows if row["axis"] == axis), [])


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument("--only", nargs="+", default=None, help="experiments; None: all")
    parser.add_argument("--threads", type=cli.whole(1, 1024), default=1, help="of PyTorch")
    parser.add_argument(
        "--quick", action="store_true", help="very small sizes; figures without meaning"
    )
    parser.add_argument("--out", default=None, help="JSON file with everything")
    parser.add_argument("--figure", default=None, help="its PNG and PDF file")
    parser.add_argument(
        "--memory_of", default=None, help="one experiment (the benchmark calls itself so)"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    import torch

    from benchmarks.variants_growth import EXPERIMENTS

    torch.set_num_threads(args.threads)
    if args.memory_of:
        print(json.dumps(points_of(args.memory_of, SIZES)))
        return 0
    if unknown := set(args.only or ()) - set(EXPERIMENTS):
        raise cli.UsageError(f"--only {', '.join(unknown)}: one of {', '.join(EXPERIMENTS)}")
    names = args.only or list(EXPERIMENTS)
    if args.quick:
        curves = {name: points_of(name, QUICK) for name in names}
    else:
        curves = measuring.in_processes(names, __file__, ["--threads", args.threads])
    rows = rows_of(curves)
    if args.figure:
        draw(rows, args.figure)
    report = {"machine": measuring.machine(), "quick": args.quick, "rows": rows}
    return measuring.finish(report, [table(rows)], args.out)


if __name__ == "__main__":
    cli.run(main)

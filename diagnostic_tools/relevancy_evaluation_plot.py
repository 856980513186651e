"""Which map over the picture is right? Perturbation curves, the areas under them, pointing game and
mask energy of every method, with the priors.

    python diagnostic_tools/relevancy_evaluation_plot.py \\
        --run_dir runs/evaluate_relevancy/tiny-llava
    python diagnostic_tools/relevancy_evaluation_plot.py --run_dir runs/evaluate_relevancy/* \\
        --out_dir outputs/relevancy

    area       mean over the shares s of p(s) / p(0), p of the fixed token: positive, lower is
               better; negative, higher is better
    gap        negative - positive area: 0 where the order says nothing
    needs      l(0) - l(every vision token at the picture's mean) of a token, nats: 'seeing' tokens
               have at least --dependence, 'knowing' tokens less;
               'first' tokens write the first word of an object's name, 'later' tokens the others

Reads runs of evaluate_relevancy.py, loads no model. A value of an image is the mean over its
tokens; means, 95 % bootstrap intervals and paired differences, to random and to relevancy, are over
images. Writes into analysis/ (of several runs: beside the first, or --out_dir) perturbation_auc.csv
and localisation.csv with all groups of tokens and for each run, of the group --tokens, the figures
<run>_curves, <run>_auc and <run>_localisation, where the priors are lines. On tiny-llava the curves
of a good method fall at once (positive) and stay at 1 until the end (negative).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vlmdiag import cli
from vlmdiag.runs import rundirs, selection

if TYPE_CHECKING:
    from vlmdiag.runs.rundirs import Run

EXPERIMENT = "evaluate_relevancy"
GROUPS = {  # of tokens, and how a title says it
    "all": "",
    "seeing": " that lose at least {} without the picture",
    "knowing": " that lose less than {} without the picture",
    "first": " of the names' first words",
    "later": " of the names' later words",
}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--run_dir", "--run_dirs", nargs="+", required=True, help="runs of evaluate_relevancy.py"
    )
    parser.add_argument("--out_dir", default=None, help="where tables and figures go")
    parser.add_argument("--tokens", choices=GROUPS, default="seeing", help="tokens in the figures")
    parser.add_argument(
        "--dependence",
        type=cli.number(-(10**9), 10**9),
        default=1.0,
        help="nats that a 'seeing' token loses without the picture, at least",
    )
    return parser.parse_args(argv)


def out_folder(args: argparse.Namespace, runs: Sequence[Run]) -> Path:
    """--out_dir, else the run's analysis folder; of several runs the folder beside the first."""
    if args.out_dir:
        return Path(args.out_dir)
    return runs[0].path / "analysis" if len(runs) == 1 else runs[0].path.parent


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    import pandas as pd

    from vlmdiag.figures import plots
    from vlmdiag.relevancy import evaluation_figures as figures
    from vlmdiag.relevancy import evaluation_tables as tables

    runs = [rundirs.read_run(folder, EXPERIMENT) for folder in args.run_dir]
    labels = selection.run_labels(runs)
    evaluations = [tables.Evaluation(run) for run in runs]
    out = out_folder(args, runs)
    areas, places = [], []
    for run, label, evaluation in zip(runs, labels, evaluations, strict=True):
        left_out = ", ".join(f"{count} {name}" for name, count in evaluation.left_out.items())
        print(f"{label}: {len(evaluation.records)} images; left out: {left_out}")
        areas.append(tables.area_table(evaluation, label, args.dependence))
        places.append(tables.local_table(evaluation, label, args.dependence))
        chosen = evaluation.tokens(args.tokens, args.dependence)
        count = tables.count_of(chosen)
        nats = "1 nat" if args.dependence == 1 else f"{args.dependence:g} nats"
        group = GROUPS[args.tokens].format(nats)
        if not count:
            print(f"{label}: no figures, for there are no tokens{group}")
            continue
        settings = run.meta["settings"] | {
            "tokens": args.tokens,
            "dependence": args.dependence,
            "images": len(evaluation.records),
        }
        drawn = {"curves": figures.curves_figure, "auc": figures.areas_figure}
        if all(evaluation.local):
            drawn["localisation"] = figures.local_figure
        for name, draw in drawn.items():
            figure = draw(evaluation, label, chosen, f"{count} tokens{group}")
            plots.save(figure, out / f"{run.label}_{name}", settings)
    area_table = pd.concat(areas)
    plots.save_csv(out / "perturbation_auc.csv", area_table)
    shown = area_table[(area_table.measure == "ratio") & (area_table.tokens == args.tokens)]
    lines = tables.lines_of(shown)
    local_table = pd.concat(places)
    if len(local_table):
        plots.save_csv(out / "localisation.csv", local_table)
        lines += tables.lines_of(local_table[local_table.tokens == args.tokens])
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    cli.run(main)

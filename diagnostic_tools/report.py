"""What do the runs say of the models? One page of all that was measured.

    python diagnostic_tools/report.py --runs_dir runs --out report
    python diagnostic_tools/report.py --runs_dir runs --out report --models tiny-llava --csv
    python diagnostic_tools/report.py --runs_dir runs --compare runs/a__sp-0 runs/b__sp-0

Reads whatever run directories there are and loads no model. Into --out: index.html, one file that
opens offline (what was asked of which model on how many pictures, every figure with how to read it,
the claims of the five papers with verdicts, failures, settings, versions, time and memory),
figures/ with each figure as PNG and PDF, and claims.json. --csv: every number with its interval
(numbers.csv), and those that analyses wrote (analyses.csv). --compare: paired differences between
two runs of one experiment, two models or two settings, on the page and in differences.csv.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vlmdiag import cli
from vlmdiag.cli import UsageError
from vlmdiag.runs import rundirs

if TYPE_CHECKING:
    from vlmdiag.runs.rundirs import Run


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument("--runs_dir", default="runs", help="folder of run directories")
    parser.add_argument(
        "--results_dir", default="results", help="where swap_analysis.py wrote its results"
    )
    parser.add_argument("--out", "--out_dir", default="report", help="folder of the report")
    parser.add_argument("--models", nargs="+", help="only runs of these models, in this order")
    parser.add_argument("--title", default="Checkup", help="title of the page")
    parser.add_argument("--csv", action="store_true", help="also write every number as CSV")
    parser.add_argument(
        "--compare",
        nargs=2,
        metavar=("RUN", "RUN"),
        help="two runs of one experiment: the second minus the first",
    )
    cli.add_claim_arguments(parser)
    return parser.parse_args(argv)


def write_tables(runs: Sequence[Run], out: Path) -> None:
    """numbers.csv and analyses.csv."""
    import pandas as pd

    from vlmdiag.figures import plots
    from vlmdiag.report import page, quantities
    from vlmdiag.report.catalog import experiment_of

    tables, analyses = [], []
    for run in runs:
        experiment = experiment_of(run)
        for quantity in quantities.quantities_of(run) if run.ids() else ():
            tables.append(quantities.table_of(run.label, experiment, quantity))
        for file, place, number in page.analyses_of(run):
            analyses.append((run.label, experiment, file, place, number))
    if tables:
        plots.save_csv(out / "numbers.csv", pd.concat(tables))
    columns = ["model", "experiment", "file", "place", "value"]
    plots.save_csv(out / "analyses.csv", pd.DataFrame(analyses, columns=columns))


def compared_runs(paths: Sequence[str] | None) -> tuple[Run, Run] | None:
    """The two runs of --compare."""
    if not paths:
        return None
    from vlmdiag.report.catalog import experiment_of

    first, second = (rundirs.read_run(path) for path in paths)
    if experiment_of(first) != experiment_of(second):
        raise UsageError(
            f"--compare: {first.path} is of {experiment_of(first)}, {second.path} of"
            f" {experiment_of(second)}; two runs of one experiment were wanted"
        )
    return first, second


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    from vlmdiag.report import catalog, claims

    out = Path(args.out)
    compared = compared_runs(args.compare)
    runs, broken = catalog.find(args.runs_dir)
    subjects = catalog.subjects(runs, args.results_dir, args.models)
    if args.models:
        runs = [run for run in runs if catalog.model_of(run) in args.models]
    found = claims.findings(subjects, dict(args.normalised or ()), args.independent or ())
    from vlmdiag.figures import plots
    from vlmdiag.report import page

    page.write(out, args.title, runs, broken, subjects, found, compared)
    plots.write_file(out / "claims.json", claims.as_json(found).encode())
    if compared:
        from vlmdiag.report import compare, quantities

        differences = compare.differences(*map(quantities.quantities_of, compared))
        labels = [run.label for run in compared]
        table = compare.table_of(differences, *labels, catalog.experiment_of(compared[0]))
        plots.save_csv(out / "differences.csv", table)
    if args.csv:
        write_tables(runs, out)
    return 0


if __name__ == "__main__":
    cli.run(main)

"""Which signals tell hallucinated object words from grounded ones, and can the probability be
believed? Drawn from the report of hallucination_warning.py test.

    python diagnostic_tools/viz_hallucination.py \\
        --run_dir runs/hallucination_warning/tiny-llava__test

Left: AUROC of each signal and of all together on words that were not fitted on, 95 % interval over
pictures; dotted: plain token probability. A signal whose difference to it has an interval above 0
is marked. Right: predicted against observed share of hallucinated words, bins of equal count.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from vlmdiag import cli
from vlmdiag.cli import UsageError
from vlmdiag.runs import rundirs

EXPERIMENT = "hallucination_warning"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--run_dir", nargs="+", required=True, help="runs of hallucination_warning.py test"
    )
    parser.add_argument(
        "--kind", default="captions", choices=["captions", "pope"], help="which object words"
    )
    return parser.parse_args(argv)


def draw_run(folder: str, args: argparse.Namespace) -> None:
    """The figure of one run."""
    from vlmdiag.figures import plots
    from vlmdiag.stethoscope.calibration_figure import draw

    run = rundirs.read_run(folder, EXPERIMENT)
    path = run.path / "analysis" / "report.json"
    try:
        numbers = json.loads(path.read_bytes())[args.kind]
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        raise UsageError(
            f"{path} has no {args.kind} words ({type(error).__name__}); run"
            " hallucination_warning.py test first"
        ) from error
    if numbers["too_few"]:
        raise UsageError(
            f"{path}: {numbers['n_hallucinated']} of {numbers['n_words']} words of {args.kind} are"
            " hallucinated; both kinds are needed"
        )
    figure = draw(numbers, args.kind, run.label)
    name = f"hallucination_{args.kind}"
    plots.save(figure, run.path / "analysis" / name, {"run": run.label, "kind": args.kind})


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    for path in args.run_dir:
        draw_run(path, args)
    return 0


if __name__ == "__main__":
    cli.run(main)

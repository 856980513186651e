"""Which headline claims of the five papers do the runs bear out?

    python diagnostic_tools/claims.py --runs_dir runs
    python diagnostic_tools/claims.py --runs_dir runs --normalised my-llava my-llava-norm

Prints for each claim its measured parts, the range in which it holds (fixed before the runs, with
its source, in vlmdiag/report/claims.py), value with interval, n and a verdict: holds, does not
hold, not decided, not testable (why). Intervals are over pictures and simultaneous over all tests
of the table (Bonferroni). Reads whatever run directories there are and loads no model; --out writes
the table as JSON.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from vlmdiag import cli


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument("--runs_dir", default="runs", help="folder of run directories")
    parser.add_argument(
        "--results_dir", default="results", help="where swap_analysis.py wrote its results"
    )
    parser.add_argument("--models", nargs="+", help="only these models, in this order")
    parser.add_argument("--out", help="JSON file to write")
    cli.add_claim_arguments(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    from vlmdiag.figures import plots
    from vlmdiag.report import catalog, claims
    from vlmdiag.report.page import range_text, value_text

    runs, broken = catalog.find(args.runs_dir)
    for line in broken:
        print(f"left out: {line}")
    subjects = catalog.subjects(runs, args.results_dir, args.models)
    for subject in subjects:
        for run in subject.runs.values():
            if "__" in run.path.name.removesuffix("__sp-0").removesuffix("__sp-1"):
                print(f"{subject.name}: {run.path}, the only run of its experiment")
    found = claims.findings(subjects, dict(args.normalised or ()), args.independent or ())
    for number, claim in claims.CLAIMS.items():
        of_claim = [finding for finding in found if finding.part.claim == number]
        if not of_claim:
            continue
        print(f"\n{number}. {claim.wording}\n   {claim.paper}")
        for subject in subjects:
            of_model = [finding for finding in of_claim if finding.model == subject.name]
            if not of_model:
                continue
            print(f"   {subject.name}: {claims.of_claim(of_model)}")
            for finding in of_model:
                value = finding.why
                if finding.interval is not None:
                    n = int(finding.interval.n)
                    value = f"{value_text(finding.interval)} (n = {n})"
                wanted = range_text(finding.part.low, finding.part.high)
                print(f"      {finding.verdict}: {finding.part.quantity}: {value}; holds {wanted}")
    if args.out:
        plots.write_file(args.out, claims.as_json(found).encode())
    return 0


if __name__ == "__main__":
    cli.run(main)

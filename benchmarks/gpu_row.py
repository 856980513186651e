"""The last line of gpu.sh: one row for the table "On a GPU" in docs/benchmarks.md.

    python benchmarks/gpu_row.py outputs/gpu

Of each report in the folder what its table says of ours; a part without a report was not measured.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlmdiag import cli

# column: report, what its rows must hold besides the variant "ours", and the number that is shown
COLUMNS: dict[str, tuple[str, dict[str, str], str]] = {
    "diagnosis, x floor": ("diagnostics", {}, "x_floor"),
    "diagnosis": ("diagnostics", {}, "published_to_this"),
    "36 knockouts": ("interventions", {"experiment": "knockouts"}, "published_to_this"),
    "18 ablations": ("interventions", {"experiment": "ablations"}, "published_to_this"),
    "critique loop": ("volcano", {}, "published_to_this"),
    "swap pair": ("swap", {"answer": "ends", "work": "pair"}, "published_to_this"),
    "pair + quad": ("swap", {"answer": "ends", "work": "pair + quad"}, "published_to_this"),
    "relevancy": ("relevancy", {}, "published_to_this"),
    "given answers": ("known_answers", {"measured": "given"}, "alone_to_this"),
    "GB, bfloat16": ("fits", {"weights": "bfloat16"}, "peak_gb"),
    "GB, 4 bits": ("fits", {"weights": "4 bits"}, "peak_gb"),
}


def cell(report: dict[str, Any] | None, wanted: dict[str, str], key: str) -> str:
    """The number of the row that ends as wanted; of several the largest (peaks)."""
    numbers = [
        row[key]
        for row in (report or {}).get("rows", ())
        if row.get("variant", "ours") == "ours"
        and all(
            row[name] == value or row[name].endswith(f" {value}") for name, value in wanted.items()
        )
    ]
    numbers = [number for number in numbers if number is not None]
    return f"{max(numbers):.2f}" if numbers else "not measured"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument("folder", type=Path, help="where gpu.sh wrote its reports")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    folder = parse_args(argv).folder
    reports = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    machines = [report["machine"] for report in reports.values()]
    card = next((machine["gpu"] or "no GPU" for machine in machines), "no report")
    cells = [card, *(cell(reports.get(name), *rest) for name, *rest in COLUMNS.values())]
    print(f"\n| card | {' | '.join(COLUMNS)} |", "|---" * len(cells) + "|", sep="\n")
    print(f"| {' | '.join(cells)} |")
    return 0


if __name__ == "__main__":
    cli.run(main)

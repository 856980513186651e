"""The paper's two tables and their figures from finished runs of the ablation and knockout
experiments.

    python scripts/summarize_results.py \\
        --run_dir runs/ablation/tiny-llava runs/ablation_vqa/tiny-llava runs/knockout/tiny-llava \\
        --out_dir outputs/llava_interp

Ablation (table1.csv, .md; ablation.png, .pdf): destroyed = share of the initially correct answers
that an ablation makes wrong, by setting, with the mean number of tokens, and the paired difference
to as many random tokens. Knockout (table2.csv, .md; knockout.png, .pdf): relative accuracy = share
of the initially correct answers that stay so, 1 = no effect. Each picture counts once: questions
and random draws of a picture are averaged first. Intervals are 95 %: Wilson's with n pictures, and
bootstrap over pictures for paired differences and changes of log-probability. The published summary
divides by all pictures, those wrong before too, and subtracts probabilities of different tokens.
arXiv 2410.07149, tables 1 and 2; docs/studies/llava_interp.md, sections
1.9 and 5.

On 1 to 3 objects a picture, as published, tiny-llava loses nearly every answer with its object's
tokens and none with as many random ones.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmdiag import cli
from vlmdiag.cli import UsageError

if TYPE_CHECKING:
    from vlmdiag.interp.summary import Effects


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--run_dir",
        nargs="+",
        required=True,
        help="run directories of the two ablation experiments and the knockout experiment",
    )
    parser.add_argument(
        "--out_dir", default="outputs/llava_interp", help="where tables and figures go"
    )
    return parser.parse_args(argv)


def write_table(stem: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A table as CSV and Markdown, and on the screen."""
    from vlmdiag.figures import plots
    from vlmdiag.interp.summary import as_csv, as_markdown

    markdown = as_markdown(rows)
    plots.write_file(f"{stem}.csv", as_csv(rows).encode())
    plots.write_file(f"{stem}.md", markdown.encode())
    print(markdown, end="")


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    from vlmdiag.figures import plots
    from vlmdiag.interp import figures, summary

    out = Path(args.out_dir)
    ablations: dict[str, dict[str, Effects]] = {}
    knockouts: dict[str, Effects] = {}
    windows: dict[str, dict[str, list[int]]] = {}
    paths = []
    for path in args.run_dir:
        run, records = summary.read_interventions(path)
        paths.append(str(run.path))
        experiment = run.meta["experiment"]
        is_knockout = experiment == "knockout"
        label = run.label if is_knockout else f"{run.label} ({experiment})"
        if label in knockouts or label in ablations:
            raise UsageError(f"two runs have the name {label}; give each its own --run_name")
        effects = {
            setting: summary.summarise(records, setting) for setting in summary.SETTINGS[experiment]
        }
        if is_knockout:
            knockouts[label] = effects["vqa"]
            windows[label] = run.meta["settings"]["windows"]
        else:
            ablations[label] = effects
    settings = vars(args) | {"runs": paths}
    if ablations:
        write_table(out / "table1", summary.ablation_table(ablations))
        plots.save(figures.draw_ablation(ablations), out / "ablation", settings)
        if figures.has_counts(ablations):
            plots.save(figures.draw_counts(ablations), out / "ablation_by_tokens", settings)
    if knockouts:
        write_table(out / "table2", summary.knockout_table(knockouts))
        plots.save(figures.draw_knockout(knockouts, windows), out / "knockout", settings)
    return 0


if __name__ == "__main__":
    cli.run(main)

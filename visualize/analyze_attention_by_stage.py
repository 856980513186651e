"""Does the model look at the picture more while it criticises or revises than while it first
answers, or is its text only longer?

    c[t, p] = attention of the step that wrote token t to vision token p, pooled over layers and
    heads (mean of the 3 largest of each, as published)
    ratio   = mean over images of a statistic of the feedback's (revision's) c / the same of the
            initial answer's
Volcano (arXiv 2311.07362), figure 5; docs/studies/volcano.md, sections 2.4, 2.9 and N3.

    python visualize/analyze_attention_by_stage.py --run_dir runs/volcano/tiny-llava --filter all

Side by side: the published top-l mean (per patch, the l largest over tokens, l = length of the
shorter text: a mean for that text, nearly a maximum for the longer one), the mean over tokens, the
picture's share of the attention per token, and the top half of texts cut to equal length. Each with
bootstrap 95 % intervals over images and a permutation null: the tokens of the two texts pooled and
split again at their lengths. Where the null of the published statistic lies well above 1, that much
of its ratio is length alone. The token that ended a text counts in none. Into <run>/analysis/:
attention_by_stage.json, .csv, .png, .pdf and, where all pictures share one grid, stage_maps.png,
.pdf (figure 5, with the revision and with the mean over tokens below it).

--filter enhanced: instances where the model preferred a revision at least once (published, its own
judgement); corrected: first answer wrong and final answer right by the gold answer; all. The
feedback and revision are those that the run stored, the last accepted ones.

On tiny-llava the published ratio of the feedback is well above 1 but below its null, and all the
fair ones are below 1.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from vlmdiag import cli
from vlmdiag.cli import UsageError
from vlmdiag.runs import rundirs

EXPERIMENT = "volcano"
FILTERS = ("enhanced", "corrected", "all")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--run_dir",
        nargs="+",
        required=True,
        help="a run directory of run_volcano_with_image_attention.py",
    )
    parser.add_argument(
        "--filter", choices=FILTERS, default="enhanced", help="which instances count"
    )
    parser.add_argument(
        "--pool_method",
        choices=("top_k_mean", "mean", "max"),
        default="top_k_mean",
        help="pool over layers and heads",
    )
    parser.add_argument(
        "--num_permutations",
        type=cli.whole(1, 10**6),
        default=200,
        help="of the tokens of each pair of texts",
    )
    parser.add_argument("--seed", type=cli.seed, default=0, help="of the permutations")
    return parser.parse_args(argv)


def analyse(path: str, args: argparse.Namespace) -> None:
    """Statistics and figures of one run."""
    run = rundirs.read_run(path, EXPERIMENT)
    from vlmdiag.figures import plots
    from vlmdiag.volcano import figures, stages

    records, total = stages.select(run, args.filter)
    comparisons, maps = stages.measure(
        run, records, args.pool_method, args.num_permutations, args.seed
    )
    print(f"{run.label}: {len(records)} of {total} instances, {figures.CHOSEN[args.filter]}")
    for stage, comparison in comparisons.items():
        if comparison.missing:
            print(
                f"{stage}: {len(comparison.missing)} left out that have none stored, because no"
                " revision was accepted"
            )
        if comparison.empty:
            print(
                f"{stage}: {len(comparison.empty)} left out in which a text has no token but the"
                " one that ends it"
            )
    summaries = {
        stage: stages.summarise(comparison, records, stage)
        for stage, comparison in comparisons.items()
        if comparison.ids
    }
    if not summaries:
        raise UsageError(
            f"{run.path}: none of the {len(records)} instances has a token both in its initial"
            " answer and in a feedback or revision"
        )
    stages.correct(summaries)
    stages.show(summaries)
    names = ("filter", "pool_method", "num_permutations", "seed")
    settings = run.meta["settings"] | {name: getattr(args, name) for name in names}
    out = Path(run.path) / "analysis"
    definitions = {name: text.replace("\n", " ") for name, text in figures.STATISTIC_NAMES.items()}
    content = {
        "definitions": definitions,
        "settings": settings,
        "instances_in_run": total,
        "instances": len(records),
        "left_out": {
            stage: {"missing": comparison.missing, "empty": comparison.empty}
            for stage, comparison in comparisons.items()
        },
        "comparisons": summaries,
    }
    rundirs.write_json(out / "attention_by_stage.json", content)
    print(f"\nwrote {out / 'attention_by_stage.json'}")
    plots.save_csv(out / "attention_by_stage.csv", stages.table_of(summaries))
    ratios = figures.draw_ratios(run.label, summaries, args.filter, args.pool_method)
    plots.save(ratios, out / "attention_by_stage", settings)

    grid = stages.grid_of([records[id] for id in maps.ids])
    if grid is None:
        reason = "no instance has all three texts"
        if maps.ids:
            reason = "the pictures have no regular grid, or not all the same"
        print(f"no stage_maps: {reason}")
        # of an earlier call with another --filter
        for ending in (".png", ".pdf"):
            (out / f"stage_maps{ending}").unlink(missing_ok=True)
        return
    means = stages.mean_maps(maps, records, grid)
    figure = figures.draw_stage_maps(run.label, means, len(maps.ids), args.filter, args.pool_method)
    limits = {"vmin": means.min(), "vmax": means.max()}
    plots.save(figure, out / "stage_maps", settings | limits)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    for path in args.run_dir:
        analyse(path, args)
    return 0


if __name__ == "__main__":
    cli.run(main)

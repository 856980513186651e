"""How much of the attention goes to the system prompt, to the image and to the question?

Reads runs of run_coco_diagnostics.py. At each generated token the attention is averaged over heads
(and layers), BOS and generated tokens are left out:
    three-way share of a group = group / (system + vision + user), the masked one = group / (vision
    + user),
averaged over generated tokens, then over images. The user's tokens include the role strings. Beyond
Semantics (arXiv 2503.17349), figure 6.

    python system_prompt_plot.py \\
        --run_dir runs/llava-v1.5-7b__sp-0 runs/llava-v1.5-7b-multilayerNorm__sp-0

Per run, in <run>/analysis/ as PNG and PDF: dataset_pie_with_system and
dataset_pie_vision_vs_user_masked (with --side_by_side one figure, dataset_pies_side_by_side), bars
in place of the published pies, and system_vision_user_shares_by_layer. Two runs or more:
compare_system_share_by_layer beside the first run. Bands and brackets are bootstrap 95 % intervals
over images. Of a run without a system prompt (__sp-1) nothing about its share is drawn.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from vlmdiag import cli
from vlmdiag.runs import rundirs, selection


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--run_dir", nargs="+", required=True, help="run directories of run_coco_diagnostics.py"
    )
    parser.add_argument(
        "--side_by_side",
        action="store_true",
        help="shares with and without the system prompt in one figure",
    )
    parser.add_argument(
        "--save_csv", action="store_true", help="also write the plotted numbers as CSV"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    from vlmdiag.beyond_semantics import share_figures
    from vlmdiag.figures import plots

    runs = [rundirs.read_run(path, rundirs.COCO) for path in args.run_dir]
    labels = selection.run_labels(runs)
    settings = vars(args)
    shares = {}
    for run, label in zip(runs, labels):
        shares[label] = share_figures.read_shares(run)
        share_figures.draw_run(run, label, shares[label], settings, args.side_by_side)
    with_system = {
        label: of_run
        for label, of_run in shares.items()
        if "system" in share_figures.shown_groups(of_run)
    }
    if len(with_system) > 1:
        path = selection.comparison_path(runs, "compare_system_share_by_layer")
        plots.save(share_figures.system_figure(with_system), path, settings)
    elif len(runs) > 1:
        print("no comparison of the system prompt's share: fewer than two of the runs have one")
    if args.save_csv:
        for run, label in zip(runs, labels):
            share_figures.save_tables(run, shares[label])
    return 0


if __name__ == "__main__":
    cli.run(main)

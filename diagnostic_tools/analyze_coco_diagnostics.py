"""How much does attention to the image depend on where the image stands in the prompt?

Reads runs of run_coco_diagnostics.py, in which RoPE moved the keys of all vision tokens D positions
towards the query, in each layer for itself:
    delta_gv     = attention-weighted mean change of the vision logits, per position (signed)
    delta_alphaV = alpha_V after - alpha_V before, alpha_V = attention mass on the vision tokens
    (not divided by D)
Beyond Semantics (arXiv 2503.17349), figure 8.

    python analyze_coco_diagnostics.py \\
        --run_dir runs/llava-v1.5-7b__sp-0 runs/llava-v1.5-7b-multilayerNorm__sp-0

Per run, in <run>/analysis/: avg_alphaV.npy, avg_delta_gv.npy, avg_abs_delta_gv.npy (absolute value
per image, then the mean), avg_delta_alphaV.npy, avg_delta_gv_derivative.npy, each (L, H), and
summary.json. Beside the first run, as PNG and PDF: compare_abs_delta_gv_layerwise_mean and
compare_delta_alphaV_and_abs_delta_gv_layerwise_mean. Lines are means over heads, then images; bands
are bootstrap 95 % intervals over images.
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
        "--delta_steps",
        type=cli.number(-1_000_000, 1_000_000),
        help="which of the run's shifts D to read, in token positions; None: the run's first",
    )
    parser.add_argument(
        "--save_csv", action="store_true", help="also write the plotted numbers as CSV"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    from vlmdiag.beyond_semantics import rope_figures
    from vlmdiag.figures import plots

    runs = [rundirs.read_run(path, rundirs.COCO) for path in args.run_dir]
    labels = selection.run_labels(runs)
    probes = [rope_figures.read_probe(run, args.delta_steps) for run in runs]
    step = rope_figures.common_step([probe.step for probe in probes])
    curves = {
        label: rope_figures.summarise(run, probe) for label, run, probe in zip(labels, runs, probes)
    }
    settings = vars(args) | {"delta_steps": step}
    figure = rope_figures.layers_figure(curves, ["abs_delta_gv"], step)
    plots.save(
        figure, selection.comparison_path(runs, "compare_abs_delta_gv_layerwise_mean"), settings
    )
    figure = rope_figures.layers_figure(curves, list(rope_figures.DRAWN), step)
    both = selection.comparison_path(runs, "compare_delta_alphaV_and_abs_delta_gv_layerwise_mean")
    plots.save(figure, both, settings)
    if args.save_csv:
        rope_figures.save_curves(f"{both}.csv", curves)
    return 0


if __name__ == "__main__":
    cli.run(main)

"""How much longer are the hidden states of image tokens than those of text tokens, from the
embeddings to the last layer?

    norm of a group at hidden state l = mean over the group's prompt tokens of ||h_l||, ratio =
    vision norm / user text norm of the same image
Hidden state 0 is the embeddings, l + 1 the output of layer l before the final norm. Beyond
Semantics (arXiv 2503.17349), figure 4.

    python viz_hidden_norms.py --runs_dir runs --sp 0 --mode avg --logy --early_k 6 \\
        --out hidden_norms_avg_sp0.png
    python viz_hidden_norms.py --runs_dir runs --sp 0 --mode image --image_key 000000006818

Needs runs made with run_coco_diagnostics.py --probe_hidden_norms. Mode avg draws user text norm,
vision norm and log10 of the mean ratio of every run, over the images that all shown runs have, with
bootstrap 95 % intervals; the first --early_k hidden states are shaded and each run's mean log10
ratio over them is printed and written in the legend. Mode image draws a column a run. PNG and PDF;
--save_csv writes <title>_user_text, <title>_vision and <title>_ratio (linear) by hidden state. In
the paper LLaVA-1.5's vision tokens start 50 times as long as text tokens (log10 1.7), those of
normWmean and multilayerNorm about as long (0.15), and all meet near 0 in the later layers.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vlmdiag import cli
from vlmdiag.cli import UsageError
from vlmdiag.runs import rundirs, selection

if TYPE_CHECKING:
    from vlmdiag.runs.rundirs import Run


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--runs_dir", required=True, help="folder of the run directories of run_coco_diagnostics.py"
    )
    parser.add_argument(
        "--sp",
        type=int,
        choices=(0, 1),
        required=True,
        help="runs with (0) or without (1) the system prompt",
    )
    parser.add_argument(
        "--mode", choices=("avg", "image"), default="avg", help="average over images, or one image"
    )
    parser.add_argument(
        "--models", nargs="+", help="runs to show, in this order, by model name; None: all"
    )
    parser.add_argument(
        "--titles",
        nargs="+",
        help="names for the runs of --models, one each in the same order; None: their own",
    )
    parser.add_argument(
        "--image_key", help="mode image: a part of the image's id that no other id has"
    )
    parser.add_argument(
        "--npz_basename", help="mode image: the name of its NPZ; wins over --image_key"
    )
    parser.add_argument(
        "--out",
        help=(
            "figure to write; None: hidden_norms_avg_sp-<sp>.png or"
            " hidden_norms_panel_sp-<sp>_<id>.png here"
        ),
    )
    parser.add_argument("--logy", action="store_true", help="logarithmic axis for the norms")
    parser.add_argument(
        "--no_ratio_log10",
        action="store_true",
        help="mode avg: draw the ratio itself, not its log10",
    )
    parser.add_argument(
        "--early_k",
        type=cli.count,
        default=6,
        help="shade the first k hidden states and report the mean log10 ratio over them; 0: none",
    )
    parser.add_argument(
        "--save_csv",
        action="store_true",
        help="also write the plotted numbers as CSV, beside the figure",
    )
    args = parser.parse_args(argv)
    if args.early_k < 0:
        raise UsageError(
            f"--early_k {args.early_k}: a number of hidden states is wanted, 0 or more"
        )
    if args.mode == "image" and not (args.image_key or args.npz_basename):
        raise UsageError("--mode image needs the image: --image_key or --npz_basename")
    if args.mode == "avg" and (args.image_key or args.npz_basename):
        raise UsageError("--image_key and --npz_basename name one image: add --mode image")
    return args


def titles_of(args: argparse.Namespace, labels: list[str]) -> list[str]:
    """A name for each run; UsageError where --titles does not name each once."""
    if args.titles and not args.models and len(labels) > 1:
        raise UsageError(
            "--titles names the runs of --models one by one: give --models too, from"
            f" {', '.join(labels)}"
        )
    titles = args.titles or labels
    if len(titles) != len(labels) or len(set(titles)) != len(titles):
        raise UsageError(
            f"--titles: {len(labels)} different titles are wanted, one for each of"
            f" {', '.join(labels)}; got {', '.join(titles)}"
        )
    return titles


def common_kind(runs: Sequence[Run]) -> str:
    """Which norm the runs measured; UsageError where they differ."""
    kinds = {run.meta["settings"].get("hidden_norm_kind", "l2") for run in runs}
    if len(kinds) > 1:
        raise UsageError(
            f"the runs measured different norms ({', '.join(sorted(kinds))}) and cannot share an"
            " axis; select some with --models"
        )
    return kinds.pop()


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    from vlmdiag.beyond_semantics import norm_figures
    from vlmdiag.figures import plots

    runs = selection.select_runs(rundirs.find_runs(args.runs_dir, args.sp), args.models)
    labels = selection.run_labels(runs)
    titles = titles_of(args, labels)
    measured = [norm_figures.read_norms(run) for run in runs]
    unit = norm_figures.UNITS[common_kind(runs)]
    ids = selection.shared_ids(runs, [norms.ids for norms in measured])
    image_id = None
    if args.mode == "image":
        image_id = selection.find_id(ids, args.image_key, args.npz_basename)
    shown = [image_id] if image_id else ids
    curves = {title: norm_figures.curves_of(norms, shown) for title, norms in zip(titles, measured)}
    if args.early_k:
        for title, of_run in curves.items():
            early = norm_figures.early_mean(of_run.ratio, args.early_k)
            print(
                f"{title}: log10 of the mean ratio vision / user text, mean over the first"
                f" {args.early_k} hidden states: {early:+.3f} (n = {len(shown)})"
            )

    if image_id:
        figure = norm_figures.image_figure(curves, unit, args.early_k, image_id, args.logy)
        out = args.out or f"hidden_norms_panel_sp-{args.sp}_{image_id}.png"
    else:
        by_label = plots.model_colors(labels)
        colors = {title: by_label[label] for title, label in zip(titles, labels)}
        figure = norm_figures.average_figure(
            curves,
            colors,
            unit,
            args.early_k,
            args.logy,
            args.no_ratio_log10,
            not runs[0].path.name.endswith("__sp-1"),
        )
        out = args.out or f"hidden_norms_avg_sp-{args.sp}.png"
    png = plots.save(figure, out, vars(args) | {"labels": labels, "images": len(shown)})[0]
    if args.save_csv:
        states = max(len(of_run.ratio.mean) for of_run in curves.values())
        columns = {"hidden_state": range(states)}
        for title, of_run in curves.items():
            for name, interval in of_run._asdict().items():
                columns[f"{title}_{name}"] = interval.mean
        plots.save_csv(f"{png.with_suffix('')}.csv", columns)
    return 0


if __name__ == "__main__":
    cli.run(main)

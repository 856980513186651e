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
ratio over them is printed and written in the legend. Mode image draws one panel a run. PNG and PDF;
--save_csv writes <title>_user_text, <title>_vision and <title>_ratio (linear) by hidden state. In
the paper LLaVA-1.5's vision tokens start 50 times as long as text tokens (log10 1.7), those of
normWmean and multilayerNorm about as long (0.15), and all meet near 0 in the later layers."""

import numpy as np

from vlmdiag import cli
from vlmdiag.cli import UsageError
from vlmdiag.figures import plots, stats
from vlmdiag.runs import rundirs

STATE_AXIS = "hidden state\n(0: embeddings, l + 1: output of layer l before the final norm)"


def parse_args(argv=None):
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
        type=int,
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


def read_norms(run):
    """(ids, user text norms (n, L+1), vision norms (n, L+1)) of one run."""
    keys = ["hidden_norms_user_text", "hidden_norms_vision"]
    ids, arrays = plots.read_arrays(
        run, keys, "make them with run_coco_diagnostics.py --probe_hidden_norms"
    )
    return ids, *(arrays[key].astype(np.float64) for key in keys)


def measure(user, vision):
    """Intervals over images, each of shape (L+1,): user text norm, vision norm, ratio of the two
    within an image. user, vision (n, L+1)."""
    ratio = np.divide(vision, user, out=np.full_like(vision, np.nan), where=user > 0)
    return {
        "user_text": stats.mean_interval(user),
        "vision": stats.mean_interval(vision),
        "ratio": stats.mean_interval(ratio),
    }


def log10(interval):
    """The interval of log10 of a positive mean: log10 is monotone, so the bounds carry over."""
    with np.errstate(divide="ignore"):
        return stats.Interval(*(np.log10(part) for part in interval[:3]), interval.n)


def early_mean(ratio, early_k):
    """Mean log10 ratio over the first hidden states."""
    return float(stats.measured_mean(log10(ratio).mean[:early_k]))


def shade(ax, early_k):
    """Mark the first hidden states; [the patch], or [] for early_k = 0."""
    return (
        [
            ax.axvspan(
                -0.5,
                early_k - 0.5,
                color="#000000",
                alpha=0.07,
                linewidth=0,
                label=f"first {early_k} hidden states",
                zorder=0,
            )
        ]
        if early_k
        else []
    )


def draw_average(norms, titles, colors, unit, args):
    """Three panels: user text norm, vision norm, ratio."""
    fig, axes = plots.plt.subplots(1, 3, figsize=(16, 4.8))
    for title, curves in norms.items():
        states = np.arange(len(curves["ratio"].mean))
        for ax, group in zip(axes, ("user_text", "vision")):
            plots.line_with_band(ax, states, curves[group], title, colors[title])
        label = title + (
            f": {early_mean(curves['ratio'], args.early_k):+.2f}" if args.early_k else ""
        )
        plots.line_with_band(
            axes[2],
            states,
            curves["ratio"] if args.no_ratio_log10 else log10(curves["ratio"]),
            label,
            colors[title],
        )
    shade(axes[2], args.early_k)
    axes[2].axhline(
        1 if args.no_ratio_log10 else 0,
        color=plots.EVEN_COLOR,
        linestyle="--",
        linewidth=1,
        label="equal norms",
    )
    for ax, name in zip(axes, ("User text tokens", "Vision tokens")):
        ax.set(
            title=name,
            ylabel=f"mean norm of a token ({unit})",
            yscale="log" if args.logy else "linear",
        )
        if not args.logy:
            ax.set_ylim(bottom=0)
    axes[2].set(
        title="Vision norm / user text norm of an image",
        ylabel="mean ratio" if args.no_ratio_log10 else "log10 of the mean ratio",
    )
    for ax in axes:
        ax.set_xlabel(STATE_AXIS, fontsize=9)
    plots.legends(
        axes,
        [None, None, f"mean log10 ratio over the first {args.early_k}" if args.early_k else None],
    )
    return fig


def draw_image(norms, unit, args, id):
    """One panel a run: the two norms, their ratio on the right axis."""
    columns = min(len(norms), 3)
    rows = -(-len(norms) // columns)
    fig, axes = plots.plt.subplots(
        rows, columns, figsize=(max(5.6 * columns, 8), 4.4 * rows + 0.4), squeeze=False
    )
    for ax in axes.flat[len(norms) :]:
        ax.remove()
    for ax, (title, curves) in zip(axes.flat, norms.items()):
        states = np.arange(len(curves["ratio"].mean))
        lines = ax.plot(
            states, curves["user_text"].mean, color=plots.color_of("user"), label="user text"
        )
        lines += ax.plot(
            states,
            curves["vision"].mean,
            color=plots.color_of("vision"),
            linestyle="--",
            label="vision",
        )
        right = ax.twinx()
        lines += right.plot(
            states,
            curves["ratio"].mean,
            color=plots.EVEN_COLOR,
            linestyle=":",
            label="vision / user text (right axis)",
        )
        right.spines["right"].set_visible(True)
        right.grid(False)
        right.set(ylabel="ratio of the norms", ylim=(0, None))
        lines += shade(ax, args.early_k)
        extra = (
            f"\nmean log10 ratio over the first {args.early_k}:"
            f" {early_mean(curves['ratio'], args.early_k):+.2f}"
            if args.early_k
            else ""
        )
        ax.set(
            title=f"{title}{extra}",
            ylabel=f"mean norm of a token ({unit})",
            yscale="log" if args.logy else "linear",
        )
        ax.set_xlabel(STATE_AXIS, fontsize=9)
        plots.layer_ticks(ax)
    fig.legend(handles=lines, loc="outside lower center", ncols=4)
    fig.suptitle(f"Hidden-state norms, image {id}")
    return fig


def main(argv=None):
    args = parse_args(argv)
    runs = plots.select_runs(rundirs.find_runs(args.runs_dir, args.sp), args.models)
    labels = plots.run_labels(runs)
    if args.titles and not args.models and len(runs) > 1:
        raise UsageError(
            "--titles names the runs of --models one by one: give --models too, from"
            f" {', '.join(labels)}"
        )
    titles = args.titles or labels
    if len(titles) != len(runs) or len(set(titles)) != len(titles):
        raise UsageError(
            f"--titles: {len(runs)} different titles are wanted, one for each of"
            f" {', '.join(labels)}; got {', '.join(titles)}"
        )
    found = [read_norms(run) for run in runs]
    kinds = {run.meta["settings"].get("hidden_norm_kind", "l2") for run in runs}
    if len(kinds) > 1:
        raise UsageError(
            f"the runs measured different norms ({', '.join(sorted(kinds))}) and cannot share an"
            " axis; select some with --models"
        )
    ids = plots.shared_ids(runs, [ids for ids, _, _ in found])
    one = plots.find_id(ids, args.image_key, args.npz_basename) if args.mode == "image" else None
    shown = [one] if one else ids
    chosen = [np.isin(own, shown) for own, _, _ in found]
    norms = {
        title: measure(user[rows], vision[rows])
        for title, rows, (_, user, vision) in zip(titles, chosen, found)
    }
    for title, curves in norms.items() if args.early_k else ():
        early = early_mean(curves["ratio"], args.early_k)
        print(
            f"{title}: mean log10(vision / user text) over the first {args.early_k} hidden states"
            f" {early:+.3f} (n = {len(shown)})"
        )

    unit = {"l2": "L2", "rms": "root mean square"}[kinds.pop()]
    by_label = plots.model_colors(labels)
    colors = {title: by_label[label] for title, label in zip(titles, labels)}
    fig = (
        draw_image(norms, unit, args, one)
        if one
        else draw_average(norms, titles, colors, unit, args)
    )
    out = args.out or (
        f"hidden_norms_panel_sp-{args.sp}_{one}.png"
        if one
        else f"hidden_norms_avg_sp-{args.sp}.png"
    )
    stem = plots.save(fig, out, vars(args) | {"labels": labels, "images": len(shown)})[
        0
    ].with_suffix("")
    if args.save_csv:
        columns = {"layer": range(max(len(curves["ratio"].mean) for curves in norms.values()))}
        for title, curves in norms.items():
            columns |= {f"{title}_{name}": interval.mean for name, interval in curves.items()}
        plots.save_csv(f"{stem}.csv", columns)
    return 0


if __name__ == "__main__":
    cli.run(main)

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
dataset_pie_vision_vs_user_masked (with --side_by_side one figure, dataset_pies_side_by_side), and
system_vision_user_shares_by_layer. Two runs or more: compare_system_share_by_layer beside the first
run. Bands and brackets are bootstrap 95 % intervals over images. A run without a system prompt
(__sp-1) has a system share of 0.
"""

import numpy as np

from vlmdiag import cli
from vlmdiag.cli import UsageError
from vlmdiag.figures import plots, stats
from vlmdiag.runs import rundirs

GROUPS = ("system", "vision", "user")
AGAIN = "make the run again with run_coco_diagnostics.py --overwrite, without --pos_only"
PIES = {  # the groups of each pie, the fields of an image's JSON that hold their shares, the title
    "with_system": (
        GROUPS,
        ("mean_sys_share", "mean_vision_withsys_share", "mean_text_withsys_share"),
        "Attention to system prompt, image and user text",
    ),
    "vision_vs_user_masked": (
        GROUPS[1:],
        ("mean_vision_share", "mean_text_share"),
        "Attention to image and user text, system prompt left out",
    ),
}


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--run_dir", nargs="+", required=True, help="run directories of run_coco_diagnostics.py"
    )
    parser.add_argument(
        "--side_by_side", action="store_true", help="both pies of a run in one figure"
    )
    parser.add_argument(
        "--save_csv", action="store_true", help="also write the plotted numbers as CSV"
    )
    return parser.parse_args(argv)


def dataset_shares(run):
    """{pie: Interval (groups,)}: shares of each image, averaged over the images."""
    records = [record for record in run.records() if not record.get("pos_only")]
    if not records:
        raise UsageError(f"{run.path} has no image with attention shares; {AGAIN}")
    missing = [key for _, keys, _ in PIES.values() for key in keys if key not in records[0]]
    if missing:
        raise UsageError(f"{run.path}: its images have no {', '.join(missing)}; {AGAIN}")
    return {
        pie: stats.mean_interval([[record[key] for key in keys] for record in records])
        for pie, (_, keys, _) in PIES.items()
    }


def layer_shares(run):
    """Interval (3, L): system, vision and user share of each layer, averaged over the images."""
    _, arrays = plots.read_arrays(run, ["layer_shares"], AGAIN)
    return stats.mean_interval(arrays["layer_shares"])


def draw_pie(ax, pie, interval, label):
    """One pie. Thick slices carry their percentage; the legend gives every share, also the thin
    ones, with its interval."""
    groups, _, title = PIES[pie]
    shares = np.nan_to_num(interval.mean)
    wedges, _ = ax.pie(
        shares,
        colors=[plots.color_of(group) for group in groups],
        startangle=90,
        counterclock=False,
        wedgeprops={"edgecolor": "white"},
    )
    for group, wedge, share in zip(groups, wedges, shares):
        angle = np.deg2rad((wedge.theta1 + wedge.theta2) / 2)
        if share > 0.08:
            ink = "white" if group == "vision" else "black"
            ax.text(
                0.62 * np.cos(angle),
                0.62 * np.sin(angle),
                f"{share:.1%}",
                ha="center",
                va="center",
                weight="bold",
                color=ink,
            )
    words = [
        f"{group}  {mean:.1%}  [{low:.1%}, {high:.1%}]"
        for group, mean, low, high in zip(groups, interval.mean, interval.low, interval.high)
    ]
    ax.legend(
        wedges,
        words,
        loc="upper center",
        bbox_to_anchor=(0.5, 0.02),
        frameon=False,
        title="mean [95 % interval over images]",
        title_fontsize=8.5,
    )
    ax.set(xlim=(-1.1, 1.1), ylim=(-1.1, 1.1))
    ax.set_title(f"{title}\n{plots.with_n(label, interval.n)}", fontsize=10)


def draw_run(run, label, settings, side_by_side):
    """The pies and the curves of one run, in its analysis folder. Returns its intervals {pie:
    (groups,)} and layer shares (3, L)."""
    shares, layers, analysis = dataset_shares(run), layer_shares(run), run.path / "analysis"
    if side_by_side:
        fig, axes = plots.plt.subplots(1, 2, figsize=(10, 5))
        for ax, pie in zip(axes, PIES):
            draw_pie(ax, pie, shares[pie], label)
        plots.save(fig, analysis / "dataset_pies_side_by_side", settings)
    else:
        for pie in PIES:
            fig, ax = plots.plt.subplots(figsize=(5.4, 5))
            draw_pie(ax, pie, shares[pie], label)
            plots.save(fig, analysis / f"dataset_pie_{pie}", settings)
    fig, ax = plots.plt.subplots(figsize=(7.5, 4.6))
    for group, interval in zip(GROUPS, split(layers)):
        plots.line_with_band(
            ax, np.arange(len(interval.mean)), interval, group, plots.color_of(group)
        )
    finish_layers(
        ax,
        f"Attention shares by layer: {label}",
        "share of attention to\nsystem prompt, image and user text",
    )
    plots.save(fig, analysis / "system_vision_user_shares_by_layer", settings)
    return shares, layers


def split(layers):
    """Interval (3, L) -> three of (L,)."""
    return [stats.Interval(*(part[row] for part in layers)) for row in range(len(GROUPS))]


def finish_layers(ax, title, ylabel):
    ax.set(title=title, xlabel="decoder layer", ylabel=ylabel, ylim=(-0.02, 1.02))
    plots.legends([ax])


def main(argv=None):
    args = parse_args(argv)
    runs = [rundirs.read_run(path, rundirs.COCO) for path in args.run_dir]
    labels, settings = plots.run_labels(runs), vars(args)
    found = {
        label: draw_run(run, label, settings, args.side_by_side) for run, label in zip(runs, labels)
    }
    if len(runs) > 1:
        colors = plots.model_colors(labels)
        fig, ax = plots.plt.subplots(figsize=(7.5, 4.6))
        for label, (_, layers) in found.items():
            system = split(layers)[0]
            plots.line_with_band(ax, np.arange(len(system.mean)), system, label, colors[label])
        finish_layers(
            ax,
            "Attention to the system prompt by layer",
            "system share of attention to\nsystem prompt, image and user text",
        )
        plots.save(fig, plots.comparison_path(runs, "compare_system_share_by_layer"), settings)
    for run, (shares, layers) in zip(runs, found.values()) if args.save_csv else ():
        rows = [
            (pie, group, *(part[row] for part in shares[pie]))
            for pie, (groups, _, _) in PIES.items()
            for row, group in enumerate(groups)
        ]
        plots.save_csv(
            run.path / "analysis" / "dataset_pies.csv",
            dict(zip(("pie", "group", "mean", "low", "high", "n"), zip(*rows))),
        )
        columns = {"layer": range(layers.mean.shape[1])}
        for group, interval in zip(GROUPS, split(layers)):
            columns |= {
                f"{group}{part}": value
                for part, value in zip(("", "_low", "_high", "_n"), interval)
            }
        plots.save_csv(run.path / "analysis" / "system_vision_user_shares_by_layer.csv", columns)
    return 0


if __name__ == "__main__":
    cli.run(main)

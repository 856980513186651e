"""Which heads look at the image and which at the question? Cross-modality balance (CMB) of each
layer and head.

    CMB = mean over generated tokens of V / (V + U), V and U the head's attention on vision and user
    tokens (system, BOS, generated left out)
1 = image only, 0 = question only. An image has far more tokens than a question, so attention spread
evenly over the tokens gives not 0.5 but the chance level P / (P + |user|), drawn as a dashed line.
Beyond Semantics (arXiv 2503.17349), figure 7.

    python viz_cmb_panel.py --runs_dir runs --sp 0 --coco_root ../data/COCO --out cmb.png
    python viz_cmb_panel.py --runs_dir runs --sp 0 --image_key 000000006818 --coco_root ../data/COCO

The first draws one (layer x head) map a run, averaged over the images that all shown runs have, and
the mean over heads by layer with its bootstrap 95 % interval over images. The second draws one
image and its maps. Heads that see neither group are grey. PNG and PDF.
"""

import textwrap
from pathlib import Path

import numpy as np
from PIL import Image

from vlmdiag import cli
from vlmdiag.cli import UsageError
from vlmdiag.figures import plots, stats
from vlmdiag.runs import rundirs


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
        "--models", nargs="+", help="runs to show, in this order, by model name; None: all"
    )
    parser.add_argument("--image_key", help="show one image: a part of its id that no other id has")
    parser.add_argument(
        "--npz_basename", help="show one image: the name of its NPZ; wins over --image_key"
    )
    parser.add_argument("--img_path", help="picture to show beside the maps of one image")
    parser.add_argument(
        "--coco_root",
        help=(
            "where to look for that picture: val2017/ and train2017/ below it; then the run's own"
            " image folder"
        ),
    )
    parser.add_argument(
        "--use_key",
        choices=("head_vision_share", "cmb_baseline"),
        default="head_vision_share",
        help="array of the NPZ files to draw",
    )
    parser.add_argument(
        "--scale",
        choices=("fixed", "auto"),
        default="fixed",
        help="colours from 0 to 1, or to the 99th percentile of the shown maps",
    )
    parser.add_argument(
        "--out", help="figure to write; None: cmb_panel_sp-<sp>_<averaged or id>.png here"
    )
    parser.add_argument("--show", action="store_true", default=False, help="also open a window")
    parser.add_argument(
        "--no_show",
        dest="show",
        action="store_false",
        default=False,
        help="open no window; so it is unless --show asks for one",
    )
    parser.add_argument(
        "--save_csv", action="store_true", help="also write the numbers of the maps as CSV"
    )
    return parser.parse_args(argv)


def read_maps(run, key):
    """(ids, maps (n, L, H)) of one run."""
    advice = (
        "make it with run_coco_diagnostics.py without --pos_only"
        if key == "head_vision_share"
        else "no script writes it; leave out --use_key"
    )
    ids, arrays = plots.read_arrays(run, [key], advice)
    return ids, arrays[key]


def find_picture(args, run, id):
    """The picture of an item: --img_path, else by file name below --coco_root and in the folder
    that the run read."""
    name = Path(run.record(id)["file_name"])
    folders = (
        [Path(args.coco_root, part) for part in ("val2017", "train2017", "")]
        if args.coco_root
        else []
    )
    places = (
        [Path(args.img_path)]
        if args.img_path
        else [folder / name for folder in (*folders, Path(run.meta["free"]["image_dir"]))]
    )
    found = [place for place in places if place.is_file()]
    if not found:
        raise UsageError(
            f"no picture for {id} at {', '.join(map(str, places))}; name it with --img_path"
        )
    try:
        with Image.open(found[0]) as picture:
            return np.asarray(picture.convert("RGB"))
    except OSError as error:
        raise UsageError(f"{found[0]} cannot be read as a picture: {error}") from error


def panel_axes(count):
    """A figure with count panels in rows of at most four."""
    columns = min(count, 4)
    rows = -(-count // columns)
    fig, axes = plots.plt.subplots(
        rows, columns, figsize=(4.1 * columns + 0.8, 4.1 * rows + 0.3), squeeze=False
    )
    for ax in axes.flat[count:]:
        ax.remove()
    return fig, list(axes.flat[:count])


def draw_maps(fig, axes, maps, titles, scale):
    top = (
        1.0
        if scale == "fixed"
        else np.nanpercentile(np.concatenate([each.ravel() for each in maps]), 99)
    )
    for ax, matrix, title in zip(axes, maps, titles):
        image = plots.heatmap(ax, matrix, title, vmin=0, vmax=top)
    fig.colorbar(image, ax=axes[-1], label="CMB: vision / (vision + user) attention")


def draw_layers(ax, labels, balances, chances):
    """Mean over heads by layer for every run. balances: (n, L, H) each; chances: one number
    each."""
    colors = plots.model_colors(labels)
    for label, values, chance in zip(labels, balances, chances):
        interval = stats.mean_interval(stats.measured_mean(values, axis=2))
        plots.line_with_band(ax, np.arange(len(interval.mean)), interval, label, colors[label])
        ax.axhline(chance, color=colors[label], linestyle="--", linewidth=1.1)
    ax.plot(
        [],
        [],
        color=plots.EVEN_COLOR,
        linestyle="--",
        linewidth=1.1,
        label="chance: attention spread evenly",
    )
    ax.set(
        title="Mean over heads, 95 % band over images",
        xlabel="decoder layer",
        ylabel="CMB",
        ylim=(-0.02, 1.02),
    )
    plots.legends([ax], below=True)


def main(argv=None):
    args = parse_args(argv)
    if args.show:
        plots.use_windows()
    runs = plots.select_runs(rundirs.find_runs(args.runs_dir, args.sp), args.models)
    labels = plots.run_labels(runs)
    found = [read_maps(run, args.use_key) for run in runs]
    ids = plots.shared_ids(runs, [ids for ids, _ in found])
    one = (
        plots.find_id(ids, args.image_key, args.npz_basename)
        if args.image_key or args.npz_basename
        else None
    )
    shown = [one] if one else ids
    balances = [
        maps[np.isin(own, shown)].astype(np.float64) for own, maps in found
    ]  # both lists are sorted
    chances = [np.mean([run.record(id)["chance_vision_share"] for id in shown]) for run in runs]
    means = [stats.measured_mean(maps) for maps in balances]
    counted = "" if one else f"n = {len(ids)}, "
    titles = [
        f"{textwrap.fill(label, 38)}\n{counted}mean {stats.measured_mean(mean, axis=(0, 1)):.3f},"
        f" chance {chance:.3f}"
        for label, mean, chance in zip(labels, means, chances)
    ]

    fig, axes = panel_axes(len(runs) + 1)
    if one:
        axes[0].imshow(find_picture(args, runs[0], one))
        axes[0].set_title(f"image {one}")
        axes[0].axis("off")
        draw_maps(fig, axes[1:], means, titles, args.scale)
    else:
        draw_maps(fig, axes[:-1], means, titles, args.scale)
        draw_layers(axes[-1], labels, balances, chances)
    fig.suptitle(
        "Cross-modality balance: share of a head's vision + user attention that goes to the image"
    )
    out = Path(args.out or f"cmb_panel_sp-{args.sp}_{one or 'averaged'}.png")
    settings = vars(args) | {"labels": labels, "images": len(shown)}
    stem = plots.save(fig, out, settings, show=args.show)[0].with_suffix("")
    if args.save_csv:
        cells = [
            (label, *cell, mean[cell], len(shown))
            for label, mean in zip(labels, means)
            for cell in np.ndindex(mean.shape)
        ]
        plots.save_csv(
            f"{stem}.csv", dict(zip(("model", "layer", "head", "cmb", "n"), zip(*cells)))
        )
    return 0


if __name__ == "__main__":
    cli.run(main)

"""Which heads look at the image and which at the question? Cross-modality balance (CMB) of each
layer and head.

    CMB = mean over generated tokens of V / (V + U), V and U the head's attention on vision and user
    tokens (system, BOS, generated left out)
1 = image only, 0 = question only. An image has far more tokens than a question, so attention spread
evenly over the tokens gives not 0.5 but the chance level P / (P + |user|): white in the maps, blue
above, red below, and a dashed line.
Beyond Semantics (arXiv 2503.17349), figure 7.

    python viz_cmb_panel.py --runs_dir runs --sp 0 --coco_root ../data/COCO --out cmb.png
    python viz_cmb_panel.py --runs_dir runs --sp 0 --image_key 000000006818 --coco_root ../data/COCO

The first draws one (layer x head) map a run, averaged over the images that all shown runs have, and
the mean over heads by layer with its bootstrap 95 % interval over images. The second draws one
image and its maps. Heads that see neither group are grey. PNG and PDF.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from vlmdiag import cli
from vlmdiag.runs import rundirs, selection


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
        help=(
            "colours as far below chance as above: to 0 or 1, whichever is nearer, or to the 99th"
            " percentile of the shown maps"
        ),
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


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    from vlmdiag.beyond_semantics import cmb_figures
    from vlmdiag.figures import plots

    if args.show:
        plots.use_windows()
    runs = selection.select_runs(rundirs.find_runs(args.runs_dir, args.sp), args.models)
    labels = selection.run_labels(runs)
    measured = [cmb_figures.read_maps(run, args.use_key) for run in runs]
    ids = selection.shared_ids(runs, [ids for ids, _ in measured])
    image_id = None
    if args.image_key or args.npz_basename:
        image_id = selection.find_id(ids, args.image_key, args.npz_basename)
    shown = [image_id] if image_id else ids
    balances = [
        cmb_figures.balance_of(run, label, run_ids, maps, shown)
        for run, label, (run_ids, maps) in zip(runs, labels, measured)
    ]
    picture = None
    if image_id:
        picture = cmb_figures.find_picture(runs[0], image_id, args.img_path, args.coco_root)
    figure = cmb_figures.panel_figure(balances, args.scale, image_id, picture)
    out = Path(args.out or f"cmb_panel_sp-{args.sp}_{image_id or 'averaged'}.png")
    settings = vars(args) | {"labels": labels, "images": len(shown)}
    png = plots.save(figure, out, settings, show=args.show)[0]
    if args.save_csv:
        plots.save_csv(f"{png.with_suffix('')}.csv", cmb_figures.table_of(balances))
    return 0


if __name__ == "__main__":
    cli.run(main)

"""What did each word of an answer come from? Relevancy over the picture for every generated token,
and of the words of question and answer.

    python diagnostic_tools/viz_relevancy.py --run_dir runs/relevancy/tiny-llava \\
        --image_dir data/shapes/val2017
    python diagnostic_tools/viz_relevancy.py --run_dir runs/relevancy/tiny-llava \\
        --image_dir data/shapes/val2017 --image_key 000000000001 --token 4

Reads the run of relevancy_maps.py, loads no model. Writes analysis/<id>_tokens (the picture and one
overlay a token at --layer, one colour scale for all) or, with --token, analysis/<id>_token<i>: the
map up to each layer, and bars for question and earlier answer. Colours show the relevancy itself,
from 0 (--ceiling sets the top). --sinks hide leaves out the vision tokens whose norm is an outlier,
which glow whatever is asked; the title says how many.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from vlmdiag import cli
from vlmdiag.cli import UsageError
from vlmdiag.runs import rundirs, selection

EXPERIMENT = "relevancy"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument("--run_dir", nargs="+", required=True, help="runs of relevancy_maps.py")
    parser.add_argument(
        "--image_dir",
        "--image_folder",
        help="where the pictures are; None: those of --images and --messages where they were",
    )
    parser.add_argument(
        "--image_key", default=None, help="part of one item's id; None: the first --max_images"
    )
    parser.add_argument(
        "--max_images", "--num_images", type=cli.positive, default=4, help="how many are drawn"
    )
    parser.add_argument(
        "--layer",
        type=cli.count,
        default=None,
        help="layer up to which relevancy is gathered; None: the last one measured",
    )
    parser.add_argument(
        "--token",
        type=cli.count,
        default=None,
        help="one token in detail, by its index in the answer",
    )
    parser.add_argument(
        "--max_tokens", type=cli.whole(1, 1000), default=24, help="overlays in one figure"
    )
    parser.add_argument(
        "--ceiling",
        type=cli.number(0, 10**6, above=True),
        default=None,
        help=(
            "relevancy at the top of the colours; None: what three of four tokens stay below, with"
            " --token the largest shown"
        ),
    )
    parser.add_argument(
        "--sinks",
        choices=["keep", "hide"],
        default="keep",
        help="hide: leave out vision tokens of outlying norm",
    )
    return parser.parse_args(argv)


def draw_run(path: str, args: argparse.Namespace) -> None:
    """The figures of one run."""
    from vlmdiag.figures import plots
    from vlmdiag.relevancy.map_figures import Maps, token_figure, tokens_figure

    run = rundirs.read_run(path, EXPERIMENT)
    ids = run.ids()
    ids = [selection.find_id(ids, args.image_key)] if args.image_key else ids[: args.max_images]
    if not ids:
        raise UsageError(f"{run.path} has no finished picture yet; run relevancy_maps.py first")
    for id in ids:
        maps = Maps.read(run, id, args.image_dir, args.sinks == "hide")
        if args.token is None:
            figure = tokens_figure(maps, args.layer, args.max_tokens, args.ceiling)
            name = f"{id}_tokens"
        else:
            figure = token_figure(maps, args.token, args.layer, args.ceiling)
            name = f"{id}_token{args.token}"
        settings = {
            "run": Path(path).name,
            "picture": maps.record["file_name"],
            "layer": maps.record["layers"][maps.layer_index(args.layer)],
            "token": args.token,
            "sinks": args.sinks,
        }
        plots.save(figure, run.path / "analysis" / name, settings)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    for path in args.run_dir:
        draw_run(path, args)
    return 0


if __name__ == "__main__":
    cli.run(main)

"""Does a model tell depth from height in the picture? Two objects on a corridor's walls, the
farther one as often lower as higher, four yes/no questions.

    python data/make_shapes.py --out_dir data/shapes-tunnel --scene tunnel
    python swap_analysis/spatial_tunnel.py --model_path checkpoints/tiny-llava \\
        --data_dir data/shapes-tunnel
    python swap_analysis/spatial_tunnel_plot.py --run_dir runs/spatial_tunnel/tiny-llava

    p = sigmoid(logit Yes - logit No) at the first generated position, v = p where Yes is right and
    1 - p where No is, averaged over the four questions
    gap = v_consistent - v_counter: pictures whose far object is higher by more than 5 % of the
    height, less those where it is lower
Why Far Looks Up (arXiv 2605.30161), SpatialTunnel. Nothing is generated: one pass over the prompt,
shared by the four questions up to the end of the picture. runs/spatial_tunnel/<model>/ holds
per_image/<id>.json and analysis/summary.json: v and exact match, split, per wording, per cell of
angles, per size. A model without a clue has v = 0.5 throughout; one that reads height off the
picture v_consistent near 1 and v_counter near 0.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import add_model_arguments, load_from_args
from vlmdiag import cli
from vlmdiag.cli import UsageError
from vlmdiag.pictures.samples import with_picture
from vlmdiag.runs import rundirs
from vlmdiag.runs.experiment import Outcome, Worker, run_worker, worker_for

if TYPE_CHECKING:
    from vlmdiag.swap.tunnel_scores import Item

EXPERIMENT = "spatial_tunnel"
FIELDS = ("image_id", "image", "part", "instance", "cell", "split", "far", "near", "questions")
HEADLINE = ("v", "v_consistent", "v_counter", "gap")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    add_model_arguments(parser)
    parser.add_argument(
        "--data_dir",
        default="data/shapes-tunnel",
        help="a set of data/make_shapes.py --scene tunnel",
    )
    parser.add_argument(
        "--max_images",
        type=cli.positive,
        default=None,
        help="only the first so many pictures, the grid of angles before the sweep; None: all",
    )
    parser.add_argument(
        "--batch_size", type=cli.positive, default=8, help="pictures in a batch, four prompts each"
    )
    cli.add_run_arguments(parser)
    return parser.parse_args(argv)


def read_set(
    folder: str | Path, max_images: int | None = None
) -> tuple[list[Item], dict[str, Any]]:
    """(items, settings of the set that the pictures depend on). UsageError where the folder is no
    finished tunnel set."""
    folder = Path(folder)
    again = f"make it with data/make_shapes.py --scene tunnel --out_dir {folder}"
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        entries = json.loads((folder / "tunnel.json").read_bytes())
        settings = {name: manifest["settings"][name] for name in ("schema", "scene", "seed")}
        missing = [name for entry in entries for name in FIELDS if name not in entry]
    except FileNotFoundError as error:
        raise UsageError(
            f"{folder} is no finished SpatialTunnel set, it has no {Path(error.filename).name};"
            f" {again}"
        ) from error
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        raise UsageError(
            f"{folder} has a manifest.json or tunnel.json that cannot be read"
            f" ({type(error).__name__}: {error}); {again} --overwrite"
        ) from error
    reason = None
    if missing:
        reason = f"its tunnel.json lacks {missing[0]}"
    elif not manifest.get("complete"):
        reason = "its manifest.json says that it is not complete"
    if reason:
        raise UsageError(f"{folder} is no finished SpatialTunnel set, {reason}; {again}")
    from vlmdiag.swap.tunnel_scores import Item

    items = [
        Item(f"{entry['image_id']:012d}", folder / entry["image"], entry)
        for entry in entries[:max_images]
    ]
    return items, settings


def make_worker(args: argparse.Namespace) -> Worker:
    """The measurement of all pictures."""
    items, data = read_set(args.data_dir, args.max_images)
    from vlmdiag.model.prompts import prompt_for
    from vlmdiag.swap.tunnel_scores import make_process, yes_no_ids

    vlm = load_from_args(args)
    vlm.need("decoder-only")
    words = yes_no_ids(vlm, prompt_for(vlm, "QUESTION")[0])
    settings = {"image_aspect": args.image_aspect, "data": data, "answer_ids": words}
    free = {"data_dir": args.data_dir, "batch_size": args.batch_size}
    return worker_for(
        args,
        vlm,
        EXPERIMENT,
        items,
        with_picture,
        make_process(vlm, words),
        settings,
        free,
        batch_size=args.batch_size,
    )


def finish(args: argparse.Namespace, outcome: Outcome) -> None:
    """Summarise the run."""
    from vlmdiag.swap.tunnel_scores import summarize

    summary = summarize(outcome.run.records())
    path = outcome.run.path / "analysis" / "summary.json"
    rundirs.write_json(path, summary)
    shown = [
        f"{name} {summary[name]['mean']:.3f} ({summary[name]['low']:.3f} to"
        f" {summary[name]['high']:.3f})"
        for name in HEADLINE
    ]
    print(f"{path}: n = {summary['v']['n']}: {', '.join(shown)}")


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    return run_worker(args, make_worker, finish)


if __name__ == "__main__":
    cli.run(main)

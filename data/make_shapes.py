"""Make pictures of coloured shapes whose content is known, and everything that the diagnoses read
about them, in COCO's layout.

    python data/make_shapes.py --out_dir data/shapes --num_images 200 --seed 0
    # two objects on a corridor's walls, angles and depths free
    python data/make_shapes.py --out_dir data/shapes-corridor --scene corridor
    # SpatialTunnel: the same on a grid of angles, and a sweep of sizes
    python data/make_shapes.py --out_dir data/shapes-tunnel --scene tunnel

out_dir/val2017/<id>.jpg, train2017/<id>.jpg, annotations/{captions,instances}_{val,train}2017.json
as COCO has them, and for val objects.json, questions.json, clean_questions.json (one object each),
swap_pairs.tsv (EmbSpatial-Bench's columns), swap_pairs_ready.tsv (finished prompts), bboxes.json,
mmhal_shapes.json, mmhal_answers.json; data/README.md lists their fields. A floor scene holds 2 to 4
shapes; in the default set depth and height in the picture go together (correlation 0.8), as in
photographs. A tunnel set has val2017, its COCO annotations and tunnel.json alone
(vlmdiag/scenes/tunnel.py).

Equal flags give equal bytes with any --num_workers; a scene depends on (seed, part, index) and on
the kind of scene only. An interrupted run goes on where it stopped, a finished one is left alone.
600 pictures take about 3 seconds on two cores."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from vlmdiag import cli
from vlmdiag.cli import UsageError
from vlmdiag.scenes import shape_set, tunnel
from vlmdiag.scenes.scene import Scene, standing_share

HERE = Path(__file__).resolve().parent
SCHEMA = 1  # raise it when the same flags would give another set
NUMBERS = {"num_images": 200, "num_train": 400}  # of floor and corridor
TUNNEL_NUMBERS = {"instances": tunnel.INSTANCES, "sweep_scenes": tunnel.SWEEP_SCENES}
NOT_EMPTY = ("num_images", "instances")  # flags whose least value is 1
CORRELATION = 0.8  # of height in the picture and depth, floor


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument("--out_dir", default=str(HERE / "shapes"), help="folder of the set")
    parser.add_argument(
        "--num_images", type=cli.positive, help="floor, corridor: pictures in val2017; None: 200"
    )
    parser.add_argument(
        "--num_train",
        type=cli.count,
        help="floor, corridor: pictures in train2017, 0: no train part; None: 400",
    )
    parser.add_argument(
        "--seed", type=cli.seed, default=0, help="another seed, other scenes and questions"
    )
    parser.add_argument(
        "--scene",
        choices=("floor", "corridor", "tunnel"),
        default="floor",
        help="over a floor; two objects on a corridor's walls; SpatialTunnel",
    )
    parser.add_argument(
        "--instances",
        type=cli.positive,
        help="tunnel: pictures of each of the 16 x 16 cells of angles; None: 12",
    )
    parser.add_argument(
        "--sweep_scenes", type=cli.count, help="tunnel: scenes drawn in 11 sizes each; None: 100"
    )
    parser.add_argument(
        "--height_depth_correlation",
        type=cli.share,
        help="floor: correlation of height in the picture and depth, 0 to 0.96; None: 0.8",
    )
    parser.add_argument(
        "--num_workers", type=cli.workers, default=0, help="processes that draw; 0: one a core"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="delete the set in out_dir and make this one"
    )
    args = parser.parse_args(argv)
    check_numbers(args)
    check_correlation(args)
    return args


def check_numbers(args: argparse.Namespace) -> None:
    """Put the defaults of --scene into args. UsageError for flags of another scene, and for numbers
    that are too small or too large."""
    is_tunnel = args.scene == "tunnel"
    for flag in NUMBERS if is_tunnel else TUNNEL_NUMBERS:
        if getattr(args, flag) is not None:
            scenes_of_flag = "floor and corridor" if is_tunnel else "tunnel"
            flags = (
                "--instances and --sweep_scenes" if is_tunnel else "--num_images and --num_train"
            )
            raise UsageError(
                f"--{flag} is for --scene {scenes_of_flag}; {flags} say how many pictures --scene"
                f" {args.scene} has"
            )
    for flag, default in (TUNNEL_NUMBERS if is_tunnel else NUMBERS).items():
        number = default if getattr(args, flag) is None else getattr(args, flag)
        least = 1 if flag in NOT_EMPTY else 0
        most = tunnel.MOST.get(flag, shape_set.FIRST_ID["train"] - 1)
        if not least <= number <= most:
            raise UsageError(f"--{flag} {number}: {least} to {most} is possible")
        setattr(args, flag, number)


def check_correlation(args: argparse.Namespace) -> None:
    """Put the default of --height_depth_correlation into args. UsageError where no set has it."""
    if args.scene != "floor":
        if args.height_depth_correlation is not None:
            raise UsageError(
                "--height_depth_correlation is for --scene floor; in the corridor every angle is"
                " equally likely"
            )
        return
    if args.height_depth_correlation is None:
        args.height_depth_correlation = CORRELATION
    try:
        standing_share(args.height_depth_correlation)
    except ValueError as error:
        flag = "height_depth_correlation"
        message = str(error).replace("height-depth correlation", flag)
        raise UsageError(f"--{message}") from error


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    out = Path(args.out_dir)
    if args.scene == "tunnel":
        tasks = shape_set.tunnel_tasks_of(out, args.instances, args.sweep_scenes)
        names = ["scene", "seed", *TUNNEL_NUMBERS]
    else:
        tasks = shape_set.tasks_of(out, {"val": args.num_images, "train": args.num_train})
        names = ["scene", *NUMBERS, "seed", "height_depth_correlation"]
    settings = {"schema": SCHEMA} | {name: getattr(args, name) for name in names}
    if not shape_set.open_set(out, settings, tasks, args.overwrite):
        print(f"{out} is complete with these settings; nothing to do")
        return 0
    scenes: dict[str, dict[int, Scene]] = {"val": {}, "train": {}}
    drawn = shape_set.draw_all(settings, tasks, args.num_workers)
    for (*_, path), scene in zip(tasks, drawn, strict=True):
        scenes[path.parent.name.removesuffix("2017")][int(path.stem)] = scene
    for part, of_part in scenes.items():
        if of_part:
            shape_set.write_coco(out, part, of_part, args.scene)
    val = scenes["val"]
    if args.scene == "tunnel":
        facts, summary = shape_set.write_tunnel(out, val)
    else:
        facts, summary = shape_set.write_lists(out, val, args.seed)
    shape_set.write_json(out / "manifest.json", {"complete": True, "settings": settings} | facts)
    print(f"{out}: {len(val)} val and {len(scenes['train'])} train pictures, {summary}")
    return 0


if __name__ == "__main__":
    cli.run(main)

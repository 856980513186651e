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

import base64
import io
import json
import multiprocessing
import os
import signal
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from random import Random

from tqdm import tqdm

from vlmdiag import cli
from vlmdiag.cli import UsageError
from vlmdiag.scenes import annotations, tunnel
from vlmdiag.scenes.scene import corridor_scene, floor_scene, render, standing_share

HERE = Path(__file__).resolve().parent
SCHEMA = 1  # raise it when the same flags would give another set
FIRST_ID = {"val": 1, "train": 500_001}  # so no id is in both parts
NUMBERS = {"num_images": 200, "num_train": 400}  # of floor and corridor
TUNNEL_NUMBERS = {"instances": tunnel.INSTANCES, "sweep_scenes": tunnel.SWEEP_SCENES}
COUNTS = (2, 3, 4)  # objects in a floor scene
READY = (
    "index",
    "question_id",
    "image_base64",
    "original_question",
    "swapped_question",
    "original_answer",
    "swapped_answer",
    "group",
    "category",
)
EMBSPATIAL = ("index", "question_id", "category", "question", "image", "answer", "A", "B", "C", "D")
LISTS = (
    "objects.json",
    "questions.json",
    "clean_questions.json",
    "mmhal_shapes.json",
    "mmhal_answers.json",
    "bboxes.json",
    "swap_pairs_ready.tsv",
    "swap_pairs.tsv",
)
TUNNEL_LISTS = ("tunnel.json",)


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("--out_dir", default=str(HERE / "shapes"), help="folder of the set")
    parser.add_argument(
        "--num_images", type=int, help="floor, corridor: pictures in val2017; None: 200"
    )
    parser.add_argument(
        "--num_train",
        type=int,
        help="floor, corridor: pictures in train2017, 0: no train part; None: 400",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="another seed, other scenes and questions"
    )
    parser.add_argument(
        "--scene",
        choices=("floor", "corridor", "tunnel"),
        default="floor",
        help="over a floor; two objects on a corridor's walls; SpatialTunnel",
    )
    parser.add_argument(
        "--instances",
        type=int,
        help="tunnel: pictures of each of the 16 x 16 cells of angles; None: 12",
    )
    parser.add_argument(
        "--sweep_scenes", type=int, help="tunnel: scenes drawn in 11 sizes each; None: 100"
    )
    parser.add_argument(
        "--height_depth_correlation",
        type=float,
        help="floor: correlation of height in the picture and depth, 0 to 0.96; None: 0.8",
    )
    parser.add_argument(
        "--num_workers", type=int, default=0, help="processes that draw; 0: one a core"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="delete the set in out_dir and make this one"
    )
    args = parser.parse_args(argv)
    is_tunnel = args.scene == "tunnel"
    for flag in NUMBERS if is_tunnel else TUNNEL_NUMBERS:
        if getattr(args, flag) is not None:
            own, other = (
                ("floor and corridor", "--instances and --sweep_scenes")
                if is_tunnel
                else ("tunnel", "--num_images and --num_train")
            )
            raise UsageError(
                f"--{flag} is for --scene {own}; {other} say how many pictures --scene"
                f" {args.scene} has"
            )
    for flag, default in (TUNNEL_NUMBERS if is_tunnel else NUMBERS).items():
        value = default if getattr(args, flag) is None else getattr(args, flag)
        least, most = (
            int(flag in ("num_images", "instances")),
            tunnel.MOST.get(flag, FIRST_ID["train"] - 1),
        )
        if not least <= value <= most:
            raise UsageError(f"--{flag} {value}: {least} to {most} is possible")
        setattr(args, flag, value)
    if args.num_workers < 0:
        raise UsageError(f"--num_workers {args.num_workers}: 0 (one a core) or more is wanted")
    if args.scene != "floor" and args.height_depth_correlation is not None:
        raise UsageError(
            "--height_depth_correlation is for --scene floor; in the corridor every angle is"
            " equally likely"
        )
    if args.scene == "floor":
        args.height_depth_correlation = (
            0.8 if args.height_depth_correlation is None else args.height_depth_correlation
        )
        try:
            standing_share(args.height_depth_correlation)
        except ValueError as error:
            raise UsageError(
                f"--{error}".replace("--height-depth correlation", "--height_depth_correlation")
            ) from error
    return args


def make_scene(settings, part, index):
    """Scene number `index` of a part. The text that seeds it has no twin in the training of the
    tiny models."""
    if settings["scene"] == "tunnel":
        return tunnel.scene(settings["seed"], part, index)
    rng = Random(f"shapes-{settings['scene']}-{part}-{settings['seed']}-{index}")
    if settings["scene"] == "corridor":
        return corridor_scene(rng)
    return floor_scene(rng, rng.choice(COUNTS), settings["height_depth_correlation"])


def write(path, chunks):
    """Put bytes at path in one step, so that a file that is there is whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.writelines(chunks)
        os.replace(temporary, path)
    except OSError as error:
        raise UsageError(
            f"{path}: cannot be written ({error.strerror}); the same command goes on from there"
        ) from error


def write_json(path, content):
    write(path, [json.dumps(content, ensure_ascii=False, indent=1).encode() + b"\n"])


def write_table(path, columns, rows, picture_column, pictures):
    """Tab-separated, the rows' pictures as base64 JPEG. Streamed: a table may be larger than memory
    likes."""

    def lines():
        yield ("\t".join(columns) + "\n").encode()
        for n, row in enumerate(rows):
            picture = base64.b64encode(
                (pictures / annotations.file_name(row["image_id"])).read_bytes()
            ).decode()
            yield (
                "\t".join(
                    str(({"index": n, picture_column: picture} | row)[column]) for column in columns
                )
                + "\n"
            ).encode()

    write(path, lines())


def draw(settings, task):
    """(part, index, path) -> the scene; draws it unless the picture is there."""
    part, index, path = task
    scene = make_scene(settings, part, index)
    if not path.exists():
        file = io.BytesIO()
        render(scene).save(file, "JPEG", quality=95, subsampling=0)
        write(path, [file.getvalue()])
    return scene


def draw_all(settings, tasks, num_workers):
    """Scenes of all tasks in their order, drawn in several processes."""
    num_workers = num_workers or (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    )
    bar = partial(tqdm, total=len(tasks), desc="pictures", unit="picture", disable=None)
    if num_workers == 1:
        return list(bar(map(partial(draw, settings), tasks)))
    with ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn")) as workers:
        handler = signal.signal(
            signal.SIGINT, signal.SIG_IGN
        )  # the workers inherit this: Ctrl-C is for the main process alone
        results = workers.map(partial(draw, settings), tasks, chunksize=8)
        signal.signal(signal.SIGINT, handler)
        return list(bar(results))


def annotation_files(part):
    return [f"annotations/{kind}_{part}2017.json" for kind in ("captions", "instances")]


def tasks_of(args):
    """[(part, index, path), ...] of all pictures, in the order of their ids within a part."""
    if args.scene == "tunnel":
        parts = [
            (part, first, tunnel.FOLDER, tunnel.count(part, args.instances, args.sweep_scenes))
            for part, first in tunnel.FIRST_ID.items()
        ]
    else:
        parts = [
            (part, FIRST_ID[part], f"{part}2017", size)
            for part, size in (("val", args.num_images), ("train", args.num_train))
        ]
    return [
        (part, n, Path(args.out_dir) / folder / annotations.file_name(first + n))
        for part, first, folder, size in parts
        for n in range(size)
    ]


def lists_of(settings, tasks):
    """Names of all files of a set but its pictures and its manifest."""
    parts = dict.fromkeys(path.parent.name.removesuffix("2017") for *_, path in tasks)
    return [name for part in parts for name in annotation_files(part)] + list(
        TUNNEL_LISTS if settings["scene"] == "tunnel" else LISTS
    )


def open_set(out_dir, settings, tasks, overwrite):
    """Whether there is anything to make. Refuses folders of something else; removes the set that
    was there if `overwrite`."""
    manifest = out_dir / "manifest.json"
    if out_dir.exists() and not out_dir.is_dir():
        raise UsageError(f"{out_dir} is not a folder; choose another --out_dir")
    if not manifest.exists():
        if out_dir.exists() and any(
            path.name != ".manifest.json.tmp" for path in out_dir.iterdir()
        ):
            raise UsageError(
                f"{out_dir} holds files and no manifest.json of this script, so it is left alone;"
                " choose another --out_dir"
            )
        write_json(manifest, {"complete": False, "settings": settings})
        return True
    try:
        found = json.loads(manifest.read_bytes())
        before, complete = dict(found["settings"]), found["complete"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{manifest} is not a manifest of this script; choose another --out_dir"
        ) from error
    if overwrite:
        write_json(
            manifest, {"complete": False, "settings": before}
        )  # killed in the middle of this, it is an unfinished set of the old settings
        owned = [*annotation_files("val"), *annotation_files("train"), *LISTS, *TUNNEL_LISTS]
        for path in [
            *(out_dir / name for name in owned),
            *(picture for part in FIRST_ID for picture in (out_dir / f"{part}2017").glob("*.jpg")),
        ]:
            path.unlink(missing_ok=True)
    elif before != settings:
        other = [
            f"{key} {before.get(key)} there, {settings.get(key)} asked"
            for key in {**settings, **before}
            if before.get(key) != settings.get(key)
        ]
        raise UsageError(
            f"{out_dir} holds a set with other settings ({'; '.join(other)}); choose another"
            " --out_dir, or --overwrite to replace it"
        )
    elif complete:
        if all(
            path.exists()
            for path in [
                *(out_dir / name for name in lists_of(settings, tasks)),
                *(path for *_, path in tasks),
            ]
        ):
            return False
    write_json(manifest, {"complete": False, "settings": settings})
    return True


def write_lists(out, scenes, seed):
    """The lists about the val pictures of a floor or corridor set. Returns what the manifest says
    of them, and it in words."""
    folder = "val2017"
    asked, ready = (
        annotations.question_list(scenes, folder, seed),
        annotations.swap_rows(scenes, seed),
    )
    embspatial = annotations.embspatial_rows(scenes, ready, seed)
    write_json(out / "objects.json", annotations.objects(scenes, folder))
    write_json(out / "questions.json", asked)
    write_json(out / "clean_questions.json", annotations.curated(scenes))
    for name, content in zip(
        ("mmhal_shapes.json", "mmhal_answers.json"),
        annotations.mmhal(scenes, folder, seed),
        strict=True,
    ):
        write_json(out / name, content)
    write_json(out / "bboxes.json", annotations.boxes(scenes, [*ready, *embspatial]))
    write_table(out / "swap_pairs_ready.tsv", READY, ready, "image_base64", out / folder)
    write_table(out / "swap_pairs.tsv", EMBSPATIAL, embspatial, "image", out / folder)
    counts = {
        "questions": len(asked),
        "swap_pairs_ready": len(ready),
        "swap_pairs": len(embspatial),
    }
    said = (
        f"{len(asked)} questions, {len(ready)} swap pairs and {len(embspatial)} rows in"
        " EmbSpatial's form"
    )
    return {
        "rows": counts,
        "measured_height_depth_correlation": annotations.height_depth_correlation(scenes.values()),
    }, said


def write_tunnel(out, scenes):
    """tunnel.json about all pictures of a tunnel set. Returns what the manifest says of it, and it
    in words."""
    rows = tunnel.records(scenes)
    write_json(out / "tunnel.json", rows)
    counts = Counter(row["part"] for row in rows)
    return {
        "rows": {part: counts[part] for part in tunnel.FIRST_ID}
    }, f"{counts['angles']} of the grid of angles, {counts['sizes']} of the sweep of sizes"


def main(argv=None):
    args = parse_args(argv)
    is_tunnel, out, tasks = args.scene == "tunnel", Path(args.out_dir), tasks_of(args)
    names = (
        ("scene", "seed", "instances", "sweep_scenes")
        if is_tunnel
        else ("scene", "num_images", "num_train", "seed", "height_depth_correlation")
    )
    settings = {"schema": SCHEMA} | {key: getattr(args, key) for key in names}
    if not open_set(out, settings, tasks, args.overwrite):
        print(f"{out} is complete with these settings; nothing to do")
        return 0
    scenes = {"val2017": {}, "train2017": {}}
    for (*_, path), scene in zip(tasks, draw_all(settings, tasks, args.num_workers), strict=True):
        scenes[path.parent.name][int(path.stem)] = scene
    for folder, some in scenes.items():
        if some:
            for name, content in zip(
                annotation_files(folder.removesuffix("2017")),
                annotations.coco(some, args.scene),
                strict=True,
            ):
                write_json(out / name, content)
    val = scenes["val2017"]
    measured, said = write_tunnel(out, val) if is_tunnel else write_lists(out, val, args.seed)
    write_json(out / "manifest.json", {"complete": True, "settings": settings} | measured)
    print(f"{out}: {len(val)} val and {len(scenes['train2017'])} train pictures, {said}")
    return 0


if __name__ == "__main__":
    cli.run(main)

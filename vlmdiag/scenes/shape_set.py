"""The files of a set that data/make_shapes.py makes: pictures, annotations, lists, and the manifest
that says whether all are there.

A set is a folder. Its manifest.json is written first and last, with `complete` false and true, so a
set whose making was interrupted is known and goes on. Pictures are drawn by several processes; a
picture that is there is not drawn again.
"""

from __future__ import annotations

import base64
import io
import json
import multiprocessing
import os
import signal
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from random import Random

from tqdm import tqdm

from vlmdiag.cli import UsageError
from vlmdiag.runs import disk
from vlmdiag.scenes import tunnel
from vlmdiag.scenes.annotations import (
    boxes,
    coco,
    curated,
    embspatial_rows,
    file_name,
    height_depth_correlation,
    mmhal,
    objects,
    question_list,
    swap_rows,
)
from vlmdiag.scenes.scene import Scene, corridor_scene, floor_scene, render
from vlmdiag.types import Fields, Record

FIRST_ID = {"val": 1, "train": 500_001}  # so no id is in both parts
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

FOLDERS = ("annotations", "val2017", "train2017")

Settings = Record  # what a set depends on, as the manifest has it
Task = tuple[str, int, Path]  # (part, index, path of the picture)


# --- pictures -------------------------------------------------------------------------------------


def make_scene(settings: Settings, part: str, index: int) -> Scene:
    """Scene number `index` of a part. The text that seeds it has no twin in the training of the
    tiny models."""
    if settings["scene"] == "tunnel":
        return tunnel.scene(settings["seed"], part, index)
    rng = Random(f"shapes-{settings['scene']}-{part}-{settings['seed']}-{index}")
    if settings["scene"] == "corridor":
        return corridor_scene(rng)
    return floor_scene(rng, rng.choice(COUNTS), settings["height_depth_correlation"])


def draw(settings: Settings, task: Task) -> Scene:
    """The scene of a task; draws it unless the picture is there."""
    part, index, path = task
    scene = make_scene(settings, part, index)
    if not path.exists():
        file = io.BytesIO()
        render(scene).save(file, "JPEG", quality=95, subsampling=0)
        disk.write_bytes(path, file.getvalue())
    return scene


def available_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def draw_all(settings: Settings, tasks: Sequence[Task], num_workers: int) -> list[Scene]:
    """Scenes of all tasks in their order, drawn in several processes."""
    num_workers = num_workers or available_cores()
    bar = partial(tqdm, total=len(tasks), desc="pictures", unit="picture", disable=None)
    if num_workers == 1:
        return list(bar(map(partial(draw, settings), tasks)))
    with ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn")) as workers:
        # the workers inherit this: Ctrl-C is for the main process alone
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        scenes = workers.map(partial(draw, settings), tasks, chunksize=8)
        signal.signal(signal.SIGINT, handler)
        return list(bar(scenes))


def tasks_of(out_dir: Path, sizes: Mapping[str, int]) -> list[Task]:
    """[(part, index, path), ...] of all pictures of a floor or corridor set, {part: how many}, in
    the order of their ids within a part."""
    return [
        (part, index, out_dir / f"{part}2017" / file_name(FIRST_ID[part] + index))
        for part, size in sizes.items()
        for index in range(size)
    ]


def tunnel_tasks_of(out_dir: Path, instances: int, sweep_scenes: int) -> list[Task]:
    """The same of a tunnel set, all in one folder."""
    return [
        (part, index, out_dir / tunnel.FOLDER / file_name(first + index))
        for part, first in tunnel.FIRST_ID.items()
        for index in range(tunnel.count(part, instances, sweep_scenes))
    ]


# --- the set as files -----------------------------------------------------------------------------


def write_json(path: Path, content: object) -> None:
    disk.write_bytes(path, json.dumps(content, ensure_ascii=False, indent=1).encode() + b"\n")


def write_table(
    path: Path, columns: Sequence[str], rows: Sequence[Fields], picture_column: str, pictures: Path
) -> None:
    """Tab-separated, the rows' pictures as base64 JPEG. Streamed: a table may be larger than memory
    likes."""

    def lines() -> Iterator[str]:
        yield "\t".join(columns)
        for index, row in enumerate(rows):
            picture = (pictures / file_name(row["image_id"])).read_bytes()
            cells = {"index": index, picture_column: base64.b64encode(picture).decode(), **row}
            yield "\t".join(str(cells[column]) for column in columns)

    with disk.in_one_step(path) as temporary, open(temporary, "wb") as file:
        file.writelines(f"{line}\n".encode() for line in lines())


def annotation_files(part: str) -> list[str]:
    return [f"annotations/{kind}_{part}2017.json" for kind in ("captions", "instances")]


def lists_of(settings: Settings, tasks: Sequence[Task]) -> list[str]:
    """Names of all files of a set but its pictures and its manifest."""
    parts = dict.fromkeys(path.parent.name.removesuffix("2017") for *_, path in tasks)
    names = [name for part in parts for name in annotation_files(part)]
    return [*names, *(TUNNEL_LISTS if settings["scene"] == "tunnel" else LISTS)]


def read_manifest(manifest: Path) -> tuple[Settings, bool]:
    """(settings, whether the set is complete). UsageError where the file is not of this script."""
    try:
        content = json.loads(manifest.read_bytes())
        return dict(content["settings"]), content["complete"]
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        raise UsageError(
            f"{manifest} is not a manifest of this script; choose another --out_dir"
        ) from error


def remove_set(out_dir: Path) -> None:
    """Remove every file of a set but its manifest."""
    names = [*annotation_files("val"), *annotation_files("train"), *LISTS, *TUNNEL_LISTS]
    paths = [out_dir / name for name in names]
    for part in FIRST_ID:
        paths += (out_dir / f"{part}2017").glob("*.jpg")
    for path in paths:
        path.unlink(missing_ok=True)


def refuse_other(out_dir: Path, before: Settings, settings: Settings) -> None:
    """UsageError that lists the settings in which the set in out_dir differs."""
    other = [
        f"{key} {before.get(key)} there, {settings.get(key)} asked"
        for key in {**settings, **before}
        if before.get(key) != settings.get(key)
    ]
    raise UsageError(
        f"{out_dir} holds a set with other settings ({'; '.join(other)}); choose another"
        " --out_dir, or --overwrite to replace it"
    )


def open_set(out_dir: Path, settings: Settings, tasks: Sequence[Task], overwrite: bool) -> bool:
    """Whether there is anything to make. Refuses folders of something else; removes the set that
    was there if `overwrite`."""
    manifest = out_dir / "manifest.json"
    if out_dir.exists() and not out_dir.is_dir():
        raise UsageError(f"{out_dir} is not a folder; choose another --out_dir")
    if manifest.exists():
        before, is_complete = read_manifest(manifest)
        if overwrite:
            # killed in the middle of this, it is an unfinished set of the old settings
            write_json(manifest, {"complete": False, "settings": before})
            remove_set(out_dir)
        elif before != settings:
            refuse_other(out_dir, before, settings)
        elif is_complete:
            paths = [out_dir / name for name in lists_of(settings, tasks)]
            paths += [path for *_, path in tasks]
            if all(path.exists() for path in paths):
                return False
    elif out_dir.exists() and any(not is_temporary(path) for path in out_dir.iterdir()):
        raise UsageError(
            f"{out_dir} holds files and no manifest.json of this script, so it is left alone;"
            " choose another --out_dir"
        )
    write_json(manifest, {"complete": False, "settings": settings})
    return True


def is_temporary(path: Path) -> bool:
    """Whether a file is what a killed run left of its manifest."""
    return path.name.startswith(".manifest.json.") and path.name.endswith(".tmp")


def write_coco(out: Path, part: str, scenes: Mapping[int, Scene], kind: str) -> None:
    """The two annotation files of a part."""
    for name, content in zip(annotation_files(part), coco(scenes, kind), strict=True):
        write_json(out / name, content)


def write_lists(out: Path, scenes: Mapping[int, Scene], seed: int) -> tuple[Record, str]:
    """The lists about the val pictures of a floor or corridor set. Returns what the manifest says
    of them, and it in words."""
    folder = "val2017"
    questions = question_list(scenes, folder, seed)
    ready = swap_rows(scenes, seed)
    embspatial = embspatial_rows(scenes, ready, seed)
    mmhal_questions, mmhal_answers = mmhal(scenes, folder, seed)
    write_json(out / "objects.json", objects(scenes, folder))
    write_json(out / "questions.json", questions)
    write_json(out / "clean_questions.json", curated(scenes))
    write_json(out / "mmhal_shapes.json", mmhal_questions)
    write_json(out / "mmhal_answers.json", mmhal_answers)
    write_json(out / "bboxes.json", boxes(scenes, [*ready, *embspatial]))
    write_table(out / "swap_pairs_ready.tsv", READY, ready, "image_base64", out / folder)
    write_table(out / "swap_pairs.tsv", EMBSPATIAL, embspatial, "image", out / folder)
    counts = {
        "questions": len(questions),
        "swap_pairs_ready": len(ready),
        "swap_pairs": len(embspatial),
    }
    correlation = height_depth_correlation(list(scenes.values()))
    summary = (
        f"{len(questions)} questions, {len(ready)} swap pairs and {len(embspatial)} rows in"
        " EmbSpatial's form"
    )
    return {"rows": counts, "measured_height_depth_correlation": correlation}, summary


def write_tunnel(out: Path, scenes: Mapping[int, Scene]) -> tuple[Record, str]:
    """tunnel.json about all pictures of a tunnel set. Returns what the manifest says of it, and it
    in words."""
    entries = tunnel.records(scenes)
    write_json(out / "tunnel.json", entries)
    counts = Counter(entry["part"] for entry in entries)
    summary = f"{counts['angles']} of the grid of angles, {counts['sizes']} of the sweep of sizes"
    return {"rows": {part: counts[part] for part in tunnel.FIRST_ID}}, summary

"""How long does a run of 100,000 items take to open, resume, analyse, pack and unpack?

    python benchmarks/bench_runs.py --folder /scratch/bench_runs --out bench_runs.json
    # to see that it runs
    python benchmarks/bench_runs.py --folder /tmp/bench_runs --items 2000

Made-up items in the form of run_coco_diagnostics.py's: a record of 3 KB, arrays of --layers x
--heads, a picture of 100 bytes each. Every line is a process of its own: seconds on the clock and
of the processor after its imports, and the most memory it had, in the end and after its imports.
Files are made without waiting for the disk; packing and unpacking wait for it as always.
    resume            open the run, find that all items are whole and of the same inputs, write
                      preds.json: what the command that made the run does before and after its work
    resume, no list   the same without .checked.json: every file is read
    analyse           analyze_coco_diagnostics.py with its figures, nothing cached
    records           read every record
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vlmdiag import cli


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument("--folder", required=True, help="an empty folder for the run")
    parser.add_argument("--items", type=cli.positive, default=100_000, help="items of the run")
    parser.add_argument("--layers", type=cli.positive, default=24, help="of the made-up model")
    parser.add_argument("--heads", type=cli.positive, default=16, help="of each layer")
    parser.add_argument("--no_unpack", action="store_true", help="leave the last part out")
    parser.add_argument("--out", default=None, help="JSON file for the numbers")
    parser.add_argument("--part", choices=sorted(PARTS), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


SETTINGS = {"delta_steps": [10.0], "model_name": "made-up", "strip_system_prompt": False}


@dataclass(frozen=True)
class Item:
    """A made-up item."""

    id: str
    picture: Path


def items_of(args: argparse.Namespace) -> list[Item]:
    pictures = Path(args.folder) / "pictures"
    names = [f"{n:012d}" for n in range(args.items)]
    return [Item(name, pictures / name[-5:-3] / f"{name}.jpg") for name in names]


def run_path(args: argparse.Namespace) -> Path:
    return Path(args.folder) / "made-up__sp-0"


def make(args: argparse.Namespace) -> None:
    """Write the pictures and the items, of 200 different sets of arrays."""
    import numpy as np

    from vlmdiag.runs import disk
    from vlmdiag.runs.inputs import digest_of
    from vlmdiag.runs.rundirs import COCO, open_run

    run = open_run(run_path(args), COCO, SETTINGS)
    rng = np.random.default_rng(0)
    shape = (args.layers, args.heads)
    sets = []
    for _ in range(200):
        arrays = {"layer_shares": rng.random((3, args.layers), np.float32)}
        for name in ("alphaV", "delta_gv_derivative"):
            arrays[name] = rng.random(shape, np.float32)
        for name in ("delta_gv_all", "delta_alphaV_all"):
            arrays[name] = rng.random((1, *shape), np.float32)
        sets.append(disk.npz_bytes(arrays))
    record = {
        "image_id": "NUMBER",
        "file_name": "NUMBER.jpg",
        "caption": "Picture NUMBER shows a man who rides a wave on a board near the coast.",
        "prompt": "USER: <image>\nDescribe the image. ASSISTANT:",
        "spans": {"system": [[0, 35]], "vision": [[35, 611]], "user": [[611, 625]]},
        "chance_vision_share": 0.92,
        "groups": ["system", "vision", "user"],
        "mean_vision_share": rng.random(40).tolist(),
        "mean_text_share": rng.random(40).tolist(),
    }
    text = disk.json_bytes(record).replace(b"NUMBER", b"%012d")
    for n, item in enumerate(items_of(args)):
        item.picture.parent.mkdir(parents=True, exist_ok=True)
        item.picture.write_bytes(b"%100d" % n)
        npz, own = sets[n % len(sets)], text % (n, n, n)
        checks = {"npz": digest(npz), "record": digest(own), "inputs": digest_of(item)}
        json_path, npz_path = run.files(item.id)
        npz_path.write_bytes(npz)
        json_path.write_bytes(own[:-3] + b',\n "checks": ' + json.dumps(checks).encode() + b"\n}\n")
    run.finish()


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def resume(args: argparse.Namespace) -> None:
    """What the command that made the run does where nothing is left to do."""
    from vlmdiag.runs import engine
    from vlmdiag.runs.rundirs import COCO, open_run

    def never(_: object) -> list[engine.Result]:
        raise AssertionError("an item is not done")

    run = open_run(run_path(args), COCO, SETTINGS)
    counts = engine.run_items(run, args.made_up, never, never, 8)
    run.finish()
    assert counts == {"done": 0, "skipped": args.items, "failed": 0}


def resume_without_list(args: argparse.Namespace) -> None:
    (run_path(args) / ".checked.json").unlink(missing_ok=True)
    resume(args)


def analyse(args: argparse.Namespace) -> None:
    from diagnostic_tools import analyze_coco_diagnostics

    for file in (run_path(args) / "analysis").glob("stack-*.npz"):
        file.unlink()
    assert analyze_coco_diagnostics.main(["--run_dir", str(run_path(args))]) == 0


def records(args: argparse.Namespace) -> None:
    from vlmdiag.runs.rundirs import COCO, read_run

    run = read_run(run_path(args), COCO)
    assert sum("image_id" in run.record(id) for id in run.ids()) == args.items


def pack(args: argparse.Namespace) -> None:
    from diagnostic_tools import pack_run

    assert pack_run.main([str(run_path(args))]) == 0


def unpack(args: argparse.Namespace) -> None:
    from diagnostic_tools import pack_run

    assert pack_run.main([str(run_path(args)), "--unpack"]) == 0


PARTS: dict[str, Callable[[argparse.Namespace], None]] = {
    "make": make,
    "resume": resume,
    "resume, no list": resume_without_list,
    "analyse": analyse,
    "records": records,
    "pack": pack,
    "unpack": unpack,
}
HEAVY = {
    "resume": "runs.engine",
    "resume, no list": "runs.engine",
    "analyse": "beyond_semantics.rope_figures",
}
READ = ("resume, no list", "resume", "analyse", "records")


def measured(args: argparse.Namespace, part: str) -> dict[str, float]:
    """Seconds and the most memory in GB of one part in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.bench_runs", "--folder", args.folder]
    sizes = {"items": args.items, "layers": args.layers, "heads": args.heads}
    command += [word for name, size in sizes.items() for word in (f"--{name}", str(size))]
    root = Path(__file__).resolve().parents[1]
    said = subprocess.run(
        [*command, "--part", part], cwd=root, check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    numbers: dict[str, float] = json.loads(said.splitlines()[-1])
    return numbers


def _memory() -> float:
    """The most that this process had, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    args.folder = os.path.abspath(args.folder)
    if args.part:
        # heavy, and not what is asked
        importlib.import_module(f"vlmdiag.{HEAVY.get(args.part, 'runs.packing')}")

        args.made_up = items_of(args)
        before = _memory()
        wall, cpu = time.monotonic(), time.process_time()
        PARTS[args.part](args)
        numbers = {"seconds": time.monotonic() - wall, "cpu": time.process_time() - cpu}
        numbers |= {"GB": _memory(), "GB before": before}
        print(json.dumps({name: round(number, 2) for name, number in numbers.items()}))
        return 0
    shutil.rmtree(run_path(args), ignore_errors=True)
    table = {}
    plan = [("unpacked", part) for part in ("make", *READ)]
    plan += [("packed", part) for part in ("pack", *READ)]
    plan += [] if args.no_unpack else [("packed", "unpack")]
    for form, part in plan:
        table[f"{form}: {part}"] = numbers = measured(args, part)
        said = ", ".join(f"{name} {number}" for name, number in numbers.items())
        print(f"{form}: {part}: {said}", flush=True)
    if args.out:
        facts = {"items": args.items, "layers": args.layers, "heads": args.heads}
        Path(args.out).write_text(json.dumps(facts | {"parts": table}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    cli.run(main)

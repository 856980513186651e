"""What does handing batches out cost, and does the work scale with the workers?

    python benchmarks/bench_engine.py
    python benchmarks/bench_engine.py --workers 1 2 --batches 5 --calls 20 --items 50

A stand-in takes the place of a model and waits --seconds a batch, so that a machine with few cores
stands for many GPUs.

    efficiency   n workers with --batches batches each: the seconds that the plain loop takes for as
                 many, over the seconds from the opened run to the last result, while other workers
                 may still start; and the same while all n work, from the first batch of the last
                 one that starts to the last batch of the first one that has no other
    overhead     batches of one item that takes no time: seconds a batch by Ray with one worker,
                 minus those of the plain loop
    many items   so many empty items in batches of 100: what a large run costs besides its model

Ray is started for each call, before the clock begins. Every item is written as in any run.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vlmdiag import cli
from vlmdiag.runs import rundirs
from vlmdiag.runs.experiment import Worker, run_worker


@dataclass(frozen=True)
class Item:
    """Nothing but a name."""

    id: str


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--workers", type=cli.positive, nargs="+", default=[1, 2, 4, 8], help="of the efficiency"
    )
    parser.add_argument(
        "--seconds", type=cli.number(0, 3600), default=0.2, help="that a batch takes"
    )
    parser.add_argument("--batches", type=cli.positive, default=300, help="of a worker")
    parser.add_argument("--calls", type=cli.positive, default=1000, help="batches of the overhead")
    parser.add_argument("--items", type=cli.positive, default=100_000, help="many items")
    parser.add_argument("--out", default=None, help="JSON file")
    return parser.parse_args(argv)


def make_worker(args: argparse.Namespace) -> Worker:
    """The stand-in."""

    def process(ids: Sequence[str]) -> list[tuple[dict[str, object], dict[str, object]]]:
        facts = {"process": os.getpid(), "begun": time.time()}
        time.sleep(args.seconds)
        return [({"caption": id} | facts, {}) for id in ids]

    items = [Item(f"{n:07d}") for n in range(args.items)]
    path = Path(args.out_root)
    return Worker(path, "bench", {}, {}, items, lambda item: item.id, process, args.batch_size)


@contextlib.contextmanager
def folder() -> Iterator[str]:
    """A folder that is removed, however many files it holds."""
    path = tempfile.mkdtemp()
    try:
        yield path
    finally:
        shutil.rmtree(path)


def seconds_together(records: Sequence[dict[str, object]], workers: int) -> float:
    """Seconds that a batch takes each worker while all of them work."""
    begun: dict[object, list[float]] = defaultdict(list)
    for record in records:
        begun[record["process"]].append(float(record["begun"]))
    if len(begun) != workers:
        return float("nan")
    first = max(min(times) for times in begun.values())
    last = min(max(times) for times in begun.values())
    count = sum(first <= time < last for times in begun.values() for time in times)
    return workers * (last - first) / count if count else float("nan")


def seconds_of(
    workers: int | None, items: int, batch_size: int, seconds: float
) -> tuple[float, float]:
    """(from the opened run to the last result, as the call itself says; a worker's seconds a batch
    while all work). workers: of Ray; None: the plain loop."""
    parser = cli.parser("")
    cli.add_run_arguments(parser)
    flags = ["--num_workers", "0"]
    if workers:
        flags += ["--engine", "ray", "--ray_workers", str(workers)]
        flags += ["--cpus_per_worker", "1", "--gpus_per_worker", "0"]
    with folder() as path, contextlib.redirect_stdout(io.StringIO()) as said:
        args = parser.parse_args([*flags, "--out_root", path])
        args = cli.changed(args, items=items, batch_size=batch_size, seconds=seconds)
        if run_worker(args, make_worker):
            raise RuntimeError(said.getvalue())
        together = float("nan")
        if batch_size == 1:
            together = seconds_together(rundirs.read_run(path).records(), workers or 1)
    return float(re.findall(r"failed, ([\d.]+) s,", said.getvalue())[-1]), together


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    figures: dict[str, object] = {"cores": os.cpu_count(), "seconds_of_a_batch": args.seconds}
    alone, batch = seconds_of(None, args.batches, 1, args.seconds)
    print(f"plain: {alone:.1f} s, {1000 * batch:.1f} ms a batch", flush=True)
    efficiency, of_all = {}, {}
    for workers in args.workers:
        taken, together = seconds_of(workers, workers * args.batches, 1, args.seconds)
        efficiency[workers], of_all[workers] = alone / taken, batch / together
        print(
            f"{workers} workers: {taken:.1f} s, efficiency {efficiency[workers]:.3f}, while all"
            f" work {of_all[workers]:.3f}",
            flush=True,
        )
    plain = seconds_of(None, args.calls, 1, 0)[0] / args.calls
    by_ray = seconds_of(1, args.calls, 1, 0)[0] / args.calls
    print(
        f"a batch of one empty item: plain {1000 * plain:.1f} ms, Ray {1000 * by_ray:.1f} ms,"
        f" overhead {1000 * (by_ray - plain):.1f} ms",
        flush=True,
    )
    engines = (("plain", None), ("ray", 2))
    many = {name: seconds_of(workers, args.items, 100, 0)[0] for name, workers in engines}
    for name, taken in many.items():
        print(f"{args.items} empty items, {name}: {taken:.0f} s", flush=True)
    figures |= {"efficiency": efficiency, "efficiency_while_all_work": of_all}
    figures |= {"plain_ms": 1000 * plain, "ray_ms": 1000 * by_ray}
    figures |= {"items": args.items, "seconds_of_items": many}
    if args.out:
        rundirs.write_json(args.out, figures)
    else:
        print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    cli.run(main)

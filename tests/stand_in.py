"""A command without a model, whose items can do what ends a process: for tests of the engines.

python -m tests.stand_in --out_root runs --items 20 --batch_size 3 --ends 7 --engine ray
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vlmdiag import cli
from vlmdiag.cli import UsageError
from vlmdiag.runs.experiment import Outcome, Worker, run_worker

FIRST = "first-time"  # a file beside the run: what happens once only has happened


@dataclass(frozen=True)
class Item:
    id: str
    number: int


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument("--items", type=cli.positive, default=10)
    parser.add_argument("--batch_size", type=cli.positive, default=1)
    parser.add_argument("--seconds", type=float, default=0.0, help="that a batch takes")
    parser.add_argument("--writing", type=float, default=0.0, help="seconds that writing one takes")
    parser.add_argument("--ends", type=int, nargs="*", default=[], help="items that end it")
    parser.add_argument("--ends_written", type=int, nargs="*", default=[], help="while written")
    parser.add_argument("--ends_once", type=int, nargs="*", default=[], help="the first time")
    parser.add_argument("--hangs", type=int, nargs="*", default=[], help="items without end")
    parser.add_argument("--hangs_once", type=int, nargs="*", default=[], help="the first time")
    parser.add_argument("--raises", type=int, nargs="*", default=[], help="items that fail")
    parser.add_argument("--unusable", type=int, nargs="*", default=[], help="with a CUDA error")
    parser.add_argument("--does_not_load", action="store_true")
    parser.add_argument("--ends_loading", action="store_true")
    parser.add_argument("--setting", default="a")
    parser.add_argument("--device", default=None)
    cli.add_run_arguments(parser)
    return parser.parse_args(argv)


def is_first(place: Path, number: int) -> bool:
    """Whether this has not happened before, in any process."""
    place.mkdir(parents=True, exist_ok=True)
    try:
        (place / f"{FIRST}-{number}").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


@dataclass(frozen=True)
class Slow:
    """An array that takes its time, or ends the process, when it is written."""

    length: int
    seconds: float
    ends: bool

    def __array__(self, dtype: object = None, copy: object = None) -> np.ndarray:
        time.sleep(self.seconds)
        if self.ends:
            os.kill(os.getpid(), signal.SIGKILL)
        return np.arange(self.length)


def make_worker(args: argparse.Namespace) -> Worker:
    if args.does_not_load:
        raise UsageError("no such model: stand-in")
    if args.ends_loading:
        os._exit(1)
    print("the model has been loaded")
    path = Path(args.out_root) / "stand_in"

    def process(numbers: Sequence[int]) -> list:
        time.sleep(args.seconds)
        for n in numbers:
            if n in args.ends or n in args.ends_once and is_first(path.parent, n):
                os.kill(os.getpid(), signal.SIGKILL)
            if n in args.hangs or n in args.hangs_once and is_first(path.parent, n):
                time.sleep(10_000)
            if n in args.raises:
                raise ValueError(f"{n} does not go")
            if n in args.unusable and is_first(path.parent, n):
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
        whole = f"{len(numbers)} from {numbers[0]}"  # other batches, other bytes
        return [
            (
                {"image_id": n, "caption": whole},
                {"x": Slow(n, args.writing, n in args.ends_written)},
            )
            for n in numbers
        ]

    return Worker(
        path,
        "stand_in",
        {"setting": args.setting},
        {},
        [Item(f"{n:05d}", n) for n in range(args.items)],
        lambda item: item.number,
        process,
        args.batch_size,
        about="a stand-in",
        facts={"process": os.getpid()},
    )


def finish(args: argparse.Namespace, outcome: Outcome) -> None:
    print(f"model in this process: {outcome.facts['process'] == os.getpid()}")
    print(f"torch in this process: {'torch' in sys.modules}")


def main(argv: Sequence[str] | None = None) -> int:
    return run_worker(parse_args(argv), make_worker, finish)


if __name__ == "__main__":
    cli.run(main)

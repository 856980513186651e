"""What the benchmarks share: time and memory of a few variants of the same work (alternating in one
process, peaks on a CPU each in a process of its own), flags, the machine, report and table.

PyTorch is imported inside the functions, so that a benchmark parses its flags first.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from vlmdiag import cli

if TYPE_CHECKING:
    import torch

Work = Callable[[], object]  # one run of a variant
Row = dict[str, Any]  # a row of a report
Number = TypeVar("Number")

VARIANTS = ("floor", "ours", "published")
# an allocator that gives freed blocks back at once
RETURNING = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
}


# --- flags and machine ----------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser, variants: Sequence[str] = ()) -> None:
    """Flags of every benchmark; variants: those whose peak memory can be asked for."""
    parser.add_argument(
        "--repeats",
        type=cli.positive,
        default=5,
        help="timed rounds, after one that is not counted",
    )
    parser.add_argument(
        "--threads",
        type=cli.whole(1, 1024),
        default=None,
        help="of PyTorch; None: as many as it takes itself",
    )
    parser.add_argument(
        "--quick", action="store_true", help="a very small shape; figures without meaning"
    )
    parser.add_argument("--out", default=None, help="JSON file with everything")
    if variants:
        parser.add_argument(
            "--memory_of",
            choices=list(variants),
            default=None,
            help="print only this variant's peak in MiB (the benchmark calls itself so)",
        )


def prepare(args: argparse.Namespace) -> tuple[str, torch.dtype]:
    """(device, dtype of what is timed) for --size; puts the number of threads into args. UsageError
    where the size needs a GPU."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.size == "7b" and device == "cpu":
        raise cli.UsageError("--size 7b needs a GPU, and none is visible here; use --size small")
    if args.threads is None:
        args.threads = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    return device, torch.bfloat16 if args.size == "7b" else torch.float32


def machine() -> dict[str, Any]:
    """Processor, GPU, threads and versions, for a report."""
    import torch
    import transformers

    cpuinfo = Path("/proc/cpuinfo")
    info = cpuinfo.read_text() if cpuinfo.exists() else ""
    cpu = platform.processor()
    if "model name" in info:
        cpu = info.split("model name")[1].split("\n")[0].strip("\t :")
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": time.strftime("%Y-%m-%d %H:%M"),
    }


# --- time -----------------------------------------------------------------------------------------


def times_of(work: Work) -> tuple[float, float]:
    """(wall time, CPU time of this process) of work(), with what a GPU still has to do."""
    import torch

    def wait() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    gc.collect()
    wait()
    start = time.perf_counter()
    busy = time.process_time()
    work()
    wait()
    return time.perf_counter() - start, time.process_time() - busy


def seconds_of(work: Work) -> float:
    """Wall time of work()."""
    return times_of(work)[0]


def rounds_of(variants: Mapping[str, Work], repeats: int) -> list[dict[str, float]]:
    """[{name: seconds}, ...]: one run of each that is not counted, then rounds in which they
    alternate, in reverse order every other round."""
    return alternating(
        {name: partial(seconds_of, work) for name, work in variants.items()}, repeats
    )


def busy_seconds_of(work: Work) -> float:
    """CPU time of work(), which other processes hardly change; beside a GPU its wall time."""
    import torch

    wall, busy = times_of(work)
    return wall if torch.cuda.is_available() else busy


def alternating(
    measures: Mapping[str, Callable[[], Number]], repeats: int, warm_up: bool = True
) -> list[dict[str, Number]]:
    """The same of what measures {name: () -> a number, or several} give."""
    if warm_up:
        for measure in measures.values():
            measure()
    rounds = []
    for index in range(repeats):
        names = list(measures)
        if index % 2:
            names.reverse()
        rounds.append({name: measures[name]() for name in names})
    return rounds


# --- memory ---------------------------------------------------------------------------------------


def peak_of(work: Work, before: Work) -> float | None:
    """MiB that work() takes above what was held before it, after one run of before(); None where it
    cannot be read."""
    import torch

    before()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - held) / 2**20
    status = Path("/proc/self/status")
    reset = Path("/proc/self/clear_refs")
    if not (status.exists() and os.access(reset, os.W_OK)):
        return None

    def mebibytes(field: str) -> float:
        return int(status.read_text().split(f"{field}:")[1].split()[0]) / 2**10

    reset.write_text("5")  # the peak starts again
    resident = mebibytes("VmRSS")
    work()
    return mebibytes("VmHWM") - resident


def peaks(
    variants: Mapping[str, Work], script: str, flags: Sequence[object]
) -> dict[str, float | None]:
    """{name: MiB} of {name: work}, each after a run of the floor; on a CPU by in_processes()."""
    import torch

    if torch.cuda.is_available():
        return {name: peak_of(work, variants["floor"]) for name, work in variants.items()}
    return in_processes(variants, script, flags)


def in_processes(
    names: Iterable[str],
    script: str,
    flags: Sequence[object],
    flag: str = "--memory_of",
    allocator: Mapping[str, str] = RETURNING,
) -> dict[str, Any]:
    """{name: what the script prints with `--memory_of NAME` or another flag}, each in a process
    whose allocator gives freed blocks back at once, unless told otherwise."""
    command = [sys.executable, script, *map(str, flags), flag]
    environment = os.environ | allocator
    printed = {}
    for name in names:
        done = subprocess.run(
            [*command, name], stdout=subprocess.PIPE, text=True, env=environment, check=True
        )
        printed[name] = json.loads(done.stdout)
    return printed


# --- report ---------------------------------------------------------------------------------------


def summary(
    rounds: Sequence[Mapping[str, float]],
    memory: Mapping[str, float | None] | None = None,
    count: int = 1,
) -> list[Row]:
    """[{variant, seconds, median_seconds, x_floor, published_to_this, and with memory peak_mib,
    extra_mib}, ...]; seconds are those of a round over `count`, ratios are medians of the ratios
    within a round."""
    rows = []
    for name in rounds[0]:
        times = [seconds[name] / count for seconds in rounds]
        to_floor = [seconds[name] / seconds["floor"] for seconds in rounds]
        published_to_this = [seconds["published"] / seconds[name] for seconds in rounds]
        row: Row = {
            "variant": name,
            "seconds": times,
            "median_seconds": float(np.median(times)),
            "x_floor": float(np.median(to_floor)),
            "published_to_this": float(np.median(published_to_this)),
        }
        if memory is not None:
            peak = memory[name]
            floor = memory["floor"]
            row["peak_mib"] = peak
            row["extra_mib"] = None if peak is None or floor is None else peak - floor
        rows.append(row)
    return rows


def table(rows: Sequence[Row], unit: str, first: Sequence[str] = ()) -> str:
    """The rows as a Markdown table. first: keys whose values come first."""
    has_memory = "extra_mib" in rows[0]
    names = [*first, "variant", f"s per {unit}: median (min-max)", "x floor", "published / this"]
    if has_memory:
        names.append("extra MiB")
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    for row in rows:
        seconds = row["seconds"]
        cells = [
            *(str(row[key]) for key in first),
            row["variant"],
            f"{row['median_seconds']:.3f} ({min(seconds):.3f}-{max(seconds):.3f})",
            f"{row['x_floor']:.2f}",
            f"{row['published_to_this']:.2f}",
        ]
        if has_memory:
            extra = row["extra_mib"]
            cells.append("not measured" if extra is None else f"{extra:.1f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def finish(report: Mapping[str, Any], lines: Sequence[str], out: str | None) -> int:
    """Print a report but its rows and some lines after it; write all of it to `out` where that is
    given."""
    for name, entry in report.items():
        if name not in ("rows", "equal_outputs"):
            print(f"{name}: {entry}")
    print(*lines, sep="\n")
    if out:
        Path(out).write_text(json.dumps(report, indent=1) + "\n")
    return 0

"""Time and memory of a few variants of the same work, for the benchmarks: alternating in one process, peaks on a CPU each in a process of its own."""

import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch


def seconds_of(work):
    """Wall time of work(), with what a GPU still has to do."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    gc.collect()
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def peak_of(work, before):
    """MiB that work() takes above what was held before it, after one run of before(); None where it cannot be read."""
    before()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - held) / 2**20
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not (status.exists() and os.access(reset, os.W_OK)):
        return None

    def kept(field):
        return int(status.read_text().split(f"{field}:")[1].split()[0]) / 2**10

    reset.write_text("5")
    held = kept("VmRSS")
    work()
    return kept("VmHWM") - held


def peaks(variants, floor, script, flags):
    """{name: MiB} of {name: work}. On a CPU the script is called once a variant with `--memory_of NAME` and prints the number, under an allocator that gives
    freed blocks back at once."""
    if torch.cuda.is_available():
        return {name: peak_of(work, variants[floor]) for name, work in variants.items()}
    environment = os.environ | {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    found = {}
    for name in variants:
        done = subprocess.run([sys.executable, script, *flags, "--memory_of", name], stdout=subprocess.PIPE, text=True, env=environment, check=True)
        found[name] = json.loads(done.stdout)
    return found


def rounds_of(variants, repeats):
    """[{name: seconds}, ...]: one run of each that is not counted, then rounds in which they alternate, in reverse order every other round."""
    for work in variants.values():
        work()
    return [{name: seconds_of(variants[name]) for name in list(variants)[:: -1 if i % 2 else 1]} for i in range(repeats)]


def summary(rounds, memory, floor, published):
    """[{variant, seconds, median_seconds, x_floor, published_to_this, peak_mib, extra_mib}, ...]; ratios are medians of the ratios within a round."""
    rows = []
    for name in rounds[0]:
        times = [each[name] for each in rounds]
        row = {"variant": name, "seconds": times, "median_seconds": float(np.median(times)), "peak_mib": memory[name]}
        row["x_floor"] = float(np.median([each[name] / each[floor] for each in rounds]))
        row["published_to_this"] = float(np.median([each[published] / each[name] for each in rounds]))
        row["extra_mib"] = None if memory[name] is None else memory[name] - memory[floor]
        rows.append(row)
    return rows


def table(rows, unit):
    """The rows as a Markdown table."""
    lines = [f"| variant | s per {unit}: median (min-max) | x floor | published / this | extra MiB |", "|---|---|---|---|---|"]
    for row in rows:
        spread = f"{row['median_seconds']:.2f} ({min(row['seconds']):.2f}-{max(row['seconds']):.2f})"
        extra = "not measured" if row["extra_mib"] is None else f"{row['extra_mib']:.1f}"
        lines.append(f"| {row['variant']} | {spread} | {row['x_floor']:.2f} | {row['published_to_this']:.2f} | {extra} |")
    return "\n".join(lines)

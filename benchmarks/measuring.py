"""What the benchmarks share: time and memory of a few variants of the same work (alternating in one
process, peaks on a CPU each in a process of its own), flags, the machine, report and table."""

import gc
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import transformers

from vlmdiag import cli


def add_arguments(parser, variants=()):
    """Flags of every benchmark; variants: those whose peak memory can be asked for."""
    parser.add_argument(
        "--repeats", type=int, default=5, help="timed rounds, after one that is not counted"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of PyTorch")
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


def prepare(args):
    """(device, dtype of what is timed) for --size; UsageError where it needs a GPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.size == "7b" and device == "cpu":
        raise cli.UsageError("--size 7b needs a GPU, and none is visible here; use --size small")
    torch.set_num_threads(args.threads)
    return device, torch.bfloat16 if args.size == "7b" else torch.float32


def machine():
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    cpu = (
        info.split("model name")[1].split("\n")[0].strip("\t :")
        if "model name" in info
        else platform.processor()
    )
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        **versions,
        "date": time.strftime("%Y-%m-%d %H:%M"),
    }


def times_of(work):
    """(wall time, CPU time of this process) of work(), with what a GPU still has to do."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    gc.collect()
    wait()
    start, busy = time.perf_counter(), time.process_time()
    work()
    wait()
    return time.perf_counter() - start, time.process_time() - busy


def seconds_of(work):
    return times_of(work)[0]


def peak_of(work, before):
    """MiB that work() takes above what was held before it, after one run of before(); None where it
    cannot be read."""
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
    """{name: MiB} of {name: work}; on a CPU by in_processes()."""
    if torch.cuda.is_available():
        return {name: peak_of(work, variants[floor]) for name, work in variants.items()}
    return in_processes(variants, script, flags)


def in_processes(names, script, flags):
    """{name: what the script prints with `--memory_of NAME`}, each in a process whose allocator
    gives freed blocks back at once."""
    environment = os.environ | {
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
    }
    command = [sys.executable, script, *map(str, flags), "--memory_of"]
    return {
        name: json.loads(
            subprocess.run(
                [*command, name], stdout=subprocess.PIPE, text=True, env=environment, check=True
            ).stdout
        )
        for name in names
    }


def rounds_of(variants, repeats):
    """[{name: seconds}, ...]: one run of each that is not counted, then rounds in which they
    alternate, in reverse order every other round."""
    return alternating(
        {name: lambda work=work: seconds_of(work) for name, work in variants.items()}, repeats
    )


def alternating(measures, repeats):
    """The same of what measures {name: () -> a number} give."""
    for measure in measures.values():
        measure()
    return [
        {name: measures[name]() for name in list(measures)[:: -1 if i % 2 else 1]}
        for i in range(repeats)
    ]


def summary(rounds, memory=None, floor="floor", published="published", count=1):
    """[{variant, seconds, median_seconds, x_floor, published_to_this, and with memory peak_mib,
    extra_mib}, ...]; seconds are those of a round over `count`, ratios are medians of the ratios
    within a round."""
    rows = []
    for name in rounds[0]:
        times = [each[name] / count for each in rounds]
        row = {"variant": name, "seconds": times, "median_seconds": float(np.median(times))}
        row["x_floor"] = float(np.median([each[name] / each[floor] for each in rounds]))
        row["published_to_this"] = float(
            np.median([each[published] / each[name] for each in rounds])
        )
        if memory is not None:
            row |= {
                "peak_mib": memory[name],
                "extra_mib": None if memory[name] is None else memory[name] - memory[floor],
            }
        rows.append(row)
    return rows


def table(rows, unit, first=()):
    """The rows as a Markdown table. first: keys whose values come first."""
    memory = "extra_mib" in rows[0]
    names = [
        *first,
        "variant",
        f"s per {unit}: median (min-max)",
        "x floor",
        "published / this",
        *(["extra MiB"] if memory else []),
    ]
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    for row in rows:
        spread = (
            f"{row['median_seconds']:.3f} ({min(row['seconds']):.3f}-{max(row['seconds']):.3f})"
        )
        cells = [
            *(str(row[key]) for key in first),
            row["variant"],
            spread,
            f"{row['x_floor']:.2f}",
            f"{row['published_to_this']:.2f}",
        ]
        cells += (
            ["not measured" if row["extra_mib"] is None else f"{row['extra_mib']:.1f}"]
            if memory
            else []
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def finish(report, lines, out):
    """Print a report but its rows and some lines after it; write all of it to `out` where that is
    given."""
    print(
        *(
            f"{name}: {value}"
            for name, value in report.items()
            if name not in ("rows", "equal_outputs")
        ),
        sep="\n",
    )
    print(*lines, sep="\n")
    if out:
        Path(out).write_text(json.dumps(report, indent=1) + "\n")
    return 0

"""What do three common measures cost with us, with plain transformers, with nnsight and with
TransformerLens?

    # in an environment of its own (python -m venv .venv-peers; source .venv-peers/bin/activate)
    pip install torch==2.13.0
    pip install -r benchmarks/requirements-peers.txt
    # 12 layers x 512 on a CPU, two prompt lengths, batch 1 and 4
    python benchmarks/bench_peers.py --threads 1 --out bench_peers.json
    # a very small shape, only to see that it runs; without the peers their rows say so
    python benchmarks/bench_peers.py --quick

One pass over the prompts of a random LLaVA, tower included, and of it
    attention shares   what the last query row of every layer and head sees of picture and text
    residual norms     L2 norms of what enters each layer, at every position
    logit lens         the five likeliest tokens after each layer, at the last position
by
    floor                    the plain pass with SDPA: nothing is measured
    ours                     capture() with a probe
    transformers             output_attentions (needs eager attention), output_hidden_states
    nnsight, save            maps or states saved in a trace, reduced after it
    nnsight, reduce          the same reduced in the trace
    TransformerLens, cache   run_with_cache() with a filter (and the last position, where that is
                             all), reduced after it
    TransformerLens, hooks   run_with_hooks() that reduce
Each tool as its documentation shows it: nnsight on SDPA but for the maps, TransformerLens on eager
attention, which it always takes. Each variant has processes of its own. The first runs every job
once: its outputs are compared, and its peak memory above what was held before, minus the floor's,
is the extra memory. Only then a second one, with the usual allocator, takes the CPU time of
--repeats rounds over the jobs; x floor is a ratio of medians, which other work on the machine
hardly moves. Rows in which a peer wins stay in.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks import measuring
from benchmarks.cases import build, decoder_shape, encode_samples, make_samples
from vlmdiag import cli

if TYPE_CHECKING:
    from benchmarks.variants_peers import Jobs

PACKAGES = ("transformers", "nnsight", "transformer-lens")
NEEDS = {"nnsight": "nnsight", "TransformerLens": "transformer-lens"}  # tool: package


def version_of(package: str) -> str | None:
    """None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def missing(variant: str) -> str | None:
    """The package that a variant needs and that is not installed."""
    package = NEEDS.get(variant.split(",")[0])
    return package if package and version_of(package) is None else None


def cases_of(args: argparse.Namespace) -> dict[str, tuple[int, int]]:
    """{name: (prompt tokens, batch)}."""
    return {
        f"prompt {prompt}, batch {batch}": (prompt, batch)
        for prompt, batch in itertools.product(args.prompt, args.batch)
    }


# --- in a variant's own process -------------------------------------------------------------------


def outputs_and_peaks(jobs: Jobs, floor: Jobs, path: Path) -> dict[str, float | None]:
    """{job: MiB} of one run of each; the outputs go to an NPZ file."""
    peaks: dict[str, float | None] = {}
    arrays: dict[str, np.ndarray] = {}

    for job, work in jobs.items():

        def keeping(job: str = job, work: Any = work) -> None:
            for quantity, of_job in work().items():
                arrays[f"{job}/{quantity}"] = of_job.numpy()

        peaks[job] = measuring.peak_of(keeping, floor[job])
    np.savez(path, **arrays)
    return peaks


def cpu_seconds(jobs: Jobs, repeats: int) -> dict[str, list[float]]:
    """{job: CPU time of each round}; the first job is run once before."""
    next(iter(jobs.values()))()
    rounds = [
        {job: measuring.times_of(work)[1] for job, work in jobs.items()} for _ in range(repeats)
    ]
    return {job: [times[job] for times in rounds] for job in jobs}


def run_variant(args: argparse.Namespace) -> dict[str, Any]:
    """What a process of one variant prints: {case: {job: MiB or seconds}}."""
    import torch

    from benchmarks import variants_peers as variants

    name = args.memory_of or args.time_of
    figures: dict[str, Any] = {}
    for case, (prompt, batch) in cases_of(args).items():
        with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
            vlm = build(args.size, prompt, "cpu", Path(scratch))
            samples = make_samples(Path(scratch), batch)
            model = variants.Model(vlm, encode_samples(vlm, samples))
            floor = variants.floor(model)
            jobs = variants.VARIANTS[name](model)
            if args.memory_of:
                path = outputs_file(args.outputs, case, name)
                figures[case] = outputs_and_peaks(jobs, floor, path)
            else:
                figures[case] = cpu_seconds(jobs, args.repeats)
    return figures


# --- all variants ---------------------------------------------------------------------------------


def measure(args: argparse.Namespace, folder: Path) -> tuple[float, list[measuring.Row]]:
    """(the largest difference of outputs, rows of all cases)."""
    from benchmarks import variants_peers as variants

    names = [name for name in variants.VARIANTS if not missing(name)]
    flags = ["--size", args.size, "--prompt", *args.prompt, "--batch", *args.batch]
    flags += ["--threads", args.threads, "--repeats", args.repeats, "--outputs", folder]
    peaks = measuring.in_processes(names, __file__, flags)
    worst = 0.0
    for case in cases_of(args):
        of_case = {name: read_outputs(outputs_file(folder, case, name)) for name in names}
        worst = max(worst, variants.check(of_case))
    times = measuring.in_processes(names, __file__, flags, "--time_of", {})
    rows: list[measuring.Row] = []
    for case, (prompt, batch) in cases_of(args).items():
        for job, name in itertools.product(variants.JOBS, variants.VARIANTS):
            row: measuring.Row = {"prompt": prompt, "batch": batch, "job": job, "variant": name}
            rows.append(row)
            if package := missing(name):
                row["why_not"] = f"{package} is not installed"
                continue
            seconds, peak = times[name][case][job], peaks[name][case][job]
            of_floor = times["floor"][case][job], peaks["floor"][case][job]
            row |= {
                "cpu_seconds": seconds,
                "x_floor": float(np.median(seconds) / np.median(of_floor[0])),
                "peak_mib": peak,
                "extra_mib": None if peak is None else peak - of_floor[1],
            }
    return worst, rows


def outputs_file(folder: str | Path, case: str, variant: str) -> Path:
    return Path(folder) / f"{case}, {variant}.npz"


def read_outputs(path: Path) -> dict[str, dict[str, np.ndarray]]:
    """{job: {quantity: array}}."""
    outputs: dict[str, dict[str, np.ndarray]] = {}
    with np.load(path) as arrays:
        for name, array in arrays.items():
            job, quantity = name.split("/")
            outputs.setdefault(job, {})[quantity] = array
    return outputs


def table(rows: Sequence[measuring.Row]) -> str:
    """The rows as a Markdown table."""
    names = ("prompt", "batch", "job", "variant", "CPU s: median (min-max)", "x floor", "extra MiB")
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    for row in rows:
        cells = [str(row[name]) for name in names[:4]]
        if "why_not" in row:
            cells += [row["why_not"], "", ""]
        else:
            seconds, extra = row["cpu_seconds"], row["extra_mib"]
            cells += [
                f"{np.median(seconds):.2f} ({min(seconds):.2f}-{max(seconds):.2f})",
                f"{row['x_floor']:.2f}",
                "not measured" if extra is None else f"{extra:.1f}",
            ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--size", choices=["quick", "small", "smol"], default="small", help="shape of the model"
    )
    parser.add_argument(
        "--prompt",
        type=cli.whole(50),
        nargs="+",
        default=[620, 1750],
        help="about how many prompt tokens",
    )
    parser.add_argument(
        "--batch", type=cli.positive, nargs="+", default=[1, 4], help="pictures in a batch"
    )
    measuring.add_arguments(parser)
    own = "the benchmark calls itself so for each variant"
    parser.add_argument("--memory_of", default=None, help=own)
    parser.add_argument("--time_of", default=None, help=own)
    parser.add_argument("--outputs", default=None, help=own)
    args = parser.parse_args(argv)
    if args.quick:
        args.size = "quick"
        args.prompt = [121]
        args.batch = [2]
        args.repeats = 1
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    measuring.prepare(args)
    if args.memory_of or args.time_of:
        print(json.dumps(run_variant(args)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        worst, rows = measure(args, Path(folder))
    report: dict[str, Any] = {
        "size": args.size,
        "decoder": decoder_shape(args.size),
        "repeats": args.repeats,
        "machine": measuring.machine(),
        "packages": {package: version_of(package) for package in PACKAGES},
        "worst": worst,
        "rows": rows,
    }
    equal = f"equal outputs: all jobs of all variants within {worst:.1e}\n"
    return measuring.finish(report, [equal, table(rows)], args.out)


if __name__ == "__main__":
    cli.run(main)

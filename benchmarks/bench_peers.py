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
--repeats rounds over the jobs, each right after a floor of a second, untouched model; x floor is
the median of their ratios, which other work on the machine hardly moves (that of the floor to
itself says how much). Rows in which a peer wins stay in.
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
    from benchmarks.variants_peers import Jobs, Model

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
        case_name(prompt, batch): (prompt, batch)
        for prompt, batch in itertools.product(args.prompt, args.batch)
    }


def case_name(prompt: int, batch: int) -> str:
    """How processes, files and the table call a case."""
    return f"prompt {prompt}, batch {batch}"


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


def cpu_seconds(jobs: Jobs, floor: Jobs, repeats: int) -> dict[str, list[tuple[float, float]]]:
    """{job: (CPU time of the floor, of the job right after it) of each round}; the first job is run
    once before."""
    next(iter(jobs.values()))()
    times: dict[str, list[tuple[float, float]]] = {job: [] for job in jobs}
    for _, (job, work) in itertools.product(range(repeats), jobs.items()):
        of_floor = measuring.times_of(floor[job])[1]
        times[job].append((of_floor, measuring.times_of(work)[1]))
    return times


def make_model(args: argparse.Namespace, prompt: int, batch: int, folder: Path) -> Model:
    """A random LLaVA in a new folder, and its prompts."""
    from benchmarks.variants_peers import Model

    folder.mkdir()
    vlm = build(args.size, prompt, "cpu", folder)
    return Model(vlm, encode_samples(vlm, make_samples(folder, batch)))


def run_variant(args: argparse.Namespace) -> dict[str, Any]:
    """What a process of one variant prints: {case: {job: MiB, or seconds as cpu_seconds()}}."""
    import torch

    from benchmarks.variants_peers import VARIANTS, floor

    name = args.memory_of or args.time_of
    figures: dict[str, Any] = {}
    for case, sizes in cases_of(args).items():
        with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
            model = make_model(args, *sizes, Path(scratch) / "model")
            jobs = VARIANTS[name](model)
            if args.memory_of:
                path = outputs_file(args.outputs, case, name)
                figures[case] = outputs_and_peaks(jobs, floor(model), path)
            else:
                untouched = make_model(args, *sizes, Path(scratch) / "untouched")
                figures[case] = cpu_seconds(jobs, floor(untouched), args.repeats)
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
            of_floor, seconds = zip(*times[name][case][job], strict=True)
            peak = peaks[name][case][job]
            row |= {
                "cpu_seconds": seconds,
                "floor_cpu_seconds": of_floor,
                "x_floor": float(np.median(np.divide(seconds, of_floor))),
                "peak_mib": peak,
                "extra_mib": None if peak is None else peak - peaks["floor"][case][job],
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
    """The rows as a Markdown table with a column for each prompt and batch: x floor (median of the
    CPU seconds, extra memory)."""
    cells: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        cells.setdefault((row["job"], row["variant"]), []).append(cell_of(row))
    cases = dict.fromkeys(case_name(row["prompt"], row["batch"]) for row in rows)
    names = ("job", "variant", *cases)
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    lines += [f"| {' | '.join([*of, *of_cases])} |" for of, of_cases in cells.items()]
    return "\n".join(lines)


def cell_of(row: measuring.Row) -> str:
    """What the table says of a row."""
    if "why_not" in row:
        return row["why_not"]
    extra = "memory not measured"
    if row["extra_mib"] is not None:
        extra = f"{row['extra_mib']:,.1f} MiB"
    return f"{row['x_floor']:.2f} ({np.median(row['cpu_seconds']):.2f} s, {extra})"


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

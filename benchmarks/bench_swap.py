"""What do the hidden states of a swap pair, and of a pair with its quad, cost, and what did the
published extraction cost?

    # 12 layers x 512 on a CPU, batch 1 and 8
    python benchmarks/bench_swap.py --threads 1 --out bench_swap.json
    # LLaVA-7B shapes in bfloat16, needs a GPU
    python benchmarks/bench_swap.py --size 7b --out bench_swap_7b.json
    # a very small shape, only to see that it runs
    python benchmarks/bench_swap.py --quick

The same random LLaVA and table (a JPEG in base64 per row) for all, from the table's row to the
states of all layers at the last prompt token and the answers:
    floor      generate() of transformers with SDPA, the batch's pictures with one question after
               the other, at most 8 tokens; nothing is kept
    ours       swap_analysis.py's own process() through engine.run_items, with states.npy and one
               record per pair, flushed to the disk
    published  one query at a time: picture decoded, processed and through the tower each time; a
               forward hook on every layer copies the prefill's last position to the CPU in float32;
               generate() with its default attention, greedy, 20 tokens; nothing is written. As a
               pair's time does not depend on the batch, the first two pairs of a batch stand for
               all
After Why Far Looks Up (arXiv 2605.30161); docs/studies/swap_analysis.md, sections 1.6, 1.7, 4 and
5.1. `pair`: original and swapped question. `pair + quad`: two further questions about height; the
published quad is four queries that repeat the pair's two, so six in all, and the floor asks four.

Two kinds of answer, planted in a few rows of embeddings and LM head, for all variants alike (a
random model answers nothing and never ends):
    ends       one word, then EOS, as a trained model answers "with only one word": every variant
               stops there by itself
    goes on    the word, a full stop and then whatever comes, without EOS: floor and published run
               to their limits, ours ends with the sentence
First, in float32, states of all layers and the answers as each procedure reads them are compared.
Then the variants alternate in one process, in reverse order every other round; ratios are medians
of the ratios within a round, on a CPU also of the process's CPU time, which other work on the
machine hardly moves. Extra memory: a variant's peak minus the floor's, on a CPU each in a process
of its own.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import measuring
from benchmarks.cases import SIZES, decoder_shape
from vlmdiag import cli

if TYPE_CHECKING:
    from benchmarks.variants_swap import Case

WORK = {"pair": False, "pair + quad": True}  # kind of work: whether with a quad
RATES = ("seconds", "median_seconds", "x_floor", "published_to_this")  # reported of CPU time too
# further columns of the table
CPU_COLUMNS = {"cpu_median_seconds": "CPU s", "cpu_published_to_this": "published / this, CPU"}

Memory = dict[str, "float | None"]  # of each kind of work, MiB


def seconds_of(case: Case, variant: str, has_quad: bool) -> tuple[float, float | None]:
    """(wall time, CPU time of this process or None beside a GPU) per pair."""
    from benchmarks.variants_swap import PUBLISHED_PAIRS, VARIANTS

    wall, busy = measuring.times_of(partial(VARIANTS[variant], case, has_quad))
    count = len(case.items)
    if variant == "published":
        count = min(count, PUBLISHED_PAIRS)
    return wall / count, None if case.vlm.device.type == "cuda" else busy / count


def peaks_of(case: Case, variant: str) -> Memory:
    """{work: MiB} of answers that go on, the longer ones."""
    from benchmarks.variants_swap import GOES_ON, VARIANTS

    case.answer_by(GOES_ON)
    peaks = {}
    for work, has_quad in WORK.items():
        run = partial(VARIANTS[variant], case, has_quad)
        run_floor = partial(VARIANTS["floor"], case, has_quad)
        peaks[work] = measuring.peak_of(run, run_floor)
    return peaks


def peaks_of_all(args: argparse.Namespace, case: Case, batch: int) -> dict[str, Memory]:
    """{variant: {work: MiB}}."""
    if case.vlm.device.type == "cuda":
        return {variant: peaks_of(case, variant) for variant in measuring.VARIANTS}
    flags = f"--size {args.size} --prompt {args.prompt} --batch {batch} --threads {args.threads}"
    return measuring.in_processes(measuring.VARIANTS, __file__, flags.split())


def measure(
    args: argparse.Namespace, case: Case, shared: Mapping[str, object], memory: Mapping[str, Memory]
) -> list[measuring.Row]:
    """One row per kind of work and variant. shared: fields of every row; memory {variant: {work:
    MiB}}."""
    rows = []
    for work, has_quad in WORK.items():
        measures = {
            variant: partial(seconds_of, case, variant, has_quad) for variant in measuring.VARIANTS
        }
        rounds = measuring.alternating(measures, args.repeats)
        wall = [{name: pair[0] for name, pair in times.items()} for times in rounds]
        busy = [{name: pair[1] for name, pair in times.items()} for times in rounds]
        peaks = {variant: memory[variant][work] for variant in measuring.VARIANTS}
        of_wall = measuring.summary(wall, peaks)
        has_cpu = None not in busy[0].values()
        of_cpu = measuring.summary(busy) if has_cpu else [{}] * len(of_wall)
        for wall_row, cpu_row in zip(of_wall, of_cpu, strict=True):
            cpu = {f"cpu_{name}": cpu_row.get(name) for name in RATES}
            rows.append({**shared, "work": work, **wall_row, **cpu})
    return rows


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument("--size", choices=list(SIZES), default="small", help="shape of the model")
    parser.add_argument(
        "--prompt",
        type=cli.positive,
        default=620,
        help="about how many tokens the prompt of a short question has",
    )
    parser.add_argument(
        "--batch",
        type=cli.positive,
        nargs="+",
        default=[1, 8],
        help="pairs in a batch; the published extraction takes one query at a time",
    )
    measuring.add_arguments(parser, measuring.VARIANTS)
    args = parser.parse_args(argv)
    if args.quick:
        args.size = "quick"
        args.prompt = 121
        args.repeats = 1
        args.batch = [2]
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    from benchmarks import variants_swap as variants

    device, dtype = measuring.prepare(args)
    rows: list[measuring.Row] = []
    worst = 0.0
    with tempfile.TemporaryDirectory() as scratch:
        for batch in args.batch:
            folder = Path(tempfile.mkdtemp(dir=scratch))
            case = variants.make_case(args.size, args.prompt, batch, device, folder)
            if args.memory_of:
                print(json.dumps(peaks_of(case, args.memory_of)))
                return 0
            answers = (variants.ENDS, variants.GOES_ON)
            for answer in answers:
                case.answer_by(answer)
                worst = max(worst, variants.check(case, answer))
            case.vlm.model.to(dtype)
            length = variants.encode(case, case.items[:1]).lengths[0]
            memory = peaks_of_all(args, case, batch)
            for answer in answers:
                case.answer_by(answer)
                rows += measure(args, case, {"batch": batch, "answer": answer}, memory)
    report: dict[str, Any] = {
        "size": args.size,
        "decoder": decoder_shape(args.size),
        "dtype": str(dtype).removeprefix("torch."),
        "prompt_tokens": length,
        "repeats": args.repeats,
        "machine": measuring.machine(),
        "tolerance": variants.TOLERANCE,
        "worst": worst,
        "rows": rows,
    }
    equal = (
        f"equal outputs: all read answers, states of all layers within {worst:.1e} of a layer's"
        " largest\n"
    )
    return measuring.finish(report, [equal, table(rows)], args.out)


def table(rows: Sequence[measuring.Row]) -> str:
    """The rows as a Markdown table, with CPU time."""
    shown = []
    for row in rows:
        cells = {
            column: "not measured" if row[key] is None else f"{row[key]:.3f}"
            for key, column in CPU_COLUMNS.items()
        }
        shown.append(row | cells)
    return measuring.table(shown, "pair", ("batch", "answer", "work", *CPU_COLUMNS.values()))


if __name__ == "__main__":
    cli.run(main)

"""What does the per-image diagnosis cost over plain generation, and what did the published
procedure cost?

    # the CPU figures: 12 layers x 512, two prompt lengths, batch 1 and 4
    python benchmarks/bench_diagnostics.py --out bench.json
    # LLaVA-7B shapes in bfloat16, needs a GPU
    python benchmarks/bench_diagnostics.py --size 7b --out bench_7b.json
    # a very small shape, only to see that it runs
    python benchmarks/bench_diagnostics.py --quick

Three variants of the same work on a random LLaVA, from the picture's file to the last result, every
answer --new_tokens long:
    floor      generate() of transformers with SDPA: nothing is measured
    ours       run_coco_diagnostics.py's own process() and files through engine.run_items, all
               probes on
    published  one picture at a time, eager generate() that returns all attention maps and hidden
               states, a second complete forward for the RoPE probe: Beyond Semantics (arXiv
               2503.17349) by docs/studies/beyond_semantics.md, sections 2 and 3
First, in float32, all outputs are compared: captions of all three, published numbers against ours
with --paper_compat (all of them) and as timed (where the definitions agree). Then the variants
alternate in one process, in reverse order every other round; ratios are medians of the ratios
within a round. Extra memory: a variant's peak minus the floor's, on a CPU each in a process of its
own. Out come a Markdown table and, with --out, all figures.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import measuring
from benchmarks.cases import SIZES, Case, build, decoder_shape, encode_samples, make_samples
from vlmdiag import cli


def seconds_of(case: Case, variant: str) -> float:
    """Wall time per picture."""
    from benchmarks.variants_diagnostics import VARIANTS

    _, work = VARIANTS[variant](case)
    return measuring.seconds_of(work) / len(case.samples)


def peak_of(case: Case, variant: str) -> float | None:
    """Peak memory of one run in MiB above what was held before, after one run of the floor; None
    where it cannot be read."""
    from benchmarks.variants_diagnostics import VARIANTS

    _, work = VARIANTS[variant](case)
    _, before = VARIANTS["floor"](case)
    return measuring.peak_of(work, before)


def peaks(args: argparse.Namespace, case: Case, prompt: int) -> dict[str, float | None]:
    """{variant: MiB}."""
    if case.vlm.device.type == "cuda":
        return {variant: peak_of(case, variant) for variant in measuring.VARIANTS}
    flags = (
        f"--size {args.size} --prompt {prompt} --batch {len(case.samples)} --new_tokens"
        f" {args.new_tokens} --threads {args.threads}"
    )
    return measuring.in_processes(measuring.VARIANTS, __file__, flags.split())


def measure(args: argparse.Namespace, case: Case, prompt: int) -> list[measuring.Row]:
    """One row per variant."""
    measures = {variant: partial(seconds_of, case, variant) for variant in measuring.VARIANTS}
    rounds = measuring.alternating(measures, args.repeats)
    batch = encode_samples(case.vlm, case.samples[:1])
    shared = {
        "prompt_tokens": batch.lengths[0],
        "vision_tokens": len(batch.vision_positions(0)),
        "batch": len(case.samples),
    }
    return [shared | row for row in measuring.summary(rounds, peaks(args, case, prompt))]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument("--size", choices=list(SIZES), default="small", help="shape of the model")
    parser.add_argument(
        "--prompt",
        type=cli.whole(50),
        nargs="+",
        default=[620, 1750],
        help="about how many prompt tokens",
    )
    parser.add_argument(
        "--batch",
        type=cli.positive,
        nargs="+",
        default=[1, 4],
        help="pictures in a batch; the published procedure takes them one by one",
    )
    parser.add_argument("--new_tokens", type=cli.positive, default=32, help="tokens of an answer")
    measuring.add_arguments(parser, measuring.VARIANTS)
    args = parser.parse_args(argv)
    if args.quick:
        args.size = "quick"
        args.prompt = [121]
        args.batch = [2]
        args.repeats = 1
        args.new_tokens = 4
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    from benchmarks import variants_diagnostics as variants

    device, dtype = measuring.prepare(args)
    rows: list[measuring.Row] = []
    checked: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for prompt in args.prompt:
            for batch in args.batch:
                folder = Path(tempfile.mkdtemp(dir=scratch))
                vlm = build(args.size, prompt, device, folder)
                case = Case(vlm, make_samples(folder, batch), args.new_tokens, folder)
                if args.memory_of:
                    print(json.dumps(peak_of(case, args.memory_of)))
                    return 0
                checked[f"prompt {prompt}, batch {batch}"] = variants.check(case)
                vlm.model.to(dtype)
                rows += measure(args, case, prompt)
    report: dict[str, Any] = {
        "size": args.size,
        "decoder": decoder_shape(args.size),
        "dtype": str(dtype).removeprefix("torch."),
        "new_tokens": args.new_tokens,
        "repeats": args.repeats,
        "machine": measuring.machine(),
        "tolerance": variants.TOLERANCE,
        "equal_outputs": checked,
        "rows": rows,
    }
    table = measuring.table(rows, "image", ("prompt_tokens", "vision_tokens", "batch"))
    return measuring.finish(report, [equal_outputs(checked), table], args.out)


def equal_outputs(checked: dict[str, dict[str, float]]) -> str:
    """The line about what check() found."""
    gaps = [(gap, quantity) for of_case in checked.values() for quantity, gap in of_case.items()]
    worst, quantity = max(gaps)
    count = len(next(iter(checked.values())))
    return (
        f"equal outputs: all captions, and {count} quantities within {worst:.1g} (the worst:"
        f" {quantity})\n"
    )


if __name__ == "__main__":
    cli.run(main)

"""What does one round of the critique loop with measured attention cost, and what did the published
capture cost?

    # 12 layers x 512 on a CPU
    python benchmarks/bench_volcano.py --out bench_volcano.json
    # LLaVA-7B shapes in bfloat16, needs a GPU
    python benchmarks/bench_volcano.py --size 7b
    # a very small shape, only to see that it runs
    python benchmarks/bench_volcano.py --quick

The same random LLaVA, pictures and prompts for all: initial answer, critique, revision (each
--new_tokens long) and decision (8 tokens), one round:
    floor      generate() of transformers with SDPA for each prompt, picture features computed once;
               nothing is measured
    ours       the script's own Asker: keys and values of the picture shared by all prompts,
               attention reduced inside the pass, instances batched
    published  one instance at a time, generate() on eager attention that returns all maps; of each
               step and layer the picture's columns are taken to the CPU, (T, L, H, P), then pooled
               by top-3 over layers and heads
After Volcano (arXiv 2311.07362); docs/studies/volcano.md, sections 2.2 and 4.1. First, in float32,
ids of all answers and the pooled attention are compared. Then the variants alternate in one
process; extra memory is a variant's peak minus the floor's, on a CPU each in a process of its own.
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
from benchmarks.cases import Case, build, make_samples
from vlmdiag import cli


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--size",
        choices=["quick", "small", "smol", "7b"],
        default="small",
        help="shape of the model",
    )
    parser.add_argument(
        "--prompt",
        type=cli.positive,
        default=620,
        help="about how many tokens the question's prompt has",
    )
    parser.add_argument(
        "--batch",
        type=cli.positive,
        nargs="+",
        default=[1, 4],
        help="instances in a batch; the published capture takes them one by one",
    )
    parser.add_argument("--new_tokens", type=cli.positive, default=32, help="tokens of an answer")
    measuring.add_arguments(parser, measuring.VARIANTS)
    args = parser.parse_args(argv)
    if args.quick:
        args.size = "quick"
        args.prompt = 121
        args.repeats = 1
        args.new_tokens = 4
        args.batch = [2]
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    from benchmarks import variants_volcano as variants

    device, dtype = measuring.prepare(args)
    rows: list[measuring.Row] = []
    worst = 0.0
    with tempfile.TemporaryDirectory() as scratch:
        for batch in args.batch:
            folder = Path(tempfile.mkdtemp(dir=scratch))
            vlm = build(args.size, args.prompt, device, folder)
            case = Case(vlm, make_samples(folder, batch), args.new_tokens, folder)
            work = {name: partial(variant, case) for name, variant in variants.VARIANTS.items()}
            if args.memory_of:
                print(json.dumps(measuring.peak_of(work[args.memory_of], work["floor"])))
                return 0
            worst = max(worst, variants.check(case))
            vlm.model.to(dtype)
            rounds = measuring.rounds_of(work, args.repeats)
            flags = (
                f"--size {args.size} --prompt {args.prompt} --batch {batch} --new_tokens"
                f" {args.new_tokens} --threads {args.threads}"
            )
            memory = measuring.peaks(work, __file__, flags.split())
            of_batch = measuring.summary(rounds, memory, count=batch)
            rows += [{"batch": batch} | row for row in of_batch]
    report: dict[str, Any] = {
        "size": args.size,
        "prompt": args.prompt,
        "new_tokens": args.new_tokens,
        "repeats": args.repeats,
        "machine": measuring.machine(),
        "rows": rows,
    }
    equal = f"equal outputs: all answers, pooled attention within {worst:.1e}\n"
    table = measuring.table(rows, "instance", ("batch",))
    return measuring.finish(report, [equal, table], args.out)


if __name__ == "__main__":
    cli.run(main)

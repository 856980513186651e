"""What does the gradient relevancy of a whole answer cost, and what did the published computation
cost?

    # 12 layers x 512 on a CPU
    python benchmarks/bench_relevancy.py --threads 1 --out bench_relevancy.json
    # LLaVA-7B shapes in bfloat16, needs a GPU
    python benchmarks/bench_relevancy.py --size 7b
    # a very small shape, only to see that it runs
    python benchmarks/bench_relevancy.py --quick

One random LLaVA, picture, prompt and answer of --new_tokens given tokens for all; maps of every
token at every layer, through decoder and tower:
    floor      one forward pass over prompt and answer with SDPA, tower included; nothing is
               measured
    ours       trace() and relevancy() of vlmdiag/relevancy/
    published  eager attention whose maps keep their gradients, parameters not frozen; for each
               token one backward() through the retained graph, rules 5 and 6 with whole matrices
               (n x n) in decoder and tower, rows of all layers taken to the CPU
LVLM-Stethoscope (docs/studies/stethoscope.md, sections 1.7, 2 and 5.1); the gradients of the maps
are cleared between tokens, which the published code forgets, so that the outputs are equal. First,
in float32, image relevancy of all tokens and layers is compared. Then the variants alternate in one
process; ratios are medians of the ratios within a round. Extra memory: a variant's peak minus the
floor's, on a CPU each in a process of its own.
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
from benchmarks.cases import build, encode_samples, make_samples
from vlmdiag import cli

FLAGS = ("size", "prompt", "new_tokens", "memory", "threads")  # that a variant's memory depends on


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--size",
        choices=["quick", "small", "smol", "7b"],
        default="small",
        help="shape of the model",
    )
    parser.add_argument(
        "--prompt", type=cli.positive, default=620, help="about how many tokens the prompt has"
    )
    parser.add_argument("--new_tokens", type=cli.positive, default=30, help="tokens of the answer")
    parser.add_argument(
        "--memory",
        type=cli.whole(1, 2**20),
        default=128,
        help="MiB of gradients and maps that ours holds at once",
    )
    measuring.add_arguments(parser, measuring.VARIANTS)
    args = parser.parse_args(argv)
    if args.quick:
        args.size = "quick"
        args.prompt = 121
        args.repeats = 1
        args.new_tokens = 4
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    import torch

    from benchmarks import variants_relevancy as variants

    device, dtype = measuring.prepare(args)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        vlm = build(args.size, args.prompt, device, folder)
        batch = encode_samples(vlm, make_samples(folder, 1))
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(10, 200, (args.new_tokens,), generator=generator).tolist()
        case = variants.Case(vlm, batch, ids, args.memory * 2**20)
        work = {name: partial(variant, case) for name, variant in variants.VARIANTS.items()}
        if args.memory_of:
            print(json.dumps(measuring.peak_of(work[args.memory_of], work["floor"])))
            return 0
        worst = variants.check(case)
        vlm.model.to(dtype)
        rounds = measuring.rounds_of(work, args.repeats)
        flags: list[object] = []
        for name in FLAGS:
            flags += [f"--{name}", getattr(args, name)]
        memory = measuring.peaks(work, __file__, flags)
    rows = measuring.summary(rounds, memory)
    report: dict[str, Any] = {name: getattr(args, name) for name in (*FLAGS, "repeats")}
    report |= {
        "prompt_tokens": batch.input_ids.shape[1],
        "machine": measuring.machine(),
        "rows": rows,
    }
    equal = (
        f"equal outputs: image relevancy of all tokens and layers within {worst:.1e} of a token's"
        " largest value\n"
    )
    return measuring.finish(report, [equal, measuring.table(rows, "answer")], args.out)


if __name__ == "__main__":
    cli.run(main)

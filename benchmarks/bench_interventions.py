"""What do 36 attention knockouts and 18 token ablations of a picture cost, and what did the
published procedure cost?

    # 12 layers x 512 on a CPU
    python benchmarks/bench_interventions.py --out bench_interventions.json
    # LLaVA-7B shapes in bfloat16, needs a GPU
    python benchmarks/bench_interventions.py --size 7b
    # a very small shape, only to see that it runs
    python benchmarks/bench_interventions.py --quick

The same random LLaVA, picture and token sets for all, from the picture's file to the last result:
    floor       knockouts: one forward; ablations: one description and one yes/no answer, nothing
                changed
    ours        the scripts' own functions: one unblocked pass, all knockouts as branches of it;
                ablations batched over shared prefixes
    published   one condition at a time, each with picture, tower and whole prompt; masks filled
                pair by pair in Python, as the published code does
    vectorised  the same with each mask filled by one index: what a patient reader would make of it
                (knockouts only)
After llava-interp (arXiv 2410.07149); docs/studies/llava_interp.md, sections 2.8, 2.9 and 3.
Outputs are compared in float32 before anything is timed: logits of every knockout, ids of every
ablation's answers. Then the variants alternate in one process, in reverse order every other round;
ratios are medians of the ratios within a round."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import measuring
from benchmarks.cases import Case, build, make_samples
from vlmdiag import cli

if TYPE_CHECKING:
    from benchmarks.variants_interventions import Plan


def measure(
    case: Case,
    plan: Plan,
    experiment: str,
    variants: Mapping[str, Callable[[Case, Plan], object]],
    repeats: int,
) -> list[measuring.Row]:
    """Rows of one experiment."""
    work = {name: partial(variant, case, plan) for name, variant in variants.items()}
    rounds = measuring.rounds_of(work, repeats)
    return [{"experiment": experiment} | row for row in measuring.summary(rounds)]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--size", choices=["small", "smol", "7b"], default="small", help="shape of the model"
    )
    parser.add_argument(
        "--prompt", type=cli.positive, default=620, help="about how many prompt tokens"
    )
    parser.add_argument(
        "--new_tokens",
        type=cli.positive,
        default=32,
        help="of a description; a yes/no answer has at most 10",
    )
    measuring.add_arguments(parser)
    args = parser.parse_args(argv)
    if args.quick:
        args.size = "quick"
        args.prompt = 121
        args.repeats = 1
        args.new_tokens = 4
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    from benchmarks import variants_interventions as variants

    device, dtype = measuring.prepare(args)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        vlm = build(args.size, args.prompt, device, folder)
        case = Case(vlm, make_samples(folder, 1), args.new_tokens, folder)
        plan = variants.make_plan(case, args.new_tokens)
        worst = variants.check(case, plan)
        vlm.model.to(dtype)
        knockouts = f"{len(plan.blocks)} knockouts"
        ablations = f"{len(plan.sets)} ablations"
        rows = measure(case, plan, knockouts, variants.KNOCKOUTS, args.repeats)
        rows += measure(case, plan, ablations, variants.ABLATIONS, args.repeats)
    report: dict[str, Any] = {
        "size": args.size,
        "prompt": args.prompt,
        "new_tokens": args.new_tokens,
        "repeats": args.repeats,
        "machine": measuring.machine(),
        "rows": rows,
    }
    equal = (
        f"equal outputs: knockouts within {worst:.1e} of the logits' range, all ablated answers\n"
    )
    table = measuring.table(rows, "picture", ("experiment",))
    return measuring.finish(report, [equal, table], args.out)


if __name__ == "__main__":
    cli.run(main)

"""What do 36 attention knockouts and 18 token ablations of a picture cost, and what did the
published procedure cost?

    # 12 layers x 512 on a CPU
    python benchmarks/bench_interventions.py --out bench_interventions.json
    # LLaVA-7B shapes in bfloat16, needs a GPU
    python benchmarks/bench_interventions.py --size 7b
    # answers that an ablation hardly changes, and those of a trained model
    python benchmarks/bench_interventions.py --only ablations --steady
    python benchmarks/bench_interventions.py --only ablations \\
        --model_path checkpoints/smol-llava-135m
    # a very small shape, only to see that it runs
    python benchmarks/bench_interventions.py --quick

The same random LLaVA, picture and token sets for all, from the picture's file to the last result:
    floor       knockouts: one forward; ablations: one description and one yes/no answer, nothing
                changed
    ours        the scripts' own functions: one unblocked pass, all knockouts as branches of it;
                ablations batched over shared prefixes, the unablated answers as drafts
    published   one condition at a time, each with picture, tower and whole prompt; masks filled
                pair by pair in Python, as the published code does
    vectorised  the same with each mask filled by one index: what a patient reader would make of it
                (knockouts only)
After llava-interp (arXiv 2410.07149); docs/studies/llava_interp.md, sections 2.8, 2.9 and 3.
Outputs are compared in float32 before anything is timed: logits of every knockout, ids of every
ablation's answers and of the unablated ones, which ours and published both ask for. Then the
variants alternate in one process, in reverse order every other round; seconds are CPU time (beside
a GPU wall time), ratios medians of the ratios within a round. agreed: the share of the ablated
answers' tokens that were those of their draft, which decides what a draft saves; 0 in a plain
random model, where any change turns the whole answer."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from random import Random
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
    """Rows of one experiment, whose variants have all run once."""
    from benchmarks.variants_interventions import agreed_share

    work = {
        name: partial(measuring.busy_seconds_of, partial(variant, case, plan))
        for name, variant in variants.items()
    }
    agreed_share()
    rows = measuring.summary(measuring.alternating(work, repeats, warm_up=False))
    share = agreed_share()
    return [
        {
            "experiment": experiment,
            "agreed": "-" if share is None or row["variant"] != "ours" else f"{share:.2f}",
            **row,
        }
        for row in rows
    ]


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
    parser.add_argument(
        "--model_path", default=None, help="a trained model in place of the random one of --size"
    )
    parser.add_argument(
        "--steady",
        action="store_true",
        help="a random model whose answers an ablation hardly changes",
    )
    parser.add_argument(
        "--only", choices=["knockouts", "ablations"], default=None, help="one of the experiments"
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
    from common import load_model
    from vlmdiag.scenes.scene import floor_scene, render

    device, dtype = measuring.prepare(args)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        samples = make_samples(folder, 1)
        if args.model_path is None:
            vlm = build(args.size, args.prompt, device, folder, steady=args.steady)
        else:
            vlm = load_model(args.model_path, device)
            scene = floor_scene(Random(0), 3, square=False)
            render(scene).save(samples[0].image)
        case = Case(vlm, samples, args.new_tokens, folder)
        plan = variants.make_plan(case, args.new_tokens)
        experiments = {
            "knockouts": (len(plan.blocks), variants.KNOCKOUTS, variants.check_knockouts),
            "ablations": (len(plan.sets), variants.ABLATIONS, variants.check_ablations),
        }
        if args.only:
            experiments = {args.only: experiments[args.only]}
        equal = [f"{name}: {check(case, plan)}" for name, (_, _, check) in experiments.items()]
        vlm.model.to(dtype)
        rows = []
        for name, (count, of_variants, _) in experiments.items():
            rows += measure(case, plan, f"{count} {name}", of_variants, args.repeats)
        prompt_tokens = variants.encode(case).lengths[0]
    report: dict[str, Any] = {
        "size": args.size,
        "model_path": args.model_path,
        "steady": args.steady,
        "prompt_tokens": prompt_tokens,
        "new_tokens": args.new_tokens,
        "repeats": args.repeats,
        "machine": measuring.machine(),
        "rows": rows,
    }
    table = measuring.table(rows, "picture", ("experiment", "agreed"))
    return measuring.finish(report, [f"equal outputs: {'; '.join(equal)}\n", table], args.out)


if __name__ == "__main__":
    cli.run(main)

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
    ours       trace() and relevancy() of diagnostic_tools/
    published  eager attention whose maps keep their gradients, parameters not frozen; for each
               token one backward() through the retained graph, rule 5 and
               6 with whole matrices (n x n) in decoder and tower, rows of all layers taken to the
               CPU
LVLM-Stethoscope by our study's sections 1.7, 2 and 5.1; the gradients of the maps are cleared
between tokens, which the published code forgets, so that the outputs are equal. First, in float32,
image relevancy of all tokens and layers is compared. Then the variants alternate in one process;
ratios are medians of the ratios within a round. Extra memory: a variant's peak minus the floor's,
on a CPU each in a process of its own.
"""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks import measuring
from benchmarks.bench_diagnostics import build, make_samples
from common import VLM
from vlmdiag import cli
from vlmdiag.model.decoding import extended
from vlmdiag.pictures.samples import load_image
from vlmdiag.relevancy import gradients, rules
from vlmdiag.relevancy import methods as attribution

TOLERANCE = 1e-3  # of the largest value of a token's map


@dataclass
class Case:
    vlm: VLM
    batch: object
    ids: list
    budget: int


@torch.inference_mode()
def floor(case):
    whole = extended(case.batch, case.ids)
    inputs = {
        "pixel_values": case.batch.image_inputs["pixel_values"].to(case.vlm.device, case.vlm.dtype)
    }
    case.vlm.model(
        input_ids=whole.input_ids,
        attention_mask=whole.attention_mask,
        position_ids=whole.position_ids,
        use_cache=False,
        logits_to_keep=1,
        **inputs,
    )


def ours(case):
    """(T, L, P) image relevancy through the tower."""
    run = gradients.trace(case.vlm, case.batch, case.ids)
    return attribution.relevancy(run, range(len(case.ids)), budget=case.budget).cells


def published(case):
    """The same, token after token."""
    vlm, whole, seen, hooks = (
        case.vlm,
        extended(case.batch, case.ids),
        {"layer": [], "block": []},
        [],
    )
    start, vision = case.batch.input_ids.shape[1] - 1, case.batch.vision_positions(0)

    def keep(kind):
        def hook(module, args, output):
            output[1].retain_grad()
            seen[kind].append(output[1])

        return hook

    vlm.model.set_attn_implementation("eager")
    vlm.model.requires_grad_(True)
    try:
        for kind, modules in (
            ("layer", vlm.parts.layers),
            ("block", vlm.parts.vision_blocks[:-1]),
        ):  # the last block of the tower is not read
            hooks += [module.self_attn.register_forward_hook(keep(kind)) for module in modules]
        inputs = {"pixel_values": case.batch.image_inputs["pixel_values"].to(vlm.device, vlm.dtype)}
        logits = vlm.model(
            input_ids=whole.input_ids,
            attention_mask=whole.attention_mask,
            position_ids=whole.position_ids,
            use_cache=False,
            **inputs,
        ).logits[0]
        found = []
        for step, id in enumerate(case.ids):
            vlm.model.zero_grad()
            for maps in seen.values():
                for attention in maps:
                    attention.grad = None
            logits[start + step, id].float().backward(retain_graph=True)
            rows, length = [], start + step + 1
            eye = torch.eye(length, device=logits.device)
            relevancy = eye.clone()
            for attention in seen["layer"]:
                average = rules.head_mean(attention[0].detach().float(), attention.grad[0].float())[
                    :length, :length
                ]
                relevancy = relevancy + average @ relevancy
                rows.append((relevancy - eye)[start + step, vision])
            tower = torch.eye(seen["block"][0].shape[-1], device=logits.device)
            for attention in seen["block"]:
                tower = (
                    tower
                    + rules.head_mean(attention[0].detach().float(), attention.grad[0].float())
                    @ tower
                )
            found.append((torch.stack(rows) @ tower[1:, 1:]).cpu())
        return torch.stack(found).numpy()
    finally:
        for hook in hooks:
            hook.remove()
        vlm.model.zero_grad()
        vlm.model.requires_grad_(False)
        vlm.model.set_attn_implementation("sdpa")


VARIANTS = {"floor": floor, "ours": ours, "published": published}


def check(case):
    """Largest difference of a token's map at the last layer, of its largest value; AssertionError
    where it is too large."""
    mine, other = ours(case), published(case)
    worst = float((np.abs(mine - other).max((1, 2)) / np.abs(other).max((1, 2))).max())
    if not worst <= TOLERANCE:
        raise AssertionError(f"relevancy differs by {worst:.1e}, more than {TOLERANCE:g}")
    return worst


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("--size", choices=["quick", "small", "7b"], default="small")
    parser.add_argument(
        "--prompt", type=int, default=620, help="about how many tokens the prompt has"
    )
    parser.add_argument("--new_tokens", type=int, default=30, help="tokens of the answer")
    parser.add_argument(
        "--memory",
        type=int,
        default=attribution.BUDGET // 2**20,
        help="MiB of one layer's maps that ours holds at once",
    )
    measuring.add_arguments(parser, VARIANTS)
    args = parser.parse_args(argv)
    if args.quick:
        args.size, args.prompt, args.repeats, args.new_tokens = "quick", 121, 1, 4
    return args


def main(argv=None):
    args = parse_args(argv)
    device, dtype = measuring.prepare(args)
    with tempfile.TemporaryDirectory() as folder:
        vlm, (sample, *_) = (
            build(args.size, args.prompt, device, Path(folder)),
            make_samples(Path(folder), 1),
        )
        batch = vlm.encode([sample], [load_image(sample.image)])
        ids = torch.randint(
            10, 200, (args.new_tokens,), generator=torch.Generator().manual_seed(0)
        ).tolist()
        case = Case(vlm, batch, ids, args.memory * 2**20)
        work = {
            name: lambda function=function: function(case) for name, function in VARIANTS.items()
        }
        if args.memory_of:
            print(json.dumps(measuring.peak_of(work[args.memory_of], work["floor"])))
            return 0
        worst = check(case)
        vlm.model.to(dtype)
        rounds = measuring.rounds_of(work, args.repeats)
        names = ("size", "prompt", "new_tokens", "memory", "threads")
        memory = measuring.peaks(
            work,
            "floor",
            __file__,
            [part for name in names for part in (f"--{name}", getattr(args, name))],
        )
    rows = measuring.summary(rounds, memory)
    report = {name: getattr(args, name) for name in (*names, "repeats")}
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

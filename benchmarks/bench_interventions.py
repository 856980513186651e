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
After llava-interp (arXiv 2410.07149), our study's sections 2.8, 2.9 and 3. Outputs are compared in
float32 before anything is timed: logits of every knockout, ids of every ablation's answers. Then
the variants alternate in one process, in reverse order every other round; ratios are medians of the
ratios within a round."""

import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks import measuring
from benchmarks.bench_diagnostics import Case, build, make_samples
from vlmdiag import cli
from vlmdiag.interp.interventions import asking, prepare, run_conditions
from vlmdiag.interp.knockout import blocks_for, knocked_out, positions_of
from vlmdiag.interp.knockout_pairs import PAPER_PAIRS, PAPER_WINDOWS, layer_windows
from vlmdiag.interp.objects import buffered, random_tokens, rng_for
from vlmdiag.model.lens import Lens
from vlmdiag.model.prefix import SharedPicture
from vlmdiag.pictures.samples import Sample, load_image

TOLERANCE = 2e-4
CONDITIONS = 18


def plan(case, description_tokens):
    """What is done to the picture: (blocks by key, sets by condition, replacement (P, d),
    prompts)."""
    vlm, sample = case.vlm, case.samples[0]
    image = load_image(sample.image)
    batch = vlm.encode([sample], [image])
    grid, count = batch.grids[0], len(batch.vision_positions(0))
    rows, columns = grid.shape
    middle = np.array(
        [(rows // 2 + a) * columns + columns // 2 + b for a in (0, 1) for b in (0, 1, 2)]
    )
    positions = positions_of(
        batch.groups[0].cpu().numpy(), grid, {b: buffered(grid, middle, b) for b in (0, 1, 2)}
    )
    blocks = blocks_for(
        positions,
        PAPER_PAIRS,
        layer_windows(list(PAPER_WINDOWS), len(vlm.parts.layers)),
        batch.input_ids.shape[1],
    )
    sets = {f"patch_{b}": buffered(grid, middle, b) for b in (0, 1, 2)}
    for n in range(CONDITIONS - 3):
        sets[f"random_{n}"] = random_tokens(
            rng_for(0, n), min(count, (5, 10, 20, 40, 60)[n % 5]), np.arange(count)
        )
    value = (
        torch.randn(vlm.parts.lm_head.weight.shape[1], generator=torch.Generator().manual_seed(0))
        * 0.02
    )
    questions = [
        (sample.question, description_tokens),
        ("Is there a red circle in this image?", min(10, description_tokens)),
    ]
    return blocks, sets, value.to(vlm.device), questions


# --- variants -------------------------------------------------------------------------------------


def pixels_and_ids(vlm, batch):
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    return inputs | {"pixel_values": batch.image_inputs["pixel_values"].to(vlm.device, vlm.dtype)}


def encode(case, question=None):
    sample = case.samples[0] if question is None else Sample("0", case.samples[0].image, question)
    return case.vlm.encode([sample], [load_image(sample.image)])


@torch.inference_mode()
def knockouts_floor(case, blocks):
    return {
        "none": (
            case.vlm.model(
                **pixels_and_ids(case.vlm, encode(case)), use_cache=False, logits_to_keep=1
            )
            .logits[0, -1]
            .float()
        )
    }


@torch.no_grad()
def knockouts_ours(case, blocks):
    vlm, lens, batch = case.vlm, Lens(case.vlm), encode(case)
    prompt = prepare(vlm, batch, vlm.vision(batch))
    return knocked_out(vlm, lens, prompt, blocks)


def one_by_one(vectorised):
    """The published knockouts: a hook on every blocked layer's attention writes False into a mask
    of its own, pair by pair (or by one index)."""

    @torch.inference_mode()
    def knockouts(case, blocks):
        vlm, logits = case.vlm, {}
        for key, block in blocks.items():
            inputs, hooks = pixels_and_ids(vlm, encode(case)), []
            pairs = [
                (int(i), int(j))
                for i in block.queries[0].nonzero()
                for j in block.keys[0].nonzero()
            ]

            def replace(module, args, kwargs, block=block, pairs=pairs):
                states = args[0] if args else kwargs["hidden_states"]
                size = states.shape[1]
                mask = torch.ones(1, 1, size, size, dtype=torch.bool, device=states.device).tril()
                if vectorised:
                    mask[0, 0] &= ~(block.queries[0][:, None] & block.keys[0][None]).to(mask.device)
                else:
                    for i, j in pairs:
                        mask[0, 0, i, j] = False
                return args, kwargs | {"attention_mask": mask}

            try:
                hooks = [
                    vlm.parts.layers[layer].self_attn.register_forward_pre_hook(
                        replace, with_kwargs=True
                    )
                    for layer in sorted(block.layers)
                ]
                logits[key] = (
                    vlm.model(**inputs, use_cache=False, logits_to_keep=1).logits[0, -1].float()
                )
            finally:
                for hook in hooks:
                    hook.remove()
        return logits

    return knockouts


@torch.inference_mode()
def ablation_floor(case, sets, value, questions):
    found = []
    for question, limit in questions:
        inputs = pixels_and_ids(case.vlm, encode(case, question))
        found.append(
            case.vlm.model.generate(**inputs, max_new_tokens=limit, do_sample=False)[
                0, inputs["input_ids"].shape[1] :
            ].tolist()
        )
    return {"none": found}


@torch.no_grad()
def ablation_ours(case, sets, value, questions):
    vlm = case.vlm
    batches = [encode(case, question) for question, _ in questions]
    features = vlm.vision(batches[0])  # once per picture
    shared = SharedPicture(vlm, batches[0])
    prompts = []
    for batch in batches:
        prompts.append(prepare(vlm, batch, features, shared))
        if len(prompts) == 1:
            shared.keep(prompts[0].cache)
    values = value.to(prompts[0].embeds).expand(len(prompts[0].positions), -1)
    asks = [asking(limit) for _, limit in questions]
    answers = run_conditions(vlm, prompts, asks, sets, values, 9)
    return {name: [answer.ids for answer in of_set] for name, of_set in answers.items()}


@torch.inference_mode()
def ablation_published(case, sets, value, questions):
    """generate() per condition and question, with a hook that overwrites the decoder's inputs in
    the prefill."""
    vlm, out = case.vlm, {}
    for name, index in sets.items():
        out[name] = []
        for question, limit in questions:
            batch = encode(case, question)
            where = batch.vision_positions(0)[torch.from_numpy(index).to(vlm.device)]

            def replace(module, args, kwargs, where=where):
                if kwargs["inputs_embeds"].shape[1] > 1:
                    kwargs["inputs_embeds"] = kwargs["inputs_embeds"].clone()
                    kwargs["inputs_embeds"][:, where] = value.to(kwargs["inputs_embeds"])
                return args, kwargs

            hook = vlm.parts.decoder.register_forward_pre_hook(replace, with_kwargs=True)
            try:
                inputs = pixels_and_ids(vlm, batch)
                out[name].append(
                    vlm.model.generate(**inputs, max_new_tokens=limit, do_sample=False)[
                        0, inputs["input_ids"].shape[1] :
                    ].tolist()
                )
            finally:
                hook.remove()
    return out


KNOCKOUTS = {
    "floor": knockouts_floor,
    "ours": knockouts_ours,
    "published": one_by_one(False),
    "vectorised": one_by_one(True),
}
ABLATIONS = {"floor": ablation_floor, "ours": ablation_ours, "published": ablation_published}


# --- measuring ------------------------------------------------------------------------------------


def check(case, blocks, arguments):
    """The largest difference of logits relative to their range; AssertionError unless all variants
    agree."""
    ours, *theirs = (KNOCKOUTS[name](case, blocks) for name in ("ours", "published", "vectorised"))
    worst = max(
        ((ours[key] - other[key]).abs().max() / other[key].abs().max()).item()
        for other in theirs
        for key in blocks
    )
    if not worst <= TOLERANCE:
        raise AssertionError(
            f"knockouts differ by {worst:.1e} of the logits' range, more than {TOLERANCE:g}"
        )
    mine, other = ABLATIONS["ours"](case, *arguments), ABLATIONS["published"](case, *arguments)
    if mine != other:
        name = next(name for name in other if mine[name] != other[name])
        raise AssertionError(f"ablated answers differ: {name}: {mine[name]}, {other[name]}")
    return worst


def measure(case, what, variants, arguments, repeats):
    """Rows of one experiment."""
    rounds = measuring.rounds_of(
        {name: partial(function, case, *arguments) for name, function in variants.items()}, repeats
    )
    return [{"experiment": what} | row for row in measuring.summary(rounds)]


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("--size", choices=["small", "7b"], default="small")
    parser.add_argument("--prompt", type=int, default=620, help="about how many prompt tokens")
    parser.add_argument(
        "--new_tokens",
        type=int,
        default=32,
        help="of a description; a yes/no answer has at most 10",
    )
    measuring.add_arguments(parser)
    args = parser.parse_args(argv)
    if args.quick:
        args.size, args.prompt, args.repeats, args.new_tokens = "quick", 121, 1, 4
    return args


def main(argv=None):
    args = parse_args(argv)
    device, dtype = measuring.prepare(args)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        case = Case(
            build(args.size, args.prompt, device, folder),
            make_samples(folder, 1),
            args.new_tokens,
            folder,
        )
        blocks, *arguments = plan(case, args.new_tokens)
        worst = check(case, blocks, arguments)
        case.vlm.model.to(dtype)
        rows = measure(case, f"{len(blocks)} knockouts", KNOCKOUTS, [blocks], args.repeats)
        rows += measure(case, f"{CONDITIONS} ablations", ABLATIONS, arguments, args.repeats)
    report = {
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
    return measuring.finish(
        report, [equal, measuring.table(rows, "picture", ("experiment",))], args.out
    )


if __name__ == "__main__":
    cli.run(main)

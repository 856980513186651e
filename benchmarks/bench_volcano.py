"""What does one round of the critique loop with measured attention cost, and what did the published
capture cost?

    python benchmarks/bench_volcano.py --out bench_volcano.json      # 12 layers x 512 on a CPU
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
               step and layer the picture's columns are taken to the
               CPU, (T, L, H, P), then pooled by top-3 over layers and heads
After Volcano (arXiv 2311.07362), our study's sections 2.2 and 4.1. First, in float32, ids of all
answers and the pooled attention are compared. Then the variants alternate in one process; extra
memory is a variant's peak minus the floor's, on a CPU each in a process of its own.
"""

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks import measuring
from benchmarks.bench_diagnostics import Case, build, make_samples
from vlmdiag import cli
from vlmdiag.model.vision import embeddings
from vlmdiag.pictures.samples import Sample, load_image
from vlmdiag.scenes.questions import critique_prompt, decide_prompt, revise_prompt
from vlmdiag.volcano.conversation import Asker
from vlmdiag.volcano.maps import pool_heads, pool_layers

DECISION = 8  # tokens
TOLERANCE = 1e-4


def top(case):
    """The published 3, or what a very small model has."""
    return min(
        3, len(case.vlm.parts.layers), case.vlm.model.config.get_text_config().num_attention_heads
    )


def prompts_of(question, answers):
    """The next prompt's text, given the answers so far; None when the round is over."""
    makers = (
        lambda: question,
        lambda: critique_prompt(question, answers[0]),
        lambda: revise_prompt(question, answers[0], answers[1]),
        lambda: decide_prompt(question, answers[0], answers[2]),
    )
    return makers[len(answers)]() if len(answers) < 4 else None


@torch.inference_mode()
def ours(case):
    """[(ids of the four answers, pooled attention of the first three), ...] of every instance, as
    one batch."""
    args = argparse.Namespace(
        hidden_top_k=top(case),
        full_tensors=False,
        sample=False,
        temperature=1.0,
        seed=0,
        max_new_tokens=case.new_tokens,
    )
    ask = Asker(args, case.vlm, case.samples, [load_image(sample.image) for sample in case.samples])
    answers, rows = [[] for _ in case.samples], list(range(len(case.samples)))
    for stage in ("initial", "feedback", "revision", "decide"):
        args.max_new_tokens = DECISION if stage == "decide" else case.new_tokens
        texts = [
            prompts_of(sample.question, [one.text for one in own])
            for sample, own in zip(case.samples, answers, strict=True)
        ]
        for own, one in zip(answers, ask(rows, texts, stage, stage != "decide"), strict=True):
            own.append(one)
    return [
        (
            [one.ids for one in own],
            [pool_heads(one.attention["topk"], top(case)) for one in own[:3]],
        )
        for own in answers
    ]


def one_by_one(eager):
    @torch.inference_mode()
    def work(case):
        vlm, out = case.vlm, []
        for sample in case.samples:
            image, features, texts, ids, pooled = load_image(sample.image), None, [], [], []
            while (text := prompts_of(sample.question, texts)) is not None:
                batch = vlm.encode([Sample("0", None, text)], [image])
                features = vlm.vision(batch) if features is None else features
                measured = eager and len(texts) < 3
                limit = case.new_tokens if len(texts) < 3 else DECISION
                vlm.parts.decoder.set_attn_implementation("eager" if measured else "sdpa")
                try:
                    found = vlm.model.generate(
                        inputs_embeds=embeddings(vlm, batch, features),
                        attention_mask=batch.attention_mask,
                        max_new_tokens=limit,
                        do_sample=False,
                        output_attentions=measured,
                        return_dict_in_generate=True,
                    )
                finally:
                    vlm.parts.decoder.set_attn_implementation("sdpa")
                own = found.sequences[0].tolist()
                ids.append(own)
                texts.append(vlm.tokenizer.decode(own, skip_special_tokens=True).strip())
                if measured:
                    pooled.append(gathered(found.attentions, batch.groups[0] == 2, top(case)))
            out.append((ids, pooled))
        return out

    return work


def gathered(attentions, image, k):
    """c (T, P) from all maps: of each step and layer the last row's image columns to the CPU, then
    both top-k means."""
    count = len(attentions)
    first = attentions[0]
    whole = torch.zeros(count, len(first), first[0].shape[1], int(image.sum()))
    for step, maps in enumerate(attentions):
        mask = torch.cat(
            [image.cpu(), torch.zeros(maps[0].shape[-1] - len(image), dtype=torch.bool)]
        )
        for layer, one in enumerate(maps):
            whole[step, layer] = one[0, :, -1][:, mask.to(one.device)].float().cpu()
    return pool_heads(pool_layers(whole.numpy(), k), k)


VARIANTS = {"floor": one_by_one(False), "ours": ours, "published": one_by_one(True)}


def check(case):
    """Largest difference of the pooled attention; AssertionError unless all agree."""
    results = {name: function(case) for name, function in VARIANTS.items()}
    worst = 0.0
    for mine, other, plain in zip(
        results["ours"], results["published"], results["floor"], strict=True
    ):
        if not mine[0] == other[0] == plain[0]:
            raise AssertionError(
                f"other answers: ours {mine[0]}, published {other[0]}, floor {plain[0]}"
            )
        worst = max(
            [worst, *(float(np.abs(a - b).max()) for a, b in zip(mine[1], other[1], strict=True))]
        )
    if not worst <= TOLERANCE:
        raise AssertionError(f"pooled attention differs by {worst:.1e}, more than {TOLERANCE:g}")
    return worst


# --- measuring ------------------------------------------------------------------------------------


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("--size", choices=["quick", "small", "7b"], default="small")
    parser.add_argument(
        "--prompt", type=int, default=620, help="about how many tokens the question's prompt has"
    )
    parser.add_argument(
        "--batch",
        type=int,
        nargs="+",
        default=[1, 4],
        help="instances in a batch; the published capture takes them one by one",
    )
    parser.add_argument("--new_tokens", type=int, default=32)
    measuring.add_arguments(parser, VARIANTS)
    args = parser.parse_args(argv)
    if args.quick:
        args.size, args.prompt, args.repeats, args.new_tokens, args.batch = "quick", 121, 1, 4, [2]
    return args


def main(argv=None):
    args = parse_args(argv)
    device, dtype = measuring.prepare(args)
    rows, worst = [], 0.0
    with tempfile.TemporaryDirectory() as scratch:
        for batch in args.batch:
            folder = Path(tempfile.mkdtemp(dir=scratch))
            case = Case(
                build(args.size, args.prompt, device, folder),
                make_samples(folder, batch),
                args.new_tokens,
                folder,
            )
            work = {name: partial(function, case) for name, function in VARIANTS.items()}
            if args.memory_of:
                print(json.dumps(measuring.peak_of(work[args.memory_of], work["floor"])))
                return 0
            worst = max(worst, check(case))
            case.vlm.model.to(dtype)
            rounds = measuring.rounds_of(work, args.repeats)
            flags = (
                f"--size {args.size} --prompt {args.prompt} --batch {batch} --new_tokens"
                f" {args.new_tokens} --threads {args.threads}"
            )
            memory = measuring.peaks(work, "floor", __file__, flags.split())
            rows += [
                {"batch": batch} | row for row in measuring.summary(rounds, memory, count=batch)
            ]
    report = {
        "size": args.size,
        "prompt": args.prompt,
        "new_tokens": args.new_tokens,
        "repeats": args.repeats,
        "machine": measuring.machine(),
        "rows": rows,
    }
    equal = f"equal outputs: all answers, pooled attention within {worst:.1e}\n"
    return measuring.finish(
        report, [equal, measuring.table(rows, "instance", ("batch",))], args.out
    )


if __name__ == "__main__":
    cli.run(main)

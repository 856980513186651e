"""What does one round of the critique loop with measured attention cost, and what did the published capture cost?

    python benchmarks/bench_volcano.py --out bench_volcano.json      # 12 layers x 512 on a CPU
    python benchmarks/bench_volcano.py --size 7b                     # LLaVA-7B shapes in bfloat16, needs a GPU
    python benchmarks/bench_volcano.py --quick                       # a very small shape, only to see that it runs

The same random LLaVA, pictures and prompts for all: initial answer, critique, revision (each --new_tokens long) and decision (8 tokens), one round:
    floor      generate() of transformers with SDPA for each prompt, picture features computed once; nothing is measured
    ours       the script's own Asker: keys and values of the picture shared by all prompts, attention reduced inside the pass, instances batched
    published  one instance at a time, generate() on eager attention that returns all maps; of each step and layer the picture's columns are taken to the
               CPU, (T, L, H, P), then pooled by top-3 over layers and heads
After Volcano (arXiv 2311.07362), our study's sections 2.2 and 4.1. First, in float32, ids of all answers and the pooled attention are compared. Then the
variants alternate in one process; extra memory is a variant's peak minus the floor's, on a CPU each in a process of its own."""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from bench_diagnostics import Case, build, machine, make_samples

import cli
from capturing import embeddings
from data.questions import critique_prompt, decide_prompt, revise_prompt
from samples import Sample, load_image
from visualize.conversation import Asker
from visualize.maps import pool_heads, pool_layers

DECISION = 8  # tokens
TOLERANCE = 1e-4


def top(case):
    """The published 3, or what a very small model has."""
    return min(3, len(case.vlm.parts.layers), case.vlm.model.config.get_text_config().num_attention_heads)


def prompts_of(question, answers):
    """The next prompt's text, given the answers so far; None when the round is over."""
    makers = (
        lambda: question, lambda: critique_prompt(question, answers[0]), lambda: revise_prompt(question, answers[0], answers[1]),
        lambda: decide_prompt(question, answers[0], answers[2]),
    )  # fmt: skip
    return makers[len(answers)]() if len(answers) < 4 else None


@torch.inference_mode()
def ours(case):
    """[(ids of the four answers, pooled attention of the first three), ...] of every instance, as one batch."""
    args = argparse.Namespace(hidden_top_k=top(case), full_tensors=False, sample=False, temperature=1.0, seed=0, max_new_tokens=case.new_tokens)
    ask = Asker(args, case.vlm, case.samples, [load_image(sample.image) for sample in case.samples])
    answers, rows = [[] for _ in case.samples], list(range(len(case.samples)))
    for stage in ("initial", "feedback", "revision", "decide"):
        args.max_new_tokens = DECISION if stage == "decide" else case.new_tokens
        texts = [prompts_of(sample.question, [one.text for one in own]) for sample, own in zip(case.samples, answers, strict=True)]
        for own, one in zip(answers, ask(rows, texts, stage, stage != "decide"), strict=True):
            own.append(one)
    return [([one.ids for one in own], [pool_heads(one.attention["topk"], top(case)) for one in own[:3]]) for own in answers]


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
                        inputs_embeds=embeddings(vlm, batch, features), attention_mask=batch.attention_mask, max_new_tokens=limit, do_sample=False,
                        output_attentions=measured, return_dict_in_generate=True,
                    )  # fmt: skip
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
    """c (T, P) from all maps: of each step and layer the last row's image columns to the CPU, then both top-k means."""
    count = len(attentions)
    first = attentions[0]
    whole = torch.zeros(count, len(first), first[0].shape[1], int(image.sum()))
    for step, maps in enumerate(attentions):
        mask = torch.cat([image.cpu(), torch.zeros(maps[0].shape[-1] - len(image), dtype=torch.bool)])
        for layer, one in enumerate(maps):
            whole[step, layer] = one[0, :, -1][:, mask.to(one.device)].float().cpu()
    return pool_heads(pool_layers(whole.numpy(), k), k)


VARIANTS = {"floor": one_by_one(False), "ours": ours, "published": one_by_one(True)}


def check(case):
    """Largest difference of the pooled attention; AssertionError unless all agree."""
    results = {name: function(case) for name, function in VARIANTS.items()}
    worst = 0.0
    for mine, other, plain in zip(results["ours"], results["published"], results["floor"], strict=True):
        if not mine[0] == other[0] == plain[0]:
            raise AssertionError(f"other answers: ours {mine[0]}, published {other[0]}, floor {plain[0]}")
        worst = max([worst, *(float(np.abs(a - b).max()) for a, b in zip(mine[1], other[1], strict=True))])
    if not worst <= TOLERANCE:
        raise AssertionError(f"pooled attention differs by {worst:.1e}, more than {TOLERANCE:g}")
    return worst


# --- measuring ----------------------------------------------------------------------------------------------------------------


def seconds_of(case, name):
    wait = torch.cuda.synchronize if case.vlm.device.type == "cuda" else lambda: None
    gc.collect()
    wait()
    start = time.perf_counter()
    VARIANTS[name](case)
    wait()
    return (time.perf_counter() - start) / len(case.samples)


def peak_of(case, name):
    """MiB above what was held before, after one run of the floor; None where it cannot be read."""
    VARIANTS["floor"](case)
    gc.collect()
    if case.vlm.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        VARIANTS[name](case)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not (status.exists() and os.access(reset, os.W_OK)):
        return None
    held = lambda field: int(status.read_text().split(f"{field}:")[1].split()[0]) / 2**10
    reset.write_text("5")
    before = held("VmRSS")
    VARIANTS[name](case)
    return held("VmHWM") - before


def peaks(args, case, batch):
    if case.vlm.device.type == "cuda":
        return {name: peak_of(case, name) for name in VARIANTS}
    flags = f"--size {args.size} --prompt {args.prompt} --batch {batch} --new_tokens {args.new_tokens} --threads {args.threads} --memory_of"
    environment = os.environ | {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    found = {}
    for name in VARIANTS:
        done = subprocess.run([sys.executable, __file__, *flags.split(), name], stdout=subprocess.PIPE, text=True, env=environment, check=True)
        found[name] = json.loads(done.stdout)
    return found


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("--size", choices=["quick", "small", "7b"], default="small")
    parser.add_argument("--prompt", type=int, default=620, help="about how many tokens the question's prompt has")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4], help="instances in a batch; the published capture takes them one by one")
    parser.add_argument("--new_tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds, after one that is not counted")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of PyTorch")
    parser.add_argument("--quick", action="store_true", help="a very small shape; figures without meaning")
    parser.add_argument("--out", default=None, help="JSON file with everything")
    parser.add_argument("--memory_of", choices=list(VARIANTS), default=None, help="print only this variant's peak in MiB (the benchmark calls itself so)")
    args = parser.parse_args(argv)
    if args.quick:
        args.size, args.prompt, args.repeats, args.new_tokens, args.batch = "quick", 121, 1, 4, [2]
    return args


def main(argv=None):
    args = parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.size == "7b" and device == "cpu":
        raise cli.UsageError("--size 7b needs a GPU, and none is visible here; use --size small")
    torch.set_num_threads(args.threads)
    rows, worst = [], 0.0
    with tempfile.TemporaryDirectory() as scratch:
        for batch in args.batch:
            folder = Path(tempfile.mkdtemp(dir=scratch))
            case = Case(build(args.size, args.prompt, device, folder), make_samples(folder, batch), args.new_tokens, folder)
            if args.memory_of:
                print(json.dumps(peak_of(case, args.memory_of)))
                return 0
            worst = max(worst, check(case))
            case.vlm.model.to(torch.bfloat16 if args.size == "7b" else torch.float32)
            for name in VARIANTS:
                seconds_of(case, name)
            rounds = [{name: seconds_of(case, name) for name in list(VARIANTS)[:: -1 if i % 2 else 1]} for i in range(args.repeats)]
            memory = peaks(args, case, batch)
            for name in VARIANTS:
                times = [each[name] for each in rounds]
                row = {"batch": batch, "variant": name, "seconds": times, "median_seconds": float(np.median(times)), "peak_mib": memory[name]}
                row["extra_mib"] = None if memory[name] is None else memory[name] - memory["floor"]
                row["x_floor"] = float(np.median([each[name] / each["floor"] for each in rounds]))
                rows.append(row | {"published_to_this": float(np.median([each["published"] / each[name] for each in rounds]))})
    report = {"size": args.size, "prompt": args.prompt, "new_tokens": args.new_tokens, "repeats": args.repeats, "machine": machine(), "rows": rows}
    print(*(f"{name}: {report[name]}" for name in ("size", "prompt", "new_tokens", "repeats", "machine")), sep="\n")
    print(f"equal outputs: all answers, pooled attention within {worst:.1e}\n")
    print("| batch | variant | s per instance: median (min-max) | x floor | published / this | extra MiB |\n|---|---|---|---|---|---|")
    for row in rows:
        spread = f"{row['median_seconds']:.2f} ({min(row['seconds']):.2f}-{max(row['seconds']):.2f})"
        extra = "not measured" if row["extra_mib"] is None else f"{row['extra_mib']:.1f}"
        print(f"| {row['batch']} | {row['variant']} | {spread} | {row['x_floor']:.2f} | {row['published_to_this']:.2f} | {extra} |")
    if args.out:
        Path(args.out).write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    cli.run(main)

"""What do the hidden states of a swap pair, and of a pair with its quad, cost, and what did the published extraction cost?

    python benchmarks/bench_swap.py --threads 1 --out bench_swap.json      # 12 layers x 512 on a CPU, batch 1 and 8
    python benchmarks/bench_swap.py --size 7b --out bench_swap_7b.json     # LLaVA-7B shapes in bfloat16, needs a GPU
    python benchmarks/bench_swap.py --quick                                # a very small shape, only to see that it runs

The same random LLaVA and table (a JPEG in base64 per row) for all, from the table's row to the states of all layers at the last prompt token and the answers:
    floor      generate() of transformers with SDPA, the batch's pictures with one question after the other, at most 8 tokens; nothing is kept
    ours       swap_analysis.py's own process() through engine.run_items, with states.npy and one record per pair, flushed to the disk
    published  one query at a time: picture decoded, processed and through the tower each time; a forward hook on every layer copies the prefill's last
               position to the CPU in float32; generate() with its default attention, greedy, 20 tokens; nothing is written. As a pair's time does not depend
               on the batch, the first two pairs of a batch stand for all
After Why Far Looks Up (arXiv 2605.30161), our study's sections 1.6, 1.7, 4 and 5.1. `pair`: original and swapped question. `pair + quad`: two further questions
about height; the published quad is four queries that repeat the pair's two, so six in all, and the floor asks four.

Two kinds of answer, planted in a few rows of embeddings and LM head, for all variants alike (a random model answers nothing and never ends):
    ends       one word, then EOS, as a trained model answers "with only one word": every variant stops there by itself
    goes on    the word, a full stop and then whatever comes, without EOS: floor and published run to their limits, ours ends with the sentence
First, in float32, states of all layers and the answers as each procedure reads them are compared. Then the variants alternate in one process, in reverse order
every other round; ratios are medians of the ratios within a round, on a CPU also of the process's CPU time, which other work on the machine hardly moves.
Extra memory: a variant's peak minus the floor's, on a CPU each in a process of its own."""

import base64
import contextlib
import gc
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from bench_diagnostics import SHAPE, SIZES, build, machine, make_samples, script
from PIL import Image

import cli
import engine
import rundirs
from capturing import answer_ids
from common import VLM, prompt_for
from samples import Sample

pairs = script("swap_analysis/pairs.py")
states = script("swap_analysis/states.py")

TOLERANCE = 1e-4  # of the largest state of a layer
PUBLISHED_TOKENS, PUBLISHED_PAIRS, TOKENS, WORD = 20, 2, 8, "far"
NAMES = ("red circle", "blue square")
WORK, ANSWERS = ("pair", "pair + quad"), ("ends", "goes on")
# per category, in the order of our study's 1.6: the word and what counts for it
SUBSTRINGS = {"far": ("far", "distant"), "close": ("close", "near", "nearby")}


@dataclass
class Case:
    vlm: VLM
    table: Path
    items: list
    quads: list
    folder: Path
    answer_by: object  # (one of ANSWERS): from now on the model answers so


def make_case(size, prompt, batch, device, folder):
    """A random LLaVA with planted answers, and a table of `batch` distance pairs with their quads."""
    vlm = build(size, prompt, device, folder)
    table = folder / "pairs.tsv"
    columns = ("index", "question_id", "group", "category", "original_question", "swapped_question", "original_answer", "swapped_answer", "image_base64")
    questions = [pairs.question_about("distance", *names) for names in (NAMES, NAMES[::-1])]
    lines = ["\t".join(columns)]
    for sample in make_samples(folder, batch):
        lines.append("\t".join([sample.id, sample.id, "distance", "far", *questions, "far", "close", base64.b64encode(sample.image.read_bytes()).decode()]))
    table.write_text("\n".join(lines) + "\n")
    found, _ = pairs.read_pairs(table, limit=0)
    boxes = {pair["question_id"]: [(NAMES[0], (100, 20, 40, 40)), (NAMES[1], (300, 300, 90, 90))] for pair in found}
    quads, _ = pairs.place(found, boxes, {pair["id"]: 480 for pair in found})
    items = [SimpleNamespace(pair=pair, row=row, id=pair["id"]) for row, pair in enumerate(found)]
    return Case(vlm, table, items, [quad | {"row": row} for row, quad in enumerate(quads)], folder, plant(vlm))


@torch.inference_mode()
def plant(vlm):
    """Make the word follow the prompt's last token, and EOS or a full stop the word: both tokens get a direction of their own in the residual stream, as
    long as the rest of it, which their follower's row of the LM head reads. Returns answer_by(one of ANSWERS)."""
    ids = vlm.tokenizer("USER: Is it far? ASSISTANT:", return_tensors="pt").input_ids.to(vlm.device)
    table, head = vlm.model.get_input_embeddings().weight, vlm.parts.lm_head.weight
    hidden = vlm.parts.decoder(inputs_embeds=table[ids], output_hidden_states=True).hidden_states[-2]
    word, stop = answer_ids(vlm, "ASSISTANT:", f"{WORD}.")[:2]
    last, after = torch.linalg.qr(torch.randn(hidden.shape[-1], 2, generator=torch.Generator().manual_seed(1)))[0].T.to(table)
    table[ids[0, -1]] += last * hidden[0, -1].norm()
    table[word] += after * hidden[0, -1].norm()
    head[word] = last

    @torch.inference_mode()
    def answer_by(answer):
        for token, kind in ((min(vlm.eos_ids), "ends"), (stop, "goes on")):
            head[token] = after.to(head) if kind == answer else 0

    return answer_by


# --- variants: variant(case, quad) -> (states by pair (n, 2, L, d), states by quad (n, 4, L, d) or None, read answers by pair) ------------------------


@torch.inference_mode()
def floor(case, quad):
    for way in range(4 if quad else 2):
        batch = encode(case, case.items, way)
        pixels = batch.image_inputs["pixel_values"].to(case.vlm.device, case.vlm.dtype)
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "pixel_values": pixels}
        found = case.vlm.model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
        case.vlm.tokenizer.batch_decode(found[:, batch.input_ids.shape[1] :], skip_special_tokens=True)


def encode(case, items, way=0):
    """A question about each picture: original, swapped, and the quad's vertical two."""
    load = states.load_picture(case.table)
    questions = [[*item.pair["questions"], *case.quads[item.row]["questions"]][way] for item in items]
    return case.vlm.encode([Sample(str(i), None, question) for i, question in enumerate(questions)], [load(item)[1] for item in items])


def ours(case, quad):
    run = rundirs.open_run(tempfile.mkdtemp(dir=case.folder), "swap_analysis", {})
    count, layers = len(case.items), list(range(len(case.vlm.parts.layers)))
    shape = (len(layers), case.vlm.model.get_input_embeddings().weight.shape[1])
    kept = states.open_states(run.path / "states.npy", (count, 2, *shape), "float32")
    quad_kept = states.open_states(run.path / "quad_states.npy", (count, 4, *shape), "float32") if quad else None
    quad_of = {one["id"]: one for one in case.quads} if quad else {}
    process = states.make_process(case.vlm, layers, kept, quad_kept, quad_of, TOKENS)
    with contextlib.redirect_stdout(io.StringIO()):
        counts = engine.run_items(run, case.items, states.load_picture(case.table), process, count, num_workers=2)
    if counts["done"] != count:
        raise RuntimeError(f"pairs failed: {run.failed()}")
    return kept, quad_kept, [(record["pred_orig"], record["pred_swap"]) for record in run.records()]


@torch.inference_mode()
def published(case, quad):
    vlm, kept, quad_kept, texts = case.vlm, [], [], []
    with open(case.table, encoding="utf-8") as file:  # the whole table with its pictures stays in memory
        columns = file.readline().rstrip("\n").split("\t")
        rows = [dict(zip(columns, line.rstrip("\n").split("\t"), strict=True)) for line in file]

    def query(picture, question):
        image, found = Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB"), {}
        inputs = vlm.processor(images=image, text=prompt_for(vlm, question)[0], return_tensors="pt").to(vlm.device, vlm.dtype)

        def keep(layer):
            def hook(module, args, output):
                hidden = output[0] if isinstance(output, tuple) else output
                if hidden.shape[1] > 1:
                    found[layer] = hidden[:, -1, :].detach().cpu().float().squeeze(0)

            return hook

        hooks = [layer.register_forward_hook(keep(i)) for i, layer in enumerate(vlm.parts.layers)]
        try:
            ids = vlm.model.generate(**inputs, max_new_tokens=PUBLISHED_TOKENS, do_sample=False)
        finally:
            for hook in hooks:
                hook.remove()
        text = vlm.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        return torch.stack([found[layer] for layer in sorted(found)]).numpy(), text

    for row in rows[:PUBLISHED_PAIRS]:
        found = [query(row["image_base64"], row[name]) for name in ("original_question", "swapped_question")]
        kept.append([one for one, _ in found])
        texts.append(tuple(text for _, text in found))
    for one in case.quads[:PUBLISHED_PAIRS] if quad else ():
        row = rows[one["row"]]
        again = (row["original_question"], row["swapped_question"])
        quad_kept.append([query(row["image_base64"], question)[0] for question in (*one["questions"], *again)])
    return np.array(kept), np.array(quad_kept) if quad else None, texts


VARIANTS = {"floor": floor, "ours": ours, "published": published}


# --- equal outputs ------------------------------------------------------------------------------------------------------------


def contains(text, category):
    """Whether the published check calls an answer right: the expected word or a synonym occurs, before any of the opposite. Plain substrings."""
    first = {name: min([at for at in map(text.lower().find, SUBSTRINGS[name]) if at >= 0], default=-1) for name in (category, pairs.OPPOSITE[category])}
    wanted, other = first[category], first[pairs.OPPOSITE[category]]
    return wanted >= 0 and (other < 0 or wanted < other)


def check(case, answer):
    """The largest difference of a layer's states, relative to the layer's largest; AssertionError unless states and read answers agree."""
    (kept, quad_kept, mine), (wanted, quad_wanted, theirs) = ours(case, True), published(case, True)
    worst = 0.0
    for what, found, other in (("states", kept, wanted), ("quad states", quad_kept, quad_wanted)):
        found = found[: len(other)]
        gap = np.abs(found - other).max((0, 1, 3)) / np.abs(other).max((0, 1, 3))  # by layer
        if found.shape != other.shape or not gap.max() <= TOLERANCE:  # a NaN is not <= either
            raise AssertionError(f"{what} differ by {gap.max():.1e} in layer {gap.argmax()}, more than {TOLERANCE:g}")
        worst = max(worst, float(gap.max()))
    for own, other in zip(mine, theirs, strict=False):
        read = [[(pairs.read_answer(text, "far")[0], contains(text, want)) for text, want in zip(both, ("far", "close"))] for both in (own, other)]
        if read[0] != read[1] or read[0][0] != (WORD, True):
            raise AssertionError(f"other answers: ours {own} read as {read[0]}, published {other} read as {read[1]}; planted {WORD!r}")
        if (other[0] == WORD) != (answer == "ends"):
            raise AssertionError(f"the published answer {other[0]!r} was to {'end after a word' if answer == 'ends' else 'go on'}")
    return worst


# --- measuring ----------------------------------------------------------------------------------------------------------------


def seconds_of(case, name, quad):
    """(wall time, CPU time of this process or None beside a GPU) per pair."""
    on_gpu = case.vlm.device.type == "cuda"
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    gc.collect()
    wait()
    start, busy = time.perf_counter(), time.process_time()
    VARIANTS[name](case, quad)
    wait()
    count = min(len(case.items), PUBLISHED_PAIRS) if name == "published" else len(case.items)
    return (time.perf_counter() - start) / count, None if on_gpu else (time.process_time() - busy) / count


def peak_of(case, name, quad):
    """MiB above what was held before, after one run of the floor; None where it cannot be read."""
    VARIANTS["floor"](case, quad)
    gc.collect()
    if case.vlm.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        VARIANTS[name](case, quad)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not (status.exists() and os.access(reset, os.W_OK)):
        return None
    held = lambda field: int(status.read_text().split(f"{field}:")[1].split()[0]) / 2**10
    reset.write_text("5")
    before = held("VmRSS")
    VARIANTS[name](case, quad)
    return held("VmHWM") - before


def peaks_of(case, name):
    """{work: MiB} of answers that go on, the longer ones."""
    case.answer_by("goes on")
    return {work: peak_of(case, name, work == WORK[1]) for work in WORK}


def peaks(args, case, batch):
    """{variant: {work: MiB}}; on a CPU each variant in a process whose allocator gives freed blocks back at once."""
    if case.vlm.device.type == "cuda":
        return {name: peaks_of(case, name) for name in VARIANTS}
    command = [sys.executable, __file__, *f"--size {args.size} --prompt {args.prompt} --batch {batch} --threads {args.threads} --memory_of".split()]
    environment = os.environ | {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    found = {name: subprocess.run([*command, name], stdout=subprocess.PIPE, text=True, env=environment, check=True).stdout for name in VARIANTS}
    return {name: json.loads(text) for name, text in found.items()}


def measure(args, case, shared, memory):
    """One row per kind of work and variant. memory {variant: {work: MiB}}."""
    rows = []
    for work in WORK:
        quad = work == WORK[1]
        for name in VARIANTS:
            seconds_of(case, name, quad)
        rounds = [{name: seconds_of(case, name, quad) for name in list(VARIANTS)[:: -1 if i % 2 else 1]} for i in range(args.repeats)]
        for name in VARIANTS:
            row = shared | {"work": work, "variant": name, "peak_mib": memory[name][work]}
            row["extra_mib"] = None if row["peak_mib"] is None else row["peak_mib"] - memory["floor"][work]
            for k, what in enumerate(("seconds", "cpu_seconds")):
                measured = rounds[0][name][k] is not None
                times = [each[name][k] for each in rounds] if measured else None
                row |= {what: times, f"median_{what}": float(np.median(times)) if measured else None}
                for ratio, over, under in (("to_floor", name, "floor"), ("published_to_this", "published", name)):
                    row[f"{what}_{ratio}"] = float(np.median([each[over][k] / each[under][k] for each in rounds])) if measured else None
            rows.append(row)
    return rows


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--prompt", type=int, default=620, help="about how many tokens the prompt of a short question has")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="pairs in a batch; the published extraction takes one query at a time")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds, after one that is not counted")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of PyTorch")
    parser.add_argument("--quick", action="store_true", help="a very small shape; figures without meaning")
    parser.add_argument("--out", default=None, help="JSON file with everything")
    parser.add_argument("--memory_of", choices=list(VARIANTS), default=None, help="print only this variant's peak in MiB (the benchmark calls itself so)")
    args = parser.parse_args(argv)
    if args.quick:
        args.size, args.prompt, args.repeats, args.batch = "quick", 121, 1, [2]
    return args


def main(argv=None):
    args = parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.size == "7b" and device == "cpu":
        raise cli.UsageError("--size 7b needs a GPU, and none is visible here; use --size small")
    torch.set_num_threads(args.threads)
    dtype, rows, worst = torch.bfloat16 if args.size == "7b" else torch.float32, [], 0.0
    with tempfile.TemporaryDirectory() as scratch:
        for batch in args.batch:
            folder = Path(tempfile.mkdtemp(dir=scratch))
            case = make_case(args.size, args.prompt, batch, device, folder)
            if args.memory_of:
                print(json.dumps(peaks_of(case, args.memory_of)))
                return 0
            for answer in ANSWERS:
                case.answer_by(answer)
                worst = max(worst, check(case, answer))
            case.vlm.model.to(dtype)
            length, memory = encode(case, case.items[:1]).lengths[0], peaks(args, case, batch)
            for answer in ANSWERS:
                case.answer_by(answer)
                rows += measure(args, case, {"batch": batch, "answer": answer}, memory)
    report = {"size": args.size, "decoder": dict(zip(SHAPE, SIZES[args.size][0])), "dtype": str(dtype).removeprefix("torch."), "prompt_tokens": length}
    report |= {"repeats": args.repeats, "machine": machine(), "tolerance": TOLERANCE, "worst": worst, "rows": rows}
    print(*(f"{name}: {report[name]}" for name in ("size", "decoder", "dtype", "prompt_tokens", "repeats", "machine")), sep="\n")
    print(f"equal outputs: all read answers, states of all layers within {worst:.1e} of a layer's largest\n")
    print("| batch | answer | work | variant | s per pair: median (min-max) | x floor | published / this | CPU s | published / this, CPU | extra MiB |")
    print("|---" * 10 + "|")
    for row in rows:
        told = lambda key, digits, row=row: "not measured" if row[key] is None else f"{row[key]:.{digits}f}"
        spread = f"{row['median_seconds']:.3f} ({min(row['seconds']):.3f}-{max(row['seconds']):.3f})"
        parts = [str(row[key]) for key in ("batch", "answer", "work", "variant")] + [spread, told("seconds_to_floor", 2), told("seconds_published_to_this", 2)]
        parts += [told("median_cpu_seconds", 3), told("cpu_seconds_published_to_this", 2), told("extra_mib", 1)]
        print(f"| {' | '.join(parts)} |")
    if args.out:
        Path(args.out).write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    cli.run(main)

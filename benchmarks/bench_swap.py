"""What do the hidden states of a swap pair, and of a pair with its quad, cost, and what did the
published extraction cost?

    # 12 layers x 512 on a CPU, batch 1 and 8
    python benchmarks/bench_swap.py --threads 1 --out bench_swap.json
    # LLaVA-7B shapes in bfloat16, needs a GPU
    python benchmarks/bench_swap.py --size 7b --out bench_swap_7b.json
    # a very small shape, only to see that it runs
    python benchmarks/bench_swap.py --quick

The same random LLaVA and table (a JPEG in base64 per row) for all, from the table's row to the
states of all layers at the last prompt token and the answers:
    floor      generate() of transformers with SDPA, the batch's pictures with one question after
               the other, at most 8 tokens; nothing is kept
    ours       swap_analysis.py's own process() through engine.run_items, with states.npy and one
               record per pair, flushed to the disk
    published  one query at a time: picture decoded, processed and through the tower each time; a
               forward hook on every layer copies the prefill's last
               position to the CPU in float32; generate() with its default attention, greedy, 20
               tokens; nothing is written. As a pair's time does not depend on the batch, the first
               two pairs of a batch stand for all
After Why Far Looks Up (arXiv 2605.30161); docs/studies/swap_analysis.md, sections 1.6, 1.7, 4
and 5.1. `pair`: original and swapped question. `pair + quad`: two further questions about height;
the published quad is four queries that repeat the pair's two, so six in all, and the floor asks
four.

Two kinds of answer, planted in a few rows of embeddings and LM head, for all variants alike (a
random model answers nothing and never ends):
    ends       one word, then EOS, as a trained model answers "with only one word": every variant
               stops there by itself
    goes on    the word, a full stop and then whatever comes, without EOS: floor and published run
               to their limits, ours ends with the sentence
First, in float32, states of all layers and the answers as each procedure reads them are compared.
Then the variants alternate in one process, in reverse order every other round; ratios are medians
of the ratios within a round, on a CPU also of the process's CPU time, which other work on the
machine hardly moves. Extra memory: a variant's peak minus the floor's, on a CPU each in a process
of its own."""

import base64
import contextlib
import io
import json
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

from benchmarks import measuring
from benchmarks.bench_diagnostics import SHAPE, SIZES, build, make_samples
from common import VLM
from vlmdiag import cli
from vlmdiag.model.decoding import answer_ids
from vlmdiag.model.prompts import prompt_for
from vlmdiag.pictures.samples import Sample
from vlmdiag.runs import engine, rundirs
from vlmdiag.swap import pairs, states
from vlmdiag.swap.relations import OPPOSITE

TOLERANCE = 1e-4  # of the largest state of a layer
PUBLISHED_TOKENS, PUBLISHED_PAIRS, TOKENS, WORD = 20, 2, 8, "far"
NAMES = ("red circle", "blue square")
WORK, ANSWERS = ("pair", "pair + quad"), ("ends", "goes on")
# per category, in the order of docs/studies/swap_analysis.md, section 1.6: the word and what
# counts for it
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
    """A random LLaVA with planted answers, and a table of `batch` distance pairs with their
    quads."""
    vlm = build(size, prompt, device, folder)
    table = folder / "pairs.tsv"
    columns = (
        "index",
        "question_id",
        "group",
        "category",
        "original_question",
        "swapped_question",
        "original_answer",
        "swapped_answer",
        "image_base64",
    )
    questions = [pairs.question_about("distance", *names) for names in (NAMES, NAMES[::-1])]
    lines = ["\t".join(columns)]
    for sample in make_samples(folder, batch):
        lines.append(
            "\t".join(
                [
                    sample.id,
                    sample.id,
                    "distance",
                    "far",
                    *questions,
                    "far",
                    "close",
                    base64.b64encode(sample.image.read_bytes()).decode(),
                ]
            )
        )
    table.write_text("\n".join(lines) + "\n")
    found, _ = pairs.read_pairs(table, limit=0)
    boxes = {
        pair["question_id"]: [(NAMES[0], (100, 20, 40, 40)), (NAMES[1], (300, 300, 90, 90))]
        for pair in found
    }
    quads, _ = pairs.place(found, boxes, {pair["id"]: 480 for pair in found})
    items = [SimpleNamespace(pair=pair, row=row, id=pair["id"]) for row, pair in enumerate(found)]
    return Case(
        vlm,
        table,
        items,
        [quad | {"row": row} for row, quad in enumerate(quads)],
        folder,
        plant(vlm),
    )


@torch.inference_mode()
def plant(vlm):
    """Make the word follow the prompt's last token, and EOS or a full stop the word: both tokens
    get a direction of their own in the residual stream, as long as the rest of it, which their
    follower's row of the LM head reads. Returns answer_by(one of ANSWERS).
    """
    ids = vlm.tokenizer("USER: Is it far? ASSISTANT:", return_tensors="pt").input_ids.to(vlm.device)
    table, head = vlm.model.get_input_embeddings().weight, vlm.parts.lm_head.weight
    hidden = vlm.parts.decoder(inputs_embeds=table[ids], output_hidden_states=True).hidden_states[
        -2
    ]
    word, stop = answer_ids(vlm, "ASSISTANT:", f"{WORD}.")[:2]
    last, after = torch.linalg.qr(
        torch.randn(hidden.shape[-1], 2, generator=torch.Generator().manual_seed(1))
    )[0].T.to(table)
    table[ids[0, -1]] += last * hidden[0, -1].norm()
    table[word] += after * hidden[0, -1].norm()
    head[word] = last

    @torch.inference_mode()
    def answer_by(answer):
        for token, kind in ((min(vlm.eos_ids), "ends"), (stop, "goes on")):
            head[token] = after.to(head) if kind == answer else 0

    return answer_by


# --- variants: variant(case, quad) -> (states by pair (n, 2, L, d), states by quad (n, 4, L, d) or


@torch.inference_mode()
def floor(case, quad):
    for way in range(4 if quad else 2):
        batch = encode(case, case.items, way)
        pixels = batch.image_inputs["pixel_values"].to(case.vlm.device, case.vlm.dtype)
        inputs = {
            "input_ids": batch.input_ids,
            "attention_mask": batch.attention_mask,
            "pixel_values": pixels,
        }
        found = case.vlm.model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
        case.vlm.tokenizer.batch_decode(
            found[:, batch.input_ids.shape[1] :], skip_special_tokens=True
        )


def encode(case, items, way=0):
    """A question about each picture: original, swapped, and the quad's vertical two."""
    load = states.load_picture(case.table)
    questions = [
        [*item.pair["questions"], *case.quads[item.row]["questions"]][way] for item in items
    ]
    return case.vlm.encode(
        [Sample(str(i), None, question) for i, question in enumerate(questions)],
        [load(item)[1] for item in items],
    )


def ours(case, quad):
    run = rundirs.open_run(tempfile.mkdtemp(dir=case.folder), "swap_analysis", {})
    count, layers = len(case.items), list(range(len(case.vlm.parts.layers)))
    shape = (len(layers), case.vlm.model.get_input_embeddings().weight.shape[1])
    kept = states.open_states(run.path / "states.npy", (count, 2, *shape), "float32")
    quad_kept = (
        states.open_states(run.path / "quad_states.npy", (count, 4, *shape), "float32")
        if quad
        else None
    )
    quad_of = {one["id"]: one for one in case.quads} if quad else {}
    process = states.make_process(case.vlm, layers, kept, quad_kept, quad_of, TOKENS)
    with contextlib.redirect_stdout(io.StringIO()):
        counts = engine.run_items(
            run, case.items, states.load_picture(case.table), process, count, num_workers=2
        )
    if counts["done"] != count:
        raise RuntimeError(f"pairs failed: {run.failed()}")
    return kept, quad_kept, [(record["pred_orig"], record["pred_swap"]) for record in run.records()]


@torch.inference_mode()
def published(case, quad):
    vlm, kept, quad_kept, texts = case.vlm, [], [], []
    with open(
        case.table, encoding="utf-8"
    ) as file:  # the whole table with its pictures stays in memory
        columns = file.readline().rstrip("\n").split("\t")
        rows = [dict(zip(columns, line.rstrip("\n").split("\t"), strict=True)) for line in file]

    def query(picture, question):
        image, found = Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB"), {}
        inputs = vlm.processor(
            images=image, text=prompt_for(vlm, question)[0], return_tensors="pt"
        ).to(vlm.device, vlm.dtype)

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
        text = vlm.tokenizer.decode(
            ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        ).strip()
        return torch.stack([found[layer] for layer in sorted(found)]).numpy(), text

    for row in rows[:PUBLISHED_PAIRS]:
        found = [
            query(row["image_base64"], row[name])
            for name in ("original_question", "swapped_question")
        ]
        kept.append([one for one, _ in found])
        texts.append(tuple(text for _, text in found))
    for one in case.quads[:PUBLISHED_PAIRS] if quad else ():
        row = rows[one["row"]]
        again = (row["original_question"], row["swapped_question"])
        quad_kept.append(
            [query(row["image_base64"], question)[0] for question in (*one["questions"], *again)]
        )
    return np.array(kept), np.array(quad_kept) if quad else None, texts


VARIANTS = {"floor": floor, "ours": ours, "published": published}


# --- equal outputs --------------------------------------------------------------------------------


def contains(text, category):
    """Whether the published check calls an answer right: the expected word or a synonym occurs,
    before any of the opposite. Plain substrings."""
    first = {
        name: min([at for at in map(text.lower().find, SUBSTRINGS[name]) if at >= 0], default=-1)
        for name in (category, OPPOSITE[category])
    }
    wanted, other = first[category], first[OPPOSITE[category]]
    return wanted >= 0 and (other < 0 or wanted < other)


def check(case, answer):
    """The largest difference of a layer's states, relative to the layer's largest; AssertionError
    unless states and read answers agree."""
    (kept, quad_kept, mine), (wanted, quad_wanted, theirs) = ours(case, True), published(case, True)
    worst = 0.0
    for what, found, other in (("states", kept, wanted), ("quad states", quad_kept, quad_wanted)):
        found = found[: len(other)]
        gap = np.abs(found - other).max((0, 1, 3)) / np.abs(other).max((0, 1, 3))  # by layer
        if found.shape != other.shape or not gap.max() <= TOLERANCE:  # a NaN is not <= either
            raise AssertionError(
                f"{what} differ by {gap.max():.1e} in layer {gap.argmax()}, more than {TOLERANCE:g}"
            )
        worst = max(worst, float(gap.max()))
    for own, other in zip(mine, theirs, strict=False):
        read = [
            [
                (pairs.read_answer(text, "far")[0], contains(text, want))
                for text, want in zip(both, ("far", "close"))
            ]
            for both in (own, other)
        ]
        if read[0] != read[1] or read[0][0] != (WORD, True):
            raise AssertionError(
                f"other answers: ours {own} read as {read[0]}, published {other} read as {read[1]};"
                f" planted {WORD!r}"
            )
        if (other[0] == WORD) != (answer == "ends"):
            raise AssertionError(
                f"the published answer {other[0]!r} was to"
                f" {'end after a word' if answer == 'ends' else 'go on'}"
            )
    return worst


# --- measuring ------------------------------------------------------------------------------------


def seconds_of(case, name, quad):
    """(wall time, CPU time of this process or None beside a GPU) per pair."""
    wall, busy = measuring.times_of(lambda: VARIANTS[name](case, quad))
    count = min(len(case.items), PUBLISHED_PAIRS) if name == "published" else len(case.items)
    return wall / count, None if case.vlm.device.type == "cuda" else busy / count


def peaks_of(case, name):
    """{work: MiB} of answers that go on, the longer ones."""
    case.answer_by("goes on")
    return {
        work: measuring.peak_of(
            partial(VARIANTS[name], case, work == WORK[1]),
            partial(VARIANTS["floor"], case, work == WORK[1]),
        )
        for work in WORK
    }


def peaks(args, case, batch):
    """{variant: {work: MiB}}."""
    if case.vlm.device.type == "cuda":
        return {name: peaks_of(case, name) for name in VARIANTS}
    return measuring.in_processes(
        VARIANTS,
        __file__,
        f"--size {args.size} --prompt {args.prompt} --batch {batch} --threads {args.threads}".split(),
    )


def measure(args, case, shared, memory):
    """One row per kind of work and variant. memory {variant: {work: MiB}}."""
    rows = []
    for work in WORK:
        rounds = measuring.alternating(
            {name: partial(seconds_of, case, name, work == WORK[1]) for name in VARIANTS},
            args.repeats,
        )
        wall, busy = (
            [{name: pair[k] for name, pair in each.items()} for each in rounds] for k in (0, 1)
        )
        found = measuring.summary(wall, {name: memory[name][work] for name in VARIANTS})
        cpu = [None] * len(found) if None in busy[0].values() else measuring.summary(busy)
        for row, own in zip(found, cpu, strict=True):
            extra = {
                f"cpu_{key}": own and own[key]
                for key in ("seconds", "median_seconds", "x_floor", "published_to_this")
            }
            rows.append(shared | {"work": work} | row | extra)
    return rows


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument(
        "--prompt",
        type=int,
        default=620,
        help="about how many tokens the prompt of a short question has",
    )
    parser.add_argument(
        "--batch",
        type=int,
        nargs="+",
        default=[1, 8],
        help="pairs in a batch; the published extraction takes one query at a time",
    )
    measuring.add_arguments(parser, VARIANTS)
    args = parser.parse_args(argv)
    if args.quick:
        args.size, args.prompt, args.repeats, args.batch = "quick", 121, 1, [2]
    return args


def main(argv=None):
    args = parse_args(argv)
    device, dtype = measuring.prepare(args)
    rows, worst = [], 0.0
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
    report = {
        "size": args.size,
        "decoder": dict(zip(SHAPE, SIZES[args.size][0])),
        "dtype": str(dtype).removeprefix("torch."),
        "prompt_tokens": length,
    }
    report |= {
        "repeats": args.repeats,
        "machine": measuring.machine(),
        "tolerance": TOLERANCE,
        "worst": worst,
        "rows": rows,
    }
    equal = (
        f"equal outputs: all read answers, states of all layers within {worst:.1e} of a layer's"
        " largest\n"
    )
    columns = {"cpu_median_seconds": "CPU s", "cpu_published_to_this": "published / this, CPU"}
    shown = [
        row
        | {
            name: "not measured" if row[key] is None else f"{row[key]:.3f}"
            for key, name in columns.items()
        }
        for row in rows
    ]
    return measuring.finish(
        report,
        [equal, measuring.table(shown, "pair", ("batch", "answer", "work", *columns.values()))],
        args.out,
    )


if __name__ == "__main__":
    cli.run(main)

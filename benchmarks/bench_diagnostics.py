"""What does the per-image diagnosis cost over plain generation, and what did the published
procedure cost?

    # the CPU figures: 12 layers x 512, two prompt lengths, batch 1 and 4
    python benchmarks/bench_diagnostics.py --out bench.json
    # LLaVA-7B shapes in bfloat16, needs a GPU
    python benchmarks/bench_diagnostics.py --size 7b --out bench_7b.json
    # a very small shape, only to see that it runs
    python benchmarks/bench_diagnostics.py --quick

Three variants of the same work on a random LLaVA, from the picture's file to the last result, every
answer --new_tokens long:
    floor      generate() of transformers with SDPA: nothing is measured
    ours       run_coco_diagnostics.py's own process() and files through engine.run_items, all
               probes on
    published  one picture at a time, eager generate() that returns all attention maps and hidden
               states, a second complete forward for the
               RoPE probe; written after our study of Beyond Semantics (arXiv 2503.17349), sections
               2 and 3
First, in float32, all outputs are compared: captions of all three, published numbers against ours
with --paper_compat (all of them) and as timed (where the definitions agree). Then the variants
alternate in one process, in reverse order every other round; ratios are medians of the ratios
within a round. Extra memory: a variant's peak minus the floor's, on a CPU each in a process of its
own. Out come a Markdown table and, with --out, all figures.
"""

import contextlib
import dataclasses
import io
import json
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from benchmarks import measuring
from benchmarks.published_procedure import diagnose
from common import VLM
from vlmdiag import cli
from vlmdiag.beyond_semantics import diagnostics
from vlmdiag.families import find_family
from vlmdiag.pictures.samples import Sample, load_image
from vlmdiag.runs import engine, rundirs
from vlmdiag.scenes import tiny_llava as tiny

QUESTION, PATCH, TOLERANCE = "Describe the image.", 14, 1e-4
SHAPE = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
SIZES = {  # decoder and tower as in SHAPE; vocabulary, None: the tokenizer's
    "quick": ((2, 64, 2, 96), (2, 32, 2, 48), None),
    "small": ((12, 512, 8, 1376), (4, 128, 4, 256), None),
    "7b": ((32, 4096, 32, 11008), (24, 1024, 16, 4096), 32064),
}


@dataclasses.dataclass
class Case:
    vlm: VLM
    samples: list
    new_tokens: int
    folder: Path


def build(size, prompt, device, folder):
    """A random LLaVA in float32 with prompts of about `prompt` tokens. No special token is ever the
    likeliest, so that no answer ends by itself."""
    decoder, tower, vocabulary = SIZES[size]
    tokenizer = tiny.make_tokenizer(folder)
    side = round(
        (
            prompt
            - len(tokenizer(f"{tiny.SYSTEM} USER: <image>\n{QUESTION} ASSISTANT:").input_ids)
            + 1
        )
        ** 0.5
    )
    pixels, image_id = side * PATCH, tokenizer.convert_tokens_to_ids("<image>")
    vision = CLIPVisionConfig(**dict(zip(SHAPE, tower)), image_size=pixels, patch_size=PATCH)
    text = LlamaConfig(
        **dict(zip(SHAPE, decoder)),
        vocab_size=vocabulary or len(tokenizer),
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )
    text.update(
        {
            name: getattr(tokenizer, name)
            for name in ("bos_token_id", "eos_token_id", "pad_token_id")
        }
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=image_id,
        image_seq_length=side * side,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = LlavaForConditionalGeneration(config).eval().requires_grad_(False)
    # scores with a deviation of about 3: attention of random weights is nearly uniform and hides
    # errors
    for layer in model.model.language_model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            projection.weight *= (3 / (text.initializer_range**2 * text.hidden_size)) ** 0.5
    model.lm_head.weight[sorted({*tokenizer.all_special_ids, image_id})] = 0
    square = {"height": pixels, "width": pixels}
    images = LlavaImageProcessorPil(
        do_pad=True,
        size={"shortest_edge": pixels},
        crop_size=square,
        image_mean=tiny.MEAN,
        image_std=tiny.STD,
    )
    options = {
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
        "chat_template": tiny.CHAT_TEMPLATE,
    }
    return VLM(
        model,
        LlavaProcessor(images, tokenizer, patch_size=PATCH, **options),
        find_family({"model_type": "llava"}),
        f"random-{size}",
    )


def make_samples(folder, count):
    for i in range(count):
        noise = np.random.default_rng(i).integers(0, 256, (15, 20, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((640, 480), Image.Resampling.NEAREST).save(
            folder / f"{i}.jpg", quality=95
        )
    return [
        Sample(str(i), folder / f"{i}.jpg", QUESTION, extra={"image_id": i}) for i in range(count)
    ]


# --- the variants: variant(case) -> (where its results will be, work()) ---------------------------


def floor(case):
    answers = []

    @torch.inference_mode()
    def work():
        batch = case.vlm.encode(case.samples, [load_image(sample.image) for sample in case.samples])
        pixels = batch.image_inputs["pixel_values"].to(case.vlm.device, case.vlm.dtype)
        inputs = {
            "input_ids": batch.input_ids,
            "attention_mask": batch.attention_mask,
            "pixel_values": pixels,
        }
        found = case.vlm.model.generate(**inputs, max_new_tokens=case.new_tokens, do_sample=False)
        answers[:] = found[:, batch.input_ids.shape[1] :].tolist()

    return answers, work


def ours(case, paper_compat=False):
    measures = diagnostics.Measures(
        max_new_tokens=case.new_tokens,
        restrict_to_past=True,
        probe_hidden_norms=True,
        paper_compat=paper_compat,
    )
    settings = dataclasses.asdict(measures)
    run = rundirs.open_run(tempfile.mkdtemp(dir=case.folder), rundirs.COCO, settings)
    process = diagnostics.make_process(case.vlm, measures)

    def load(sample):
        return sample, load_image(sample.image)

    def work():
        with contextlib.redirect_stdout(io.StringIO()):
            counts = engine.run_items(
                run, case.samples, load, process, len(case.samples), num_workers=2
            )
        if counts["done"] != len(case.samples):
            raise RuntimeError(f"items failed: {run.failed()}")

    return run.path / "per_image", work


def published(case):
    folder = Path(tempfile.mkdtemp(dir=case.folder))
    return folder, lambda: [
        diagnose(case.vlm, sample, case.new_tokens, folder) for sample in case.samples
    ]


# --- equal outputs --------------------------------------------------------------------------------


def check(case):
    """{what: largest difference, relative where values exceed 1}; AssertionError unless the
    variants agree within TOLERANCE."""
    (answers, plain), (theirs, eager), *mine = (
        floor(case),
        published(case),
        ours(case),
        ours(case, paper_compat=True),
    )
    for work in (plain, eager, *(work for _, work in mine)):
        work()
    worst = {}
    for sample, answer in zip(case.samples, answers, strict=True):
        record, arrays = (
            json.loads((theirs / f"{sample.id}.json").read_text()),
            dict(np.load(theirs / f"{sample.id}.npz")),
        )
        arrays |= {name: value for name, value in record.items() if name.startswith("mean_")}
        for label, (folder, _) in zip(("as timed", "--paper_compat"), mine):
            own, values = (
                json.loads((folder / f"{sample.id}.json").read_text()),
                np.load(folder / f"{sample.id}.npz"),
            )
            if (
                not own["generated_ids"] == answer == record["generated_ids"]
                or len(answer) != case.new_tokens
            ):
                raise AssertionError(
                    f"other captions ({label}): ours {own['generated_ids']}, floor {answer},"
                    f" published {record['generated_ids']}"
                )
            for name, wanted in arrays.items():
                found, wanted, what = (
                    np.asarray(own[name] if name in own else values[name]),
                    np.asarray(wanted),
                    f"{name} ({label})",
                )
                if label == "as timed" and name.startswith("hidden_norms"):
                    found, wanted = (
                        found[:-1],
                        wanted[:-1],
                    )  # the published last point is after the final norm
                elif label == "as timed" and name in (
                    "alphaV",
                    "share_prod_notV",
                    "delta_gv",
                    "delta_alphaV",
                ):
                    # the published probe looks from an EOS token, ours from the prompt's last
                    continue
                gap = float((np.abs(found - wanted) / np.maximum(1, np.abs(wanted))).max())
                if found.shape != wanted.shape or not gap <= TOLERANCE:  # a NaN is not <= either
                    raise AssertionError(
                        f"{what}: ours {found.shape} and the published procedure {wanted.shape}"
                        f" differ by {gap:.2g}, more than {TOLERANCE:g}"
                    )
                worst[what] = max(worst.get(what, 0.0), gap)
    return worst


# --- measuring ------------------------------------------------------------------------------------

VARIANTS = {"floor": floor, "ours": ours, "published": published}


def seconds_of(case, variant):
    """Wall time per picture."""
    return measuring.seconds_of(VARIANTS[variant](case)[1]) / len(case.samples)


def peak_of(case, variant):
    """Peak memory of one run in MiB above what was held before, after one run of the floor; None
    where it cannot be read."""
    return measuring.peak_of(VARIANTS[variant](case)[1], floor(case)[1])


def peaks(args, case, prompt):
    """{variant: MiB}."""
    if case.vlm.device.type == "cuda":
        return {name: peak_of(case, name) for name in VARIANTS}
    flags = (
        f"--size {args.size} --prompt {prompt} --batch {len(case.samples)} --new_tokens"
        f" {args.new_tokens} --threads {args.threads}"
    )
    return measuring.in_processes(VARIANTS, __file__, flags.split())


def measure(args, case, prompt):
    """One row per variant."""
    rounds = measuring.alternating(
        {name: partial(seconds_of, case, name) for name in VARIANTS}, args.repeats
    )
    batch = case.vlm.encode(case.samples[:1], [load_image(case.samples[0].image)])
    shared = {
        "prompt_tokens": batch.lengths[0],
        "vision_tokens": len(batch.vision_positions(0)),
        "batch": len(case.samples),
    }
    return [shared | row for row in measuring.summary(rounds, peaks(args, case, prompt))]


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument(
        "--prompt", type=int, nargs="+", default=[620, 1750], help="about how many prompt tokens"
    )
    parser.add_argument(
        "--batch",
        type=int,
        nargs="+",
        default=[1, 4],
        help="pictures in a batch; the published procedure takes them one by one",
    )
    parser.add_argument("--new_tokens", type=int, default=32)
    measuring.add_arguments(parser, VARIANTS)
    args = parser.parse_args(argv)
    if args.quick:
        args.size, args.prompt, args.batch, args.repeats, args.new_tokens = (
            "quick",
            [121],
            [2],
            1,
            4,
        )
    if min(args.prompt) < 50 or min(args.repeats, args.new_tokens, args.threads, *args.batch) < 1:
        parser.error("--prompt needs 50 at least, the other numbers 1")
    return args


def main(argv=None):
    args = parse_args(argv)
    device, dtype = measuring.prepare(args)
    rows, checked = [], {}
    with tempfile.TemporaryDirectory() as scratch:
        for prompt, size in ((prompt, size) for prompt in args.prompt for size in args.batch):
            folder = Path(tempfile.mkdtemp(dir=scratch))
            case = Case(
                build(args.size, prompt, device, folder),
                make_samples(folder, size),
                args.new_tokens,
                folder,
            )
            if args.memory_of:
                print(json.dumps(peak_of(case, args.memory_of)))
                return 0
            checked[f"prompt {prompt}, batch {size}"] = check(case)
            case.vlm.model.to(dtype)
            rows += measure(args, case, prompt)
    report = {
        "size": args.size,
        "decoder": dict(zip(SHAPE, SIZES[args.size][0])),
        "dtype": str(dtype).removeprefix("torch."),
        "new_tokens": args.new_tokens,
    }
    report |= {
        "repeats": args.repeats,
        "machine": measuring.machine(),
        "tolerance": TOLERANCE,
        "equal_outputs": checked,
        "rows": rows,
    }
    worst, what = max((gap, what) for found in checked.values() for what, gap in found.items())
    equal = (
        f"equal outputs: all captions, and {len(next(iter(checked.values())))} quantities within"
        f" {worst:.1g} (the worst: {what})\n"
    )
    return measuring.finish(
        report,
        [equal, measuring.table(rows, "image", ("prompt_tokens", "vision_tokens", "batch"))],
        args.out,
    )


if __name__ == "__main__":
    cli.run(main)

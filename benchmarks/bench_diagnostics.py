"""What does the per-image diagnosis cost over plain generation, and what did the published procedure cost?

    python benchmarks/bench_diagnostics.py --out bench.json                # the CPU figures: 12 layers x 512, two prompt lengths, batch 1 and 4
    python benchmarks/bench_diagnostics.py --size 7b --out bench_7b.json   # LLaVA-7B shapes in bfloat16, needs a GPU
    python benchmarks/bench_diagnostics.py --quick                         # a very small shape, only to see that it runs

Three variants of the same work on a random LLaVA, from the picture's file to the last result, every answer --new_tokens long:
    floor      generate() of transformers with SDPA: nothing is measured
    ours       run_coco_diagnostics.py's own process() and files through engine.run_items, all probes on
    published  one picture at a time, eager generate() that returns all attention maps and hidden states, a second complete forward for the
               RoPE probe; written after our study of Beyond Semantics (arXiv 2503.17349), sections 2 and 3
First, in float32, all outputs are compared: captions of all three, published numbers against ours with --paper_compat (all of them) and as timed (where
the definitions agree). Then the variants alternate in one process, in reverse order every other round; ratios are medians of the ratios within a round.
Extra memory: a variant's peak minus the floor's, on a CPU each in a process of its own. Out come a Markdown table and, with --out, all figures."""

import contextlib
import dataclasses
import gc
import importlib.util
import io
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from published_procedure import diagnose
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

import cli
import engine
import rundirs
from common import VLM
from models import find_family
from samples import Sample, load_image

QUESTION, PATCH, TOLERANCE = "Describe the image.", 14, 1e-4
SHAPE = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
SIZES = {  # decoder and tower as in SHAPE; vocabulary, None: the tokenizer's
    "quick": ((2, 64, 2, 96), (2, 32, 2, 48), None),
    "small": ((12, 512, 8, 1376), (4, 128, 4, 256), None),
    "7b": ((32, 4096, 32, 11008), (24, 1024, 16, 4096), 32064),
}


def script(path):
    """A script of another folder as a module, by the name under which the scripts beside it import it."""
    path = Path(__file__).resolve().parent.parent / path
    if path.stem not in sys.modules:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        sys.modules[path.stem] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[path.stem])
    return sys.modules[path.stem]


tiny = script("checkpoints/tiny.py")
_, _, driver = (script(f"diagnostic_tools/{name}.py") for name in ("artifacts", "balance", "run_coco_diagnostics"))


@dataclasses.dataclass
class Case:
    vlm: VLM
    samples: list
    new_tokens: int
    folder: Path


def build(size, prompt, device, folder):
    """A random LLaVA in float32 with prompts of about `prompt` tokens. No special token is ever the likeliest, so that no answer ends by itself."""
    decoder, tower, vocabulary = SIZES[size]
    tokenizer = tiny.make_tokenizer(folder)
    side = round((prompt - len(tokenizer(f"{tiny.SYSTEM} USER: <image>\n{QUESTION} ASSISTANT:").input_ids) + 1) ** 0.5)
    pixels, image_id = side * PATCH, tokenizer.convert_tokens_to_ids("<image>")
    vision = CLIPVisionConfig(**dict(zip(SHAPE, tower)), image_size=pixels, patch_size=PATCH)
    text = LlamaConfig(**dict(zip(SHAPE, decoder)), vocab_size=vocabulary or len(tokenizer), max_position_embeddings=4096, tie_word_embeddings=False)
    text.update({name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")})
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=image_id, image_seq_length=side * side, tie_word_embeddings=False)
    torch.manual_seed(0)
    with torch.device(device):
        model = LlavaForConditionalGeneration(config).eval().requires_grad_(False)
    for layer in model.model.language_model.layers:  # scores with a deviation of about 3: attention of random weights is nearly uniform and hides errors
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            projection.weight *= (3 / (text.initializer_range**2 * text.hidden_size)) ** 0.5
    model.lm_head.weight[sorted({*tokenizer.all_special_ids, image_id})] = 0
    square = {"height": pixels, "width": pixels}
    images = LlavaImageProcessorPil(do_pad=True, size={"shortest_edge": pixels}, crop_size=square, image_mean=tiny.MEAN, image_std=tiny.STD)
    options = {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1, "chat_template": tiny.CHAT_TEMPLATE}
    return VLM(model, LlavaProcessor(images, tokenizer, patch_size=PATCH, **options), find_family({"model_type": "llava"}), f"random-{size}")


def make_samples(folder, count):
    for i in range(count):
        noise = np.random.default_rng(i).integers(0, 256, (15, 20, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((640, 480), Image.Resampling.NEAREST).save(folder / f"{i}.jpg", quality=95)
    return [Sample(str(i), folder / f"{i}.jpg", QUESTION, extra={"image_id": i}) for i in range(count)]


# --- the variants: variant(case) -> (where its results will be, work()) -------------------------------------------------------


def floor(case):
    answers = []

    @torch.inference_mode()
    def work():
        batch = case.vlm.encode(case.samples, [load_image(sample.image) for sample in case.samples])
        pixels = batch.image_inputs["pixel_values"].to(case.vlm.device, case.vlm.dtype)
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "pixel_values": pixels}
        found = case.vlm.model.generate(**inputs, max_new_tokens=case.new_tokens, do_sample=False)
        answers[:] = found[:, batch.input_ids.shape[1] :].tolist()

    return answers, work


def ours(case, *flags):
    command = f"--image_dir . --ann_file . --restrict_to_past --probe_hidden_norms --max_new_tokens {case.new_tokens}".split()
    args = driver.parse_args(["--model_path", case.vlm.path, *command, *flags])
    run = rundirs.open_run(tempfile.mkdtemp(dir=case.folder), rundirs.COCO, driver.settings_of(args, case.vlm, False))
    process = driver.make_process(args, case.vlm, False, None, run)

    def load(sample):
        return sample, load_image(sample.image)

    def work():
        with contextlib.redirect_stdout(io.StringIO()):
            counts = engine.run_items(run, case.samples, load, process, len(case.samples), num_workers=args.num_workers)
        if counts["done"] != len(case.samples):
            raise RuntimeError(f"items failed: {run.failed()}")

    return run.path / "per_image", work


def published(case):
    folder = Path(tempfile.mkdtemp(dir=case.folder))
    return folder, lambda: [diagnose(case.vlm, sample, case.new_tokens, folder) for sample in case.samples]


# --- equal outputs ------------------------------------------------------------------------------------------------------------


def check(case):
    """{what: largest difference, relative where values exceed 1}; AssertionError unless the variants agree within TOLERANCE."""
    (answers, plain), (theirs, eager), *mine = floor(case), published(case), ours(case), ours(case, "--paper_compat")
    for work in (plain, eager, *(work for _, work in mine)):
        work()
    worst = {}
    for sample, answer in zip(case.samples, answers, strict=True):
        record, arrays = json.loads((theirs / f"{sample.id}.json").read_text()), dict(np.load(theirs / f"{sample.id}.npz"))
        arrays |= {name: value for name, value in record.items() if name.startswith("mean_")}
        for label, (folder, _) in zip(("as timed", "--paper_compat"), mine):
            own, values = json.loads((folder / f"{sample.id}.json").read_text()), np.load(folder / f"{sample.id}.npz")
            if not own["generated_ids"] == answer == record["generated_ids"] or len(answer) != case.new_tokens:
                raise AssertionError(f"other captions ({label}): ours {own['generated_ids']}, floor {answer}, published {record['generated_ids']}")
            for name, wanted in arrays.items():
                found, wanted, what = np.asarray(own[name] if name in own else values[name]), np.asarray(wanted), f"{name} ({label})"
                if label == "as timed" and name.startswith("hidden_norms"):
                    found, wanted = found[:-1], wanted[:-1]  # the published last point is after the final norm
                elif label == "as timed" and name in ("alphaV", "share_prod_notV", "delta_gv", "delta_alphaV"):
                    continue  # the published probe looks from an EOS token, ours from the prompt's last
                gap = float((np.abs(found - wanted) / np.maximum(1, np.abs(wanted))).max())
                if found.shape != wanted.shape or not gap <= TOLERANCE:  # a NaN is not <= either
                    raise AssertionError(f"{what}: ours {found.shape} and the published procedure {wanted.shape} differ by {gap:.2g}, more than {TOLERANCE:g}")
                worst[what] = max(worst.get(what, 0.0), gap)
    return worst


# --- measuring ----------------------------------------------------------------------------------------------------------------

VARIANTS = {"floor": floor, "ours": ours, "published": published}


def seconds_of(case, variant):
    """Wall time per picture."""
    _, work = VARIANTS[variant](case)
    wait = torch.cuda.synchronize if case.vlm.device.type == "cuda" else lambda: None
    gc.collect()
    wait()
    start = time.perf_counter()
    work()
    wait()
    return (time.perf_counter() - start) / len(case.samples)


def peak_of(case, variant):
    """Peak memory of one run in MiB above what was held before, after one run of the floor; None where it cannot be read."""
    floor(case)[1]()
    _, work = VARIANTS[variant](case)
    gc.collect()
    if case.vlm.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")  # getrusage's ru_maxrss would hold the parent's and the loading's peak
    if not (status.exists() and os.access(reset, os.W_OK)):
        return None
    held = lambda field: int(status.read_text().split(f"{field}:")[1].split()[0]) / 2**10
    reset.write_text("5")  # the peak starts again from what is held now
    before = held("VmRSS")
    work()
    return held("VmHWM") - before


def peaks_in_processes(args, prompt, batch):
    """{variant: MiB}, each in a process of its own, whose allocator gives freed blocks back at once, so that the peak is what was in use."""
    flags = f"--size {args.size} --prompt {prompt} --batch {batch} --new_tokens {args.new_tokens} --threads {args.threads} --memory_of"
    command = [sys.executable, __file__, *flags.split()]
    environment = os.environ | {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    started = {name: subprocess.Popen([*command, name], stdout=subprocess.PIPE, text=True, env=environment) for name in VARIANTS}
    found = {name: process.communicate()[0] for name, process in started.items()}
    if any(process.returncode for process in started.values()):
        raise RuntimeError("the peak memory could not be measured, see above")
    return {name: json.loads(text) for name, text in found.items()}


def measure(args, case, prompt):
    """One row per variant."""
    for name in VARIANTS:
        seconds_of(case, name)
    rounds = [{name: seconds_of(case, name) for name in list(VARIANTS)[:: -1 if i % 2 else 1]} for i in range(args.repeats)]
    on_gpu = case.vlm.device.type == "cuda"
    peaks = {name: peak_of(case, name) for name in VARIANTS} if on_gpu else peaks_in_processes(args, prompt, len(case.samples))
    batch = case.vlm.encode(case.samples[:1], [load_image(case.samples[0].image)])
    shared = {"prompt_tokens": batch.lengths[0], "vision_tokens": len(batch.vision_positions(0)), "batch": len(case.samples)}
    rows = []
    for name in VARIANTS:
        ratios = {"x_floor": [each[name] / each["floor"] for each in rounds], "published_to_this": [each["published"] / each[name] for each in rounds]}
        row = shared | {"variant": name, "seconds": [each[name] for each in rounds], "peak_mib": peaks[name]}
        row |= {"extra_mib": None if peaks[name] is None else peaks[name] - peaks["floor"], "median_seconds": float(np.median(row["seconds"]))}
        rows.append(row | {what: float(np.median(values)) for what, values in ratios.items()})
    return rows


def table(rows):
    lines = ["| prompt (vision) | batch | variant | s per image: median (min-max) | x floor | published / this | extra MiB |", "|" + "---|" * 7]
    for row in rows:
        spread = f"{row['median_seconds']:.3f} ({min(row['seconds']):.3f}-{max(row['seconds']):.3f})"
        extra = "not measured" if row["extra_mib"] is None else f"{row['extra_mib']:.1f}"
        where = f"{row['prompt_tokens']} ({row['vision_tokens']}) | {row['batch']} | {row['variant']}"
        lines.append(f"| {where} | {spread} | {row['x_floor']:.2f} | {row['published_to_this']:.2f} | {extra} |")
    return "\n".join(lines)


def machine():
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    cpu = info.split("model name")[1].split("\n")[0].strip("\t :") if "model name" in info else platform.processor()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    versions = {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
    return {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpu": gpu, **versions, "date": time.strftime("%Y-%m-%d %H:%M")}


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--prompt", type=int, nargs="+", default=[620, 1750], help="about how many prompt tokens")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4], help="pictures in a batch; the published procedure takes them one by one")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds, after one that is not counted")
    parser.add_argument("--new_tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of PyTorch")
    parser.add_argument("--quick", action="store_true", help="a very small shape, prompt and batch; figures without meaning")
    parser.add_argument("--out", default=None, help="JSON file with everything")
    parser.add_argument("--memory_of", choices=list(VARIANTS), default=None, help="print only this variant's peak in MiB (the benchmark calls itself so)")
    args = parser.parse_args(argv)
    if args.quick:
        args.size, args.prompt, args.batch, args.repeats, args.new_tokens = "quick", [121], [2], 1, 4
    if min(args.prompt) < 50 or min(args.repeats, args.new_tokens, args.threads, *args.batch) < 1:
        parser.error("--prompt needs 50 at least, the other numbers 1")
    return args


def main(argv=None):
    args = parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.size == "7b" and device == "cpu":
        raise cli.UsageError("--size 7b needs a GPU, and none is visible here; use --size small")
    torch.set_num_threads(args.threads)
    dtype, rows, checked = torch.bfloat16 if args.size == "7b" else torch.float32, [], {}
    with tempfile.TemporaryDirectory() as scratch:
        for prompt, size in ((prompt, size) for prompt in args.prompt for size in args.batch):
            folder = Path(tempfile.mkdtemp(dir=scratch))
            case = Case(build(args.size, prompt, device, folder), make_samples(folder, size), args.new_tokens, folder)
            if args.memory_of:
                print(json.dumps(peak_of(case, args.memory_of)))
                return 0
            checked[f"prompt {prompt}, batch {size}"] = check(case)
            case.vlm.model.to(dtype)
            rows += measure(args, case, prompt)
    report = {"size": args.size, "decoder": dict(zip(SHAPE, SIZES[args.size][0])), "dtype": str(dtype).removeprefix("torch."), "new_tokens": args.new_tokens}
    report |= {"repeats": args.repeats, "machine": machine(), "tolerance": TOLERANCE, "equal_outputs": checked, "rows": rows}
    print(*(f"{name}: {report[name]}" for name in ("size", "decoder", "dtype", "new_tokens", "repeats", "machine")), sep="\n")
    worst, what = max((gap, what) for found in checked.values() for what, gap in found.items())
    print(f"equal outputs: all captions, and {len(next(iter(checked.values())))} quantities within {worst:.1g} (the worst: {what})\n\n{table(rows)}")
    if args.out:
        Path(args.out).write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    cli.run(main)

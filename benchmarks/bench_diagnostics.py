"""What does the per-image diagnosis cost over plain generation, and what did the published procedure cost?

    python benchmarks/bench_diagnostics.py --out bench.json                # the CPU figures: 12 layers x 512, two prompt lengths, batch 1 and 4
    python benchmarks/bench_diagnostics.py --size 7b --out bench_7b.json   # LLaVA-7B shapes in bfloat16, needs a GPU
    python benchmarks/bench_diagnostics.py --quick                         # a very small shape, only to see that it runs

Three variants of the same work on a random LLaVA, from the picture's file to the last result, every answer --new_tokens long:
    floor      generate() of transformers with SDPA: nothing is measured
    ours       run_coco_diagnostics.py's own process() and files through engine.run_items, all probes on
    published  one picture at a time, eager generate() that returns all attention maps and hidden states, a second complete forward for the
               RoPE probe; written from the study of Beyond Semantics (arXiv 2503.17349), sections 2 and 3
First all outputs are compared: in float32, published against ours with --paper_compat (all numbers) and as timed (where the definitions agree). Then
the variants alternate in one process, the order reversed each time; ratios are medians of the ratios of one round. Extra memory: a variant's peak
minus the floor's, on a CPU each in a process of its own. A Markdown table comes out, and all seconds with --out."""

import contextlib
import dataclasses
import gc
import importlib.metadata
import importlib.util
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from transformers.models.llama import modeling_llama
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.utils import logging as hf_logging

import cli
import engine
import rundirs
from cli import UsageError
from common import GROUPS, VLM
from models import find_family
from samples import Sample, load_image

ROOT, QUESTION, PATCH, TOLERANCE = Path(__file__).resolve().parent.parent, "Describe the image.", 14, 1e-4
SIZES = {  # decoder: layers, width, heads, MLP; vocabulary (None: the tokenizer's); tower: layers, width, heads, MLP
    "quick": ((2, 64, 2, 96), None, (2, 32, 2, 48)),
    "small": ((12, 512, 8, 1376), None, (4, 128, 4, 256)),
    "7b": ((32, 4096, 32, 11008), 32064, (24, 1024, 16, 4096)),
}


def script(path):
    """A script of another folder as a module, under its file's name as the scripts beside it import it."""
    if path.stem not in sys.modules:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        sys.modules[path.stem] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[path.stem])
    return sys.modules[path.stem]


tiny, _, _, driver = (script(ROOT / path) for path in ("checkpoints/tiny.py", *(f"diagnostic_tools/{name}.py" for name in ("balance", "artifacts", "run_coco_diagnostics"))))


@dataclasses.dataclass
class Case:
    vlm: VLM
    samples: list
    new_tokens: int
    folder: Path


def build(size, prompt, device, folder):
    """A random LLaVA in float32 whose prompt has about `prompt` tokens, and whose answers never end by themselves: no special token is ever the likeliest."""
    (layers, width, heads, mlp), vocabulary, tower = SIZES[size]
    tokenizer = tiny.make_tokenizer(folder)
    text = len(tokenizer(f"{tiny.SYSTEM} USER: <image>\n{QUESTION} ASSISTANT:").input_ids) - 1
    side = max(2, round(max(0, prompt - text) ** 0.5))
    pixels, ids = side * PATCH, {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    named = dict(zip(("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size"), tower, strict=True))
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**named, image_size=pixels, patch_size=PATCH, projection_dim=tower[1]),
        text_config=LlamaConfig(
            vocab_size=vocabulary or len(tokenizer), hidden_size=width, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=heads,
            max_position_embeddings=4096, tie_word_embeddings=False, **ids,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"), vision_feature_layer=-2, vision_feature_select_strategy="default",
        image_seq_length=side * side, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        model = LlavaForConditionalGeneration(config).eval().requires_grad_(False)
    for layer in model.model.language_model.layers:  # scores with a deviation of about 3: attention of random weights is nearly uniform and hides errors
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            projection.weight *= (3 / (config.text_config.initializer_range**2 * width)) ** 0.5
    model.lm_head.weight[sorted({*tokenizer.all_special_ids, config.image_token_id})] = 0
    square = {"height": pixels, "width": pixels}
    images = LlavaImageProcessorPil(do_pad=True, size={"shortest_edge": pixels}, crop_size=square, image_mean=tiny.MEAN, image_std=tiny.STD)
    processor = LlavaProcessor(images, tokenizer, patch_size=PATCH, vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=tiny.CHAT_TEMPLATE)
    return VLM(model, processor, find_family("llava"), f"random-{size}")


def make_samples(folder, count):
    for i in range(count):
        noise = np.random.default_rng(i).integers(0, 256, (15, 20, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((640, 480), Image.NEAREST).save(folder / f"{i}.jpg", quality=95)
    return [Sample(str(i), folder / f"{i}.jpg", QUESTION, extra={"image_id": i}) for i in range(count)]


# --- the variants: variant(case) -> (where its results will be, work()) -----------------------------------------------------------


def inputs_of(case, batch):
    return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "pixel_values": batch.image_inputs["pixel_values"].to(case.vlm.device, case.vlm.dtype)}


def floor(case):
    found = []

    @torch.inference_mode()
    def work():
        inputs = inputs_of(case, case.vlm.encode(case.samples, [load_image(sample.image) for sample in case.samples]))
        answers = case.vlm.model.generate(**inputs, max_new_tokens=case.new_tokens, do_sample=False)
        found[:] = answers[:, inputs["input_ids"].shape[1] :].tolist()

    return found, work


def ours(case, *flags):
    arguments = ["--model_path", case.vlm.path, "--image_dir", "", "--ann_file", "", "--restrict_to_past", "--probe_hidden_norms", "--max_new_tokens", str(case.new_tokens)]
    args = driver.parse_args([*arguments, *flags])
    run = rundirs.open_run(tempfile.mkdtemp(dir=case.folder), rundirs.COCO, driver.settings_of(args, case.vlm, False))
    process = driver.make_process(args, case.vlm, False, None, run)

    def work():
        with contextlib.redirect_stdout(io.StringIO()):
            counts = engine.run_items(run, case.samples, lambda sample: (sample, load_image(sample.image)), process, len(case.samples), num_workers=args.num_workers)
        if counts["done"] != len(case.samples):
            raise RuntimeError(f"items failed: {run.failed()}")

    return run.path / "per_image", work


def published(case):
    folder, decoder = Path(tempfile.mkdtemp(dir=case.folder)), case.vlm.parts.decoder

    @torch.inference_mode()
    def work():
        for sample in case.samples:
            batch = case.vlm.encode([sample], [load_image(sample.image)])
            spans, inputs = batch.spans(0), inputs_of(case, batch)
            user, (vision,), length = spans["user"] + spans["template"], spans["vision"], batch.lengths[0]
            decoder.set_attn_implementation("eager")
            try:
                found = case.vlm.model.generate(
                    **inputs, max_new_tokens=case.new_tokens, do_sample=False, output_attentions=True, output_hidden_states=True, return_dict_in_generate=True
                )
            finally:
                decoder.set_attn_implementation("sdpa")
            ids = found.sequences[0, length:].tolist()
            record = {"image_id": sample.extra["image_id"], "file_name": sample.image.name, "caption": case.vlm.tokenizer.decode(ids, skip_special_tokens=True), "generated_ids": ids}
            record |= mean_shares(found.attentions, length, spans.get("system", []), vision, user)
            arrays = {"head_vision_share": head_vision_share(found.attentions, vision, user).cpu().numpy()} | rope_probe(case.vlm, inputs, vision)
            norms = torch.stack([states[0].float().norm(dim=-1) for states in found.hidden_states[0]]).cpu().numpy()  # (L + 1, T)
            for name, ranges in (("sys", spans.get("system", [])), ("user_text", user), ("vision", [vision])):
                arrays[f"hidden_norms_{name}"] = np.concatenate([norms[:, a:b] for a, b in ranges], 1).mean(1) if ranges else np.full(len(norms), np.nan)
            np.savez_compressed(folder / f"{sample.id}.npz", **arrays)
            (folder / f"{sample.id}.json").write_text(json.dumps(record))

    return folder, work


def head_vision_share(attentions, vision, user):
    """(L, H): mean over steps of V / (V + U) in the last row of each step's maps (1, H, Q, K)."""
    steps = []
    for maps in attentions:
        rows = torch.stack([layer[0, :, -1] for layer in maps])
        seen, text = rows[..., slice(*vision)].sum(-1), sum(rows[..., a:b].sum(-1) for a, b in user)
        steps.append((seen / (seen + text).clamp_min(1e-8)).float())
    return torch.stack(steps).mean(0)


def mean_shares(attentions, length, system, vision, user):
    """Shares from one matrix of all prompt and answer rows, zero-padded, on the CPU: heads averaged, BOS left out, layers averaged."""

    def without_bos(rows):
        rows = rows.clone()
        rows[..., 0] = 0
        return rows / rows.sum(-1, keepdim=True).clamp_min(1e-12)

    prompt = torch.stack([without_bos(layer[0].mean(0)[:-1].float().cpu()) for layer in attentions[0]]).mean(0)
    matrix = torch.zeros(length + len(attentions), length + len(attentions))
    matrix[1:length, :length] = prompt
    for step, maps in enumerate(attentions):
        row = torch.stack([without_bos(layer[0, :, -1].mean(0).float().cpu()) for layer in maps]).mean(0)
        matrix[length + step, : len(row)] = row
    shares = {"mean_vision_share": [], "mean_text_share": [], "mean_sys_share": []}
    for row in matrix[length:]:
        seen, text, sys_mass = (sum(row[a:b].sum().item() for a, b in ranges) for ranges in ([vision], user, system))
        for name, part, whole in (("mean_vision_share", seen, seen + text), ("mean_text_share", text, seen + text), ("mean_sys_share", sys_mass, seen + text + sys_mass)):
            shares[name].append(part / whole if whole else 1.0)
    return {name: sum(values) / len(values) for name, values in shares.items()}


def rope_probe(vlm, inputs, vision, delta=1.0):
    """(L, H) arrays from a forward over the prompt and an EOS token, whose row looks at vision keys moved by delta; queries and keys of all layers are kept."""
    kept, rotate, length = [], modeling_llama.apply_rotary_pos_emb, inputs["input_ids"].shape[1]

    def keep(*args, **options):
        kept.append(rotate(*args, **options))
        return kept[-1]

    ids = torch.cat([inputs["input_ids"], inputs["input_ids"].new_full((1, 1), vlm.tokenizer.eos_token_id)], 1)
    with mock.patch.object(modeling_llama, "apply_rotary_pos_emb", keep):
        vlm.model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=inputs["pixel_values"], use_cache=False)
    angle = delta * vlm.parts.decoder.rotary_emb.inv_freq.float()
    found = {"alphaV": [], "share_prod_notV": [], "delta_gv": [], "delta_alphaV": []}
    for query, keys in kept:
        query, keys = query[0, :, -1].float(), keys[0, :, :length].float()  # restrict_to_past: without the EOS token's own key
        moved = keys.clone()
        a, b = keys[:, slice(*vision)].chunk(2, -1)
        moved[:, slice(*vision)] = torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)
        before, after = ((keys @ query[..., None])[..., 0] / query.shape[-1] ** 0.5 for keys in (keys, moved))
        alpha = before.softmax(-1)[:, slice(*vision)]
        mass = alpha.sum(-1)
        change = (after - before)[:, slice(*vision)] / delta
        values = mass, mass * (1 - mass), (alpha / mass[:, None] * change).sum(-1), after.softmax(-1)[:, slice(*vision)].sum(-1) - mass
        for name, value in zip(found, values, strict=True):
            found[name].append(value)
    return {name: torch.stack(values).cpu().numpy() for name, values in found.items()}


# --- equal outputs ----------------------------------------------------------------------------------------------------------------


def check(case):
    """AssertionError unless all three give the same; {what: largest difference}, relative where values exceed 1."""
    results = [floor(case), published(case), ours(case), ours(case, "--paper_compat")]
    for _, work in results:
        work()
    answers, theirs, timed, compatible = (where for where, _ in results)
    worst = {}

    def same(name, mine, other):
        mine, other = np.asarray(mine, float), np.asarray(other, float)
        if mine.shape != other.shape or np.isnan(mine).any() or np.isnan(other).any():
            raise AssertionError(f"{name}: {mine.shape} with {np.isnan(mine).sum()} NaN in ours, {other.shape} with {np.isnan(other).sum()} in the published procedure")
        worst[name] = max(worst.get(name, 0.0), float((np.abs(mine - other) / np.maximum(1, np.abs(other))).max()))
        if worst[name] > TOLERANCE:
            raise AssertionError(f"{name}: ours and the published procedure differ by {worst[name]:.2g}, more than {TOLERANCE:g}")

    for sample, answer in zip(case.samples, answers, strict=True):
        record, arrays = json.loads((theirs / f"{sample.id}.json").read_text()), dict(np.load(theirs / f"{sample.id}.npz"))
        for label, folder in (("as timed", timed), ("--paper_compat", compatible)):
            own, values = json.loads((folder / f"{sample.id}.json").read_text()), np.load(folder / f"{sample.id}.npz")
            if not own["generated_ids"] == answer == record["generated_ids"] or len(answer) != case.new_tokens:
                raise AssertionError(f"{label}: other captions: ours {own['generated_ids']}, floor {answer}, published {record['generated_ids']}")
            for name in ("mean_vision_share", "mean_text_share", "mean_sys_share"):
                same(f"{name} ({label})", own[name], record[name])
            for name, array in arrays.items():
                if label == "--paper_compat" or name == "head_vision_share":
                    same(f"{name} ({label})", values[name], array)
                elif name.startswith("hidden_norms"):  # the published last point is after the final norm
                    same(f"{name} ({label})", values[name][:-1], array[:-1])
    return worst


# --- measuring --------------------------------------------------------------------------------------------------------------------

VARIANTS = {"floor": floor, "ours": ours, "published": published}


def seconds_of(case, variant):
    """Wall time per picture."""
    _, work = VARIANTS[variant](case)
    gc.collect()
    cuda = case.vlm.device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if cuda:
        torch.cuda.synchronize()
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
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not (status.exists() and os.access(reset, os.W_OK)):
        return None
    held = lambda field: int(status.read_text().split(f"{field}:")[1].split()[0]) / 2**10  # noqa: E731
    reset.write_text("5")  # the peak starts again from what is held now
    before = held("VmRSS")
    work()
    return held("VmHWM") - before


def peaks_in_processes(args, prompt, batch):
    """{variant: MiB}, each in a process of its own, whose allocator gives freed blocks back at once, so that the peak is what was in use."""
    command = [sys.executable, __file__, "--size", args.size, "--prompt", prompt, "--batch", batch, "--new_tokens", args.new_tokens, "--threads", args.threads, "--memory_of"]
    environment = os.environ | {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    started = {name: subprocess.Popen([*map(str, command), name], stdout=subprocess.PIPE, text=True, env=environment) for name in VARIANTS}
    found = {name: process.communicate()[0] for name, process in started.items()}
    failed = [name for name, process in started.items() if process.returncode]
    if failed:
        raise RuntimeError(f"the memory of {', '.join(failed)} could not be measured, see above")
    return {name: json.loads(text) for name, text in found.items()}


def measure(args, case, prompt):
    """One row per variant."""
    for name in VARIANTS:
        seconds_of(case, name)
    rounds = [{name: seconds_of(case, name) for name in (list(VARIANTS), list(VARIANTS)[::-1])[i % 2]} for i in range(args.repeats)]
    peaks = {name: peak_of(case, name) for name in VARIANTS} if case.vlm.device.type == "cuda" else peaks_in_processes(args, prompt, len(case.samples))
    with torch.inference_mode():
        batch = case.vlm.encode(case.samples[:1], [load_image(case.samples[0].image)])
    shared = {"prompt_tokens": batch.lengths[0], "vision_tokens": int((batch.groups == GROUPS.index("vision")).sum()), "batch": len(case.samples)}
    median = lambda values: statistics.median(list(values))  # noqa: E731
    return [
        shared | {
            "variant": name, "seconds": [r[name] for r in rounds], "median": median(r[name] for r in rounds), "peak_mib": peaks[name],
            "ratio_to_floor": median(r[name] / r["floor"] for r in rounds), "published_to_this": median(r["published"] / r[name] for r in rounds),
            "extra_mib": None if peaks[name] is None else peaks[name] - peaks["floor"],
        }
        for name in VARIANTS
    ]  # fmt: skip


def table(rows):
    lines = ["| prompt (vision) | batch | variant | s per image: median (min-max) | x floor | published / this | extra MiB |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        spread = f"{row['median']:.3f} ({min(row['seconds']):.3f}-{max(row['seconds']):.3f})"
        extra = "not measured" if row["extra_mib"] is None else f"{row['extra_mib']:.1f}"
        size = f"{row['prompt_tokens']} ({row['vision_tokens']})"
        lines.append(f"| {size} | {row['batch']} | {row['variant']} | {spread} | {row['ratio_to_floor']:.3f} | {row['published_to_this']:.2f} | {extra} |")
    return "\n".join(lines)


def machine(args, device):
    model = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")] if Path("/proc/cpuinfo").exists() else []
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "numpy")} | {"python": platform.python_version()}
    found = {"cpu": (model or [platform.processor() or "unknown"])[0], "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    return found | {"gpu": torch.cuda.get_device_name() if device == "cuda" else None, "versions": versions, "date": time.strftime("%Y-%m-%d %H:%M")}


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--prompt", type=int, nargs="+", default=[620, 1750], help="about how many prompt tokens")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4], help="pictures in a batch; the published procedure takes them one by one")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds after one that is not counted")
    parser.add_argument("--new_tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=None, help="of PyTorch; default: PyTorch's own choice")
    parser.add_argument("--quick", action="store_true", help="a very small shape, prompt and batch; figures without meaning")
    parser.add_argument("--out", default=None, help="JSON file with everything")
    parser.add_argument("--memory_of", choices=list(VARIANTS), default=None, help="print only this variant's peak in MiB (the benchmark calls itself so)")
    args = parser.parse_args(argv)
    if args.quick:
        args.size, args.prompt, args.batch, args.repeats, args.new_tokens = "quick", [121], [2], 1, 4
    return args


def main(argv=None):
    args = parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.size == "7b" and device == "cpu":
        raise UsageError("--size 7b needs a GPU, and none is visible here; use --size small")
    torch.set_num_threads(args.threads or torch.get_num_threads())
    args.threads = torch.get_num_threads()
    hf_logging.set_verbosity_error()
    dtype, rows, checked = torch.bfloat16 if args.size == "7b" else torch.float32, [], {}
    with tempfile.TemporaryDirectory() as scratch:
        for prompt in args.prompt:
            for size in args.batch:
                folder = Path(tempfile.mkdtemp(dir=scratch))
                case = Case(build(args.size, prompt, device, folder), make_samples(folder, size), args.new_tokens, folder)
                if args.memory_of:
                    print(json.dumps(peak_of(case, args.memory_of)))
                    return 0
                checked[f"prompt {prompt}, batch {size}"] = check(case)
                case.vlm.model.to(dtype)
                rows += measure(args, case, prompt)
                del case
    shape = dict(zip(("layers", "width", "heads", "mlp"), SIZES[args.size][0], strict=True)) | {"dtype": str(dtype).removeprefix("torch."), "new_tokens": args.new_tokens}
    report = {"size": args.size, "decoder": shape, "repeats": args.repeats, "machine": machine(args, device), "checked": checked, "rows": rows}
    worst = max((value, name) for found in checked.values() for name, value in found.items())
    print(f"{args.size}: {shape}; {report['machine']}; median of {args.repeats} rounds")
    print(f"equal outputs: the captions, and {len(checked[next(iter(checked))])} quantities within {worst[0]:.1g} ({worst[1]}; float32)\n")
    print(table(rows))
    if args.out:
        Path(args.out).write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    cli.run(main)

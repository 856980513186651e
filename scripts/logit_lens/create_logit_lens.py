"""What does the model read off each position, layer by layer? The logit lens on a folder of
pictures, one interactive page each.

    python scripts/logit_lens/create_logit_lens.py --model_path checkpoints/tiny-llava \\
        --image_folder data/shapes/val2017 --save_folder outputs/lens \\
        --num_images 5
    python scripts/logit_lens/generate_overview.py outputs/lens outputs/lens

p = softmax(W_U norm(h)) for the hidden state h of every position after every layer (0: embeddings),
in float32; the final norm exactly once at each, so that the last layer is the model's own
next-token distribution. arXiv 2410.07149; our study's 2.2. Pages work offline: layer slider and map
of the likeliest tokens over the picture, hover, lock, search. They are
<save_folder>/<model>_<picture>_logit_lens.html and are drawn from the run directory
<out_root>/logit_lens/<model>[__<run_name>]/, which holds ids and probabilities (arrays (L + 1, T,
k)); an interrupted call goes on by the same command."""

import json
from pathlib import Path

import torch

from common import add_model_arguments, load_from_args
from vlmdiag import cli
from vlmdiag.groups import GROUPS
from vlmdiag.interp.lens_page import write_page
from vlmdiag.model.attention import capture
from vlmdiag.model.lens import Lens, vocabulary
from vlmdiag.model.loading import identity_of
from vlmdiag.model.probes import HiddenStates
from vlmdiag.model.prompts import prompt_for
from vlmdiag.model.vision import prefill
from vlmdiag.pictures.grid import PatchGrid
from vlmdiag.pictures.samples import Sample, list_pictures, load_image, with_picture
from vlmdiag.runs import engine, rundirs

EXPERIMENT = "logit_lens"


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("--image_folder", required=True, help="folder of pictures")
    parser.add_argument(
        "--save_folder", required=True, help="where the pages go; made if it is not there"
    )
    parser.add_argument(
        "--num_images", type=int, default=None, help="only the first so many, by name"
    )
    parser.add_argument(
        "--model_path", "--model_name", default="llava-hf/llava-1.5-7b-hf", help="folder or hub id"
    )
    parser.add_argument("--prompt_text", default="Describe the image.", help="question")
    parser.add_argument("--top_k", type=int, default=5, help="tokens per position and layer")
    parser.add_argument("--batch_size", type=int, default=1)
    cli.add_run_arguments(parser)
    add_model_arguments(parser, path=False)
    args = parser.parse_args(argv)
    if (
        args.top_k < 1
        or args.batch_size < 1
        or (args.num_images if args.num_images is not None else 1) < 1
    ):
        parser.error("--top_k, --batch_size and --num_images count from 1")
    return args


def read_folder(args):
    """A Sample per picture of the folder, sorted by name; its id is the name without ending (with
    it where two pictures share one)."""
    files = list_pictures(args.image_folder)[: args.num_images]
    stems = [file.stem for file in files]
    names = [file.stem if stems.count(file.stem) == 1 else file.name for file in files]
    return [
        Sample(name, file, args.prompt_text, extra={"image_id": name})
        for name, file in zip(names, files)
    ]


def make_process(args, vlm):
    lens = Lens(vlm)

    @torch.inference_mode()
    def process(loaded):
        samples, images = zip(*loaded, strict=True)
        batch = vlm.encode(samples, images)
        with capture(vlm, [probe := HiddenStates()]):
            logits = prefill(vlm, batch).logits[:, -1]
        last = len(vlm.parts.layers)
        lens.check(probe.states[last][:, -1], logits)
        found = [lens.top_k(probe.states.pop(index), args.top_k) for index in range(last + 1)]
        ids, probs = (
            torch.stack([part.to(vlm.device) for part in parts], 1).cpu() for parts in zip(*found)
        )  # (B, L + 1, T, k)
        return [result(row, batch, ids[row], probs[row]) for row in range(len(samples))]

    def result(row, batch, ids, probs):
        own, sample, grid = (
            slice(batch.groups.shape[1] - batch.lengths[row], None),
            batch.samples[row],
            batch.grids[row],
        )
        ids, probs, prompt = ids[:, own], probs[:, own], batch.input_ids[row, own].tolist()
        words = vocabulary(vlm.tokenizer, {*ids.unique().tolist(), *prompt})
        record = {
            "image_id": sample.extra["image_id"],
            "file_name": sample.image.name,
            "prompt": batch.prompts[row],
            "spans": batch.spans(row),
        }
        record |= {
            "labels": [words[id] for id in prompt],
            "groups": [GROUPS[code] for code in batch.groups[row, own].tolist()],
        }
        record |= {"vocabulary": words, "grid": grid and {"shape": grid.shape, "size": grid.size}}
        arrays = {"ids": ids.int().numpy(), "probs": probs.numpy()}
        return record, arrays | ({"boxes": grid.boxes} if grid is not None else {})

    return process


def draw(run, samples, folder, model, settings, again):
    """A page for every finished picture that has none, or one older than its numbers. Returns how
    many were written."""
    written = 0
    for sample in samples:
        page, numbers = (
            folder / f"{model}_{sample.id}_logit_lens.html",
            run.path / "per_image" / f"{sample.id}.json",
        )
        if not run.is_done(sample.id) or (
            page.exists() and not again and page.stat().st_mtime >= numbers.stat().st_mtime
        ):
            continue
        record, arrays = run.record(sample.id), run.arrays(sample.id)
        grid = (
            PatchGrid(
                arrays["boxes"],
                record["grid"]["shape"] and tuple(record["grid"]["shape"]),
                tuple(record["grid"]["size"]),
            )
            if record["grid"]
            else None
        )
        facts = {
            "title": f"{sample.image.name} - {model}",
            "model": model,
            "picture": sample.image.name,
            "prompt": record["prompt"],
        }
        facts |= {"question": sample.question, "settings": settings}
        words = {int(id): word for id, word in record["vocabulary"].items()}
        write_page(
            page,
            load_image(sample.image),
            grid,
            record["labels"],
            record["groups"],
            arrays["ids"],
            arrays["probs"],
            words,
            facts,
        )
        written += 1
    return written


def main(argv=None):
    args = parse_args(argv)
    samples, folder = read_folder(args), Path(args.save_folder)
    vlm = load_from_args(args)
    vlm.need("decoder-only")
    model = rundirs.slug(args.model_path)
    identity = identity_of(vlm)
    identity |= {
        "prompt": prompt_for(vlm, args.prompt_text)[0],
        "top_k": args.top_k,
        "image_aspect": args.image_aspect,
    }
    free = {
        "model_path": args.model_path,
        "image_folder": args.image_folder,
        "device": str(vlm.device),
        "batch_size": args.batch_size,
    }
    run = rundirs.open_run(
        rundirs.run_path(args.out_root, args.model_path, EXPERIMENT, args.run_name),
        EXPERIMENT,
        identity,
        free,
        args.overwrite,
    )
    counts = engine.run_items(
        run,
        samples,
        with_picture,
        make_process(args, vlm),
        args.batch_size,
        args.shard,
        args.num_workers,
    )
    run.finish()
    folder.mkdir(parents=True, exist_ok=True)
    settings = json.dumps({name: identity[name] for name in ("dtype", "top_k", "image_aspect")})
    written = draw(run, samples, folder, model, settings, args.overwrite)
    print(
        f"{folder}: {written} pages written; all of them together: python"
        f" scripts/logit_lens/generate_overview.py {folder} {folder}"
    )
    return engine.exit_code(counts, run)


if __name__ == "__main__":
    cli.run(main)

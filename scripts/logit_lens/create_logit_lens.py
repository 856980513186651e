"""What does the model read off each position, layer by layer? The logit lens on a folder of
pictures, one interactive page each.

    python scripts/logit_lens/create_logit_lens.py --model_path checkpoints/tiny-llava \\
        --image_dir data/shapes/val2017 --out_dir outputs/lens \\
        --max_images 5
    python scripts/logit_lens/generate_overview.py outputs/lens outputs/lens

p = softmax(W_U norm(h)) for every hidden state h of every position (0: embeddings, l + 1: output of
layer l), in float32; the final norm exactly once at each, so that the last layer's is the model's
own next-token distribution. arXiv 2410.07149; docs/studies/llava_interp.md, section 2.2. Pages work
offline: layer slider and map of the likeliest tokens over the picture, hover, lock, search, and the
greedy answer's first 32 tokens, each with the position that predicts it. They are
<out_dir>/<model>_<picture>_logit_lens.html and are drawn from the run directory
<out_root>/logit_lens/<model>[__<run_name>]/, which holds ids and probabilities (arrays (L + 1, T,
k)); an interrupted call goes on by the same command."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from common import add_model_arguments, load_from_args
from vlmdiag import cli
from vlmdiag.interp.lens_page import SCHEMA, read_facts, write_page
from vlmdiag.pictures import chats
from vlmdiag.pictures.mosaic import recorded
from vlmdiag.pictures.samples import Sample, needed, samples_of, with_pictures
from vlmdiag.runs import disk, rundirs
from vlmdiag.runs.experiment import Outcome, Worker, run_worker, worker_for

if TYPE_CHECKING:
    from vlmdiag.runs.rundirs import Run
    from vlmdiag.types import Record

EXPERIMENT = "logit_lens"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--image_dir", "--image_folder", help="folder of pictures, or of those of --messages"
    )
    cli.add_chat_arguments(parser)
    parser.add_argument(
        "--out_dir",
        "--save_folder",
        required=True,
        help="where the pages go; made if it is not there",
    )
    parser.add_argument(
        "--max_images",
        "--num_images",
        type=cli.positive,
        default=None,
        help="only the first so many, by name",
    )
    parser.add_argument(
        "--model_path", "--model_name", default="llava-hf/llava-1.5-7b-hf", help="folder or hub id"
    )
    parser.add_argument("--prompt_text", default="Describe the image.", help="question")
    parser.add_argument(
        "--top_k", type=cli.positive, default=5, help="tokens per position and layer"
    )
    parser.add_argument("--batch_size", type=cli.positive, default=1, help="prompts in a batch")
    cli.add_run_arguments(parser)
    add_model_arguments(parser, path=False)
    args = parser.parse_args(argv)
    cli.check_chat(parser, args, ["image_dir"])
    return args


def read_folder(args: argparse.Namespace) -> list[Sample]:
    """The chats that are given, else a Sample per picture of the folder."""
    if of_chats := chats.given_samples(args, args.image_dir):
        return of_chats[: args.max_images]
    return samples_of(args.image_dir, args.prompt_text, args.max_images)


def is_whole(page: Path) -> bool:
    """Whether a page is there to its end, without the zeros that a power cut may leave."""
    try:
        content = page.read_bytes()
    except OSError:
        return False
    return content.rstrip().endswith(b"</html>") and b"\0" not in content


def write_pages(run: Run, samples: Sequence[Sample], folder: Path, model: str, again: bool) -> int:
    """A page for every finished picture that has none of this form, a damaged one, or one older
    than its numbers. Returns how many were written."""
    import numpy as np

    settings = {name: run.meta["settings"][name] for name in ("dtype", "top_k", "image_aspect")}
    written = 0
    for sample in samples:
        page = folder / f"{model}_{sample.id}_logit_lens.html"
        if not run.is_done(sample.id):
            continue
        is_ours = is_whole(page) and read_facts(page).get("schema") == SCHEMA
        if is_ours and not again and page.stat().st_mtime >= run.changed(sample.id):
            continue
        record = run.record(sample.id)
        arrays = run.arrays(sample.id)
        with needed():
            picture, grid = recorded(record, arrays, sample.image.parent)
        facts = {
            "title": f"{sample.image.name} - {model}",
            "model": model,
            "picture": " ".join(Path(name).name for name in record.get("images", [sample.image])),
            "prompt": record["prompt"],
            "question": sample.question,
        }
        labels, groups, turns = record["labels"], record["groups"], turns_of(record)
        ids, probs = arrays["ids"], arrays["probs"]
        answer = record.get("answer", {"labels": [], "text": ""})  # older runs have none
        if answer["labels"]:
            read = answer["labels"][:-1]
            labels, groups = labels + read, groups + ["generated"] * len(read)
            turns = None if turns is None else turns + [max(turns)] * len(read)
            ids = np.concatenate([ids, arrays["answer_ids"]], 1)
            probs = np.concatenate([probs, arrays["answer_probs"]], 1)
            facts["answer"] = answer["text"]
        write_page(
            page,
            picture,
            grid,
            labels,
            groups,
            ids,
            probs,
            {int(id): word for id, word in record["vocabulary"].items()},
            facts | {"settings": json.dumps(settings)},
            turns,
            answer["labels"],
        )
        written += 1
    return written


def turns_of(record: Record) -> list[int] | None:
    """The turn of each position, -1 before the first; None for a question about a picture."""
    if "turns" not in record:
        return None
    turns = [-1] * len(record["labels"])
    for number, turn in enumerate(record["turns"]):
        for start, end in turn["spans"]:
            turns[start:end] = [number - 1] * (end - start)
    return turns


def make_worker(args: argparse.Namespace) -> Worker:
    """The lens of all pictures."""
    samples = read_folder(args)
    disk.out_folder(args.out_dir)
    from vlmdiag.interp.lens_measures import make_page_process
    from vlmdiag.model.prompts import chat_for, prompt_for

    vlm = load_from_args(args)
    vlm.need("decoder-only")
    prompt = prompt_for(vlm, args.prompt_text).text
    if samples[0].chat is not None:
        prompt = chat_for(vlm, samples[0].chat).text
    return worker_for(
        args,
        vlm,
        EXPERIMENT,
        samples,
        with_pictures,
        make_page_process(vlm, args.top_k),
        {
            "prompt": prompt,
            "top_k": args.top_k,
            "image_aspect": args.image_aspect,
            **chats.settings_of(args),
        },
        {"image_folder": args.image_dir, "batch_size": args.batch_size},
        batch_size=args.batch_size,
    )


def finish(args: argparse.Namespace, outcome: Outcome) -> None:
    """A page for every picture."""
    folder = Path(args.out_dir)
    written = write_pages(
        outcome.run, read_folder(args), folder, rundirs.slug(args.model_path), args.overwrite
    )
    print(
        f"{folder}: {written} pages written; all of them together: python"
        f" scripts/logit_lens/generate_overview.py {shlex.quote(str(folder))}"
        f" {shlex.quote(str(folder))}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    return run_worker(args, make_worker, finish)


if __name__ == "__main__":
    cli.run(main)

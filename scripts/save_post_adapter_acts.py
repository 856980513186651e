"""What does the connector put out on average? Sums over the vision tokens of a folder of pictures,
from which calculate_mean_vector.py makes the mean vector that token ablation puts in place of a
token.

    python scripts/save_post_adapter_acts.py --model_path checkpoints/tiny-llava \\
        --image_dir data/shapes/train2017 --save_path runs/mean_vector/tiny-llava
    python scripts/calculate_mean_vector.py runs/mean_vector/tiny-llava

    mean = sum_t x_t / n,   m2 = sum_t (x_t - mean)^2 per dimension, x_t (d,) a vision token as the
                            decoder gets it; float64, merged picture by picture

Only the vision tower and the connector are loaded and run. arXiv 2410.07149 takes the 50,000
pictures of ImageNet's validation set and float32; the published script writes every activation (472
GB for LLaVA-1.5) to average them later. The item here is a block of 32 pictures in order of their
names: count, mean and m2 of each block are per_image/block-<n>.npz in --out_dir, a run directory.
That is 64 KB a block at d = 4096, 100 MB for ImageNet (a file a picture would be 3.3 GB and 100,000
files); a killed run loses one block and goes on by the same command; and blocks merge in order, so
that an interrupted or sharded run gives the same bytes. Pictures that cannot be read are left out,
noted in failures/ (exit code 3) and tried again by every call.

--keep_acts also writes the activations themselves: acts/block-<n>.safetensors, {file name: (P, d)}
in the run's dtype. safetensors, not npz: one picture's tensor is read without the others, bfloat16
is kept, and P may differ between pictures. estimate_acts_size.py says beforehand how much that is.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from common import add_model_arguments, load_from_args
from vlmdiag import cli
from vlmdiag.cli import UsageError
from vlmdiag.interp.targets import BLOCK, model_of
from vlmdiag.pictures.samples import list_pictures, load_image
from vlmdiag.runs import rundirs
from vlmdiag.runs.experiment import Outcome, Worker, run_worker

if TYPE_CHECKING:
    from PIL.Image import Image

    from common import VLM
    from vlmdiag.interp.mean_vector import Block

EXPERIMENT = "mean_vector"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--image_dir",
        required=True,
        help=(
            "folder of pictures, jpg, png, webp and others in any case; folders in it are left out"
        ),
    )
    parser.add_argument(
        "--out_dir", "--save_path", required=True, help="run directory for the sums"
    )
    parser.add_argument(
        "--max_images", type=cli.positive, default=None, help="only the first so many, by name"
    )
    parser.add_argument(
        "--batch_size", type=cli.positive, default=32, help="pictures at a time in the vision tower"
    )
    parser.add_argument(
        "--model_name",
        "--model_path",
        dest="model_path",
        default="llava-1.5-7b-hf",
        help="folder, hub id, or name in checkpoints/ or llava-hf/",
    )
    parser.add_argument(
        "--keep_acts", action="store_true", help="also write the activations themselves"
    )
    cli.add_engine_arguments(parser, "batch of blocks", "; all into one --out_dir")
    add_model_arguments(parser, path=False)
    parser.set_defaults(dtype="float32")
    args = parser.parse_args(argv)
    if args.overwrite and args.shard != (0, 1):
        raise UsageError(
            "--overwrite removes what other shards finished: remove the folder by hand, then start"
            " all shards without it"
        )
    args.model_path = model_of(args.model_path)
    return args


def load_tower(args: argparse.Namespace) -> VLM:
    """The model without its decoder's layers, which no vision token of ours passes: of LLaVA-1.5-7B
    2.4 GB in float32 in place of 28. As a whole where its family wants all that its files hold."""
    args.no_self_check = True  # its checks are about the decoder
    try:
        return load_from_args(args, decoder_layers=0)
    except UsageError:
        vlm = load_from_args(args)
        print("the decoder's layers could not be left out for this model, so all of it was loaded")
        return vlm


def open_picture(path: Path) -> Image | Exception:
    """A picture, or the error that it is unreadable by."""
    try:
        return load_image(path)
    except (OSError, ValueError) as error:
        return error


def make_worker(args: argparse.Namespace) -> Worker:
    """The sums of all blocks of pictures."""
    image_dir = Path(args.image_dir)
    names = [file.name for file in list_pictures(image_dir)][: args.max_images]
    from vlmdiag.interp.mean_vector import Block, make_process, reopen
    from vlmdiag.model.identity import fingerprint, identity_of

    blocks = [
        Block(f"block-{n:06d}", tuple(names[start : start + BLOCK]), image_dir)
        for n, start in enumerate(range(0, len(names), BLOCK))
    ]
    vlm = load_tower(args)
    identity = identity_of(vlm) | {
        "vision_tower": args.vision_tower_path and fingerprint(args.vision_tower_path),
        "image_aspect": args.image_aspect,
        "block": BLOCK,
        "pictures": len(names),
        "list_digest": sha256(os.fsencode("\n".join(names))).hexdigest()[:16],
    }
    free = {
        "model_path": args.model_path,
        "image_dir": args.image_dir,
        "batch_size": args.batch_size,
        "device": str(vlm.device),
        "keep_acts": args.keep_acts,
    }
    where = Path(args.out_dir)

    def prepare(run: rundirs.Run, of_call: Sequence[Block]) -> None:
        if args.overwrite:
            shutil.rmtree(run.path / "acts", ignore_errors=True)
        reopen(run, of_call, args.keep_acts)

    def open_pictures(block: Block) -> tuple[Block, dict[str, Image | Exception]]:
        return block, {name: open_picture(image_dir / name) for name in block.names}

    return Worker(
        where,
        EXPERIMENT,
        identity,
        free,
        blocks,
        open_pictures,
        make_process(vlm, rundirs.Run(where, {}), image_dir, args.batch_size, args.keep_acts),
        batch_size=max(1, args.batch_size // BLOCK),  # blocks that pass the tower together
        progress="blocks",
        about=f"{len(names)} pictures, {vlm.family.name} on {vlm.device}, {identity['dtype']}",
        prepare=prepare,
    )


def finish(args: argparse.Namespace, outcome: Outcome) -> int:
    """Say which pictures cannot be used, and what makes the mean; returns the exit code."""
    run = outcome.run
    blocks = [run.record(id) for id in outcome.ids if run.is_done(id)]
    unreadable = [name for block in blocks for name in block["unreadable"]]
    if unreadable:
        print(
            f"{len(unreadable)} pictures cannot be used, such as {min(unreadable)}, see"
            f" {run.path / 'failures'}; the same command tries them again"
        )
    print(f"next, when all shards are done: python scripts/calculate_mean_vector.py {args.out_dir}")
    return 3 if unreadable else 0


def main(argv: Sequence[str] | None = None) -> int:
    return run_worker(parse_args(argv), make_worker, finish)


if __name__ == "__main__":
    cli.run(main)

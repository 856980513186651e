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
names: count, mean and m2 of each block are per_image/block-<n>.npz in --save_path, a run directory.
That is 64 KB a block at d = 4096, 100 MB for ImageNet (a file a picture would be 3.3 GB and 100,000
files); a killed run loses one block and goes on by the same command; and blocks merge in order, so
that an interrupted or sharded run gives the same bytes. Pictures that cannot be read are left out,
noted in failures/ (exit code 3) and tried again by every call.

--keep_acts also writes the activations themselves: acts/block-<n>.safetensors, {file name: (P, d)}
in the run's dtype. safetensors, not npz: one picture's tensor is read without the others, bfloat16
is kept, and P may differ between pictures. estimate_acts_size.py says beforehand how much that is.
"""

import contextlib
import os
import shutil
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from unittest.mock import patch

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

import common
from common import add_model_arguments, load_from_args
from vlmdiag import cli
from vlmdiag.cli import UsageError
from vlmdiag.interp.targets import BLOCK, model_of
from vlmdiag.model.loading import fingerprint, identity_of
from vlmdiag.pictures.samples import Sample, list_pictures, load_image
from vlmdiag.runs import engine, rundirs

EXPERIMENT = "mean_vector"


@dataclass(frozen=True)
class Block:
    """The item: up to BLOCK pictures, by file name."""

    id: str
    names: tuple


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--image_dir",
        required=True,
        help=(
            "folder of pictures, jpg, png, webp and others in any case; folders in it are left out"
        ),
    )
    parser.add_argument("--save_path", required=True, help="run directory for the sums")
    parser.add_argument(
        "--batch_size", type=int, default=32, help="pictures at a time in the vision tower"
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
    parser.add_argument("--num_workers", type=int, default=2, help="threads that decode pictures")
    parser.add_argument(
        "--shard",
        type=cli.shard,
        default=(0, 1),
        help="i/n: only every n-th batch of blocks, from the i-th; all into one --save_path",
    )
    parser.add_argument(
        "--overwrite", "--no_resume", action="store_true", help="start again instead of going on"
    )
    add_model_arguments(parser, path=False)
    parser.set_defaults(dtype="float32")
    args = parser.parse_args(argv)
    if args.batch_size < 1 or args.num_workers < 0:
        raise UsageError("--batch_size counts from 1 and --num_workers from 0")
    if args.overwrite and args.shard != (0, 1):
        raise UsageError(
            "--overwrite removes what other shards finished: remove the folder by hand, then start"
            " all shards without it"
        )
    args.model_path = model_of(args.model_path)
    return args


def list_blocks(image_dir):
    """The pictures of a folder in order of their names, as Blocks."""
    names = [file.name for file in list_pictures(image_dir)]
    return [
        Block(f"block-{n:06d}", tuple(names[start : start + BLOCK]))
        for n, start in enumerate(range(0, len(names), BLOCK))
    ]


def load(args):
    """The model without its decoder's layers, which no vision token of ours passes: of LLaVA-1.5-7B
    2.4 GB in float32 in place of 28. As a whole where its family wants all that its files hold."""
    config, family = common.read_config(args.model_path, args.trust_remote_code)
    decoder = config.get_text_config()
    decoder.num_hidden_layers = 0
    if getattr(decoder, "layer_types", None) is not None:
        decoder.layer_types = []
    args.no_self_check = True  # its checks are about the decoder
    with (
        contextlib.suppress(UsageError),
        patch.object(common, "read_config", lambda *_: (config, family)),
    ):
        return load_from_args(args)
    print("the decoder's layers could not be left out for this model, so all of it was loaded")
    return load_from_args(args)


# --- sums -----------------------------------------------------------------------------------------


def add(total, tokens):
    """(count, mean (d,), m2 (d,)) with the tokens (n, d) added, float64; total: the same, or None
    for no token yet. Chan, Golub and LeVeque 1979."""
    tokens = tokens.double()
    count, mean = len(tokens), tokens.mean(0)
    m2 = (tokens - mean).square().sum(0)
    if total is None:
        return count, mean, m2
    before, mean_before, m2_before = total
    whole, step = before + count, mean - mean_before
    return (
        whole,
        mean_before + step * (count / whole),
        m2_before + m2 + step.square() * (before * count / whole),
    )


def features(vlm, part):
    """Of each picture of [(name, picture), ...] its (P, d) vision tokens, or the ValueError that
    the processor raises for it."""
    try:
        batch = vlm.encode(
            [Sample(name, None, "Describe the image.") for name, _ in part],
            [picture for _, picture in part],
        )
    except ValueError as error:
        return (
            [error] if len(part) == 1 else [found for one in part for found in features(vlm, [one])]
        )
    return vlm.vision(batch).pooler_output


def make_process(args, vlm, run, unreadable):
    """process([(block, {name: picture or error}), ...]) -> [(record, arrays), ...]. Notes pictures
    that cannot be used in failures/ and in `unreadable`."""
    width = vlm.model.config.get_text_config().hidden_size

    @torch.inference_mode()
    def process(loaded):
        sums, kept = {}, {block.id: {} for block, _ in loaded}
        errors = {
            block.id: {
                name: found for name, found in opened.items() if isinstance(found, Exception)
            }
            for block, opened in loaded
        }
        whole = [
            (block, name, picture)
            for block, opened in loaded
            for name, picture in opened.items()
            if name not in errors[block.id]
        ]
        for start in range(0, len(whole), args.batch_size):
            part = whole[start : start + args.batch_size]
            for (block, name, _), tokens in zip(
                part, features(vlm, [(name, picture) for _, name, picture in part]), strict=True
            ):
                if isinstance(tokens, Exception):
                    errors[block.id][name] = tokens
                    continue
                sums[block.id] = add(sums.get(block.id), tokens)
                if args.keep_acts:
                    kept[block.id][name] = tokens.cpu().contiguous()
        return [
            result(block, sums.get(block.id), errors[block.id], kept[block.id])
            for block, _ in loaded
        ]

    def result(block, total, errors, kept):
        for name, error in errors.items():
            run.fail(failure_id(name), error, stage="load", image=str(Path(args.image_dir) / name))
        unreadable.extend(errors)
        if args.keep_acts:
            write_acts(run.path / "acts" / f"{block.id}.safetensors", kept)
        count, mean, m2 = total or (0, torch.zeros(width), torch.zeros(width))
        record = {
            "pictures": len(block.names) - len(errors),
            "vectors": count,
            "first": block.names[0],
            "last": block.names[-1],
            "unreadable": sorted(errors),
        }
        return record, {
            "count": count,
            "mean": mean.double().cpu().numpy(),
            "m2": m2.double().cpu().numpy(),
        }

    return process


def failure_id(name):
    """A picture's name as the name of its failure file."""
    return (
        f"picture-{name}"
        if len(name.encode()) < 150
        else f"picture-{sha256(name.encode()).hexdigest()}"
    )


def write_acts(path, tensors):
    """One block's activations, {file name: (P, d)}, in one step."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(exist_ok=True)
        save_file(tensors, temporary)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise UsageError(
            f"cannot write {path} ({error}); finished blocks are kept, the same command goes on"
            " from there"
        ) from error


def reopen(run, blocks, keep_acts):
    """Make those blocks unfinished again that lack a picture, which may be readable by now, or
    their activations with --keep_acts."""
    for block in blocks:
        if not run.is_done(block.id):
            continue
        unreadable = run.record(block.id)["unreadable"]
        if unreadable or (
            keep_acts and not (run.path / "acts" / f"{block.id}.safetensors").exists()
        ):
            (run.path / "per_image" / f"{block.id}.json").unlink()
            for name in unreadable:
                (run.path / "failures" / f"{failure_id(name)}.json").unlink(missing_ok=True)


def main(argv=None):
    args = parse_args(argv)
    blocks = list_blocks(args.image_dir)
    names = [name for block in blocks for name in block.names]
    vlm = load(args)
    identity = identity_of(vlm)
    identity |= {
        "vision_tower": args.vision_tower_path and fingerprint(args.vision_tower_path),
        "image_aspect": args.image_aspect,
        "block": BLOCK,
    }
    identity |= {
        "pictures": len(names),
        "list_digest": sha256("\n".join(names).encode()).hexdigest()[:16],
    }
    free = {
        "model_path": args.model_path,
        "image_dir": args.image_dir,
        "batch_size": args.batch_size,
        "device": str(vlm.device),
        "keep_acts": args.keep_acts,
    }
    run = rundirs.open_run(args.save_path, EXPERIMENT, identity, free, args.overwrite)
    if args.overwrite:
        shutil.rmtree(run.path / "acts", ignore_errors=True)
    together, (index, count) = (
        max(1, args.batch_size // BLOCK),
        args.shard,
    )  # blocks that pass the tower together, whole in one shard
    blocks = [block for n, block in enumerate(blocks) if n // together % count == index]
    reopen(run, blocks, args.keep_acts)
    print(
        f"{run.path}: {len(names)} pictures in blocks of {BLOCK}, {len(blocks)} of them here,"
        f" {vlm.family.name} on {vlm.device}, {identity['dtype']}"
    )

    def open_pictures(block):
        return block, {name: open_picture(Path(args.image_dir) / name) for name in block.names}

    unreadable = []
    process = make_process(args, vlm, run, unreadable)
    counts = engine.run_items(
        run,
        blocks,
        open_pictures,
        process,
        together,
        num_workers=args.num_workers,
        progress="blocks",
    )
    if unreadable:
        shown = (
            f"such as {sorted(unreadable)[0]}, see {run.path / 'failures'}; the same command tries"
            " them again"
        )
        print(f"{len(unreadable)} pictures cannot be used, {shown}")
    code = engine.exit_code(counts, run)
    print(
        f"next, when all shards are done: python scripts/calculate_mean_vector.py {args.save_path}"
    )
    return 3 if unreadable else code


def open_picture(path):
    """A picture, or the error that it is unreadable by."""
    try:
        return load_image(path)
    except (OSError, ValueError) as error:
        return error


if __name__ == "__main__":
    cli.run(main)

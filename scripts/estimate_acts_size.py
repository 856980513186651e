"""How large would a cache of all vision tokens of a folder of pictures be? arXiv 2410.07149; our
study's 1.5.

    python scripts/estimate_acts_size.py --model_path checkpoints/tiny-llava \\
        --image_dir data/shapes/train2017 --sample_size 20

    bytes of a picture = P * d * bytes of a number;   LLaVA-1.5, float32: 576 * 4096 * 4 = 9.44 MB

P comes from the model's own processor on --sample_size pictures drawn at random, d from the config;
no weight is read. One picture is enough where every picture has as many tokens; where they depend
on its size (Qwen-VL), the total comes with the standard error of the sample. The last line is what
save_post_adapter_acts.py writes without --keep_acts: count, mean and squared deviations of each
block of 32 pictures.
"""

import random
from unittest.mock import patch

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.utils import logging as hf_logging

from vlmdiag import cli
from vlmdiag.cli import UsageError
from vlmdiag.interp.targets import BLOCK, model_of
from vlmdiag.model.loading import DTYPES, read_config
from vlmdiag.pictures.samples import list_pictures, load_image


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("--image_dir", required=True, help="folder of pictures")
    parser.add_argument(
        "--sample_size", type=int, default=1, help="pictures to take the number of tokens from"
    )
    parser.add_argument(
        "--model_name",
        "--model_path",
        dest="model_path",
        default="llava-1.5-7b-hf",
        help="folder, hub id, or name in checkpoints/ or llava-hf/",
    )
    parser.add_argument("--dtype", default="float32", choices=list(DTYPES), help="of the cache")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument(
        "--vision_tower_path", default=None, help="vision tower for checkpoints that do not hold it"
    )
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="let the checkpoint's own code run"
    )
    args = parser.parse_args(argv)
    if args.sample_size < 1:
        raise UsageError("--sample_size counts from 1")
    args.model_path = model_of(args.model_path)
    return args


def read_processor(args):
    """(config, processor) of a model: its family's own loading, with parameters on the meta device
    in place of those in its files."""
    hf_logging.set_verbosity_error()
    config, family = read_config(args.model_path, args.trust_remote_code)

    def empty(kind, *_, config, **__):
        with torch.device("meta"):
            return kind(config), {"missing_keys": (), "mismatched_keys": (), "unexpected_keys": ()}

    options = {
        "vision_tower_path": args.vision_tower_path,
        "trust_remote_code": args.trust_remote_code,
    }
    try:
        with patch.object(PreTrainedModel, "from_pretrained", classmethod(empty)):
            return (
                config,
                family.load(args.model_path, config, dtype=DTYPES[args.dtype], **options)[1],
            )
    except (OSError, ValueError, KeyError, AttributeError, ImportError, RuntimeError) as error:
        raise UsageError(
            f"{args.model_path} cannot be read: {' '.join(str(error).split())[:300]}"
        ) from error


def count_tokens(config, processor, pictures):
    """Vision tokens of each picture, (n,) int."""
    counts = []
    for picture in pictures:
        ids = processor(images=picture, text=processor.image_token, return_tensors="pt")[
            "input_ids"
        ][0]
        counts.append(int((ids == config.image_token_id).sum()))
    return np.array(counts)


def shown(size):
    """Bytes as people write them, in powers of 1000."""
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.4g} {unit}"
        size /= 1000
    return f"{size:.4g} TB"


def main(argv=None):
    args = parse_args(argv)
    files = list_pictures(args.image_dir)
    config, processor = read_processor(args)
    sample, pictures = random.Random(args.seed).sample(files, min(args.sample_size, len(files))), []
    for file in sample:
        try:
            pictures.append(load_image(file))
        except (OSError, ValueError) as error:
            print(f"left out of the sample: {error}")
    if not pictures:
        raise UsageError(
            f"none of the {len(sample)} pictures of the sample can be read; use a larger"
            " --sample_size"
        )
    counts, width = count_tokens(config, processor, pictures), config.get_text_config().hidden_size
    number = DTYPES[args.dtype].itemsize
    each, total = counts.mean() * width * number, counts.mean() * width * number * len(files)
    error = (
        total * counts.std(ddof=1) / counts.mean() / len(counts) ** 0.5 if len(counts) > 1 else 0.0
    )
    tokens = (
        f"{counts.min()}"
        if counts.min() == counts.max()
        else f"{counts.min()} to {counts.max()}, mean {counts.mean():.1f}"
    )
    rows = [
        ("pictures", f"{len(files)} ({len(counts)} looked at)"),
        ("vision tokens of a picture", f"{tokens}; d = {width}, {args.dtype}"),
        ("activations of a picture", shown(each)),
        (
            "activations of all (--keep_acts)",
            shown(total) + (f" +- {shown(error)}" if error else ""),
        ),
        ("sums for the mean alone", shown(-(-len(files) // BLOCK) * (2 * width + 1) * 8)),
    ]
    for name, value in rows:
        print(f"{name:34s}{value}")
    return 0


if __name__ == "__main__":
    cli.run(main)

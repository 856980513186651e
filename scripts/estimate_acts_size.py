"""How large would a cache of all vision tokens of a folder of pictures be? arXiv 2410.07149;
docs/studies/llava_interp.md, section 1.5.

    python scripts/estimate_acts_size.py --model_path checkpoints/tiny-llava \\
        --image_dir data/shapes/train2017 --sample_size 20

    bytes of a picture = P * d * bytes of a number;   LLaVA-1.5, float32: 576 * 4096 * 4 = 9.44 MB

P comes from the model's own processor on --sample_size pictures drawn at random, d from the config;
no weight is read. One picture is enough where every picture has as many tokens; where they depend
on its size (Qwen-VL), the total comes with the standard error of the sample. The last line is what
save_post_adapter_acts.py writes without --keep_acts: count, mean and squared deviations of each
block of 32 pictures.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

from common import DTYPES
from vlmdiag import cli
from vlmdiag.cli import UsageError
from vlmdiag.interp.targets import BLOCK, model_of
from vlmdiag.pictures.samples import list_pictures, load_image

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Int
    from PIL.Image import Image
    from transformers import PreTrainedConfig, ProcessorMixin


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument("--image_dir", required=True, help="folder of pictures")
    parser.add_argument(
        "--sample_size",
        type=cli.positive,
        default=1,
        help="pictures to take the number of tokens from",
    )
    parser.add_argument(
        "--model_name",
        "--model_path",
        dest="model_path",
        default="llava-1.5-7b-hf",
        help="folder, hub id, or name in checkpoints/ or llava-hf/",
    )
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="of the cache")
    parser.add_argument("--seed", type=cli.seed, default=0, help="of the sample")
    parser.add_argument(
        "--vision_tower_path", default=None, help="vision tower for checkpoints that do not hold it"
    )
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="let the checkpoint's own code run"
    )
    args = parser.parse_args(argv)
    args.model_path = model_of(args.model_path)
    return args


def read_processor(args: argparse.Namespace) -> tuple[PreTrainedConfig, ProcessorMixin]:
    """Config and processor of a model; no weight is read."""
    from vlmdiag.model import configs, loading, precision

    config, family = configs.read_config(args.model_path, args.trust_remote_code)
    with loading.without_weights():
        _, processor = loading.load_family(
            family,
            args.model_path,
            config,
            dtype=precision.DTYPES[args.dtype],
            vision_tower_path=args.vision_tower_path,
            trust_remote_code=args.trust_remote_code,
        )
    return config, processor


def count_tokens(
    config: PreTrainedConfig, processor: ProcessorMixin, pictures: Sequence[Image]
) -> Int[np.ndarray, " n"]:
    """Vision tokens of each picture."""
    import numpy as np

    counts = []
    for picture in pictures:
        inputs = processor(images=picture, text=processor.image_token, return_tensors="pt")
        counts.append(int((inputs["input_ids"][0] == config.image_token_id).sum()))
    return np.array(counts)


def shown(size: float) -> str:
    """Bytes as people write them, in powers of 1000."""
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.4g} {unit}"
        size /= 1000
    return f"{size:.4g} TB"


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    files = list_pictures(args.image_dir)
    config, processor = read_processor(args)
    drawn = random.Random(args.seed).sample(files, min(args.sample_size, len(files)))
    pictures = []
    for file in drawn:
        try:
            pictures.append(load_image(file))
        except (OSError, ValueError) as error:
            print(f"left out of the sample: {error}")
    if not pictures:
        raise UsageError(
            f"none of the {len(drawn)} pictures of the sample can be read; use a larger"
            " --sample_size"
        )
    from vlmdiag.model.precision import DTYPES as sizes

    counts = count_tokens(config, processor, pictures)
    width = config.get_text_config().hidden_size
    of_picture = counts.mean() * width * sizes[args.dtype].itemsize
    total = of_picture * len(files)
    all_of_them = shown(total)
    tokens = f"{counts.min()}"
    if counts.min() != counts.max():
        relative_error = counts.std(ddof=1) / counts.mean() / len(counts) ** 0.5
        all_of_them += f" +- {shown(total * relative_error)}"
        tokens = f"{counts.min()} to {counts.max()}, mean {counts.mean():.1f}"
    blocks = -(-len(files) // BLOCK)
    rows = {
        "pictures": f"{len(files)} ({len(counts)} looked at)",
        "vision tokens of a picture": f"{tokens}; d = {width}, {args.dtype}",
        "activations of a picture": shown(of_picture),
        "activations of all (--keep_acts)": all_of_them,
        "sums for the mean alone": shown(blocks * (2 * width + 1) * 8),
    }
    for name, value in rows.items():
        print(f"{name:34s}{value}")
    return 0


if __name__ == "__main__":
    cli.run(main)

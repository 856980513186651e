"""Idefics3 (arXiv 2408.12637) and SmolVLM (arXiv 2504.05299): square tiles with their places as
text, pixel shuffle, Llama.

Prompt: for each tile, row by row, <fake_token_around_image><row_r_col_c><image> x n, a line break
behind each row of tiles; then, behind one more line break,
<fake_token_around_image><global-img><image> x n<fake_token_around_image>, the whole picture on one
more tile. The picture is scaled to its longest side, then stretched to whole tiles, so nothing is
cropped or padded; without do_image_splitting in the processor's settings there is only the last
tile. A tile's patches come out of the tower without CLS, and each s x s of them (scale_factor) are
stacked into one vision token, row-major.

SmolVLM's pictures go through Idefics3's processor, which writes the same text; its own would need
packages for videos.

Tested on small random models with processors made in the tests: the contract. Not tested: we had no
published weights.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from transformers import (
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    SmolVLMForConditionalGeneration,
)

from vlmdiag.families import Family, generic
from vlmdiag.pictures.grid import PatchGrid

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Int
    from transformers import BaseImageProcessor, PreTrainedConfig
    from typing_extensions import Unpack

    from vlmdiag.families.contract import Inputs, Loaded, LoadOptions, Size
    from vlmdiag.types import VLM

LOADERS = {
    "idefics3": generic.loader(Idefics3ForConditionalGeneration, Idefics3Processor),
    "smolvlm": generic.loader(SmolVLMForConditionalGeneration, Idefics3Processor),
}
LARGEST = 4096  # pixels of a side after scaling, in both image processors
PLACES = tuple(f"<row_{row}_col_{column}>" for row in range(1, 9) for column in range(1, 9))


def load(path: str, config: PreTrainedConfig, **options: Unpack[LoadOptions]) -> Loaded:
    """By the loader of the model's type."""
    return LOADERS[config.model_type](path, config, **options)


def scaled(size: Size, longest: int) -> Size:
    """The picture's size after scaling: its longer side is `longest`, the shorter one the next even
    number; no side over LARGEST."""
    width, height = size
    if width >= height:
        short = int(longest / (width / height))
        width, height = longest, short + short % 2
    else:
        short = int(longest * (width / height))
        width, height = short + short % 2, longest
    if max(width, height) > LARGEST:
        ratio = width / height
        if width >= height:
            width, height = LARGEST, int(LARGEST / ratio)
        else:
            width, height = int(LARGEST * ratio), LARGEST
    return max(width, 1), max(height, 1)


def tile_counts(image_processor: BaseImageProcessor, size: Size) -> tuple[int, int]:
    """(rows, columns) of tiles for a picture of `size`; (0, 0): the whole picture on one tile
    alone."""
    if not image_processor.do_image_splitting:
        return 0, 0
    width, height = size
    if image_processor.do_resize:
        width, height = scaled(size, image_processor.size["longest_edge"])
    tile = image_processor.max_image_size["longest_edge"]
    ratio = width / height
    if width >= height:
        columns = math.ceil(width / tile)
        rows = math.ceil(int(columns * tile / ratio) / tile)
    else:
        rows = math.ceil(height / tile)
        columns = math.ceil(int(rows * tile * ratio) / tile)
    return (0, 0) if rows == columns == 1 else (rows, columns)


def grid(vlm: VLM, size: Size, inputs: Inputs) -> PatchGrid:
    """Tiles row by row, then the whole picture."""
    config = vlm.model.config
    edge = inputs["pixel_values"].shape[-1]
    side = edge // config.vision_config.patch_size // config.scale_factor
    rows, columns = tile_counts(vlm.processor.image_processor, size)
    if not rows:
        return PatchGrid.regular(side, side, (0, 0, *size), size)
    tiles = [*generic.regions(rows, columns, size), (0, 0, *size)]
    return generic.grid_of_tiles(tiles, side, side, size)


def sources(vlm: VLM, size: Size, inputs: Inputs) -> Int[np.ndarray, "P k"]:
    """scale_factor x scale_factor patches of each tile."""
    config = vlm.model.config
    _, count, *_, edge = inputs["pixel_values"].shape
    side = edge // config.vision_config.patch_size // config.scale_factor
    return generic.merged(side, side, config.scale_factor, count)


FAMILY = Family(
    name="idefics3",
    model_types=tuple(LOADERS),
    architectures=("Idefics3ForConditionalGeneration", "SmolVLMForConditionalGeneration"),
    load=load,
    parts=generic.parts_with_tower,
    grid=grid,
    sources=sources,
    positions=generic.positions,
    rotary=generic.rotary,
    markup=("<fake_token_around_image>", "<global-img>", *PLACES),
    has=frozenset({"decoder-only", "causal", "rotary", "grid"}),
)

"""InternVL (arXiv 2312.14238; InternVL3: 2504.10479) in transformers' layout: the `-hf`
checkpoints, most of them on Qwen2, Qwen3 or Llama text models; Qianfan-OCR, which has the same
layout.

Prompt: <img>, <IMG_CONTEXT> x 256 per tile, </img>, a line break, the question; no end of a tile is
marked. The picture is resized, its shape not kept, to a canvas of up to 12 square tiles whose
proportions are nearest to its own, cut row by row; where there is more than one tile, the whole
picture on one more tile (the thumbnail) comes last. A tile's patches (32 x 32 of 14 pixels) leave
the tower behind a CLS, which is dropped, and each 2 x 2 of them are stacked into one vision token
(pixel shuffle): token (i, j) of a tile is made of patches (2i .. 2i + 1, 2j .. 2j + 1), row-major.
So a thumbnail's box lies over many of the tiles'.

Videos are not read (their processor needs torchvision). Checkpoints of the type `internvl_chat`,
which bring their own code, are another layout. Tested on small random models with processors made
in the tests: tiles by their pixels, logits and greedy answers against transformers' own class. Not
tested: we had no published weights or tokenizers; text models other than Qwen2, Llama
and GPT-OSS.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

from vlmdiag.families import Family, generic
from vlmdiag.pictures.grid import PatchGrid

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Int
    from transformers import BaseImageProcessor

    from vlmdiag.families.contract import Inputs, Size
    from vlmdiag.types import VLM


def tiled(image_processor: BaseImageProcessor, size: Size, count: int, side: int) -> PatchGrid:
    """PatchGrid of a picture cut into `count` tiles of side x side tokens, row by row, the whole
    picture last where there is more than one."""
    if count == 1:
        return PatchGrid.regular(side, side, (0, 0, *size), size)
    tile = image_processor.size["height"], image_processor.size["width"]
    fewest, most = image_processor.min_patches, image_processor.max_patches
    columns, rows = get_optimal_tiled_canvas(size[::-1], tile, fewest, most)
    tiles = [*generic.regions(rows, columns, size), (0, 0, *size)]
    return generic.grid_of_tiles(tiles, side, side, size)


def grid(vlm: VLM, size: Size, inputs: Inputs) -> PatchGrid:
    """Tiles of the canvas, then the thumbnail."""
    config = vlm.model.config
    count, *_, edge = inputs["pixel_values"].shape
    side = int(edge // config.vision_config.patch_size[1] * config.downsample_ratio)
    return tiled(vlm.processor.image_processor, size, count, side)


def sources(vlm: VLM, size: Size, inputs: Inputs) -> Int[np.ndarray, "P k"]:
    """2 x 2 patches behind each tile's CLS."""
    config = vlm.model.config
    count, *_, edge = inputs["pixel_values"].shape
    factor = round(1 / config.downsample_ratio)
    side = edge // config.vision_config.patch_size[1] // factor
    return generic.merged(side, side, factor, count, cls=1)


FAMILY = Family(
    name="internvl",
    model_types=("internvl", "qianfan_ocr"),
    architectures=("InternVLForConditionalGeneration", "QianfanOCRForConditionalGeneration"),
    load=generic.load,
    parts=generic.parts_with_tower,
    grid=grid,
    sources=sources,
    positions=generic.positions,
    rotary=generic.rotary,
    markup=("<img>", "</img>"),
    has=frozenset({"decoder-only", "causal", "rotary", "grid"}),
)

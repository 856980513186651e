"""Aya Vision (arXiv 2505.08751): SigLIP2 on tiles, pixel shuffle, a Cohere2 (Command R7B) or Cohere
text model.

Prompt: <|START_OF_IMG|>, then for every tile TILE_1, TILE_2, ... and its <|IMG_PATCH|> x 169, then
TILE_GLOBAL and the 169 tokens of the whole picture, then <|END_OF_IMG|>. A picture that fits one
tile has TILE_GLOBAL alone. Tiles and their order are InternVL's (internvl.py): a canvas of up to 12
square tiles, cut row by row, the whole picture last; 26 x 26 patches of a tile become 13 x 13
tokens of 2 x 2 patches each, row-major. The tower has no CLS.

Cohere turns neighbouring dimensions (not halves), and every fourth layer of Cohere2, those with
full attention, has no positions at all: there the RoPE probe measures 0. Its other layers see a
window of 4096 positions. Cohere's text models multiply their logits by the config's
logit_scale; transformers' AyaVision class leaves that out, and so do we: probabilities are sharper
than in training, greedy answers the same. check_model.py says so.

Tested on small random models with processors made in the tests: tokens against transformers' own
processor, tiles by their pixels, logits and greedy answers against transformers' own class. Not
tested: we had no published weights or tokenizers; the older Cohere text model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers import AyaVisionForConditionalGeneration, AyaVisionProcessor

from vlmdiag.families import Family, generic
from vlmdiag.families.internvl import tiled

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Int

    from vlmdiag.families.contract import Inputs, Size
    from vlmdiag.pictures.grid import PatchGrid
    from vlmdiag.types import VLM


def tiles(vlm: VLM, inputs: Inputs) -> tuple[int, int]:
    """Tiles of a picture, the whole one included, and vision tokens along a side of one."""
    config = vlm.model.config
    count, *_, edge = inputs["pixel_values"].shape
    return count, edge // config.vision_config.patch_size // config.downsample_factor


def grid(vlm: VLM, size: Size, inputs: Inputs) -> PatchGrid:
    """Tiles of the canvas, then the whole picture."""
    count, side = tiles(vlm, inputs)
    return tiled(vlm.processor.image_processor, size, count, side)


def sources(vlm: VLM, size: Size, inputs: Inputs) -> Int[np.ndarray, "P k"]:
    """2 x 2 patches of each tile."""
    count, side = tiles(vlm, inputs)
    return generic.merged(side, side, vlm.model.config.downsample_factor, count)


FAMILY = Family(
    name="aya_vision",
    model_types=("aya_vision",),
    architectures=("AyaVisionForConditionalGeneration",),
    load=generic.loader(AyaVisionForConditionalGeneration, AyaVisionProcessor),
    parts=generic.parts_with_tower,
    grid=grid,
    sources=sources,
    positions=generic.positions,
    rotary=generic.rotary,
    markup=("<|START_OF_IMG|>", "<|END_OF_IMG|>", "TILE_GLOBAL"),
    has=frozenset({"decoder-only", "causal", "rotary", "grid"}),
)

"""Ovis 2 (arXiv 2405.20797) in transformers' layout (`Ovis2-...-hf`): AIMv2 on tiles, a visual
vocabulary, Qwen2.

Prompt: <IMG_START>, the whole picture's <IMG_ATOM> x 256, <IMG_GRID>, then for more than one tile
those of each tile, <IMG_COL> between columns and <IMG_ROW> between rows, and <IMG_END>; then the
question, all in Qwen2's template. The tower's patches, 2 x 2 of them stacked, are scored against a
visual vocabulary; a vision token is the mean of its embeddings under the softmax of the scores.
<IMG_START> and the like have rows of that table too, in place of their text embeddings; a hook on
the text embedding gives them wherever those of a prompt are asked for. Order: the whole picture,
then tiles row by row, tokens row-major.

Tiles: the fewest squares that cover 90 % of the picture. transformers 5.23 counts them as (rows,
columns) and then takes the pair as (columns, rows): a picture three times as wide as high becomes
three tiles one above the other, squeezed to them, while its own arithmetic of their cover cuts side
by side. We follow what the processor does, and the grid says which pixels a token has seen.

Tested on small random models (tiles and none) with processors made in the tests: tokens against
transformers' own processor, tiles by their pixels, logits and greedy answers against transformers'
own class. Not tested: we had no published weights or tokenizers; argmax in the softmax's place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import Ovis2ForConditionalGeneration, Ovis2Processor
from transformers.models.ovis2.image_processing_pil_ovis2 import (
    get_min_tile_covering_grid,
    get_optimal_tiled_canvas,
)

from vlmdiag.families import Family, Parts, generic
from vlmdiag.pictures.grid import PatchGrid

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Int
    from torch import Tensor, nn
    from transformers import BaseImageProcessor, PreTrainedConfig, PreTrainedModel
    from typing_extensions import Unpack

    from vlmdiag.families.contract import Inputs, Loaded, LoadOptions, Size
    from vlmdiag.types import VLM

LOAD = generic.loader(Ovis2ForConditionalGeneration, Ovis2Processor)


def load(path: str, config: PreTrainedConfig, **options: Unpack[LoadOptions]) -> Loaded:
    """transformers' class, whose text embedding gives <IMG_START> and the like their visual
    embeddings."""
    model, processor = LOAD(path, config, **options)
    table = model.model.visual_embeddings_table
    first = -config.vision_config.num_visual_indicator_tokens  # their rows are the table's last
    indicators = list(enumerate(config.visual_indicator_token_ids, first))

    def with_indicators(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        ids = args[0]
        if ids.shape[-1] == 1:  # a generated one keeps its text embedding, as in transformers
            return output
        for row, token in indicators:
            places = (ids == token).to(output.device)[..., None]
            output = torch.where(places, table.weight[row].to(output), output)
        return output

    model.get_input_embeddings().register_forward_hook(with_indicators)
    return model, processor


def parts(model: PreTrainedModel) -> Parts:
    """The modules under their names in transformers' class; the connector is the visual
    vocabulary's table."""
    base = model.model
    return generic.decoder_parts(
        base.language_model,
        model.lm_head,
        base.vision_tower,
        base.visual_embeddings_table,
        vision_blocks=list(base.vision_tower.transformer.encoder.layers),
    )


def tile_counts(image_processor: BaseImageProcessor, size: Size) -> tuple[int, int]:
    """(columns, rows) of the canvas that a picture of `size` is resized to, as the processor counts
    them."""
    shape = size[::-1]
    tile = image_processor.size["height"], image_processor.size["width"]
    most = image_processor.max_patches
    if image_processor.use_covering_area_grid:
        return get_min_tile_covering_grid(shape, tile[0], most, 0.9)
    return get_optimal_tiled_canvas(shape, tile, image_processor.min_patches, most)


def tiles(vlm: VLM, inputs: Inputs) -> tuple[int, int]:
    """Tiles of a picture, the whole one included, and vision tokens along a side of one."""
    count, *_, edge = inputs["pixel_values"].shape
    vision = vlm.model.config.vision_config
    return count, edge // vision.patch_size // vision.hidden_stride


def grid(vlm: VLM, size: Size, inputs: Inputs) -> PatchGrid:
    """The whole picture, then its tiles where it has more than one."""
    count, side = tiles(vlm, inputs)
    if count == 1:
        return PatchGrid.regular(side, side, (0, 0, *size), size)
    columns, rows = tile_counts(vlm.processor.image_processor, size)
    shown = [(0, 0, *size), *generic.regions(rows, columns, size)]
    return generic.grid_of_tiles(shown, side, side, size)


def sources(vlm: VLM, size: Size, inputs: Inputs) -> Int[np.ndarray, "P k"]:
    """2 x 2 patches of each tile."""
    count, side = tiles(vlm, inputs)
    return generic.merged(side, side, vlm.model.config.vision_config.hidden_stride, count)


FAMILY = Family(
    name="ovis2",
    model_types=("ovis2",),
    architectures=("Ovis2ForConditionalGeneration",),
    load=load,
    parts=parts,
    grid=grid,
    sources=sources,
    positions=generic.positions,
    rotary=generic.rotary,
    markup=("<IMG_START>", "<IMG_END>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>"),
    has=frozenset({"decoder-only", "causal", "rotary", "grid"}),
)

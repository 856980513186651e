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

Checked on small random models (tiles and none) with processors made in the tests: tokens against
transformers' own processor, tiles by their pixels, logits and greedy answers against transformers'
own class. Not checked, for want of the files: published weights and tokenizers; argmax in the
softmax's place.
"""

import numpy as np
import torch
from transformers import Ovis2ForConditionalGeneration, Ovis2Processor
from transformers.models.ovis2.image_processing_pil_ovis2 import (
    get_min_tile_covering_grid,
    get_optimal_tiled_canvas,
)

from vlmdiag.families import Family, Parts, generic
from vlmdiag.pictures.grid import PatchGrid, cells


def load(path, config, **options):
    model, processor = generic.loader(Ovis2ForConditionalGeneration, Ovis2Processor)(
        path, config, **options
    )
    table, first = (
        model.model.visual_embeddings_table,
        -config.vision_config.num_visual_indicator_tokens,
    )  # their rows are its last
    indicators = list(enumerate(config.visual_indicator_token_ids, first))

    def with_indicators(module, args, output):
        for row, token in (
            indicators if args[0].shape[-1] > 1 else ()
        ):  # one that was generated keeps its text embedding, as in transformers
            output = torch.where(
                (args[0] == token).to(output.device)[..., None],
                table.weight[row].to(output),
                output,
            )
        return output

    model.get_input_embeddings().register_forward_hook(with_indicators)
    return model, processor


def parts(model):
    base, text = model.model, model.model.language_model
    blocks = list(base.vision_tower.transformer.encoder.layers)
    return Parts(
        text,
        list(text.layers),
        text.norm,
        model.lm_head,
        base.vision_tower,
        base.visual_embeddings_table,
        vision_blocks=blocks,
    )


def tile_counts(processor, size):
    """(columns, rows) of the canvas that a picture of `size` (width, height) is resized to, as the
    processor counts them."""
    tile = processor.size["height"], processor.size["width"]
    if processor.use_covering_area_grid:
        return get_min_tile_covering_grid(size[::-1], tile[0], processor.max_patches, 0.9)
    return get_optimal_tiled_canvas(size[::-1], tile, processor.min_patches, processor.max_patches)


def shape(vlm, inputs):
    """Tiles of a picture, the whole one included, and vision tokens along a side of one."""
    count, *_, edge = inputs["pixel_values"].shape
    vision = vlm.model.config.vision_config
    return count, edge // vision.patch_size // vision.hidden_stride


def grid(vlm, size, inputs):
    """The whole picture, then its tiles where it has more than one."""
    (count, side), whole = shape(vlm, inputs), (0, 0, *size)
    if count == 1:
        return PatchGrid.regular(side, side, whole, size)
    columns, rows = tile_counts(vlm.processor.image_processor, size)
    regions = [whole, *cells(rows, columns, whole).reshape(-1, 4)]
    return PatchGrid(
        np.concatenate([cells(side, side, region).reshape(-1, 4) for region in regions]),
        None,
        tuple(size),
    )


def sources(vlm, size, inputs):
    """2 x 2 patches of each tile."""
    count, side = shape(vlm, inputs)
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

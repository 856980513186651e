"""Aya Vision (arXiv 2505.08751): SigLIP2 on tiles, pixel shuffle, a Cohere2 (Command R7B) or Cohere
text model.

Prompt: <|START_OF_IMG|>, then for every tile TILE_1, TILE_2, ... and its <|IMG_PATCH|> x 169, then
TILE_GLOBAL and the 169 tokens of the whole picture, then <|END_OF_IMG|>. A picture that fits one
tile has TILE_GLOBAL alone. Tiles and their order are InternVL's (see models/internvl.py): a canvas
of up to 12 square tiles, cut row by row, the whole picture last; 26 x 26 patches of a tile become
13 x 13 tokens of 2 x 2 patches each, row-major. The tower has no CLS.

Cohere turns neighbouring dimensions (not halves), and Cohere2's full-attention layers, every
fourth, have no positions at all: "rotary" is not had. Its other layers see a window of 4096
positions. Cohere's text models multiply their logits by the config's logit_scale; transformers'
AyaVision class leaves that out, so its log-probabilities are too sharp though its greedy answers
are right. A hook puts it back.

Checked on small random models with processors made in the tests: tokens against transformers' own
processor, tiles by their pixels, logits and greedy answers against transformers' own class. Not
checked, for want of the files: published weights and their tokenizers; the older Cohere text model.
"""

from transformers import AyaVisionForConditionalGeneration, AyaVisionProcessor

from vlmdiag.families import Family, generic
from vlmdiag.families.internvl import tiled


def load(path, config, **options):
    model, processor = generic.loader(AyaVisionForConditionalGeneration, AyaVisionProcessor)(
        path, config, **options
    )
    model.register_forward_hook(scaled)
    return model, processor


def scaled(model, args, output):
    """Forward hook: the logits times the text model's logit_scale, where it has one."""
    output.logits = output.logits * getattr(model.config.text_config, "logit_scale", 1)
    return output


def grid(vlm, size, inputs):
    """Tiles of the canvas, then the whole picture."""
    count, *_, edge = inputs["pixel_values"].shape
    config = vlm.model.config
    return tiled(
        vlm.processor.image_processor,
        size,
        count,
        edge // config.vision_config.patch_size // config.downsample_factor,
    )


def sources(vlm, size, inputs):
    """2 x 2 patches of each tile."""
    count, *_, edge = inputs["pixel_values"].shape
    config = vlm.model.config
    side = edge // config.vision_config.patch_size // config.downsample_factor
    return generic.merged(side, side, config.downsample_factor, count)


FAMILY = Family(
    name="aya_vision",
    model_types=("aya_vision",),
    architectures=("AyaVisionForConditionalGeneration",),
    load=load,
    parts=generic.parts_with_tower,
    grid=grid,
    sources=sources,
    positions=generic.positions,
    markup=("<|START_OF_IMG|>", "<|END_OF_IMG|>", "TILE_GLOBAL"),
    has=frozenset({"decoder-only", "causal", "grid"}),
)

"""DeepSeek-VL (arXiv 2403.05525): SigLIP on 384 x 384, a connector, Llama. The 7b models (type
deepseek_vl_hybrid) have a second tower, SAM's on 1024 x 1024, whose features are pooled to SigLIP's
grid and joined to its own.

Prompt: a system sentence, "User: " and <image_placeholder> x 576, the question, "Assistant:", all
from the chat template; nothing stands around the picture. The picture is scaled until its longer
side is 384, the shorter one rounded, and put in the middle of a square of the mean colour; one
patch of 16 pixels is one token, row-major, without CLS, so boxes at the edge lie off the picture.

Relevancy goes on into SigLIP's tower, where it is the only one. Tested on small random models with
processors made in the tests: tokens against transformers' own processor, cells by their pixels,
logits and greedy answers against transformers' own class. Not tested: we had no published weights
or tokenizers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlmdiag.families import Family, Parts, generic
from vlmdiag.pictures.grid import PatchGrid

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PreTrainedModel

    from vlmdiag.families.contract import Inputs, Size
    from vlmdiag.pictures.grid import Region
    from vlmdiag.types import VLM


def parts(model: PreTrainedModel) -> Parts:
    """The modules under their names in transformers' class."""
    base = model.model
    one_tower = not hasattr(base, "high_res_vision_model")
    return generic.decoder_parts(
        base.language_model,
        model.lm_head,
        base.vision_model,
        base.aligner,
        vision_blocks=list(base.vision_model.encoder.layers) if one_tower else (),
    )


def region(image_processor: BaseImageProcessor, size: Size) -> Region:
    """The part of the original picture, in its pixels, that the padded square shows: (x0, y0, x1,
    y1), beyond the picture along its shorter side."""
    edge = image_processor.size["height"]
    smallest = image_processor.min_size

    def shown(side: int) -> tuple[float, float]:
        """What the square shows along one side of the picture."""
        scaled = max(round(side * (edge / max(size))), smallest)
        margin = (edge - scaled) // 2
        return -margin * side / scaled, (edge - margin) * side / scaled

    width, height = size
    x0, x1 = shown(width)
    y0, y1 = shown(height)
    return x0, y0, x1, y1


def grid(vlm: VLM, size: Size, inputs: Inputs) -> PatchGrid:
    """One cell per patch of the padded square."""
    patch = vlm.model.config.vision_config.patch_size
    return generic.patch_grid(inputs, patch, region(vlm.processor.image_processor, size), size)


FAMILY = Family(
    name="deepseek_vl",
    model_types=("deepseek_vl", "deepseek_vl_hybrid"),
    architectures=(
        "DeepseekVLForConditionalGeneration",
        "DeepseekVLHybridForConditionalGeneration",
    ),
    load=generic.load,
    parts=parts,
    grid=grid,
    positions=generic.positions,
    rotary=generic.rotary,
    has=frozenset({"decoder-only", "causal", "rotary", "grid"}),
)

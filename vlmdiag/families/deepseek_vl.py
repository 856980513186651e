"""DeepSeek-VL (arXiv 2403.05525), the 1.3b models: SigLIP on 384 x 384, a two-layer connector,
Llama. (The 7b models with two towers are another type.)

Prompt: a system sentence, "User: " and <image_placeholder> x 576, the question, "Assistant:", all
from the chat template; nothing stands around the picture. The picture is scaled until its longer
side is 384, the shorter one rounded, and put in the middle of a square of the mean colour; one
patch of 16 pixels is one token, row-major, without CLS, so boxes at the edge lie off the picture.

transformers' class keeps get_image_features in its inner model; DeepseekVL below hands it on.
Tested on a small random model with a processor made in the tests: tokens against transformers' own
processor, cells by their pixels, logits and greedy answers against transformers' own class. Not
tested: we had no published weights or tokenizers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers import DeepseekVLForConditionalGeneration, DeepseekVLProcessor

from vlmdiag.families import Family, Parts, generic
from vlmdiag.pictures.grid import PatchGrid

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor
    from transformers import BaseImageProcessor, PreTrainedModel
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    from vlmdiag.families.contract import Inputs, Size
    from vlmdiag.pictures.grid import Region
    from vlmdiag.types import VLM


class DeepseekVL(DeepseekVLForConditionalGeneration):
    """transformers' class with get_image_features."""

    def get_image_features(
        self, pixel_values: Float[Tensor, "B c height width"], **kwargs: object
    ) -> BaseModelOutputWithPooling:
        """The inner model's."""
        return self.model.get_image_features(pixel_values, **kwargs)


def parts(model: PreTrainedModel) -> Parts:
    """The modules under their names in transformers' class."""
    base = model.model
    return generic.decoder_parts(
        base.language_model,
        model.lm_head,
        base.vision_model,
        base.aligner,
        vision_blocks=list(base.vision_model.encoder.layers),
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
    rows, columns = generic.patch_sides(inputs, vlm.model.config.vision_config.patch_size)
    return PatchGrid.regular(rows, columns, region(vlm.processor.image_processor, size), size)


FAMILY = Family(
    name="deepseek_vl",
    model_types=("deepseek_vl",),
    architectures=("DeepseekVLForConditionalGeneration", "DeepseekVL"),
    load=generic.loader(DeepseekVL, DeepseekVLProcessor),
    parts=parts,
    grid=grid,
    positions=generic.positions,
    rotary=generic.rotary,
    has=frozenset({"decoder-only", "causal", "rotary", "grid"}),
)

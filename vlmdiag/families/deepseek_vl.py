"""DeepSeek-VL (arXiv 2403.05525), the 1.3b models: SigLIP on 384 x 384, a two-layer connector,
Llama. (The 7b models with two towers are another type.)

Prompt: a system sentence, "User: " and <image_placeholder> x 576, the question, "Assistant:", all
from the chat template; nothing stands around the picture. The picture is scaled until its longer
side is 384, the shorter one rounded, and put in the middle of a square of the mean colour; one
patch of 16 pixels is one token, row-major, without CLS, so boxes at the edge lie off the picture.

transformers' class keeps get_image_features in its inner model; DeepseekVL below hands it on.
Checked on a small random model with a processor made in the tests: tokens against transformers' own
processor, cells by their pixels, logits and greedy answers against transformers' own class. Not
checked, for want of the files: published weights and their tokenizers.
"""

from transformers import DeepseekVLForConditionalGeneration, DeepseekVLProcessor

from vlmdiag.families import Family, Parts, generic
from vlmdiag.pictures.grid import PatchGrid


class DeepseekVL(DeepseekVLForConditionalGeneration):
    def get_image_features(self, pixel_values, **kwargs):
        return self.model.get_image_features(pixel_values, **kwargs)


def parts(model):
    base, text = model.model, model.model.language_model
    return Parts(
        text,
        list(text.layers),
        text.norm,
        model.lm_head,
        base.vision_model,
        base.aligner,
        vision_blocks=list(base.vision_model.encoder.layers),
    )


def region(image_processor, size):
    """The part of the original picture, in its pixels, that the padded square shows: (x0, y0, x1,
    y1), beyond the picture along its shorter side."""
    edge = image_processor.size["height"]
    scaled = [max(round(side * (edge / max(size))), image_processor.min_size) for side in size]
    start = [(edge - side) // 2 for side in scaled]
    low = [-first * side / new for first, side, new in zip(start, size, scaled, strict=True)]
    high = [
        (edge - first) * side / new for first, side, new in zip(start, size, scaled, strict=True)
    ]
    return *low, *high


def grid(vlm, size, inputs):
    """One cell per patch of the padded square."""
    rows, columns = (
        side // vlm.model.config.vision_config.patch_size
        for side in inputs["pixel_values"].shape[-2:]
    )
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

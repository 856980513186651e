"""Qwen2-VL (arXiv 2409.12191), Qwen2.5-VL (2502.13923), Qwen3-VL (2511.21631) and its mixture of
experts: dynamic grid, merged patches, multimodal positions.

Prompt: <|vision_start|><|image_pad|> x P<|vision_end|> in the user's turn of the chat template. The
picture is stretched to whole groups of spatial_merge_size x spatial_merge_size patches, nothing is
cropped or padded; each group makes one vision token, row-major. Positions have three axes (time,
height, width) and come from the model's own get_rope_index. Relevancy does not go on into the
tower, whose attention runs in windows and in another order of patches.

Qwen3-VL adds features of the tower's middle to the vision tokens of its first decoder layers
(deepstack): the picture is not in the input embeddings alone, see vlmdiag.model.vision.entered.
What replaces a vision token leaves nothing of it there either; prompts about a picture share no
keys and values.

Tested on small random models with processors made in the tests: the contract; on published configs,
tokenizers and templates. Not tested: we had no published weights; videos are not read.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from transformers import (
    AutoTokenizer,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeForConditionalGeneration,
    Qwen3VLProcessor,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from vlmdiag.families import Family, Parts, generic
from vlmdiag.pictures.grid import PatchGrid

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel
    from typing_extensions import Unpack

    from vlmdiag.families.contract import Config, Inputs, Loaded, LoadOptions, Size
    from vlmdiag.types import VLM

# model type: classes of the model and, without its video part, of the processor
KINDS = {
    "qwen2_vl": (Qwen2VLForConditionalGeneration, generic.image_only(Qwen2VLProcessor)),
    "qwen2_5_vl": (Qwen2_5_VLForConditionalGeneration, generic.image_only(Qwen2_5_VLProcessor)),
    "qwen3_vl": (Qwen3VLForConditionalGeneration, generic.image_only(Qwen3VLProcessor)),
    "qwen3_vl_moe": (Qwen3VLMoeForConditionalGeneration, generic.image_only(Qwen3VLProcessor)),
}


def load(path: str, config: PreTrainedConfig, **options: Unpack[LoadOptions]) -> Loaded:
    """The classes of the model's type; pictures by the PIL image processor that all of them
    share."""
    model_class, processor_class = KINDS[config.model_type]
    model = generic.load_model_class(model_class, path, config, options)
    if options.get("in_memory"):
        return model, generic.load_processor(path, options)
    tokenizer = AutoTokenizer.from_pretrained(path)
    images = Qwen2VLImageProcessorPil.from_pretrained(path)
    # The template of the processor's own file comes first: the tokenizer's may be for text alone.
    template = processor_class.get_processor_dict(path)[0].get("chat_template")
    template = template or tokenizer.chat_template
    return model, processor_class(images, tokenizer, chat_template=template)


def parts(model: PreTrainedModel) -> Parts:
    """The modules under their names in transformers' classes."""
    base = model.model
    return generic.decoder_parts(
        base.language_model, model.lm_head, base.visual, base.visual.merger
    )


def grid(vlm: VLM, size: Size, inputs: Inputs) -> PatchGrid:
    """The picture is resized to whole merged patches, nothing is cropped or padded."""
    _, rows, columns = inputs["image_grid_thw"][0].tolist()
    merge = vlm.model.config.vision_config.spatial_merge_size
    return PatchGrid.regular(rows // merge, columns // merge, (0, 0, *size), size)


def variant(config: Config) -> Family:
    """The family of one model type; Qwen3-VL has deepstack."""
    kind = config["model_type"] if config.get("model_type") in KINDS else "qwen2_5_vl"
    if kind.startswith("qwen3"):
        return replace(FAMILY, name=kind, deepstack=generic.first_layers)
    return replace(FAMILY, name=kind)


FAMILY = Family(
    name="qwen_vl",
    model_types=tuple(KINDS),
    variant=variant,
    load=load,
    parts=parts,
    grid=grid,
    positions=generic.positions,
    rotary=generic.rotary,
    markup=("<|vision_start|>", "<|vision_end|>"),
    has=frozenset({"decoder-only", "causal", "rotary", "grid"}),
)

"""Qwen2-VL (arXiv 2409.12191), Qwen2.5-VL (2502.13923), Qwen3-VL (2511.21631) and its mixture of
experts: dynamic grid, merged patches, multimodal positions.

Prompt: <|vision_start|><|image_pad|> x P<|vision_end|> in the user's turn of the chat template. The
picture is stretched to whole groups of spatial_merge_size x spatial_merge_size patches, nothing is
cropped or padded; each group makes one vision token, row-major. Positions have three axes (time,
height, width) and come from the model's own get_rope_index. Relevancy does not go on into the
tower, whose attention runs in windows and in another order of patches.

Qwen3-VL adds features of the tower's middle to the vision tokens of its first decoder layers
(deepstack): the picture is not in the input embeddings alone, see capturing.entered. What replaces
a vision token leaves nothing of it there either; prompts about a picture share no keys and values.

Checked on small random models with processors made in the tests: the contract. Not checked, for
want of the files: the published weights; videos are not read."""

from dataclasses import replace

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

from vlmdiag.families import Family, Parts, checked, generic
from vlmdiag.pictures.grid import PatchGrid

KINDS = {  # model type: classes of the model and, without its video part, of the processor
    "qwen2_vl": (Qwen2VLForConditionalGeneration, generic.image_only(Qwen2VLProcessor)),
    "qwen2_5_vl": (Qwen2_5_VLForConditionalGeneration, generic.image_only(Qwen2_5_VLProcessor)),
    "qwen3_vl": (Qwen3VLForConditionalGeneration, generic.image_only(Qwen3VLProcessor)),
    "qwen3_vl_moe": (Qwen3VLMoeForConditionalGeneration, generic.image_only(Qwen3VLProcessor)),
}


def load(
    path, config, dtype, device_map=None, trust_remote_code=False, quantization_config=None, **_
):
    model_class, processor_class = KINDS[config.model_type]
    options = {"dtype": dtype, "device_map": device_map, "quantization_config": quantization_config}
    model = model_class.from_pretrained(path, config=config, output_loading_info=True, **options)
    tokenizer = AutoTokenizer.from_pretrained(path)
    processor = processor_class(
        Qwen2VLImageProcessorPil.from_pretrained(path),
        tokenizer,
        chat_template=tokenizer.chat_template,
    )
    return checked(model), processor


def parts(model):
    base = model.model
    return Parts(
        base.language_model,
        list(base.language_model.layers),
        base.language_model.norm,
        model.lm_head,
        base.visual,
        base.visual.merger,
    )


def grid(vlm, size, inputs):
    """The picture is resized to whole merged patches, nothing is cropped or padded."""
    _, rows, columns = inputs["image_grid_thw"][0].tolist()
    merge = vlm.model.config.vision_config.spatial_merge_size
    return PatchGrid.regular(rows // merge, columns // merge, (0, 0, *size), size)


def variant(config):
    """The family of one model type. config: config.json as a dict."""
    kind = config["model_type"] if config.get("model_type") in KINDS else "qwen2_5_vl"
    deep = kind.startswith("qwen3")
    return replace(
        FAMILY, name=kind, deepstack=deep, has=FAMILY.has - ({"causal"} if deep else set())
    )


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

"""Qwen2.5-VL: dynamic grid with 2 x 2 merging, multimodal rotary positions (temporal, height, width), grouped-query attention."""

from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from grid import PatchGrid
from models import Family, Parts, checked, generic


class ImageOnlyProcessor(Qwen2_5_VLProcessor):
    """Qwen's processor without its video part, which would need torchvision."""

    @classmethod
    def get_attributes(cls):
        return ["image_processor", "tokenizer"]

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        super().__init__(image_processor, tokenizer, chat_template=chat_template, **kwargs)


def load(path, config, dtype, device_map=None, trust_remote_code=False, quantization_config=None, **_):
    options = {"dtype": dtype, "device_map": device_map, "quantization_config": quantization_config}
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(path, config=config, output_loading_info=True, **options)
    tokenizer = AutoTokenizer.from_pretrained(path)
    processor = ImageOnlyProcessor(Qwen2VLImageProcessorPil.from_pretrained(path), tokenizer, chat_template=tokenizer.chat_template)
    return checked(model), processor


def parts(model):
    base = model.model
    return Parts(base.language_model, list(base.language_model.layers), base.language_model.norm, model.lm_head, base.visual, base.visual.merger)


def grid(vlm, size, inputs):
    """The picture is resized to whole merged patches, nothing is cropped or padded."""
    _, rows, columns = inputs["image_grid_thw"][0].tolist()
    merge = vlm.model.config.vision_config.spatial_merge_size
    return PatchGrid.regular(rows // merge, columns // merge, (0, 0, *size), size)


FAMILY = Family(
    name="qwen2_5_vl", model_types=("qwen2_5_vl",), load=load, parts=parts, grid=grid, positions=generic.positions, rotary=generic.rotary,
    markup=("<|vision_start|>", "<|vision_end|>"), has=frozenset({"decoder-only", "causal", "rotary", "grid"}),
)  # fmt: skip

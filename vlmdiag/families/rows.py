"""Towers that see the whole picture, stretched to whole groups of patches, and give one token per
group row by row, as Qwen2-VL's: Qwen3.5 and its mixture of experts, the Qwen omni thinkers, GLM-4V,
GLM-4.1V, GLM-4.5V and GLM-4.6V, GLM-OCR, ERNIE 4.5 VL, EXAONE 4.5, Video-LLaMA 3, PaddleOCR-VL,
HyperCLOVA X Vision 2, LFM3-VL, Cohere Compass, Cosmos 3, Kimi K2.5, MiniMax M3 VL, Muse.

Prompt: the processor's chat template, in which one placeholder becomes P image tokens. The image
processor gives image_grid_thw: patches in time (1), height and width. A square of merge x merge
patches makes one vision token, row-major, nothing is cropped; Kimi pads on the right and below up
to whole groups. Positions are those of the model's own get_rope_index, where it has one.

What differs is the decoder. Of Qwen3.5's layers three of four are linear attention: measures of
attention are of the fourth ones, and prompts about a picture share no keys and values. ERNIE's
vision tokens go through experts of their own, as moe_mm_token_type_ids of the processor says. Where
the tower has `deepstack_visual_indexes`, features of its middle are added to the vision tokens of
the decoder's first layers, as in qwen_vl.py. Relevancy stops at the vision tokens: most of these
towers attend in windows and in another order of patches.

Tested on small random models of each type (tests/all_types.py): logits, greedy answers and
attention rows of transformers' own class on its processor's output, cells by their pixels. Not
tested: we had no published weights or tokenizers; videos are not read.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from vlmdiag.families import Family, generic
from vlmdiag.pictures.grid import PatchGrid

if TYPE_CHECKING:
    from transformers import BaseImageProcessor

    from vlmdiag.families.contract import Config, Inputs, Size
    from vlmdiag.pictures.grid import Region
    from vlmdiag.types import VLM

TYPES = (
    "cohere_compass",
    "cosmos3_edge",
    "cosmos3_omni",
    "ernie4_5_vl_moe",
    "exaone4_5",
    "glm46v",
    "glm4v",
    "glm4v_moe",
    "glm_ocr",
    "glmga",
    "hyperclovax_vision_v2",
    "kimi_k25",
    "lfm3_vl",
    "paddleocr_vl",
    "qwen2_5_omni_thinker",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_omni_moe_thinker",
    "video_llama_3",
)


def grid(vlm: VLM, size: Size, inputs: Inputs) -> PatchGrid:
    """One cell per group of patches of the stretched picture."""
    images = vlm.processor.image_processor
    _, rows, columns = inputs["image_grid_thw"][0].tolist()
    shown = (0, 0, *size)
    if vlm.model.config.model_type == "kimi_k25":
        shown = padded(images, size)
    return PatchGrid.regular(rows // images.merge_size, columns // images.merge_size, shown, size)


def padded(images: BaseImageProcessor, size: Size) -> Region:
    """What Kimi's padded picture shows, beyond the picture on its right and below."""
    # here, because the module needs torchvision
    from transformers.models.kimi_k25.image_processing_kimi_k25 import navit_resize

    width, height = size
    fitted, whole = navit_resize(
        height,
        width,
        images.patch_size,
        images.merge_size,
        images.max_patches,
        images.size["max_height"],
    )
    return 0, 0, width * whole[1] / fitted[1], height * whole[0] / fitted[0]


def variant(config: Config) -> Family:
    """The family of one model: no keys and values are shared where layers keep states of their own,
    or where deepstack adds the picture behind the input."""
    text = config.get("text_config") or {}
    tower = config.get("vision_config") or {}
    deepstack = bool(tower.get("deepstack_visual_indexes"))
    hybrid = bool(set(text.get("layer_types") or ()) & set(generic.NO_ATTENTION))
    has = FAMILY.has - ({"causal"} if deepstack or hybrid else set())
    return replace(FAMILY, name=config.get("model_type", "rows"), deepstack=deepstack, has=has)


FAMILY = Family(
    name="rows",
    model_types=TYPES,
    variant=variant,
    load=generic.load,
    parts=generic.parts,
    grid=grid,
    positions=generic.positions,
    rotary=generic.rotary,
    has=frozenset({"decoder-only", "causal", "rotary", "grid"}),
)

"""Towers that see the whole picture, stretched to whole groups of patches, and give one token per
group row by row, as Qwen2-VL's: Qwen3.5 and its mixture of experts, the Qwen omni thinkers, GLM-4V,
GLM-4.1V, GLM-4.5V and GLM-4.6V, GLM-OCR, ERNIE 4.5 VL, EXAONE 4.5, Video-LLaMA 3, PaddleOCR-VL,
HyperCLOVA X Vision 2, LFM3-VL, Cohere Compass, Cosmos 3, Kimi K2.5, MiniMax M3 VL, Muse, Qwen4;
Gemma 4, Emu 3 and HunYuan-VL.

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

import numpy as np
import torch

from vlmdiag.families import Family, generic
from vlmdiag.pictures.grid import PatchGrid, cells

if TYPE_CHECKING:
    from jaxtyping import Int
    from torch import Tensor
    from transformers import BaseImageProcessor

    from vlmdiag.families.contract import Config, Inputs, Size
    from vlmdiag.pictures.grid import Region
    from vlmdiag.types import VLM

TYPES = (
    "cohere_compass",
    "cosmos3_edge",
    "cosmos3_omni",
    "dots3_note",
    "emu3",
    "ernie4_5_vl_moe",
    "exaone4_5",
    "gemma4",
    "gemma4_unified",
    "glm46v",
    "glm4v",
    "glm4v_moe",
    "glm_ocr",
    "glmga",
    "hunyuan_vl",
    "hyperclovax_vision_v2",
    "kimi_k25",
    "lfm3_vl",
    "minimax_m3_vl",
    "muse_glimmer",
    "muse_spark",
    "paddleocr_vl",
    "qwen2_5_omni_thinker",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_omni_moe_thinker",
    "qwen4_exp",
    "video_llama_3",
)


def grid(vlm: VLM, size: Size, inputs: Inputs) -> PatchGrid:
    """One cell per group of patches of the stretched picture."""
    images = vlm.processor.image_processor
    _, rows, columns = inputs["image_grid_thw"][0].tolist()
    shown: Region = (0, 0, *size)
    if vlm.model.config.model_type == "kimi_k25":
        shown = padded(images, size)
    return PatchGrid.regular(rows // images.merge_size, columns // images.merge_size, shown, size)


def with_newlines(rows: int, columns: int, size: Size, around: int = 0) -> PatchGrid:
    """Rows that end in a token without a box, and `around` such tokens before them and behind."""
    boxes = np.full((rows, columns + 1, 4), np.nan)
    boxes[:, :-1] = cells(rows, columns, (0, 0, *size))
    boxless = np.full((around, 4), np.nan)
    return PatchGrid(np.concatenate([boxless, boxes.reshape(-1, 4), boxless]), None, size)


def hunyuan_vl(vlm: VLM, size: Size, inputs: Inputs) -> PatchGrid:
    """Rows with newlines between a first and a last token."""
    images = vlm.processor.image_processor
    _, rows, columns = inputs["image_grid_thw"][0].tolist()
    return with_newlines(rows // images.merge_size, columns // images.merge_size, size, around=1)


def emu3(vlm: VLM, size: Size, inputs: Inputs) -> PatchGrid:
    """Rows of codes with line ends."""
    height, width = inputs["image_sizes"][0].tolist()
    factor = vlm.processor.downsample_ratio
    return with_newlines(height // factor, width // factor, size)


def gemma4(vlm: VLM, size: Size, inputs: Inputs) -> PatchGrid:
    """One cell per pooled block of patches, whose places the unified model has already."""
    columns, rows = (inputs["image_position_ids"][0].amax(0) + 1).tolist()
    is_unified = vlm.model.config.model_type == "gemma4_unified"
    pooled = 1 if is_unified else vlm.processor.image_processor.pooling_kernel_size
    return PatchGrid.regular(rows // pooled, columns // pooled, (0, 0, *size), size)


GRIDS = {"emu3": emu3, "gemma4": gemma4, "gemma4_unified": gemma4, "hunyuan_vl": hunyuan_vl}


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


def positions(
    vlm: VLM,
    input_ids: Int[Tensor, "B T"],
    attention_mask: Int[Tensor, "B T"],
    image_inputs: Inputs,
) -> tuple[Int[Tensor, "axes B T"], Int[Tensor, " B"]]:
    """Of each prompt alone: HunYuan's get_rope_index counts the pictures of a batch through."""
    grids = image_inputs["image_grid_thw"]
    of_rows = [
        generic.positions(
            vlm,
            input_ids[row : row + 1],
            attention_mask[row : row + 1],
            {"image_grid_thw": grids if len(input_ids) == 1 else grids[row : row + 1]},
        )
        for row in range(len(input_ids))
    ]
    return torch.cat([ids for ids, _ in of_rows], 1), torch.cat([after for _, after in of_rows])


def variant(config: Config) -> Family:
    """The family of one model: no keys and values are shared where layers keep states of their own
    or look ahead."""
    text = config.get("text_config") or {}
    tower = config.get("vision_config") or {}
    deepstack = bool(tower.get("deepstack_visual_indexes"))
    # layers that choose keys by an index keep keys of that index too
    of_their_own = {*generic.NO_ATTENTION, "indexed_attention"}
    hybrid = bool(of_their_own & set(text.get("layer_types") or ()))
    sees_ahead = text.get("use_bidirectional_attention") or "gemma" in str(config.get("model_type"))
    has = FAMILY.has - ({"causal"} if hybrid or sees_ahead else set())
    if config.get("model_type") == "hunyuan_vl":
        has -= {"rotary"}  # its keys are normalised after they are turned
    kind = config.get("model_type", "rows")
    return replace(
        FAMILY,
        name=kind,
        deepstack=generic.first_layers if deepstack else None,
        has=has,
        grid=GRIDS.get(kind, FAMILY.grid),
        alone=kind in ("emu3", "gemma4", "gemma4_unified"),
        positions=positions if kind == "hunyuan_vl" else FAMILY.positions,
    )


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

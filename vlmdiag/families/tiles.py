"""A picture cut into square tiles, and the whole of it squeezed to one: Cohere 2 Vision, Llama 4,
Perception LM, LFM2-VL, Step 3.7, MiniCPM-OCR, Granite Docling.

Prompt: the processor's chat template, in which one placeholder becomes the image tokens of all
tiles with marks between them. Each tile gives side x side tokens, row by row; tiles follow each
other row by row, and the whole picture is the last one (Perception LM: the first). Where they
differ:

- Cohere 2 Vision, Perception LM, Granite Docling: the picture is stretched to whole tiles.
- Llama 4: it is scaled into the tiles and padded on the right and below; its vision tokens are the
  <|patch|> ones, and its projector runs in the forward, so features() runs it.
- LFM2-VL: a small picture is one tile of its own proportions, so is the whole one.
- Step 3.7: tiles are square windows whose size depends on the picture's proportions, scaled to one
  size; a last row or column that is no whole window is left out.

All but Granite Docling have image processors on torchvision alone, an optional package. Of
LFM2-VL's layers some are convolutions: measures of attention are of the others. Relevancy stops at
the vision tokens.

Tested on small random models of each type (tests/all_types.py), with a stand-in for torchvision,
and for the tower of timm: logits, greedy answers and attention rows of transformers' own class on
its processor's output, cells by their pixels. Not tested: we had no published weights or
tokenizers; the image processors on torchvision itself.
"""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vlmdiag.families import Family, generic
from vlmdiag.families.internvl import tiled
from vlmdiag.pictures.grid import PatchGrid, cells

if TYPE_CHECKING:
    from vlmdiag.families.contract import Config, Inputs, Size
    from vlmdiag.pictures.grid import Region
    from vlmdiag.types import VLM, ImageFeatures


def cohere2_vision(vlm: VLM, size: Size, inputs: Inputs) -> PatchGrid:
    """Tiles of the canvas, then the whole picture."""
    images = vlm.processor.image_processor
    # what the processor calls its patch size is the tokens along a side of a tile
    return tiled(images, size, len(inputs["pixel_values"]), vlm.processor.patch_size)


def llama4(vlm: VLM, size: Size, inputs: Inputs) -> PatchGrid:
    """Tiles of the padded canvas, then the whole picture."""
    # here, because the module needs torchvision
    from transformers.models.llama4.image_processing_llama4 import (
        find_supported_resolutions,
        get_best_fit,
        get_max_res_without_distortion,
    )

    images = vlm.processor.image_processor
    count, *_, edge = inputs["pixel_values"].shape
    ratio = math.isqrt(vlm.processor.downsample_ratio)
    side = edge // vlm.processor.patch_size // ratio
    width, height = size
    resolutions = torch.tensor(find_supported_resolutions(images.max_patches, images.size))
    most = images.resize_to_max_canvas
    tall, wide = (int(x) for x in get_best_fit((height, width), resolutions, most))
    target = (tall, wide) if most else (min(max(height, edge), tall), min(max(width, edge), wide))
    new_height, new_width = (
        max(x, 1) for x in get_max_res_without_distortion((height, width), target)
    )
    canvas = (0, 0, wide * width / new_width, tall * height / new_height)
    boxes = cells(tall // edge, wide // edge, canvas).reshape(-1, 4)
    tiles: list[Region] = [(x0, y0, x1, y1) for x0, y0, x1, y1 in boxes.tolist()]
    if count > 1:
        tiles.append((0, 0, *size))
    return generic.grid_of_tiles(tiles, side, side, size)


def perception_lm(vlm: VLM, size: Size, inputs: Inputs) -> PatchGrid:
    """The whole picture, then the tiles."""
    images = vlm.processor.image_processor
    *_, edge = inputs["pixel_values"].shape
    side = edge // vlm.processor.patch_size // vlm.processor.pooling_ratio
    tiles: list[Region] = [(0, 0, *size)]
    if images.vision_input_type == "thumb+tile":
        shape = {"img_width": size[0], "img_height": size[1], "tile_size": images.tile_size}
        fitted = images._fit_image_to_canvas(**shape) or images._find_closest_aspect_ratio(**shape)
        tiles += generic.regions(fitted[1], fitted[0], size)
    return generic.grid_of_tiles(tiles, side, side, size)


def lfm2_vl(vlm: VLM, size: Size, inputs: Inputs) -> PatchGrid:
    """Tiles, then the whole picture in its own proportions; a small picture is that alone."""
    images = vlm.processor.image_processor
    factor = images.downsample_factor
    shapes = [
        (math.ceil(rows / factor), math.ceil(columns / factor))
        for rows, columns in inputs["spatial_shapes"].tolist()
    ]
    whole: list[Region] = [(0, 0, *size)]
    tiles = whole
    if len(shapes) > 1:
        columns, rows, *_ = images._get_grid_layout(
            size[1], size[0], images.min_tiles, images.max_tiles, images.tile_size
        )
        tiles = generic.regions(rows, columns, size) + (whole if images.use_thumbnail else [])
    boxes = [
        cells(*of_tile, tile).reshape(-1, 4) for of_tile, tile in zip(shapes, tiles, strict=True)
    ]
    return PatchGrid(np.concatenate(boxes), None, size)


def step3p7(vlm: VLM, size: Size, inputs: Inputs) -> PatchGrid:
    """Windows, then the whole picture."""
    images = vlm.processor.image_processor
    stride = images.vision_patch_size * images.downsampler_stride
    edge = images.size["height"]
    width, height = size
    _, (wide, tall), window, columns, rows, is_padded = images._plan_patches(
        width, height, edge, images.patch_size
    )
    # a very long picture lies at the corner of a square
    shown_width, shown_height = (max(size), max(size)) if is_padded else size
    side = edge // stride
    boxes = []
    if window:
        x, y = window * shown_width / wide, window * shown_height / tall
        tile = images.patch_size // stride
        boxes = [
            cells(tile, tile, (column * x, row * y, (column + 1) * x, (row + 1) * y)).reshape(-1, 4)
            for row in range(rows)
            for column in range(columns)
        ]
    boxes.append(cells(side, side, (0, 0, shown_width, shown_height)).reshape(-1, 4))
    return PatchGrid(np.concatenate(boxes), None, size)


def minicpm(vlm: VLM, size: Size, inputs: Inputs) -> PatchGrid | None:
    """The whole picture in its own proportions, then the slices where there are any; None for the
    mode that merges twice, whose order of tokens the pixels did not confirm."""
    images = vlm.processor.image_processor
    if images.downsample_mode != "4x":
        return None
    merge = 2
    shapes = [
        (rows // merge, columns // merge) for rows, columns in inputs["target_sizes"].tolist()
    ]
    tiles: list[Region] = [(0, 0, *size)]
    if len(shapes) > 1:
        rows, columns = images.get_sliced_grid(
            size[::-1], images.max_slice_nums, images.scale_resolution
        )
        tiles += generic.regions(rows, columns, size)
    boxes = [
        cells(*of_tile, tile).reshape(-1, 4) for of_tile, tile in zip(shapes, tiles, strict=True)
    ]
    return PatchGrid(np.concatenate(boxes), None, size)


def granite_docling(vlm: VLM, size: Size, inputs: Inputs) -> PatchGrid:
    """Tiles, then the whole picture where there is more than one; four times the tokens of a tile
    on the processor's fine route."""
    rows, columns = vlm.processor.image_processor.get_tile_grid(size[1], size[0], {})
    side = math.isqrt(vlm.processor.image_seq_len * (4 if "tile_fine_mask" in inputs else 1))
    tiles = generic.regions(rows, columns, size)
    if len(tiles) > 1:
        tiles.append((0, 0, *size))
    return generic.grid_of_tiles(tiles, side, side, size)


GRIDS = {
    "granite_docling": granite_docling,
    "minicpm_ocr": minicpm,
    "cohere2_vision": cohere2_vision,
    "llama4": llama4,
    "perception_lm": perception_lm,
    "lfm2_vl": lfm2_vl,
    "step3p7": step3p7,
}


def features(vlm: VLM, inputs: Inputs) -> ImageFeatures:
    """Llama 4's, through its projector."""
    model: Any = vlm.model
    seen = model.get_image_features(inputs["pixel_values"], return_dict=True).last_hidden_state
    projected = model.multi_modal_projector(seen.flatten(0, -2))
    return SimpleNamespace(pooler_output=projected)


def variant(config: Config) -> Family:
    """The family of one model."""
    kind = config["model_type"]
    alone = GRIDS[kind] is minicpm
    return replace(
        FAMILY,
        name=kind,
        alone=alone,
        grid=GRIDS[kind],
        features=features if kind == "llama4" else None,
    )


FAMILY = Family(
    name="tiles",
    model_types=tuple(GRIDS),
    variant=variant,
    load=generic.load,
    parts=generic.parts,
    positions=generic.positions,
    rotary=generic.rotary,
    has=frozenset({"decoder-only", "rotary", "grid"}),
)

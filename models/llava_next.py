"""LLaVA-NeXT (LLaVA-1.6) and LLaVA-OneVision (arXiv 2408.03326): tiles at the picture's own proportions, each row of them ended by a newline token.

Vision tokens, in order: the whole picture squeezed to one square (the base), side x side patches; then the picture on a canvas of tiles, row by row of
patches over all tiles, each row ended by the learned newline. The canvas is the resolution of `image_grid_pinpoints` that keeps most of the picture;
the picture is scaled into it, centred, and rows or columns of patches that see only padding are dropped. OneVision shrinks the canvas's features
(bilinear) where there are more than `anyres_max_<n>` tiles of them. Base and newlines have the image token's id: all are group "vision", newlines
without a box. A tile whose side is no multiple of the patch leaves a margin at its right and bottom that no patch sees.

Text models: whatever the checkpoint names (Vicuna, Mistral, Llama 3, Qwen2); the prompt is the processor's chat template, else llava.py's by text model.

Checked on small random models with processors made in the tests: the contract. Not checked, for want of the files: the published weights; pictures so
large that OneVision shrinks on published sizes."""

import math

import numpy as np
from transformers import LlavaNextForConditionalGeneration, LlavaNextProcessor, LlavaOnevisionForConditionalGeneration, LlavaOnevisionProcessor
from transformers.image_processing_utils import select_best_resolution

from grid import PatchGrid, cells
from models import Family, generic, llava

KINDS = {
    "llava_next": generic.loader(LlavaNextForConditionalGeneration, LlavaNextProcessor),
    "llava_onevision": generic.loader(LlavaOnevisionForConditionalGeneration, LlavaOnevisionProcessor),
}


def load(path, config, **options):
    return KINDS[config.model_type](path, config, **options)


def fitted(size, canvas):
    """The part of `canvas` (height, width) that shows a picture of `size` (width, height): (x0, y0, width, height) in whole pixels, centred."""
    (width, height), (tall, wide) = size, canvas
    if wide / width < tall / height:
        new_width, new_height = wide, min(math.ceil(height * (wide / width)), tall)
    else:
        new_width, new_height = min(math.ceil(width * (tall / height)), wide), tall
    return (wide - new_width) // 2, (tall - new_height) // 2, new_width, new_height


def unpadded(size, rows, columns):
    """(first row, end, first column, end) of the canvas's patches (rows, columns) that are kept: as the model drops them, not by the pixels."""
    width, height = size
    if width / height > columns / rows:
        drop = (rows - int(round(height * (columns / width), 7))) // 2
        return drop, rows - drop, 0, columns
    drop = (columns - int(round(width * (rows / height), 7))) // 2
    return 0, rows, drop, columns - drop


def edges(first, end, count, tile, patch):
    """(begin, end) of `count` equal cells over patches first .. end of a row of tiles, in pixels of the canvas. tile, patch: sides in pixels."""
    side = tile // patch
    at = np.linspace(first, end, count + 1)
    begin, last = np.floor(at[:-1] + 1e-9), np.ceil(at[1:] - 1e-9) - 1  # the patch that a cell begins in, and the one that it ends in
    place = lambda index, u: index // side * tile + (index % side + u - index) * patch
    return place(begin, at[:-1]), place(last, at[1:])


def grid(vlm, size, inputs):
    """Base, then the canvas's rows, each with a newline behind it."""
    config, (width, height) = vlm.model.config, size
    tile, patch = config.vision_config.image_size, config.vision_config.patch_size
    side = tile // patch
    base = cells(side, side, (0, 0, width * side * patch / tile, height * side * patch / tile)).reshape(-1, 4)
    canvas = select_best_resolution([height, width], config.image_grid_pinpoints)
    rows, columns = (edge // tile * side for edge in canvas)
    top, bottom, left, right = unpadded(size, rows, columns)
    count = bottom - top, right - left
    if limit := getattr(config, "vision_aspect_ratio", None):
        ratio = math.sqrt(count[0] * count[1] / (int(limit.removeprefix("anyres_max_")) * side**2))
        count = (int(count[0] // ratio), int(count[1] // ratio)) if ratio > 1.1 else count
    x, y, new_width, new_height = fitted(size, canvas)
    (x0, x1), (y0, y1) = edges(left, right, count[1], tile, patch), edges(top, bottom, count[0], tile, patch)
    (x0, x1), (y0, y1) = ((part - x) * width / new_width for part in (x0, x1)), ((part - y) * height / new_height for part in (y0, y1))
    boxes = np.full((count[0], count[1] + 1, 4), np.nan)
    boxes[:, :-1, 0], boxes[:, :-1, 2] = x0, x1
    boxes[:, :-1, 1], boxes[:, :-1, 3] = y0[:, None], y1[:, None]
    return PatchGrid(np.concatenate([base, boxes.reshape(-1, 4)]), None, tuple(size))


FAMILY = Family(
    name="llava_next", model_types=tuple(KINDS), architectures=("LlavaNextForConditionalGeneration", "LlavaOnevisionForConditionalGeneration"), load=load,
    parts=generic.parts, grid=grid, prompt=llava.prompt, positions=generic.positions, rotary=generic.rotary,
    has=frozenset({"decoder-only", "causal", "rotary", "grid"}),
)  # fmt: skip

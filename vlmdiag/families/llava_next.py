"""LLaVA-NeXT (LLaVA-1.6) and LLaVA-OneVision (arXiv 2408.03326): tiles at the picture's own
proportions, each row of them ended by a newline token.

Vision tokens, in order: the whole picture squeezed to one square (the base), side x side patches;
then the picture on a canvas of tiles, row by row of patches over all tiles, each row ended by the
learned newline. The canvas is the resolution of `image_grid_pinpoints` that keeps most of the
picture; the picture is scaled into it, centred, and rows or columns of patches that see only
padding are dropped. OneVision shrinks the canvas's features (bilinear) where there are more than
`anyres_max_<n>` tiles of them. Base and newlines have the image token's id: all are group "vision",
newlines without a box. A tile whose side is no multiple of the patch leaves a margin at its right
and bottom that no patch sees.

Text models: whatever the checkpoint names (Vicuna, Mistral, Llama 3, Qwen2); the prompt is the
processor's chat template, else llava.py's by text model.

Checked on small random models with processors made in the tests: the contract. Not checked, for
want of the files: the published weights; pictures so large that OneVision shrinks on published
sizes."""

import math

import numpy as np
from transformers import (
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionProcessor,
)
from transformers.image_processing_utils import select_best_resolution

from vlmdiag.families import Family, generic, llava
from vlmdiag.pictures.grid import PatchGrid, cells

KINDS = {
    "llava_next": generic.loader(LlavaNextForConditionalGeneration, LlavaNextProcessor),
    "llava_onevision": generic.loader(
        LlavaOnevisionForConditionalGeneration, LlavaOnevisionProcessor
    ),
}


def load(path, config, **options):
    return KINDS[config.model_type](path, config, **options)


def fitted(size, canvas):
    """The part of `canvas` (height, width) that shows a picture of `size` (width, height): (x0, y0,
    width, height) in whole pixels, centred."""
    (width, height), (tall, wide) = size, canvas
    if wide / width < tall / height:
        new_width, new_height = wide, min(math.ceil(height * (wide / width)), tall)
    else:
        new_width, new_height = min(math.ceil(width * (tall / height)), wide), tall
    return (wide - new_width) // 2, (tall - new_height) // 2, new_width, new_height


def unpadded(size, rows, columns):
    """(first row, end, first column, end) of the canvas's patches (rows, columns) that are kept: as
    the model drops them, not by the pixels."""
    width, height = size
    if width / height > columns / rows:
        drop = (rows - int(round(height * (columns / width), 7))) // 2
        return drop, rows - drop, 0, columns
    drop = (columns - int(round(width * (rows / height), 7))) // 2
    return 0, rows, drop, columns - drop


def edges(first, end, count, tile, patch):
    """(begin, end) of `count` equal cells over patches first .. end of a row of tiles, in pixels of
    the canvas. tile, patch: sides in pixels."""
    side = tile // patch
    at = np.linspace(first, end, count + 1)
    begin, last = (
        np.floor(at[:-1] + 1e-9),
        np.ceil(at[1:] - 1e-9) - 1,
    )  # the patch that a cell begins in, and the one that it ends in
    place = lambda index, u: index // side * tile + (index % side + u - index) * patch
    return place(begin, at[:-1]), place(last, at[1:])


def layout(config, size):
    """(canvas (height, width), kept patches (first row, end, first column, end), rows and columns
    of vision tokens) of a picture of size (width, height)."""
    tile, side = (
        config.vision_config.image_size,
        config.vision_config.image_size // config.vision_config.patch_size,
    )
    canvas = select_best_resolution([size[1], size[0]], config.image_grid_pinpoints)
    top, bottom, left, right = kept = unpadded(size, *(edge // tile * side for edge in canvas))
    count = bottom - top, right - left
    if limit := getattr(config, "vision_aspect_ratio", None):
        ratio = math.sqrt(count[0] * count[1] / (int(limit.removeprefix("anyres_max_")) * side**2))
        count = (int(count[0] // ratio), int(count[1] // ratio)) if ratio > 1.1 else count
    return canvas, kept, count


def grid(vlm, size, inputs):
    """Base, then the canvas's rows, each with a newline behind it."""
    config, (width, height) = vlm.model.config, size
    tile, patch = config.vision_config.image_size, config.vision_config.patch_size
    side = tile // patch
    base = cells(
        side, side, (0, 0, width * side * patch / tile, height * side * patch / tile)
    ).reshape(-1, 4)
    canvas, (top, bottom, left, right), count = layout(config, size)
    x, y, new_width, new_height = fitted(size, canvas)
    (x0, x1), (y0, y1) = (
        edges(left, right, count[1], tile, patch),
        edges(top, bottom, count[0], tile, patch),
    )
    (x0, x1), (y0, y1) = (
        ((part - x) * width / new_width for part in (x0, x1)),
        ((part - y) * height / new_height for part in (y0, y1)),
    )
    boxes = np.full((count[0], count[1] + 1, 4), np.nan)
    boxes[:, :-1, 0], boxes[:, :-1, 2] = x0, x1
    boxes[:, :-1, 1], boxes[:, :-1, 3] = y0[:, None], y1[:, None]
    return PatchGrid(np.concatenate([base, boxes.reshape(-1, 4)]), None, tuple(size))


def sources(vlm, size, inputs):
    """One patch each; the up to four that a bilinear sample takes where the canvas is shrunk; none
    for newlines."""
    config = vlm.model.config
    tile, side = (
        config.vision_config.image_size,
        config.vision_config.image_size // config.vision_config.patch_size,
    )
    canvas, (top, bottom, left, right), (rows, columns) = layout(config, size)
    cls, wide = int(config.vision_feature_select_strategy == "default"), canvas[1] // tile

    def neighbours(first, end, count):
        """(count, 2) patches that a sample lies between, -1 for the second where it lies on one."""
        if count == end - first:
            return np.stack([np.arange(first, end), np.full(count, -1)], 1)
        at = np.clip((np.arange(count) + 0.5) * (end - first) / count - 0.5, 0, end - first - 1)
        below = np.floor(at).astype(int)
        return np.stack(
            [
                first + below,
                np.where(at > below, first + np.minimum(below + 1, end - first - 1), -1),
            ],
            1,
        )

    ys, xs = (
        neighbours(top, bottom, rows)[:, None, :, None],
        neighbours(left, right, columns)[None, :, None, :],
    )
    place = (
        (1 + ys // side * wide + xs // side) * (cls + side**2) + cls + ys % side * side + xs % side
    )
    found = np.full((rows, columns + 1, 4), -1)
    found[:, :-1] = np.where((ys >= 0) & (xs >= 0), place, -1).reshape(rows, columns, 4)
    base = np.full((side**2, 4), -1)
    base[:, 0] = cls + np.arange(side**2)
    return np.concatenate([base, found.reshape(-1, 4)])


FAMILY = Family(
    name="llava_next",
    model_types=tuple(KINDS),
    architectures=("LlavaNextForConditionalGeneration", "LlavaOnevisionForConditionalGeneration"),
    load=load,
    parts=generic.parts_with_tower,
    grid=grid,
    sources=sources,
    prompt=llava.prompt,
    positions=generic.positions,
    rotary=generic.rotary,
    has=frozenset({"decoder-only", "causal", "rotary", "grid"}),
)

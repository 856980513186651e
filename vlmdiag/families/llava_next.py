"""LLaVA-NeXT (LLaVA-1.6), LLaVA-NeXT-Video, LLaVA-OneVision (arXiv 2408.03326) and Granite 4
Vision: tiles at the picture's own proportions, each row of them ended by a newline token. Videos
are not read.

Vision tokens, in order: the whole picture squeezed to one square (the base), side x side patches;
then the picture on a canvas of tiles, row by row of patches over all tiles, each row ended by the
learned newline. The canvas is the resolution of `image_grid_pinpoints` that keeps most of the
picture; the picture is scaled into it, centred, and rows or columns of patches that see only
padding are dropped. OneVision shrinks the canvas's features (bilinear) where there are more than
`anyres_max_<n>` tiles of them. Base and newlines have the image token's id: all are group "vision",
newlines without a box. A tile whose side is no multiple of the patch leaves a margin at its right
and bottom that no patch sees.

Granite 4 Vision: a small Q-Former reads each window of patches, so that a tile has fewer vision
tokens than patches (`downsample_rate`); tokens made of several layers of the tower, and of the four
corners of each 2 x 2 patches, enter before several layers of the decoder (deepstack). Relevancy
stops at the vision tokens.

Text models: whatever the checkpoint names (Vicuna, Mistral, Llama 3, Qwen2); the prompt is the
processor's chat template, else llava.py's by text model.

Tested on small random models with processors made in the tests: the contract. Not tested: we had no
published weights; pictures so large that OneVision shrinks on published sizes.
"""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from transformers import (
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionProcessor,
)
from transformers.image_processing_utils import select_best_resolution

from vlmdiag.families import Family, generic, llava
from vlmdiag.pictures.grid import PatchGrid, cells

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor
    from transformers import PreTrainedConfig
    from typing_extensions import Unpack

    from vlmdiag.families.contract import Config, Inputs, Loaded, LoadOptions, Size
    from vlmdiag.types import VLM, ImageFeatures

LOADERS = {
    "llava_next": generic.loader(LlavaNextForConditionalGeneration, LlavaNextProcessor),
    "llava_next_video": generic.load,
    "llava_onevision": generic.loader(
        LlavaOnevisionForConditionalGeneration, LlavaOnevisionProcessor
    ),
    "granite4_vision": generic.load,
}


def load(path: str, config: PreTrainedConfig, **options: Unpack[LoadOptions]) -> Loaded:
    """By the loader of the model's type."""
    model, processor = LOADERS[config.model_type](path, config, **options)
    if config.model_type == "llava_next":
        llava.complete(processor, config)
    return model, processor


# --- the canvas -----------------------------------------------------------------------------------


class Tile(NamedTuple):
    """Sides of a tile and of a patch in pixels, and of a tile in whole patches."""

    edge: int
    patch: int | float
    side: int


class Canvas(NamedTuple):
    """How a picture lies on its tiles."""

    height: int  # in pixels
    width: int
    # patches of the canvas that are kept: [top, bottom) x [left, right)
    top: int
    bottom: int
    left: int
    right: int
    # vision tokens, fewer than the kept patches where OneVision shrinks
    rows: int
    columns: int


def tile_of(config: PreTrainedConfig) -> Tile:
    """The tile of a model."""
    edge = config.vision_config.image_size
    patch = config.vision_config.patch_size
    rate = getattr(config, "downsample_rate", None)  # Granite's: one vision token of some patches
    if rate is None:
        return Tile(edge, patch, edge // patch)
    return Tile(edge, float(patch / Fraction(rate)), int(edge // patch * Fraction(rate)))


def fitted(size: Size, canvas: Canvas) -> tuple[int, int, int, int]:
    """The part of the canvas that shows a picture of `size`: (x0, y0, width, height) in whole
    pixels, centred."""
    width, height = size
    if canvas.width / width < canvas.height / height:
        new_width = canvas.width
        new_height = min(math.ceil(height * (canvas.width / width)), canvas.height)
    else:
        new_width = min(math.ceil(width * (canvas.height / height)), canvas.width)
        new_height = canvas.height
    x0 = (canvas.width - new_width) // 2
    y0 = (canvas.height - new_height) // 2
    return x0, y0, new_width, new_height


def unpadded(size: Size, rows: int, columns: int) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) of the canvas's patches (rows, columns) that are kept: as the
    model drops them, not by the pixels."""
    width, height = size
    if width / height > columns / rows:
        drop = (rows - int(round(height * (columns / width), 7))) // 2
        return drop, rows - drop, 0, columns
    drop = (columns - int(round(width * (rows / height), 7))) // 2
    return 0, rows, drop, columns - drop


def canvas_of(config: PreTrainedConfig, size: Size) -> Canvas:
    """The canvas of a picture of `size`."""
    tile = tile_of(config)
    width, height = size
    tall, wide = select_best_resolution([height, width], config.image_grid_pinpoints)
    top, bottom, left, right = unpadded(
        size, tall // tile.edge * tile.side, wide // tile.edge * tile.side
    )
    rows = bottom - top
    columns = right - left
    limit = getattr(config, "vision_aspect_ratio", None)
    if limit:
        most = int(limit.removeprefix("anyres_max_"))  # tiles whose features are kept as they are
        ratio = math.sqrt(rows * columns / (most * tile.side**2))
        if ratio > 1.1:
            rows = int(rows // ratio)
            columns = int(columns // ratio)
    return Canvas(tall, wide, top, bottom, left, right, rows, columns)


# --- boxes ----------------------------------------------------------------------------------------


def edges(
    first: int, end: int, count: int, tile: Tile
) -> tuple[Float[np.ndarray, " count"], Float[np.ndarray, " count"]]:
    """(begin, end) of `count` equal cells over patches first .. end of a row of tiles, in pixels of
    the canvas."""
    at = np.linspace(first, end, count + 1)
    # the patch that a cell begins in, and the one that it ends in
    begin = np.floor(at[:-1] + 1e-9)
    last = np.ceil(at[1:] - 1e-9) - 1

    def pixels(
        patch: Float[np.ndarray, " count"], place: Float[np.ndarray, " count"]
    ) -> Float[np.ndarray, " count"]:
        """A place in patches, within or at the end of `patch`, in pixels: tiles leave a margin."""
        within = patch % tile.side + place - patch
        return patch // tile.side * tile.edge + within * tile.patch

    return pixels(begin, at[:-1]), pixels(last, at[1:])


def grid(vlm: VLM, size: Size, inputs: Inputs) -> PatchGrid:
    """Base, then the canvas's rows, each with a newline behind it."""
    config = vlm.model.config
    tile = tile_of(config)
    width, height = size
    seen = tile.side * tile.patch
    base = cells(tile.side, tile.side, (0, 0, width * seen / tile.edge, height * seen / tile.edge))
    canvas = canvas_of(config, size)
    x, y, new_width, new_height = fitted(size, canvas)
    x0, x1 = edges(canvas.left, canvas.right, canvas.columns, tile)
    y0, y1 = edges(canvas.top, canvas.bottom, canvas.rows, tile)
    boxes = np.full((canvas.rows, canvas.columns + 1, 4), np.nan)
    boxes[:, :-1, 0] = (x0 - x) * width / new_width
    boxes[:, :-1, 1] = ((y0 - y) * height / new_height)[:, None]
    boxes[:, :-1, 2] = (x1 - x) * width / new_width
    boxes[:, :-1, 3] = ((y1 - y) * height / new_height)[:, None]
    return PatchGrid(np.concatenate([base.reshape(-1, 4), boxes.reshape(-1, 4)]), None, size)


# --- what a vision token is made of ---------------------------------------------------------------


def neighbours(first: int, end: int, count: int) -> Int[np.ndarray, "count 2"]:
    """The patches of first .. end that each of `count` bilinear samples lies between, -1 for the
    second where it lies on one."""
    patches = end - first
    if count == patches:
        return np.stack([np.arange(first, end), np.full(count, -1)], 1)
    at = np.clip((np.arange(count) + 0.5) * patches / count - 0.5, 0, patches - 1)
    below = np.floor(at).astype(int)
    above = np.minimum(below + 1, patches - 1)
    return np.stack([first + below, np.where(at > below, first + above, -1)], 1)


def sources(vlm: VLM, size: Size, inputs: Inputs) -> Int[np.ndarray, "P 4"]:
    """One patch each; the up to four that a bilinear sample takes where the canvas is shrunk; none
    for newlines."""
    config = vlm.model.config
    edge, _, side = tile_of(config)
    canvas = canvas_of(config, size)
    cls = int(config.vision_feature_select_strategy == "default")
    ys = neighbours(canvas.top, canvas.bottom, canvas.rows)[:, None, :, None]
    xs = neighbours(canvas.left, canvas.right, canvas.columns)[None, :, None, :]
    # place of patch (y, x) in the tower's output: behind the base and the tiles before its own
    tile = 1 + ys // side * (canvas.width // edge) + xs // side
    place = tile * (cls + side**2) + cls + ys % side * side + xs % side
    place = np.where((ys >= 0) & (xs >= 0), place, -1)
    of_canvas = np.full((canvas.rows, canvas.columns + 1, 4), -1)
    of_canvas[:, :-1] = place.reshape(canvas.rows, canvas.columns, 4)
    of_base = np.full((side**2, 4), -1)
    of_base[:, 0] = cls + np.arange(side**2)
    return np.concatenate([of_base, of_canvas.reshape(-1, 4)])


# --- Granite 4 Vision -----------------------------------------------------------------------------


def granite_targets(vlm: VLM) -> list[int]:
    """The decoder layers that read features of the picture, in the order of get_image_features."""
    config = vlm.model.config
    return [layer for _, layer in config.deepstack_layer_map] + list(config.spatial_target_layers)


def granite_layers(vlm: VLM) -> list[int]:
    """Features enter before a layer: behind the one before it; those of layer 0 are the input."""
    return sorted({layer - 1 for layer in granite_targets(vlm) if layer > 0})


def granite_features(vlm: VLM, inputs: Inputs) -> ImageFeatures:
    """The class adds them to zeros behind the multiplier of the decoder's input, and where a layer
    is named twice the last ones count."""
    model: Any = vlm.model
    seen = model.model.get_image_features(
        **inputs,
        vision_feature_layer=model.config.vision_feature_layer,
        vision_feature_select_strategy=model.config.vision_feature_select_strategy,
        return_dict=True,
    )
    of_layer: dict[int, list[Tensor]] = dict(seen.deepstack_features)
    some = next(iter(of_layer.values()))
    first = of_layer.get(0, [torch.zeros_like(picture) for picture in some])
    multiplier = vlm.parts.decoder.config.embedding_multiplier
    return SimpleNamespace(
        pooler_output=[picture / multiplier for picture in first],
        deepstack_features=[of_layer[layer + 1] for layer in granite_layers(vlm)],
    )


def variant(config: Config) -> Family:
    """The family of one model type."""
    if config.get("model_type") != "granite4_vision":
        return FAMILY
    return replace(
        FAMILY,
        name="granite4_vision",
        parts=generic.parts,
        sources=None,
        features=granite_features,
        deepstack=granite_layers,
        makes_no_cache=True,
    )


FAMILY = Family(
    name="llava_next",
    model_types=tuple(LOADERS),
    architectures=("LlavaNextForConditionalGeneration", "LlavaOnevisionForConditionalGeneration"),
    variant=variant,
    load=load,
    parts=generic.parts_with_tower,
    grid=grid,
    sources=sources,
    prompt=llava.prompt,
    guesses_prompt=True,
    turn_end=llava.turn_end,
    positions=generic.positions,
    rotary=generic.rotary,
    has=frozenset({"decoder-only", "causal", "rotary", "grid"}),
)

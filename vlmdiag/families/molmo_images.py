"""Molmo's pictures and prompts: overlapping crops, and the tokens that stand for them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional as F

from vlmdiag.families.assembled import Expanding
from vlmdiag.families.molmo_config import POOL

if TYPE_CHECKING:
    from jaxtyping import Float
    from PIL.Image import Image
    from torch import Tensor
    from transformers import BatchFeature

    from vlmdiag.families.contract import Size
    from vlmdiag.families.molmo_config import MolmoConfig
    from vlmdiag.pictures.grid import Region

# in the order of their ids
START, END, PATCH, COLUMN, IMAGE = EXTRA = (
    "<im_start>",
    "<im_end>",
    "<im_patch>",
    "<im_col>",
    "<|image|>",
)


def choose_crops(size: Size, config: MolmoConfig) -> tuple[int, int]:
    """(rows, columns) of crops for a picture of `size`: the least enlargement, or else the least
    reduction; in float32, as published."""
    patch = config.vision_config.patch_size
    numbers = range(1, config.max_crops + 1)
    tilings = [(rows, columns) for rows in numbers for columns in numbers]
    tilings = [tiling for tiling in tilings if tiling[0] * tiling[1] <= config.max_crops]
    tilings.sort(key=lambda tiling: (tiling[0] * tiling[1], tiling[0]))
    shape = np.array(size[::-1], np.float32) - np.float32(sum(config.margins) * patch)
    windows = np.array(tilings, np.float32) * np.float32(config.window * patch)
    with np.errstate(divide="ignore"):  # a picture as small as the margins
        scale = (windows / shape).min(-1)
    if (scale < 1).all():
        return tilings[int(scale.argmax())]
    return tilings[int(np.where(scale < 1, np.float32(10e9), scale).argmin())]


def fitted(size: Size, height: int, width: int) -> tuple[int, int, int, int]:
    """(left, top, width, height) in pixels of a picture of `size` that is scaled to fit a canvas,
    in its middle; in float32, as published."""
    picture_width, picture_height = map(np.float32, size)
    scale = min(np.float32(width) / picture_width, np.float32(height) / picture_height)
    new_width = int(picture_width * scale)
    new_height = int(picture_height * scale)
    return (width - new_width) // 2, (height - new_height) // 2, new_width, new_height


def region(size: Size, height: int, width: int) -> Region:
    """A canvas in pixels of the picture on it: (x0, y0, x1, y1)."""
    left, top, new_width, new_height = fitted(size, height, width)
    x = size[0] / new_width
    y = size[1] / new_height
    return -left * x, -top * y, (width - left) * x, (height - top) * y


class MolmoImages:
    """Pictures of a model with `config` as crops."""

    def __init__(self, config: MolmoConfig) -> None:
        self.config = config

    def fit(
        self, image: Image, height: int, width: int
    ) -> tuple[Float[Tensor, "3 height width"], Float[Tensor, "height width"]]:
        """Normalised pixels on black, and 1 where the picture is."""
        left, top, new_width, new_height = fitted(image.size, height, width)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
        pixels = F.interpolate(
            pixels, (new_height, new_width), mode="bilinear", antialias=True, align_corners=False
        )[0].clamp(0, 1)
        around = (left, width - left - new_width, top, height - top - new_height)
        mean = torch.tensor(self.config.image_mean)[:, None, None]
        std = torch.tensor(self.config.image_std)[:, None, None]
        mask = F.pad(torch.ones(new_height, new_width), around)
        return (F.pad(pixels, around) - mean) / std, mask

    def __call__(self, image: Image) -> dict[str, Tensor]:
        """pixel_values, image_masks and tile_grids (1, 2), see Molmo.get_image_features."""
        config = self.config
        size = config.vision_config.image_size
        patch = config.vision_config.patch_size
        rows, columns = choose_crops(image.size, config)
        low, low_mask = self.fit(image, size, size)
        height, width = config.canvas(rows, columns)
        canvas, mask = self.fit(image, height * patch, width * patch)
        masks = [self._shares(crop) for crop in self._cut(mask, rows, columns)]
        if config.fix_image_padding:
            masks = [self._shares(low_mask), *masks]
        else:  # as published: one place too early, the last crop padded in part
            masks = [*masks, torch.full_like(masks[0], -1)]
        return {
            "pixel_values": torch.stack([low, *self._cut(canvas, rows, columns)]),
            "image_masks": torch.stack(masks),
            "tile_grids": torch.tensor([[rows, columns]]),
        }

    def _cut(
        self, plane: Float[Tensor, "... height width"], rows: int, columns: int
    ) -> list[Float[Tensor, "... size size"]]:
        """The crops of a canvas, row by row."""
        size = self.config.vision_config.image_size
        step = self.config.window * self.config.vision_config.patch_size
        corners = [(i * step, j * step) for i in range(rows) for j in range(columns)]
        return [plane[..., y : y + size, x : x + size] for y, x in corners]

    def _shares(self, mask: Float[Tensor, "size size"]) -> Float[Tensor, " patches"]:
        """How much of each patch of a crop is picture."""
        patch = self.config.vision_config.patch_size
        by_patch = mask.unflatten(1, (-1, patch)).unflatten(0, (-1, patch))
        return by_patch.mean((1, 3)).flatten()


class MolmoProcessor(Expanding):
    """Crops and prompts; the BOS token in front where special tokens are asked for."""

    image_token = IMAGE
    chat_template = None

    def picture(self, image: Image) -> tuple[str, list[tuple[int, str]], dict[str, Tensor]]:
        """The tokens of the low resolution, then of all crops together."""
        inputs = self.image_processor(image)
        config = self.image_processor.config
        ids = dict(zip(EXTRA, self.tokenizer.convert_tokens_to_ids(list(EXTRA)), strict=True))
        canvas = config.canvas(*inputs["tile_grids"][0].tolist())
        strings: list[str] = []
        for height, width in ((config.side, config.side), canvas):
            row = [PATCH] * (width // POOL) + [COLUMN]
            strings += [START, *row * (height // POOL), END]
        return IMAGE, [(ids[string], string) for string in strings], inputs

    def __call__(
        self,
        images: Image,
        text: str,
        return_tensors: str = "pt",
        return_offsets_mapping: bool = False,
        add_special_tokens: bool = True,
    ) -> BatchFeature:
        """Expanding's inputs, behind the BOS."""
        encoded = super().__call__(
            images,
            text,
            return_tensors=return_tensors,
            return_offsets_mapping=return_offsets_mapping,
            add_special_tokens=False,
        )
        if add_special_tokens:
            bos = self.tokenizer.bos_token_id
            encoded["input_ids"] = F.pad(encoded["input_ids"], (1, 0), value=bos)
            encoded["attention_mask"] = F.pad(encoded["attention_mask"], (1, 0), value=1)
            if "offset_mapping" in encoded:
                encoded["offset_mapping"] = F.pad(encoded["offset_mapping"], (0, 0, 1, 0))
        return encoded

"""Resizing, padding, cropping and normalising of (..., channels, height, width) tensors, on
torch."""

from enum import Enum

import numpy as np
import torch
from PIL import Image
from torch import nn


class InterpolationMode(Enum):
    """As torchvision's."""

    NEAREST = "nearest"
    NEAREST_EXACT = "nearest-exact"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


OF_PIL = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
SMOOTH = (InterpolationMode.BILINEAR, InterpolationMode.BICUBIC)


def resize(image, size, interpolation=InterpolationMode.BILINEAR, max_size=None, antialias=True):
    """An image or a batch of images in another size, rounded where it holds whole numbers."""
    assert max_size is None and len(size) == 2, "not written"
    if tuple(image.shape[-2:]) == tuple(size):
        return image
    if isinstance(interpolation, int):
        interpolation = InterpolationMode(OF_PIL[interpolation])
    mode = InterpolationMode.BICUBIC if interpolation.value == "lanczos" else interpolation
    smooth = {"align_corners": False, "antialias": bool(antialias)} if mode in SMOOTH else {}
    pixels = image.reshape(-1, *image.shape[-3:]).float()
    resized = nn.functional.interpolate(pixels, tuple(size), mode=mode.value, **smooth)
    if not image.is_floating_point():
        resized = resized.round().clamp(0, 255)
    return resized.to(image.dtype).reshape(*image.shape[:-2], *size)


def pad(image, padding, fill=0, padding_mode="constant"):
    """Padding of one number, of (sides, top and bottom), or of (left, top, right, bottom)."""
    if isinstance(padding, int):
        padding = [padding]
    left, top, right, bottom = {1: padding * 4, 2: [*padding] * 2, 4: padding}[len(padding)]
    if isinstance(fill, (list, tuple)) and len({*fill}) > 1:
        parts = image.unbind(-3)
        return torch.stack([pad(x, padding, value) for x, value in zip(parts, fill)], -3)
    value = fill[0] if isinstance(fill, (list, tuple)) else fill or 0
    sides = (left, right, top, bottom)
    return nn.functional.pad(image, sides, mode=padding_mode, value=value)


def crop(image, top, left, height, width):
    """A part of the picture."""
    return image[..., top : top + height, left : left + width]


def normalize(image, mean, std, inplace=False):
    """(image - mean) / std of each channel."""
    mean, std = (torch.as_tensor(x, dtype=image.dtype).view(-1, 1, 1) for x in (mean, std))
    return (image - mean) / std


def grayscale_to_rgb(image):
    """Three channels of one."""
    return image.expand(*image.shape[:-3], 3, -1, -1) if image.shape[-3] == 1 else image


def to_dtype(image, dtype=torch.float32, scale=False):
    """Another type; scale: whole numbers of 0 to 255, fractions of 0 to 1."""
    if scale and image.is_floating_point() != dtype.is_floating_point:
        image = image / 255 if dtype.is_floating_point else (image * 255).round()
    return image.to(dtype)


def pil_to_tensor(picture):
    """(channels, height, width) of a PIL picture."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def to_pil_image(image):
    """A PIL picture of (channels, height, width)."""
    return Image.fromarray(image.permute(1, 2, 0).byte().numpy())

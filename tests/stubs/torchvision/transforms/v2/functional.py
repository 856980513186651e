"""As torchvision.transforms.v2.functional."""

from torchvision.transforms.functional import (
    InterpolationMode,
    crop,
    grayscale_to_rgb,
    normalize,
    pad,
    pil_to_tensor,
    resize,
    to_dtype,
    to_pil_image,
)

__all__ = [
    "InterpolationMode",
    "crop",
    "grayscale_to_rgb",
    "normalize",
    "pad",
    "pil_to_tensor",
    "resize",
    "to_dtype",
    "to_pil_image",
]

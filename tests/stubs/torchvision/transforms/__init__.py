"""As torchvision.transforms: the functions, and the names of interpolations."""

from torchvision.transforms import functional
from torchvision.transforms.functional import InterpolationMode

__all__ = ["InterpolationMode", "functional"]

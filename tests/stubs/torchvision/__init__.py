"""A stand-in for torchvision, on the path of processes that tests start for image processors which
transformers has on torchvision alone: the functions that those call, written on torch."""

from torchvision import io, transforms

__version__ = "0.0.0+stand.in"
__all__ = ["io", "transforms"]

"""Names that transformers imports; nothing here reads a file."""

from enum import Enum


class ImageReadMode(Enum):
    """As torchvision's."""

    RGB = "RGB"


def decode_image(*_args, **_options):
    """Not written: tests give pictures of PIL."""
    raise NotImplementedError("the stand-in for torchvision reads no files")

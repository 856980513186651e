"""Pictures whose pixels are let go and decoded again, so that a batch of large ones does not hold
the pixels of all of them at once."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

from PIL import Image

if TYPE_CHECKING:
    from PIL._imaging import ImagingCore, PixelAccess

HELD = 2**28  # bytes of decoded pictures that are held at once, apart from small ones
SMALL = 2**22  # bytes of a picture that is not counted
_held = 0
_lock = threading.RLock()  # a picture may be collected while it is held


class Deferred(Image.Image):
    """An RGB picture that is decoded when its pixels are asked for, by decode(), and kept until
    let_go()."""

    def __init__(self, decoded: Image.Image, decode: Callable[[], Image.Image]) -> None:
        super().__init__()
        self._mode = decoded.mode
        self._size = decoded.size
        self.info = dict(decoded.info)
        self._decode = decode

    @property
    def im(self) -> ImagingCore:
        """The pixels, as Pillow's own methods ask for them."""
        if self._im is None:
            self._im = self._decode().im
        return super().im

    @im.setter
    def im(self, pixels: ImagingCore | None) -> None:
        self._im = pixels

    def load(self) -> PixelAccess:
        """Decode where that was not done yet, as Pillow's own methods ask for it."""
        return self.im.pixel_access(self.readonly)


def let_go(image: Image.Image) -> None:
    """The pixels of a picture are not needed now; a later use decodes them again."""
    if isinstance(image, Deferred):
        image.im = None


def held_or_deferred(decoded: Image.Image, decode: Callable[[], Image.Image]) -> Image.Image:
    """A decoded picture, or where too many are held already a Deferred of the same pixels."""
    global _held
    size = 4 * decoded.width * decoded.height  # Pillow keeps RGB in four bytes a pixel
    if size <= SMALL:
        return decoded
    with _lock:
        fits = _held + size <= HELD
        _held += size if fits else 0
    if not fits:
        return Deferred(decoded, decode)
    weakref.finalize(decoded, _give_back, size)
    return decoded


def _give_back(size: int) -> None:
    global _held
    with _lock:
        _held -= size

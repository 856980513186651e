"""A sample, one prompt about one picture or several, and the one reader of pictures. Lists of
samples: coco.py, questions.py, chats.py. Kept free of torch."""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
import os
import re
import stat
import struct
import threading
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Protocol, TypeVar

import numpy as np
from PIL import Image

from vlmdiag.cli import UsageError
from vlmdiag.pictures.deferred import held_or_deferred
from vlmdiag.pictures.video import Frame, read_frames
from vlmdiag.types import Record

PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
# What a picture may be, so that the memory it takes is known before it is decoded. (What becomes of
# a strip in a model's processor: model/limits.py.)
PIXEL_LIMIT = 100_000_000  # up to 1.2 GB while it is converted
RATIO_LIMIT = 1000  # of the longer side to the shorter
# Larger pictures are resized before they wait decoded for their turn: to so many pixels, which is
# more than a model's processor leaves (Qwen2-VL: 12.8 million), and to so long a side, of which
# processors that pad pictures make a square.
KEPT_PIXELS = 16_000_000
KEPT_SIDE = 6000
# one large picture at a time is decoded in full
_LARGE = threading.Lock()
# load_image() has this limit of its own, in place of Pillow's warning at 89 Mpixel
Image.MAX_IMAGE_PIXELS = None
# Blocks of a size that malloc gives back at once (glibc maps from 32 MiB on): those of threads that
# decoded a large picture would stay with the process.
Image.core.set_block_size(2**26)  # type: ignore[attr-defined]
# what Pillow raises on damaged files
_UNREADABLE = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    KeyError,
    IndexError,
    TypeError,
    OverflowError,
    struct.error,
    zlib.error,
)
ORIENTATION = 0x0112  # the EXIF tag
# EXIF orientation -> what brings the picture upright
TURN = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_TURNED = "turned by EXIF orientation"  # in the info of a picture that was

ID_LIMIT = 150  # bytes of a picture's name that becomes the name of other files
AT_HAND = Path()  # the image of a sample whose picture is given beside it


@dataclass(frozen=True)
class Turn:
    """One message of a conversation: parts in order, each a text, or None for a picture."""

    role: str  # user or assistant
    parts: tuple[str | None, ...]

    @property
    def text(self) -> str:
        """Its words."""
        return " ".join(part for part in self.parts if part is not None)


@dataclass(frozen=True)
class Chat:
    """A prompt of several pictures or several turns: its pictures in the order in which the turns
    have them. The last turn is the user's."""

    images: tuple[Path | Frame, ...]
    turns: tuple[Turn, ...]
    system: str | None = None  # a system message of its own


@dataclass(frozen=True)
class Sample:
    """One image and one prompt. id: text, unique within a list, names the item's files; extra: what
    else the list says, 'image_id' as it stands there. chat: the whole prompt where it has several
    pictures or turns, of which image is the first picture and question the last turn's words.
    given: what another file says as the model's answer, text or ids, see --answers and --drafts."""

    id: str
    image: Path
    question: str
    answer: str | None = None
    extra: Record = field(default_factory=dict, hash=False)
    chat: Chat | None = None
    given: str | tuple[int, ...] | None = None

    @property
    def inputs(self) -> list[object]:
        """What its numbers are made of."""
        more = [part for part in (self.chat, self.given) if part is not None]
        return [self.question, self.answer, self.image, *more]


class HasImage(Protocol):
    """An item of a run that names its picture."""

    @property
    def image(self) -> Path:
        """Where its picture is."""


WithImage = TypeVar("WithImage", bound=HasImage)


# --- pictures -------------------------------------------------------------------------------------


def list_pictures(folder: str | Path) -> list[Path]:
    """The pictures of a folder, sorted by name, those in folders of it left out. UsageError: no
    such folder, no picture."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such image folder")
    try:
        shown = [file for file in folder.iterdir() if not file.name.startswith(".")]
    except OSError as error:
        raise UsageError(f"{folder} cannot be read ({error.strerror})") from error
    # a link that leads nowhere is a picture that fails; a pipe or a folder is none
    of_kind = (file for file in shown if file.suffix.lower() in PICTURES)
    files = sorted(file for file in of_kind if os.path.isfile(file) or not os.path.exists(file))
    if not files:
        raise UsageError(f"{folder} has no picture ({' '.join(sorted(PICTURES))})")
    return files


def id_of(name: str) -> str:
    """A picture's name as the id of an item, which names files: itself, or its beginning and a
    digest where it is long, is not text, or has what no file name of ours has."""
    content = name.encode("utf-8", "surrogatepass")
    is_text = content == name.encode("utf-8", "replace")
    if is_text and len(content) <= ID_LIMIT and not re.search(r"^\.|[/\\\0]", name):
        return name
    beginning = re.sub(r"[^A-Za-z0-9_-]", "-", name[:60])
    return f"{beginning}~{hashlib.sha256(content).hexdigest()[:16]}"


def samples_of(folder: str | Path, question: str, max_images: int | None = None) -> list[Sample]:
    """A sample per picture of a folder, sorted by name. id: the name without its ending, with it
    where two pictures share one, see id_of(). UsageError as list_pictures()."""
    files = list_pictures(folder)
    stems = Counter(file.stem for file in files)
    names = [file.stem if stems[file.stem] == 1 else file.name for file in files]
    taken = Counter(names)  # a.jpg.png beside a.jpg and a.png
    names = [file.name if taken[name] > 1 else name for name, file in zip(names, files)]
    return [
        Sample(id_of(name), file, question, extra={"image_id": id_of(name)})
        for name, file in zip(names[:max_images], files)
    ]


def with_picture(item: WithImage) -> tuple[WithImage, Image.Image]:
    """(item, the picture at item.image), for engine.run_items."""
    return item, load_image(item.image)


Pictures = Image.Image | tuple[Image.Image, ...]  # of a sample: a tuple where it has a chat


@contextlib.contextmanager
def needed() -> Iterator[None]:
    """Pictures that a command cannot do without: UsageError where one cannot be read."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise UsageError(str(error)) from error


def given_image(path: str | Path) -> Image.Image:
    """load_image() of a picture that a command cannot do without."""
    with needed():
        return load_image(path)


def given_pictures(sample: Sample) -> Pictures:
    """The pictures of a sample that a command cannot do without."""
    with needed():
        return with_pictures(sample)[1]


def with_pictures(sample: Sample) -> tuple[Sample, Pictures]:
    """(sample, its picture, of a chat the tuple of its pictures), for engine.run_items."""
    if sample.chat is None:
        return with_picture(sample)
    return sample, load_pictures(sample.chat.images)


def load_pictures(sources: Sequence[Path | Frame]) -> tuple[Image.Image, ...]:
    """The pictures of several files and frames of videos; a video is decoded once. Errors of
    load_image() and video.read_frames()."""
    wanted: dict[Path, list[int]] = {}
    for source in sources:
        if isinstance(source, Frame):
            wanted.setdefault(source.video, []).append(source.index)
    frames = {video: read_frames(video, indices) for video, indices in wanted.items()}
    return tuple(
        frames[source.video][source.index] if isinstance(source, Frame) else load_image(source)
        for source in sources
    )


def load_image(path: str | Path | IO[bytes]) -> Image.Image:
    """A picture as an upright PIL image in mode RGB, of several frames the first; a large one
    resized to KEPT_PIXELS and KEPT_SIDE at most, its shape kept. Where many large ones are held
    already, its pixels are decoded again when they are asked for (deferred.py); the file has to
    stay as it is until then.

    16-bit grey is scaled by 1/257. Transparency is dropped and CMYK converted as PIL's
    convert("RGB") does, which is what the models' processors see. turn_of() tells how the stored
    picture was turned. FileNotFoundError, or ValueError in one line for what is damaged, has more
    than PIXEL_LIMIT pixels or a longer side of more than RATIO_LIMIT times the shorter one, or no
    known range of values (float and 32-bit pictures).
    """
    source: str | Path | bytes
    if isinstance(path, (str, Path)):
        source = path
    else:
        path.seek(0)
        source = path.read()

    def decode() -> Image.Image:
        return _decoded(io.BytesIO(source) if isinstance(source, bytes) else source)

    return held_or_deferred(decode(), decode)


def _decoded(path: str | Path | IO[bytes]) -> Image.Image:
    """See load_image()."""
    with _opened(path) as file:
        kept = _kept_size(file.size)
        is_large = kept != file.size
        with _LARGE if is_large else contextlib.nullcontext():
            turn = _orientation(file) if _turns_itself(file) else 1
            file.load()
            if not _turns_itself(file):
                turn = _orientation(file)
            # without the copy that a conversion of RGB to RGB is
            image: Image.Image = file if is_large and file.mode == "RGB" else _rgb(file)
            if is_large:
                image = image.resize(kept, Image.Resampling.BICUBIC)
            is_upright = _turns_itself(file)
            file.close()  # its pixels at once, not when the garbage is collected
    # no orientation stays behind for a processor to apply again
    image.info = {}
    if turn in TURN:
        if not is_upright:
            image = image.transpose(TURN[turn])
        image.info[_TURNED] = turn
    return image


def _kept_size(size: tuple[int, int]) -> tuple[int, int]:
    """The size at which a picture of a size is kept."""
    width, height = size
    by_pixels = math.sqrt(KEPT_PIXELS / (width * height))
    factor = min(1, by_pixels, KEPT_SIDE / max(size))
    if factor == 1:
        return size
    return max(1, round(width * factor)), max(1, round(height * factor))


def turn_of(image: Image.Image) -> int:
    """The EXIF orientation (1 to 8) by which load_image() brought a picture upright, 1 for none."""
    return int(image.info.get(_TURNED, 1))


def picture_header(path: str | Path | IO[bytes]) -> tuple[tuple[int, int], int]:
    """((width, height) that load_image() gives, EXIF orientation), from the picture's header alone;
    errors alike."""
    with _opened(path) as file:
        turn = _orientation(file)
        width, height = _kept_size(file.size)
        is_upright = turn < 5 or _turns_itself(file)
        return ((width, height) if is_upright else (height, width)), turn


def format_of(data: bytes) -> str:
    """The ending that a picture's file has, such as 'jpg'. ValueError where it is no picture."""
    with _opened(io.BytesIO(data)) as file:
        return str(file.format).lower().replace("jpeg", "jpg")


def annotated_as(drawn: tuple[int, int], size: tuple[int, int], turn: int) -> str:
    """Which picture was annotated where a file says that it has the (width, height) drawn: 'shown',
    the upright one of this size, or a copy of it at another size; 'stored', the one before its EXIF
    orientation was applied; 'either', where that cannot be told; 'neither'."""
    shown = _same_shape(drawn, size)
    if turn == 1:
        return "shown" if shown else "neither"
    stored = _same_shape(drawn, size if turn < 5 else size[::-1])
    if shown and stored:
        return "either"
    return "shown" if shown else "stored" if stored else "neither"


def _same_shape(a: tuple[int, int], b: tuple[int, int]) -> bool:
    """Whether a picture of size b can be a resized copy of one of size a: the same factor for both
    sides, each rounded by at most a pixel."""
    low = max((b[0] - 1) / a[0], (b[1] - 1) / a[1])
    high = min((b[0] + 1) / a[0], (b[1] + 1) / a[1])
    return low <= high


@contextlib.contextmanager
def _opened(path: str | Path | IO[bytes]) -> Iterator[Image.Image]:
    """A picture within the limits; what goes wrong with it as load_image() says."""
    name = path if isinstance(path, (str, Path)) else "picture"
    try:
        if isinstance(path, (str, Path)) and not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError("no file")  # opening a pipe would wait for ever
        with Image.open(path) as file:
            if file.format == "EPS":  # whatever its name says
                raise ValueError("PostScript is a program, which Pillow would have Ghostscript run")
            shorter, longer = sorted(file.size)
            if shorter * longer > PIXEL_LIMIT:
                raise ValueError(
                    f"{file.width} x {file.height} pixels, more than {PIXEL_LIMIT // 10**6} million"
                )
            if longer > RATIO_LIMIT * shorter:
                raise ValueError(
                    f"{file.width} x {file.height} pixels, one side more than {RATIO_LIMIT} times"
                    " the other"
                )
            yield file
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{name}: no such picture") from error
    except _UNREADABLE as error:
        reason = " ".join(str(error).replace(f" {path!r}", "").split()) or type(error).__name__
        raise ValueError(f"{name}: not a readable picture ({reason})") from error


def _orientation(image: Image.Image) -> int:
    """1 to 8, as EXIF counts; 1 for what is none of these."""
    try:
        orientation = int(image.getexif().get(ORIENTATION, 1))
        return orientation if orientation in TURN else 1
    except _UNREADABLE:
        return 1  # damaged EXIF, sound picture


def _turns_itself(image: Image.Image) -> bool:
    """Whether Pillow turns a picture by its orientation while it is loaded; its size is that of the
    upright one from the beginning, and the orientation is gone afterwards."""
    return image.format == "TIFF"


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        image = Image.fromarray(_eight_bits(image))
    elif image.mode == "P":
        image.info.pop("transparency", None)  # of which Pillow would warn
    elif image.mode == "LA":
        image = image.convert("L")
    elif image.mode in ("PA", "La", "RGBa"):
        image = image.convert("RGBA")
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    """The levels of a 16-bit picture as 8 bits, row by row to save memory. ValueError for levels of
    another range."""
    # of 16 bits, also where Pillow gives them as 32; a file of 32 bits may hold 8
    is_known = image.mode.startswith("I;16") or image.format in ("PNG", "PPM")
    if image.mode == "I" and not is_known:
        is_known = max(np.abs(image.getextrema())) > 255
    levels = np.empty((image.height, image.width), np.uint8)
    rows = max(1, 2**22 // image.width)
    for top in range(0, image.height, rows):
        strip = np.asarray(image.crop((0, top, image.width, min(top + rows, image.height))))
        if not is_known or strip.min() < 0 or strip.max() > 65535:
            raise ValueError(
                "a float or 32-bit picture, whose range of values is unknown; convert it to 8 or 16"
                " bits"
            )
        levels[top : top + rows] = (strip.astype(np.uint32) + 128) // 257
    return levels

"""Readers of image and question lists, and of pictures: COCO json, question lists, MMHal-style json
-> Sample. Kept free of torch."""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Protocol, TypeVar
from urllib.parse import unquote, urlsplit

import numpy as np
from PIL import Image

from vlmdiag.cli import UsageError
from vlmdiag.types import Fields, Record

PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
PIXEL_LIMIT = 300_000_000  # one picture of this size takes 1.2 GB while it is converted
# load_image() has this limit of its own, in place of Pillow's warning at 89 Mpixel
Image.MAX_IMAGE_PIXELS = None
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
_TURN = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

Entry = Record  # an object of a JSON list
AT_HAND = Path()  # the image of a sample whose picture is given beside it


@dataclass(frozen=True)
class Sample:
    """One image and one prompt. id: text, unique within a list, names the item's files; extra: what
    else the list says, 'image_id' as it stands there."""

    id: str
    image: Path
    question: str
    answer: str | None = None
    extra: Record = field(default_factory=dict, hash=False)


class HasImage(Protocol):
    """An item of a run that names its picture."""

    @property
    def image(self) -> Path:
        """Where its picture is."""


WithImage = TypeVar("WithImage", bound=HasImage)


# --- lists ----------------------------------------------------------------------------------------


def _read(path: str | Path) -> object:
    try:
        return json.loads(Path(path).read_bytes())
    except FileNotFoundError as error:
        raise UsageError(f"{path}: no such file") from error
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is not readable JSON ({error})") from error


def _entries(
    path: str | Path, entries: object, wanted: Sequence[str | tuple[str, ...]], name: str = "entry"
) -> list[Entry]:
    """The list of objects in a file, each checked for its fields; a tuple of fields: one of
    them."""
    if not isinstance(entries, list):
        raise UsageError(f"{path}: a list of objects was wanted, found {type(entries).__name__}")
    if not entries:
        raise UsageError(f"{path}: the list is empty")
    for n, entry in enumerate(entries):
        if not isinstance(entry, dict):
            kind = type(entry).__name__
            raise UsageError(f"{path}: {name} {n} is a {kind}, an object was wanted")
        for fields in wanted:
            alternatives = fields if isinstance(fields, tuple) else (fields,)
            if all(entry.get(field) in (None, "") for field in alternatives):
                raise UsageError(f"{path}: {name} {n} has no {' or '.join(alternatives)}")
    return entries


def _text_id(image_id: object) -> str:
    """000000006818 for 6818; what is not an integer stays as it is, as text."""
    return f"{image_id:012d}" if isinstance(image_id, int) else str(image_id)


def _without(entry: Entry, *names: str) -> Entry:
    return {name: value for name, value in entry.items() if name not in names}


def _first(samples: list[Sample], path: str | Path, max_images: int | None) -> list[Sample]:
    if max_images is not None and max_images < 1:
        raise UsageError(
            f"--max_images {max_images}: at least 1 is needed (all of {path} without it)"
        )
    return samples[:max_images]


def read_coco(
    image_dir: str | Path,
    ann_file: str | Path,
    max_images: int | None = None,
    question: str = "Describe the image.",
) -> list[Sample]:
    """One Sample per picture of a COCO captions or instances json, in file order, each picture
    once. id: the image id with 12 digits.

    extra: image_id, and width and height if given. max_images: only the first so many. UsageError:
    no such folder or file, not COCO, no picture there.
    """
    content = _read(ann_file)
    if not isinstance(content, dict) or "images" not in content:
        raise UsageError(
            f"{ann_file} is not a COCO annotation file: an object with a list 'images' was wanted"
        )
    entries = _entries(ann_file, content["images"], ["id", "file_name"], "image")
    folder = Path(image_dir)
    if not folder.is_dir():
        raise UsageError(f"{image_dir}: no such image folder")
    by_id: dict[str, Sample] = {}
    for entry in entries:
        id = _text_id(entry["id"])
        extra = {"image_id": entry["id"]}
        extra |= {name: entry[name] for name in ("width", "height") if name in entry}
        picture = folder / str(entry["file_name"])
        by_id.setdefault(id, Sample(id, picture, question, extra=extra))
    samples = _first(list(by_id.values()), ann_file, max_images)
    if not any(sample.image.exists() for sample in samples):
        raise UsageError(
            f"{image_dir} has none of the {len(samples)} pictures that {ann_file} lists, such as"
            f" {samples[0].image.name}"
        )
    return samples


def read_instances(path: str | Path) -> dict[int | str, list[Entry]]:
    """{image id: [annotation, ...]} of a COCO instances json in file order, each annotation with
    its category's name as 'category'.

    UsageError: not COCO instances, an annotation without category, area or segmentation.
    """
    content = _read(path)
    if not isinstance(content, dict) or not {"images", "annotations", "categories"} <= set(content):
        raise UsageError(
            f"{path} is not a COCO instances file: an object with the lists images, annotations and"
            " categories was wanted"
        )
    categories = _entries(path, content["categories"], ["id", "name"], "category")
    names = {category["id"]: category["name"] for category in categories}
    needed = ["image_id", "category_id", "area", "segmentation"]
    by_image: dict[int | str, list[Entry]] = {}
    for annotation in _entries(path, content["annotations"], needed, "annotation"):
        category_id = annotation["category_id"]
        if category_id not in names:
            raise UsageError(
                f"{path}: annotation {annotation.get('id')} is of category {category_id}, which the"
                " file does not name"
            )
        named = annotation | {"category": names[category_id]}
        by_image.setdefault(annotation["image_id"], []).append(named)
    return by_image


def read_curated(path: str | Path) -> dict[str, list[Entry]]:
    """{image id: [{"question", and if given "answer", "category"}, ...]} of a curated question file
    {"<image id>": [question or object, ...]}; images without a question are left out. UsageError:
    another form, no question at all."""
    content = _read(path)
    if not isinstance(content, dict) or not all(isinstance(v, list) for v in content.values()):
        raise UsageError(f"{path}: an object of lists of questions by image id was wanted")
    by_image: dict[str, list[Entry]] = {}
    for image_id, questions in content.items():
        for question in questions:
            entry = {"question": question} if isinstance(question, str) else question
            text = entry.get("question") if isinstance(entry, dict) else None
            if not isinstance(text, str) or not text.strip():
                raise UsageError(
                    f"{path}: image {image_id} has a question that is neither text nor an object"
                    " with 'question'"
                )
            by_image.setdefault(image_id, []).append(entry)
    if not by_image:
        raise UsageError(f"{path} has no question")
    return by_image


def read_questions(path: str | Path, image_dir: str | Path | None = None) -> list[Sample]:
    """Samples of a JSON list of {"image_id" or "image", "question", "answer"}. id: '<image
    id>-<n>', n counting the questions of an image from 0.

    image: a path, relative to image_dir (default: the list's folder); with image_id alone it is
    <image_dir>/<12 digits>.jpg, COCO's naming. extra: image_id and every other field. UsageError
    names the entry that lacks a field.
    """
    entries = _entries(path, _read(path), [("image_id", "image"), "question"])
    folder = Path(image_dir) if image_dir is not None else Path(path).parent
    samples: list[Sample] = []
    count = _Counter()
    for entry in entries:
        image_id = entry.get("image_id", Path(str(entry.get("image", ""))).stem)
        id = _text_id(image_id)
        image = folder / str(entry.get("image") or f"{id}.jpg")
        extra = {"image_id": image_id}
        extra |= _without(entry, "image_id", "image", "question", "answer")
        answer = _answer(entry, "answer")
        samples.append(
            Sample(f"{id}-{count.next(id)}", image, str(entry["question"]), answer, extra)
        )
    return samples


class _Counter:
    """How often an id occurred before."""

    def __init__(self) -> None:
        self._seen: dict[str, int] = {}

    def next(self, id: str) -> int:
        """0 for the first time, then 1, 2, ..."""
        self._seen[id] = self._seen.get(id, -1) + 1
        return self._seen[id]


def _answer(entry: Fields, *names: str) -> str | None:
    """The first of some fields that is there, as text."""
    return next((str(entry[name]) for name in names if entry.get(name) is not None), None)


def read_mmhal(path: str | Path, image_root: str | Path | None = None) -> list[Sample]:
    """Samples of an MMHal-style list: image_id, image_src (a path or URL), question, gold_answer or
    gt_answer. id: the image id, '-<n>' after it from the second question about an image on.

    Nothing is downloaded: the picture of a URL is looked for under its last component in image_root
    (default: the list's folder), a relative path there as well. extra: image_id, image_src and
    every other field.
    """
    entries = _entries(path, _read(path), ["image_id", "image_src", "question"])
    root = Path(image_root) if image_root is not None else Path(path).parent
    samples: list[Sample] = []
    count = _Counter()
    for entry in entries:
        id = _text_id(entry["image_id"])
        n = count.next(id)
        source = str(entry["image_src"])
        if source.startswith(("http://", "https://")):
            source = unquote(os.path.basename(urlsplit(source).path))
        extra = _without(entry, "question", "gold_answer", "gt_answer")
        answer = _answer(entry, "gold_answer", "gt_answer")
        question = str(entry["question"])
        samples.append(Sample(f"{id}-{n}" if n else id, root / source, question, answer, extra))
    return samples


# --- pictures -------------------------------------------------------------------------------------


def list_pictures(folder: str | Path) -> list[Path]:
    """The pictures of a folder, sorted by name, those in folders of it left out. UsageError: no
    such folder, no picture."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such image folder")
    shown = (file for file in folder.iterdir() if not file.name.startswith("."))
    files = sorted(file for file in shown if file.suffix.lower() in PICTURES)
    if not files:
        raise UsageError(f"{folder} has no picture ({' '.join(sorted(PICTURES))})")
    return files


def with_picture(item: WithImage) -> tuple[WithImage, Image.Image]:
    """(item, the picture at item.image), for engine.run_items."""
    return item, load_image(item.image)


def load_image(path: str | Path | IO[bytes]) -> Image.Image:
    """A picture as an upright PIL image in mode RGB, any size and shape up to PIXEL_LIMIT pixels;
    of several frames the first.

    16-bit grey is scaled by 1/257. Transparency is dropped and CMYK converted as PIL's
    convert("RGB") does, which is what the models' processors see. FileNotFoundError, or ValueError
    in one line for what is damaged, too large, or has no known range of values (float and 32-bit
    pictures).
    """
    try:
        with Image.open(path) as file:
            if file.width * file.height > PIXEL_LIMIT:
                raise ValueError(
                    f"{file.width} x {file.height} pixels, more than {PIXEL_LIMIT // 10**6} million"
                )
            file.load()
            turn = _TURN.get(_orientation(file))
            image = _rgb(file)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: no such picture") from error
    except _UNREADABLE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path}: not a readable picture ({reason})") from error
    if turn is not None:
        image = image.transpose(turn)
    image.info = {}  # no orientation stays behind for a processor to apply again
    return image


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except _UNREADABLE:
        return 1  # damaged EXIF, sound picture


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        levels = np.asarray(image)
        if image.mode == "F" or levels.min() < 0 or levels.max() > 65535:
            raise ValueError(
                "a float or 32-bit picture, whose range of values is unknown; convert it to 8 or 16"
                " bits"
            )
        image = Image.fromarray(((levels.astype(np.uint32) + 128) // 257).astype(np.uint8))
    elif image.mode in ("P", "PA", "LA", "La", "RGBa"):
        image = image.convert("RGBA")
    return image.convert("RGB")

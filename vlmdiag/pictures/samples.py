"""Readers of image and question lists, and of pictures: COCO json, question lists, MMHal-style json
-> Sample. Kept free of torch."""

import json
import os
import struct
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
from PIL import Image

from vlmdiag.cli import UsageError

PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
PIXEL_LIMIT = 300_000_000  # one picture of this size takes 1.2 GB while it is converted
Image.MAX_IMAGE_PIXELS = (
    None  # load_image has this limit of its own, instead of Pillow's warning at 89 Mpixel
)
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
)  # Pillow on damaged files
_TURN = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # EXIF orientation -> what brings the picture upright


@dataclass(frozen=True)
class Sample:
    """One image and one prompt. id: text, unique within a list, names the item's files; extra: what
    else the list says, 'image_id' as it stands there."""

    id: str
    image: Path
    question: str
    answer: str | None = None
    extra: dict = field(default_factory=dict, hash=False)


# ---- lists ----


def _read(path):
    try:
        return json.loads(Path(path).read_bytes())
    except FileNotFoundError as error:
        raise UsageError(f"{path}: no such file") from error
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is not readable JSON ({error})") from error


def _entries(path, entries, wanted, name="entry"):
    """The list of objects in a file, each checked for its fields: {field: type}, with alternatives
    as a tuple of fields."""
    if not isinstance(entries, list):
        raise UsageError(f"{path}: a list of objects was wanted, found {type(entries).__name__}")
    if not entries:
        raise UsageError(f"{path}: the list is empty")
    for n, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise UsageError(
                f"{path}: {name} {n} is a {type(entry).__name__}, an object was wanted"
            )
        for fields in wanted:
            fields = fields if isinstance(fields, tuple) else (fields,)
            if not any(entry.get(field) not in (None, "") for field in fields):
                raise UsageError(f"{path}: {name} {n} has no {' or '.join(fields)}")
    return entries


def _text_id(image_id):
    """000000006818 for 6818; what is not an integer stays as it is, as text."""
    return f"{image_id:012d}" if isinstance(image_id, int) else str(image_id)


def _rest(entry, *used):
    return {key: value for key, value in entry.items() if key not in used}


def _cut(samples, path, max_images):
    if max_images is not None and max_images < 1:
        raise UsageError(
            f"--max_images {max_images}: at least 1 is needed (all of {path} without it)"
        )
    return samples[:max_images]


def read_coco(image_dir, ann_file, max_images=None, question="Describe the image."):
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
    image_dir = Path(image_dir)
    if not image_dir.is_dir():
        raise UsageError(f"{image_dir}: no such image folder")
    samples = {}
    for entry in entries:
        id = _text_id(entry["id"])
        extra = {"image_id": entry["id"]} | {
            key: entry[key] for key in ("width", "height") if key in entry
        }
        samples.setdefault(
            id, Sample(id, image_dir / str(entry["file_name"]), question, extra=extra)
        )
    samples = _cut(list(samples.values()), ann_file, max_images)
    if not any(sample.image.exists() for sample in samples):
        raise UsageError(
            f"{image_dir} has none of the {len(samples)} pictures that {ann_file} lists, such as"
            f" {samples[0].image.name}"
        )
    return samples


def read_instances(path):
    """{image id: [annotation, ...]} of a COCO instances json in file order, each annotation with
    its category's name as 'category'.

    UsageError: not COCO instances, an annotation without category, area or segmentation."""
    content = _read(path)
    if not isinstance(content, dict) or not {"images", "annotations", "categories"} <= set(content):
        raise UsageError(
            f"{path} is not a COCO instances file: an object with the lists images, annotations and"
            " categories was wanted"
        )
    names = {
        entry["id"]: entry["name"]
        for entry in _entries(path, content["categories"], ["id", "name"], "category")
    }
    found = {}
    for entry in _entries(
        path,
        content["annotations"],
        ["image_id", "category_id", "area", "segmentation"],
        "annotation",
    ):
        if entry["category_id"] not in names:
            raise UsageError(
                f"{path}: annotation {entry.get('id')} is of category {entry['category_id']}, which"
                " the file does not name"
            )
        found.setdefault(entry["image_id"], []).append(
            entry | {"category": names[entry["category_id"]]}
        )
    return found


def read_curated(path):
    """{image id: [{"question", and if given "answer", "category"}, ...]} of a curated question file
    {"<image id>": [question or object, ...]}; images without a question are left out. UsageError:
    another form, no question at all."""
    content = _read(path)
    if not isinstance(content, dict) or not all(
        isinstance(some, list) for some in content.values()
    ):
        raise UsageError(f"{path}: an object of lists of questions by image id was wanted")
    found = {}
    for image_id, some in content.items():
        for entry in some:
            entry = {"question": entry} if isinstance(entry, str) else entry
            if (
                not isinstance(entry, dict)
                or not isinstance(entry.get("question"), str)
                or not entry["question"].strip()
            ):
                raise UsageError(
                    f"{path}: image {image_id} has a question that is neither text nor an object"
                    " with 'question'"
                )
            found.setdefault(image_id, []).append(entry)
    if not found:
        raise UsageError(f"{path} has no question")
    return found


def read_questions(path, image_dir=None):
    """Samples of a JSON list of {"image_id" or "image", "question", "answer"}. id: '<image
    id>-<n>', n counting the questions of an image from 0.

    image: a path, relative to image_dir (default: the list's folder); with image_id alone it is
    <image_dir>/<12 digits>.jpg, COCO's naming. extra: image_id and every other field. UsageError
    names the entry that lacks a field."""
    entries = _entries(path, _read(path), [("image_id", "image"), "question"])
    folder = Path(image_dir) if image_dir is not None else Path(path).parent
    samples, asked = [], {}
    for entry in entries:
        image_id = entry.get("image_id", Path(str(entry.get("image", ""))).stem)
        id = _text_id(image_id)
        n = asked[id] = asked.get(id, -1) + 1
        image = folder / str(entry.get("image") or f"{id}.jpg")
        extra = {"image_id": image_id} | _rest(entry, "image_id", "image", "question", "answer")
        samples.append(
            Sample(f"{id}-{n}", image, str(entry["question"]), _answer(entry, "answer"), extra)
        )
    return samples


def _answer(entry, *names):
    return next((str(entry[name]) for name in names if entry.get(name) is not None), None)


def read_mmhal(path, image_root=None):
    """Samples of an MMHal-style list: image_id, image_src (a path or URL), question, gold_answer or
    gt_answer. id: the image id, '-<n>' after it from the second question about an image on.

    Nothing is downloaded: the picture of a URL is looked for under its last component in image_root
    (default: the list's folder), a relative path there as well. extra: image_id, image_src and
    every other field."""
    entries = _entries(path, _read(path), ["image_id", "image_src", "question"])
    root = Path(image_root) if image_root is not None else Path(path).parent
    samples, asked = [], {}
    for entry in entries:
        id = _text_id(entry["image_id"])
        n = asked[id] = asked.get(id, -1) + 1
        source = str(entry["image_src"])
        url = source.startswith(("http://", "https://"))
        image = root / (unquote(os.path.basename(urlsplit(source).path)) if url else source)
        extra = _rest(entry, "question", "gold_answer", "gt_answer")
        samples.append(
            Sample(
                f"{id}-{n}" if n else id,
                image,
                str(entry["question"]),
                _answer(entry, "gold_answer", "gt_answer"),
                extra,
            )
        )
    return samples


# ---- pictures ----


def list_pictures(folder):
    """The pictures of a folder, sorted by name, those in folders of it left out. UsageError: no
    such folder, no picture."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such image folder")
    files = sorted(
        file
        for file in folder.iterdir()
        if file.suffix.lower() in PICTURES and not file.name.startswith(".")
    )
    if not files:
        raise UsageError(f"{folder} has no picture ({' '.join(sorted(PICTURES))})")
    return files


def with_picture(item):
    """(item, the picture at item.image), for engine.run_items."""
    return item, load_image(item.image)


def load_image(path):
    """A picture as an upright PIL image in mode RGB, any size and shape up to PIXEL_LIMIT pixels;
    of several frames the first.

    16-bit grey is scaled by 1/257. Transparency is dropped and CMYK converted as PIL's
    convert("RGB") does, which is what the models' processors see. FileNotFoundError, or ValueError
    in one line for what is damaged, too large, or has no known range of values (float and 32-bit
    pictures).
    """
    try:
        with Image.open(path) as image:
            if image.width * image.height > PIXEL_LIMIT:
                raise ValueError(
                    f"{image.width} x {image.height} pixels, more than {PIXEL_LIMIT // 10**6}"
                    " million"
                )
            image.load()
            turn = _TURN.get(_orientation(image))
            image = _rgb(image)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: no such picture") from error
    except _UNREADABLE as error:
        raise ValueError(
            f"{path}: not a readable picture"
            f" ({' '.join(str(error).split()) or type(error).__name__})"
        ) from error
    if turn is not None:
        image = image.transpose(turn)
    image.info = {}  # no orientation stays behind for a processor to apply again
    return image


def _orientation(image):
    try:
        return image.getexif().get(0x0112, 1)
    except _UNREADABLE:
        return 1  # damaged EXIF, sound picture


def _rgb(image):
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise ValueError(
                "a float or 32-bit picture, whose range of values is unknown; convert it to 8 or 16"
                " bits"
            )
        image = Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))
    elif image.mode in ("P", "PA", "LA", "La", "RGBa"):
        image = image.convert("RGBA")
    return image.convert("RGB")

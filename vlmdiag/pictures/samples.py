"""Readers of image and question lists, and of pictures: COCO json, question lists, MMHal-style json
-> Sample. Kept free of torch."""

from __future__ import annotations

import codecs
import contextlib
import io
import json
import math
import os
import re
import struct
import threading
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Protocol, TypeGuard, TypeVar
from urllib.parse import unquote, urlsplit

import numpy as np
from PIL import Image

from vlmdiag.cli import UsageError
from vlmdiag.pictures.categories import spoken_names
from vlmdiag.types import Fields, Record

PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
# What a picture may be, so that the memory it takes is known before it is decoded. Processors
# scale the shorter side to the model's, where a long strip would become huge.
PIXEL_LIMIT = 100_000_000  # up to 1.2 GB while it is converted
RATIO_LIMIT = 100  # of the longer side to the shorter
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


def read_json(path: str | Path) -> object:
    """The content of a JSON file. UsageError where it cannot be read."""
    return _parsed(path, _bytes(path))


def _bytes(path: str | Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except FileNotFoundError as error:
        raise UsageError(f"{path}: no such file") from error
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror or error})") from error


def _parsed(path: str | Path, content: bytes) -> object:
    try:
        return json.loads(content)
    except ValueError as error:
        raise UsageError(f"{path} is not readable JSON ({error})") from error
    except RecursionError as error:
        raise UsageError(f"{path} is not readable JSON (nested too deeply)") from error


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


def image_key(image_id: object) -> str:
    """What an image id says, however it is written: '6818' for 6818, 6818.0, '000000006818' and
    COCO's own 'COCO_val2014_000000006818'."""
    if isinstance(image_id, float) and image_id.is_integer():
        image_id = int(image_id)
    text = re.sub(r"^COCO_[a-z]+\d{4}_(?=\d{12}$)", "", str(image_id).strip())
    return (text.lstrip("0") or "0") if text.isdecimal() else text


def _checked_id(path: str | Path, what: str, id: object) -> int | str:
    if isinstance(id, float) and id.is_integer():  # as pandas writes them
        return int(id)
    if isinstance(id, (int, str)):
        return id
    raise UsageError(f"{path}: {what} {id!r:.60} is a {type(id).__name__}, an id was wanted")


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
    content = read_json(ann_file)
    if not isinstance(content, dict) or "images" not in content:
        raise UsageError(
            f"{ann_file} is not a COCO annotation file: an object with a list 'images' was wanted"
        )
    entries = _entries(ann_file, content["images"], ["id", ("file_name", "coco_url")], "image")
    folder = Path(image_dir)
    if not folder.is_dir():
        raise UsageError(f"{image_dir}: no such image folder")
    by_id: dict[str, Sample] = {}
    for entry in entries:
        image_id = _checked_id(ann_file, "the id of an image,", entry["id"])
        id = _text_id(image_id)
        extra: Record = {"image_id": image_id}
        extra |= {name: entry[name] for name in ("width", "height") if name in entry}
        # LVIS names the address at which COCO has the picture
        name = str(entry.get("file_name") or str(entry["coco_url"]).rsplit("/", 1)[-1])
        sample = by_id.setdefault(id, Sample(id, folder / name, question, extra=extra))
        if sample.image != folder / name:
            raise UsageError(
                f"{ann_file}: the id {entry['id']} is that of two pictures,"
                f" {sample.image.name} and {Path(name).name}; data sets that are joined need ids of"
                " their own"
            )
    samples = _first(list(by_id.values()), ann_file, max_images)
    if not any(os.path.exists(sample.image) for sample in samples):
        raise UsageError(
            f"{image_dir} has none of the {len(samples)} pictures that {ann_file} lists, such as"
            f" {samples[0].image.name:.80}"
        )
    return samples


def read_categories(path: str | Path) -> list[str]:
    """The names of a COCO instances json's categories in words, sorted, each once. UsageError as
    read_instances."""
    return sorted({names[0] for names in _categories(path, _instances(path)).values()})


def read_instances(path: str | Path) -> dict[int | str, list[Entry]]:
    """{image id: [annotation, ...]} of a COCO instances json in file order, image ids as the list
    of images has them.

    Each annotation gets 'category', its category's name in words; 'also_called', a tuple of other
    names of it; and 'listed_size', what the file says of its picture's [width, height], None where
    it says nothing. Ids of text and numbers are matched, which is said in one line. UsageError: not
    COCO instances, an annotation without category, area or segmentation, annotations of none of the
    pictures, two categories with one id.
    """
    content = _instances(path)
    categories = _categories(path, content)
    pictures = _Pictures(path, content["images"])
    needed = ["image_id", "category_id", "area", "segmentation"]
    by_image: dict[int | str, list[Entry]] = {}
    for annotation in _entries(path, content["annotations"], needed, "annotation"):
        id = annotation.get("id")
        image_id = _checked_id(path, f"the image_id of annotation {id},", annotation["image_id"])
        category_id = _checked_id(
            path, f"the category_id of annotation {id},", annotation["category_id"]
        )
        if category_id not in categories:
            raise UsageError(
                f"{path}: annotation {id} is of category {category_id}, which the file does not"
                " name"
            )
        area = annotation["area"]
        if not isinstance(area, (int, float)) or not math.isfinite(area):
            raise UsageError(f"{path}: annotation {id} has the area {area!r:.60}, not a number")
        own = pictures.find(image_id)
        category, *others = categories[category_id]
        named = annotation | {"category": category, "also_called": tuple(others)}
        named["listed_size"] = pictures.sizes.get(own)
        by_image.setdefault(own, []).append(named)
    pictures.report(by_image)
    return by_image


def _instances(path: str | Path) -> Record:
    content = read_json(path)
    if not isinstance(content, dict) or not {"images", "annotations", "categories"} <= set(content):
        raise UsageError(
            f"{path} is not a COCO instances file: an object with the lists images, annotations and"
            " categories was wanted"
        )
    return content


def _categories(path: str | Path, content: Fields) -> dict[int | str, tuple[str, ...]]:
    """{category id: its names in words, the first one to be asked for}."""
    names: dict[int | str, tuple[str, ...]] = {}
    for category in _entries(path, content["categories"], ["id", "name"], "category"):
        id = _checked_id(path, "the id of a category,", category["id"])
        synonyms = category.get("synonyms")  # LVIS
        given = [category["name"], *(synonyms if isinstance(synonyms, list) else [])]
        said = tuple(dict.fromkeys(said for name in given for said in spoken_names(str(name))))
        if names.setdefault(id, said)[0] != said[0]:
            raise UsageError(
                f"{path}: the id {id} is that of two categories, {names[id][0]} and {said[0]}; data"
                " sets that are joined need ids of their own"
            )
    return names


class _Pictures:
    """The ids and sizes of an instances file's images, by which its annotations find theirs."""

    def __init__(self, path: str | Path, entries: object) -> None:
        self.path = path
        self.sizes: dict[int | str, tuple[object, object] | None] = {}
        self._by_key: dict[str, list[int | str]] = {}
        self._matched: list[int | str] = []  # ids of annotations in other writing
        for entry in entries if isinstance(entries, list) else []:
            if not isinstance(entry, dict) or "id" not in entry:
                continue
            id = _checked_id(path, "the id of an image,", entry["id"])
            size = (entry.get("width"), entry.get("height"))
            if id not in self.sizes:
                self._by_key.setdefault(image_key(id), []).append(id)
            self.sizes[id] = None if size == (None, None) else size

    def find(self, image_id: int | str) -> int | str:
        """The id as the images have it: the same, or the only one that says the same."""
        alike = self._by_key.get(image_key(image_id), [])
        if image_id in self.sizes or len(alike) != 1:
            return image_id
        self._matched.append(image_id)
        return alike[0]

    def report(self, found: Mapping[int | str, object]) -> None:
        """Say which ids were matched. UsageError where no annotation is of a picture."""
        if self.sizes and found and not set(found) & set(self.sizes):
            raise UsageError(
                f"{self.path}: no annotation is of one of the images, whose ids are such as"
                f" {next(iter(self.sizes))!r}; annotations have {next(iter(found))!r}"
            )
        if self._matched:
            one = self._matched[0]
            print(
                f"{self.path}: {len(self._matched)} annotations have ids in another writing than"
                f" the images, such as {one!r} for {self.find(one)!r}; they were matched"
            )


# the fields of a question list, by whoever writes it: ours, POPE's, MMHal-Bench's, VQA's
_IMAGE = ("image", "image_src", "file_name")
_QUESTION = ("question", "text")
_ANSWER = ("answer", "label", "gold_answer", "gt_answer", "answers")


def read_curated(path: str | Path) -> dict[str, list[Entry]]:
    """{image id: [{"question", and if given "answer", "category"}, ...]} of a curated question file
    {"<image id>": [question or object, ...]} or of a question list, see read_questions(); images
    without a question are left out. UsageError: another form, no question at all."""
    content = read_list(path)
    by_image: dict[str, list[Entry]] = {}
    if isinstance(content, list):
        for sample in read_questions(path):
            entry = sample.extra | {"question": sample.question, "answer": sample.answer}
            by_image.setdefault(str(sample.extra["image_id"]), []).append(entry)
        return by_image
    if not isinstance(content, dict) or not all(isinstance(v, list) for v in content.values()):
        raise UsageError(f"{path}: an object of lists of questions by image id was wanted")
    for image_id, questions in content.items():
        for question in questions:
            entry = {"question": question} if isinstance(question, str) else question
            text = entry.get("question") if isinstance(entry, dict) else None
            if not isinstance(text, str) or not text.strip():
                raise UsageError(
                    f"{path}: image {image_id} has a question that is neither text nor an object"
                    " with 'question'"
                )
            answer = _answer(path, f"a question about image {image_id}", entry)
            by_image.setdefault(image_id, []).append(entry | {"answer": answer})
    if not by_image:
        raise UsageError(f"{path} has no question")
    return by_image


def read_questions(path: str | Path, image_dir: str | Path | None = None) -> list[Sample]:
    """Samples of a question list: JSON or JSON lines of {"image" or "image_id", "question",
    "answer"}. id: '<image id>-<n>', n counting the questions of an image from 0.

    Other names of these fields: image_src, file_name; text; label, gold_answer, gt_answer, answers.
    image: a path, relative to image_dir (default: the list's folder), of a URL its last part; with
    image_id alone it is <image_dir>/<12 digits>.jpg, COCO's naming. An answer true or false is Yes
    or No, and of a list of answers the one given most often counts; all are in extra's 'answers'.
    extra: image_id and every other field. UsageError names the entry that lacks a field.
    """
    folder = Path(image_dir) if image_dir is not None else Path(path).parent
    samples: list[Sample] = []
    count = _Counter()
    for n, entry in enumerate(_asked(path)):
        name = _picture_name(path, n, entry)
        image_id = entry.get("image_id")
        if image_id is None:
            image_id = Path(name or "").stem
        image_id = _checked_id(path, f"the image_id of entry {n},", image_id)
        id = _text_id(image_id)
        extra: Record = {"image_id": image_id}
        extra |= _without(entry, "image_id", *_IMAGE, *_QUESTION, *_ANSWER)
        if isinstance(answers := _first_of(entry, _ANSWER), list):
            extra["answers"] = answers
        sample = Sample(
            f"{id}-{count.next(id)}",
            folder / (name or f"{id}.jpg"),
            str(_first_of(entry, _QUESTION)),
            _answer(path, f"entry {n}", entry),
            extra,
        )
        samples.append(sample)
    return samples


def read_mmhal(path: str | Path, image_root: str | Path | None = None) -> list[Sample]:
    """Samples of an MMHal-style list: image_id, image_src (a path or URL), question, gold_answer or
    gt_answer, or these fields' other names in a question list. id: the image id, '-<n>' after it
    from the second question about an image on.

    Nothing is downloaded: the picture of a URL is looked for under its last component in image_root
    (default: the list's folder), a relative path there as well. extra: image_id, image_src and
    every other field.
    """
    root = Path(image_root) if image_root is not None else Path(path).parent
    samples: list[Sample] = []
    count = _Counter()
    for entry, asked in zip(_asked(path), read_questions(path, root), strict=True):
        id = asked.id.rpartition("-")[0]
        n = count.next(id)
        source = _first_of(entry, _IMAGE)
        if isinstance(source, list) or source is None:
            source = asked.image.name
        extra = _without(entry, *_QUESTION, *_ANSWER, *_IMAGE) | asked.extra
        extra["image_src"] = source
        samples.append(replace(asked, id=f"{id}-{n}" if n else id, extra=extra))
    return samples


def read_list(path: str | Path) -> object:
    """What a JSON file holds, of JSON lines the list of their objects. UsageError where it cannot
    be read."""
    content = _bytes(path)
    lines = [line for line in content.removeprefix(codecs.BOM_UTF8).split(b"\n") if line.strip()]
    if len(lines) > 1 and all(line.lstrip()[:1] == b"{" for line in lines):
        return [_parsed(f"{path}, line {n},", line) for n, line in enumerate(lines, 1)]
    return _parsed(path, content)


def _asked(path: str | Path) -> list[Entry]:
    """The entries of a question list, each with a picture and a question."""
    content = read_list(path)
    if isinstance(content, dict) and any(name in content for name in _QUESTION):
        content = [content]  # JSON lines of one line
    form = None
    if isinstance(content, dict) and isinstance(content.get("questions"), list):
        form = "VQA's"
    elif isinstance(content, list) and content and isinstance(content[0], dict):
        form = "LLaVA's" if "conversations" in content[0] else None
    if form:
        raise UsageError(
            f"{path} is in {form} form; python data/convert_questions.py makes a question list of"
            " it"
        )
    return _entries(path, content, [("image_id", *_IMAGE), _QUESTION])


def _first_of(entry: Fields, names: Sequence[str]) -> object:
    """The first of some fields that says something."""
    return next((entry[name] for name in names if entry.get(name) not in (None, "")), None)


def _picture_name(path: str | Path, n: int, entry: Fields) -> str | None:
    """The path of an entry's picture as it stands there, None where it has an image_id only."""
    name = _first_of(entry, _IMAGE)
    if isinstance(name, list) and len(name) == 1:
        name = name[0]
    if isinstance(name, list):
        raise UsageError(f"{path}: entry {n} has {len(name)} pictures, a question is about one")
    if name is not None and not isinstance(name, str):
        raise UsageError(f"{path}: the image of entry {n} is a {type(name).__name__}, not a path")
    if name and name.startswith(("http://", "https://")):
        try:
            name = os.path.basename(urlsplit(name).path)
        except ValueError:  # no address at all
            name = name.rsplit("/", 1)[-1]
        return unquote(name)
    return name


class _Counter:
    """How often an id occurred before."""

    def __init__(self) -> None:
        self._seen: dict[str, int] = {}

    def next(self, id: str) -> int:
        """0 for the first time, then 1, 2, ..."""
        self._seen[id] = self._seen.get(id, -1) + 1
        return self._seen[id]


def _answer(path: str | Path, what: str, entry: Fields) -> str | None:
    """The answer of an entry as text, None where it has none."""
    value = next((entry[name] for name in _ANSWER if entry.get(name) is not None), None)
    try:
        return _as_text(value)
    except TypeError as error:
        raise UsageError(f"{path}: the answer of {what} is {error}, not an answer") from error


def _as_text(answer: object) -> str | None:
    """An answer of a list as text: Yes for true, 3 for 3.0, the most frequent of several (the first
    of these), None for nothing. TypeError where it is none."""
    if answer is None or isinstance(answer, str):
        return answer
    if isinstance(answer, bool):
        return "Yes" if answer else "No"
    if isinstance(answer, (int, float)):
        whole = isinstance(answer, float) and answer.is_integer()
        return None if math.isnan(answer) else str(int(answer) if whole else answer)
    if isinstance(answer, list):
        texts = [_as_text(one["answer"] if _is_vote(one) else one) for one in answer]
        counts = Counter(text for text in texts if text is not None)
        return counts.most_common(1)[0][0] if counts else None
    raise TypeError(f"a {type(answer).__name__}")


def _is_vote(answer: object) -> TypeGuard[Fields]:
    """One of VQA's ten: {"answer", "answer_confidence", "answer_id"}."""
    return isinstance(answer, dict) and "answer" in answer


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
    """A picture as an upright PIL image in mode RGB, of several frames the first; a large one
    resized to KEPT_PIXELS and KEPT_SIDE at most, its shape kept.

    16-bit grey is scaled by 1/257. Transparency is dropped and CMYK converted as PIL's
    convert("RGB") does, which is what the models' processors see. turn_of() tells how the stored
    picture was turned. FileNotFoundError, or ValueError in one line for what is damaged, has more
    than PIXEL_LIMIT pixels or a longer side of more than RATIO_LIMIT times the shorter one, or no
    known range of values (float and 32-bit pictures).
    """
    with _opened(path) as file:
        kept = _kept_size(file.size)
        is_large = kept != file.size
        with _LARGE if is_large else contextlib.nullcontext():
            file.load()
            turn = _orientation(file)
            # without the copy that a conversion of RGB to RGB is
            image: Image.Image = file if is_large and file.mode == "RGB" else _rgb(file)
            if is_large:
                image = image.resize(kept, Image.Resampling.BICUBIC)
            file.close()  # its pixels at once, not when the garbage is collected
    # no orientation stays behind for a processor to apply again
    image.info = {}
    if turn in TURN:
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
        return ((width, height) if turn < 5 else (height, width)), turn


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
        with Image.open(path) as file:
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
    levels = np.empty((image.height, image.width), np.uint8)
    rows = max(1, 2**22 // image.width)
    for top in range(0, image.height, rows):
        strip = np.asarray(image.crop((0, top, image.width, min(top + rows, image.height))))
        if image.mode == "F" or strip.min() < 0 or strip.max() > 65535:
            raise ValueError(
                "a float or 32-bit picture, whose range of values is unknown; convert it to 8 or 16"
                " bits"
            )
        levels[top : top + rows] = (strip.astype(np.uint32) + 128) // 257
    return levels

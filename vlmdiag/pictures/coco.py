"""COCO's annotation files, and those of others in its form: LVIS, exports of VOC and of tools."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path

from vlmdiag.cli import UsageError
from vlmdiag.pictures.categories import spoken_names
from vlmdiag.pictures.entries import Entry, checked_id, entries_of, image_key, read_json, text_id
from vlmdiag.pictures.samples import Sample
from vlmdiag.types import Fields, Record


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
    entries = entries_of(ann_file, content["images"], ["id", ("file_name", "coco_url")], "image")
    folder = Path(image_dir)
    if not folder.is_dir():
        raise UsageError(f"{image_dir}: no such image folder")
    by_id: dict[str, Sample] = {}
    for entry in entries:
        image_id = checked_id(ann_file, "the id of an image,", entry["id"])
        id = text_id(image_id)
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
    for annotation in entries_of(path, content["annotations"], needed, "annotation"):
        id = annotation.get("id")
        image_id = checked_id(path, f"the image_id of annotation {id},", annotation["image_id"])
        category_id = checked_id(
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
    for category in entries_of(path, content["categories"], ["id", "name"], "category"):
        id = checked_id(path, "the id of a category,", category["id"])
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
            id = checked_id(path, "the id of an image,", entry["id"])
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

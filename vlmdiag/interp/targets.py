"""The pictures and objects of an intervention: flags, COCO files, and what all runs on objects keep
of their settings. Kept free of torch.

docs/studies/llava_interp.md, sections 2.4 and 2.5.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vlmdiag import CHECKOUT, cli
from vlmdiag.cli import UsageError
from vlmdiag.interp.objects import find_target, object_mask, object_tokens
from vlmdiag.pictures.categories import spoken_names
from vlmdiag.pictures.coco import read_coco, read_instances
from vlmdiag.pictures.entries import image_key
from vlmdiag.pictures.questions import read_curated
from vlmdiag.pictures.samples import Sample, load_image, turn_of
from vlmdiag.runs import rundirs
from vlmdiag.types import Record

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Bool, Int
    from PIL.Image import Image

    from vlmdiag.batch import Batch
    from vlmdiag.types import VLM

DEFAULT_MODEL = "llava-hf/llava-1.5-7b-hf"
CHECKPOINTS = CHECKOUT / "checkpoints"
BLOCK = 32  # pictures whose vision tokens are summed together, see save_post_adapter_acts.py
# flags that the numbers of every run on objects depend on
COMMON = (
    "datatype",
    "min_area",
    "max_area",
    "max_annotations",
    "threshold",
    "seed",
    "paper_compat",
    "image_aspect",
)
# flags that may differ when a run goes on
FREE = ("coco_root", "max_images", "per_pass")


@dataclass(frozen=True)
class Item:
    """A picture with the object that is taken out of it. answer: what the model should say of
    it."""

    sample: Sample
    annotation: Record
    category: str
    answer: str

    @property
    def id(self) -> str:
        """The sample's."""
        return self.sample.id

    @property
    def also_called(self) -> Sequence[str]:
        """Other names that the annotation file has for the category."""
        return tuple(self.annotation.get("also_called", ()))

    @property
    def image(self) -> Path:
        """Where the picture is."""
        return self.sample.image


LoadedItem = tuple[Item, "Image", "Bool[np.ndarray, 'height width']"]


def model_of(name: str) -> str:
    """A folder of checkpoints/ by its name, llava-hf/<name> for the published short names such as
    llava-1.5-7b-hf, else what was given."""
    if "/" in name:
        return name
    if (CHECKPOINTS / name).is_dir():
        return str(CHECKPOINTS / name)
    if name.endswith("-hf") and not Path(name).exists():
        return f"llava-hf/{name}"
    return name


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of every script that works on objects in COCO pictures."""
    parser.add_argument(
        "--model_path", "--model_name", default=DEFAULT_MODEL, help="folder or hub id"
    )
    parser.add_argument(
        "--coco_root",
        "--data_dir",
        default="data/COCO",
        help="folder with <datatype>/ and annotations/instances_<datatype>.json",
    )
    parser.add_argument("--datatype", default="val2017", help="part of COCO")
    parser.add_argument(
        "--results_file",
        default=None,
        help="also write the results as one JSON file of the published form",
    )
    parser.add_argument(
        "--min_area",
        type=cli.number(0, 10**12),
        default=1000,
        help="object filter: area in pixels of the original picture, more than",
    )
    parser.add_argument(
        "--max_area", type=cli.number(0, 10**12), default=2000, help="object filter: and less than"
    )
    parser.add_argument(
        "--max_annotations",
        type=cli.positive,
        default=3,
        help="object filter: annotations of a picture, at most",
    )
    parser.add_argument(
        "--threshold",
        type=cli.share,
        default=0.0,
        help="a token stands for the object if more than this share of its box is covered; 0: any"
        " overlap",
    )
    parser.add_argument(
        "--max_images", type=cli.positive, default=None, help="only the first so many items"
    )
    parser.add_argument(
        "--per_pass", type=cli.positive, default=8, help="conditions of a picture that run together"
    )
    parser.add_argument("--seed", type=cli.seed, default=0, help="of random tokens and noise")
    parser.add_argument(
        "--paper_compat",
        action="store_true",
        help="the published criteria and definitions, see README",
    )
    cli.add_run_arguments(parser, "picture")


def add_questions_argument(parser: argparse.ArgumentParser) -> None:
    """--question_file of the scripts that ask curated questions."""
    parser.add_argument(
        "--question_file",
        "--clean_questions_file",
        required=True,
        help='JSON: {"<image id>": [question or {"question", "answer", "category"}, ...]}',
    )


def instances_file(args: argparse.Namespace) -> Path:
    """COCO's instances of the chosen part."""
    return Path(args.coco_root) / "annotations" / f"instances_{args.datatype}.json"


def _filtered(args: argparse.Namespace, annotations: Sequence[Record]) -> Record | None:
    return find_target(annotations, args.min_area, args.max_area, args.max_annotations)


def read_targets(args: argparse.Namespace, question: str = "Describe this image.") -> list[Item]:
    """Items of the annotation file that pass the object filter, in file order. UsageError where
    none does."""
    folder = Path(args.coco_root) / args.datatype
    listed = read_coco(folder, instances_file(args), question=question)
    annotations = read_instances(instances_file(args))
    items = []
    for sample in listed:
        target = _filtered(args, annotations.get(sample.extra["image_id"], []))
        if target is not None:
            items.append(Item(sample, target, target["category"], target["category"]))
    if not items:
        raise UsageError(
            f"none of the {len(listed)} pictures of {instances_file(args)} passes the object filter"
            f" (--min_area {args.min_area:g} --max_area {args.max_area:g} --max_annotations"
            f" {args.max_annotations})"
        )
    return items[: args.max_images]


def read_curated_targets(args: argparse.Namespace) -> list[Item]:
    """Items of --question_file: one per question; the object is the one its category names,
    else the one of the object filter. UsageError where no question has an object."""
    asked = read_curated(args.question_file)
    items = list(_curated(args, asked))
    if not items:
        raise UsageError(
            f"{args.question_file}: none of its {len(asked)} pictures with a question has an"
            f" object in {instances_file(args)}; the published list is for train2017: --datatype"
            " train2017"
        )
    return items[: args.max_images]


def _curated(args: argparse.Namespace, asked: dict[str, list[Record]]) -> Iterator[Item]:
    listed = read_coco(Path(args.coco_root) / args.datatype, instances_file(args))
    by_key = {image_key(sample.extra["image_id"]): sample for sample in listed}
    annotations = read_instances(instances_file(args))
    asked_before: Counter[str] = Counter()  # the list may write one id in several ways
    for image_id, questions in asked.items():
        sample = by_key.get(image_key(image_id))
        if sample is None:
            continue
        of_image = annotations.get(sample.extra["image_id"], [])
        for entry in questions:
            n = asked_before[sample.id]
            asked_before[sample.id] += 1
            if entry.get("category"):
                target = _only_one_of(of_image, entry["category"])
            else:
                target = _filtered(args, of_image)
            if target is not None:
                question = Sample(
                    f"{sample.id}-{n}", sample.image, entry["question"], extra=sample.extra
                )
                answer = entry.get("answer") or target["category"]
                yield Item(question, target, target["category"], answer)


def _only_one_of(annotations: Sequence[Record], category: str) -> Record | None:
    """The annotation of a category that occurs once, crowds not counted."""
    said = spoken_names(str(category))[0]
    named = [
        annotation
        for annotation in annotations
        if annotation["category"] == said and not annotation.get("iscrowd")
    ]
    return named[0] if len(named) == 1 else None


def load(item: Item) -> LoadedItem:
    """What process() needs of an item: the item, its picture, the object's pixels."""
    image = load_image(item.image)
    return item, image, object_mask(item.annotation, image.size, turn_of(image))


def tokens_of(
    vlm: VLM, batch: Batch, mask: Bool[np.ndarray, "height width"], threshold: float
) -> Int[np.ndarray, " n"]:
    """Indices of the object's vision tokens. ValueError where the model sees nothing of it."""
    grid = batch.grids[0]
    if grid is None:
        raise UsageError(
            f"{vlm.path}: where the vision tokens of {vlm.family.name} lie in the picture (grid) is"
            " unknown, so an object's tokens are too"
        )
    tokens = object_tokens(grid, mask, threshold)
    if not len(tokens):
        raise ValueError(
            "the object lies outside what the model sees, or covers no token by more than"
            " --threshold"
        )
    return tokens


def settings_of(args: argparse.Namespace, names: Sequence[str] = ()) -> Record:
    """What the numbers of a run on objects depend on; names: further flags."""
    settings = {name: getattr(args, name) for name in (*names, *COMMON)}
    return {"data": Path(args.coco_root).name} | settings


def free_of(args: argparse.Namespace) -> Record:
    """What may differ when such a run goes on."""
    return {name: getattr(args, name) for name in FREE}


def load_vlm(args: argparse.Namespace, load: Callable[[argparse.Namespace], VLM]) -> VLM:
    """The model that load(args) gives. UsageError where it lacks what interventions on objects
    need."""
    vlm = load(args)
    vlm.need("decoder-only", "grid")
    return vlm


def record_of(item: Item) -> Record:
    """How a record begins."""
    return {
        "image_id": item.sample.extra["image_id"],
        "file_name": item.image.name,
        "category": item.category,
        "annotation": item.annotation.get("id"),
    }


def write_results(path: str | Path, content: object) -> None:
    """--results_file, in one step."""
    rundirs.write_json(path, content)
    print(f"wrote {path}")

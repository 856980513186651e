"""The pictures and objects of an intervention: flags, COCO files, run directories that the scripts
of this folder share."""

from dataclasses import dataclass
from pathlib import Path

from vlmdiag import CHECKOUT, cli
from vlmdiag.cli import UsageError
from vlmdiag.interp.objects import find_target, object_mask, object_tokens
from vlmdiag.model.loading import identity_of
from vlmdiag.model.prompts import prompt_for
from vlmdiag.pictures import samples
from vlmdiag.pictures.samples import Sample, load_image
from vlmdiag.runs import rundirs

DEFAULT_MODEL = "llava-hf/llava-1.5-7b-hf"
CHECKPOINTS = CHECKOUT / "checkpoints"
BLOCK = 32  # pictures whose vision tokens are summed together, see save_post_adapter_acts.py


@dataclass(frozen=True)
class Item:
    """A picture with the object that is taken out of it. answer: what the model should say of
    it."""

    sample: Sample
    annotation: dict
    category: str
    answer: str

    @property
    def id(self):
        return self.sample.id

    @property
    def image(self):
        return self.sample.image


def model_of(name):
    """A folder of checkpoints/ by its name, llava-hf/<name> for the published short names such as
    llava-1.5-7b-hf, else what was given."""
    if "/" not in name and (CHECKPOINTS / name).is_dir():
        return str(CHECKPOINTS / name)
    return (
        f"llava-hf/{name}"
        if "/" not in name and name.endswith("-hf") and not Path(name).exists()
        else name
    )


def add_arguments(parser):
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
        type=float,
        default=1000,
        help="object filter: area in pixels of the original picture, more than",
    )
    parser.add_argument("--max_area", type=float, default=2000, help="object filter: and less than")
    parser.add_argument(
        "--max_annotations",
        type=int,
        default=3,
        help="object filter: annotations of a picture, at most",
    )
    parser.add_argument(
        "--threshold",
        type=float,
        default=0.0,
        help=(
            "a token stands for the object if more than this share of its box is covered; 0: any"
            " overlap"
        ),
    )
    parser.add_argument("--max_images", type=int, default=None, help="only the first so many items")
    parser.add_argument(
        "--per_pass", type=int, default=8, help="conditions of a picture that run together"
    )
    parser.add_argument("--seed", type=int, default=0, help="of random tokens and noise")
    parser.add_argument(
        "--paper_compat",
        action="store_true",
        help="the published criteria and definitions, see README",
    )
    cli.add_run_arguments(parser, "picture")


def read_targets(args, question="Describe this image."):
    """Items of the annotation file that pass the object filter, in file order."""
    listed = samples.read_coco(
        Path(args.coco_root) / args.datatype, instances_file(args), question=question
    )
    annotations, items = samples.read_instances(instances_file(args)), []
    for sample in listed:
        target = find_target(
            annotations.get(sample.extra["image_id"], []),
            args.min_area,
            args.max_area,
            args.max_annotations,
        )
        if target is not None:
            items.append(Item(sample, target, target["category"], target["category"]))
    if not items:
        limits = (
            f"--min_area {args.min_area:g} --max_area {args.max_area:g} --max_annotations"
            f" {args.max_annotations}"
        )
        raise UsageError(
            f"none of the {len(listed)} pictures of {instances_file(args)} passes the object filter"
            f" ({limits})"
        )
    return items[: args.max_images]


def read_curated_targets(args):
    """Items of --clean_questions_file: one per question; the object is the one its category names,
    else the one of the object filter."""
    listed = {
        str(sample.extra["image_id"]): sample
        for sample in samples.read_coco(Path(args.coco_root) / args.datatype, instances_file(args))
    }
    annotations, items, asked = (
        samples.read_instances(instances_file(args)),
        [],
        samples.read_curated(args.clean_questions_file),
    )
    for image_id, questions in asked.items():
        sample = listed.get(image_id.lstrip("0") or "0", listed.get(image_id))
        for n, entry in enumerate(questions if sample else ()):
            there = annotations.get(sample.extra["image_id"], [])
            if entry.get("category"):
                named = [
                    annotation
                    for annotation in there
                    if annotation["category"] == entry["category"] and not annotation.get("iscrowd")
                ]
                target = named[0] if len(named) == 1 else None
            else:
                target = find_target(there, args.min_area, args.max_area, args.max_annotations)
            if target is not None:
                own = Sample(
                    f"{sample.id}-{n}", sample.image, entry["question"], extra=sample.extra
                )
                items.append(
                    Item(own, target, target["category"], entry.get("answer") or target["category"])
                )
    if not items:
        raise UsageError(
            f"{args.clean_questions_file}: none of its {len(asked)} pictures with a question has an"
            f" object in {instances_file(args)}; the published list is for train2017: --datatype"
            " train2017"
        )
    return items[: args.max_images]


def instances_file(args):
    return Path(args.coco_root) / "annotations" / f"instances_{args.datatype}.json"


def load(item):
    """What process() needs of an item: (item, picture, mask of the object)."""
    image = load_image(item.image)
    return item, image, object_mask(item.annotation, image.size)


def tokens_of(args, vlm, batch, mask):
    """Indices of the object's vision tokens. ValueError where the model sees nothing of it."""
    grid = batch.grids[0]
    if grid is None:
        raise UsageError(
            f"{vlm.path}: where the vision tokens of {vlm.family.name} lie in the picture (grid) is"
            " unknown, so an object's tokens are too"
        )
    tokens = object_tokens(grid, mask, args.threshold)
    if not len(tokens):
        raise ValueError(
            "the object lies outside what the model sees, or covers no token by more than"
            " --threshold"
        )
    return tokens


def open_run(args, experiment, vlm, names, more=None, free=None):
    """The run directory; names: flags that the numbers depend on besides the common ones."""
    names = (
        *names,
        "datatype",
        "min_area",
        "max_area",
        "max_annotations",
        "threshold",
        "seed",
        "paper_compat",
        "image_aspect",
    )
    settings = identity_of(vlm)
    settings |= (
        {"prompt": prompt_for(vlm, "QUESTION")[0], "data": Path(args.coco_root).name}
        | {name: getattr(args, name) for name in names}
        | (more or {})
    )
    free = {
        "model_path": args.model_path,
        "coco_root": args.coco_root,
        "max_images": args.max_images,
        "per_pass": args.per_pass,
        "device": str(vlm.device),
    }
    return rundirs.open_run(
        rundirs.run_path(args.out_root, args.model_path, experiment, args.run_name),
        experiment,
        settings,
        free,
        args.overwrite,
    )


def load_vlm(args, load):
    """The model that load(args) gives, with what interventions on objects need."""
    if args.per_pass < 1:
        raise UsageError("--per_pass counts from 1")
    vlm = load(args)
    vlm.need("decoder-only", "grid")
    return vlm


def write_results(path, content):
    """--results_file, in one step."""
    rundirs.write_json(Path(path), content)
    print(f"wrote {path}")

"""How long are vision tokens and text tokens when they enter the language model?

    vision: ||connector(tower(picture))_p|| of every vision token, as the decoder gets it, a norm
    after the connector included
    text:   ||E[id]|| of every token of the pictures' captions, each caption with its BOS where the
            model's prompts have one
L2 norms. Beyond Semantics (arXiv 2503.17349), figure 3: on COCO LLaVA-1.5's vision tokens lie at 10
to 1000, text tokens at 0.3 to 1.3 (mean 0.83).

    python vlm_token_norms.py --model_path ../checkpoints/llava-v1.5-7b \\
        --vision_tower_path ../checkpoints/clip-vit-large-patch14-336 \\
        --coco_root ../data/COCO --device cuda --weights_type bin --max_images 20 \\
        --save_vectors --out_dir outputs/token_norms
    python vlm_token_norms.py --model_path ../checkpoints/tiny-llava \\
        --model_path ../checkpoints/tiny-llava-normWmean --coco_root ../data/shapes --max_images 20

Writes <out_dir>/<output_prefix>.png, .pdf and .json (n, mean with a bootstrap 95 % interval over
images, quartiles, range) and prints the same as a table; --save_vectors adds <vectors_file> with
txt and img, one float64 norm a token. Of several models each one's files are in <out_dir>/<model>,
and <out_dir>/<output_prefix>.png and .pdf compare them on one axis. Models in a row with equal
towers, such as snapshots of a training that left the tower alone, are in memory together without
their decoders, and one tower runs for all of them. The decoder's layers are never read from a
folder. On the tiny model the vision violin stands right of the text violin; on tiny-llava-normWmean
and -multilayerNorm it is a line at max_norm * scale: every vision token has one norm.

Published and here: the published script enlarges each picture three times before the processor
shrinks it again, which changes pixels: --scale 3 does the same, the default 1 gives the model the
pictures that it gets elsewhere. It cannot read the multi-layer model and estimates densities of the
norms themselves, shown on a logarithmic axis; ours are densities of log10 norms.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common import add_model_arguments, load_from_args
from vlmdiag import cli
from vlmdiag.cli import UsageError
from vlmdiag.pictures.coco import read_coco
from vlmdiag.pictures.entries import image_key, read_json
from vlmdiag.runs import rundirs

if TYPE_CHECKING:
    from vlmdiag.pictures.samples import Sample
    from vlmdiag.types import VLM, Record

ENDINGS = {"bin": ".bin", "safetensors": ".safetensors"}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--model_path",
        action="append",
        required=True,
        help="folder or hub id; may be given several times, for one figure of all",
    )
    add_model_arguments(parser, path=False)
    parser.add_argument(
        "--coco_root",
        default=None,
        help="folder with annotations/captions_val2017.json and val2017/",
    )
    parser.add_argument(
        "--caption_file", default=None, help="COCO captions json in place of the one in --coco_root"
    )
    parser.add_argument(
        "--image_dir", default=None, help="picture folder in place of the one in --coco_root"
    )
    parser.add_argument("--out_dir", default="outputs/token_norms", help="where files go")
    parser.add_argument(
        "--output_prefix",
        default="token_norms_comparison",
        help="name of the figure and of the summary",
    )
    parser.add_argument(
        "--save_vectors", action="store_true", help="also write the norm of every token"
    )
    parser.add_argument(
        "--vectors_file", default="vectors.npz", help="name of that file in --out_dir"
    )
    parser.add_argument(
        "--max_images", type=cli.count, default=0, help="only the first so many pictures; 0: all"
    )
    parser.add_argument(
        "--scale",
        type=cli.number(0, 100, above=True),
        default=1.0,
        help=(
            "enlarge pictures so many times (Lanczos) before the processor sees them; published: 3"
        ),
    )
    parser.add_argument(
        "--weights_type",
        choices=list(ENDINGS),
        default=None,
        help="which weight files of a folder to read; None: those that are there",
    )
    parser.add_argument(
        "--safetensors_index",
        default=None,
        help="check that model-<this>.safetensors, such as 00003-of-00003, holds the connector",
    )
    parser.add_argument(
        "--batch_size", type=cli.positive, default=8, help="pictures at a time in the vision tower"
    )
    parser.add_argument(
        "--num_workers", type=cli.whole(1, 256), default=2, help="threads that decode pictures"
    )
    args = parser.parse_args(argv)
    if args.coco_root is None and not (args.caption_file and args.image_dir):
        raise UsageError("--coco_root is needed, or --caption_file and --image_dir")
    args.caption_file = args.caption_file or str(
        Path(args.coco_root) / "annotations" / "captions_val2017.json"
    )
    args.image_dir = args.image_dir or str(Path(args.coco_root) / "val2017")
    return args


# ---- loading tower, connector and embedding table ----


def check_weights(args: argparse.Namespace) -> str | None:
    """UsageError where --weights_type or --safetensors_index do not fit the folder. Returns the
    ending to leave out, or None."""
    folder = Path(args.model_path)
    if not folder.is_dir():
        if args.weights_type or args.safetensors_index:
            raise UsageError(
                "--weights_type and --safetensors_index look into a folder, and there is none at"
                f" {folder}"
            )
        return None
    there = [kind for kind, ending in ENDINGS.items() if any(folder.glob(f"*{ending}"))]
    if args.weights_type and there and args.weights_type not in there:
        missing = ENDINGS[args.weights_type]
        raise UsageError(
            f"--weights_type {args.weights_type}: {folder} has no {missing} file; use"
            f" --weights_type {there[0]}, or leave it out"
        )
    if args.safetensors_index:
        check_shard(folder, args.safetensors_index, args.weights_type)
    if args.weights_type:
        others = [kind for kind in there if kind != args.weights_type]
        return ENDINGS[others[0]] if others else None
    return None


def check_shard(folder: Path, index: str, weights_type: str | None) -> None:
    """UsageError where --safetensors_index does not name the shard that holds the connector."""
    if weights_type == "bin":
        raise UsageError("--safetensors_index is for --weights_type safetensors")
    shard = folder / f"model-{index}.safetensors"
    if not shard.exists():
        names = sorted(file.name for file in folder.glob("*.safetensors"))
        raise UsageError(
            f"--safetensors_index {index}: no {shard.name} in {folder}, which has"
            f" {', '.join(names[:5]) or 'no safetensors file'}"
        )
    if not holds_connector(shard):
        shards = sorted(folder.glob("model-*.safetensors"))
        right = [file.stem.removeprefix("model-") for file in shards if holds_connector(file)]
        raise UsageError(
            f"--safetensors_index {index}: {shard.name} does not hold the connector; use"
            f" {', '.join(right) or 'none'} or leave it out"
        )


def holds_connector(shard: Path) -> bool:
    """Is a tensor of the connector in this file?"""
    from safetensors import safe_open

    names = ("mm_projector", "multi_modal_projector", "connector", "merger", "aligner")
    with safe_open(shard, "pt") as file:
        return any(name in key for key in file.keys() for name in names)  # noqa: SIM118 -- no dict


def linked_without(folder: Path, ending: str, view: Path) -> Path:
    """A folder of links to a model's files, without those that have an ending."""
    view.mkdir()
    for file in folder.iterdir():
        if ending not in file.suffixes:
            os.symlink(file.resolve(), view / file.name)
    return view


def load_without_decoder(args: argparse.Namespace, leave_out: str | None) -> VLM | None:
    """The model without its decoder's layers; None for one whose layers cannot be left out.
    leave_out: ending of weight files that are not read."""
    path = Path(args.model_path)
    with tempfile.TemporaryDirectory() as scratch, contextlib.suppress(UsageError):
        if leave_out:
            path = linked_without(path, leave_out, Path(scratch) / rundirs.slug(args.model_path))
        return load_from_args(args, str(path), decoder_layers=0)
    return None


def load_whole(args: argparse.Namespace, leave_out: str | None) -> VLM:
    """The model with all its layers."""
    vlm = load_from_args(args)
    if leave_out:
        raise UsageError(
            f"--weights_type {args.weights_type}: this model is loaded as a whole, by transformers'"
            " own choice of files; leave it out"
        )
    print("the decoder's layers could not be left out for this model, so all of it was loaded")
    return vlm


def read_captions(path: str, samples: Sequence[Sample]) -> dict[str, list[str]]:
    """{sample id: its captions} of a COCO captions file."""
    content = read_json(path)
    annotations = content.get("annotations") if isinstance(content, dict) else None
    if not isinstance(annotations, list) or not all(
        isinstance(entry, dict) and "image_id" in entry for entry in annotations
    ):
        raise UsageError(
            f"{path} has no list 'annotations' of objects with image_id and caption, so it is no"
            " captions file"
        )
    captions: dict[str, list[str]] = {image_key(one.extra["image_id"]): [] for one in samples}
    for entry in annotations:
        key = image_key(entry["image_id"])
        if key in captions and isinstance(entry.get("caption"), str):
            captions[key].append(entry["caption"])
    if not any(captions.values()):
        raise UsageError(
            f"{path} has no caption of the first {len(samples)} images; give a captions file with"
            " --caption_file"
        )
    return {sample.id: captions[image_key(sample.extra["image_id"])] for sample in samples}


# ---- measuring ----

Measured = tuple[dict[str, np.ndarray], "Record"]  # norms of all tokens by group, and the summary


def measure_together(
    models: Sequence[argparse.Namespace],
    vlms: Sequence[VLM],
    samples: Sequence[Sample],
    captions: dict[str, list[str]],
) -> list[Measured]:
    """Measure models whose towers are equal, print a table and write the files of each."""
    from vlmdiag.beyond_semantics import token_norms

    args = models[0]
    of_models, failed = token_norms.measure(
        vlms, samples, captions, args.scale, args.batch_size, args.num_workers
    )
    for id, error in failed.items():
        print(f"{id} failed: {error}")
    if len(failed) == len(samples):
        raise UsageError(f"none of the {len(samples)} pictures of {args.image_dir} could be read")
    measured = []
    for of_model, vlm, norms in zip(models, vlms, of_models, strict=True):
        text = [of_image.text for of_image in norms.values()]
        vision = [of_image.vision for of_image in norms.values()]
        summary = {
            "text": token_norms.summarize(text),
            "vision": token_norms.summarize(vision),
            "model": rundirs.slug(of_model.model_path),
            "scale": args.scale,
            "dtype": str(vlm.dtype).removeprefix("torch."),
            "decoder_left_out": not vlm.parts.layers,
            "failed": failed,
            "vision_over_text": token_norms.vision_over_text(norms),
        }
        pooled = {"text": np.concatenate(text), "vision": np.concatenate(vision)}
        report(of_model, pooled, summary)
        measured.append((pooled, summary))
    return measured


def report(args: argparse.Namespace, pooled: dict[str, np.ndarray], summary: Record) -> None:
    """Print a model's table and write its files into --out_dir."""
    from vlmdiag.beyond_semantics import token_norm_figure, token_norms
    from vlmdiag.figures import plots

    print(token_norms.table_of(summary))
    stem = Path(args.out_dir) / args.output_prefix
    name = summary["model"]
    figure = token_norm_figure.draw({name: (pooled, summary)})
    plots.save(figure, f"{stem}.png", vars(args) | {"model_name": name})
    plots.write_file(f"{stem}.json", (json.dumps(summary, indent=2) + "\n").encode())
    if args.save_vectors:
        buffer = io.BytesIO()
        np.savez(buffer, txt=pooled["text"], img=pooled["vision"])
        plots.write_file(Path(args.out_dir) / args.vectors_file, buffer.getvalue())


def measure_all(
    models: Sequence[argparse.Namespace], samples: Sequence[Sample], captions: dict[str, list[str]]
) -> list[Measured]:
    """Measure the models in order. Those that follow each other and have equal towers are in memory
    together, without their decoders, and their tower runs once for all; a model that is loaded
    whole is there alone."""
    from vlmdiag.model import towers

    measured: list[Measured] = []
    waiting: list[argparse.Namespace] = []
    vlms: list[VLM] = []

    def measure_waiting() -> None:
        if waiting:
            measured.extend(measure_together(waiting, vlms, samples, captions))
        waiting.clear()
        vlms.clear()

    for args in models:
        args.no_self_check = True  # its checks are about the decoder
        leave_out = check_weights(args)
        vlm = load_without_decoder(args, leave_out)
        if vlm is None or (vlms and not towers.equal(vlms[0], vlm)):
            measure_waiting()
        if vlm is not None and vlms:
            towers.merge(vlms[0], vlm)
        waiting.append(args)
        vlms.append(vlm or load_whole(args, leave_out))
        if vlm is None:
            measure_waiting()
    measure_waiting()
    return measured


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    names = [rundirs.slug(path) for path in args.model_path]
    if len(set(names)) < len(names):
        raise UsageError(f"--model_path: two models have one name ({', '.join(names)})")
    samples = read_coco(args.image_dir, args.caption_file, args.max_images or None)
    captions = read_captions(args.caption_file, samples)
    models = []
    for name, path in zip(names, args.model_path):
        where = Path(args.out_dir) / name if len(names) > 1 else args.out_dir
        models.append(cli.changed(args, model_path=path, out_dir=str(where)))
    measured = dict(zip(names, measure_all(models, samples, captions), strict=True))
    if len(names) > 1:
        from vlmdiag.beyond_semantics import token_norm_figure
        from vlmdiag.figures import plots

        path = Path(args.out_dir) / f"{args.output_prefix}.png"
        plots.save(token_norm_figure.draw(measured), path, vars(args) | {"models": names})
    return 3 if any(summary["failed"] for _, summary in measured.values()) else 0


if __name__ == "__main__":
    cli.run(main)

"""Will my model work? What the tools see of a model, before anything is measured.

    python diagnostic_tools/check_model.py checkpoints/tiny-llava
    python diagnostic_tools/check_model.py checkpoints/tiny-llava PICTURE "Is there a red circle?"
    python diagnostic_tools/check_model.py checkpoints/tiny-llava --images PICTURE PICTURE
    python diagnostic_tools/check_model.py llava-hf/llava-1.5-7b-hf --no_weights
    python diagnostic_tools/check_model.py FOLDER --propose_grid family.py

With --images, --messages or --video every token has the number of its picture and its turn too, and
the prompt is compared with what the model's own processor and generate() make of it.

Prints which family describes the model and why, which commands it can run, its prompt with every
token and its group, the ids that end an answer, how a picture is prepared, and what the self-check
found; draws the boxes of the vision tokens on the picture. Without PICTURE one is drawn. Look at
two things: the question's tokens are in the group `user`, and the boxes of --out cover the picture.
--no_weights says how names and shapes in the weight files fit the model that the config describes,
and about how much memory each kind of measure takes, without a self-check. --propose_grid finds
where the vision tokens of a model without a known grid lie, by changing stripes of pictures, or
says that there is no grid to trust; it writes a family file to review, which nothing uses by
itself. Exit code 0: the model can be measured, as far as could be seen; 2: it cannot, for the
reason in the last line.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from random import Random
from typing import TYPE_CHECKING

from common import VLM, add_model_arguments, load_from_args
from vlmdiag import cli
from vlmdiag.cli import UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

    from vlmdiag.pictures.samples import Pictures, Sample
    from vlmdiag.types import Record

# of VLM.options
OPTIONS = ("system_prompt", "prompt_template", "image_aspect", "conv_mode", "quantize_type")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument("model_path", help="folder or hub id of the model")
    parser.add_argument(
        "image", nargs="?", help="picture, None: a drawn one; with --images or --video the question"
    )
    parser.add_argument(
        "question", nargs="?", default="Describe the image.", help="asked about the picture"
    )
    cli.add_chat_arguments(parser)
    parser.add_argument("--out", default="grid.png", help="picture with the grid of vision tokens")
    parser.add_argument("--json", default=None, help="file for all that is printed, as JSON")
    parser.add_argument(
        "--no_weights",
        action="store_true",
        help="from config, tokenizer and the headers of the weight files alone; of a hub id nothing"
        " else is fetched",
    )
    parser.add_argument(
        "--propose_grid",
        metavar="FILE",
        help="file for a family with the grid that is found; a family that has one is compared with"
        " it (some minutes without a GPU)",
    )
    add_model_arguments(parser, path=False)
    args = parser.parse_args(argv)
    if (args.images or args.video) and args.image:
        args.question, args.image = args.image, None
    cli.check_chat(parser, args, not_with=["image"])
    if args.propose_grid and args.no_weights:
        parser.error("--propose_grid measures the model, so it needs its weights")
    return args


def asked(args: argparse.Namespace) -> tuple[Sample, Pictures]:
    """The first prompt of --images, --messages or --video with its pictures, else the question
    about the picture of a path, or a drawn one. UsageError where one cannot be read."""
    from vlmdiag.pictures.chats import given_samples
    from vlmdiag.pictures.samples import AT_HAND, Sample, given_image, given_pictures
    from vlmdiag.scenes.scene import floor_scene, render

    for sample in given_samples(argparse.Namespace(**vars(args), prompt_text=args.question)):
        return sample, given_pictures(sample)
    sample = Sample("0", AT_HAND, args.question)
    if args.image is None:
        return sample, render(floor_scene(Random(0), 3))
    return sample, given_image(args.image)


def loaded(args: argparse.Namespace, sample: Sample, pictures: Pictures, report: Record) -> None:
    """Put into the report what the self-check finds and what the loaded model shows."""
    from vlmdiag.model import check, selfcheck
    from vlmdiag.model.errors import as_usage_error

    vlm = load_from_args(argparse.Namespace(**vars(args) | {"no_self_check": True}))
    report["self_check"] = {"passed": None, "found": "skipped (--no_self_check)"}
    if not args.no_self_check:
        try:
            with as_usage_error(args.model_path, "the self-check failed"):
                note = selfcheck.check(vlm)
                if sample.chat is not None:
                    selfcheck.check_chat(vlm, sample, pictures)
            found = f"passed: {note}" if note else "passed"
            report["self_check"] = {"passed": True, "found": found}
        except UsageError as error:
            report["self_check"] = {"passed": False, "found": str(error)}
            report["problems"].append(str(error))
    # behind the self-check, which may take a capability away
    described = vlm.options["base_model"] or args.model_path  # of an adapter, its base
    report["family"] = check.family_of(vlm.family, described, args.family)
    report["family"] |= {"dtype": str(vlm.dtype).removeprefix("torch."), "device": str(vlm.device)}
    report["family"]["left_out"] = check.end_left_out(vlm)
    report["capabilities"] = check.capabilities_of(vlm.family, vlm.model)
    describe(args, vlm, sample, pictures, report)
    if args.propose_grid:
        first = pictures[0] if isinstance(pictures, tuple) else pictures
        propose(args, vlm, first, report)


def propose(args: argparse.Namespace, vlm: VLM, image: Image, report: Record) -> None:
    """Put into the report the grid that the vision tokens show; where the family has none, write
    and draw it."""
    from vlmdiag.model import check, grid_proposal
    from vlmdiag.runs.disk import write_bytes

    proposal = grid_proposal.propose(vlm)
    report["proposed_grid"] = grid_proposal.record_of(vlm, proposal)
    if proposal.layout is None or vlm.family.grid is not None:
        return
    write_bytes(args.propose_grid, grid_proposal.family_file(vlm, proposal).encode())
    report["proposed_grid"]["file"] = args.propose_grid
    grid = grid_proposal.grid_on(vlm, proposal.layout, image)
    if grid is not None:
        check.write_grid(args.out, grid, image)
        report["proposed_grid"]["picture"] = args.out


def outlined(args: argparse.Namespace, sample: Sample, pictures: Pictures, report: Record) -> None:
    """Put into the report what can be said without weights."""
    from vlmdiag.model import check, encoding, loading, outline

    found = outline.outlined(
        args.model_path,
        args.trust_remote_code,
        args.family,
        args.vision_tower_path,
        args.conv_mode,
        args.base_model,
    )
    report["family"] = found.chosen
    report["capabilities"] = check.capabilities_of(found.family, found.model)
    report["problems"] += found.problems
    report["unknown"] += found.unknown
    if found.model is None:
        return
    report["weights"] = check.weights_of(found)
    if found.processor is not None:
        options = {name: getattr(args, name) for name in OPTIONS}
        vlm = VLM(found.model, found.processor, found.family, found.path, options)
        encoding.never_cut(vlm.tokenizer)
        if args.image_aspect == "pad":
            loading.pad_to_square(vlm)
        describe(args, vlm, sample, pictures, report, found.has_tokenizer)
    try:
        report["memory"] = check.memory_of(found, report.get("prompt"))
    except UsageError as error:
        report["problems"].append(str(error))


def describe(
    args: argparse.Namespace,
    vlm: VLM,
    sample: Sample,
    pictures: Pictures,
    report: Record,
    has_tokenizer: bool = True,
) -> None:
    """Put into the report what the prompt of a model and its pictures show, and draw its grid."""
    from vlmdiag.model import check

    images = pictures if isinstance(pictures, tuple) else (pictures,)
    try:
        if has_tokenizer:
            batch = check.encoded(vlm, sample, pictures)
            report["prompt"] = check.prompt_of(vlm, batch)
            report["answer_ends"] = check.endings_of(vlm)
            inputs = batch.image_rows
        else:
            inputs = [check.picture_alone(vlm, image) for image in images]
        report["pictures"] = check.pictures_of(vlm, inputs[0])
        report["grid"] = check.grid_of(vlm, inputs, images, args.out)
    except UsageError as error:
        # without a tokenizer there is a problem already, which may be the reason
        report["problems" if has_tokenizer else "unknown"].append(str(error))


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    from vlmdiag.model.check_text import lines_of
    from vlmdiag.runs.disk import write_json

    sample, pictures = asked(args)
    report: Record = {"model": args.model_path, "unknown": [], "problems": []}
    if args.no_weights:
        outlined(args, sample, pictures, report)
    else:
        loaded(args, sample, pictures, report)
    for line in lines_of(report):
        print(line)
    if args.json is not None:
        write_json(args.json, report)
    if report["problems"]:
        raise UsageError("; ".join(report["problems"]))
    return 0


if __name__ == "__main__":
    cli.run(main)

"""Will my model work? What the tools see of a model, before anything is measured.

    python diagnostic_tools/check_model.py checkpoints/tiny-llava
    python diagnostic_tools/check_model.py checkpoints/tiny-llava PICTURE "Is there a red circle?"

Prints which family describes the model and why, which commands it can run, its prompt with every
token and its group, the ids that end an answer, how a picture is prepared, and what the self-check
found; draws the boxes of the vision tokens on the picture. Without PICTURE one is drawn. Look at
two things: the question's tokens are in the group `user`, and the boxes of --out cover the picture.
Exit code 0: the model can be measured; 2: it cannot, for the reason in the last line.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from random import Random
from typing import TYPE_CHECKING

from common import add_model_arguments, load_from_args
from vlmdiag import cli
from vlmdiag.cli import UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

    from vlmdiag.types import VLM, Record


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument("model_path", help="folder or hub id of the model")
    parser.add_argument("image", nargs="?", help="picture; None: a drawn one")
    parser.add_argument("question", nargs="?", default="Describe the image.")
    parser.add_argument("--out", default="grid.png", help="picture with the grid of vision tokens")
    parser.add_argument("--json", default=None, help="file for all that is printed, as JSON")
    add_model_arguments(parser, path=False)
    return parser.parse_args(argv)


def picture_of(path: str | None) -> Image:
    """The picture of a path, or a drawn one. UsageError where it cannot be read."""
    from vlmdiag.pictures.samples import load_image
    from vlmdiag.scenes.scene import floor_scene, render

    if path is None:
        return render(floor_scene(Random(0), 3))
    try:
        return load_image(path)
    except (OSError, ValueError) as error:
        raise UsageError(str(error)) from error


def load_and_check(args: argparse.Namespace, report: Record) -> VLM:
    """The model, with what the self-check found in the report."""
    from vlmdiag.model.selfcheck import check

    vlm = load_from_args(argparse.Namespace(**vars(args) | {"no_self_check": True}))
    if args.no_self_check:
        report["self_check"] = {"passed": None, "found": "skipped (--no_self_check)"}
        return vlm
    try:
        note = check(vlm)
        report["self_check"] = {"passed": True, "found": "passed" + (f": {note}" if note else "")}
    except UsageError as error:
        report["self_check"] = {"passed": False, "found": str(error)}
    return vlm


def describe(args: argparse.Namespace, vlm: VLM, report: Record) -> None:
    """Put into the report what the prompt of a model shows, and draw its grid. UsageError where
    there is no prompt."""
    from vlmdiag.model import check
    from vlmdiag.pictures.samples import AT_HAND, Sample

    image = picture_of(args.image)
    batch = check.encoded(vlm, Sample("0", AT_HAND, args.question), image)
    report["prompt"] = check.prompt_of(vlm, batch)
    report["answer_ends"] = check.endings_of(vlm)
    report["pictures"] = check.pictures_of(vlm, batch)
    grid = batch.grids[0]
    report["grid"] = check.grid_of(grid)
    if grid is not None:
        check.write_grid(args.out, grid, image)
        report["grid"]["file"] = args.out


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    from vlmdiag.model import check
    from vlmdiag.runs.disk import write_json

    report: Record = {"model": args.model_path}
    vlm = load_and_check(args, report)
    report["family"] = check.family_of(vlm.family, args.model_path, args.family)
    report["family"] |= {"dtype": str(vlm.dtype).removeprefix("torch."), "device": str(vlm.device)}
    report["capabilities"] = check.capabilities_of(vlm.family)
    describe(args, vlm, report)
    for line in check.lines_of(report):
        print(line)
    if args.json is not None:
        write_json(args.json, report)
    if report["self_check"]["passed"] is False:
        raise UsageError(report["self_check"]["found"])
    return 0


if __name__ == "__main__":
    cli.run(main)

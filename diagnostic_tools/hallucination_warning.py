"""Does a model name things that are not in the picture, and can its insides tell? A calibrated
probability for each object word of an answer.

    python diagnostic_tools/hallucination_warning.py fit --model_path checkpoints/tiny-llava \\
        --image_dir data/shapes/val2017 \\
        --ann_file data/shapes/annotations/instances_val2017.json
    python diagnostic_tools/hallucination_warning.py test --model_path checkpoints/tiny-llava \\
        --image_dir data/shapes-test/val2017 \\
        --ann_file data/shapes-test/annotations/instances_val2017.json
    python diagnostic_tools/hallucination_warning.py score --model_path checkpoints/tiny-llava \\
        --image picture.jpg --prompt_text "Describe the image."

Object words: category names of the instances file in descriptions (--kinds captions), and the Yes
of questions in POPE's form (arXiv 2305.10355), "Is there a <name> in the image?", about objects
that are there and as many that are not (--kinds pope). A word is hallucinated if the picture has no
such instance. --corrupt draws one of none, noise, blur and covered for each picture, so that a
model that is rarely wrong is wrong often enough. Signals: vlmdiag/stethoscope/warning_signals.py;
fit() and AUROC: calibration.py. fit writes
runs/hallucination_warning/<model>__fit/analysis/calibration.json, which test and score (and the
app) read; test writes analysis/report.json: AUROC of each signal and of all together, each against
plain token probability on the same words, and calibration. Words of descriptions and the Yes of
questions are calibrated each for themselves.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from common import add_model_arguments, load_from_args
from vlmdiag import cli
from vlmdiag.cli import UsageError
from vlmdiag.pictures.coco import read_categories, read_coco, read_instances
from vlmdiag.pictures.samples import Sample, given_image, with_picture
from vlmdiag.runs import rundirs
from vlmdiag.runs.experiment import Outcome, Worker, run_worker, worker_for

if TYPE_CHECKING:
    from vlmdiag.stethoscope.hallucination import Item
    from vlmdiag.types import VLM, Record

CORRUPTIONS = ("none", "noise", "blur", "covered")
# flags that the numbers depend on
SETTINGS = ("image_aspect", "kinds", "questions_per_image", "corrupt", "max_new_tokens", "seed")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument(
        "command",
        choices=["fit", "test", "score"],
        help="calibrate, test a calibration on other pictures, score one answer",
    )
    parser.add_argument(
        "--image_dir", "--image_folder", default=None, help="fit, test: folder of pictures"
    )
    parser.add_argument("--ann_file", default=None, help="fit, test: COCO instances file")
    parser.add_argument("--image", default=None, help="score: picture")
    parser.add_argument(
        "--prompt_text", default="Describe the image.", help="prompt of descriptions"
    )
    parser.add_argument(
        "--kinds",
        nargs="+",
        choices=["captions", "pope"],
        default=["captions", "pope"],
        help="what is scored: object words of descriptions, yes/no questions",
    )
    parser.add_argument(
        "--questions_per_image",
        type=cli.positive,
        default=4,
        help="pope: half of them about objects that are not there",
    )
    parser.add_argument(
        "--corrupt",
        nargs="+",
        choices=CORRUPTIONS,
        default=list(CORRUPTIONS),
        help="one of these is drawn for each picture",
    )
    parser.add_argument(
        "--calibration",
        default=None,
        help="calibration.json of fit; None: that of this model in --out_root",
    )
    parser.add_argument(
        "--max_new_tokens", type=cli.positive, default=48, help="most tokens of an answer"
    )
    parser.add_argument(
        "--max_images",
        "--num_images",
        type=cli.positive,
        default=None,
        help="only the first so many",
    )
    parser.add_argument("--seed", type=cli.seed, default=0, help="of corruptions and questions")
    cli.add_run_arguments(parser, "item")
    add_model_arguments(parser)
    args = parser.parse_args(argv)
    if args.command == "score" and not args.image:
        parser.error("score needs --image")
    if args.command != "score" and not (args.image_dir and args.ann_file):
        parser.error(f"{args.command} needs --image_dir and --ann_file")
    return args


def read_items(args: argparse.Namespace) -> tuple[list[Item], list[str]]:
    """(prompts about the pictures, all object names of the file)."""
    from vlmdiag.stethoscope.hallucination import items_of

    names = read_categories(args.ann_file)
    objects = {
        str(image_id): tuple(sorted({instance["category"] for instance in instances}))
        for image_id, instances in read_instances(args.ann_file).items()
    }
    samples = read_coco(args.image_dir, args.ann_file, args.max_images, args.prompt_text)
    items = items_of(
        samples, objects, names, args.kinds, args.corrupt, args.questions_per_image, args.seed
    )
    return items, names


def make_worker(args: argparse.Namespace) -> Worker:
    """The measurement of the items of fit or test."""
    items, names = read_items(args)
    from vlmdiag.model.prompts import prompt_for
    from vlmdiag.stethoscope.hallucination import make_process
    from vlmdiag.stethoscope.warning_signals import EXPERIMENT

    vlm = load(args)
    settings = {name: getattr(args, name) for name in SETTINGS}
    settings["prompt"] = prompt_for(vlm, args.prompt_text)[0]
    settings["ann_file"] = Path(args.ann_file).name
    settings["names"] = names
    name = f"{args.run_name}-{args.command}" if args.run_name else args.command
    return worker_for(
        args,
        vlm,
        EXPERIMENT,
        items,
        with_picture,
        make_process(vlm, names, args.max_new_tokens, args.seed),
        settings,
        {"image_folder": args.image_dir},
        path=rundirs.run_path(args.out_root, args.model_path, EXPERIMENT, name),
        progress="prompts",
    )


def load(args: argparse.Namespace) -> VLM:
    """The model, which has to attend in every layer."""
    vlm = load_from_args(args)
    vlm.need("decoder-only", "every-layer")
    return vlm


def fit(args: argparse.Namespace) -> int:
    """Calibrate; returns the exit code."""
    from vlmdiag.stethoscope.calibration import logistic_regression

    logistic_regression()  # it is needed when all is measured
    return run_worker(args, make_worker, finish_fit)


def is_shard(args: argparse.Namespace) -> bool:
    """Whether the call is one shard of several; says what comes after them."""
    if args.shard == (0, 1):
        return False
    print(
        f"shard {args.shard[0]} of {args.shard[1]} is done; after the last one: the same command"
        " without --shard"
    )
    return True


def finish_fit(args: argparse.Namespace, outcome: Outcome) -> None:
    """Calibrate on what was measured, unless it is a shard."""
    if is_shard(args):
        return
    from vlmdiag.stethoscope.hallucination import calibrate, lines_of_fit

    fitted = calibrate(outcome.run)
    path = outcome.run.path / "analysis" / "calibration.json"
    rundirs.write_json(path, fitted)
    print("\n".join([*lines_of_fit(fitted), f"wrote {path}"]))


def test(args: argparse.Namespace) -> int:
    """Test a calibration on other pictures; returns the exit code."""
    calibration(args)
    return run_worker(args, make_worker, finish_test)


def calibration(args: argparse.Namespace) -> Record:
    """What fit found for the model. UsageError where it was not run."""
    from vlmdiag.stethoscope.warning_signals import find_calibration

    fitted = find_calibration(args.model_path, args.out_root, args.calibration)
    if fitted is None:
        raise UsageError(
            f"{args.model_path} is not calibrated in {args.out_root}; run first, on other pictures:"
            " python diagnostic_tools/hallucination_warning.py fit --model_path"
            f" {args.model_path} --image_dir PICTURES --ann_file INSTANCES --out_root"
            f" {args.out_root}"
        )
    return fitted


def finish_test(args: argparse.Namespace, outcome: Outcome) -> None:
    """Compare what was measured with the calibration, unless it is a shard."""
    if is_shard(args):
        return
    from vlmdiag.stethoscope.hallucination import lines_of_report, report

    reports = report(outcome.run, calibration(args))
    rundirs.write_json(outcome.run.path / "analysis" / "report.json", reports)
    print("\n".join(lines_of_report(reports)))


def score(args: argparse.Namespace) -> int:
    """Print one answer and the probability of each of its object words."""
    from vlmdiag.model.decoding import generate
    from vlmdiag.stethoscope.warning_signals import find_calibration, warnings_for

    fitted = find_calibration(args.model_path, args.out_root, args.calibration)
    sample = Sample("0", Path(args.image), args.prompt_text)
    picture = given_image(args.image)
    vlm = load(args)
    batch = vlm.encode([sample], [picture])
    ids = generate(vlm, batch, args.max_new_tokens).ids[0]
    print(vlm.text(ids))
    if fitted is None:
        print(f"not calibrated: run hallucination_warning.py fit for {args.model_path}")
        return 0
    words = warnings_for(vlm, batch, ids, fitted["names"], fitted)
    if not words:
        print("it names no object that the calibration knows, so there is nothing to score")
    for word in words:
        risk = "not calibrated for descriptions"
        if word["probability"] is not None:
            risk = f"P(hallucinated) = {word['probability']:.2f}"
        signals = "  ".join(f"{name} {value:.3g}" for name, value in word["signals"].items())
        print(f"{word['word']}: {risk}  {signals}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    return {"fit": fit, "test": test, "score": score}[args.command](args)


if __name__ == "__main__":
    cli.run(main)

"""Is a relevancy map right? Take away what it calls most, or least, relevant and see what becomes
of the token; see whether it lies on the named object.

    python diagnostic_tools/evaluate_relevancy.py --model_path checkpoints/tiny-llava \\
        --image_dir data/shapes/val2017 \\
        --ann_file data/shapes/annotations/instances_val2017.json --removal mean drop \\
        --max_images 20
    python diagnostic_tools/relevancy_evaluation_plot.py \\
        --run_dir runs/evaluate_relevancy/tiny-llava

The model answers, or is given an answer; targets are the tokens that name an object which is there
once. Every method of vlmdiag/relevancy/methods.py scores the vision tokens once, on the full input.
Then l(s), the log-probability of the same token behind the same tokens (teacher forcing), is
measured with the share s of the vision tokens removed: most relevant first (positive: the lower the
area under the curve the better) or least relevant first (negative: the higher).

    mean    replaced by the mean of the picture's vision tokens
    drop    left out of the sequence, the others keep their positions
    blur    their boxes blurred in the picture, which the tower reads again

Pointing game and mask energy hold the map against the object's mask. Beside the methods stand
'centre', 1 - d / d_max with d the distance of a box to the picture's centre, and 'object', the
share of a box that the object covers: what a map that knows the object alone would reach. Area
prior: a uniform map's expectation, the share of boxes that are hits and the mean coverage.
Protocol: Transformer-MM-Explainability (arXiv 2103.15679), docs/studies/stethoscope.md, section
4.3; definitions in vlmdiag/relevancy/perturbation.py. On tiny-llava gradient relevancy beats random
in all of them; what beats it stands in the README.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from common import add_model_arguments, load_from_args
from vlmdiag import cli
from vlmdiag.pictures.coco import read_coco, read_instances
from vlmdiag.pictures.questions import read_questions
from vlmdiag.pictures.samples import with_picture
from vlmdiag.runs.experiment import Outcome, Worker, run_worker, worker_for

if TYPE_CHECKING:
    from vlmdiag.pictures.samples import Sample

EXPERIMENT = "evaluate_relevancy"
# in the order of vlmdiag.relevancy.methods.METHODS
METHODS = (
    "relevancy",
    "relevancy_decoder",
    "gradient_attention",
    "raw_attention",
    "rollout",
    "input_gradient",
    "integrated_gradients",
    "random",
)
SHARES = (0, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 1)  # finer at both ends, where maps differ


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument("--image_dir", "--image_folder", required=True, help="folder of pictures")
    parser.add_argument(
        "--ann_file",
        required=True,
        help="COCO instances json: masks and names of the pictures' objects",
    )
    parser.add_argument(
        "--question_file",
        default=None,
        help=(
            "JSON list of {image, question, answer}; None: --prompt_text about every picture of"
            " --ann_file"
        ),
    )
    parser.add_argument("--prompt_text", default="Describe the image.", help="question")
    parser.add_argument(
        "--use_answers",
        action="store_true",
        help="measure the answers of --question_file by teacher forcing instead of generating",
    )
    parser.add_argument(
        "--max_new_tokens", type=cli.positive, default=32, help="most tokens of an answer"
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=list(METHODS),
        default=list(METHODS),
        help="maps that are compared",
    )
    parser.add_argument(
        "--removal",
        nargs="+",
        choices=["mean", "drop", "blur"],
        default=["mean"],
        help="how vision tokens are taken away",
    )
    parser.add_argument(
        "--shares",
        type=cli.share,
        nargs="+",
        default=list(SHARES),
        help="shares removed, from 0 to 1",
    )
    parser.add_argument(
        "--targets_per_image",
        type=cli.positive,
        default=None,
        help="so many targets, drawn by --seed; None: all",
    )
    parser.add_argument(
        "--blur_radius",
        type=cli.number(0, 10, above=True),
        default=0.1,
        help="of the Gaussian, in sides of the picture (the longer one)",
    )
    parser.add_argument(
        "--tolerance",
        type=cli.number(0, 100_000),
        default=15.0,
        help="pixels that the pointing game forgives",
    )
    parser.add_argument(
        "--seed",
        type=cli.seed,
        default=0,
        help="of the random map, of ties and of the targets drawn",
    )
    parser.add_argument(
        "--per_pass", type=cli.positive, default=8, help="removals that run together"
    )
    parser.add_argument(
        "--max_images",
        "--num_images",
        type=cli.positive,
        default=None,
        help="only the first so many",
    )
    cli.add_run_arguments(parser, "picture")
    add_model_arguments(parser)
    args = parser.parse_args(argv)
    args.methods = list(dict.fromkeys(args.methods))
    args.removal = list(dict.fromkeys(args.removal))
    if args.shares[0] != 0 or args.shares[-1] != 1 or sorted(set(args.shares)) != args.shares:
        parser.error(
            f"--shares {' '.join(f'{share:g}' for share in args.shares)}: ascending shares from 0"
            " to 1 are wanted, such as 0 0.25 0.5 1"
        )
    if args.use_answers and not args.question_file:
        parser.error("--use_answers needs --question_file")
    return args


def read_samples(args: argparse.Namespace) -> list[Sample]:
    """A Sample per question of the list, or per picture of the annotation file."""
    if args.question_file:
        return read_questions(args.question_file, args.image_dir)[: args.max_images]
    return read_coco(args.image_dir, args.ann_file, args.max_images, args.prompt_text)


def make_worker(args: argparse.Namespace) -> Worker:
    """The measurement of all pictures."""
    samples = read_samples(args)
    annotations = read_instances(args.ann_file)

    from vlmdiag.model.prompts import prompt_for
    from vlmdiag.relevancy.evaluation import Protocol, make_process
    from vlmdiag.runs.inputs import file_digest

    vlm = load_from_args(args)
    vlm.need("decoder-only", "every-layer")
    names = [field.name for field in dataclasses.fields(Protocol)]
    flags = {name: getattr(args, name) for name in names}
    settings = {name: value for name, value in flags.items() if name != "per_pass"}
    settings["prompt"] = prompt_for(vlm, args.prompt_text)[0]
    settings["image_aspect"] = args.image_aspect
    settings["annotations"] = Path(args.ann_file).name
    settings["questions"] = Path(args.question_file).name if args.question_file else None
    settings["ann_digest"] = file_digest(Path(args.ann_file))
    free = {"image_folder": args.image_dir, "per_pass": args.per_pass}
    process = make_process(vlm, Protocol(**flags), annotations)
    return worker_for(
        args, vlm, EXPERIMENT, samples, with_picture, process, settings, free, progress="pictures"
    )


def finish(args: argparse.Namespace, outcome: Outcome) -> None:
    """Say what makes the tables."""
    where = outcome.run.path
    if outcome.run.ids():
        print(
            f"{where}: tables and figures by python diagnostic_tools/relevancy_evaluation_plot.py"
            f" --run_dir {shlex.quote(str(where))}"
        )


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    return run_worker(args, make_worker, finish)


if __name__ == "__main__":
    cli.run(main)

"""Which parts of the picture, and which words, made a model say what it says? Gradient relevancy of
every generated token, for many pictures.

    python diagnostic_tools/relevancy_maps.py --model_path checkpoints/tiny-llava \\
        --image_dir data/shapes/val2017 --max_images 4
    python diagnostic_tools/viz_relevancy.py --run_dir runs/relevancy/tiny-llava

    Ā_l = E_h[(dy/dA_l * A_l)+]      R <- R + Ā_l R from the first layer up; row of the producing
                                     position, without the identity
    y: raw logit of the generated token; picture: the row's part over vision tokens, through
    connector and tower (vlmdiag/relevancy/rules.py)

Transformer-MM-Explainability (arXiv 2103.15679), as LVLM-Stethoscope shows it; layer l: gathered
from the first layer up to l. One pass over prompt and answer, then one sweep down the layers for
all tokens together. Per picture: rows (T, K, N) of T tokens at K layers over N positions, cells (T,
K, S) over the tower's patches, raw_attention (T, K, P) beside them, probability and visual share
max R_img / (max R_img + max R_text) of each token, text: question and earlier answer. On tiny-llava
the warm patches of a colour or shape word lie on its object.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from common import add_model_arguments, load_from_args
from vlmdiag import cli
from vlmdiag.pictures import chats
from vlmdiag.pictures.questions import read_questions
from vlmdiag.pictures.samples import Sample, samples_of, with_pictures
from vlmdiag.runs.experiment import Outcome, Worker, run_worker, worker_for

EXPERIMENT = "relevancy"
# flags that the numbers depend on, besides --layers and --question_file
SETTINGS = ("image_aspect", "max_new_tokens", "no_tower", "use_answers")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--image_dir", "--image_folder", help="folder of pictures, or of those of --messages"
    )
    cli.add_chat_arguments(parser)
    parser.add_argument(
        "--question_file",
        default=None,
        help="JSON list of {image, question, answer}; None: --prompt_text about every picture",
    )
    parser.add_argument("--prompt_text", default="Describe the image.", help="question")
    parser.add_argument(
        "--use_answers",
        action="store_true",
        help="measure the answers of --question_file or --messages by teacher forcing instead of"
        " generating",
    )
    parser.add_argument(
        "--max_new_tokens", type=cli.positive, default=32, help="most tokens of an answer"
    )
    parser.add_argument(
        "--layers",
        type=cli.count,
        nargs="+",
        default=None,
        help="decoder layers up to which relevancy is gathered; None: all",
    )
    parser.add_argument("--no_tower", action="store_true", help="stop at the vision tokens")
    parser.add_argument(
        "--memory",
        type=cli.whole(1, 2**20),
        default=128,
        help="MiB of gradients and maps that are held at once",
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
    cli.check_chat(parser, args, ["image_dir"], ["question_file"])
    if args.use_answers and not (args.question_file or args.messages):
        parser.error("--use_answers needs --question_file or --messages")
    return args


def read_samples(args: argparse.Namespace) -> list[Sample]:
    """The chats that are given, else a Sample per question of the list, or per picture of the
    folder."""
    if of_chats := chats.given_samples(args, args.image_dir):
        return of_chats[: args.max_images]
    if args.question_file:
        return read_questions(args.question_file, args.image_dir)[: args.max_images]
    return samples_of(args.image_dir, args.prompt_text, args.max_images)


def chosen_layers(args: argparse.Namespace, depth: int) -> list[int]:
    """--layers of a model with so many, ascending; UsageError for one that it lacks."""
    layers = sorted(set(args.layers)) if args.layers else list(range(depth))
    if not 0 <= layers[0] <= layers[-1] < depth:
        raise cli.UsageError(
            f"--layers {layers}: {args.model_path} has {depth} layers, counted from 0"
        )
    return layers


def make_worker(args: argparse.Namespace) -> Worker:
    """The measurement of all pictures."""
    samples = read_samples(args)
    from vlmdiag.model.prompts import chat_for, prompt_for
    from vlmdiag.relevancy.maps import make_process

    vlm = load_from_args(args)
    vlm.need("decoder-only", "every-layer")
    layers = chosen_layers(args, len(vlm.parts.layers))
    settings = {name: getattr(args, name) for name in SETTINGS}
    settings["prompt"] = prompt_for(vlm, args.prompt_text)[0]
    if samples[0].chat is not None:
        settings["prompt"] = chat_for(vlm, samples[0].chat).text
    settings["layers"] = layers
    settings["questions"] = Path(args.question_file).name if args.question_file else None
    settings |= chats.settings_of(args)
    free = {"image_folder": args.image_dir, "memory": args.memory}
    process = make_process(
        vlm, layers, args.max_new_tokens, args.use_answers, not args.no_tower, args.memory * 2**20
    )
    return worker_for(
        args, vlm, EXPERIMENT, samples, with_pictures, process, settings, free, progress="pictures"
    )


def finish(args: argparse.Namespace, outcome: Outcome) -> None:
    """Say what draws the maps."""
    command = ["python", "diagnostic_tools/viz_relevancy.py", "--run_dir", str(outcome.run.path)]
    command += ["--image_dir", args.image_dir] if args.image_dir else []
    print(f"{outcome.run.path}: figures by {shlex.join(command)}")


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    return run_worker(args, make_worker, finish)


if __name__ == "__main__":
    cli.run(main)

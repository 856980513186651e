"""The ablation experiment on questions: does the model still complete "It is a" with the object's
name?

    python scripts/ablation_experiment_curate.py --model_path checkpoints/tiny-llava \\
        --coco_root data/shapes --question_file data/shapes/clean_questions.json \\
        --mean_tensor runs/mean_vector/tiny-llava/mean_vector.pt

Each item is one question of --question_file about one object, asked as "<question>" with the
answer's beginning "It is a" given. Conditions as in ablation_experiment.py; integrated gradients of
the first token of the right name. A result holds whether the completion names the object (whole
words), the likeliest next token, and the log-probabilities of the name's first token and of the
whole name. arXiv 2410.07149, table 1, VQA.

Runs land in <out_root>/ablation_vqa/<model>[__<run_name>]/; an interrupted run goes on by the same
command."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import add_model_arguments, load_from_args
from vlmdiag import cli
from vlmdiag.interp import targets
from vlmdiag.interp.flags import ABLATION, ablation_of, add_ablation_arguments, check_replacement
from vlmdiag.runs.experiment import Outcome, Worker, run_worker, worker_for

if TYPE_CHECKING:
    from vlmdiag.runs.rundirs import Run

EXPERIMENT = "ablation_vqa"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    targets.add_arguments(parser)
    add_model_arguments(parser, path=False)
    add_ablation_arguments(parser)
    targets.add_questions_argument(parser)
    parser.add_argument(
        "--max_new_tokens", type=cli.positive, default=8, help="most tokens of an answer"
    )
    return parser.parse_args(argv)


def published_form(run: Run) -> dict[str, Any]:
    """By item id: baseline and experiments, each with is_correct, generated_token and its
    probability, correct_token and its probability."""
    content = {}
    for id in run.ids():
        record = run.record(id)
        experiments = {}
        for name, results in record["conditions"].items():
            result = results["vqa"]
            experiments[published_name(name)] = {
                "is_correct": result["correct"],
                "generated_token": result["generated_token"],
                "generated_token_prob": result["generated_token_prob"],
                "correct_token": record["answer"],
                "correct_token_prob": math.exp(result["logprob_first_token"]),
            }
        content[id] = {"baseline": experiments.pop("baseline"), "experiments": experiments}
    return content


def published_name(name: str) -> str:
    """A condition's name in the published results."""
    fixed = {
        "none": "baseline",
        "all": "image_ablation",
        "register": "register_ablation",
        "patch_0": "patch_ablation",
        "patch_1": "patch_plus_one_ablation",
        "patch_2": "patch_plus_two_ablation",
    }
    kind, _, size = name.partition("_")
    return fixed.get(name) or f"{kind}_ablation_{size}"


def make_worker(args: argparse.Namespace) -> Worker:
    """The measurement of all questions."""
    items = targets.read_curated_targets(args)
    check_replacement(args)
    from vlmdiag.interp.ablation import START, make_curated_process

    vlm = targets.load_vlm(args, load_from_args)
    ablation = ablation_of(vlm, args)
    settings = targets.settings_of(args, ABLATION)
    settings["replacement"] = ablation.replacement.kind
    settings["mean_provenance"] = ablation.replacement.provenance
    settings["questions"] = Path(args.question_file).name
    settings["start"] = START
    return worker_for(
        args,
        vlm,
        EXPERIMENT,
        items,
        targets.load,
        make_curated_process(vlm, ablation),
        settings,
        targets.free_of(args),
        progress="questions",
    )


def finish(args: argparse.Namespace, outcome: Outcome) -> None:
    """--results_file."""
    if args.results_file:
        targets.write_results(args.results_file, published_form(outcome.run))


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    return run_worker(args, make_worker, finish)


if __name__ == "__main__":
    cli.run(main)

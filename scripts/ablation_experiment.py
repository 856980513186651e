"""Where does the model keep what it knows of an object? Vision tokens are replaced before the
decoder reads them, and the object is asked for again.

    python scripts/ablation_experiment.py --model_path checkpoints/tiny-llava \\
        --coco_root data/shapes --mean_tensor runs/mean_vector/tiny-llava/mean_vector.pt

Two settings: generative ("Describe this image.": is the object named?) and polling ("Is there a
<object> in this image?": Yes?). Pictures pass the object filter, are named unablated, and not when
noise covers the object. Conditions, one result each: register tokens (norm above mean + 2 standard
deviations); the object's tokens with 0 to 2 buffers; the tokens with the largest integrated
gradients; random tokens, of given numbers and as many as the object has; compact random pieces;
all. arXiv 2410.07149 (Towards Interpreting Visual Information Processing in VLMs), table 1.

Runs land in <out_root>/ablation/<model>[__<run_name>]/; an interrupted run goes on by the same
command. summarize_results.py makes the table. On tiny-llava see README.md."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from common import add_model_arguments, load_from_args
from vlmdiag import cli
from vlmdiag.interp import targets
from vlmdiag.interp.flags import ABLATION, ablation_of, add_ablation_arguments, check_replacement
from vlmdiag.runs.experiment import Outcome, Worker, run_worker, worker_for

if TYPE_CHECKING:
    from vlmdiag.runs.rundirs import Run

EXPERIMENT = "ablation"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    targets.add_arguments(parser)
    add_model_arguments(parser, path=False)
    add_ablation_arguments(parser)
    parser.add_argument(
        "--max_new_tokens", type=cli.positive, default=200, help="most tokens of an answer"
    )
    parser.add_argument(
        "--no_noise_filter",
        action="store_true",
        help="also pictures whose object is named although noise covers it",
    )
    return parser.parse_args(argv)


def published_form(run: Run) -> dict[str, Any]:
    """The run in the form of the published results file: by image id, each condition with
    generative, polling, description, and the token positions."""
    is_zero = run.meta["settings"]["replacement"] == "zeros"
    content: dict[str, Any] = {"cfg": {"zero_ablation": is_zero}}
    for id in run.ids():
        record = run.record(id)
        if not record["eligible"]:
            continue
        arrays = run.arrays(id)
        of_image: dict[str, Any] = {}
        for name, results in record["conditions"].items():
            of_image[published_name(name)] = {
                "generative": results["generative"]["correct"],
                "polling": results["polling"]["correct"],
                "description": results["generative"]["text"],
            }
        positions = arrays["vision_positions"]
        indices = {
            published_name(name.removeprefix("tokens_")): positions[tokens].tolist()
            for name, tokens in arrays.items()
            if name.startswith("tokens_")
        }
        content[str(record["image_id"])] = of_image | {"indices": indices}
    return content


def published_name(name: str) -> str:
    """A condition's name in the published results."""
    fixed = {"none": "no_ablation", "all": "image_ablation", "register": "register_ablation"}
    kind, _, size = name.partition("_")
    return fixed.get(name) or f"{kind}_ablation_{size}"


def make_worker(args: argparse.Namespace) -> Worker:
    """The measurement of all pictures."""
    items = targets.read_targets(args)
    check_replacement(args)
    from vlmdiag.interp.ablation import make_process

    vlm = targets.load_vlm(args, load_from_args)
    ablation = ablation_of(vlm, args)
    settings = targets.settings_of(args, (*ABLATION, "no_noise_filter"))
    settings["replacement"] = ablation.replacement.kind
    settings["mean_provenance"] = ablation.replacement.provenance
    return worker_for(
        args,
        vlm,
        EXPERIMENT,
        items,
        targets.load,
        make_process(vlm, ablation),
        settings,
        targets.free_of(args),
        progress="pictures",
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

"""How does what the model knows of an object reach its answer? Attention between two groups of
tokens is cut in a window of layers.

    python scripts/attention_experiment_curate.py --model_path checkpoints/tiny-llava \\
        --coco_root data/shapes --question_file data/shapes/clean_questions.json

Questions and criteria are those of ablation_experiment_curate.py. Default are the paper's 36
knockouts: object, object + 1 and + 2 buffers, and the other image tokens -> last token; object + 1
buffer, and the image without its last row -> last row of the image; each in 6 windows. --pairs and
--windows take any others. A query row that is cut renormalises over what is left. arXiv 2410.07149,
table 2.

Rows before the first blocked query are the same in every layer, so the cached keys and values of
the unblocked pass are used again; only later rows run, all knockouts of a picture in one pass
(vlmdiag/model/prefix.py, branches()). Runs land in <out_root>/knockout/<model>[__<run_name>]/; an
interrupted run goes on by the same command."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import add_model_arguments, load_from_args
from vlmdiag import cli
from vlmdiag.interp import targets
from vlmdiag.interp.knockout_pairs import (
    PAPER_PAIRS,
    PAPER_WINDOWS,
    PUBLISHED,
    layer_windows,
    parse_pair,
)
from vlmdiag.runs.experiment import Outcome, Worker, run_worker, worker_for

if TYPE_CHECKING:
    from vlmdiag.runs.rundirs import Run

EXPERIMENT = "knockout"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    targets.add_arguments(parser)
    add_model_arguments(parser, path=False)
    targets.add_questions_argument(parser)
    parser.add_argument(
        "--pairs",
        nargs="+",
        type=parse_pair,
        default=list(PAPER_PAIRS),
        help="FROM:TO, keys that are hidden and queries they are hidden from",
    )
    parser.add_argument(
        "--windows",
        nargs="+",
        default=list(PAPER_WINDOWS),
        help="names, a-b, single, sliding:width[:stride]",
    )
    return parser.parse_args(argv)


def published_form(run: Run) -> dict[str, Any]:
    """By item id: baseline and attn_block_results, under the published names where a knockout has
    one."""
    content = {}
    for id in run.ids():
        record = run.record(id)
        results = {}
        for key, condition in record["conditions"].items():
            name = "baseline" if key == "none" else published_name(key)
            results[name] = {
                "is_correct": condition["vqa"]["correct"],
                "generated_token": condition["vqa"]["generated_token"],
                "generated_token_prob": condition["vqa"]["generated_token_prob"],
                "correct_token": record["answer"],
                "correct_token_prob": math.exp(condition["vqa"]["logprob_first_token"]),
            }
        content[id] = {"baseline": results.pop("baseline"), "attn_block_results": results}
    return content


def published_name(key: str) -> str:
    """The name of a knockout 'from:to:window' in the published results."""
    source, target, window = key.split(":", 2)
    prefix = PUBLISHED.get((source, target), f"{source}_to_{target}")
    return f"{prefix}_{'ALL_LAYERS' if window == 'all' else window.upper()}"


def make_worker(args: argparse.Namespace) -> Worker:
    """The measurement of all questions."""
    items = targets.read_curated_targets(args)
    from vlmdiag.interp.ablation import START
    from vlmdiag.interp.knockout import make_process

    vlm = targets.load_vlm(args, load_from_args)
    windows = layer_windows(args.windows, len(vlm.parts.layers))
    settings = targets.settings_of(args)
    settings["pairs"] = [":".join(pair) for pair in args.pairs]
    settings["windows"] = {name: list(window) for name, window in windows.items()}
    settings["questions"] = Path(args.question_file).name
    settings["start"] = START
    return worker_for(
        args,
        vlm,
        EXPERIMENT,
        items,
        targets.load,
        make_process(vlm, args.pairs, args.windows, args.threshold, args.paper_compat),
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

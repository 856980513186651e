"""How much does a model's answer depend on where its vision tokens stand? Position sensitivity
index over a list of questions.

    PSI = (accuracy - accuracy with shuffled vision tokens) / accuracy
0: the vision tokens are a bag of features, their order says nothing; 1: every right answer needed
it. Beyond Semantics (arXiv 2503.17349), table 2.

    python diagnostic_tools/psi.py --model_path checkpoints/tiny-llava \\
        --questions data/shapes/questions.json --num_permutations 5
    python diagnostic_tools/psi.py --model_path checkpoints/tiny-llava --analyze_only

The tokens that stand for a place in the picture exchange their contents before the decoder reads
them, at unchanged positions; each of --num_permutations shuffles depends on (--seed, item id, its
number) only. Decoding is greedy. Runs land in <out_root>/psi/<model>[__<run_name>]/; an interrupted
run goes on by the same command. At the end analysis/psi.json and psi.png/.pdf: accuracy per kind of
question with bootstrap 95 % intervals over images, PSI with a paired one; of several models also
compare_psi.png/.pdf beside the first run. Read it by kind: a
question about a place can lose only what lies above guessing (PSI at most about 0.5 with two
answers), and where the tower itself knows the place of what it sees, as in the tiny models, it
loses nothing. The paper has 1.1 % on VQAv2 and 41 % on questions about places in drawn scenes for
LLaVA-1.5, 61 % for normWmean.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from common import add_model_arguments, load_from_args
from vlmdiag import cli
from vlmdiag.cli import UsageError
from vlmdiag.pictures.questions import read_questions
from vlmdiag.pictures.samples import with_picture
from vlmdiag.runs import rundirs
from vlmdiag.runs.experiment import Outcome, Worker, run_worker, worker_for

if TYPE_CHECKING:
    from vlmdiag.pictures.samples import Sample

EXPERIMENT = "psi"
QUESTIONS = Path(__file__).resolve().parents[1] / "data" / "shapes" / "questions.json"
# flags that the numbers depend on
SETTINGS = ("num_permutations", "seed", "vision_scale", "max_new_tokens", "image_aspect")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--model_path",
        action="append",
        required=True,
        help="folder or hub id; may be given several times",
    )
    parser.add_argument(
        "--question_file",
        "--questions",
        default=str(QUESTIONS),
        help="JSON list of {image_id, image, question, answer, kind}",
    )
    parser.add_argument(
        "--num_permutations",
        type=cli.whole(1, 10**6),
        default=5,
        help="shuffles of the vision tokens per question",
    )
    parser.add_argument("--seed", type=cli.seed, default=0, help="of the shuffles")
    parser.add_argument(
        "--vision_scale",
        type=cli.scale,
        default=1.0,
        help="scale the vision embeddings (dose-response)",
    )
    parser.add_argument(
        "--max_images",
        "--max_questions",
        type=cli.positive,
        default=None,
        help="only the first so many",
    )
    parser.add_argument(
        "--max_new_tokens", type=cli.positive, default=16, help="most tokens of an answer"
    )
    parser.add_argument("--batch_size", type=cli.positive, default=1, help="prompts in a batch")
    cli.add_run_arguments(parser, "batch", "; then --analyze_only")
    parser.add_argument(
        "--analyze_only",
        action="store_true",
        help="no model: analyse what the run directories hold",
    )
    add_model_arguments(parser, path=False)
    args = parser.parse_args(argv)
    if args.overwrite and (args.analyze_only or args.shard != (0, 1)):
        advice = (
            "with --shard start again with --overwrite --max_images 1 first, with --analyze_only"
            " leave it out"
        )
        raise UsageError(f"--overwrite removes finished results: {advice}")
    return args


def read_list(args: argparse.Namespace) -> list[Sample]:
    """Samples of --question_file, each with its answer."""
    if args.question_file == str(QUESTIONS) and not QUESTIONS.exists():
        raise UsageError(
            f"{QUESTIONS} is missing: make it with python data/make_shapes.py, or give"
            " --question_file"
        )
    samples = read_questions(args.question_file)[: args.max_images]
    without = [sample.id for sample in samples if not sample.answer]
    if without:
        raise UsageError(
            f"{args.question_file}: {len(without)} questions have no answer to compare with, such"
            f" as {without[0]}"
        )
    return samples


def make_worker(args: argparse.Namespace) -> Worker:
    """The measurement of the model --model_path."""
    from vlmdiag.beyond_semantics.shuffled_answers import make_process

    samples = read_list(args)
    vlm = load_from_args(args, args.model_path)
    vlm.need("decoder-only", "grid")
    settings = {"questions": "/".join(Path(args.question_file).parts[-2:])}
    settings |= {name: getattr(args, name) for name in SETTINGS}
    free = {
        "questions_file": args.question_file,
        "max_questions": args.max_images,
        "batch_size": args.batch_size,
    }
    process = make_process(
        vlm, args.num_permutations, args.seed, args.max_new_tokens, args.vision_scale
    )
    return worker_for(
        args,
        vlm,
        EXPERIMENT,
        samples,
        with_picture,
        process,
        settings,
        free,
        batch_size=args.batch_size,
        progress="questions",
    )


def finish(args: argparse.Namespace, outcome: Outcome) -> None:
    """Analyse the run, unless it is a shard."""
    from vlmdiag.beyond_semantics.psi_report import analyse

    if args.shard != (0, 1):
        print(
            f"shard {args.shard[0]} of {args.shard[1]} is done; after the last one: the same"
            " command with --analyze_only in place of --shard"
        )
    elif outcome.run.ids():
        analyse(outcome.run)


def run_of(args: argparse.Namespace) -> rundirs.Run:
    """The run of the model --model_path."""
    where = rundirs.run_path(args.out_root, args.model_path, EXPERIMENT, args.run_name)
    return rundirs.read_run(where, EXPERIMENT)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    from vlmdiag.beyond_semantics import psi_report

    models = [cli.changed(args, model_path=path) for path in args.model_path]
    code = 0
    for model in models:
        if args.analyze_only:
            psi_report.analyse(run_of(model))
        else:
            code = max(code, run_worker(model, make_worker, finish))
    if len(models) > 1 and args.shard == (0, 1):
        runs = [run_of(model) for model in models]
        if all(run.ids() for run in runs):
            psi_report.compare(runs)
    return code


if __name__ == "__main__":
    cli.run(main)

"""How much does the model look at the picture while it answers, criticises its answer and revises
it?

    python visualize/run_volcano_with_image_attention.py --model-path checkpoints/tiny-llava \\
        --input data/shapes/mmhal_shapes.json \\
        --output-dir outputs/volcano --log runs/volcano.json --visualize-avg-attention-all

Initial answer; then up to --max_iterations times critique, revision and the model's own decision
between current and revised answer (A or B). Each step is a prompt of its own with the picture.
Measured is a[t, l, h, p], the attention of the step that produced token t to vision token p: per
patch the mean of the --hidden-top-k largest over layers, then over heads (top_k_mean), the mean and
the maximum over both. Volcano (arXiv 2311.07362), section 5 and algorithm 1.

The run directory <out_root>/volcano/<model>[__<run_name>]/ holds texts, decisions and the reduced
attention of the initial answer and of the last accepted critique and revision (where none was
accepted: the last ones); an interrupted run goes on by the same command. --log: all texts as one
JSON list. --visualize-avg-attention-all: the published figure, maps averaged over the instances
that the model says it improved. --output-visualization-tensors: <output-dir>/<idx>_<image_id>/ for
text_attention_heatmap.py and image_attention_heatmap.py. analyze_attention_by_stage.py compares the
stages, also without the published figure's length bias."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from common import add_model_arguments, load_from_args
from vlmdiag import cli
from vlmdiag.cli import UsageError
from vlmdiag.pictures.given import with_answers
from vlmdiag.pictures.questions import read_mmhal
from vlmdiag.pictures.samples import Sample, load_image
from vlmdiag.runs import rundirs
from vlmdiag.runs.experiment import Outcome, Worker, run_worker, worker_for

if TYPE_CHECKING:
    from PIL.Image import Image

EXPERIMENT = "volcano"
POOLS = ("top_k_mean", "mean", "max")
# flags that the numbers depend on
# flags whose runs have names of their own
OWN_RUN = {
    "sample": "sample",
    "engineered_prompt": "engineered",
    "output_visualization_tensors": "tensors",
    "full_tensors": "full",
}
SETTINGS = (
    "sample",
    "temperature",
    "seed",
    "engineered_prompt",
    "max_iterations",
    "order",
    "max_new_tokens",
    "hidden_top_k",
    "paper_compat",
    "image_aspect",
    "output_visualization_tensors",
    "full_tensors",
)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument("--model_path", default="kaist-ai/volcano-7b", help="folder or hub id")
    parser.add_argument(
        "--input",
        required=True,
        help="JSON list of {image_id, image_src, question, gold_answer or gt_answer}",
    )
    parser.add_argument(
        "--image_root", default=None, help="folder of local pictures; None: the list's"
    )
    parser.add_argument(
        "--out_dir",
        "--output_dir",
        required=True,
        help="figures, and the folders of --output-visualization-tensors",
    )
    parser.add_argument(
        "--log", default="./logs.json", help="all texts as one JSON list; '' for none"
    )
    parser.add_argument(
        "--instance_idx", default=None, help="comma list of positions in the list, from 0"
    )
    parser.add_argument(
        "--max_images", type=cli.positive, default=None, help="only the first so many instances"
    )
    parser.add_argument(
        "--sample",
        action="store_true",
        help="sample initial answer, critique and revision; the decision is always greedy",
    )
    parser.add_argument("--temperature", type=cli.temperature, default=0.5, help="of --sample")
    parser.add_argument("--seed", type=cli.seed, default=0, help="of sampling and --order random")
    parser.add_argument(
        "--engineered_prompt",
        action="store_true",
        help="critique and revision prompts that forbid the words 'reference answer'",
    )
    parser.add_argument(
        "--max_iterations",
        type=cli.whole(1, 1000),
        default=3,
        help="most rounds of critique and revision",
    )
    parser.add_argument(
        "--order",
        choices=["fixed", "random"],
        default="fixed",
        help="fixed: A is the current answer; random: by a seeded coin, as in the paper",
    )
    parser.add_argument(
        "--answers",
        default=None,
        help=(
            "JSON list of {image_id, answer}: initial answers that are given, read by teacher"
            " forcing"
        ),
    )
    parser.add_argument(
        "--max_new_tokens", type=cli.positive, default=1024, help="most tokens of an answer"
    )
    parser.add_argument(
        "--visualize_avg_attention_all",
        action="store_true",
        help="draw the maps averaged over instances",
    )
    parser.add_argument(
        "--output_visualization_tensors",
        action="store_true",
        help="write what the heatmap scripts read",
    )
    parser.add_argument(
        "--full_tensors",
        action="store_true",
        help="also the attention of every layer and head, (T, L, H, P)",
    )
    parser.add_argument(
        "--pool_method",
        choices=POOLS,
        default="top_k_mean",
        help="over layers and heads, for the averaged maps",
    )
    parser.add_argument(
        "--hidden_top_k",
        type=cli.positive,
        default=3,
        help="k of the largest over layers, and over heads",
    )
    parser.add_argument(
        "--paper_compat",
        action="store_true",
        help="the published reading of a decision: any letter b accepts",
    )
    parser.add_argument(
        "--allow_private",
        action="store_true",
        help="download from private and loopback addresses too",
    )
    parser.add_argument(
        "--download_dir", default="data/mmhal/downloads", help="where downloaded pictures are kept"
    )
    parser.add_argument("--batch_size", type=cli.positive, default=4, help="instances in a batch")
    cli.add_run_arguments(parser)
    add_model_arguments(parser, path=False)
    return parser.parse_args(argv)


def read_instances(args: argparse.Namespace) -> list[Sample]:
    """Samples of the list that --instance-idx names, or all; id '<position>_<image id>', extra
    'index'."""
    if not Path(args.input).exists():
        raise UsageError(
            f"--input {args.input}: no such file; MMHal-Bench: bash data/download_mmhal.sh,"
            " questions about drawn scenes: python data/make_shapes.py"
        )
    samples = read_mmhal(args.input, args.image_root)
    positions = list(range(len(samples)))
    if args.instance_idx is not None:
        try:
            positions = sorted({int(position) for position in args.instance_idx.split(",")})
        except ValueError:
            raise UsageError(
                f"--instance-idx {args.instance_idx}: a comma list of positions was wanted, such as"
                " 3,88"
            ) from None
        if not positions or positions[0] < 0 or positions[-1] >= len(samples):
            raise UsageError(
                f"--instance-idx {args.instance_idx}: {args.input} has {len(samples)} instances,"
                " counted from 0"
            )
    instances = []
    for position in positions[: args.max_images]:
        sample = samples[position]
        extra = sample.extra | {"index": position}
        instances.append(replace(sample, id=f"{position}_{sample.extra['image_id']}", extra=extra))
    return instances


def run_of(args: argparse.Namespace) -> Path:
    """The run directory. Greedy answers without tensors have the model's name alone; sampled ones,
    engineered prompts and tensors have runs of their own names, so that figure 4 can be made after
    figure 5. A run of the plain name that was made with the same flags goes on."""
    plain = rundirs.run_path(args.out_root, args.model_path, EXPERIMENT, args.run_name)
    kinds = [name for flag, name in OWN_RUN.items() if getattr(args, flag)]
    if not kinds or args.run_name or is_made_with(plain, args):
        return plain
    return rundirs.run_path(args.out_root, args.model_path, EXPERIMENT, "-".join(kinds))


def is_made_with(path: Path, args: argparse.Namespace) -> bool:
    """Whether a run is there and has the same flags of OWN_RUN."""
    if not (path / "meta.json").is_file():
        return False
    settings = rundirs.read_run(path, EXPERIMENT).meta["settings"]
    return all(settings.get(flag) == getattr(args, flag) for flag in OWN_RUN)


def make_worker(args: argparse.Namespace) -> Worker:
    """The conversations about all instances."""
    instances = read_instances(args)
    if args.answers is not None:
        instances = with_answers(instances, "--answers", args.answers, "answer")
    from vlmdiag.volcano import records
    from vlmdiag.volcano.downloads import picture_of

    vlm = load_from_args(args)
    whole = ["every-layer"] if args.output_visualization_tensors else []
    vlm.need("decoder-only", *whole)
    if args.hidden_top_k > len(vlm.parts.attending):
        raise UsageError(
            f"--hidden-top-k {args.hidden_top_k}: {args.model_path} has {len(vlm.parts.attending)}"
            " layers"
        )

    def load(sample: Sample) -> tuple[Sample, Image]:
        path = picture_of(
            sample.extra["image_src"],
            args.image_root or Path(args.input).parent,
            args.download_dir,
            allow_private=args.allow_private,
        )
        return replace(sample, image=path), load_image(path)

    settings = {"input": Path(args.input).name, "answers": None}
    if args.answers is not None:
        settings["answers"] = Path(args.answers).name
    settings |= {name: getattr(args, name) for name in SETTINGS}
    return worker_for(
        args,
        vlm,
        EXPERIMENT,
        instances,
        load,
        records.make_process(args, vlm),
        settings,
        {"input_file": args.input, "batch_size": args.batch_size},
        path=run_of(args),
        batch_size=args.batch_size,
        progress="instances",
        facts={"vision_encoder": records.vision_encoder_of(vlm)},
    )


def finish(args: argparse.Namespace, outcome: Outcome) -> None:
    """What the flags ask for beside the run directory."""
    from vlmdiag.figures import plots
    from vlmdiag.volcano import figures, records

    run = outcome.run
    done = records.done_records(run, read_instances(args))
    if args.output_visualization_tensors:
        vision_encoder = outcome.facts["vision_encoder"]
        for sample_id in done:
            records.write_tensors(Path(args.out_dir), run, sample_id, vision_encoder)
        print(
            f"wrote visualization_tensors.npz and tokens.json of {len(done)} instances to"
            f" {args.out_dir}"
        )
    records.print_counts(list(done.values()))
    if args.visualize_avg_attention_all:
        means, count = figures.average_maps(run, done, args.pool_method)
        print(
            f"{count} of {len(done)} instances have an accepted revision and a regular grid of one"
            " shape"
        )
        if count:
            figure = figures.draw_average(run.label, means, count, args.pool_method)
            name = "sample" if args.sample else "greedy"
            if args.engineered_prompt:
                name += "_engineered"
            path = Path(args.out_dir) / f"{name}_image_attention_{args.pool_method}"
            plots.save(figure, path, run.meta["settings"] | {"instances": count})
        else:
            print("so there is no averaged map to draw")
    if args.log:
        records.write_log(args.log, list(done.values()))
        print(f"wrote {args.log}")


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    return run_worker(args, make_worker, finish)


if __name__ == "__main__":
    cli.run(main)

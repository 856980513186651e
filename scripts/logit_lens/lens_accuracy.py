"""How often is the object's name the likeliest token on the object's own patches, layer by layer?

    python scripts/logit_lens/lens_accuracy.py --model_path checkpoints/tiny-llava \\
        --coco_root data/shapes
    python scripts/logit_lens/lens_accuracy.py --model_path checkpoints/tiny-llava --analyze_only

For each object (pictures pass the object filter) and each hidden state (0: embeddings, l: after
layer l): share of the object's vision tokens whose top-1 token of the logit lens is a word of one
of its names, or the first piece, of three letters or more, of a word that is no single token.
Beside it the share under the names of another picture's object (shuffled), and the object's own
names on the picture's other tokens. The paper takes the best layer of each picture, the luckiest of
L + 1 numbers; here that figure stands beside the best layer over all pictures, and that layer
chosen on the other half of them (cross-fitted). arXiv 2410.07149 has 23.7 % on LLaVA-1.5 by its
choice, at layer 25.7 of 33; docs/studies/llava_interp.md, section 2.3.

Runs land in <out_root>/lens_accuracy/<model>[__<run_name>]/, analysis/lens_accuracy.json, .csv,
.png, .pdf among them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from common import add_model_arguments, load_from_args
from vlmdiag import cli
from vlmdiag.interp import targets
from vlmdiag.runs import rundirs
from vlmdiag.runs.experiment import Outcome, Worker, run_worker, worker_for

if TYPE_CHECKING:
    from vlmdiag.figures.stats import Interval
    from vlmdiag.runs.rundirs import Run

EXPERIMENT = "lens_accuracy"
SCHEMA = 2  # of the JSON: 1 called the embeddings layer 0, and the output of layer l layer l + 1


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    targets.add_arguments(parser)
    add_model_arguments(parser, path=False)
    parser.add_argument("--batch_size", type=cli.positive, default=4, help="prompts in a batch")
    parser.add_argument(
        "--analyze_only", action="store_true", help="no model: analyse what the run directory holds"
    )
    return parser.parse_args(argv)


def _plain(interval: Interval) -> dict[str, Any]:
    """An interval as JSON has it."""
    return {name: numbers.tolist() for name, numbers in interval._asdict().items()}


def analyse(run: Run, seed: int) -> None:
    """Print the table; write analysis/lens_accuracy.json, .csv, .png, .pdf."""
    from vlmdiag.figures import plots
    from vlmdiag.figures.layers import mean_state_name, state_tick
    from vlmdiag.interp.figures import draw_lens_accuracy
    from vlmdiag.interp.lens_curves import curves_of

    curves, chosen = curves_of(run, seed)
    objects, states = len(run.ids()), len(curves["own"].mean)
    print(
        f"{run.label}: {objects} objects; share of object patches whose top-1 token names the"
        " object, mean [95 % interval over pictures]"
    )
    for name, (interval, state) in chosen.items():
        label = f"best layer {name.replace('_', ' ')}"
        print(
            f"{label:28s}{interval.mean:.3f} [{interval.low:.3f}, {interval.high:.3f}] "
            f" {mean_state_name(state)}"
        )
    first = curves["own"]
    label = "embeddings"
    print(f"{label:28s}{first.mean[0]:.3f} [{first.low[0]:.3f}, {first.high[0]:.3f}]")
    content = {
        "schema": SCHEMA,
        "settings": run.meta["settings"],
        "objects": objects,
        "by_hidden_state": {name: _plain(interval) for name, interval in curves.items()},
        "best_layer": {
            name: {"hidden_state": state, "layer": state - 1} | _plain(interval)
            for name, (interval, state) in chosen.items()
        },
    }
    folder = run.path / "analysis"
    rundirs.write_json(folder / "lens_accuracy.json", content)
    columns: dict[str, Any] = {
        "hidden_state": range(states),
        "layer": [state_tick(state) for state in range(states)],
    }
    for name, interval in curves.items():
        for ending, numbers in zip(("", "_low", "_high", "_n"), interval):
            columns[f"{name}{ending}"] = numbers
    plots.save_csv(folder / "lens_accuracy.csv", columns)
    figure = draw_lens_accuracy(run.label, curves, chosen)
    plots.save(figure, folder / "lens_accuracy", run.meta["settings"])


def make_worker(args: argparse.Namespace) -> Worker:
    """The measurement of all pictures."""
    items = targets.read_targets(args)
    from vlmdiag.interp.lens_measures import make_accuracy_process

    vlm = targets.load_vlm(args, load_from_args)
    return worker_for(
        args,
        vlm,
        EXPERIMENT,
        items,
        targets.load,
        make_accuracy_process(vlm, args.threshold),
        targets.settings_of(args),
        targets.free_of(args),
        batch_size=args.batch_size,
        progress="pictures",
    )


def finish(args: argparse.Namespace, outcome: Outcome) -> None:
    """Analyse the run, unless it is a shard."""
    if args.shard == (0, 1):
        analyse(outcome.run, args.seed)
    else:
        print(
            f"shard {args.shard[0]} of {args.shard[1]} is done; after the last one: the same"
            " command with --analyze_only in place of --shard"
        )


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    if args.analyze_only:
        path = rundirs.run_path(args.out_root, args.model_path, EXPERIMENT, args.run_name)
        analyse(rundirs.read_run(path, EXPERIMENT), args.seed)
        return 0
    return run_worker(args, make_worker, finish)


if __name__ == "__main__":
    cli.run(main)

"""What can a model do that was trained on our scenes? Accuracy by kind of question on scenes of
another seed, the logit lens by layer, and the model card from both.

    python checkpoints/evaluate_tiny.py checkpoints/tiny-llava checkpoints/tiny-llava-normWmean
    python checkpoints/evaluate_tiny.py checkpoints/smol-llava-135m --dtype bfloat16 \\
        --card checkpoints/smol-llava/README.md

Nothing is filtered: relations are asked for every ordered pair of objects whose centres are at
least 12 % apart along the asked axis (5 % is reported too), so both answers come equally often;
half of the absent objects share colour or shape with one that is there. An answer counts if the
first of the possible words in it is the right one; a caption if it names every object with colour
and shape and no other. Intervals are Wilson's, 95 %. Lens: share of patches well inside an object
whose top-1 token, by final norm and LM head, is the object's colour or shape (the first piece of a
word that is no single token). A card that is there keeps what it says before its tables.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vlmdiag import cli

if TYPE_CHECKING:
    from vlmdiag.scenes.evaluation import Evaluation

# accuracy to reach, by group of questions
BARS = {
    "yes_no": 0.95,
    "color": 0.95,
    "shape": 0.95,
    "left_right": 0.9,
    "above_below": 0.9,
    "far_close, consistent": 0.9,
    "caption": 0.8,
}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument("model_path", nargs="+", help="folders of models")
    parser.add_argument(
        "--scenes",
        type=cli.positive,
        default=150,
        help="floor scenes of two to four objects; a third as many corridors",
    )
    parser.add_argument(
        "--seed",
        type=cli.seed,
        default=1000,
        help="scenes that training never saw: its seeds are named differently",
    )
    parser.add_argument(
        "--batch_size", type=cli.positive, default=48, help="questions about one picture"
    )
    parser.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16"],
        default="auto",
        help="type of the weights",
    )
    parser.add_argument(
        "--card", help="the file into which the tables go; None: README.md of the model's folder"
    )
    parser.add_argument("--no_card", action="store_true", help="print only")
    return parser.parse_args(argv)


TABLES = "`python checkpoints/evaluate_tiny.py`"  # how the part of a card begins that is measured


def head_of_card(card: Path, path: Path) -> list[str]:
    """The lines of a card before its tables; for a tiny model without a card what it is made of."""
    if card.exists():
        return card.read_text().split(TABLES)[0].rstrip().splitlines()
    config = json.loads((path / "config.json").read_text())
    num_bytes = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    lines = [
        f"# {path.name}",
        "",
        "A LLaVA model small enough for a laptop, trained from scratch on generated pictures by"
        " `checkpoints/train_tiny.py`; for tests and demonstrations.",
        "",
        f"{num_bytes / 2e6:.1f} M parameters in bfloat16, {config['image_seq_length']} vision"
        f" tokens, {config['text_config']['num_hidden_layers']} decoder layers.",
    ]
    norm = config.get("vision_embed_norm")
    if norm:
        layers = config["vision_feature_layer"]
        tower_layers = ""
        if isinstance(layers, list):
            tower_layers = f" on tower layers {layers} through the post layer norm"
        lines += [
            "",
            "Beyond Semantics variant: projector output RMS-normalised, clipped at"
            f" {norm['max_norm']:.3f} and scaled by {norm['scale']:.3f}{tower_layers}.",
        ]
    return lines


def tables(evaluation: Evaluation, dtype: str, args: argparse.Namespace) -> list[str]:
    """The lines of a card that are measured."""
    from vlmdiag.figures.stats import proportion_interval

    lines = [
        f"{TABLES} on {args.scenes} floor scenes and"
        f" {args.scenes // 3} corridors of seed {args.seed}, greedy, {dtype}:",
        "",
        "| question | n | accuracy | 95 % interval | to reach |",
        "|---|---|---|---|---|",
    ]
    for group, count in sorted(evaluation.asked.items()):
        right = evaluation.right[group]
        interval = proportion_interval(right, count)
        lines.append(
            f"| {group} | {count} | {right / count:.3f}"
            f" | {interval.low:.3f} to {interval.high:.3f} | {BARS.get(group, '')} |"
        )
    lines += [
        "",
        f"Logit lens on {evaluation.patches} patches inside objects (`Describe the image.`): top-1"
        " token is the object's",
        "",
        "| hidden state (0 = embeddings) | colour | shape | either |",
        "|---|---|---|---|",
    ]
    for index, shares in enumerate(evaluation.lens.tolist()):
        cells = " | ".join(f"{share:.3f}" for share in shares)
        lines.append(f"| {index} | {cells} |")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    from common import load_model
    from vlmdiag.scenes.evaluation import evaluate

    if args.card and len(args.model_path) > 1:
        raise cli.UsageError("--card takes the tables of one model")
    for path in args.model_path:
        vlm = load_model(path, dtype=args.dtype)
        dtype = str(vlm.model.dtype).removeprefix("torch.")
        evaluation = evaluate(vlm, args.scenes, args.seed, args.batch_size)
        measured = tables(evaluation, dtype, args)
        print("\n".join(measured))
        if not args.no_card:
            card = Path(args.card) if args.card else Path(path) / "README.md"
            head = head_of_card(card, Path(path))
            card.write_text("\n".join([*head, "", *measured]) + "\n")
    return 0


if __name__ == "__main__":
    cli.run(main)

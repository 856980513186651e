"""What can a tiny model do? Accuracy by kind of question on scenes of another seed, the logit lens
by layer, and the model card from both.

    python checkpoints/evaluate_tiny.py checkpoints/tiny-llava checkpoints/tiny-llava-normWmean
    checkpoints/tiny-llava-multilayerNorm

Nothing is filtered: relations are asked for every ordered pair of objects whose centres are at
least 12 % apart along the asked axis (5 % is reported too), so both answers come equally often;
half of the absent objects share colour or shape with one that is there. An answer counts if the
first of the possible words in it is the right one; a caption if it names every object with colour
and shape and no other. Intervals are Wilson's, 95 %. Lens: share of patches well inside an object
whose top-1 token, by final norm and LM head, is the object's colour or shape.
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
    parser.add_argument("model_path", nargs="+")
    parser.add_argument(
        "--scenes",
        type=int,
        default=150,
        help="floor scenes of two to four objects; a third as many corridors",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=1000,
        help="scenes that training never saw: its seeds are named differently",
    )
    parser.add_argument("--batch_size", type=int, default=48)
    parser.add_argument("--no_card", action="store_true", help="print only")
    return parser.parse_args(argv)


def description(path: Path) -> list[str]:
    """The first lines of a card: what the model is."""
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


def card(path: Path, evaluation: Evaluation, args: argparse.Namespace) -> str:
    """The model card as markdown."""
    from vlmdiag.figures.stats import wilson_interval

    lines = description(path)
    lines += [
        "",
        f"`python checkpoints/evaluate_tiny.py` on {args.scenes} floor scenes and"
        f" {args.scenes // 3} corridors of seed {args.seed}, greedy, float32:",
        "",
        "| question | n | accuracy | 95 % interval | to reach |",
        "|---|---|---|---|---|",
    ]
    for group, count in sorted(evaluation.asked.items()):
        right = evaluation.right[group]
        interval = wilson_interval(right, count)
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
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    from common import load_model
    from vlmdiag.scenes.evaluation import evaluate

    for path in args.model_path:
        vlm = load_model(path)
        text = card(Path(path), evaluate(vlm, args.scenes, args.seed, args.batch_size), args)
        print(text)
        if not args.no_card:
            (Path(path) / "README.md").write_text(text)
    return 0


if __name__ == "__main__":
    cli.run(main)

"""Flags of both ablation scripts. Kept free of torch."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from vlmdiag import cli
from vlmdiag.cli import UsageError
from vlmdiag.interp.conditions import SIZES

if TYPE_CHECKING:
    from vlmdiag.interp.ablation import Ablation
    from vlmdiag.types import VLM

# flags that the numbers of both scripts depend on
ABLATION = ("sizes", "draws", "gradient_steps", "max_new_tokens")


def add_ablation_arguments(parser: argparse.ArgumentParser) -> None:
    """What replaces tokens, and which sets of tokens are tried."""
    parser.add_argument(
        "--mean_tensor",
        default=None,
        help="mean vector (.pt) that replaces a token, see calculate_mean_vector.py",
    )
    parser.add_argument(
        "--replacement",
        choices=["mean", "zeros", "noise"],
        default="mean",
        help="what replaces a token",
    )
    parser.add_argument(
        "--zero_ablation", action="store_true", help="the same as --replacement zeros"
    )
    parser.add_argument(
        "--sizes",
        type=cli.count,
        nargs="*",
        default=list(SIZES),
        help="how many gradient and random tokens",
    )
    parser.add_argument(
        "--draws", type=cli.count, default=3, help="random and compact sets of each matched size"
    )
    parser.add_argument(
        "--gradient_steps",
        type=cli.whole(0, 10**6),
        default=50,
        help="of integrated gradients; 0 leaves them out",
    )


def check_replacement(args: argparse.Namespace) -> None:
    """UsageError where the mean vector that is wanted is not there."""
    if args.zero_ablation or args.replacement != "mean":
        return
    path = args.mean_tensor
    if path is None or not Path(path).is_file():
        what = "is needed" if path is None else f"{path}: no such file"
        folder = "DIR" if path is None else str(Path(path).parent)
        raise UsageError(
            f"--mean_tensor {what}; make it with python scripts/save_post_adapter_acts.py"
            f" --model_path {args.model_path} --image_dir PICTURES --out_dir {folder}, then python"
            f" scripts/calculate_mean_vector.py {folder}, or take --replacement zeros or noise"
        )


def ablation_of(vlm: VLM, args: argparse.Namespace) -> Ablation:
    """The ablation of the flags. UsageError without a mean vector that it needs."""
    from vlmdiag.interp.ablation import Ablation
    from vlmdiag.interp.interventions import replacement_of

    kind = "zeros" if args.zero_ablation else args.replacement
    return Ablation(
        replacement=replacement_of(vlm, kind, args.mean_tensor),
        sizes=args.sizes,
        draws=args.draws,
        gradient_steps=args.gradient_steps,
        per_pass=args.per_pass,
        seed=args.seed,
        paper_compat=args.paper_compat,
        threshold=args.threshold,
        max_new_tokens=args.max_new_tokens,
        no_noise_filter=getattr(args, "no_noise_filter", False),
    )

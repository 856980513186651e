"""Flags of both ablation scripts. Kept free of torch."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

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
        type=int,
        nargs="*",
        default=list(SIZES),
        help="how many gradient and random tokens",
    )
    parser.add_argument(
        "--draws", type=int, default=3, help="random and compact sets of each matched size"
    )
    parser.add_argument(
        "--gradient_steps", type=int, default=50, help="of integrated gradients; 0 leaves them out"
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

"""How much each token contributes to a generated token, from attention maps A (H, N, K) and their
gradients dy/dA. Pure functions on tensors.

    rule 5     Ā = E_h[(dy/dA * A)+]                       one map per layer; y: the raw logit of
                                                           the generated id
    rule 6     R <- R + Ā R                                self-attention, from the first layer up
    rule 7     R_qi <- R_qi + Ā R_qi                       self-attention of queries that carry a
                                                           map onto something else
    rule 8, 9  R̄ = I + rows of (R - I) scaled to sum 1
    rule 10    R_qi <- R_qi + R̄_qq^T Ā_c R̄_ii              cross-attention

Transformer-MM-Explainability (arXiv 2103.15679), numbers as in its code;
docs/studies/stethoscope.md, sections 2 and 4.1. A row of R_L is

    e_p R_L = e_p (I + Ā_L) (I + Ā_L-1) ... (I + Ā_1)

so rows are carried from the last layer down without a product of matrices: carry(). Only rule 10
needs whole matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


def head_mean(
    attention: Float[Tensor, "... H N K"], gradient: Float[Tensor, "... H N K"]
) -> Float[Tensor, "... N K"]:
    """Rule 5 from attention and its gradient."""
    return (attention * gradient).clamp_min(0).mean(-3)


def carry(rows: Tensor, attention: Float[Tensor, "... N N"]) -> Tensor:
    """One layer of rule 6 for some rows of R: rows + rows Ā.

    rows (..., R, N), or (..., N) for one row each; attention: Ā.
    """
    if rows.ndim == attention.ndim - 1:
        return rows + (rows.unsqueeze(-2) @ attention).squeeze(-2)
    return rows + rows @ attention


def rollout_step(rows: Tensor, attention: Float[Tensor, "... N N"]) -> Tensor:
    """One layer of attention rollout (arXiv 2005.00928) for some rows: rows (0.5 I + 0.5 A), A the
    mean over heads."""
    return 0.5 * carry(rows, attention)


def self_attention(maps: Sequence[Float[Tensor, "... N N"]]) -> Float[Tensor, "... N N"]:
    """Rule 6 with whole matrices: R after layers of Ā from the first to the last."""
    first = maps[0]
    eye = torch.eye(first.shape[-1], dtype=first.dtype, device=first.device)
    relevancy = eye.expand_as(first)
    for attention in maps:
        relevancy = relevancy + attention @ relevancy
    return relevancy


def normalised(relevancy: Float[Tensor, "... N N"]) -> Float[Tensor, "... N N"]:
    """Rules 8 and 9: R̄. A row of R - I that sums to 0 stays 0, where the published code divides by
    it."""
    eye = torch.eye(relevancy.shape[-1], dtype=relevancy.dtype, device=relevancy.device)
    off_identity = relevancy - eye
    total = off_identity.sum(-1, keepdim=True)
    return eye + off_identity / torch.where(total > 0, total, 1.0)


def queries_to_patches(
    self_maps: Sequence[Float[Tensor, "... n n"]],
    cross_maps: Sequence[Float[Tensor, "... q S"] | None],
    patches: Float[Tensor, "... S S"],
    joint: bool = False,
) -> tuple[Float[Tensor, "... n n"], Float[Tensor, "... n S"]]:
    """Rules 6, 7 and 10 through a Q-Former: (R_qq, R_qi).

    self_maps: Ā of each layer, n = queries and, behind them, instruction tokens; cross_maps: Ā of
    each layer or None; patches: R_ii of the tower. Instruction tokens do not read the picture:
    their rows of a cross map are 0. In a layer self-attention comes first; both of its updates use
    the old values. InstructBLIP (arXiv 2305.06500): docs/studies/stethoscope.md, sections 1.8 and
    2.4.

    joint: the two maps of a layer are the blocks [Ā_qq | Ā_qi] of one, with one softmax over
    queries and patches, so neither comes first and rule 10 takes the old R_qq too. mPLUG-Owl2's
    abstractor (arXiv 2311.04257): section 2.5.
    """
    batch = self_maps[0].shape[:-2]
    count = self_maps[0].shape[-1]
    eye = torch.eye(count, dtype=patches.dtype, device=patches.device)
    r_qq = eye.expand(*batch, count, count)
    r_qi = patches.new_zeros(*batch, count, patches.shape[-1])
    r_ii = normalised(patches)
    for attention, cross in zip(self_maps, cross_maps, strict=True):
        before = r_qq
        r_qi = r_qi + attention @ r_qi  # rule 7
        r_qq = r_qq + attention @ r_qq  # rule 6
        if cross is not None:
            cross = torch.nn.functional.pad(cross, (0, 0, 0, count - cross.shape[-2]))
            reading = normalised(before if joint else r_qq)
            r_qi = r_qi + reading.transpose(-1, -2) @ cross @ r_ii  # rule 10
    return r_qq, r_qi


def sinks(norms: Float[Tensor, " P"], factor: float = 6.0) -> Bool[Tensor, " P"]:
    """Vision tokens whose norm is an outlier, more than `factor` robust deviations (1.48 times the
    median absolute one) over the median.

    High-norm patches of a tower gather relevancy whatever is asked (Vision Transformers Need
    Registers, arXiv 2309.16588).
    """
    middle = norms.median()
    spread = (norms - middle).abs().median().clamp_min(1e-6 * middle.abs())
    return norms > middle + factor * 1.4826 * spread


def share(
    image: Float[Tensor, "*batch P"], text: Float[Tensor, "*batch N"], how: str = "max"
) -> Float[Tensor, "*batch"]:
    """Visual contribution of a token: image relevancy over image and text relevancy together, in
    [0, 1]; NaN where there is neither.

    text: of earlier text tokens; how: max, sum or mean over tokens. ratio_of() gives the published
    ratio.
    """
    of_image = _reduced(image, how)
    total = of_image + _reduced(text, how)
    return torch.where(total > 0, of_image / torch.where(total > 0, total, 1.0), torch.nan)


def ratio_of(
    image: Float[Tensor, "*batch P"], text: Float[Tensor, "*batch N"], how: str = "max"
) -> Float[Tensor, "*batch"]:
    """The stethoscope's visual contribution agg(R_img) / agg(R_text); inf where no text counts."""
    return _reduced(image, how) / _reduced(text, how)


def _reduced(values: Float[Tensor, "*batch K"], how: str) -> Float[Tensor, "*batch"]:
    if how not in ("max", "sum", "mean"):
        raise ValueError(f"aggregation {how!r}: max, sum or mean is wanted")
    if values.shape[-1] == 0:
        return values.new_zeros(values.shape[:-1])
    if how == "max":
        return values.amax(-1)
    return values.sum(-1) if how == "sum" else values.mean(-1)

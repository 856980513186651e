"""Cross-modality balance (CMB) from the attention mass of token groups.

Beyond Semantics (arXiv 2503.17349); docs/studies/beyond_semantics.md, sections 2.4 and 2.5. Pure
functions on tensors, one producing step per index of the first axis:

    mass (N, L, B, H, G)   attention of the last row to each group of vlmdiag.groups.GROUPS, summing
                           to 1 over G
    counted (N, B) bool    steps up to and with the sample's end of answer

"User text" is user + template, as in the papers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vlmdiag.groups import GROUPS

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

BOS = GROUPS.index("bos")
SYSTEM = GROUPS.index("system")
VISION = GROUPS.index("vision")
USER = GROUPS.index("user")
TEMPLATE = GROUPS.index("template")
# the groups whose tokens' norms are averaged together
NORM_GROUPS = {"sys": [SYSTEM], "user_text": [USER, TEMPLATE], "vision": [VISION], "bos": [BOS]}


def counted_steps(steps: Int[Tensor, " B"], total: int) -> Bool[Tensor, "N B"]:
    """Which of `total` producing steps count, from the number of steps of each sample."""
    return torch.arange(total, device=steps.device)[:, None] < steps[None]


def step_mean(
    values: Float[Tensor, "N L B *cells"], counted: Bool[Tensor, "N B"]
) -> Float[Tensor, "L B *cells"]:
    """Mean over the counted steps, NaN left out; NaN where no step has a value."""
    # (N, 1, B, 1, ...): one dimension for each of `values`
    in_answer = counted.view(len(counted), 1, counted.shape[1], *[1] * (values.ndim - 3))
    weights = in_answer & ~values.isnan()
    count = weights.sum(0)
    total = (values.nan_to_num() * weights).sum(0)
    return total.where(count > 0, float("nan")) / count


def user_text(mass: Float[Tensor, "... G"]) -> Float[Tensor, ...]:
    """The mass of the papers' user text."""
    return mass[..., USER] + mass[..., TEMPLATE]


def head_vision_share(
    mass: Float[Tensor, "N L B H G"], counted: Bool[Tensor, "N B"], paper_compat: bool = False
) -> Float[Tensor, "L B H"]:
    """CMB: mean over steps of V / (V + U) per layer and head, in [0, 1].

    NaN for a head that sees neither in any step. paper_compat: such a step counts as 0, for the
    denominator is at least 1e-8. docs/studies/beyond_semantics.md, section 2.4.
    """
    vision = mass[..., VISION]
    user = user_text(mass)
    total = vision + user
    if paper_compat:
        share = vision / total.clamp_min(1e-8)
    else:
        share = (vision / total).where(total > 1e-8, float("nan"))
    return step_mean(share, counted)


def mean_mass(
    mass: Float[Tensor, "N L B H G"], counted: Bool[Tensor, "N B"]
) -> Float[Tensor, "L B H G"]:
    """Mean over steps of every group's mass; sums to 1 over G, with attention sinks to less."""
    return step_mean(mass, counted)


def layer_shares(
    mass: Float[Tensor, "N L B H G"], counted: Bool[Tensor, "N B"]
) -> Float[Tensor, "3 L B"]:
    """System, vision and user share per layer; sum to 1. Heads are averaged first; BOS, image
    markup and generated tokens are left out."""
    attends = ~mass[0].isnan().flatten(1).any(1)  # (L,)
    head_mean = mass[:, attends].mean(3)
    user = user_text(head_mean)
    three = torch.stack([head_mean[..., SYSTEM], head_mean[..., VISION], user])
    total = three.sum(0)
    shares = (three / total).where(total > 1e-8, float("nan"))  # (3, N, L, B)
    return torch.stack([step_mean(share, counted) for share in shares])


def step_shares(
    mass: Float[Tensor, "N L B H G"], paper_compat: bool = False
) -> dict[str, Float[Tensor, "N B"]]:
    """Shares of each step: heads averaged, BOS left out and the others renormalised per layer,
    layers that attend averaged, then the ratios.

    vision, text: of vision + user; sys, vision_withsys, text_withsys: of all three. NaN where the
    denominator is 0; paper_compat: such a denominator is replaced by 1, so the share is 0.
    docs/studies/beyond_semantics.md, section 2.5.
    """
    mean = _without_bos(mass, mass)
    system = mean[..., SYSTEM]
    vision = mean[..., VISION]
    user = user_text(mean)
    undefined = 0.0 if paper_compat else float("nan")

    def share(group: Tensor, whole: Tensor) -> Tensor:
        return (group / whole).where(whole > 0, undefined)

    two = vision + user
    three = system + vision + user
    return {
        "vision": share(vision, two),
        "text": share(user, two),
        "sys": share(system, three),
        "vision_withsys": share(vision, three),
        "text_withsys": share(user, three),
    }


def _without_bos(
    mass: Float[Tensor, "N L B H G"], parts: Float[Tensor, "N L B H K"]
) -> Float[Tensor, "N B K"]:
    """Mass of some parts of the keys with BOS left out and the rest renormalised per layer, mean
    over heads and the layers that attend."""
    attends = ~mass[0].isnan().flatten(1).any(1)  # (L,)
    head_mean = mass[:, attends].mean(3)
    # BOS is the first group. Summing the others keeps the digits that 1 - BOS would lose.
    without_bos = head_mean[..., BOS + 1 :].sum(-1)
    return (parts[:, attends].mean(3) / without_bos.clamp_min(1e-12)[..., None]).mean(1)


def part_shares(
    mass: Float[Tensor, "N L B H G"], parts: Float[Tensor, "N L B H K"], paper_compat: bool = False
) -> Float[Tensor, "N B K"]:
    """The share that each part of the keys has of vision + user text in each step, by the
    definition of step_shares(): over the pictures they sum to its `vision`, over the turns' user
    text to its `text`."""
    groups = _without_bos(mass, mass)
    whole = groups[..., VISION] + user_text(groups)
    undefined = 0.0 if paper_compat else float("nan")
    return (_without_bos(mass, parts) / whole[..., None]).where(whole[..., None] > 0, undefined)


def chance_vision_share(counts: Mapping[str, int]) -> float:
    """The vision share of uniform attention: vision keys / (vision + user keys).

    counts: {group name: number of prompt tokens}.
    """
    vision = counts.get("vision", 0)
    user = counts.get("user", 0) + counts.get("template", 0)
    return vision / max(vision + user, 1)


def group_norms(
    norms: Float[Tensor, "B states T"], groups: Int[Tensor, "B T"]
) -> dict[str, Float[Tensor, "B states"]]:
    """Mean norm of each token group in each of the L + 1 hidden states, NaN where the group is
    empty."""
    means = {}
    for name, codes in NORM_GROUPS.items():
        inside = torch.isin(groups, torch.tensor(codes, device=groups.device))[:, None]
        inside = inside.to(norms.device)  # (B, 1, T)
        count = inside.sum(-1)
        means[name] = ((norms * inside).sum(-1) / count).where(count > 0, float("nan"))
    return means

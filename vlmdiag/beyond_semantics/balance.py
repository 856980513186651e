"""Cross-modality balance from the attention mass of token groups. Beyond Semantics (arXiv
2503.17349), sections 2.4 and 2.5 of our study.

Pure functions on tensors, one producing step per index of the first axis. mass (N, L, B, H, G):
attention of the last row to each group of common.GROUPS, summing to 1 over G. counted (N, B) bool:
steps up to and with the sample's EOS. "User text" is user + template, as in the papers.
"""

import torch

from vlmdiag.groups import GROUPS

BOS, SYSTEM, VISION, USER, TEMPLATE = (
    GROUPS.index(name) for name in ("bos", "system", "vision", "user", "template")
)


def counted_steps(steps, total):
    """(B,) producing steps per sample -> (total, B) bool."""
    return torch.arange(total, device=steps.device)[:, None] < steps[None]


def step_mean(values, counted):
    """Mean over the counted steps, NaN left out. values (N, ..., B, ...) with the batch on axis 2
    of (N, L, B, ...) -> the same without N; NaN where none."""
    weights = (
        counted.view(len(counted), 1, counted.shape[1], *[1] * (values.ndim - 3)) & ~values.isnan()
    )
    count = weights.sum(0)
    return (values.nan_to_num() * weights).sum(0).where(count > 0, float("nan")) / count


def head_vision_share(mass, counted, paper_compat=False):
    """CMB: mean over steps of V / (V + U) per layer and head, (L, B, H) in [0, 1].

    NaN for a head that sees neither in any step; paper_compat: such a step counts as 0 (denominator
    clamped at 1e-8).
    """
    vision, user = mass[..., VISION], mass[..., USER] + mass[..., TEMPLATE]
    total = vision + user
    share = (
        vision / total.clamp_min(1e-8)
        if paper_compat
        else (vision / total).where(total > 1e-8, float("nan"))
    )
    return step_mean(share, counted)


def mean_mass(mass, counted):
    """(L, B, H, G): mean over steps of every group's mass, sums to 1 over G."""
    return step_mean(mass, counted)


def layer_shares(mass, counted):
    """(3, L, B): system, vision and user share per layer, heads averaged first, BOS, image markup
    and generated tokens left out; sum to 1."""
    mean = mass.mean(3)
    three = torch.stack(
        [mean[..., SYSTEM], mean[..., VISION], mean[..., USER] + mean[..., TEMPLATE]]
    )
    total = three.sum(0)
    return torch.stack(
        [step_mean((part / total).where(total > 1e-8, float("nan")), counted) for part in three]
    )


def step_shares(mass, paper_compat=False):
    """{name: (N, B)} shares of each step: heads averaged, BOS left out and the rest renormalised
    per layer, layers averaged, then the ratios.

    vision, text: of vision + user; sys, vision_withsys, text_withsys: of all three. NaN where the
    denominator is 0; paper_compat: such a denominator is replaced by 1, so the share is 0.
    """
    mean = mass.mean(3)
    rest = mean[..., BOS + 1 :].sum(-1)  # BOS is the first group; 1 - BOS would lose its digits
    mean = (mean / rest.clamp_min(1e-12)[..., None]).mean(1)
    system, vision, user = (
        mean[..., SYSTEM],
        mean[..., VISION],
        mean[..., USER] + mean[..., TEMPLATE],
    )

    def share(part, whole):
        return (part / whole).where(whole > 0, 0.0 if paper_compat else float("nan"))

    two, three = vision + user, system + vision + user
    return {
        "vision": share(vision, two),
        "text": share(user, two),
        "sys": share(system, three),
        "vision_withsys": share(vision, three),
        "text_withsys": share(user, three),
    }


def chance_vision_share(counts):
    """The vision share of uniform attention: vision keys / (vision + user keys). counts: {group
    name: number of prompt tokens}."""
    user = counts.get("user", 0) + counts.get("template", 0)
    return counts.get("vision", 0) / max(counts.get("vision", 0) + user, 1)


def group_norms(norms, groups):
    """Mean norm of each token group. norms (B, L + 1, T), groups (B, T) -> {name: (B, L + 1)}, NaN
    where the group is empty."""
    out = {}
    for name, codes in {
        "sys": [SYSTEM],
        "user_text": [USER, TEMPLATE],
        "vision": [VISION],
        "bos": [BOS],
    }.items():
        inside = torch.isin(groups, torch.tensor(codes, device=groups.device))[:, None]
        count = inside.sum(-1)
        out[name] = ((norms * inside).sum(-1) / count).where(count > 0, float("nan"))
    return out

"""Shares from planted attention: heads whose mass is known by construction."""

import pytest
import torch

from vlmdiag.beyond_semantics.balance import (
    chance_vision_share,
    counted_steps,
    group_norms,
    head_vision_share,
    layer_shares,
    mean_mass,
    step_shares,
)
from vlmdiag.groups import GROUPS, PAD


def planted(rows):
    """Mass (N, L, B, H, G) from {(step, layer, sample, head): {group: mass}} given as nested lists
    of dicts."""
    return torch.tensor(
        [
            [
                [[[head.get(name, 0.0) for name in GROUPS] for head in sample] for sample in layer]
                for layer in step
            ]
            for step in rows
        ]
    )


VISION_ONLY, TEXT_ONLY = {"vision": 0.5, "bos": 0.5}, {"user": 0.1, "template": 0.1, "system": 0.8}
SINK, MIXED = {"bos": 1.0}, {"vision": 0.3, "user": 0.1, "template": 0.1, "system": 0.2, "bos": 0.3}


def test_a_head_is_as_much_vision_as_it_gives_to_vision():
    mass = planted([[[[VISION_ONLY, TEXT_ONLY, MIXED, SINK]]]])
    share = head_vision_share(mass, torch.ones(1, 1, dtype=torch.bool))[0, 0]
    assert share[:3].tolist() == pytest.approx([1, 0, 0.6]) and share[3].isnan()
    assert (
        head_vision_share(mass, torch.ones(1, 1, dtype=torch.bool), paper_compat=True)[0, 0, 3] == 0
    )


def test_steps_after_eos_count_in_no_mean():
    mass = planted([[[[VISION_ONLY], [VISION_ONLY]]], [[[TEXT_ONLY], [TEXT_ONLY]]]])
    counted = counted_steps(torch.tensor([1, 2]), 2)
    assert head_vision_share(mass, counted)[0, :, 0].tolist() == pytest.approx([1.0, 0.5])
    assert mean_mass(mass, counted)[0, :, 0, GROUPS.index("bos")].tolist() == pytest.approx(
        [0.5, 0.25]
    )


def test_a_step_that_sees_neither_is_left_out_of_the_mean_over_steps():
    mass = planted([[[[SINK]]], [[[MIXED]]]])
    assert head_vision_share(mass, torch.ones(2, 1, dtype=torch.bool)).item() == pytest.approx(0.6)
    assert head_vision_share(
        mass, torch.ones(2, 1, dtype=torch.bool), paper_compat=True
    ).item() == pytest.approx(0.3)


def test_shares_average_heads_before_the_ratio_and_renormalise_each_layer_without_bos():
    generated = {"vision": 0.2, "user": 0.1, "generated": 0.5, "bos": 0.2}
    mass = planted([[[[MIXED, MIXED]], [[generated, generated]]]])
    shares = {name: values.item() for name, values in step_shares(mass).items()}
    vision, user, system = (0.3 / 0.7 + 0.2 / 0.8) / 2, (0.2 / 0.7 + 0.1 / 0.8) / 2, (0.2 / 0.7) / 2
    assert shares["vision"] == pytest.approx(vision / (vision + user)) and shares[
        "sys"
    ] == pytest.approx(system / (vision + user + system))
    layers = layer_shares(mass, torch.ones(1, 1, dtype=torch.bool))[:, :, 0]
    assert layers.sum(0).tolist() == pytest.approx([1, 1]) and layers[1].tolist() == pytest.approx(
        [0.3 / 0.7, 0.2 / 0.3]
    )


def test_all_attention_on_bos_is_finite_in_the_paper_and_missing_in_ours():
    mass = planted([[[[SINK]]]])
    assert step_shares(mass)["vision"].isnan().all()
    for share in step_shares(mass, paper_compat=True).values():
        assert share.item() == 0


def test_uniform_attention_gives_the_chance_level():
    counts = {"bos": 1, "system": 5, "vision": 90, "user": 8, "template": 2}
    total = sum(counts.values())
    mass = planted([[[[{name: n / total for name, n in counts.items()}]]]])
    assert (
        head_vision_share(mass, torch.ones(1, 1, dtype=torch.bool)).item()
        == pytest.approx(chance_vision_share(counts))
        == pytest.approx(0.9)
    )


def test_group_norms_leave_padding_out_and_are_missing_for_empty_groups():
    groups = torch.tensor(
        [
            [
                PAD,
                GROUPS.index("bos"),
                GROUPS.index("vision"),
                GROUPS.index("vision"),
                GROUPS.index("user"),
                GROUPS.index("template"),
            ]
        ]
    )
    norms = torch.tensor([[[99.0, 7, 1, 3, 4, 6]]])
    found = group_norms(norms, groups)
    assert (
        found["vision"].item() == 2
        and found["user_text"].item() == 5
        and found["bos"].item() == 7
        and found["sys"].isnan().all()
    )

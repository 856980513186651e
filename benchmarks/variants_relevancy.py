"""The variants of bench_relevancy.py, and that their outputs are equal.

Shapes: T answer tokens, L layers, P vision tokens, n positions, C tokens of the tower.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from benchmarks.cases import model_inputs
from vlmdiag.model.decoding import extended
from vlmdiag.relevancy import gradients, methods, rules

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from common import VLM
    from vlmdiag.batch import Batch

TOLERANCE = 1e-3  # of the largest value of a token's map


@dataclass
class Case:
    """A model, one prompt, the answer's ids, and the bytes of gradients and maps that ours
    holds."""

    vlm: VLM
    batch: Batch
    ids: list[int]
    budget: int


def _inputs(case: Case) -> dict[str, Any]:
    """What a forward pass over prompt and answer wants."""
    whole = extended(case.batch, case.ids)
    return {
        "input_ids": whole.input_ids,
        "attention_mask": whole.attention_mask,
        "position_ids": whole.position_ids,
        "pixel_values": model_inputs(case.vlm, case.batch)["pixel_values"],
        "use_cache": False,
    }


@torch.inference_mode()
def floor(case: Case) -> None:
    """One forward pass over prompt and answer."""
    case.vlm.model(**_inputs(case), logits_to_keep=1)


def ours(case: Case) -> Float[np.ndarray, "T L P"]:
    """Image relevancy through the tower."""
    trace = gradients.trace(case.vlm, case.batch, case.ids)
    return methods.relevancy(trace, range(len(case.ids)), budget=case.budget).cells


def published(case: Case) -> Float[np.ndarray, "T L P"]:
    """The same, token after token."""
    vlm = case.vlm
    layer_maps: list[Tensor] = []
    block_maps: list[Tensor] = []
    hooks = []
    vlm.model.set_attn_implementation("eager")
    vlm.model.requires_grad_(True)
    try:
        for layer in vlm.parts.layers:
            hooks.append(layer.self_attn.register_forward_hook(_keeping(layer_maps)))
        # the last block of the tower is not read
        for block in vlm.parts.vision_blocks[:-1]:
            hooks.append(block.self_attn.register_forward_hook(_keeping(block_maps)))
        logits = vlm.model(**_inputs(case)).logits[0]
        first = case.batch.input_ids.shape[1] - 1  # the row that predicts the first token
        relevancies = []
        for step, token in enumerate(case.ids):
            vlm.model.zero_grad()
            for attention in (*layer_maps, *block_maps):
                attention.grad = None
            logits[first + step, token].float().backward(retain_graph=True)
            relevancies.append(_image_relevancy(case, layer_maps, block_maps, first + step))
        return torch.stack(relevancies).numpy()
    finally:
        for hook in hooks:
            hook.remove()
        vlm.model.zero_grad()
        vlm.model.requires_grad_(False)
        vlm.model.set_attn_implementation("sdpa")


def _keeping(maps: list[Tensor]) -> Callable[[object, object, tuple[Any, Tensor]], None]:
    """A hook that collects attention maps (1, H, n, n), which then keep their gradients."""

    def hook(module: object, args: object, output: tuple[Any, Tensor]) -> None:
        output[1].retain_grad()
        maps.append(output[1])

    return hook


def _averaged(attention: Tensor) -> Float[Tensor, "n n"]:
    """Rule 5: the mean over heads of the positive part of gradient times map."""
    assert attention.grad is not None
    return rules.head_mean(attention[0].detach().float(), attention.grad[0].float())


def _image_relevancy(
    case: Case, layer_maps: list[Tensor], block_maps: list[Tensor], row: int
) -> Float[Tensor, "L P"]:
    """Rule 6 with whole matrices, R <- R + A R, in decoder and tower; rows are taken to the CPU."""
    device = layer_maps[0].device
    length = row + 1
    vision = case.batch.vision_positions(0)
    eye = torch.eye(length, device=device)
    relevancy = eye.clone()
    rows = []
    for attention in layer_maps:
        relevancy = relevancy + _averaged(attention)[:length, :length] @ relevancy
        rows.append((relevancy - eye)[row, vision])
    tower = torch.eye(block_maps[0].shape[-1], device=device)  # (C, C), the first is CLS
    for attention in block_maps:
        tower = tower + _averaged(attention) @ tower
    return (torch.stack(rows) @ tower[1:, 1:]).cpu()


VARIANTS: dict[str, Callable[[Case], object]] = {
    "floor": floor,
    "ours": ours,
    "published": published,
}


def check(case: Case) -> float:
    """Largest difference of a token's map, of its largest value; AssertionError where it is too
    large."""
    mine = ours(case)
    other = published(case)
    gaps = np.abs(mine - other).max((1, 2)) / np.abs(other).max((1, 2))
    worst = float(gaps.max())
    if not worst <= TOLERANCE:  # a NaN is not <= either
        raise AssertionError(f"relevancy differs by {worst:.1e}, more than {TOLERANCE:g}")
    return worst

"""How positions turn the queries and keys of each layer, found by its keys: all positions moved by
some steps turn a key by just these, whatever the model computes its angles from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from vlmdiag.families import Rotary, generic
from vlmdiag.model.attention import Row, capture
from vlmdiag.model.probes import Probe
from vlmdiag.model.selfcheck import exact, noise_picture
from vlmdiag.model.vision import prefill
from vlmdiag.pictures.samples import AT_HAND, Sample

if TYPE_CHECKING:
    from jaxtyping import Float

    from vlmdiag.types import VLM

DELTA = 7  # positions
KEYS = 64  # of the prompt's last positions are looked at, so that no layer's are held as a whole
Call = tuple[nn.Module, tuple[object, ...], dict[str, object]]  # module, args, kwargs


class _Keys(Probe):
    """The last keys of each layer, prefill only."""

    def __init__(self) -> None:
        self.keys: dict[int, Float[Tensor, "B H_kv KEYS D"]] = {}

    def attention(self, layer: int, row: Row) -> None:
        self.keys[layer] = row.key[:, :, -KEYS:].to(torch.float32, copy=True)


def fitting(
    ways: Sequence[Rotary],
    before: Float[Tensor, "... D"],
    after: Float[Tensor, "... D"],
    delta: float,
    tolerance: float,
) -> Rotary | None:
    """The way that turns the keys `before` into those `after` a move by delta positions, most of
    them up to a share `tolerance` of their length; None where none does. In 16 bits rounding sends
    some tokens to other experts, whose keys then have little to do with those before."""
    errors = []
    for way in ways:
        error = float("inf")
        if 2 * len(way.inv_freq) <= before.shape[-1]:
            apart = (way.turn(before, delta) - after).norm(dim=-1)
            error = float((apart / after.norm(dim=-1).clamp_min(1e-9)).median())
        errors.append(error)
    best = min(range(len(ways)), key=errors.__getitem__)
    return ways[best] if errors[best] < tolerance else None


def _of_module(
    module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
) -> list[Rotary]:
    """The ways that a rotary module's own output for position 1 names, where it is the cosines and
    sines of each dimension. args, kwargs: of a call, whose whole numbers are the positions."""

    def ones(value: object) -> object:
        if isinstance(value, Tensor) and not value.is_floating_point():
            return torch.ones_like(value)
        return value

    output = module(*map(ones, args), **{name: ones(value) for name, value in kwargs.items()})
    if not (isinstance(output, tuple) and len(output) == 2 and torch.is_tensor(output[0])):
        return []
    cos, sin = (part.flatten(0, -2)[-1].float() for part in output)
    angle = torch.atan2(sin, cos)
    half = len(angle) // 2
    ways = []
    if torch.equal(angle[:half], angle[half:]):
        ways.append(Rotary(angle[:half]))
        ways.append(Rotary(angle[:half], True))
    if torch.equal(angle[0::2], angle[1::2]):
        ways.append(Rotary(angle[0::2], True))
    return ways


@contextmanager
def _calls(decoder: nn.Module) -> Iterator[list[Call]]:
    """Within the context the calls of the decoder's rotary modules are written down."""
    calls: list[Call] = []

    def keep(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        calls.append((module, args, kwargs))

    hooks = [
        module.register_forward_pre_hook(keep, with_kwargs=True)
        for module in decoder.modules()
        if "rotary" in type(module).__name__.lower()
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


@torch.inference_mode()
def rotary_of(vlm: VLM) -> dict[int, Rotary] | None:
    """{layer: how positions turn its queries and keys} of the layers that attend; a layer without
    positions has frequencies of 0. None where a layer's keys turn in none of the family's ways, or
    none turn."""
    ways = [] if vlm.family.rotary is None else vlm.family.rotary(vlm)
    if not ways:
        return None
    still = Rotary(torch.zeros_like(ways[0].inv_freq))
    batch = vlm.encode([Sample("0", AT_HAND, "Describe the image.")], [noise_picture()])
    keys = []
    for moved_by in (0, DELTA):
        with capture(vlm, [probe := _Keys()]), _calls(vlm.parts.decoder) as calls:
            prefill(vlm, replace(batch, position_ids=batch.position_ids + moved_by))
        keys.append(probe.keys)
    tolerance = 1e-2 if exact(vlm) else 0.1

    def ways_of_layers(ways: Sequence[Rotary]) -> dict[int, Rotary | None]:
        return {
            layer: fitting(ways, before, keys[1][layer], DELTA, tolerance)
            for layer, before in keys[0].items()
        }

    of_layer = ways_of_layers([*ways, still])
    if None in of_layer.values() and vlm.family.rotary is generic.rotary:
        of_modules = [way for call in calls for way in _of_module(*call)]
        of_layer = ways_of_layers([*ways, still, *of_modules])
    found = {layer: way for layer, way in of_layer.items() if way is not None}
    if len(found) < len(of_layer) or all(way is still for way in found.values()):
        return None
    return found

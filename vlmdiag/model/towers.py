"""Models with equal towers, such as snapshots of a training that left the tower alone: one tower
runs for all of them.

    if towers.equal(first, second):
        towers.merge(first, second)  # one set of weights
        with towers.sharing([first, second]):
            first.vision(batch)
            second.vision(its_batch)  # of the same pictures: the tower does not run again
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from vlmdiag.types import VLM


def equal(one: VLM, other: VLM) -> bool:
    """Do the towers of two models give the same output? They do where class, configuration, every
    weight, its type and its place are equal; False for towers that are quantised or not loaded."""
    first, second = one.parts.tower, other.parts.tower
    if first is None or second is None or type(first) is not type(second):
        return False
    if not _settings(first) == _settings(second) != {}:
        return False
    tensors, theirs = _tensors(first), _tensors(second)
    return tensors.keys() == theirs.keys() and all(
        _is_plain(mine) and _same(mine, theirs[name]) for name, mine in tensors.items()
    )


def merge(one: VLM, other: VLM) -> None:
    """Let two models with equal() towers hold one set of its weights; the other's own are freed."""
    weights = _tensors(one.parts.tower)
    for name, mine in _tensors(other.parts.tower).items():
        mine.data = weights[name].data


@contextlib.contextmanager
def sharing(vlms: Sequence[VLM]) -> Iterator[None]:
    """Within the context, which is one for each batch, the tower of the first model runs for models
    with equal() towers, once for the same pictures."""
    if len(vlms) < 2:
        yield
        return
    towers: list[Any] = [vlm.parts.tower for vlm in vlms]
    run = towers[0].forward
    done: list[tuple[object, object]] = []  # arguments and output of each call

    def forward(*args: object, **options: object) -> object:
        call = (args, options)
        output = next((output for known, output in done if _same(known, call)), None)
        if output is None:
            output = run(*args, **options)
            done.append((call, output))
        return copy.copy(output)  # models write the connector's output into it

    before = [vars(tower).get("forward") for tower in towers]
    for tower in towers:
        tower.forward = forward
    try:
        yield
    finally:
        for tower, own in zip(towers, before, strict=True):
            del tower.forward
            if own is not None:  # a hook of accelerate
                tower.forward = own


def _settings(tower: nn.Module) -> dict[str, object]:
    """All that its configuration says, but for where it came from; {} where it has none."""
    config = getattr(tower, "config", None)
    if config is None:
        return {}
    of_files = ("_name_or_path", "transformers_version", "architectures")
    settings = {name: value for name, value in config.to_dict().items() if name not in of_files}
    return settings | {"attention": config._attn_implementation}


def _is_plain(tensor: Tensor) -> bool:
    """Is it there as numbers, neither packed nor left on the disk?"""
    return tensor.device.type != "meta" and type(tensor) in (Tensor, nn.Parameter)


def _tensors(tower: nn.Module | None) -> dict[str, Tensor]:
    """Its parameters and buffers."""
    if tower is None:
        return {}
    return dict([*tower.named_parameters(), *tower.named_buffers()])


def _same(one: object, other: object) -> bool:
    """Are two calls' arguments equal, to the last bit of their tensors?"""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return (
            isinstance(one, Tensor)
            and isinstance(other, Tensor)
            and (one.dtype, one.device, one.shape) == (other.dtype, other.device, other.shape)
            and torch.equal(one, other)
        )
    if isinstance(one, (tuple, list)) and type(one) is type(other):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[name], other[name]) for name in one)
    return one is other or (type(one) in (bool, int, float, str) and one == other)

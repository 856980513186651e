"""Keys and values in buffers with room for further tokens.

transformers' DynamicLayer copies all keys and values of a layer for each generated token. Here a
token is written behind the others, in place: the same numbers, a copy every ROOM tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor
    from transformers import Cache

ROOM = 64  # positions that a new buffer has beyond those it is made for


class RoomyLayer(DynamicLayer):
    """One layer's keys and values (B, H, n, K), views of larger buffers. What it begins with may be
    a view of anything, since the first update copies it and nothing is written before that."""

    def __init__(self, keys: Float[Tensor, "B H n K"], values: Float[Tensor, "B H n K"]) -> None:
        super().__init__()
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self.keys, self.values = keys, values
        # buffer and the view of it that was given out: one replaced since (crop) begins anew
        self._filled: dict[str, tuple[Tensor, Tensor]] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append (B, H, m, K) and return all. With gradients by concatenation, because what a
        backward pass needs may not be overwritten."""
        if key_states.requires_grad or self.keys.requires_grad:
            return super().update(key_states, value_states)
        self.keys = self._appended("keys", self.keys, key_states)
        self.values = self._appended("values", self.values, value_states)
        return self.keys, self.values

    def _appended(self, name: str, held: Tensor, new: Tensor) -> Tensor:
        before = held.shape[2]
        total = before + new.shape[2]
        buffer, view = self._filled.get(name, (None, None))
        if buffer is not None and buffer.is_inference() and not torch.is_inference_mode_enabled():
            buffer = None  # made in inference mode, it cannot be written to outside of it
        if buffer is None or view is not held or buffer.shape[2] < total:
            batch, heads, _, width = held.shape
            buffer = new.new_empty(batch, heads, total + ROOM, width)
            buffer[:, :, :before] = held
        buffer[:, :, before:total] = new
        view = buffer[:, :, :total]
        self._filled[name] = buffer, view
        return view


def with_room(cache: Cache) -> Cache:
    """The cache, whose plain layers are RoomyLayers from now on; layers of other kinds (windows,
    states) stay as they are."""
    if type(cache) is DynamicCache:
        for index, layer in enumerate(cache.layers):
            if type(layer) is DynamicLayer and layer.is_initialized:
                cache.layers[index] = RoomyLayer(layer.keys, layer.values)
    return cache

"""Prompts that share their first positions: cached keys and values to go on from, many knockouts as
one pass."""

from dataclasses import replace

import torch
from transformers import DynamicCache

from vlmdiag.cli import UsageError
from vlmdiag.model.attention import capture
from vlmdiag.model.vision import more_inputs


def first_positions(vlm, cache, length, count=None, rows=None):
    """The first `length` positions of a cache, as a cache to go on from: of every row or of some
    (rows: their indices), or of a single row for `count` prompts that share them. None where they
    cannot be taken: the family is not known to be causal, or a layer keeps a window only.
    """
    whole = cache.get_seq_length()
    if (
        "causal" not in vlm.family.has
        or length < 1
        or any(layer.keys.shape[2] != whole for layer in cache.layers)
    ):
        return None
    shared = DynamicCache()
    for index, layer in enumerate(cache.layers):
        parts = (
            (layer.keys, layer.values)
            if rows is None
            else (part[rows] for part in (layer.keys, layer.values))
        )
        shared.update(
            *(part[:, :, :length].expand(count or -1, -1, -1, -1) for part in parts), index
        )
    return shared


@torch.inference_mode()
def branches(vlm, batch, cache, embeds, start, blocks):
    """Hidden states after the final norm (n, T - start, d) of one prompt continued from position
    `start` in n ways, each under blocks of its own.

    All ways are rows of one pass that see the cached keys and values of the positions before
    `start` and themselves: what comes before the first query that any block names is the same in
    every layer, so it need not run again. batch: one prompt without padding; embeds (1, T, d), as
    embeddings() gives them; cache: from first_positions(), left as it was; blocks: n lists of
    Block. UsageError where a query row is left without any key.
    """
    total, count, device = embeds.shape[1], len(blocks), embeds.device
    rows, ways = total - start, torch.arange(count, device=device)
    if any(block.queries[0, :start].any() for some in blocks for block in some):
        raise ValueError(f"a block acts on a position before start={start}")
    cuts = {
        (way, block.layers): (
            (block.queries[0, start:total, None] & block.keys[0, None, :total]).to(device)
        )
        for way, some in enumerate(blocks)
        for block in some
    }

    def mask(acting):
        """(1, 1, n * rows, start + n * rows) bool: the cached positions and a way's own earlier
        ones, without what is cut."""
        seen = (
            torch.ones(rows, total, dtype=torch.bool, device=device).tril(start).repeat(count, 1, 1)
        )
        for key in acting:
            seen[key[0]] &= ~cuts[key]
        if not seen.any(-1).all():
            raise UsageError("a block leaves a query row without any key")
        inside = torch.zeros(count, rows, count, rows, dtype=torch.bool, device=device)
        inside[ways, :, ways] = seen[:, :, start:]
        return torch.cat([seen[:, :, :start].flatten(0, 1), inside.flatten(2).flatten(0, 1)], 1)[
            None, None
        ]

    acting = {
        layer: tuple(key for key in cuts if key[1] is None or layer in key[1])
        for layer in range(len(vlm.parts.layers))
    }
    masks = {some: mask(some) for some in {(), *acting.values()}}
    positions = torch.cat([batch.position_ids[..., start:]] * count, -1)
    more = {
        name: torch.cat([value] * count, -1)
        for name, value in more_inputs(vlm, batch, start).items()
    }
    with capture(vlm, mask_of=lambda layer: masks[acting[layer]]):
        states = vlm.parts.decoder(
            inputs_embeds=torch.cat([embeds[:, start:]] * count, 1),
            attention_mask=masks[()],
            position_ids=positions,
            past_key_values=first_positions(vlm, cache, start, 1),
            use_cache=True,
            **more,
        ).last_hidden_state
    return states[0].unflatten(0, (count, rows))


def shared_start(batches):
    """How many first tokens all prompts of some batches have up to the end of their picture, 0 if
    these differ in number. Rows without their padding."""
    lengths = set()
    for batch in batches:
        for row, length in enumerate(batch.lengths):
            lengths.add(int(batch.vision_positions(row)[-1]) + 1 - (batch.groups.shape[1] - length))
    return lengths.pop() if len(lengths) == 1 else 0


def padded_after(batch, start):
    """The batch with its padding after the first `start` tokens of every prompt in place of before
    them, so that prompts of one picture can go on from the same keys and values. Positions and
    masks say where each token stands, so nothing else changes.
    """
    longest = batch.groups.shape[1]
    order = []
    for length in batch.lengths:
        pad = longest - length
        order.append(
            torch.cat(
                [
                    torch.arange(pad, pad + start),
                    torch.arange(pad),
                    torch.arange(pad + start, longest),
                ]
            )
        )
    order = torch.stack(order).to(batch.groups.device)
    positions = (
        order
        if batch.position_ids.ndim == 2
        else order[None].expand(len(batch.position_ids), -1, -1)
    )
    moved = {
        name: getattr(batch, name).gather(1, order)
        for name in ("input_ids", "attention_mask", "groups")
    }
    return replace(batch, **moved, position_ids=batch.position_ids.gather(-1, positions))

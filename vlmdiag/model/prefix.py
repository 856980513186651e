"""Prompts that begin alike: what they share is computed once, and only the rest of each runs.

SharedPicture: several prompts about one picture. branches(): many knockouts of one prompt in one
pass.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from transformers import DynamicCache

from vlmdiag.cli import UsageError
from vlmdiag.groups import PAD, VISION
from vlmdiag.model.attention import capture
from vlmdiag.model.cache import RoomyLayer
from vlmdiag.model.vision import decoder_inputs, deepened, entering, entries
from vlmdiag.types import Record

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from vlmdiag.batch import Batch
    from vlmdiag.model.attention import Block
    from vlmdiag.types import VLM, ImageFeatures

# what prefill() and generate() get beside a batch: features, or embeds and cache
Inputs = Record


def first_positions(
    vlm: VLM,
    cache: DynamicCache,
    length: int,
    count: int | None = None,
    rows: Int[Tensor, " R"] | None = None,
) -> DynamicCache | None:
    """The first `length` positions of a cache, as a cache to go on from.

    By default those of every row; count: of a single row, for that many prompts that share it;
    rows: of these rows, in this order. None where they cannot be taken: the family is not known to
    be causal, or a layer keeps a window only.
    """
    if "causal" not in vlm.family.has or length < 1:
        return None
    total = cache.get_seq_length()
    if any(layer.keys.shape[2] != total for layer in cache.layers):
        return None
    shared = DynamicCache()
    size = (count or -1, -1, -1, -1)
    for layer in cache.layers:
        keys, values = (
            (part if rows is None else part[rows.to(part.device)])[:, :, :length].expand(size)
            for part in (layer.keys, layer.values)
        )
        shared.layers.append(RoomyLayer(keys, values))
    return shared


# --- several prompts about one picture ------------------------------------------------------------


def after_picture(batch: Batch, at_least: int = 0) -> tuple[Batch, int]:
    """(batch, start): every prompt laid out so that its picture ends at position `start`.

        before      . . . B B V V V q q      B: what stands before the picture, V: the picture,
                    B B V V V V q q q q      q: the rest, .: padding
        after       . B B V V V . . q q      start = 6
                    B B V V V V q q q q

    start is the least that fits, but not less than `at_least`. Positions and masks say where each
    token stands, so nothing else changes.
    """
    width = batch.groups.shape[1]
    device = batch.groups.device
    columns = torch.arange(1, width + 1, device=device)
    ends = ((batch.groups == VISION) * columns).amax(1)
    begins = width - torch.tensor(batch.lengths, device=device)
    start = max(at_least, int((ends - begins).max()))
    rest = int((width - ends).max())

    # column of the old batch that goes to each column of the new one, and whether it is a token
    column = torch.arange(start + rest, device=device)
    in_beginning = column < start
    source = torch.where(
        in_beginning, ends[:, None] - start + column, width - rest - start + column
    )
    is_token = torch.where(in_beginning, source >= begins[:, None], source >= ends[:, None])
    source = source.clamp(min=0)

    positions = source
    if batch.position_ids.ndim == 3:
        positions = source[None].expand(len(batch.position_ids), -1, -1)
    moved = replace(
        batch,
        # id 0, for an image token in the padding would be counted as one of the picture's
        input_ids=batch.input_ids.gather(1, source) * is_token,
        attention_mask=batch.attention_mask.gather(1, source) * is_token,
        groups=batch.groups.gather(1, source).masked_fill(~is_token, PAD),
        position_ids=batch.position_ids.gather(-1, positions),
        token_inputs={
            name: value.gather(1, source) * is_token for name, value in batch.token_inputs.items()
        },
    )
    return moved, start


class SharedPicture:
    """Prompts about n pictures: the vision tower runs once for each picture, and the keys and
    values of what all prompts about a picture begin with, up to the end of the picture, are
    computed once.

        shared = SharedPicture(vlm, batch)              # one prompt about each picture
        batch, inputs = shared.ask(batch, [0, 1, 2])
        first = generate(vlm, batch, limit, **inputs)   # reads the whole prompts
        shared.keep(first.cache)
        batch, inputs = shared.ask(more, [2, 0])        # further prompts, about pictures 2 and 0
        second = generate(vlm, batch, limit, **inputs)  # reads only what follows the picture

    A batch with several prompts about a picture goes on from a pass over their common beginning,
    which the constructor runs; keep() is not needed then. Prompts that begin otherwise, with the
    question before the picture for example, run whole. So do those of a family that is not known to
    be causal.
    """

    def __init__(self, vlm: VLM, batch: Batch, rows: Sequence[int] | None = None) -> None:
        """batch: prompts, at least one about each picture; rows (B): the picture of each prompt,
        counted from 0, by default one prompt a picture."""
        batch.one_picture()
        rows = range(len(batch.prompts)) if rows is None else rows
        count = max(rows) + 1
        self.vlm = vlm
        self.is_causal = "causal" in vlm.family.has
        # vision tokens by the digest of a picture; features of a batch where prompts run whole
        self._features: dict[bytes, Tensor] = {}
        self._whole: tuple[list[bytes], ImageFeatures] | None = None
        self._cache: DynamicCache | None = None
        self._pictures = [batch.pictures[rows.index(picture)] for picture in range(count)]
        batch, self.start = after_picture(batch)
        first = [rows.index(picture) for picture in range(count)]
        self._beginnings = self._beginning(batch)[first]
        if self.is_causal and len(batch.prompts) > count and self._begins_alike(batch, rows):
            self._cache = self._run_beginnings(batch, first)

    def ask(self, batch: Batch, rows: Sequence[int]) -> tuple[Batch, Inputs]:
        """(batch to run, what prefill() and generate() get beside it) for prompts about the
        pictures `rows`. Under torch.no_grad() or inference_mode()."""
        cache = None
        if self.is_causal:
            batch, _ = after_picture(batch, self.start)
            cache = self.cache_of(batch, rows)
            # with deepstack embeddings say all only of what stands behind the picture
            if cache is not None or not self.vlm.family.deepstack:
                return batch, {"embeds": self._embeds(batch), "cache": cache}
        if self._whole is None or self._whole[0] != batch.pictures:
            self._whole = batch.pictures, self.vlm.vision(batch)
        return batch, {"features": self._whole[1]}

    def keep(self, cache: DynamicCache) -> None:
        """Take the beginnings from the cache of a pass over the batch of ask(), one prompt a
        picture and in the order of the pictures, for all prompts that follow."""
        self._cache = first_positions(self.vlm, cache, self.start)

    def cache_of(self, batch: Batch, rows: Sequence[int]) -> DynamicCache | None:
        """Keys and values of the beginnings of prompts about the pictures `rows`, None where there
        are none that fit. batch: as after_picture() lays it out, so a single prompt as it is."""
        if self._cache is None or not self._begins_alike(batch, rows):
            return None
        chosen = torch.tensor(rows, device=self.vlm.device)
        return first_positions(self.vlm, self._cache, self.start, rows=chosen)

    def _beginning(self, batch: Batch) -> Int[Tensor, "B S"]:
        """Ids of the first `start` positions, 0 for padding."""
        return (batch.input_ids * batch.attention_mask)[:, : self.start]

    def _begins_alike(self, batch: Batch, rows: Sequence[int]) -> bool:
        """Whether the prompts have the picture and the beginning that `rows` had at first."""
        if batch.pictures != [self._pictures[row] for row in rows]:
            return False
        return torch.equal(self._beginning(batch), self._beginnings[list(rows)])

    def _embeds(self, batch: Batch) -> Float[Tensor, "B T d"]:
        """What the decoder reads as its input, with vision tokens that were computed before where
        there are some; with deepstack without any."""
        if self.vlm.family.deepstack:
            return self.vlm.model.get_input_embeddings()(batch.input_ids)
        with entering(self.vlm, batch, torch.cat(self._vision(batch))) as embeds:
            return embeds

    def _vision(self, batch: Batch) -> list[Float[Tensor, "P d_in"]]:
        """What the decoder gets for the vision tokens of each prompt, as vision.entered()."""
        # a connector that reads the question makes features of its own for each prompt
        if not self._features.keys() >= set(batch.pictures):
            of_rows = zip(*entries(self.vlm, self.vlm.vision(batch)), strict=True)
            new = (torch.cat(parts, -1) for parts in of_rows)
            self._features |= dict(zip(batch.pictures, new, strict=True))
        return [self._features[picture] for picture in batch.pictures]

    @torch.no_grad()
    def _run_beginnings(self, batch: Batch, first: list[int]) -> DynamicCache:
        """Keys and values of the first `start` positions of the prompts `first`."""
        more = decoder_inputs(self.vlm, batch)
        tokens = self._vision(batch)
        beginnings = replace(
            batch,
            input_ids=batch.input_ids[first, : self.start],
            groups=batch.groups[first, : self.start],
        )
        vision = torch.cat([tokens[row] for row in first])
        with entering(self.vlm, beginnings, vision) as embeds:
            output = self.vlm.parts.decoder(
                inputs_embeds=embeds,
                attention_mask=batch.attention_mask[first, : self.start],
                position_ids=batch.position_ids[..., first, : self.start],
                use_cache=True,
                **{name: value[first, : self.start] for name, value in more.items()},
            )
        return output.past_key_values


# --- many knockouts of one prompt -----------------------------------------------------------------


@dataclass(frozen=True)
class PackedWays:
    """n ways to go on with one prompt, one behind the other in a single sequence.

    Every way has R = T - start rows, the prompt's positions from `start` on. A row sees the cached
    positions before `start` and, of its own way, itself and what stands before it (x); never
    another way's rows (.). A block clears an x in its way only. Here start = 4, T = 7, n = 2, and a
    block of way 1 cuts its last row from the cached positions 1 and 2 and from position 4:

                       cached     way 0    way 1
                       0 1 2 3    4 5 6    4 5 6
        way 0, row 4   x x x x    x . .    . . .
               row 5   x x x x    x x .    . . .
               row 6   x x x x    x x x    . . .
        way 1, row 4   x x x x    . . .    x . .
               row 5   x x x x    . . .    x x .
               row 6   x . . x    . . .    . x x
    """

    count: int  # n
    start: int
    total: int  # T

    @property
    def rows(self) -> int:
        """R, the rows of one way."""
        return self.total - self.start

    def pack(self, values: Tensor, dim: int) -> Tensor:
        """Values (.., R, ..) of a way's rows, n times one behind the other along `dim`."""
        return torch.cat([values] * self.count, dim)

    def unpack(self, states: Float[Tensor, "1 nR d"]) -> Float[Tensor, "n R d"]:
        """The rows of each way."""
        return states[0].unflatten(0, (self.count, self.rows))

    def mask(
        self, cuts: Iterable[tuple[int, Bool[Tensor, "R T"]]], device: torch.device
    ) -> Bool[Tensor, "1 1 nR K"]:
        """What each row sees of the K = start + n * R positions. cuts: (way, what its rows do not
        see of the prompt). UsageError where a row is left without any key."""
        causal = torch.ones(self.rows, self.total, dtype=torch.bool, device=device).tril(self.start)
        seen = causal.repeat(self.count, 1, 1)  # (n, R, T): each way as if it were alone
        for way, cut in cuts:
            seen[way] &= ~cut
        if not seen.any(-1).all():
            raise UsageError("a block leaves a query row without any key")
        size = (self.count, self.rows, self.count, self.rows)
        inside = torch.zeros(size, dtype=torch.bool, device=device)
        ways = torch.arange(self.count, device=device)
        inside[ways, :, ways] = seen[:, :, self.start :]
        cached = seen[:, :, : self.start].flatten(0, 1)
        return torch.cat([cached, inside.flatten(2).flatten(0, 1)], 1)[None, None]


@torch.inference_mode()
def branches(
    vlm: VLM,
    batch: Batch,
    cache: DynamicCache,
    embeds: Float[Tensor, "1 T d"],
    start: int,
    blocks: Sequence[Sequence[Block]],
    vision: Float[Tensor, "P d_in"],
) -> Float[Tensor, "n R d"]:
    """Hidden states after the final norm of one prompt, continued from position `start` in n ways,
    each under blocks of its own.

    What comes before the first query that any block names is the same in every layer, so it does
    not run again: all ways run as one packed sequence (PackedWays) behind the cached positions
    before `start`. batch: one prompt without padding; embeds, vision: of vision.entering() and
    entered(); cache: of first_positions(), left as it was; blocks: n lists. R = T - start.
    UsageError where a query row is left without any key.
    """
    total = embeds.shape[1]
    device = embeds.device
    packed = PackedWays(len(blocks), start, total)
    # (way, layers, what its rows do not see) of every block
    cuts = []
    for way, blocks_of_way in enumerate(blocks):
        for block in blocks_of_way:
            if block.queries[0, :start].any():
                raise ValueError(f"a block acts on a position before start={start}")
            cut = block.queries[0, start:total, None] & block.keys[0, None, :total]
            cuts.append((way, block.layers, cut.to(device)))

    # layers with the same blocks share a mask
    acting = [
        tuple(i for i, (_, layers, _) in enumerate(cuts) if layers is None or layer in layers)
        for layer in range(len(vlm.parts.layers))
    ]
    masks = {
        chosen: packed.mask([(cuts[i][0], cuts[i][2]) for i in chosen], device)
        for chosen in {(), *acting}
    }
    more = decoder_inputs(vlm, batch, start)
    in_picture = batch.groups == VISION
    seen_again = int(in_picture[0, start:].sum())  # vision tokens that every way reads
    deep = vision[len(vision) - seen_again :, embeds.shape[-1] :].repeat(packed.count, 1)
    with (
        capture(vlm, mask_of=lambda layer: masks[acting[layer]]),
        deepened(vlm, packed.pack(in_picture[:, start:], 1), deep, begin=start),
    ):
        states = vlm.parts.decoder(
            inputs_embeds=packed.pack(embeds[:, start:], 1),
            attention_mask=masks[()],
            position_ids=packed.pack(batch.position_ids[..., start:], -1),
            past_key_values=first_positions(vlm, cache, start, 1),
            use_cache=True,
            **{name: packed.pack(value, -1) for name, value in more.items()},
        ).last_hidden_state
    return packed.unpack(states)

"""Gradients of generated tokens' logits with respect to every attention map, for all tokens of an
answer at once.

    run = trace(vlm, batch, answer_ids)          # one pass over prompt and answer
    descent = run.descend(targets)
    while descent.layer:                         # from the last layer down
        rows = rows + descent.step(rows)         # rows Ā of that layer, (C, R, N)
    descent.vision_gradient                      # (C, P, d): on to run.tower

The pass keeps the input of every block (blocks.py). Then each block runs once more, from the last
to the first, and hands the gradients of its output on to its input, for all tokens asked for. No
parameter has a gradient. Attention is differentiated by hand (attention_gradient.py), so of maps
and their gradients there are some rows at a time: Ā, which rule 5 of rules.py makes of them, is
known only as what it does to rows. docs/studies/stethoscope.md, section 5.2.

Shapes: T tokens of the answer, N positions of prompt and answer, P vision tokens, d width, C tokens
that are taken together, R rows of each, S positions of the tower's blocks, n queries (and
instruction tokens) of a Q-Former, q of them queries.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vlmdiag.model.decoding import extended
from vlmdiag.model.vision import entered, entering, last_logits, more_inputs
from vlmdiag.relevancy.blocks import Block, ModuleOutput, added, recording, vector_products
from vlmdiag.relevancy.rules import head_mean
from vlmdiag.types import Record

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch.utils.hooks import RemovableHandle

    from vlmdiag.batch import Batch
    from vlmdiag.families import QFormer
    from vlmdiag.types import VLM


BUDGET = 128 * 2**20  # bytes of gradients and maps that are held at once

# ---- from the picture to the vision tokens ----


@dataclass
class TowerPass:
    """How the vision tokens were made, by a connector without queries of its own.

    blocks: of the tower, as they ran, each on B tiles. pooled: the vision tokens with their graph
    from the blocks' outputs. sources (P, k): which positions of the tower's output a vision token
    is made of, counted over all tiles, -1 where it is made of fewer than k. device: where the maps
    are wanted.
    """

    blocks: list[Block]
    pooled: Float[Tensor, "P d"]
    sources: Int[Tensor, "P k"]
    device: torch.device

    @property
    def tiles(self) -> int:
        """How many tiles the tower read; 1 for a picture as a whole."""
        return len(self.blocks[0].input)

    @property
    def positions(self) -> int:
        """Positions of each tile, CLS included."""
        return self.blocks[0].input.shape[1]

    @property
    def bytes_of_one(self) -> int:
        """About what carry() holds for one gradient of the vision tokens beside its budget: that of
        the connector, and of what the tower gives it."""
        return 4 * self.pooled.nbytes + 2 * self.blocks[0].input.nbytes

    def carry(
        self,
        rows: Float[Tensor, "C R S"],
        gradients: Float[Tensor, "C P d"],
        tile: int = 0,
        budget: int = BUDGET,
    ) -> Float[Tensor, "C R S"]:
        """Rows carried down the tower's blocks on one of its tiles by rule 6, for gradients of the
        vision tokens."""
        outputs = [block.output for block in self.blocks]
        # a connector may read several blocks
        arriving = vector_products([self.pooled], outputs, [gradients.to(self.pooled.dtype)])
        d_states: Tensor | None = None
        for index in reversed(range(len(self.blocks))):
            of_block = arriving[index]
            d_states = added(d_states, None if of_block is None else of_block[:, tile])
            if d_states is not None:
                d_states = d_states.contiguous()  # pull() writes into it
                rows = rows + self.blocks[index].tile(tile).pull(d_states, rows, budget)
        return rows


@dataclass
class QueryMaps:
    """Attention of one layer of a Q-Former, with its graph. joint: queries read each other and the
    patches by one map, which both fields hold, (1, H, q, q + S)."""

    own: Float[Tensor, "1 H n n"]
    cross: Float[Tensor, "1 H q S"] | None

    @property
    def joint(self) -> bool:
        """Whether queries read each other and the patches by one map."""
        return self.own is self.cross


@dataclass
class QFormerPass(TowerPass):
    """The same through a Q-Former, whose queries the vision tokens are; they are made of no patch
    of their own (sources is empty)."""

    layers: list[QueryMaps]
    former: QFormer

    @property
    def joint(self) -> bool:
        """Whether queries read each other and the patches by one map."""
        return any(layer.joint for layer in self.layers)

    @property
    def bytes_of_one(self) -> int:
        """The same, with gradients of the maps and the tower's R."""
        maps = [tensor for layer in self.layers for tensor in (layer.own, layer.cross)]
        of_maps = sum(tensor.nbytes for tensor in maps if tensor is not None)
        return super().bytes_of_one + 2 * of_maps + 2 * 4 * self.positions**2

    def query_maps(
        self, gradients: Float[Tensor, "C P d"]
    ) -> list[tuple[Float[Tensor, "C n n"], Float[Tensor, "C q S"] | None]]:
        """Ā of self-attention and of cross-attention, None where there is none, of each layer, for
        gradients of the vision tokens."""
        weights: list[Tensor] = []
        for layer in self.layers:
            weights.append(layer.own)
            if layer.cross is not None:
                weights.append(layer.cross)
        d_weights = vector_products([self.pooled], weights, [gradients.to(self.pooled.dtype)])
        averages = iter(
            self._average(of_layer, d_of_layer, len(gradients))
            for of_layer, d_of_layer in zip(weights, d_weights, strict=True)
        )
        pairs = []
        for layer in self.layers:
            average = next(averages)
            pairs.append((average, None if layer.cross is None else next(averages)))
        if not self.joint:
            return pairs
        # the blocks [Ā_qq | Ā_qi] of one map
        q = self.former.queries
        return [(own[..., :q], None if cross is None else cross[..., q:]) for own, cross in pairs]

    def _average(self, weights: Tensor, d_weights: Tensor | None, count: int) -> Tensor:
        """Rule 5 for one map, 0 where the vision tokens do not depend on it."""
        attention = weights[0].detach().float()
        gradient = torch.zeros_like(weights).float()
        if d_weights is not None:
            gradient = d_weights[:, 0].float()
        return head_mean(attention, gradient).expand(count, -1, -1).to(self.device)


# ---- prompt and answer ----


@dataclass
class Trace:
    """One pass over a prompt and its answer."""

    vlm: VLM
    prompt: Batch  # of the prompt alone
    batch: Batch  # with the answer
    ids: list[int]  # of the answer
    rows: Int[Tensor, " T"]  # positions that produced the answer's tokens
    logits: Float[Tensor, "T V"]  # float32
    vision: Int[Tensor, " P"]  # positions of the vision tokens
    layers: list[Block]  # of the decoder, as they ran
    # a leaf, in the form of vision.entered(): with deepstack (P, (1 + K) d)
    features: Float[Tensor, "P d_in"]
    logit: Float[Tensor, ""]  # sum of the answer's logits, with its graph
    tower: TowerPass | QFormerPass | None  # None: relevancy stops at the vision tokens

    @property
    def length(self) -> int:
        """N, positions of prompt and answer."""
        return self.batch.input_ids.shape[1]

    @property
    def tokens(self) -> Float[Tensor, "P d"]:
        """Vision tokens as the decoder's input has them."""
        width = self.vlm.model.get_input_embeddings().weight.shape[1]
        return self.features.detach()[:, :width]

    def descend(self, targets: Sequence[int], budget: int = BUDGET) -> Descent:
        """Gradients for the tokens `targets` (indices into ids), from the last layer down. budget:
        bytes that hold what they are made of."""
        return Descent(self, list(targets), budget)


class Descent:
    """Gradients of some tokens' logits on their way down the decoder's layers."""

    def __init__(self, run: Trace, targets: list[int], budget: int) -> None:
        self.run = run
        self.targets = targets
        self.budget = budget
        self.layer = len(run.layers)  # the lowest that is done
        self._d_states = self._at_the_top()  # (C, N, d)
        self._d_vision: Tensor | None = None

    def step(self, rows: Float[Tensor, "C R N"]) -> Float[Tensor, "C R N"]:
        """One layer further down: rows Ā of that layer."""
        run = self.run
        self.layer -= 1
        block = run.layers[self.layer]
        carried = block.pull(self._d_states, rows, self.budget)
        if self.layer == 0:
            (to_vision,) = vector_products([block.input], [run.features], [self._of(block)])
            self._d_vision = added(self._d_vision, to_vision)
            self._d_states = self._d_states.new_empty(0)  # no longer needed
        elif block.input is not run.layers[self.layer - 1].output:
            # the model adds something between two layers, such as the picture (deepstack)
            below = run.layers[self.layer - 1].output
            to_below, to_vision = vector_products(
                [block.input], [below, run.features], [self._of(block)]
            )
            self._d_vision = added(self._d_vision, to_vision)
            if to_below is None:
                raise ValueError(f"layer {self.layer} does not read layer {self.layer - 1}")
            self._d_states = to_below[:, 0].contiguous()  # pull() writes into it
        return carried

    def _of(self, block: Block) -> Float[Tensor, "C 1 N d"]:
        """The gradients of what a block read, where it lies."""
        return self._d_states.to(block.input.device)[:, None]

    @property
    def vision_gradient(self) -> Float[Tensor, "C P d_in"]:
        """Gradients of the vision tokens, in the form of Trace.features; the layers that are left
        are gone down first."""
        none = torch.zeros(len(self.targets), 0, self.run.length, device=self.run.rows.device)
        while self.layer:
            self.step(none)
        if self._d_vision is None:
            raise ValueError("the logits do not depend on the vision tokens")
        return self._d_vision

    def _at_the_top(self) -> Float[Tensor, "C N d"]:
        """Gradients of the last layer's output. Norm and LM head see each position alone, so one
        gradient of the sum of all logits holds that of each logit at its own row."""
        run = self.run
        top = run.layers[-1].output
        (d_top,) = torch.autograd.grad(run.logit, top, retain_graph=True)
        d_states = top.new_zeros(len(self.targets), *top.shape[1:])
        rows = run.rows[self.targets].to(top.device)
        d_states[torch.arange(len(rows)), rows] = d_top[0, rows]
        return d_states


def trace(
    vlm: VLM,
    batch: Batch,
    ids: Sequence[int],
    tower: bool = True,
    features: Float[Tensor, "P d_in"] | None = None,
) -> Trace:
    """Run one sample's prompt (a batch of one) and answer ids once.

    tower: keep the vision tower's blocks too, where the family names them. features: vision tokens
    in place of the picture's, as Trace.features. ValueError for more than one prompt or no answer.
    """
    if len(batch.samples) != 1 or not ids:
        raise ValueError(
            f"one prompt and an answer are wanted, got {len(batch.samples)} prompts and {len(ids)}"
            " tokens"
        )
    vlm.need("decoder-only", "every-layer")
    whole = extended(batch, ids)
    options: Record = {
        "attention_mask": whole.attention_mask,
        "position_ids": whole.position_ids,
        "use_cache": False,
        "logits_to_keep": last_logits(vlm, len(ids) + 1),
        **more_inputs(vlm, whole),
    }
    picture = None
    with torch.enable_grad():
        if features is None and tower and vlm.parts.vision_blocks:
            features, picture = _see(vlm, batch)
        elif features is None:
            features = entered(vlm, vlm.vision(batch))
        leaf = features.detach().requires_grad_()
        with (
            recording(vlm.parts.decoder, vlm.parts.layers) as layers,
            entering(vlm, whole, leaf) as embeds,
        ):
            output = vlm.model(inputs_embeds=embeds, **options)
        logits = output.logits[0, -len(ids) - 1 : -1].float()  # (T, V)
        chosen = torch.tensor(list(ids), device=logits.device)
        logit = logits.gather(1, chosen[:, None]).sum()
    first = batch.input_ids.shape[1] - 1
    return Trace(
        vlm=vlm,
        prompt=batch,
        batch=whole,
        ids=list(ids),
        rows=torch.arange(len(ids), device=vlm.device) + first,
        logits=logits.detach(),
        vision=batch.vision_positions(0),
        layers=layers,
        features=leaf,
        logit=logit,
        tower=picture,
    )


def _see(vlm: VLM, batch: Batch) -> tuple[Float[Tensor, "P d_in"], TowerPass | QFormerPass | None]:
    """(vision tokens in the form of entered() with their graph, how they were made)."""
    former = vlm.parts.qformer
    no_layers: list[dict[str, Tensor]] = []
    keeping = _query_attention(former) if former else contextlib.nullcontext(no_layers)
    # each picture by itself, though it may be there twice: its relevancy is its own
    apart = replace(batch, pictures=[bytes([number]) for number in range(len(batch.pictures))])
    with recording(vlm.parts.tower, vlm.parts.vision_blocks) as blocks, keeping as layers:
        features = entered(vlm, vlm.vision(apart))
    if not blocks:
        return features, None
    pooled = features[:, : vlm.model.get_input_embeddings().weight.shape[1]]
    if former:
        none = torch.empty(len(pooled), 0, dtype=torch.long, device=vlm.device)
        maps = [QueryMaps(maps["own"], maps.get("cross")) for maps in layers]
        return features, QFormerPass(blocks, pooled, none, vlm.device, maps, former)
    sources = _sources(vlm, batch, blocks[0].input.shape[1])
    return features, TowerPass(blocks, pooled, sources, vlm.device)


def _sources(vlm: VLM, batch: Batch, positions: int) -> Int[Tensor, "P k"]:
    """TowerPass.sources of a batch's pictures, whose tiles have so many positions each."""
    of_pictures = []
    tiles = 0
    pictures = zip(batch.grids, batch.image_rows, batch.in_pictures(), strict=True)
    for grid, inputs, in_picture in pictures:
        count = int(in_picture.sum())
        # one position each, behind CLS where there is one
        sources = torch.arange(positions - count, positions)[:, None]
        if vlm.family.sources:
            assert grid is not None  # a family that names sources has a grid
            sources = torch.from_numpy(vlm.family.sources(vlm, grid.size, inputs))
        of_pictures.append(torch.where(sources < 0, sources, sources + tiles * positions))
        if len(batch.grids) > 1:
            tiles += math.prod(inputs["pixel_values"].shape[:-3])
    widest = max(sources.shape[1] for sources in of_pictures)
    padded = [
        nn.functional.pad(sources, (0, widest - sources.shape[1]), value=-1)
        for sources in of_pictures
    ]
    return torch.cat(padded).to(vlm.device)


@contextlib.contextmanager
def _query_attention(former: QFormer) -> Iterator[list[dict[str, Tensor]]]:
    """Within the context the attention of a Q-Former's layers is kept, with its graph, as
    {"own"[, "cross"]} of each layer."""
    kept: list[dict[str, Tensor]] = [{} for _ in former.self_attention]
    hooks: list[RemovableHandle] = []
    config: Any = former.self_attention[0].config
    before = config._attn_implementation
    config._attn_implementation = "eager"

    def start(module: nn.Module, args: tuple[Tensor, ...], options: Record) -> None:
        # the queries: the first layer's attention depends on nothing else
        states = args[0] if args else options["hidden_states"]
        states.requires_grad_()

    def keeper(layer: int, kind: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: tuple[object, ...], output: ModuleOutput) -> None:
            kept[layer][kind] = output[1]

        return keep

    try:
        hooks.append(former.self_attention[0].register_forward_pre_hook(start, with_kwargs=True))
        pairs = zip(former.self_attention, former.cross_attention, strict=True)
        for layer, (own, cross) in enumerate(pairs):
            hooks.append(own.register_forward_hook(keeper(layer, "own")))
            if cross is not None:
                hooks.append(cross.register_forward_hook(keeper(layer, "cross")))
        yield kept
    finally:
        config._attn_implementation = before
        for handle in hooks:
            handle.remove()

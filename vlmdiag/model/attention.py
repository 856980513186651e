"""Measure inside the forward pass, and block attention in it: capture(), edit(), Block.

Attention runs through transformers' AttentionInterface: SDPA makes the output, and only the rows
that a probe asked for are computed a second time, in float32, from the query and keys that SDPA
got. Layers are recognised by module identity. Nothing leaves the device before a batch is done.

Shapes: B rows of a batch, H heads, H_kv key-value heads, Q queries and K keys of a pass, D head
dimension, T prompt length with padding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from vlmdiag.cli import UsageError
from vlmdiag.types import Fields, Record

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch.utils.hooks import RemovableHandle

    from vlmdiag.model.probes import Probe
    from vlmdiag.types import VLM

NAME = "vlm_capture"


# --- scores ---------------------------------------------------------------------------------------


def scaling_of(query: Tensor, options: Fields) -> float:
    """What products of queries (..., D) and keys are multiplied by: the model's own scaling, else
    1 / sqrt(D)."""
    scaling: float | None = options.get("scaling")
    return float(query.shape[-1] ** -0.5) if scaling is None else scaling


def scores(
    products: Float[Tensor, "... Q K"],
    mask: Tensor | None,
    softcap: float | None = None,
    bias: Tensor | None = None,
) -> Float[Tensor, "... Q K"]:
    """What the softmax gets of scaled products: softcapped, with the position bias, masked.

    mask: bool, True where a key is seen, or a number that is added; None: every key is seen.
    """
    if softcap is not None:
        products = softcap * torch.tanh(products / softcap)
    if bias is not None:
        products = products + bias.to(products.dtype)
    if mask is None:
        return products
    if mask.dtype == torch.bool:
        return products.masked_fill(~mask, float("-inf"))
    return products + mask.to(products.dtype)


def sinks_of(options: Fields) -> Tensor | None:
    """What each head's softmax has beside the scores (H,), where a model has attention sinks
    (GPT-OSS). UsageError for sinks of another kind."""
    if options.get("sinks") is not None:
        raise UsageError("attention sinks that depend on the query are not known here")
    sinks: Tensor | None = options.get("s_aux")
    return sinks


def softmax(scores: Float[Tensor, "... K"], sinks: Tensor | None) -> Float[Tensor, "... K"]:
    """Attention of a row of scores. A sink s takes its part of it, which no key has:

        exp(z_k) / (exp(s) + sum_j exp(z_j)) = softmax(z)_k sigmoid(log sum_j exp(z_j) - s)

    sinks: of the shape of the scores without K, or one that spreads to it.
    """
    weights = scores.softmax(-1)
    if sinks is None:
        return weights
    kept = (scores.logsumexp(-1) - sinks.to(scores)).sigmoid()
    return weights * kept[..., None]


def full_mask(
    module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, options: Fields
) -> Tensor:
    """The mask (B, 1 or H, Q, K) of a pass as a tensor. transformers gives None where the kernel is
    causal or full by itself, which `is_causal` of the call, else of the module, says."""
    if mask is not None:
        return mask
    queries, keys = query.shape[2], key.shape[2]
    causal = options.get("is_causal")
    if causal is None:
        causal = getattr(module, "is_causal", True)
    seen = torch.ones(queries, keys, dtype=torch.bool, device=query.device)
    if causal:
        seen = seen.tril(keys - queries)
    return seen[None, None].expand(query.shape[0], 1, -1, -1)


class Row:
    """One query row of one layer: query (B, H, D), key (B, H_kv, K, D) as attention got them.

    K counts all positions so far: those that a layer with a sliding window no longer keeps (`gone`)
    have no key and no weight.
    """

    def __init__(
        self,
        module: nn.Module,
        query: Float[Tensor, "B H Q D"],
        key: Float[Tensor, "B H_kv K D"],
        mask: Tensor | None,
        options: Fields,
        index: int = -1,
        gone: int = 0,
    ) -> None:
        if gone:
            mask = full_mask(module, query, key, mask, options)
            unseen = False if mask.dtype == torch.bool else float("-inf")
            mask = nn.functional.pad(mask, (gone, 0), value=unseen)
            key = nn.functional.pad(key, (0, 0, gone, 0))
        self.query = query[:, :, index]
        self.key = key
        self.index = index
        self.scaling = scaling_of(query, options)
        self.softcap: float | None = options.get("softcap")
        self.mask = None if mask is None else mask[:, :, index]
        bias = options.get("position_bias")
        self.bias: Tensor | None = None if bias is None else bias[:, :, index]
        self.sinks = sinks_of(options)
        self._weights: Tensor | None = None

    def dot(self, query: Float[Tensor, "B H D"]) -> Float[Tensor, "B H K"]:
        """Scaled products of any query with this row's keys in float32, without a mask;
        grouped-query attention shares keys between heads."""
        batch, heads, depth = query.shape
        shared = self.key.shape[1]
        grouped = (query.float() * self.scaling).view(batch, shared, heads // shared, depth)
        return (grouped @ self.key.float().transpose(-1, -2)).flatten(1, 2)

    @property
    def scores(self) -> Float[Tensor, "B H K"]:
        """What the softmax gets, float32."""
        return scores(self.dot(self.query), self.mask, self.softcap, self.bias)

    @property
    def weights(self) -> Float[Tensor, "B H K"]:
        """Attention of this row, float32; sums to 1 over K, with attention sinks to less."""
        if self._weights is None:
            self._weights = self.softmax(self.scores)
        return self._weights

    def softmax(self, scores: Float[Tensor, "B H K"]) -> Float[Tensor, "B H K"]:
        """What this row's attention makes of scores, its own or others."""
        return softmax(scores, self.sinks)


# --- the kernel -----------------------------------------------------------------------------------


def kernel(
    module: nn.Module,
    query: Float[Tensor, "B H Q D"],
    key: Float[Tensor, "B H_kv K D"],
    value: Float[Tensor, "B H_kv K D"],
    mask: Tensor | None,
    **options: Any,
) -> Float[Tensor, "B Q H D"]:
    """The output of attention: SDPA, written out where it has no place for what a model does to its
    scores, a softcap or attention sinks."""
    if options.get("softcap") is None and sinks_of(options) is None:
        return sdpa_attention_forward(module, query, key, value, mask, **options)[0]
    return _written_out(module, query, key, value, mask, options)


def _written_out(
    module: nn.Module,
    query: Float[Tensor, "B H Q D"],
    key: Float[Tensor, "B H_kv K D"],
    value: Float[Tensor, "B H_kv K D"],
    mask: Tensor | None,
    options: Fields,
) -> Float[Tensor, "B Q H D"]:
    """A row that sees no key, such as padding in a window, gets 0, as SDPA gives it."""
    shared_by = query.shape[1] // key.shape[1]
    key = key.repeat_interleave(shared_by, 1)
    value = value.repeat_interleave(shared_by, 1)
    if mask is None and query.shape[2] > 1:
        mask = full_mask(module, query, key, None, options)
    products = (query @ key.transpose(-1, -2)).float() * scaling_of(query, options)
    rows = scores(products, mask, options.get("softcap"), options.get("position_bias"))
    sinks = sinks_of(options)
    unseeing = rows.isneginf().all(-1, keepdim=True)
    weights = softmax(rows.masked_fill(unseeing, 0), None if sinks is None else sinks[:, None])
    weights = weights.masked_fill(unseeing, 0).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous()


def _attention(
    module: nn.Module,
    query: Float[Tensor, "B H Q D"],
    key: Float[Tensor, "B H_kv K D"],
    value: Float[Tensor, "B H_kv K D"],
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Float[Tensor, "B Q H D"], None]:
    """SDPA for the output; then what the capture in progress wants of this layer."""
    layer = None if _active is None else _active.layer_of.get(module)
    if _active is None or layer is None:
        return kernel(module, query, key, value, attention_mask, **options), None
    if _active.mask_of is not None:
        attention_mask = _active.mask_of(layer).to(query.device)
    output = kernel(module, query, key, value, attention_mask, **options)
    gone = max(0, _active.total - key.shape[2])
    blocked = _blocked(_active.blocks, layer, query, key, gone)
    if blocked is not None:
        attention_mask = full_mask(module, query, key, attention_mask, options)
        attention_mask = _without(attention_mask, blocked)
        # Only the blocked rows are computed again, so that all others stay bit-identical.
        in_block = blocked.any(-1)[:, 0]  # (B, Q)
        queries = in_block.any(0).nonzero()[:, 0]
        again = kernel(
            module, query[:, :, queries], key, value, attention_mask[:, :, queries], **options
        )
        output = output.clone()
        output[:, queries] = torch.where(
            in_block[:, queries, None, None], again, output[:, queries]
        )
    if _active.together is not None:
        _active.together.attention(layer, module, query, key, attention_mask, options, gone)
    elif _active.probes or _active.inspect is not None:
        row = Row(module, query, key, attention_mask, options, gone=gone)
        for probe in _active.probes:
            probe.attention(layer, row)
        if _active.inspect is not None:
            _active.inspect(layer, row, nn.functional.pad(value, (0, 0, gone, 0)), output)
    return output, None


def _mask(
    batch_size: int,
    q_length: int,
    mask_function: Callable[..., Tensor] = causal_mask_function,
    attention_mask: Tensor | None = None,
    **options: Any,
) -> Bool[Tensor, "1_or_B 1 Q K"] | None:
    """transformers' mask of a pass; one row that stands for all where none has padding of its
    own."""
    if (
        mask_function is causal_mask_function
        and attention_mask is not None
        and q_length > 1
        and bool((attention_mask == attention_mask[:1]).all())
    ):
        batch_size, attention_mask = 1, attention_mask[:1]
    mask: Tensor | None = sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        mask_function=mask_function,
        attention_mask=attention_mask,
        **options,
    )
    return mask


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)


# --- blocks ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """Attention that is cut: no query position of `queries` sees a key position of `keys`.

    Both are over padded positions, T or more; generated tokens follow the prompt, and positions
    past the end are not blocked. layers: indices; None: all layers.
    """

    queries: Bool[Tensor, "B T"]
    keys: Bool[Tensor, "B T"]
    layers: frozenset[int] | None = None


def _blocked(
    blocks: Sequence[Block], layer: int, query: Tensor, key: Tensor, gone: int
) -> Bool[Tensor, "B 1 Q K"] | None:
    """What the blocks of a layer cut in this pass, None if nothing. gone: positions before the
    first key."""
    total = gone + key.shape[2]
    first_query = total - query.shape[2]
    cut = None
    for block in blocks:
        if block.layers is not None and layer not in block.layers:
            continue
        queries = _reaching(block.queries, total)[:, first_query:total]
        keys = _reaching(block.keys, total)[:, gone:total]
        pairs = (queries[:, :, None] & keys[:, None, :])[:, None].to(key.device)
        cut = pairs if cut is None else cut | pairs
    return cut if cut is not None and bool(cut.any()) else None


def _reaching(positions: Bool[Tensor, "B T"], total: int) -> Bool[Tensor, "B total"]:
    """Positions of a block, False up to `total` past their end."""
    return nn.functional.pad(positions, (0, max(0, total - positions.shape[1])))


def _without(mask: Tensor, blocked: Bool[Tensor, "B 1 Q K"]) -> Tensor:
    """A full mask (B, 1 or H, Q, K) without what is blocked; UsageError where a blocked row of a
    boolean mask is left without any key."""
    if mask.dtype != torch.bool:
        return mask.masked_fill(blocked, torch.finfo(mask.dtype).min)
    mask = mask & ~blocked
    blocked_rows = blocked.any(-1).expand(-1, mask.shape[1], -1)  # (B, 1 or H, Q)
    if not mask[blocked_rows].any(-1).all():
        raise UsageError("a block leaves a query row without any key")
    return mask


@contextlib.contextmanager
def one_mask(vlm: VLM) -> Iterator[None]:
    """Passes over rows that are padded alike have one mask for all of them, as in a capture.

    Conditions of one prompt differ in what stands at its positions, not in which are seen. A mask
    for each row is the largest thing in their memory, all the more as SDPA makes numbers of it.
    """
    decoder = vlm.parts.decoder
    implementation = decoder.config._attn_implementation
    if implementation != "sdpa":
        yield
        return
    decoder.set_attn_implementation(NAME)
    try:
        yield
    finally:
        decoder.set_attn_implementation(implementation)


# --- capture and edit -----------------------------------------------------------------------------

Inspect = Callable[[int, Row, Tensor, Tensor], None]
MaskOf = Callable[[int], Tensor]


@dataclass
class _Active:
    """The capture in progress."""

    layer_of: dict[nn.Module, int]  # every module of the decoder's layers -> layer index
    probes: list[Probe]
    blocks: list[Block]
    inspect: Inspect | None
    mask_of: MaskOf | None
    changed: list[Tensor] = field(default_factory=list)  # positions of an edit's embeddings
    total: int = 0  # positions seen by the pass that runs, those in the cache included
    together: Together | None = None  # of the pass that runs


_active: _Active | None = None


def is_capturing() -> bool:
    """Whether a capture or an edit is in progress."""
    return _active is not None


def reads_passes() -> bool:
    """Whether the capture in progress is about passes as the model makes them, such as one that
    checks how they are captured, so that together() would change what it sees."""
    if _active is None:
        return False
    own = _active.inspect is not None or _active.mask_of is not None
    return own or any(probe.wants_hidden == "index" for probe in _active.probes)


def check_edit(start: int) -> None:
    """UsageError where the edit in progress is of positions before `start`, which a cache has."""
    if _active is None:
        return
    rows = [block.queries[:, :start].any() for block in _active.blocks]
    rows += [(positions < start).any() for positions in _active.changed]
    if any(map(bool, rows)):
        raise UsageError(
            f"an edit is of positions before {start}, which a cache has and which do not run again:"
            " read the whole prompt"
        )


class Together:
    """One pass over the tokens of several steps, which the probes of a capture hear of as a pass
    for each, once it is known how many of them count."""

    def __init__(self, probes: Sequence[Probe]) -> None:
        self.probes = probes
        # what a pass over one of the tokens would have told, by its place from the end, -1 the last
        self._heard: list[Callable[[Probe, int], None]] = []

    def attention(
        self,
        layer: int,
        module: nn.Module,
        query: Float[Tensor, "B H Q D"],
        key: Float[Tensor, "B H_kv K D"],
        mask: Tensor | None,
        options: Fields,
        gone: int,
    ) -> None:
        """What attention of a layer got; keys are held as they are, not copied."""
        made: dict[int, Row] = {}  # the row of the step that is told, the same for all probes

        def row_of(place: int) -> Row:
            at = slice(place, place + 1 or None)
            keys = slice(key.shape[2] + 1 + place)  # those behind are of later steps

            def seen(scores: Tensor | None) -> Tensor | None:
                """Of (.., Q or 1, K) what belongs to the step."""
                if scores is None:
                    return None
                return scores[..., at if scores.shape[2] > 1 else slice(None), keys]

            bias = seen(options.get("position_bias"))
            of_step = options if bias is None else {**options, "position_bias": bias}
            return Row(module, query[:, :, at], key[:, :, keys], seen(mask), of_step, gone=gone)

        def hear(probe: Probe, place: int) -> None:
            if place not in made:
                made.clear()
                made[place] = row_of(place)
            probe.attention(layer, made[place])

        self._heard.append(hear)

    def hidden(self, index: int, states: Float[Tensor, "B Q d"]) -> None:
        """The residual stream of the pass."""

        def hear(probe: Probe, place: int) -> None:
            if probe.wants_hidden:
                probe.hidden(index, states[:, place : place + 1 or None])

        self._heard.append(hear)

    def tell(self, count: int, size: int) -> None:
        """Tell the probes of the first `count` of the pass's `size` tokens."""
        for step in range(count):
            for probe in self.probes:
                probe.begin()
            for hear in self._heard:
                for probe in self.probes:
                    hear(probe, step - size)
            for probe in self.probes:
                probe.end()


@contextlib.contextmanager
def together() -> Iterator[Together]:
    """A pass within is over several steps' tokens: the capture in progress measures nothing before
    Together.tell(). Without a capture there is nothing to tell."""
    told = Together([] if _active is None else _active.probes)
    if _active is not None:
        _active.together = told
    try:
        yield told
    finally:
        if _active is not None:
            _active.together = None


@contextlib.contextmanager
def edit(
    vlm: VLM,
    embeddings: Sequence[tuple[int, Int[Tensor, " n"], Float[Tensor, "n d"]]] = (),
    blocks: Sequence[Block] = (),
    probes: Sequence[Probe] = (),
) -> Iterator[None]:
    """Change what the decoder computes, and measure under the change.

        with edit(vlm, blocks=[Block(last_row, object_tokens, frozenset(range(8)))], probes=[mass]):
            answer = generate(vlm, batch, 1)

    embeddings: (row, positions, values) to put in place of the decoder's inputs in the prefill;
    blocks: see Block. UsageError where the prefill goes on from a cache that has positions which
    are to be changed. Vision tokens as a whole are changed in features.pooler_output, which
    generate() takes. Query rows that no block names stay bit-identical.
    """

    def replace(
        module: nn.Module, args: tuple[object, ...], kwargs: Record
    ) -> tuple[tuple[object, ...], Record]:
        states, cache = kwargs.get("inputs_embeds"), kwargs.get("past_key_values")
        start = 0 if cache is None else cache.get_seq_length()
        if states is None or start > last:
            return args, kwargs  # a later step
        states = states.clone()
        for row, positions, values in embeddings:
            states[row, positions - start] = values.to(states)
        kwargs["inputs_embeds"] = states
        return args, kwargs

    hook = None
    last = max(
        (int(positions.max()) for _, positions, _ in embeddings if len(positions)), default=-1
    )
    if embeddings:
        hook = vlm.parts.decoder.register_forward_pre_hook(replace, with_kwargs=True)
    try:
        with capture(vlm, probes, blocks):
            assert _active is not None
            _active.changed = [positions for _, positions, _ in embeddings]
            yield
    finally:
        if hook is not None:
            hook.remove()


@contextlib.contextmanager
def capture(
    vlm: VLM,
    probes: Sequence[Probe] = (),
    blocks: Sequence[Block] = (),
    inspect: Inspect | None = None,
    mask_of: MaskOf | None = None,
) -> Iterator[None]:
    """Run forward passes under measurement.

        with capture(vlm, [mass := GroupMass(batch)]):
            answer = generate(vlm, batch, max_new_tokens=32)

    inspect(layer, Row, value, output) sees every layer's attention, for tests. mask_of(layer) gives
    the mask (1 or B, 1, Q, K) of each layer in place of the model's own, see prefix.branches().
    Leaves no trace: hooks, attention setting and the capture itself are gone after it, also after
    an exception. RuntimeError inside another capture; UsageError for an encoder-decoder, whose
    decoder does not see the prompt's positions.
    """
    global _active
    if _active is not None:
        raise RuntimeError("captures do not nest: give one capture all probes")
    vlm.need("decoder-only")
    decoder, layers = vlm.parts.decoder, vlm.parts.layers
    layer_of = {module: i for i, layer in enumerate(layers) for module in layer.modules()}
    for probe in probes:
        probe.num_layers = len(layers)
    active = _Active(layer_of, list(probes), list(blocks), inspect, mask_of)
    implementation = decoder.config._attn_implementation
    hooks: list[RemovableHandle] = []
    try:
        hooks += _hooks(decoder, layers, active)
        decoder.set_attn_implementation(NAME)
        _active = active
        yield
    finally:
        _active = None
        for hook in hooks:
            hook.remove()
        decoder.set_attn_implementation(implementation)


def _hooks(
    decoder: nn.Module, layers: Sequence[nn.Module], active: _Active
) -> list[RemovableHandle]:
    """Tell the probes where a pass begins and ends, and the residual stream to those that want
    it."""
    want_hidden = [probe for probe in active.probes if probe.wants_hidden]

    def begin(module: nn.Module, args: tuple[object, ...], kwargs: Record) -> None:
        states = kwargs.get("inputs_embeds", kwargs.get("input_ids"))
        cache = kwargs.get("past_key_values")
        active.total = 0 if states is None else states.shape[1]
        active.total += 0 if cache is None else cache.get_seq_length()
        for probe in active.probes if active.together is None else ():
            probe.begin()

    def end(module: nn.Module, args: tuple[object, ...], output: object) -> None:
        for probe in active.probes if active.together is None else ():
            probe.end()

    def tell(index: int, states: Tensor) -> None:
        if states.ndim != 3 and any(probe.wants_hidden != "index" for probe in want_hidden):
            raise UsageError(
                f"the layers of {type(decoder).__name__} carry several residual streams"
                f" {tuple(states.shape)}, and this measure is of one"
            )
        if active.together is not None:
            active.together.hidden(index, states)
            return
        for probe in want_hidden:
            probe.hidden(index, states)

    def embeddings(module: nn.Module, args: tuple[Tensor, ...], kwargs: Record) -> None:
        tell(0, args[0] if args else kwargs["hidden_states"])

    def output_of(index: int) -> Callable[..., None]:
        def hook(
            module: nn.Module, args: tuple[object, ...], output: Tensor | tuple[Tensor, ...]
        ) -> None:
            tell(index + 1, output[0] if isinstance(output, tuple) else output)

        return hook

    hooks = [
        decoder.register_forward_pre_hook(begin, with_kwargs=True),
        decoder.register_forward_hook(end),
    ]
    if want_hidden:
        hooks.append(layers[0].register_forward_pre_hook(embeddings, with_kwargs=True))
        for index, layer in enumerate(layers):
            hooks.append(layer.register_forward_hook(output_of(index)))
    return hooks

"""Measure inside the forward pass, and block attention in it: capture(), edit(), Block.

Attention runs through transformers' AttentionInterface: SDPA makes the output, and only the rows
that a probe asked for are computed a second time, in float32, from the query and keys that SDPA
got. Layers are recognised by module identity. Nothing leaves the device before a batch is done.
"""

import contextlib
from dataclasses import dataclass

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from vlmdiag.cli import UsageError

NAME = "vlm_capture"


_active = None  # the capture or edit in progress


class Row:
    """One query row of one layer. query (B, H, D), key (B, H_kv, K, D) as attention got them;
    scores and weights (B, H, K) float32.

    K counts all positions so far: those that a layer with a sliding window no longer keeps (`gone`)
    have no key and no weight.
    """

    def __init__(self, module, query, key, mask, options, index=-1, gone=0):
        if gone:
            mask = _full_mask(module, query, key, mask, options)
            pad = torch.nn.functional.pad
            key, mask = (
                pad(key, (0, 0, gone, 0)),
                pad(mask, (gone, 0), value=False if mask.dtype == torch.bool else float("-inf")),
            )
        self.query, self.key = query[:, :, index], key
        scaling = options.get("scaling")
        self.scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        self.softcap = options.get("softcap")
        self.bias = options.get("position_bias")
        self.mask = None if mask is None else mask[:, :, index]
        self.bias = None if self.bias is None else self.bias[:, :, index].float()
        self.index = index
        self._weights = None

    def dot(self, query):
        """Scaled scores (B, H, K) of any query (B, H, D) against this row's keys; grouped-query
        attention shares keys between heads. No mask."""
        rows, heads, depth = query.shape
        shared = self.key.shape[1]
        scores = (query.float() * self.scaling).view(
            rows, shared, heads // shared, depth
        ) @ self.key.float().transpose(-1, -2)
        return scores.flatten(1, 2)

    @property
    def scores(self):
        scores = self.dot(self.query)
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        if self.bias is not None:
            scores = scores + self.bias
        if self.mask is not None:
            scores = (
                scores.masked_fill(~self.mask, float("-inf"))
                if self.mask.dtype == torch.bool
                else scores + self.mask.float()
            )
        return scores

    @property
    def weights(self):
        if self._weights is None:
            self._weights = self.scores.softmax(-1)
        return self._weights


def kernel(module, query, key, value, mask, **options):
    """The attention's output (B, Q, H, D): SDPA, written out where scores are softcapped."""
    if options.get("softcap") is not None:
        return _softcapped(module, query, key, value, mask, **options)
    return sdpa_attention_forward(module, query, key, value, mask, **options)[0]


def _attention(module, query, key, value, attention_mask, **options):
    """SDPA for the output; then what the capture in progress wants of this layer."""

    def attend(query, mask):
        return kernel(module, query, key, value, mask, **options)

    layer = _active.layer_of.get(module) if _active is not None else None
    if layer is not None and _active.mask_of is not None:
        attention_mask = _active.mask_of(layer)
    output = attend(query, attention_mask)
    if layer is None:
        return output, None
    gone = max(0, _active.total - key.shape[2])
    blocked = _blocked(layer, query, key, gone)
    if (
        blocked is not None
    ):  # only the blocked rows are made again, so that all others stay bit-identical
        base = _full_mask(module, query, key, attention_mask, options)
        attention_mask = (
            base & ~blocked
            if base.dtype == torch.bool
            else base.masked_fill(blocked, torch.finfo(base.dtype).min)
        )
        rows = blocked.any(-1)[:, 0]  # (B, Q)
        if not (
            attention_mask[rows[:, None].expand(-1, base.shape[1], -1)].any(-1)
            if base.dtype == torch.bool
            else torch.ones(1)
        ).all():
            raise UsageError("a block leaves a query row without any key")
        index = rows.any(0).nonzero()[:, 0]
        again = attend(query[:, :, index], attention_mask[:, :, index])
        output = output.clone()
        output[:, index] = torch.where(rows[:, index, None, None], again, output[:, index])
    if _active.probes or _active.inspect:
        row = Row(module, query, key, attention_mask, options, gone=gone)
        for probe in _active.probes:
            probe.attention(layer, row)
        if _active.inspect is not None:
            _active.inspect(layer, row, torch.nn.functional.pad(value, (0, 0, gone, 0)), output)
    return output, None


def _blocked(layer, query, key, gone):
    """(B, 1, Q, K) bool of the blocks that act in a layer, None if nothing is blocked in this pass.
    gone: positions before the first key."""
    found = None
    for block in _active.blocks:
        if block.layers is not None and layer not in block.layers:
            continue
        total, count = gone + key.shape[2], query.shape[2]
        reach = max(0, total - block.queries.shape[1]), max(0, total - block.keys.shape[1])
        queries = torch.nn.functional.pad(block.queries, (0, reach[0]))[:, total - count : total]
        keys = torch.nn.functional.pad(block.keys, (0, reach[1]))[:, gone:total]
        here = (queries[:, :, None] & keys[:, None, :])[:, None].to(key.device)
        found = here if found is None else found | here
    return found if found is not None and found.any() else None


def _full_mask(module, query, key, mask, options):
    """The mask of a pass as a tensor: what transformers left out because the kernel is causal or
    full by itself."""
    if mask is not None:
        return mask
    count, total = query.shape[2], key.shape[2]
    causal = options.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    full = torch.ones(count, total, dtype=torch.bool, device=query.device)
    return (full.tril(total - count) if causal else full)[None, None].expand(
        query.shape[0], 1, -1, -1
    )


def _softcapped(module, query, key, value, mask, scaling=None, softcap=None, **_):
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = (
        torch.tanh(
            query
            @ key.transpose(-1, -2)
            * (query.shape[-1] ** -0.5 if scaling is None else scaling)
            / softcap
        )
        * softcap
    )
    if mask is None and query.shape[2] > 1:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril(
            key.shape[2] - query.shape[2]
        )
    if mask is not None:
        scores = (
            scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
        )
    return (
        (scores.softmax(-1, dtype=torch.float32).to(query.dtype) @ value)
        .transpose(1, 2)
        .contiguous()
    )


AttentionInterface.register(NAME, _attention)


AttentionMaskInterface.register(NAME, sdpa_mask)


@dataclass(frozen=True)
class Block:
    """Attention that is cut: no query position of `queries` sees a key position of `keys`, both (B,
    >= T) bool over padded positions (generated tokens follow the prompt; positions past the end are
    not blocked), in `layers` (indices; None: all)."""

    queries: torch.Tensor
    keys: torch.Tensor
    layers: frozenset | None = None


@dataclass
class _Active:
    layer_of: dict
    probes: list
    blocks: list
    inspect: object
    mask_of: object = None
    total: int = 0  # positions seen by the pass that runs, those in the cache included


@contextlib.contextmanager
def edit(vlm, embeddings=(), blocks=(), probes=()):
    """Change what the decoder computes, and measure under the change.

        with edit(vlm, blocks=[Block(last_row, object_tokens, frozenset(range(8)))], probes=[mass]):
            answer = generate(vlm, batch, 1)

    embeddings: (row, positions (n,), values (n, d)) to put in place of the decoder's inputs in the
    prefill; blocks: see Block. Vision tokens as a whole are changed in features.pooler_output,
    which generate() takes. Query rows that no block names stay bit-identical.
    """

    def replace(module, args, kwargs):
        states = kwargs["inputs_embeds"]
        if states.shape[1] > 1:
            states = states.clone()
            for row, positions, values in embeddings:
                states[row, positions] = values.to(states)
            kwargs["inputs_embeds"] = states
        return args, kwargs

    hook = (
        vlm.parts.decoder.register_forward_pre_hook(replace, with_kwargs=True)
        if embeddings
        else None
    )
    try:
        with capture(vlm, probes, blocks):
            yield
    finally:
        if hook is not None:
            hook.remove()


@contextlib.contextmanager
def capture(vlm, probes=(), blocks=(), inspect=None, mask_of=None):
    """Run forward passes under measurement.

        with capture(vlm, [mass := GroupMass(vlm, batch)]):
            answer = generate(vlm, batch, max_new_tokens=32)

    probes: objects with begin(), attention(layer, Row), hidden(index, states) and end() per forward
    pass. inspect(layer, Row, value, output): for tests. mask_of(layer) -> (1 or B, 1, Q, K) bool:
    the mask of each layer in place of the model's own, see branches(). Leaves no trace: hooks,
    attention setting and the capture itself are gone after it, also after an exception.
    """
    global _active
    if _active is not None:
        raise RuntimeError("captures do not nest: give one capture all probes")
    vlm.need(
        "decoder-only"
    )  # else the prompt's positions are in an encoder, and probes would read a decoder that does not see them
    decoder, layers = vlm.parts.decoder, vlm.parts.layers
    layer_of = {module: i for i, layer in enumerate(layers) for module in layer.modules()}
    before, hooks = decoder.config._attn_implementation, []
    wants_hidden = [probe for probe in probes if getattr(probe, "wants_hidden", False)]

    def begin(module, args, kwargs):
        read, cache = (
            kwargs.get("inputs_embeds", kwargs.get("input_ids")),
            kwargs.get("past_key_values"),
        )
        _active.total = (0 if read is None else read.shape[1]) + (
            0 if cache is None else cache.get_seq_length()
        )
        for probe in probes:
            probe.begin()

    def end(module, args, output):
        for probe in probes:
            probe.end()

    def state(index):
        def hook(module, args, output):
            states = output[0] if isinstance(output, tuple) else output
            for probe in wants_hidden:
                probe.hidden(index, states)

        return hook

    def first(module, args, kwargs):
        states = args[0] if args else kwargs["hidden_states"]
        for probe in wants_hidden:
            probe.hidden(0, states)

    try:
        hooks.append(decoder.register_forward_pre_hook(begin, with_kwargs=True))
        hooks.append(decoder.register_forward_hook(end))
        if wants_hidden:
            hooks.append(layers[0].register_forward_pre_hook(first, with_kwargs=True))
            hooks += [layer.register_forward_hook(state(i + 1)) for i, layer in enumerate(layers)]
        decoder.set_attn_implementation(NAME)
        _active = _Active(layer_of, list(probes), list(blocks), inspect, mask_of)
        yield
    finally:
        _active = None
        for hook in hooks:
            hook.remove()
        decoder.set_attn_implementation(before)

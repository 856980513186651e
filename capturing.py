"""Measure inside the forward pass, change what the decoder reads, and decode: capture(), edit(), generate(), check().

Attention runs through transformers' AttentionInterface: SDPA makes the output, and only the rows that a probe asked for are computed a second time,
in float32, from the query and keys that SDPA got. Layers are recognised by module identity. Nothing leaves the device before a batch is done."""

import contextlib
import hashlib
import inspect
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from cli import UsageError
from groups import GROUPS, PAD

NAME = "vlm_capture"
VISION = GROUPS.index("vision")
_active = None  # the capture or edit in progress


class Row:
    """One query row of one layer. query (B, H, D), key (B, H_kv, K, D) as attention got them; scores and weights (B, H, K) float32.

    K counts all positions so far: those that a layer with a sliding window no longer keeps (`gone`) have no key and no weight."""

    def __init__(self, module, query, key, mask, options, index=-1, gone=0):
        if gone:
            mask = _full_mask(module, query, key, mask, options)
            pad = torch.nn.functional.pad
            key, mask = pad(key, (0, 0, gone, 0)), pad(mask, (gone, 0), value=False if mask.dtype == torch.bool else float("-inf"))
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
        """Scaled scores (B, H, K) of any query (B, H, D) against this row's keys; grouped-query attention shares keys between heads. No mask."""
        rows, heads, depth = query.shape
        shared = self.key.shape[1]
        scores = (query.float() * self.scaling).view(rows, shared, heads // shared, depth) @ self.key.float().transpose(-1, -2)
        return scores.flatten(1, 2)

    @property
    def scores(self):
        scores = self.dot(self.query)
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        if self.bias is not None:
            scores = scores + self.bias
        if self.mask is not None:
            scores = scores.masked_fill(~self.mask, float("-inf")) if self.mask.dtype == torch.bool else scores + self.mask.float()
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
    if blocked is not None:  # only the blocked rows are made again, so that all others stay bit-identical
        base = _full_mask(module, query, key, attention_mask, options)
        attention_mask = base & ~blocked if base.dtype == torch.bool else base.masked_fill(blocked, torch.finfo(base.dtype).min)
        rows = blocked.any(-1)[:, 0]  # (B, Q)
        if not (attention_mask[rows[:, None].expand(-1, base.shape[1], -1)].any(-1) if base.dtype == torch.bool else torch.ones(1)).all():
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
    """(B, 1, Q, K) bool of the blocks that act in a layer, None if nothing is blocked in this pass. gone: positions before the first key."""
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
    """The mask of a pass as a tensor: what transformers left out because the kernel is causal or full by itself."""
    if mask is not None:
        return mask
    count, total = query.shape[2], key.shape[2]
    causal = options.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    full = torch.ones(count, total, dtype=torch.bool, device=query.device)
    return (full.tril(total - count) if causal else full)[None, None].expand(query.shape[0], 1, -1, -1)


def _softcapped(module, query, key, value, mask, scaling=None, softcap=None, **_):
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = torch.tanh(query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling) / softcap) * softcap
    if mask is None and query.shape[2] > 1:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril(key.shape[2] - query.shape[2])
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return (scores.softmax(-1, dtype=torch.float32).to(query.dtype) @ value).transpose(1, 2).contiguous()


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


@dataclass(frozen=True)
class Block:
    """Attention that is cut: no query position of `queries` sees a key position of `keys`, both (B, >= T) bool over padded positions (generated tokens
    follow the prompt; positions past the end are not blocked), in `layers` (indices; None: all)."""

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

    embeddings: (row, positions (n,), values (n, d)) to put in place of the decoder's inputs in the prefill; blocks: see Block. Vision tokens as a whole
    are changed in features.pooler_output, which generate() takes. Query rows that no block names stay bit-identical."""

    def replace(module, args, kwargs):
        states = kwargs["inputs_embeds"]
        if states.shape[1] > 1:
            states = states.clone()
            for row, positions, values in embeddings:
                states[row, positions] = values.to(states)
            kwargs["inputs_embeds"] = states
        return args, kwargs

    hook = vlm.parts.decoder.register_forward_pre_hook(replace, with_kwargs=True) if embeddings else None
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

    probes: objects with begin(), attention(layer, Row), hidden(index, states) and end() per forward pass. inspect(layer, Row, value, output): for tests.
    mask_of(layer) -> (1 or B, 1, Q, K) bool: the mask of each layer in place of the model's own, see branches().
    Leaves no trace: hooks, attention setting and the capture itself are gone after it, also after an exception."""
    global _active
    if _active is not None:
        raise RuntimeError("captures do not nest: give one capture all probes")
    vlm.need("decoder-only")  # else the prompt's positions are in an encoder, and probes would read a decoder that does not see them
    decoder, layers = vlm.parts.decoder, vlm.parts.layers
    layer_of = {module: i for i, layer in enumerate(layers) for module in layer.modules()}
    before, hooks = decoder.config._attn_implementation, []
    wants_hidden = [probe for probe in probes if getattr(probe, "wants_hidden", False)]

    def begin(module, args, kwargs):
        read, cache = kwargs.get("inputs_embeds", kwargs.get("input_ids")), kwargs.get("past_key_values")
        _active.total = (0 if read is None else read.shape[1]) + (0 if cache is None else cache.get_seq_length())
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


class Probe:
    """What a capture calls; a probe overrides what it needs. step counts forward passes: 0 is the prefill."""

    wants_hidden = False
    step = -1

    def begin(self):
        self.step += 1

    def attention(self, layer, row):
        pass

    def hidden(self, index, states):
        pass

    def end(self):
        pass


def group_columns(groups, length):
    """One-hot groups of the keys (B, length, G) float32; positions after the prompt are generated tokens, padding is in no group."""
    codes = torch.nn.functional.pad(groups, (0, length - groups.shape[1]), value=GROUPS.index("generated"))
    return torch.nn.functional.one_hot(codes.clamp(min=0), len(GROUPS)).float() * (codes != PAD)[..., None]


class GroupMass(Probe):
    """Attention mass of each token group in the last row of every pass. mass: a list over steps of (L, B, H, G) float32; sums to 1 over G."""

    def __init__(self, batch, max_new_tokens=0):
        self.columns = group_columns(batch.groups, batch.groups.shape[1] + max_new_tokens)
        self.mass = []

    def begin(self):
        super().begin()
        self.layers = {}

    def attention(self, layer, row):
        self.layers[layer] = (row.weights @ self.columns[:, : row.key.shape[2]].to(row.key.device)).to(self.columns.device)

    def end(self):
        self.mass.append(torch.stack([self.layers[layer] for layer in sorted(self.layers)]))


class HiddenNorms(Probe):
    """L2 norms of the residual stream at every prompt position, prefill only. norms (B, L + 1, T) float32: index 0 the embeddings, l + 1 the output of
    layer l before the final norm; final: a norm to apply to the last one, as Hugging Face's hidden_states do. Beyond Semantics, section 2.3 of our
    study; rms = l2 / sqrt(d)."""

    wants_hidden = True

    def __init__(self, kind="l2", final=None, num_layers=None):
        self.kind, self.final, self.num_layers, self._states = kind, final, num_layers, {}

    def hidden(self, index, states):
        if self.step == 0:
            if self.final is not None and index == self.num_layers:
                states = self.final(states)
            norm = torch.linalg.vector_norm(states, dim=-1, dtype=torch.float32)
            norm = norm.to(self._states[0].device) if self._states else norm
            self._states[index] = norm / states.shape[-1] ** 0.5 if self.kind == "rms" else norm

    @property
    def norms(self):
        return torch.stack([self._states[index] for index in sorted(self._states)], 1)


class HiddenStates(Probe):
    """The residual stream at every prompt position, prefill only: states[index] (B, T, d) as the model computes it, index 0 the embeddings, l + 1 the output
    of layer l before the final norm. keep(index) -> whether an index is wanted (default: all)."""

    wants_hidden = True

    def __init__(self, keep=lambda index: True):
        self.keep, self.states = keep, {}

    def hidden(self, index, states):
        if self.step == 0 and self.keep(index):
            self.states[index] = states


class LastStates(Probe):
    """The residual stream at the last prompt position after chosen layers: states (B, layers, d) as the model computes it, prefill only."""

    wants_hidden = True

    def __init__(self, layers):
        self.layers, self._found = list(layers), {}

    def hidden(self, index, states):
        if self.step == 0 and index - 1 in self.layers:
            self._found[index - 1] = states[:, -1]

    @property
    def states(self):
        device = self._found[self.layers[0]].device
        return torch.stack([self._found[layer].to(device) for layer in self.layers], 1)


class RopeShift(Probe):
    """How the last prompt row reacts when all vision tokens move `delta` positions towards it; each layer alone, nothing propagates.

    q . R(delta) k = R(-delta) q . k, so one more row of scores per delta suffices. Gives (L, B, H) float32 tensors: alphaV, share_prod_notV,
    and with a leading axis over deltas delta_gv = sum_v alpha_v / alphaV (z'_v - z_v) / delta and delta_alphaV = alphaV' - alphaV; and
    delta_gv_derivative, the limit of delta_gv. NaN where alphaV is 0. keep (B, K) bool: keys that count (default all; the paper's
    --restrict_to_past leaves out the row's own key). Beyond Semantics, section 2.6 of our study."""

    def __init__(self, batch, rotary, deltas, restrict_to_past=False):
        self.rotary, self.deltas, self.restrict = rotary, list(deltas), restrict_to_past
        self.vision = batch.groups == VISION
        self._found = {}

    def attention(self, layer, row):
        if self.step > 0:
            return
        if row.softcap is not None:
            raise UsageError("the closed form of the RoPE probe does not hold for softcapped scores")
        scores, plain = row.scores, row.dot(row.query)
        if self.restrict:
            scores = scores.clone()
            scores[..., -1] = float("-inf")
        weights = scores.softmax(-1)
        vision = self.vision[:, None].to(weights.device)
        alpha = (weights * vision).sum(-1)
        inside = weights * vision / alpha[..., None]

        def mean_over_vision(change):
            return (inside * change).nan_to_num().sum(-1).where(alpha > 0, float("nan"))

        found = {"alphaV": alpha, "share_prod_notV": alpha * (1 - alpha), "delta_gv": [], "delta_alphaV": []}
        for delta in self.deltas:
            change = row.dot(self.rotary.turn(row.query, -delta)) - plain
            found["delta_gv"].append(mean_over_vision(change) / delta if delta else torch.zeros_like(alpha))
            found["delta_alphaV"].append(((scores + change * vision).softmax(-1) * vision).sum(-1) - alpha)
        found["delta_gv"], found["delta_alphaV"] = torch.stack(found["delta_gv"]), torch.stack(found["delta_alphaV"])
        found["delta_gv_derivative"] = mean_over_vision(-row.dot(self.rotary.rate(row.query)))
        self._found[layer] = {name: value.to(self.vision.device) for name, value in found.items()}

    def __getitem__(self, name):
        """alphaV, share_prod_notV, delta_gv_derivative: (L, B, H); delta_gv, delta_alphaV: (deltas, L, B, H)."""
        values = [self._found[layer][name] for layer in sorted(self._found)]
        return torch.stack(values, 1 if values[0].ndim == 3 else 0)


class VisionRows(Probe):
    """Attention of each step's row to every vision token, averaged over heads and layers after BOS is left out and the rest renormalised per layer.

    rows: a list over steps of (B, T) float32 over the padded prompt, 0 off the vision tokens. Beyond Semantics, section 2.7 of our study."""

    def __init__(self, batch, num_layers):
        self.bos, self.vision, self.num_layers = batch.groups == GROUPS.index("bos"), batch.groups == VISION, num_layers
        self.rows = []

    def begin(self):
        super().begin()
        self.sum = 0

    def attention(self, layer, row):
        mean = row.weights.mean(1).to(self.bos.device)
        prompt = mean[:, : self.bos.shape[1]]
        rest = (prompt * ~self.bos).sum(-1, keepdim=True) + mean[:, self.bos.shape[1] :].sum(-1, keepdim=True)  # not 1 - bos, which loses its digits
        self.sum = self.sum + prompt * self.vision / rest

    def end(self):
        self.rows.append(self.sum / self.num_layers)


class ImageAttention(Probe):
    """Attention of each step's row to every vision token, reduced layer by layer: the k largest over layers of each head and token (a running top-k, equal to
    that over all layers at once), and mean and maximum over layers and heads. Volcano (arXiv 2311.07362), sections 2.2 and 2.3 of our study.

    Lists over steps: topk (k, B, H, P) largest first, mean and largest (B, P), float32 on the model's device; P: most vision tokens of a row, 0 past a
    row's own. whole=True: the whole (L, B, H, P) too, in `layers`."""

    def __init__(self, batch, k, whole=False):
        vision, size = batch.groups == VISION, len(batch.groups)
        count = int(vision.sum(1).max())
        self.index = torch.full((size, count), -1, device=vision.device)
        for row in range(size):
            own = vision[row].nonzero()[:, 0]
            self.index[row, : len(own)] = own
        self.k, self.whole, self.topk, self.mean, self.largest, self.layers = k, whole, [], [], [], []

    def begin(self):
        super().begin()
        self._top, self._sum, self._max, self._all = None, 0, None, {}

    def attention(self, layer, row):
        index = self.index.to(row.key.device)
        here = row.weights.gather(-1, index.clamp(min=0)[:, None].expand(-1, row.weights.shape[1], -1)).masked_fill((index < 0)[:, None], 0)
        here = here.to(self.index.device)
        self._top = here[None] if self._top is None else torch.cat([self._top, here[None]])
        if len(self._top) > self.k:
            self._top = self._top.topk(self.k, 0).values
        self._sum = self._sum + here.mean(1)
        self._max = here.amax(1) if self._max is None else torch.maximum(self._max, here.amax(1))
        self.seen = getattr(self, "seen", 0) + (self.step == 0)
        if self.whole:
            self._all[layer] = here

    def end(self):
        if len(self._top) < self.k:
            raise UsageError(f"the {self.k} largest of {len(self._top)} layers were asked for")
        self.topk.append(self._top.sort(0, descending=True).values)
        self.mean.append(self._sum / self.seen)
        self.largest.append(self._max)
        if self.whole:
            self.layers.append(torch.stack([self._all[layer] for layer in sorted(self._all)]))


# --- decoding ---------------------------------------------------------------------------------------------------------------


@dataclass
class Generation:
    """ids: generated ids of each sample, its EOS included; steps (B,): how many producing steps count; logprobs (B, N) of the chosen ids, NaN past the end;
    first (B, V) float32: log-probabilities of the first step; cache: keys and values of all positions that were read."""

    ids: list
    steps: torch.Tensor
    logprobs: torch.Tensor
    first: torch.Tensor
    cache: object


def _takes(model, name):
    return name in inspect.signature(model.forward).parameters


def entries(vlm, features):
    """Where the decoder gets the picture, as lists (P, d) per sample that may be changed in place: its input and, with deepstack, its first layers."""
    return [features.pooler_output, *(features.deepstack_features if vlm.family.deepstack else ())]


def entered(vlm, features):
    """What the decoder gets for each vision token of a batch, (N, d); with deepstack (N, (1 + K) d): behind the input what is added to the outputs of the
    first K layers."""
    return torch.cat([torch.cat(list(tokens)) for tokens in entries(vlm, features)], -1)


def embeddings(vlm, batch, features=None):
    """What the decoder reads: token embeddings with the image features in their places, (B, T, d). UsageError where that is not all that it gets."""
    if vlm.family.deepstack:
        raise UsageError(f"{vlm.path}: {vlm.family.name} adds the picture in its decoder's first layers too (deepstack), so embeddings alone do not show it")
    with entering(vlm, batch, entered(vlm, vlm.vision(batch) if features is None else features)) as embeds:
        return embeds


@contextlib.contextmanager
def entering(vlm, batch, rows):
    """The decoder's inputs (B, T, d) with rows (N, d) or (N, (1 + K) d), see entered(), for the vision tokens of the batch. With deepstack they hold within
    the context only, see deepened()."""
    embeds, seen = vlm.model.get_input_embeddings()(batch.input_ids), batch.groups == VISION
    width = embeds.shape[-1]
    with deepened(vlm, seen, rows[:, width:]):
        yield embeds.masked_scatter(seen[..., None], rows[:, :width].to(embeds))


@contextlib.contextmanager
def deepened(vlm, seen, rows):
    """Within the context rows (N, K d) are added to the outputs of the first K layers at the N places of seen (B, T), in passes over (B, T) positions."""

    def add(module, args, output, own):
        states = output[0] if isinstance(output, tuple) else output
        if states.shape[:2] != seen.shape:  # a later step
            return None
        here = seen.to(states.device)[..., None]
        states = states + torch.zeros_like(states).masked_scatter(here, own.to(states))
        return (states, *output[1:]) if isinstance(output, tuple) else states

    width = vlm.model.get_input_embeddings().weight.shape[1]
    parts = rows.split(width, -1) if rows.shape[1] else ()
    hooks = [vlm.parts.layers[layer].register_forward_hook(lambda *all, own=own: add(*all, own)) for layer, own in enumerate(parts)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def more_inputs(vlm, batch, start=0):
    """What else the model's forward takes over the prompts from position `start` on, {name: (B, T - start)}."""
    return {name: value[..., start:] for name, value in vlm.family.inputs(vlm, batch).items()} if vlm.family.inputs else {}


def prefill(vlm, batch, features=None, cache=None, embeds=None):
    """One pass over the prompt. Returns the model's output with a cache.

    features: vlm.vision(batch) if it was computed before. embeds (B, T, d): inputs in place of the batch's own, see embeddings(). cache: keys and values
    of the first positions, which are not computed again (see first_positions); the rest runs."""
    start = 0 if cache is None or embeds is None else cache.get_seq_length()
    positions = batch.position_ids[..., start:].contiguous()  # some models take a view of them
    options = {"attention_mask": batch.attention_mask, "position_ids": positions, "use_cache": True, "past_key_values": cache}
    options |= more_inputs(vlm, batch, start)
    if _takes(vlm.model, "logits_to_keep"):
        options["logits_to_keep"] = 1
    if embeds is not None:
        return vlm.model(inputs_embeds=embeds[:, start:], **options)
    features = vlm.vision(batch) if features is None else features
    if _takes(vlm.model, "mm_encoder_outputs"):
        if getattr(features, "was_tensor", False):
            features = SimpleNamespace(**dict(features) | {"pooler_output": torch.cat(features.pooler_output)})
        return vlm.model(input_ids=batch.input_ids, mm_encoder_outputs={"image": features}, **options)
    return vlm.model(inputs_embeds=embeddings(vlm, batch, features), **options)


def first_positions(vlm, cache, length, count=None, rows=None):
    """The first `length` positions of a cache, as a cache to go on from: of every row or of some (rows: their indices), or of a single row for `count`
    prompts that share them. None where they cannot be taken: the family is not known to be causal, or a layer keeps a window only."""
    whole = cache.get_seq_length()
    if "causal" not in vlm.family.has or length < 1 or any(layer.keys.shape[2] != whole for layer in cache.layers):
        return None
    shared = DynamicCache()
    for index, layer in enumerate(cache.layers):
        parts = (layer.keys, layer.values) if rows is None else (part[rows] for part in (layer.keys, layer.values))
        shared.update(*(part[:, :, :length].expand(count or -1, -1, -1, -1) for part in parts), index)
    return shared


@torch.inference_mode()
def branches(vlm, batch, cache, embeds, start, blocks):
    """Hidden states after the final norm (n, T - start, d) of one prompt continued from position `start` in n ways, each under blocks of its own.

    All ways are rows of one pass that see the cached keys and values of the positions before `start` and themselves: what comes before the first query
    that any block names is the same in every layer, so it need not run again. batch: one prompt without padding; embeds (1, T, d), as embeddings() gives
    them; cache: from first_positions(), left as it was; blocks: n lists of Block. UsageError where a query row is left without any key."""
    total, count, device = embeds.shape[1], len(blocks), embeds.device
    rows, ways = total - start, torch.arange(count, device=device)
    if any(block.queries[0, :start].any() for some in blocks for block in some):
        raise ValueError(f"a block acts on a position before start={start}")
    cuts = {
        (way, block.layers): (block.queries[0, start:total, None] & block.keys[0, None, :total]).to(device) for way, some in enumerate(blocks) for block in some
    }

    def mask(acting):
        """(1, 1, n * rows, start + n * rows) bool: the cached positions and a way's own earlier ones, without what is cut."""
        seen = torch.ones(rows, total, dtype=torch.bool, device=device).tril(start).repeat(count, 1, 1)
        for key in acting:
            seen[key[0]] &= ~cuts[key]
        if not seen.any(-1).all():
            raise UsageError("a block leaves a query row without any key")
        inside = torch.zeros(count, rows, count, rows, dtype=torch.bool, device=device)
        inside[ways, :, ways] = seen[:, :, start:]
        return torch.cat([seen[:, :, :start].flatten(0, 1), inside.flatten(2).flatten(0, 1)], 1)[None, None]

    acting = {layer: tuple(key for key in cuts if key[1] is None or layer in key[1]) for layer in range(len(vlm.parts.layers))}
    masks = {some: mask(some) for some in {(), *acting.values()}}
    positions = torch.cat([batch.position_ids[..., start:]] * count, -1)
    more = {name: torch.cat([value] * count, -1) for name, value in more_inputs(vlm, batch, start).items()}
    with capture(vlm, mask_of=lambda layer: masks[acting[layer]]):
        states = vlm.parts.decoder(
            inputs_embeds=torch.cat([embeds[:, start:]] * count, 1), attention_mask=masks[()], position_ids=positions,
            past_key_values=first_positions(vlm, cache, start, 1), use_cache=True, **more,
        ).last_hidden_state  # fmt: skip
    return states[0].unflatten(0, (count, rows))


def _noise(seed, sample_id, step, size, device):
    """Uniform noise that depends on (seed, item, step) only."""
    digest = hashlib.sha256(f"{seed}|{sample_id}|{step}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") % 2**63)
    return torch.rand(size, generator=generator).to(device)


def _rows(chosen, steps):
    """The ids of each row as lists: tokens (B,) of every step, of which the first steps[row] count."""
    return [row[:n] for row, n in zip(torch.stack(chosen, 1).tolist(), steps.tolist(), strict=True)]


@torch.inference_mode()
def generate(
    vlm, batch, max_new_tokens, do_sample=False, temperature=1.0, top_p=1.0, seed=0, answers=None, features=None, cache=None, embeds=None, stop=None
):  # fmt: skip
    """Greedy or sampled decoding, one producing step per token, under whatever capture is active.

    answers: ids to be produced instead, one list per sample (teacher forcing); else stops at EOS. The forward passes are the prefill and one cached
    pass per further token, so step s of a probe is the row that predicted token s. features, cache, embeds: see prefill(). stop(ids so far, a list per
    row) -> bool per row: whether an answer is complete without EOS. Asked after every step; once true it holds, and a row ends there whatever the others do."""
    eos = torch.tensor(sorted(vlm.eos_ids), device=vlm.device)
    size, device = len(batch.samples), vlm.device
    output = prefill(vlm, batch, features, cache, embeds)
    mask, position = batch.attention_mask, batch.next_position
    lengths = None if answers is None else torch.tensor([len(ids) for ids in answers], device=device)
    limit = max_new_tokens if answers is None else int(lengths.max())
    if answers is not None and int(lengths.min()) < 1:
        raise ValueError("an answer to be measured is empty")
    first, chosen, logprobs = output.logits[:, -1].float().log_softmax(-1), [], []
    steps, alive = torch.zeros(size, dtype=torch.long, device=device), torch.ones(size, dtype=torch.bool, device=device)
    for step in range(limit):
        logits = output.logits[:, -1].float().to(device)
        if answers is not None:
            token = torch.tensor([ids[min(step, len(ids) - 1)] for ids in answers], device=device)
            alive = step < lengths
        elif do_sample:
            probabilities = (logits / temperature).softmax(-1)
            ordered, order = probabilities.sort(-1, descending=True)
            ordered[(ordered.cumsum(-1) - ordered) > top_p] = 0
            noise = torch.stack([_noise(seed, sample.id, step, ordered.shape[-1], device) for sample in batch.samples])
            token = order.gather(-1, (ordered / -noise.clamp_min(1e-20).log()).argmax(-1, keepdim=True))[:, 0]  # exponential race: a draw from `ordered`
        else:
            token = logits.argmax(-1)
        logprobs.append(logits.log_softmax(-1).gather(-1, token[:, None])[:, 0].where(alive, float("nan")))
        chosen.append(token)
        steps += alive
        if answers is None:
            alive = alive & ~torch.isin(token, eos)
            if stop is not None:
                alive = alive & ~torch.tensor(stop(_rows(chosen, steps)), device=device)
        if step + 1 == limit or (answers is None and not alive.any()):
            break
        mask = torch.cat([mask, mask.new_ones(size, 1)], 1)
        now = position + step
        positions = now[:, None] if batch.position_ids.ndim == 2 else now[None, :, None].expand(len(batch.position_ids), -1, -1)
        output = vlm.model(input_ids=token[:, None], attention_mask=mask, position_ids=positions, past_key_values=output.past_key_values, use_cache=True)
    return Generation(_rows(chosen, steps), steps, torch.stack(logprobs, 1), first, output.past_key_values)


def answer_ids(vlm, prompt, answer):
    """Ids of a given answer after a prompt, with EOS. answer: text, or ids as they were generated."""
    if not isinstance(answer, str):
        return [int(i) for i in answer]
    lead = vlm.tokenizer(prompt[-1], add_special_tokens=False)["input_ids"]
    text = prompt[-1] + ("" if prompt[-1].isspace() else " ") + answer
    ids = vlm.tokenizer(text, add_special_tokens=False)["input_ids"]
    return (
        ids[len(lead) :] + [min(vlm.eos_ids)] if ids[: len(lead)] == lead else vlm.tokenizer(answer, add_special_tokens=False)["input_ids"] + [min(vlm.eos_ids)]
    )


def shared_start(batches):
    """How many first tokens all prompts of some batches have up to the end of their picture, 0 if these differ in number. Rows without their padding."""
    lengths = set()
    for batch in batches:
        for row, length in enumerate(batch.lengths):
            lengths.add(int(batch.vision_positions(row)[-1]) + 1 - (batch.groups.shape[1] - length))
    return lengths.pop() if len(lengths) == 1 else 0


def padded_after(batch, start):
    """The batch with its padding after the first `start` tokens of every prompt in place of before them, so that prompts of one picture can go on from the
    same keys and values. Positions and masks say where each token stands, so nothing else changes."""
    longest = batch.groups.shape[1]
    order = []
    for length in batch.lengths:
        pad = longest - length
        order.append(torch.cat([torch.arange(pad, pad + start), torch.arange(pad), torch.arange(pad + start, longest)]))
    order = torch.stack(order).to(batch.groups.device)
    positions = order if batch.position_ids.ndim == 2 else order[None].expand(len(batch.position_ids), -1, -1)
    moved = {name: getattr(batch, name).gather(1, order) for name in ("input_ids", "attention_mask", "groups")}
    return replace(batch, **moved, position_ids=batch.position_ids.gather(-1, positions))


def extended(batch, ids, group="generated"):
    """The batch with the same ids after each prompt, as tokens of a group: an EOS token as the published RoPE probe's query row, an answer's beginning."""
    size, count = len(batch.samples), len(ids)
    steps = batch.next_position[:, None] + torch.arange(count, device=batch.next_position.device)
    steps = steps if batch.position_ids.ndim == 2 else steps[None].expand(len(batch.position_ids), -1, -1)
    return replace(
        batch, input_ids=torch.cat([batch.input_ids, batch.input_ids.new_tensor(ids).expand(size, -1)], 1),
        attention_mask=torch.cat([batch.attention_mask, batch.attention_mask.new_ones(size, count)], 1),
        position_ids=torch.cat([batch.position_ids, steps], -1), next_position=batch.next_position + count,
        lengths=[length + count for length in batch.lengths],
        groups=torch.cat([batch.groups, batch.groups.new_full((size, count), GROUPS.index(group))], 1),
    )  # fmt: skip

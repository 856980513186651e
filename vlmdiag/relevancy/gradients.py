"""Gradients of generated tokens' logits with respect to every attention map, for all tokens of an
answer at once.

    run = trace(vlm, batch, answer_ids)          # one pass over prompt and answer
    for layer, attention in run.descend(targets, ...)

The pass keeps the input of every block. Then each block runs once more, from the last to the first,
and hands the gradients of its output on to its input for a chunk of tokens together
(torch.autograd.grad with is_grads_batched). Attention is cut out of the graph and differentiated by
hand, head by head:

    dA = dO V^T      dS = A (dA - sum_k dA A)      dQ = dS K / sqrt(d)      dK = dS^T Q / sqrt(d)
                     dV = A^T dO

so maps and their gradients exist for one layer at a time, no parameter has a gradient, and what
rule 5 of relevancy.py makes of them is known as soon as the rows of the next lower layer need it.
Section 5.2 of our study of the stethoscope."""

import contextlib
from dataclasses import dataclass

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from vlmdiag.model.attention import kernel
from vlmdiag.model.decoding import extended
from vlmdiag.model.vision import entered, entering, more_inputs
from vlmdiag.relevancy.rules import head_mean

NAME = "vlm_gradients"
ROWS = 128  # of a map that are held at once for one head
_cores = None  # where attention calls are put while a block is differentiated


@dataclass
class Core:
    """One attention call. query (1, H, N, D), key and value (1, H_kv, K, D) with their graph,
    output (1, N, H, D) a leaf."""

    module: object
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    output: torch.Tensor
    mask: torch.Tensor | None
    scaling: float
    softcap: float | None
    bias: torch.Tensor | None

    def weights(self, head):
        """(attention (N, K), derivative of the softcap at the scores or None) of one head,
        float32."""
        shared = head // (self.query.shape[1] // self.key.shape[1])
        scores, slope = (
            self.query[0, head].detach().float()
            @ self.key[0, shared].detach().float().T
            * self.scaling,
            None,
        )
        if self.softcap is not None:
            bent = torch.tanh(scores / self.softcap)
            scores, slope = bent * self.softcap, 1 - bent**2
        if self.bias is not None:
            scores = scores + self.bias[0, head].float()
        if self.mask is not None:
            mask = self.mask[0, min(head, self.mask.shape[1] - 1)]
            scores = (
                scores.masked_fill(~mask, float("-inf"))
                if mask.dtype == torch.bool
                else scores + mask.float()
            )
        return scores.softmax(-1), slope

    def mean(self):
        """Mean attention over heads, (N, K) float32."""
        heads = self.query.shape[1]
        return sum(self.weights(head)[0] for head in range(heads)) / heads

    def backward(self, cotangents, maps=True):
        """(Ā (C, N, K) or None, gradients of query, key and value for C cotangents (C, N, H, D) of
        the output). In float32, by blocks of rows, of which a causal mask lets each see only the
        keys up to its end."""
        heads, groups = self.query.shape[1], self.query.shape[1] // self.key.shape[1]
        count, (rows, total), depth = (
            len(cotangents),
            (self.query.shape[2], self.key.shape[2]),
            self.query.shape[3],
        )
        causal = (
            self.mask is not None
            and self.mask.dtype == torch.bool
            and not self.mask.triu(total - rows + 1).any()
        )
        average = cotangents.new_zeros(count, rows, total, dtype=torch.float32) if maps else None
        query = cotangents.new_empty(count, heads, rows, depth, dtype=torch.float32)
        key, value = (
            query.new_zeros(count, self.key.shape[1], total, part.shape[3])
            for part in (self.key, self.value)
        )
        for head in range(heads):
            shared = head // groups
            weights, slope = self.weights(head)
            q, k, v = (
                part.detach().float()
                for part in (self.query[0, head], self.key[0, shared], self.value[0, shared])
            )
            for start in range(0, rows, ROWS):
                own = slice(start, min(start + ROWS, rows))
                seen = slice(0, total - rows + own.stop if causal else total)
                given, here = cotangents[:, own, head].float(), weights[own, seen]
                change = torch.matmul(given, v[seen].T).mul_(here)  # dA * A
                if maps:
                    average[:, own, seen] += change.clamp_min(0)
                change.addcmul_(here, change.sum(-1, keepdim=True).neg_())
                if slope is not None:
                    change.mul_(slope[own, seen])
                query[:, head, own] = change @ k[seen] * self.scaling
                key[:, shared, seen] += change.transpose(-1, -2) @ q[own] * self.scaling
                value[:, shared, seen] += torch.matmul(here.T, given)
        like = (self.query, self.key, self.value)
        found = [
            part.view(count, *one.shape).to(one.dtype)
            for part, one in zip((query, key, value), like, strict=True)
        ]
        return (average / heads if maps else None), found


def _attention(module, query, key, value, attention_mask, **options):
    """The model's own attention; while a block is differentiated, its output is a leaf and the call
    is kept."""
    if _cores is None:
        return kernel(module, query, key, value, attention_mask, **options), None
    with torch.no_grad():
        output = kernel(module, query, key, value, attention_mask, **options)
    mask, (count, total) = attention_mask, (query.shape[2], key.shape[2])
    causal = options.get("is_causal")
    if (
        mask is None
        and (getattr(module, "is_causal", True) if causal is None else causal)
        and count > 1
    ):
        mask = torch.ones(count, total, dtype=torch.bool, device=query.device).tril(total - count)[
            None, None
        ]
    scaling = query.shape[-1] ** -0.5 if options.get("scaling") is None else options["scaling"]
    leaf = output.detach().requires_grad_()
    _cores.append(
        Core(
            module,
            query,
            key,
            value,
            leaf,
            mask,
            scaling,
            options.get("softcap"),
            options.get("position_bias"),
        )
    )
    return leaf, None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


@contextlib.contextmanager
def attention_of(owner):
    """Let a model's attention run through this module."""
    before = owner.config._attn_implementation
    owner.config._attn_implementation = NAME
    try:
        yield
    finally:
        owner.config._attn_implementation = before


@dataclass
class Block:
    """A block as it ran: input (B, N, d) with whatever graph led to it, output (B, N, d) a leaf. B
    is 1 but in a tower that reads tiles."""

    module: object
    owner: object  # the model that it belongs to, whose config names the attention
    args: tuple
    options: dict
    input: torch.Tensor
    output: torch.Tensor

    def tile(self, index):
        """The block as it ran on one of its B rows."""
        count = len(self.input)
        if count == 1:
            return self
        row = slice(index, index + 1)
        own = lambda value: (
            value[row] if torch.is_tensor(value) and value.ndim and len(value) == count else value
        )
        options = {name: own(value) for name, value in self.options.items()}
        return Block(
            self.module,
            self.owner,
            tuple(own(value) for value in self.args),
            options,
            self.input[row],
            self.output[row],
        )

    def run(self, states):
        """(output, [Core, ...]) from given input states, attention cut out."""
        global _cores
        _cores = []
        try:
            with attention_of(self.owner):
                output = self.module(states, *self.args, **self.options)
            return (output[0] if isinstance(output, tuple) else output), _cores
        finally:
            _cores = None

    @torch.no_grad()
    def attention(self):
        """Mean attention over heads (N, K) of the block's only attention call."""
        return self.run(self.input.detach())[1][0].mean()

    def pull(self, cotangents, maps=True):
        """(gradients (C, N, d) of the input, Ā (C, N, N) or None) for C gradients (C, N, d) of the
        output."""
        with torch.enable_grad():
            start = self.input.detach().requires_grad_()
            output, cores = self.run(start)
        nodes = [start, *(core.output for core in cores)]
        found, kept = pulled([output], nodes, [cotangents.to(output.dtype)[:, None]]), None
        for index in reversed(range(len(cores))):
            given = found.pop()
            if given is None:
                continue
            kept, parts = cores[index].backward(given[:, 0], maps)
            core = cores[index]
            found = [
                _sum(a, b)
                for a, b in zip(
                    found,
                    pulled([core.query, core.key, core.value], nodes[: index + 1], parts),
                    strict=True,
                )
            ]
        return found[0][:, 0], kept


def _sum(a, b):
    return b if a is None else a if b is None else a + b


def pulled(outputs, inputs, cotangents):
    """Gradients (C, *input.shape) of each input for C cotangents (C, *output.shape) of each output;
    None where nothing leads from it."""
    usable = [
        (output, given)
        for output, given in zip(outputs, cotangents, strict=True)
        if output.requires_grad
    ]
    if not usable:
        return [None] * len(inputs)
    outputs, cotangents = zip(*usable, strict=True)
    return list(
        torch.autograd.grad(
            outputs, inputs, cotangents, retain_graph=True, allow_unused=True, is_grads_batched=True
        )
    )


@contextlib.contextmanager
def recording(owner, modules):
    """Keep how each module of a model runs, in a list of Block, and cut the graph after it."""
    blocks, hooks = [], []

    def keep(module, args, options, output):
        states, rest = (args[0], args[1:]) if args else (options["hidden_states"], ())
        first = output[0] if isinstance(output, tuple) else output
        leaf = first.detach().requires_grad_()
        options = {name: value for name, value in options.items() if name != "hidden_states"}
        blocks.append(Block(module, owner, rest, options, states, leaf))
        return (leaf, *output[1:]) if isinstance(output, tuple) else leaf

    try:
        hooks += [
            module.register_forward_hook(keep, with_kwargs=True, prepend=True) for module in modules
        ]
        with attention_of(owner):
            yield blocks
    finally:
        for hook in hooks:
            hook.remove()


@dataclass
class Trace:
    """One pass over a prompt and its answer. prompt: the batch of the prompt alone, batch: with the
    answer; rows (T,): positions that produced the answer's tokens; ids (T,); logits (T, V) float32;
    vision (P,) positions.

    layers, tower: blocks as they ran; sources (P, k): see models.Family, one position each where
    the family does not name them; features (P, d) a leaf, with deepstack (P, (1 + K) d), see
    capturing.entered; pooled (P, d): the input's part with the tower's graph; logit: the sum of the
    chosen logits, with its graph; queries: [(self-attention, cross-attention or None), ...] of a
    Q-Former's layers, (1, H, n, n) and (1, H, q, S) with their graph, or one map (1, H, q, q + S)
    twice where they are joint; else empty."""

    vlm: object
    prompt: object
    batch: object
    ids: list
    rows: torch.Tensor
    logits: torch.Tensor
    vision: torch.Tensor
    layers: list
    tower: list
    features: torch.Tensor
    pooled: torch.Tensor
    logit: torch.Tensor
    queries: list
    sources: torch.Tensor | None = None

    @property
    def length(self):
        return self.batch.input_ids.shape[1]

    @property
    def tokens(self):
        """(P, d) vision tokens as the decoder's input has them."""
        return self.features.detach()[:, : self.pooled.shape[1]]

    @property
    def joint(self):
        """Whether queries read each other and the patches by one map."""
        return any(own is cross for own, cross in self.queries)

    def descend(self, targets, maps=True):
        """Yield (layer, Ā (C, N, N) or None) from the last layer down for the tokens `targets`
        (indices into ids); at the end (None, gradients of the vision tokens, (C, P, d) as
        `features`)."""
        top = self.layers[-1].output
        (rising,) = torch.autograd.grad(self.logit, top, retain_graph=True)
        cotangents = top.new_zeros(len(targets), *top.shape[1:])
        where = self.rows[list(targets)]
        cotangents[torch.arange(len(where)), where] = rising[
            0, where
        ]  # norm and LM head see each position alone
        vision = None
        for layer in reversed(range(len(self.layers))):
            block = self.layers[layer]
            cotangents, attention = block.pull(cotangents, maps)
            yield layer, attention
            below = self.layers[layer - 1].output if layer else None
            if block.input is not below:  # embeddings, or what a model adds between two layers
                inner, direct = pulled(
                    [block.input],
                    [self.features if below is None else below, self.features],
                    [cotangents[:, None]],
                )
                vision = _sum(vision, direct)
                cotangents = inner[:, 0] if below is not None else None
        yield None, vision

    def query_maps(self, gradients):
        """[(Ā (C, n, n), Ā (C, q, S) or None), ...] of the Q-Former's layers, for gradients (C, P,
        d) of the vision tokens."""
        whole = [weights for pair in self.queries for weights in pair if weights is not None]
        given = pulled([self.pooled], whole, [gradients.to(self.pooled.dtype)])
        maps = iter(
            head_mean(
                weights[0].detach().float(),
                torch.zeros_like(weights).float() if change is None else change[:, 0].float(),
            ).expand(len(gradients), -1, -1)
            for weights, change in zip(whole, given, strict=True)
        )
        pairs = [
            tuple(None if weights is None else next(maps) for weights in pair)
            for pair in self.queries
        ]
        count = self.vlm.parts.qformer.queries
        return (
            [(own[..., :count], cross[..., count:]) for own, cross in pairs]
            if self.joint
            else pairs
        )

    def descend_tower(self, gradients, tile=0):
        """Yield (block, Ā (C, S, S)) from the tower's last block that is read down, for gradients
        (C, P, d) of the vision tokens, on one of its tiles."""
        outputs = [block.output for block in self.tower]
        arriving = pulled([self.pooled], outputs, [gradients.to(self.pooled.dtype)])
        rising = None
        for index in reversed(range(len(self.tower))):
            rising = _sum(rising, None if arriving[index] is None else arriving[index][:, tile])
            if rising is None:
                continue
            rising, attention = self.tower[index].tile(tile).pull(rising)
            yield index, attention


@contextlib.contextmanager
def _query_attention(former):
    """Keep the attention of a Q-Former's layers, with its graph, in a list of [self, cross or
    None]."""
    kept, hooks = [[None, None] for _ in former.self_attention], []
    config = former.self_attention[0].config
    before, config._attn_implementation = config._attn_implementation, "eager"

    def start(module, args, options):
        (
            args[0] if args else options["hidden_states"]
        ).requires_grad_()  # the queries: the first layer's attention depends on nothing else

    try:
        hooks.append(former.self_attention[0].register_forward_pre_hook(start, with_kwargs=True))
        for kind, modules in enumerate((former.self_attention, former.cross_attention)):
            for row, module in zip(kept, modules, strict=True):
                if module is not None:
                    hooks.append(
                        module.register_forward_hook(
                            lambda _, args, output, row=row, kind=kind: row.__setitem__(
                                kind, output[1]
                            )
                        )
                    )
        yield kept
    finally:
        config._attn_implementation = before
        for hook in hooks:
            hook.remove()


def trace(vlm, batch, ids, tower=True, features=None):
    """Run one sample's prompt (a batch of one) and answer ids once. tower: keep the vision tower's
    blocks too, where the family names them. features: vision tokens in place of the picture's, as
    Trace.features."""
    if len(batch.samples) != 1 or not ids:
        raise ValueError(
            f"one prompt and an answer are wanted, got {len(batch.samples)} prompts and {len(ids)}"
            " tokens"
        )
    vlm.need("decoder-only")
    whole = extended(batch, ids)
    options = {
        "attention_mask": whole.attention_mask,
        "position_ids": whole.position_ids,
        "use_cache": False,
    } | more_inputs(vlm, whole)
    with torch.enable_grad():
        seen, queries, former = [], [], vlm.parts.qformer
        if features is not None:
            found = features
        elif tower and vlm.parts.vision_blocks:
            with (
                recording(vlm.parts.tower, vlm.parts.vision_blocks) as seen,
                _query_attention(former) if former else contextlib.nullcontext([]) as queries,
            ):
                found = entered(vlm, vlm.vision(batch))
        else:
            found = entered(vlm, vlm.vision(batch))
        features, pooled = (
            found.detach().requires_grad_(),
            found[:, : vlm.model.get_input_embeddings().weight.shape[1]],
        )
        with (
            recording(vlm.parts.decoder, vlm.parts.layers) as layers,
            entering(vlm, whole, features) as embeds,
        ):
            logits = (
                vlm.model(inputs_embeds=embeds, logits_to_keep=len(ids) + 1, **options)
                .logits[0, :-1]
                .float()
            )
        chosen = torch.tensor(list(ids), device=logits.device)
        logit = logits.gather(1, chosen[:, None]).sum()
    rows, sources = torch.arange(len(ids), device=vlm.device) + batch.input_ids.shape[1] - 1, None
    if seen and not former:
        if vlm.family.sources:
            sources = torch.from_numpy(
                vlm.family.sources(vlm, batch.grids[0].size, batch.image_rows[0])
            ).to(vlm.device)
        else:
            count = seen[0].input.shape[1]
            sources = torch.arange(count - len(features), count, device=vlm.device)[:, None]
    return Trace(
        vlm,
        batch,
        whole,
        list(ids),
        rows,
        logits.detach(),
        batch.vision_positions(0),
        layers,
        seen,
        features,
        pooled,
        logit,
        queries,
        sources,
    )

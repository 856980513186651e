"""One attention call, cut out of autograd's graph and differentiated by hand.

With A = softmax(S), S = Q K^T / sqrt(D) (softcapped, with the position bias, masked; beside the
keys an attention sink, whose part of A is in no product) and O = A V, the gradients dO of the
output give, head by head,

    dA = dO V^T          dS = A (dA - sum_k dA A)
    dQ = dS K / sqrt(D)  dK = dS^T Q / sqrt(D)     dV = A^T dO

so a map A and its gradient dA exist for some heads and rows at a time, and what rule 5 of rules.py
makes of them, Ā, for some rows: a product with Ā is added up over them.
docs/studies/stethoscope.md, section 5.2.

Shapes: H heads, H_kv key-value heads, N queries, K keys, D head dimension, C gradients that are
carried together, R rows for each of them that are multiplied by its Ā, none for R = 0.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from vlmdiag.model.attention import full_mask, kernel, scaling_of, scores, sinks_of, softmax
from vlmdiag.types import Record

if TYPE_CHECKING:
    from jaxtyping import Float
    from transformers import PreTrainedModel

AttentionOption = Any  # what transformers hands to an attention function besides its tensors
Rows = slice | Tensor  # of a map: a part of it, or indices
Heads = slice  # some that follow each other
NAME = "vlm_gradients"
ROWS = 128  # of a map that are held at once
# bytes of maps of several heads together, by device: as much as stays in the caches of a CPU; on a
# GPU, where each step costs its start, all heads of a 7B model
TOGETHER = {"cpu": 2 * 2**20, "cuda": 16 * 2**20}


class CallGradients(NamedTuple):
    """What the gradients of a call's output give. carried: rows Ā, Ā of rule 5."""

    carried: Float[Tensor, "C R K"]
    query: Float[Tensor, "C 1 H N D"]
    key: Float[Tensor, "C 1 H_kv K D"]
    value: Float[Tensor, "C 1 H_kv K D"]


@dataclass
class AttentionCall:
    """One attention call of a batch of one. query, key, value with their graph; output a leaf that
    the graph after it starts from."""

    query: Float[Tensor, "1 H N D"]
    key: Float[Tensor, "1 H_kv K D"]
    value: Float[Tensor, "1 H_kv K D"]
    output: Float[Tensor, "1 N H D"]
    mask: Tensor | None  # (1, 1 or H, N, K); None: every key is seen
    scaling: float
    softcap: float | None
    bias: Tensor | None
    sinks: Float[Tensor, " H"] | None

    def weights(
        self, heads: Heads, rows: Rows = slice(None), keys: slice = slice(None)
    ) -> tuple[Float[Tensor, "h r k"], Float[Tensor, "h r k"] | None]:
        """Some rows of A of some heads over the keys that they see, and the derivative of the
        softcap at their scores, None without one; float32."""
        rows = rows.to(self.query.device) if torch.is_tensor(rows) else rows
        q = self.query[0, heads][:, rows].detach().float()  # (h, r, D)
        k = self.key[0, self.shared(heads), keys].detach().float()  # (h, k, D)
        products = (q @ k.mT).mul_(self.scaling)  # (h, r, k)
        slope = None
        if self.softcap is not None:
            slope = 1 - torch.tanh(products / self.softcap) ** 2
        bias = None if self.bias is None else self._of(self.bias, heads)[:, rows, keys]
        mask = None if self.mask is None else self._of(self.mask, heads)[:, rows, keys]
        sinks = None if self.sinks is None else self.sinks.detach()[heads][:, None]  # (h, 1)
        return softmax(scores(products, mask, self.softcap, bias), sinks), slope

    def shared(self, heads: Heads) -> list[int]:
        """The key-value head that each of some heads reads."""
        group = self.query.shape[1] // self.key.shape[1]
        return [head // group for head in range(self.query.shape[1])[heads]]

    def _of(self, table: Tensor, heads: Heads) -> Tensor:
        """Entries (1 or h, N, K) of some heads."""
        of_heads = table[0] if table.shape[1] == 1 else table[0, heads]
        return of_heads.expand(-1, self.query.shape[2], self.key.shape[2])

    def mean(self, rows: Rows = slice(None)) -> Float[Tensor, "r K"]:
        """Some rows of the mean attention over heads, float32."""
        heads = self.query.shape[1]
        total = self.weights(slice(0, 1), rows)[0][0]
        for head in range(1, heads):
            total = total + self.weights(slice(head, head + 1), rows)[0][0]
        return total / heads

    def is_causal(self) -> bool:
        """Whether no query sees a key behind it."""
        if self.mask is None or self.mask.dtype != torch.bool:
            return False
        later = self.key.shape[2] - self.query.shape[2] + 1
        return not self.mask.triu(later).any()

    def backward(
        self, d_output: Float[Tensor, "C N H D"], rows: Float[Tensor, "C R N"]
    ) -> CallGradients:
        """Gradients of query, key and value for C gradients dO of the output, and rows Ā.

        In float32, by blocks of queries; under a causal mask a block sees only the keys up to its
        end.
        """
        heads, queries, depth = self.query.shape[1:]
        shared_heads, keys = self.key.shape[1:3]
        count = len(d_output)
        causal = self.is_causal()
        like: Record = {"dtype": torch.float32, "device": d_output.device}
        rows = rows.to(**like)
        carried = torch.zeros(count, rows.shape[1], keys, **like)
        dQ = torch.empty(count, heads, queries, depth, **like)
        dK = torch.zeros(count, shared_heads, keys, self.key.shape[3], **like)
        dV = torch.zeros(count, shared_heads, keys, self.value.shape[3], **like)
        for start in range(0, queries, ROWS):
            r = slice(start, min(start + ROWS, queries))  # the block's queries
            s = slice(0, keys - queries + r.stop if causal else keys)  # the keys that they see
            size = 4 * count * (r.stop - r.start) * s.stop  # of one head, bytes
            together = max(1, TOGETHER.get(d_output.device.type, TOGETHER["cuda"]) // size)
            average = torch.zeros(count, r.stop - r.start, s.stop, **like) if rows.numel() else None
            for first in range(0, heads, together):
                h = slice(first, min(first + together, heads))
                shared = self.shared(h)  # grouped queries read the same keys
                A, slope = self.weights(h, r, s)  # (h, r, s)
                Q = self.query[0, h, r].detach().float()  # (h, r, D)
                K = self.key[0, shared, s].detach().float()  # (h, s, D)
                V = self.value[0, shared, s].detach().float()  # (h, s, D)
                dO = d_output[:, r, h].transpose(1, 2).float()  # (C, h, r, D)
                dS = dO @ V.mT  # (C, h, r, s), so far dA
                dS.mul_(A)  # dA A
                if average is not None:
                    average += dS.clamp_min(0).sum(1)  # rule 5, summed over heads
                dS.addcmul_(A, dS.sum(-1, keepdim=True).neg_())  # A (dA - sum_k dA A)
                if slope is not None:
                    dS.mul_(slope)
                dQ[:, h, r] = dS @ K * self.scaling  # (C, h, r, D)
                into = torch.tensor(shared, device=d_output.device)
                dK[:, :, s].index_add_(1, into, dS.mT @ Q * self.scaling)  # (C, h, s, D)
                dV[:, :, s].index_add_(1, into, A.mT @ dO)  # (C, h, s, D)
            if average is not None:
                carried[..., s] += rows[..., r] @ average.div_(heads)
        return CallGradients(
            carried,
            dQ[:, None].to(self.query.dtype),
            dK[:, None].to(self.key.dtype),
            dV[:, None].to(self.value.dtype),
        )


# the calls of the block that is being differentiated, None outside of it
_calls: ContextVar[list[AttentionCall] | None] = ContextVar("attention calls", default=None)


def _attention(
    module: nn.Module,
    query: Float[Tensor, "B H N D"],
    key: Float[Tensor, "B H_kv K D"],
    value: Float[Tensor, "B H_kv K D"],
    attention_mask: Tensor | None,
    **options: AttentionOption,
) -> tuple[Float[Tensor, "B N H D"], None]:
    """The model's own attention; while a block is differentiated, its output is a leaf and the call
    is kept."""
    calls = _calls.get()
    if calls is None:
        return kernel(module, query, key, value, attention_mask, **options), None
    with torch.no_grad():
        output = kernel(module, query, key, value, attention_mask, **options)
    leaf = output.detach().requires_grad_()
    mask: Tensor | None = full_mask(module, query, key, attention_mask, options)
    if mask is not None and mask.dtype == torch.bool and bool(mask.all()):
        mask = None
    calls.append(
        AttentionCall(
            query=query,
            key=key,
            value=value,
            output=leaf,
            mask=mask,
            scaling=scaling_of(query, options),
            softcap=options.get("softcap"),
            bias=options.get("position_bias"),
            sinks=sinks_of(options),
        )
    )
    return leaf, None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


@contextlib.contextmanager
def attention_of(owner: PreTrainedModel) -> Iterator[None]:
    """Within the context a model's attention runs through this module."""
    before = owner.config._attn_implementation
    owner.config._attn_implementation = NAME
    try:
        yield
    finally:
        owner.config._attn_implementation = before


@contextlib.contextmanager
def calls_of(owner: PreTrainedModel) -> Iterator[list[AttentionCall]]:
    """Within the context attention calls of a model are cut out of the graph and kept in a list."""
    calls: list[AttentionCall] = []
    token = _calls.set(calls)
    try:
        with attention_of(owner):
            yield calls
    finally:
        _calls.reset(token)

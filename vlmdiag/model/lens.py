"""Decode hidden states through the model's own final norm and LM head: the logit lens
(nostalgebraist 2020; for vision tokens arXiv 2410.07149).

    lens = Lens(vlm)
    ids, probabilities = lens.top_k(states, 5)      # states (..., d) before the final norm

The norm is applied exactly once: hidden states come from probes.HiddenStates, which gives the last
one before it. What comes behind the LM head, a scale, a softcap, a mask of ids that are never
written, is what makes the head's output the model's own logits in one pass: a config may name what
a class does not do. Lens.check() compares the last layer with the model's own logits.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from vlmdiag.cli import UsageError
from vlmdiag.model.selfcheck import noise_picture
from vlmdiag.model.vision import prefill
from vlmdiag.pictures.samples import AT_HAND, Sample

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from transformers import PreTrainedTokenizerBase

    from vlmdiag.types import VLM

CHUNK = 64 * 2**20  # logits at once: 256 MiB in float32


class End(NamedTuple):
    """What makes logits of the LM head's output, in this order."""

    scale: float = 1.0
    softcap: float | None = None
    masked: Bool[Tensor, " V"] | None = None  # ids that the model never writes

    def __call__(self, logits: Float[Tensor, "... V"]) -> Float[Tensor, "... V"]:
        if self.scale != 1:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        if self.masked is not None:
            logits = logits.masked_fill(self.masked, torch.finfo(logits.dtype).min)
        return logits


def named_end(vlm: VLM) -> tuple[float, float | None]:
    """(scale, softcap) of the logits that the text model's config names."""
    text_config = vlm.model.config.get_text_config()
    scale = getattr(text_config, "logit_scale", None)  # Cohere multiplies
    if not scale:
        scale = 1 / (getattr(text_config, "logits_scaling", None) or 1)  # Granite divides
    return scale, getattr(text_config, "final_logit_softcapping", None)  # Gemma


@torch.inference_mode()
def end_of(vlm: VLM) -> End:
    """What comes behind a model's LM head: of what its config names, that which gives the model's
    own logits of a noise picture; all of it where nothing does, which Lens.check() then finds."""
    head = vlm.parts.lm_head
    scale, softcap = named_end(vlm)
    entered: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    try:
        batch = vlm.encode([Sample("0", AT_HAND, "?")], [noise_picture()])
        wanted = prefill(vlm, batch).logits[:, -1]
    finally:
        hook.remove()
    if not entered:  # the head is not called as a module
        return End(scale, softcap)
    given = head(entered[-1])[:, -1]
    wanted = wanted.to(given.device)
    is_masked = (wanted <= torch.finfo(wanted.dtype).min / 2).all(0)
    masked = is_masked if bool(is_masked.any()) else None
    ends = [
        End(some_scale, some_cap, masked)
        for some_cap in dict.fromkeys((softcap, None))
        for some_scale in dict.fromkeys((scale, 1.0))
    ]
    allowed = 1e-4 if wanted.dtype == torch.float32 else 0.03
    fitting = (end for end in ends if _apart(end(given), wanted, masked) <= allowed)
    return next(fitting, ends[0])


class Lens:
    """The path from a hidden state to logits of one model. d: width, V: vocabulary."""

    def __init__(self, vlm: VLM) -> None:
        self.vlm = vlm
        self.path = vlm.path
        self.norm = vlm.parts.norm
        self.head = vlm.parts.lm_head
        self.project = getattr(vlm.parts.decoder, "project_out", None)  # OPT

    @torch.inference_mode()
    def logits(
        self, states: Float[Tensor, "... d"], normed: bool = False
    ) -> Float[Tensor, "... V"]:
        """Logits of hidden states in float32. normed: the final norm was applied already, as in the
        decoder's last_hidden_state."""
        device = self.head.weight.device
        if device.type != "meta":  # one that was offloaded comes to the states
            states = states.to(device)
        if not normed:
            states = self.norm(states)
            if self.project is not None:
                states = self.project(states)
        return self.vlm.logit_end(self.head(states)).float()

    @torch.inference_mode()
    def top_k(
        self, states: Float[Tensor, "... d"], k: int
    ) -> tuple[Int[Tensor, "... k"], Float[Tensor, "... k"]]:
        """The k likeliest ids of every hidden state and their probabilities in float32, on the
        states' device."""
        flat = states.reshape(-1, states.shape[-1])
        ids = flat.new_empty(len(flat), k, dtype=torch.long)
        probabilities = flat.new_empty(len(flat), k, dtype=torch.float32)
        chunk = max(1, CHUNK // self.head.weight.shape[0])
        for start in range(0, len(flat), chunk):
            logits = self.logits(flat[start : start + chunk])
            best = logits.topk(k)
            likeliest = (best.values - logits.logsumexp(-1, keepdim=True)).exp()
            ids[start : start + chunk] = best.indices.to(ids.device)
            probabilities[start : start + chunk] = likeliest.to(ids.device)
        shape = (*states.shape[:-1], k)
        return ids.view(shape), probabilities.view(shape)

    def check(self, last_states: Float[Tensor, "B d"], logits: Float[Tensor, "B V"]) -> None:
        """UsageError unless the last hidden state gives the model's own logits: a head that is
        built otherwise must not pass unseen."""
        width = last_states.shape[-1]
        if self.project is None and getattr(self.head, "in_features", width) != width:
            raise UsageError(
                f"{self.path}: its layers carry {width} numbers per position and its LM head reads"
                f" {self.head.in_features}, so hidden states cannot be decoded"
            )
        wanted = logits.float().to(last_states.device)
        decoded = self.logits(last_states).to(wanted.device)
        error = _apart(decoded, wanted, self.vlm.logit_end.masked)
        allowed = 1e-4 if last_states.dtype == torch.float32 else 0.03
        if not error <= allowed:
            raise UsageError(
                f"{self.path}: the last hidden state through norm and LM head differs from the"
                f" model's logits by {error:.1e} of their range"
            )


def _apart(
    decoded: Float[Tensor, "B V"], wanted: Float[Tensor, "B V"], masked: Bool[Tensor, " V"] | None
) -> float:
    """Largest difference of logits that are not masked, as a share of the largest wanted."""
    if masked is not None:
        decoded, wanted = decoded[:, ~masked], wanted[:, ~masked]
    largest = wanted.abs().max().clamp_min(1e-6)
    return float((decoded - wanted).abs().max() / largest)


def vocabulary(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> dict[int, str]:
    """{id: text} of single tokens with their leading space; special and byte tokens as they are
    written in the vocabulary."""
    distinct = sorted({int(id) for id in ids})
    special = set(tokenizer.all_special_ids)
    table = {}
    for id, piece in zip(distinct, tokenizer.convert_ids_to_tokens(distinct), strict=True):
        if piece is None:
            table[id] = f"<{id}>"  # an id of the padded embedding that no token has
        elif id in special or (piece.startswith("<0x") and piece.endswith(">")):
            table[id] = piece
        elif "\u2581" in piece:  # sentencepiece's space
            table[id] = piece.replace("\u2581", " ")
        elif "\u0120" in piece or "\u010a" in piece or not piece.isascii():  # byte-level BPE
            table[id] = tokenizer.convert_tokens_to_string([piece])
        else:
            table[id] = piece
    return table

"""Decode hidden states through the model's own final norm and LM head: the logit lens
(nostalgebraist 2020; for vision tokens arXiv 2410.07149).

    lens = Lens(vlm)
    ids, probs = lens.top_k(states, 5)        # states (..., d) before the final norm; ids, probs
    (..., 5)

The norm is applied exactly once: hidden states come from capturing.HiddenStates, which gives the
last one before it. What a family puts around its LM head (a projection, a scale, a softcap) is read
from the config, and Lens.check() holds the last layer against the model's own logits.
"""

import torch

from vlmdiag.cli import UsageError

CHUNK = 64 * 2**20  # logits at once: 256 MiB in float32


class Lens:
    """The path from a hidden state to logits of one model."""

    def __init__(self, vlm):
        text = vlm.model.config.get_text_config()
        self.norm, self.head, self.path = vlm.parts.norm, vlm.parts.lm_head, vlm.path
        self.project = getattr(vlm.parts.decoder, "project_out", None)  # OPT
        self.scale = getattr(text, "logit_scale", None) or 1 / (
            getattr(text, "logits_scaling", None) or 1
        )  # Cohere multiplies, Granite divides
        self.softcap = getattr(text, "final_logit_softcapping", None)  # Gemma

    @torch.inference_mode()
    def logits(self, states, normed=False):
        """Hidden states (..., d) -> logits (..., V) in float32. normed: the final norm was applied
        already, as in the decoder's last_hidden_state."""
        states = states.to(self.head.weight.device)
        if not normed:
            states = self.norm(states)
            if self.project is not None:
                states = self.project(states)
        logits = self.head(states)
        if self.scale != 1:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits.float()

    @torch.inference_mode()
    def top_k(self, states, k):
        """The k likeliest ids of every hidden state and their probabilities in float32, both (...,
        k), on the states' device."""
        flat = states.reshape(-1, states.shape[-1])
        ids, probs = (
            flat.new_empty(len(flat), k, dtype=torch.long),
            flat.new_empty(len(flat), k, dtype=torch.float32),
        )
        rows = max(1, CHUNK // self.head.weight.shape[0])
        for start in range(0, len(flat), rows):
            logits = self.logits(flat[start : start + rows])
            best = logits.topk(k)
            ids[start : start + rows] = best.indices.to(ids.device)
            probs[start : start + rows] = (
                (best.values - logits.logsumexp(-1, keepdim=True)).exp().to(probs.device)
            )
        return ids.view(*states.shape[:-1], k), probs.view(*states.shape[:-1], k)

    def check(self, last_states, logits):
        """UsageError unless the last hidden state (B, d) gives the model's own logits (B, V): a
        head that is built otherwise must not pass unseen."""
        found, wanted = self.logits(last_states), logits.float().to(last_states.device)
        error = (
            (found.to(wanted.device) - wanted).abs().max() / wanted.abs().max().clamp_min(1e-6)
        ).item()
        allowed = 1e-4 if last_states.dtype == torch.float32 else 0.03
        if not error <= allowed:
            raise UsageError(
                f"{self.path}: the last hidden state through norm and LM head differs from the"
                f" model's logits by {error:.1e} of their range"
            )


def vocabulary(tokenizer, ids):
    """{id: text} of single tokens with their leading space; special and byte tokens as they are
    written in the vocabulary."""
    ids = sorted({int(i) for i in ids})
    special, table = set(tokenizer.all_special_ids), {}
    for id, piece in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True):
        if piece is None:
            table[id] = f"<{id}>"  # an id of the padded embedding that no token has
        elif id in special or (piece.startswith("<0x") and piece.endswith(">")):
            table[id] = piece
        elif "\u2581" in piece:
            table[id] = piece.replace("\u2581", " ")
        else:
            table[id] = (
                tokenizer.convert_tokens_to_string([piece])
                if "\u0120" in piece or "\u010a" in piece or not piece.isascii()
                else piece
            )
    return table

"""Many questions about one picture in one row: how the tiny models are trained.

A row holds a shared prefix (system sentence and picture) and slots of equal length, each a question
and its answer. A slot sees the prefix and itself only, at the positions it would have alone, so
each turn is trained exactly as it will be asked:

                   keys
                prefix  slot 0  slot 1            \\ causal, # all, . none
    queries
      prefix      \\       .       .       positions 0 .. p - 1
      slot 0      #       \\       .       positions p .. p + s - 1
      slot 1      #       .       \\       positions p .. p + s - 1
"""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from transformers import AttentionInterface, AttentionMaskInterface

from vlmdiag.families.llava import SYSTEM
from vlmdiag.scenes.questions import Mix, Question, ask
from vlmdiag.scenes.scene import Scene
from vlmdiag.scenes.tiny_llava import TOKENS

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Float32, Int64
    from torch import Tensor, nn
    from transformers import LlamaTokenizer

PACKED = "packed_turns"  # name of the attention implementation
NO_TARGET = -100  # of positions whose next token is not trained
MASKED = -1e4  # score of a key that a query does not see

Packed = tuple[int, int, int]  # (length of the prefix, slots, length of a slot)


class Row(NamedTuple):
    """The arrays of a packed row of T = prefix + slots * size positions."""

    ids: Int64[np.ndarray, " T"]
    targets: Int64[np.ndarray, " T"]  # the answers' ids, elsewhere NO_TARGET
    weights: Float32[np.ndarray, " T"]  # of the loss
    positions: Int64[np.ndarray, " T"]


class Packer:
    """Packs single-turn prompts of one picture into one row, for `packed_attention`."""

    LAYOUTS = {"short": (10, 28), "long": (3, 90)}  # slots, tokens a slot

    def __init__(self, tokenizer: LlamaTokenizer) -> None:
        self.tokenizer = tokenizer
        self.image = tokenizer.convert_tokens_to_ids("<image>")
        # ids before the picture, without and with the system sentence
        prompts = ("USER: <image>", f"{SYSTEM} USER: <image>")
        encoded: list[list[int]] = [tokenizer.encode(prompt) for prompt in prompts]
        self.heads = [ids[: ids.index(self.image)] for ids in encoded]
        self._turns: dict[tuple[str, str], tuple[list[int], list[int]]] = {}

    def turn(self, question: Question) -> tuple[list[int], list[int]]:
        """(prompt ids after the picture, answer ids with </s>)."""
        key = (question.text, question.answer)
        if key not in self._turns:
            prompt = f"USER: <image>\n{question.text} ASSISTANT:"
            prompt_ids: list[int] = self.tokenizer.encode(prompt)
            turn_ids: list[int] = self.tokenizer.encode(f"{prompt} {question.answer}")
            if turn_ids[: len(prompt_ids)] != prompt_ids:
                raise ValueError(f"the answer changes the prompt's tokens: {key}")
            answer_ids = [*turn_ids[len(prompt_ids) :], self.tokenizer.eos_token_id]
            self._turns[key] = prompt_ids[prompt_ids.index(self.image) + 1 :], answer_ids
        return self._turns[key]

    def row(
        self, rng: Random, scene: Scene, system: bool, layout: str, mix: Mix | None = None
    ) -> tuple[Row, list[Question]]:
        """A row of questions drawn from a mix, and the questions. system: with the system
        sentence."""
        slots, size = self.LAYOUTS[layout]
        head = self.heads[system]
        prefix = len(head) + TOKENS
        length = prefix + slots * size
        slot_positions = np.tile(np.arange(prefix, prefix + size), slots)
        row = Row(
            ids=np.zeros(length, np.int64),
            targets=np.full(length, NO_TARGET),
            weights=np.zeros(length, np.float32),
            positions=np.concatenate([np.arange(prefix), slot_positions]),
        )
        row.ids[:prefix] = head + [self.image] * TOKENS
        questions: list[Question] = []
        while len(questions) < slots:
            question = ask(rng, scene, mix)
            prompt, answer = self.turn(question)
            if len(prompt) + len(answer) > size:
                continue
            start = prefix + len(questions) * size
            middle = start + len(prompt)
            end = middle + len(answer)
            row.ids[start:end] = prompt + answer
            row.targets[middle:end] = answer
            # long answers count more than short ones, but less than by their length
            row.weights[middle:end] = len(answer) ** -0.5
            questions.append(question)
        return row, questions


def _not_seen(size: int, device: torch.device) -> Bool[Tensor, "size size"]:
    """True where a key comes after the query."""
    return torch.ones(size, size, dtype=torch.bool, device=device).triu(1)


def packed_attention(
    module: nn.Module,
    query: Float[Tensor, "B H T D"],
    key: Float[Tensor, "B H T D"],
    value: Float[Tensor, "B H T D"],
    attention_mask: Tensor | None,
    scaling: float = 1.0,
    packed: Packed = (0, 1, 0),
    **kwargs: object,
) -> tuple[Float[Tensor, "B T H D"], None]:
    """Causal attention of rows made by Packer, in the form that transformers' AttentionInterface
    wants. packed: (length of the prefix, slots, length of a slot)."""
    prefix, slots, size = packed
    not_seen = _not_seen(max(prefix, size), query.device)

    def by_slot(flat: Tensor) -> Tensor:
        """(B, H, slots * size, ...) -> (B, H, slots, size, ...)"""
        return flat.unflatten(2, (slots, size))

    query = query * scaling
    shared_key = key[:, :, :prefix]
    shared_value = value[:, :, :prefix]

    # the prefix attends to itself
    scores = query[:, :, :prefix] @ shared_key.mT
    scores = scores.masked_fill(not_seen[:prefix, :prefix], MASKED)
    prefix_output = scores.softmax(-1, dtype=query.dtype) @ shared_value

    # a slot attends to the prefix and to itself, by one softmax over both
    slot_query = query[:, :, prefix:]
    within = by_slot(slot_query) @ by_slot(key[:, :, prefix:]).mT
    within = within.masked_fill(not_seen[:size, :size], MASKED).flatten(2, 3)
    scores = torch.cat([slot_query @ shared_key.mT, within], -1)
    weights = scores.softmax(-1, dtype=query.dtype)
    from_slot = by_slot(weights[..., prefix:]) @ by_slot(value[:, :, prefix:])
    slot_output = weights[..., :prefix] @ shared_value + from_slot.flatten(2, 3)

    output = torch.cat([prefix_output, slot_output], 2)
    return output.transpose(1, 2).contiguous(), None


def _no_mask(*args: object, **kwargs: object) -> None:
    """packed_attention needs no mask of transformers'."""


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, _no_mask)

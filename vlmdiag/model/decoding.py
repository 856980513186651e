"""Greedy, sampled and teacher-forced decoding, one producing step per token, under whatever capture
is active.

Shapes: B rows of a batch, N generated tokens, V vocabulary, T prompt length with padding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vlmdiag.groups import GROUPS
from vlmdiag.model import drafts as known
from vlmdiag.model.cache import with_room
from vlmdiag.model.encoding import ids_of_words
from vlmdiag.model.limits import check_answers, steps_that_fit
from vlmdiag.model.vision import prefill

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from transformers import Cache
    from transformers.modeling_outputs import CausalLMOutputWithPast

    from vlmdiag.batch import Batch
    from vlmdiag.types import VLM, ImageFeatures

# the id that each row produces in a step, from its logits
Choose = Callable[["Float[Tensor, 'B V']", int], "Int[Tensor, ' B']"]
# ids so far, a list per row -> whether each row's answer is complete without EOS
Stop = Callable[[list[list[int]]], Sequence[bool]]


@dataclass
class Generation:
    """The answers to a batch."""

    ids: list[list[int]]  # generated ids of each sample, its EOS included
    steps: Int[Tensor, " B"]  # how many producing steps count
    logprobs: Float[Tensor, "B N"]  # of the chosen ids, NaN past the end
    first: Float[Tensor, "B V"]  # log-probabilities of the first step, float32
    cache: Cache  # keys and values of the prompts and of what was read behind them


def _greedy(logits: Float[Tensor, "B V"], step: int) -> Int[Tensor, " B"]:
    return logits.argmax(-1)


@dataclass
class _Sampled:
    """Draws with temperature from the smallest set of tokens with probability top_p."""

    sample_ids: list[str]
    temperature: float
    top_p: float
    seed: int

    def __call__(self, logits: Float[Tensor, "B V"], step: int) -> Int[Tensor, " B"]:
        probabilities, order = (logits / self.temperature).softmax(-1).sort(-1, descending=True)
        before = probabilities.cumsum(-1) - probabilities
        probabilities[before > self.top_p] = 0
        size = probabilities.shape[-1]
        noise = torch.stack([_noise(self.seed, id, step, size) for id in self.sample_ids])
        noise = noise.to(logits.device)
        # exponential race: argmax of p / E with E ~ Exp(1) draws a token with probability p
        winner = (probabilities / -noise.clamp_min(1e-20).log()).argmax(-1, keepdim=True)
        return order.gather(-1, winner)[:, 0]


def _noise(seed: int, sample_id: str, step: int, size: int) -> Float[Tensor, " size"]:
    """Uniform noise that depends on (seed, item, step) only."""
    digest = hashlib.sha256(f"{seed}|{sample_id}|{step}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") % 2**63)
    return torch.rand(size, generator=generator)


@dataclass
class _Forced:
    """Teacher forcing: given ids, whose last one is repeated past its end."""

    answers: Sequence[Sequence[int]]

    def __call__(self, logits: Float[Tensor, "B V"], step: int) -> Int[Tensor, " B"]:
        ids = [answer[min(step, len(answer) - 1)] for answer in self.answers]
        return torch.tensor(ids, device=logits.device)


def _counted(chosen: list[Tensor], steps: Int[Tensor, " B"]) -> list[list[int]]:
    """The ids of each row: tokens (B,) of every step, of which the first steps[row] count."""
    rows = torch.stack(chosen, 1).tolist()
    return [row[:count] for row, count in zip(rows, steps.tolist(), strict=True)]


@torch.inference_mode()
def generate(
    vlm: VLM,
    batch: Batch,
    max_new_tokens: int,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    answers: Sequence[Sequence[int]] | None = None,
    features: ImageFeatures | None = None,
    cache: Cache | None = None,
    embeds: Float[Tensor, "B T d"] | None = None,
    stop: Stop | None = None,
    drafts: Sequence[Sequence[int]] | None = None,
) -> Generation:
    """Answer a batch, greedily or by sampling, under whatever capture is active.

    The forward passes are the prefill and one cached pass per further token, so step s of a probe
    is the row that predicted token s, also where one pass reads the tokens of several steps. A row
    ends at its EOS.

    max_new_tokens: at most, and no more than the model's context has room for. answers: ids to be
    produced instead, one list per sample (teacher forcing); ValueError for an empty one and for one
    that the context has no room for. features, cache, embeds: see prefill(). stop: asked after
    every step whether answers are complete without EOS; once true it holds, and a row ends there
    whatever the others do. drafts: ids that each row's greedy answer is likely to have, so that it
    takes fewer passes; the answer is the same (see vlmdiag.model.drafts).
    """
    device = vlm.device
    size = len(batch.samples)
    eos = torch.tensor(sorted(vlm.eos_ids), device=device)
    choose: Choose = _greedy
    limit = steps_that_fit(vlm, batch, max_new_tokens)
    lengths = None
    answers = None if answers is None else [list(map(int, ids)) for ids in answers]
    drafts = None if drafts is None else [list(map(int, ids)) for ids in drafts]
    if answers is not None:
        lengths = torch.tensor([len(ids) for ids in answers], device=device)
        if int(lengths.min()) < 1:
            raise ValueError("an answer to be measured is empty")
        check_answers(vlm, batch, answers)
        limit = int(lengths.max())
        choose = _Forced(answers)
    elif do_sample:
        choose = _Sampled([sample.id for sample in batch.samples], temperature, top_p, seed)

    greedy = answers is None and not do_sample
    guesses = None if drafts is None or not greedy else known.ahead(vlm, batch, drafts, limit)
    output = _read_prompts(vlm, batch, features, cache, embeds, guesses)
    with_room(output.past_key_values)
    several = known.can_verify(vlm, output.past_key_values)  # tokens in a pass
    if guesses is not None and not several:  # a cache of the model's own kind
        guesses = None
        output = _read_prompts(vlm, batch, features, cache, embeds)
    last_of_prompt = -1 if guesses is None else -1 - max(map(len, guesses))
    first = output.logits[:, last_of_prompt].float().log_softmax(-1)
    # some models read what stands for a picture otherwise among other tokens
    is_text = answers is None or not any(vlm.image_token_id in ids for ids in answers)
    if answers is not None and lengths is not None and several and is_text:
        of_given = known.read_given(vlm, batch, output, answers)
        column = torch.arange(limit, device=device)
        return Generation(
            ids=[list(ids) for ids in answers],
            steps=lengths,
            logprobs=of_given.where(column < lengths[:, None], float("nan")),
            first=first,
            cache=output.past_key_values,
        )
    if drafts is not None and greedy and several:
        ids, of_rows = known.decode(vlm, batch, output, drafts, limit, stop, guesses)
        return Generation(
            ids=ids,
            steps=torch.tensor([len(row) for row in ids], device=device),
            logprobs=pad_sequence(of_rows, batch_first=True, padding_value=float("nan")),
            first=first,
            cache=output.past_key_values,
        )
    mask = batch.attention_mask
    chosen: list[Tensor] = []
    logprobs: list[Tensor] = []
    steps = torch.zeros(size, dtype=torch.long, device=device)
    alive = torch.ones(size, dtype=torch.bool, device=device)
    for step in range(limit):
        logits = output.logits[:, -1].float().to(device)
        token = choose(logits, step)
        if lengths is not None:
            alive = step < lengths
        logprob = logits.log_softmax(-1).gather(-1, token[:, None])[:, 0]
        logprobs.append(logprob.where(alive, float("nan")))
        chosen.append(token)
        steps += alive
        if lengths is None:
            alive = alive & ~torch.isin(token, eos)
            if stop is not None:
                alive = alive & ~torch.tensor(stop(_counted(chosen, steps)), device=device)
            if not alive.any():
                break
        if step + 1 == limit:
            break
        mask = torch.cat([mask, mask.new_ones(size, 1)], 1)
        output = vlm.model(
            input_ids=token[:, None],
            attention_mask=mask,
            position_ids=batch.text_positions(batch.next_position[:, None] + step),
            past_key_values=output.past_key_values,
            use_cache=True,
        )
    return Generation(
        ids=_counted(chosen, steps),
        steps=steps,
        logprobs=torch.stack(logprobs, 1),
        first=first,
        cache=output.past_key_values,
    )


def _read_prompts(
    vlm: VLM,
    batch: Batch,
    features: ImageFeatures | None,
    cache: Cache | None,
    embeds: Float[Tensor, "B T d"] | None,
    guesses: Sequence[Sequence[int]] | None = None,
) -> CausalLMOutputWithPast:
    """The pass over the prompts and, behind them, guesses of known.ahead()."""
    if guesses is None:
        return prefill(vlm, batch, features, cache, embeds)
    ids = known.as_tensor(guesses, vlm.device)
    if embeds is not None:
        embeds = torch.cat([embeds, known.embedded(vlm, ids).to(embeds)], 1)
    return prefill(vlm, extended(batch, ids), features, cache, embeds, ids.shape[1] + 1)


def answer_ids(vlm: VLM, prompt: str, answer: str | Sequence[int]) -> list[int]:
    """Ids of a given answer after a prompt, with EOS. answer: ids as they were generated, or text,
    in which special strings are text but for the one that ends an answer, at its end."""
    if not isinstance(answer, str):
        return [int(id) for id in answer]
    answer = answer.removesuffix(vlm.tokenizer.convert_ids_to_tokens(vlm.end_id)).lstrip(" ")
    if not answer:
        return [vlm.end_id]
    # Tokenizers that mark a leading space need what stands before the answer.
    last = prompt[-1]
    lead = vlm.tokenizer(last, add_special_tokens=False)["input_ids"]
    space = "" if last.isspace() else " "
    ids = ids_of_words(vlm, last + space, answer, prompt)
    if ids[: len(lead)] == lead:
        ids = ids[len(lead) :]
    else:
        ids = ids_of_words(vlm, "", answer, prompt)
    return ids if ids[-1:] == [vlm.end_id] else [*ids, vlm.end_id]


def extended(
    batch: Batch, ids: Sequence[int] | Int[Tensor, "B n"], group: str = "generated"
) -> Batch:
    """The batch with ids after each prompt, the same after all or (B, n), as tokens of a group: an
    EOS token as the published RoPE probe's query row, an answer's beginning."""
    size = len(batch.samples)
    new_ids = torch.as_tensor(ids).to(batch.input_ids).expand(size, -1)
    count = new_ids.shape[1]
    steps = torch.arange(count, device=batch.next_position.device)
    positions = batch.text_positions(batch.next_position[:, None] + steps)
    new_groups = batch.groups.new_full((size, count), GROUPS.index(group))
    new_mask = batch.attention_mask.new_ones(size, count)
    longer = replace(
        batch,
        input_ids=torch.cat([batch.input_ids, new_ids], 1),
        attention_mask=torch.cat([batch.attention_mask, new_mask], 1),
        position_ids=torch.cat([batch.position_ids, positions], -1),
        next_position=batch.next_position + count,
        lengths=[length + count for length in batch.lengths],
        groups=torch.cat([batch.groups, new_groups], 1),
        token_inputs={
            name: torch.cat([value, value.new_zeros(size, count)], 1)
            for name, value in batch.token_inputs.items()
        },
    )
    if batch.numbers is not None and batch.turns is not None:
        answers = [1 if sample.chat is None else len(sample.chat.turns) for sample in batch.samples]
        turn = batch.turns.new_tensor(answers)[:, None].expand(-1, count)
        longer.turns = torch.cat([batch.turns, turn], 1)
        longer.numbers = torch.cat([batch.numbers, torch.full_like(turn, -1)], 1)
    return longer

"""Greedy, sampled and teacher-forced decoding, one producing step per token, under whatever capture
is active."""

import hashlib
from dataclasses import dataclass, replace

import torch

from vlmdiag.groups import GROUPS
from vlmdiag.model.vision import prefill


@dataclass
class Generation:
    """ids: generated ids of each sample, its EOS included; steps (B,): how many producing steps
    count; logprobs (B, N) of the chosen ids, NaN past the end; first (B, V) float32:
    log-probabilities of the first step; cache: keys and values of all positions that were read.
    """

    ids: list
    steps: torch.Tensor
    logprobs: torch.Tensor
    first: torch.Tensor
    cache: object


def _noise(seed, sample_id, step, size, device):
    """Uniform noise that depends on (seed, item, step) only."""
    digest = hashlib.sha256(f"{seed}|{sample_id}|{step}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") % 2**63)
    return torch.rand(size, generator=generator).to(device)


def _rows(chosen, steps):
    """The ids of each row as lists: tokens (B,) of every step, of which the first steps[row]
    count."""
    return [row[:n] for row, n in zip(torch.stack(chosen, 1).tolist(), steps.tolist(), strict=True)]


@torch.inference_mode()
def generate(
    vlm,
    batch,
    max_new_tokens,
    do_sample=False,
    temperature=1.0,
    top_p=1.0,
    seed=0,
    answers=None,
    features=None,
    cache=None,
    embeds=None,
    stop=None,
):
    """Greedy or sampled decoding, one producing step per token, under whatever capture is active.

    answers: ids to be produced instead, one list per sample (teacher forcing); else stops at EOS.
    The forward passes are the prefill and one cached pass per further token, so step s of a probe
    is the row that predicted token s. features, cache, embeds: see prefill(). stop(ids so far, a
    list per row) -> bool per row: whether an answer is complete without EOS. Asked after every
    step; once true it holds, and a row ends there whatever the others do.
    """
    eos = torch.tensor(sorted(vlm.eos_ids), device=vlm.device)
    size, device = len(batch.samples), vlm.device
    output = prefill(vlm, batch, features, cache, embeds)
    mask, position = batch.attention_mask, batch.next_position
    lengths = (
        None if answers is None else torch.tensor([len(ids) for ids in answers], device=device)
    )
    limit = max_new_tokens if answers is None else int(lengths.max())
    if answers is not None and int(lengths.min()) < 1:
        raise ValueError("an answer to be measured is empty")
    first, chosen, logprobs = output.logits[:, -1].float().log_softmax(-1), [], []
    steps, alive = (
        torch.zeros(size, dtype=torch.long, device=device),
        torch.ones(size, dtype=torch.bool, device=device),
    )
    for step in range(limit):
        logits = output.logits[:, -1].float().to(device)
        if answers is not None:
            token = torch.tensor([ids[min(step, len(ids) - 1)] for ids in answers], device=device)
            alive = step < lengths
        elif do_sample:
            probabilities = (logits / temperature).softmax(-1)
            ordered, order = probabilities.sort(-1, descending=True)
            ordered[(ordered.cumsum(-1) - ordered) > top_p] = 0
            noise = torch.stack(
                [
                    _noise(seed, sample.id, step, ordered.shape[-1], device)
                    for sample in batch.samples
                ]
            )
            token = order.gather(
                -1, (ordered / -noise.clamp_min(1e-20).log()).argmax(-1, keepdim=True)
            )[:, 0]  # exponential race: a draw from `ordered`
        else:
            token = logits.argmax(-1)
        logprobs.append(
            logits.log_softmax(-1).gather(-1, token[:, None])[:, 0].where(alive, float("nan"))
        )
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
        positions = (
            now[:, None]
            if batch.position_ids.ndim == 2
            else now[None, :, None].expand(len(batch.position_ids), -1, -1)
        )
        output = vlm.model(
            input_ids=token[:, None],
            attention_mask=mask,
            position_ids=positions,
            past_key_values=output.past_key_values,
            use_cache=True,
        )
    return Generation(
        _rows(chosen, steps), steps, torch.stack(logprobs, 1), first, output.past_key_values
    )


def answer_ids(vlm, prompt, answer):
    """Ids of a given answer after a prompt, with EOS. answer: text, or ids as they were
    generated."""
    if not isinstance(answer, str):
        return [int(i) for i in answer]
    lead = vlm.tokenizer(prompt[-1], add_special_tokens=False)["input_ids"]
    text = prompt[-1] + ("" if prompt[-1].isspace() else " ") + answer
    ids = vlm.tokenizer(text, add_special_tokens=False)["input_ids"]
    return (
        ids[len(lead) :] + [min(vlm.eos_ids)]
        if ids[: len(lead)] == lead
        else vlm.tokenizer(answer, add_special_tokens=False)["input_ids"] + [min(vlm.eos_ids)]
    )


def extended(batch, ids, group="generated"):
    """The batch with the same ids after each prompt, as tokens of a group: an EOS token as the
    published RoPE probe's query row, an answer's beginning."""
    size, count = len(batch.samples), len(ids)
    steps = batch.next_position[:, None] + torch.arange(count, device=batch.next_position.device)
    steps = (
        steps
        if batch.position_ids.ndim == 2
        else steps[None].expand(len(batch.position_ids), -1, -1)
    )
    return replace(
        batch,
        input_ids=torch.cat([batch.input_ids, batch.input_ids.new_tensor(ids).expand(size, -1)], 1),
        attention_mask=torch.cat(
            [batch.attention_mask, batch.attention_mask.new_ones(size, count)], 1
        ),
        position_ids=torch.cat([batch.position_ids, steps], -1),
        next_position=batch.next_position + count,
        lengths=[length + count for length in batch.lengths],
        groups=torch.cat(
            [batch.groups, batch.groups.new_full((size, count), GROUPS.index(group))], 1
        ),
    )

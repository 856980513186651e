"""The logit lens over a whole prompt: the likeliest tokens of every position after every layer, and
how often the object's name is the likeliest token on the object's own patches.

arXiv 2410.07149; docs/studies/llava_interp.md, sections 2.2 and 2.3. Used by
scripts/logit_lens/create_logit_lens.py and lens_accuracy.py. Shapes: B rows of a batch, L layers, T
prompt length, P vision tokens, k tokens per position, n pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from vlmdiag.groups import GROUPS
from vlmdiag.interp.criteria import names
from vlmdiag.interp.targets import Item, LoadedItem, tokens_of
from vlmdiag.model.attention import capture
from vlmdiag.model.decoding import generate
from vlmdiag.model.lens import Lens, vocabulary
from vlmdiag.model.probes import HiddenStates, Probe
from vlmdiag.model.vision import prefill
from vlmdiag.pictures.chats import record_of
from vlmdiag.types import Record

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from transformers import PreTrainedTokenizerBase

    from vlmdiag.batch import Batch
    from vlmdiag.pictures.samples import Pictures, Sample
    from vlmdiag.types import VLM

LEAST = 3  # letters of a piece that stands for a word
ANSWER = 32  # most tokens of the answer that a page shows

Arrays = dict[str, "np.ndarray"]
Result = tuple[Record, Arrays]
TopK = tuple[Tensor, Tensor]  # ids and probabilities, (B, L + 1, positions, k) each


def _hidden_states(vlm: VLM, lens: Lens, batch: Batch) -> dict[int, Float[Tensor, "B T d"]]:
    """The residual stream of a prompt, index 0 the embeddings, l + 1 the output of layer l; the
    last one is checked to give the model's own logits through the lens."""
    with capture(vlm, [probe := HiddenStates()]):
        logits = prefill(vlm, batch).logits[:, -1]
    lens.check(probe.states[len(vlm.parts.layers)][:, -1], logits)
    return probe.states


# --- the page of a picture ------------------------------------------------------------------------


class AnswerStates(Probe):
    """The residual stream of the answer's tokens as they are read: states[index] holds (B, 1, d) of
    each, after an empty (B, 0, d) of the prompt."""

    wants_hidden = True

    def __init__(self) -> None:
        self.states: dict[int, list[Float[Tensor, "B n d"]]] = {}

    def hidden(self, index: int, states: Float[Tensor, "B Q d"]) -> None:
        # a copy: a view, empty too, would hold the states of the whole prompt
        read = states if self.step > 0 else states[:, :0].clone()
        self.states.setdefault(index, []).append(read)


def make_page_process(
    vlm: VLM, top_k: int
) -> Callable[[Sequence[tuple[Sample, Pictures]]], list[Result]]:
    """process([(sample, picture), ...]) -> [(record, arrays), ...]: the k likeliest tokens of every
    position and layer, ids and probs (L + 1, T, k); and those of the greedy answer's tokens but the
    last, which the model does not read, answer_ids and answer_probs (L + 1, A - 1, k)."""
    lens = Lens(vlm)

    def of_layers(states: Iterable[Float[Tensor, "B T d"]]) -> TopK:
        found = [lens.top_k(of_index, top_k) for of_index in states]
        ids, probs = ([part.cpu() for part in parts] for parts in zip(*found, strict=True))
        return torch.stack(ids, 1), torch.stack(probs, 1)

    @torch.inference_mode()
    def process(loaded: Sequence[tuple[Sample, Pictures]]) -> list[Result]:
        samples, images = zip(*loaded, strict=True)
        batch = vlm.encode(samples, images)
        states = _hidden_states(vlm, lens, batch)
        prompts = of_layers(states.pop(index) for index in sorted(states))
        with capture(vlm, [probe := AnswerStates()]):
            answers = generate(vlm, batch, ANSWER).ids
        read = of_layers(torch.cat(probe.states[index], 1) for index in sorted(probe.states))
        return [
            _page_result(vlm, batch, row, prompts, answers[row], read)
            for row in range(len(samples))
        ]

    return process


def _page_result(
    vlm: VLM, batch: Batch, row: int, prompts: TopK, answer: list[int], read: TopK
) -> Result:
    """Record and arrays of a row. answer: its ids; read: at those that the model read."""
    sample = batch.samples[row]
    places, arrays = batch.places(row)
    in_prompt = slice(batch.groups.shape[1] - batch.lengths[row], None)  # without its padding
    ids, probs = (part[row, :, in_prompt] for part in prompts)
    answer_ids, answer_probs = (part[row, :, : len(answer) - 1] for part in read)
    prompt = batch.input_ids[row, in_prompt].tolist()
    likeliest = torch.cat([ids, answer_ids], 1).unique().tolist()
    words = vocabulary(vlm.tokenizer, {*likeliest, *prompt, *answer})
    record = {
        "image_id": sample.extra["image_id"],
        "file_name": sample.image.name,
        "prompt": batch.prompts[row],
        "spans": batch.spans(row),
        "labels": [words[id] for id in prompt],
        "groups": [GROUPS[code] for code in batch.groups[row, in_prompt].tolist()],
        "vocabulary": words,
        "answer": {
            "text": vlm.tokenizer.decode(answer, skip_special_tokens=True).strip(),
            "labels": [words[id] for id in answer],
        },
        **places,
        **record_of(sample),
        **batch.parts(row),
    }
    found = {
        "ids": ids.int().numpy(),
        "probs": probs.numpy(),
        "answer_ids": answer_ids.int().numpy(),
        "answer_probs": answer_probs.numpy(),
    }
    return record, {**found, **arrays}


# --- accuracy on objects --------------------------------------------------------------------------


def name_ids(
    tokenizer: PreTrainedTokenizerBase, words: Mapping[int, str], category: str
) -> list[int]:
    """Ids that say a category: every spelling of a word of its names as one token, the first piece
    of a word that is none. words {id: text}."""
    wanted = {word for name in names(category) for word in name.split()}
    spelled = {id: text.strip().lower() for id, text in words.items()}
    ids = {id for id, text in spelled.items() if text in wanted}
    for word in wanted - {spelled[id] for id in ids}:
        pieces = tokenizer.encode(f" {word}", add_special_tokens=False)
        first = next((id for id in pieces if spelled.get(id)), None)
        if first is None:
            continue
        if len(spelled[first]) >= LEAST and word.startswith(spelled[first]):
            ids.add(first)
    return sorted(ids)


def make_accuracy_process(
    vlm: VLM, threshold: float
) -> Callable[[Sequence[LoadedItem]], list[Result]]:
    """process([(item, picture, mask), ...]) -> [(record, arrays), ...]: the likeliest token of each
    vision token and layer, top1 (L + 1, P)."""
    lens = Lens(vlm)
    words = vocabulary(vlm.tokenizer, range(len(vlm.tokenizer)))

    @torch.inference_mode()
    def process(loaded: Sequence[LoadedItem]) -> list[Result]:
        items, images, masks = zip(*loaded, strict=True)
        batch = vlm.encode([item.sample for item in items], images)
        states = _hidden_states(vlm, lens, batch)
        results = []
        for row, item in enumerate(items):
            positions = batch.vision_positions(row)
            layers = []
            for index in sorted(states):
                of_picture = states[index][row, positions.to(states[index].device)]
                layers.append(lens.top_k(of_picture, 1)[0][:, 0].to(vlm.device))
            top1 = torch.stack(layers).cpu().numpy().astype(np.int32)
            tokens = tokens_of(vlm, replace(batch, grids=[batch.grids[row]]), masks[row], threshold)
            results.append(_accuracy_result(vlm, words, item, tokens, top1))
        return results

    return process


def _accuracy_result(
    vlm: VLM,
    words: Mapping[int, str],
    item: Item,
    tokens: Int[np.ndarray, " n"],
    top1: Int[np.ndarray, "L+1 P"],
) -> Result:
    ids = name_ids(vlm.tokenizer, words, item.category)
    if not ids:
        raise ValueError(f"no token of the vocabulary says {item.category!r}")
    record = {
        "image_id": item.sample.extra["image_id"],
        "file_name": item.image.name,
        "category": item.category,
        "name_ids": ids,
        "name_tokens": [words[id] for id in ids],
        "object_tokens": len(tokens),
        "vision_tokens": top1.shape[1],
    }
    return record, {"top1": top1, "tokens": tokens.astype(np.int32)}


# --- analysis -------------------------------------------------------------------------------------

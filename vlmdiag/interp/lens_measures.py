"""The logit lens over a whole prompt: the likeliest tokens of every position after every layer, and
how often the object's name is the likeliest token on the object's own patches.

arXiv 2410.07149; docs/studies/llava_interp.md, sections 2.2 and 2.3. Used by
scripts/logit_lens/create_logit_lens.py and lens_accuracy.py. Shapes: B rows of a batch, L layers, T
prompt length, P vision tokens, k tokens per position, n pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from vlmdiag.groups import GROUPS
from vlmdiag.interp.criteria import names
from vlmdiag.interp.targets import Item, LoadedItem, tokens_of
from vlmdiag.model.attention import capture
from vlmdiag.model.lens import Lens, vocabulary
from vlmdiag.model.probes import HiddenStates
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

Arrays = dict[str, "np.ndarray"]
Result = tuple[Record, Arrays]


def _hidden_states(vlm: VLM, lens: Lens, batch: Batch) -> dict[int, Float[Tensor, "B T d"]]:
    """The residual stream of a prompt, index 0 the embeddings, l + 1 the output of layer l; the
    last one is checked to give the model's own logits through the lens."""
    with capture(vlm, [probe := HiddenStates()]):
        logits = prefill(vlm, batch).logits[:, -1]
    lens.check(probe.states[len(vlm.parts.layers)][:, -1], logits)
    return probe.states


# --- the page of a picture ------------------------------------------------------------------------


def make_page_process(
    vlm: VLM, top_k: int
) -> Callable[[Sequence[tuple[Sample, Pictures]]], list[Result]]:
    """process([(sample, picture), ...]) -> [(record, arrays), ...]: the k likeliest tokens of every
    position and layer, ids and probs (L + 1, T, k)."""
    lens = Lens(vlm)

    @torch.inference_mode()
    def process(loaded: Sequence[tuple[Sample, Pictures]]) -> list[Result]:
        samples, images = zip(*loaded, strict=True)
        batch = vlm.encode(samples, images)
        states = _hidden_states(vlm, lens, batch)
        ids, probs = [], []
        for index in sorted(states):
            likeliest, probabilities = lens.top_k(states.pop(index), top_k)
            ids.append(likeliest.to(vlm.device))
            probs.append(probabilities.to(vlm.device))
        all_ids = torch.stack(ids, 1).cpu()  # (B, L + 1, T, k)
        all_probs = torch.stack(probs, 1).cpu()
        return [
            _page_result(vlm, batch, row, all_ids[row], all_probs[row])
            for row in range(len(samples))
        ]

    return process


def _page_result(
    vlm: VLM, batch: Batch, row: int, ids: Int[Tensor, "L+1 T k"], probs: Float[Tensor, "L+1 T k"]
) -> Result:
    sample = batch.samples[row]
    places, arrays = batch.places(row)
    in_prompt = slice(batch.groups.shape[1] - batch.lengths[row], None)  # without its padding
    ids, probs = ids[:, in_prompt], probs[:, in_prompt]
    prompt = batch.input_ids[row, in_prompt].tolist()
    words = vocabulary(vlm.tokenizer, {*ids.unique().tolist(), *prompt})
    record = {
        "image_id": sample.extra["image_id"],
        "file_name": sample.image.name,
        "prompt": batch.prompts[row],
        "spans": batch.spans(row),
        "labels": [words[id] for id in prompt],
        "groups": [GROUPS[code] for code in batch.groups[row, in_prompt].tolist()],
        "vocabulary": words,
        **places,
        **record_of(sample),
        **batch.parts(row),
    }
    return record, {"ids": ids.int().numpy(), "probs": probs.numpy(), **arrays}


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

"""Both ablation experiments: is the object still named, and still seen, once its vision tokens
are replaced?

arXiv 2410.07149, table 1; docs/studies/llava_interp.md, sections 2.5 to 2.8. Used by
scripts/ablation_experiment.py and ablation_experiment_curate.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vlmdiag.interp.conditions import SIZES, condition_sets
from vlmdiag.interp.criteria import (
    mentions,
    mentions_published,
    prefix_published,
    says_yes,
    says_yes_published,
)
from vlmdiag.interp.interventions import (
    Answer,
    Ask,
    Prompt,
    Replacement,
    answers_of,
    asking,
    integrated_gradients,
    naming,
    prepare,
    run_conditions,
)
from vlmdiag.interp.targets import Item, LoadedItem, record_of, tokens_of
from vlmdiag.model.decoding import answer_ids, extended
from vlmdiag.model.prefix import SharedPicture
from vlmdiag.pictures.samples import Sample
from vlmdiag.types import Record

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from vlmdiag.pictures.grid import PatchGrid
    from vlmdiag.types import VLM

Arrays = dict[str, "np.ndarray"]
Result = tuple[Record, Arrays]
Process = Callable[[Sequence[LoadedItem]], list[Result]]

POLLING_TOKENS = 10  # of a yes/no answer
START = "It is a"  # beginning of the answer that the curated experiment gives


@dataclass(frozen=True)
class Ablation:
    """How tokens are ablated, by the flags of the two scripts."""

    replacement: Replacement
    sizes: Sequence[int] = SIZES  # how many gradient and random tokens
    draws: int = 3  # random and compact sets of each matched size
    gradient_steps: int = 50  # of integrated gradients; 0 leaves them out
    per_pass: int = 8
    seed: int = 0
    paper_compat: bool = False
    threshold: float = 0.0  # a token is the object's if more of its box is covered
    max_new_tokens: int = 200
    no_noise_filter: bool = False


def article(name: str) -> str:
    """'a cat', 'an apple'."""
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def covered_by_noise(
    image: Image.Image, grid: PatchGrid, tokens: Int[np.ndarray, " n"], seed: int
) -> Image.Image:
    """The picture with the boxes of the tokens overwritten by one patch of uniform noise
    (published: unseeded)."""
    pixels = np.array(image)
    for x0, y0, x1, y1 in grid.boxes[tokens]:
        rows = slice(max(0, int(np.floor(y0))), max(0, int(np.ceil(y1))))
        columns = slice(max(0, int(np.floor(x0))), max(0, int(np.ceil(x1))))
        box = pixels[rows, columns]
        box[:] = np.random.default_rng(seed).integers(0, 256, box.shape, dtype=np.uint8)
    return Image.fromarray(pixels)


def _under_all_conditions(
    vlm: VLM,
    ablation: Ablation,
    item: Item,
    record: Record,
    prompts: Sequence[Prompt],
    asks: Sequence[Ask],
    explained: Prompt,
    target: int,
    tokens: Int[np.ndarray, " n"],
    results_of: Callable[[list[Answer]], Mapping[str, object]],
) -> Arrays:
    """Add the results of all conditions to a record; returns the arrays of the item.

    explained, target: the prompt and the id that integrated gradients explain.
    """
    lead = prompts[0]
    vision = torch.cat(lead.features.pooler_output)
    values = ablation.replacement.values(vision, ablation.seed, item.id)
    scores = None
    if ablation.gradient_steps:
        is_noise = ablation.replacement.kind == "noise"
        scores, record["gradient_completeness_error"] = integrated_gradients(
            vlm,
            explained,
            torch.zeros_like(vision) if is_noise else values,
            target,
            ablation.gradient_steps,
            ablation.per_pass,
            ablation.paper_compat,
        )
    grid = lead.batch.grids[0]
    assert grid is not None  # tokens_of() has refused a model without one
    sets, record["skipped"] = condition_sets(
        grid,
        vision.float().norm(dim=-1).cpu().numpy(),
        scores,
        tokens,
        ablation.sizes,
        ablation.draws,
        ablation.seed,
        item.id,
        ablation.paper_compat,
    )
    answers = run_conditions(vlm, prompts, asks, sets, values, ablation.per_pass)
    for name, chosen in sets.items():
        record["conditions"][name] = {**results_of(answers[name]), "tokens": len(chosen)}
    arrays: Arrays = {f"tokens_{name}": chosen.astype(np.int32) for name, chosen in sets.items()}
    return arrays | {"vision_positions": lead.positions.cpu().numpy()}


# --- descriptions and yes/no questions ------------------------------------------------------------


def make_process(vlm: VLM, ablation: Ablation) -> Process:
    """process([(item, picture, mask), ...]) -> [(record, arrays), ...] of ablation_experiment.py:
    generative ("Describe this image.") and polling ("Is there a <object> in this image?")."""

    @torch.no_grad()
    def process(loaded: Sequence[LoadedItem]) -> list[Result]:
        return [_describe_and_poll(vlm, ablation, *each) for each in loaded]

    return process


def _describe_and_poll(
    vlm: VLM, ablation: Ablation, item: Item, image: Image.Image, mask: np.ndarray
) -> Result:
    question = f"Is there {article(item.category)} in this image?"
    polled = Sample(item.id, item.image, question)
    batch = vlm.encode([item.sample], [image])
    polling_batch = vlm.encode([polled], [image])
    tokens = tokens_of(vlm, batch, mask, ablation.threshold)
    features = vlm.vision(batch)
    shared = SharedPicture(vlm, batch)
    described = prepare(vlm, batch, features)
    shared.keep(described.cache)
    prompts = {"generative": described, "polling": prepare(vlm, polling_batch, features, shared)}
    limits = {"generative": ablation.max_new_tokens, "polling": POLLING_TOKENS}
    yes = answer_ids(vlm, polling_batch.prompts[0], "Yes")[0]
    record: Record = record_of(item) | {
        "prompt": batch.prompts[0],
        "polling_prompt": polling_batch.prompts[0],
        "object_tokens": len(tokens),
        "vision_tokens": len(described.positions),
    }

    def generative(answer: Answer, prompt: str) -> Record:
        text = vlm.text(answer.ids)
        if ablation.paper_compat:
            named = mentions_published(prompt + text, item.category)
        else:
            named = mentions(text, item.category, item.also_called)
        return {"correct": bool(named), "text": text}

    def polling(answer: Answer) -> Record:
        text = vlm.text(answer.ids)
        said_yes = says_yes_published(text) if ablation.paper_compat else says_yes(text)
        return {"correct": said_yes is True, "text": text, "logprob_yes": answer.first[yes].item()}

    def results_of(answers: list[Answer]) -> dict[str, Record]:
        to_describe, to_poll = answers
        return {
            "generative": generative(to_describe, batch.prompts[0]),
            "polling": polling(to_poll),
        }

    plain = {}
    for name, prompt in prompts.items():
        generation = asking(limits[name])(vlm, prompt.batch, **prompt.inputs(vlm))
        plain[name] = answers_of(generation)[0]
    # an ablated answer is seldom another one
    asks = {name: asking(limit, plain[name].ids) for name, limit in limits.items()}
    unablated = results_of(list(plain.values()))
    record["conditions"] = {"none": {**unablated, "tokens": 0}}
    record["caption"] = unablated["generative"]["text"]
    record["eligible"] = unablated["generative"]["correct"]
    if record["eligible"] and not ablation.no_noise_filter:
        grid = batch.grids[0]
        assert grid is not None  # tokens_of() has refused a model without one
        noisy = vlm.encode([item.sample], [covered_by_noise(image, grid, tokens, ablation.seed)])
        (answer,) = answers_of(asks["generative"](vlm, noisy))
        record["under_noise"] = generative(answer, noisy.prompts[0])
        record["eligible"] = not record["under_noise"]["correct"]
    if not record["eligible"]:
        return record, {}
    arrays = _under_all_conditions(
        vlm,
        ablation,
        item,
        record,
        list(prompts.values()),
        list(asks.values()),
        prompts["polling"],
        yes,
        tokens,
        results_of,
    )
    return record, arrays


# --- curated questions ----------------------------------------------------------------------------


@dataclass
class CuratedPrompt:
    """A curated question with the answer's beginning START, and the name that is to follow."""

    prompt: Prompt
    tokens: Int[np.ndarray, " n"]  # of the object
    name: list[int]  # ids of the right name
    first_piece: str  # its first token, as the vocabulary has it
    record: Record  # how the record begins
    text: str  # the prompt with START


def curated_prompt(
    vlm: VLM, item: Item, image: Image.Image, mask: np.ndarray, threshold: float
) -> CuratedPrompt:
    """Read a curated question about a picture, up to the given beginning of its answer."""
    question = vlm.encode([item.sample], [image])
    text = question.prompts[0]
    beginning = answer_ids(vlm, text, START)[:-1]
    batch = extended(question, beginning, "template")
    text = f"{text}{START}" if text[-1].isspace() else f"{text} {START}"
    name = answer_ids(vlm, text, item.answer)[:-1]
    tokens = tokens_of(vlm, batch, mask, threshold)
    prompt = prepare(vlm, batch, vlm.vision(batch))
    record = record_of(item) | {
        "question": item.sample.question,
        "answer": item.answer,
        "prompt": text,
        "object_tokens": len(tokens),
        "vision_tokens": len(prompt.positions),
    }
    first_piece = vlm.tokenizer.convert_ids_to_tokens(name[0])
    return CuratedPrompt(prompt, tokens, name, first_piece, record, text)


def make_curated_process(vlm: VLM, ablation: Ablation) -> Process:
    """process([(item, picture, mask), ...]) -> [(record, arrays), ...] of
    ablation_experiment_curate.py: does the answer go on with the object's name?"""

    @torch.no_grad()
    def process(loaded: Sequence[LoadedItem]) -> list[Result]:
        return [_complete(vlm, ablation, *each) for each in loaded]

    return process


def _complete(
    vlm: VLM, ablation: Ablation, item: Item, image: Image.Image, mask: np.ndarray
) -> Result:
    asked = curated_prompt(vlm, item, image, mask, ablation.threshold)
    record = asked.record
    names = item.also_called if item.answer == item.category else ()

    def result(answers: list[Answer]) -> Record:
        completion, named = answers
        text = vlm.text(completion.ids)
        first: Tensor = completion.first
        best = int(first.argmax())
        token = vlm.tokenizer.decode([best])
        if ablation.paper_compat:
            right = prefix_published(token, asked.first_piece)
        else:
            right = mentions(text, item.answer, names)
        return {
            "correct": bool(right),
            "text": text,
            "generated_token": token,
            "generated_token_prob": first[best].exp().item(),
            "logprob_first_token": first[asked.name[0]].item(),
            "logprob_name": named.logprobs.sum().item(),
        }

    limit = ablation.max_new_tokens
    prompt = asked.prompt
    plain = [
        answers_of(ask(vlm, prompt.batch, **prompt.inputs(vlm)))[0]
        for ask in (asking(limit), naming(asked.name))
    ]
    # an ablated answer is seldom another one
    asks = [asking(limit, plain[0].ids), naming(asked.name)]
    unablated = result(plain)
    record["conditions"] = {"none": {"vqa": unablated, "tokens": 0}}
    record["caption"] = unablated["text"]
    record["eligible"] = unablated["correct"]
    if not record["eligible"]:
        return record, {}
    arrays = _under_all_conditions(
        vlm,
        ablation,
        item,
        record,
        [prompt, prompt],
        asks,
        prompt,
        asked.name[0],
        asked.tokens,
        lambda answers: {"vqa": result(answers)},
    )
    return record, arrays


def logits_result(
    vlm: VLM, logits: Float[Tensor, " V"], asked: CuratedPrompt, right_ids: set[int] | None
) -> Record:
    """What the token after a curated prompt is. right_ids: first ids of the name and its synonyms;
    None: the published rule."""
    first = logits.float().log_softmax(-1)
    best = int(first.argmax())
    token = vlm.tokenizer.decode([best])
    if right_ids is None:
        right = prefix_published(token, asked.first_piece)
    else:
        right = best in right_ids
    return {
        "correct": bool(right),
        "generated_token": token,
        "generated_token_prob": first[best].exp().item(),
        "logprob_first_token": first[asked.name[0]].item(),
    }

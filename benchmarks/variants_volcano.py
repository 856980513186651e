"""The variants of bench_volcano.py, and that their outputs are equal.

variant(case) -> per instance the ids of its four answers and the pooled attention of the first
three, [c (T, P), ...]. Shapes: T answer tokens, L layers, H heads, P vision tokens, N prompt
tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from benchmarks.cases import Case
from vlmdiag.groups import VISION
from vlmdiag.model.vision import entered, entering
from vlmdiag.pictures.samples import AT_HAND, Sample, load_image
from vlmdiag.scenes.questions import critique_prompt, decide_prompt, revise_prompt
from vlmdiag.volcano.conversation import Answer, Asker
from vlmdiag.volcano.maps import pool_heads, pool_layers

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from PIL.Image import Image
    from torch import Tensor

    from vlmdiag.types import VLM

DECISION = 8  # tokens
TOLERANCE = 1e-4
PUBLISHED_TOP = 3  # layers and heads
STAGES = ("initial", "feedback", "revision", "decide")
MEASURED = 3  # the decision's attention is not measured


class Round(NamedTuple):
    """One round of an instance."""

    ids: list[list[int]]
    pooled: list[np.ndarray]


class Settings:
    """What Asker reads of the script's flags."""

    sample = False
    temperature = 1.0
    seed = 0
    engineered_prompt = False
    max_iterations = 1
    order = "fixed"
    full_tensors = False
    paper_compat = False

    def __init__(self, max_new_tokens: int, hidden_top_k: int) -> None:
        self.max_new_tokens = max_new_tokens
        self.hidden_top_k = hidden_top_k


def top_of(vlm: VLM) -> int:
    """The published 3, or what a very small model has."""
    heads = vlm.model.config.get_text_config().num_attention_heads
    return min(PUBLISHED_TOP, len(vlm.parts.layers), heads)


def next_prompt(question: str, answers: Sequence[str]) -> str:
    """The text of the prompt after these answers of a round."""
    if not answers:
        return question
    if len(answers) == 1:
        return critique_prompt(question, answers[0])
    if len(answers) == 2:
        return revise_prompt(question, answers[0], answers[1])
    return decide_prompt(question, answers[0], answers[2])


@torch.inference_mode()
def ours(case: Case) -> list[Round]:
    """The script's own Asker, all instances as one batch."""
    k = top_of(case.vlm)
    settings = Settings(case.new_tokens, k)
    images = [load_image(sample.image) for sample in case.samples]
    ask = Asker(settings, case.vlm, case.samples, images)
    rows = list(range(len(case.samples)))
    answers: list[list[Answer]] = [[] for _ in case.samples]
    for stage in STAGES:
        is_decision = stage == "decide"
        settings.max_new_tokens = DECISION if is_decision else case.new_tokens
        texts = [
            next_prompt(sample.question, [answer.text for answer in of_instance])
            for sample, of_instance in zip(case.samples, answers, strict=True)
        ]
        said = ask(rows, texts, stage, not is_decision)
        for of_instance, answer in zip(answers, said, strict=True):
            of_instance.append(answer)
    return [
        Round(
            [answer.ids for answer in of_instance],
            [pool_heads(answer.attention["topk"], k) for answer in of_instance[:MEASURED]],
        )
        for of_instance in answers
    ]


def floor(case: Case) -> list[Round]:
    """generate() for each prompt, nothing measured."""
    return [_round(case, sample, eager=False) for sample in case.samples]


def published(case: Case) -> list[Round]:
    """generate() on eager attention that returns all maps."""
    return [_round(case, sample, eager=True) for sample in case.samples]


@torch.inference_mode()
def _round(case: Case, sample: Sample, eager: bool) -> Round:
    """One round of one instance; the picture's features are computed once."""
    vlm = case.vlm
    image: Image = load_image(sample.image)
    features = None
    texts: list[str] = []
    result = Round([], [])
    for stage in STAGES:
        is_decision = stage == "decide"
        is_measured = eager and not is_decision
        prompt = next_prompt(sample.question, texts)
        batch = vlm.encode([Sample("0", AT_HAND, prompt)], [image])
        if features is None:
            features = vlm.vision(batch)
        with entering(vlm, batch, entered(vlm, features)) as embeds:
            pass  # a LLaVA has all of the picture in its input
        vlm.parts.decoder.set_attn_implementation("eager" if is_measured else "sdpa")
        try:
            output = vlm.model.generate(
                inputs_embeds=embeds,
                attention_mask=batch.attention_mask,
                max_new_tokens=DECISION if is_decision else case.new_tokens,
                do_sample=False,
                output_attentions=is_measured,
                return_dict_in_generate=True,
            )
        finally:
            vlm.parts.decoder.set_attn_implementation("sdpa")
        ids = output.sequences[0].tolist()
        result.ids.append(ids)
        texts.append(vlm.tokenizer.decode(ids, skip_special_tokens=True).strip())
        if is_measured:
            is_vision = batch.groups[0] == VISION
            result.pooled.append(gathered(output.attentions, is_vision, top_of(vlm)))
    return result


def gathered(
    attentions: Sequence[Sequence[Float[Tensor, "1 H Q K"]]], is_vision: Bool[Tensor, " N"], k: int
) -> Float[np.ndarray, "T P"]:
    """c from all maps: of each step and layer the last row's image columns to the CPU, then both
    top-k means."""
    num_heads = attentions[0][0].shape[1]
    shape = (len(attentions), len(attentions[0]), num_heads, int(is_vision.sum()))
    to_picture = torch.zeros(shape)
    for step, maps in enumerate(attentions):
        generated = torch.zeros(maps[0].shape[-1] - len(is_vision), dtype=torch.bool)
        columns = torch.cat([is_vision.cpu(), generated])
        for layer, attention in enumerate(maps):
            last_row = attention[0, :, -1]
            to_picture[step, layer] = last_row[:, columns.to(last_row.device)].float().cpu()
    return pool_heads(pool_layers(to_picture.numpy(), k), k)


VARIANTS: dict[str, Callable[[Case], list[Round]]] = {
    "floor": floor,
    "ours": ours,
    "published": published,
}


def check(case: Case) -> float:
    """Largest difference of the pooled attention; AssertionError unless all agree."""
    rounds = [VARIANTS[name](case) for name in ("ours", "published", "floor")]
    worst = 0.0
    for mine, other, plain in zip(*rounds, strict=True):
        if not mine.ids == other.ids == plain.ids:
            raise AssertionError(
                f"other answers: ours {mine.ids}, published {other.ids}, floor {plain.ids}"
            )
        for ours_pooled, published_pooled in zip(mine.pooled, other.pooled, strict=True):
            gap = float(np.abs(ours_pooled - published_pooled).max())
            if not gap <= TOLERANCE:  # a NaN is not <= either
                raise AssertionError(
                    f"pooled attention differs by {gap:.1e}, more than {TOLERANCE:g}"
                )
            worst = max(worst, gap)
    return worst

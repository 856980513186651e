"""What can a tiny model do? Every question about scenes that training never saw, and the logit lens
on the patches of their objects. Used by checkpoints/evaluate_tiny.py.

Shapes: L layers, P vision tokens, B rows of a batch.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, NamedTuple

import torch
from tqdm import tqdm

from vlmdiag import answers
from vlmdiag.groups import VISION
from vlmdiag.model.attention import capture
from vlmdiag.model.decoding import generate
from vlmdiag.model.lens import Lens
from vlmdiag.model.probes import Probe
from vlmdiag.pictures.samples import AT_HAND, Sample
from vlmdiag.scenes.questions import (
    AXES,
    Maker,
    Question,
    absent,
    ask_caption,
    ask_color,
    ask_count,
    ask_protocol,
    ask_shape,
    ask_what,
    ask_where,
    camera_questions,
    margin,
    presence,
    relation,
    relations,
    split,
    with_one_word,
)
from vlmdiag.scenes.scene import Scene, corridor_scene, floor_scene, instance_map, render
from vlmdiag.scenes.tiny_llava import ALL_COLORS, ALL_SHAPES, word_id

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from PIL.Image import Image
    from torch import Tensor

    from vlmdiag.batch import Batch
    from vlmdiag.types import VLM

FAR_APART = 0.12  # margin of the relations that count for the bars
LEAST_APART = 0.05
INSIDE = 0.6  # share of a patch that an object covers to count in the lens
LONG_ANSWERS = ("caption", "critique", "revise")
WHOLE_ANSWERS = ("where", "revise", "critique")  # right only where all words agree
ONE_WORD_KINDS = (*AXES, "yes_no")


Grouped = tuple[str, Question]  # (group in the card's table, question)


class Asked(NamedTuple):
    """A question about a picture."""

    group: str  # in the card's table
    question: Question
    scene: Scene
    picture: Image


@dataclass
class Evaluation:
    """What was right, and what the lens shows."""

    right: Counter[str]  # by group
    asked: Counter[str]
    lens: Float[Tensor, "L+1 3"]  # share of the patches whose top-1 is colour, shape, either
    patches: int


# --- questions ------------------------------------------------------------------------------------


def _relation_questions(scene: Scene) -> list[Grouped]:
    """Both relations of every pair of objects along every axis."""
    grouped = []
    for kind, (axis, _, _) in AXES.items():
        for a, b in relations(scene, kind, LEAST_APART):
            if margin(a, b, axis, scene) < FAR_APART:
                group = f"{kind}, 5 to 12 % apart"
            elif kind == "far_close":
                far, near = (a, b) if a.z > b.z else (b, a)
                group = f"{kind}, {split(far, near, scene)}"
            else:
                group = kind
            grouped.append((group, relation(kind, a, b)))
    return grouped


def questions_of(rng: Random, scene: Scene) -> list[Grouped]:
    """All questions about one scene; of the relations and yes/no questions every other one ends in
    the request for one word."""
    if scene.kind == "corridor":
        far, near = scene.things
        group = f"camera, {split(far, near, scene)}"
        return [(group, question) for question in camera_questions(far, near)]
    grouped = _relation_questions(scene)
    there = rng.choice(scene.things).name
    missing = absent(rng, scene)
    grouped.append(("yes_no", presence(rng, there, "Yes")))
    grouped.append(("yes_no", presence(rng, missing, "No")))
    single: tuple[Maker, ...] = (ask_color, ask_shape, ask_what, ask_count, ask_where, ask_caption)
    for make in (*single, ask_protocol, ask_protocol):
        question = make(rng, scene)
        if question is not None:
            grouped.append((question.kind, question))
    for index in range(0, len(grouped), 2):
        group, question = grouped[index]
        if question.kind in ONE_WORD_KINDS:
            grouped[index] = (group, with_one_word(question))
    return grouped


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def is_right(question: Question, text: str, scene: Scene) -> bool:
    """Whether a generated answer is right, by whole words. A caption names every object with colour
    and shape and no other."""
    words = _words(text)
    if question.kind == "caption":
        pairs = {
            (color, shape)
            for color, shape in zip(words, words[1:], strict=False)
            if color in ALL_COLORS and shape in ALL_SHAPES
        }
        return pairs == {(thing.color, thing.shape) for thing in scene.things}
    if question.kind in WHOLE_ANSWERS:
        return words == _words(question.answer)
    if question.kind == "what":  # the shape, the last word of 'It is a circle.'
        return answers.is_right(text, _words(question.answer)[-1])
    return answers.is_right(text, question.answer)


# --- the lens -------------------------------------------------------------------------------------


class TopTokens(Probe):
    """Top-1 token of every vision token at every layer of the prefill of one prompt.

    top: a list over hidden states of (P,)
    """

    wants_hidden = True

    def __init__(self, vlm: VLM, batch: Batch) -> None:
        self.lens = Lens(vlm)
        self.is_vision = batch.groups[0] == VISION
        self.top: list[Int[Tensor, " P"]] = []

    def hidden(self, index: int, states: Float[Tensor, "1 Q d"]) -> None:
        if self.step == 0:
            self.top.append(self.lens.logits(states[0, self.is_vision]).argmax(-1))


def lens_hits(
    vlm: VLM, scene: Scene, batch: Batch, top: Int[Tensor, "L+1 P"]
) -> tuple[Float[Tensor, "L+1 3"], int]:
    """Hits of colour, shape, either at every hidden state, and the number of patches at least 60 %
    inside an object."""
    seen = instance_map(scene)
    grid = batch.grids[0]
    assert grid is not None, "the family of the tiny models has grids"
    hits = torch.zeros(len(top), 3)
    count = 0
    for number, thing in enumerate(scene.things, 1):
        patches = torch.from_numpy(grid.coverage(seen == number) >= INSIDE)
        color = top[:, patches] == word_id(vlm.tokenizer, thing.color)
        shape = top[:, patches] == word_id(vlm.tokenizer, thing.shape)
        hits += torch.stack([color.sum(-1), shape.sum(-1), (color | shape).sum(-1)], -1)
        count += int(patches.sum())
    return hits, count


def _lens_of(vlm: VLM, scene: Scene, picture: Image) -> tuple[Float[Tensor, "L+1 3"], int]:
    """lens_hits of one picture."""
    batch = vlm.encode([Sample("0", AT_HAND, "Describe the image.")], [picture])
    probe = TopTokens(vlm, batch)
    with capture(vlm, [probe]):
        generate(vlm, batch, 1)
    return lens_hits(vlm, scene, batch, torch.stack(probe.top))


# --- all of it ------------------------------------------------------------------------------------


@torch.inference_mode()
def evaluate(vlm: VLM, num_scenes: int, seed: int, batch_size: int) -> Evaluation:
    """num_scenes: floor scenes of two to four objects; a third as many corridors."""
    rng = Random(f"evaluate-{seed}")
    scenes = [floor_scene(rng, 2 + index % 3) for index in range(num_scenes)]
    scenes += [corridor_scene(rng) for _ in range(num_scenes // 3)]
    hits = torch.zeros(1, 3)
    patches = 0
    asked = []
    for scene in tqdm(scenes, desc="lens"):
        picture = render(scene)
        asked += [Asked(*grouped, scene, picture) for grouped in questions_of(rng, scene)]
        if scene.kind == "floor":
            of_picture, count = _lens_of(vlm, scene, picture)
            hits = hits + of_picture
            patches += count
    asked.sort(key=lambda row: len(row.question.text))
    right: Counter[str] = Counter()
    for start in tqdm(range(0, len(asked), batch_size), desc="questions"):
        rows = asked[start : start + batch_size]
        for row, text in zip(rows, _answers(vlm, rows), strict=True):
            right[row.group] += is_right(row.question, text, row.scene)
    counts = Counter(row.group for row in asked)
    return Evaluation(right, counts, hits / max(patches, 1), patches)


def _answers(vlm: VLM, rows: Sequence[Asked]) -> list[str]:
    """Greedy answers."""
    samples = [Sample(str(index), AT_HAND, row.question.text) for index, row in enumerate(rows)]
    batch = vlm.encode(samples, [row.picture for row in rows])
    has_long = any(row.question.kind in LONG_ANSWERS for row in rows)
    generation = generate(vlm, batch, 40 if has_long else 10)
    return [vlm.tokenizer.decode(ids, skip_special_tokens=True) for ids in generation.ids]

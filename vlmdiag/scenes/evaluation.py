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
from typing import TYPE_CHECKING

import numpy as np
import torch
from tqdm import tqdm

from vlmdiag import answers
from vlmdiag.model.attention import capture
from vlmdiag.model.decoding import generate
from vlmdiag.model.lens import Lens
from vlmdiag.model.prefix import SharedPicture
from vlmdiag.model.probes import HiddenStates
from vlmdiag.model.vision import prefill
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
    from jaxtyping import Float
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


@dataclass
class Evaluation:
    """What was right, and what the lens shows."""

    right: Counter[str]  # by group
    asked: Counter[str]
    lens: Float[Tensor, "L+1 3"]  # share of the patches whose top-1 is colour, shape, either
    patches: int  # inside objects


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


def lens_hits(
    vlm: VLM, lens: Lens, scene: Scene, batch: Batch
) -> tuple[Float[Tensor, "L+1 3"], int]:
    """How many patches at least 60 % inside an object have its colour, shape, either as top-1 token
    at every hidden state, and the number of these patches. batch: one prompt about the scene's
    picture."""
    grid = batch.grids[0]
    assert grid is not None, "the family of these models has grids"
    seen = instance_map(scene)
    inside = [grid.coverage(seen == number) >= INSIDE for number in range(1, len(scene.things) + 1)]
    owner = torch.from_numpy(np.stack(inside)).nonzero()  # (object, patch) of each patch inside one
    names = [(thing.color, thing.shape) for thing in scene.things]
    ids = torch.tensor([[word_id(vlm.tokenizer, word) for word in pair] for pair in names])
    wanted = ids[owner[:, 0]].T  # (2, patches)
    positions = batch.vision_positions(0)[owner[:, 1]]
    with capture(vlm, [probe := HiddenStates()]):
        prefill(vlm, batch)
    top = torch.stack(
        [
            lens.top_k(probe.states[index][0, positions], 1)[0][:, 0].cpu()
            for index in sorted(probe.states)
        ]
    )
    color, shape = top == wanted[0], top == wanted[1]
    return torch.stack([color.sum(-1), shape.sum(-1), (color | shape).sum(-1)], -1), len(owner)


# --- all of it ------------------------------------------------------------------------------------


@torch.inference_mode()
def evaluate(vlm: VLM, num_scenes: int, seed: int, batch_size: int) -> Evaluation:
    """num_scenes: floor scenes of two to four objects; a third as many corridors."""
    rng = Random(f"evaluate-{seed}")
    scenes = [floor_scene(rng, 2 + index % 3) for index in range(num_scenes)]
    scenes += [corridor_scene(rng) for _ in range(num_scenes // 3)]
    lens = Lens(vlm)
    found = Evaluation(Counter(), Counter(), torch.zeros(1, 3), 0)
    for scene in tqdm(scenes, desc="scenes"):
        picture = render(scene)
        if scene.kind == "floor":
            sample = Sample("0", AT_HAND, "Describe the image.")
            hits, patches = lens_hits(vlm, lens, scene, vlm.encode([sample], [picture]))
            found.lens = found.lens + hits
            found.patches += patches
        asked = questions_of(rng, scene)
        questions = [question for _, question in asked]
        texts = _answers(vlm, picture, questions, batch_size)
        for (group, question), text in zip(asked, texts, strict=True):
            found.asked[group] += 1
            found.right[group] += is_right(question, text, scene)
    found.lens = found.lens / max(found.patches, 1)
    return found


def _answers(vlm: VLM, picture: Image, questions: Sequence[Question], batch_size: int) -> list[str]:
    """Greedy answers to questions about one picture, which runs through the decoder once."""

    def encode(chosen: Sequence[int]) -> Batch:
        samples = [Sample(str(index), AT_HAND, questions[index].text) for index in chosen]
        return vlm.encode(samples, [picture] * len(chosen))

    texts = [""] * len(questions)
    # short answers are not held up by the long ones, nor short questions padded to the longest
    order = sorted(
        range(len(questions)),
        key=lambda index: (questions[index].kind in LONG_ANSWERS, len(questions[index].text)),
    )
    shared = SharedPicture(vlm, encode(order[:2]), [0] * len(order[:2]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        limit = 40 if questions[chosen[-1]].kind in LONG_ANSWERS else 10
        batch, inputs = shared.ask(encode(chosen), [0] * len(chosen))
        generation = generate(vlm, batch, limit, **inputs)
        for index, ids in zip(chosen, generation.ids, strict=True):
            texts[index] = vlm.tokenizer.decode(ids, skip_special_tokens=True)
    return texts

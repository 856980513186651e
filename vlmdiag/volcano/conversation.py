"""The critique - revise - decide loop of a batch of pictures, with the attention of each answer's
steps to its picture.

Volcano (arXiv 2311.07362), algorithm 1; docs/studies/volcano.md, sections 2 to 4. What a decision
means is in protocol.py, the prompts are in vlmdiag/scenes/questions.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch

from vlmdiag.model.attention import capture
from vlmdiag.model.decoding import answer_ids, generate
from vlmdiag.model.prefix import SharedPicture
from vlmdiag.model.probes import ImageAttention
from vlmdiag.options import chosen
from vlmdiag.pictures.samples import AT_HAND, Sample
from vlmdiag.scenes.questions import critique_prompt, decide_prompt, revise_prompt
from vlmdiag.types import Fields, Record
from vlmdiag.volcano.protocol import decision_published, order_of

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Float
    from PIL.Image import Image
    from torch import Tensor

    from vlmdiag.batch import Batch
    from vlmdiag.model.decoding import Generation
    from vlmdiag.pictures.grid import PatchGrid
    from vlmdiag.types import VLM


class Settings(Protocol):
    """The flags of run_volcano_with_image_attention.py that the conversation depends on."""

    sample: bool
    temperature: float
    seed: int
    engineered_prompt: bool
    max_iterations: int
    order: str  # fixed or random
    max_new_tokens: int
    hidden_top_k: int
    full_tensors: bool
    paper_compat: bool


@dataclass
class Answer:
    """What a model said to one prompt. attention of its N steps to the P vision tokens: topk (N, k,
    H, P), mean (N, P), max (N, P) and, on request, layers (N, L, H, P); empty if not measured."""

    text: str
    ids: list[int]
    prompt: str
    prompt_tokens: int
    ended: bool  # by an EOS token
    attention: dict[str, np.ndarray] = field(default_factory=dict)


class Ask(Protocol):
    """Asks some instances (rows) a prompt each, see Asker."""

    def __call__(
        self,
        rows: Sequence[int],
        texts: Sequence[str],
        tag: str,
        measure: bool = False,
        given: Sequence[str | Sequence[int]] | None = None,
        drafts: Sequence[Sequence[int]] | None = None,
    ) -> list[Answer]: ...


class Asker:
    """Asks about the pictures of one batch, see SharedPicture; the first prompts are about all."""

    def __init__(
        self, args: Settings, vlm: VLM, samples: Sequence[Sample], images: Sequence[Image]
    ) -> None:
        self.args = args
        self.vlm = vlm
        self.samples = samples
        self.images = images
        # both of the first prompts
        self.shared: SharedPicture | None = None
        self.grids: list[PatchGrid | None] = []

    def __call__(
        self,
        rows: Sequence[int],
        texts: Sequence[str],
        tag: str,
        measure: bool = False,
        given: Sequence[str | Sequence[int]] | None = None,
        drafts: Sequence[Sequence[int]] | None = None,
    ) -> list[Answer]:
        """Answers of some instances (rows) to a prompt each, with the attention of their steps
        where `measure` is set. given: what is read as answers by teacher forcing; drafts: ids of
        answers that are likely, see generate()."""
        args = self.args
        vlm = self.vlm
        samples = [
            Sample(f"{self.samples[row].id}|{tag}", AT_HAND, text)
            for row, text in zip(rows, texts, strict=True)
        ]
        batch = vlm.encode(samples, [self.images[row] for row in rows])
        is_first = self.shared is None
        if self.shared is None:
            self.shared = SharedPicture(vlm, batch)
            self.grids = batch.grids
        batch, inputs = self.shared.ask(batch, rows)
        forced = None
        if given is not None:
            forced = [
                answer_ids(vlm, prompt, text)
                for prompt, text in zip(batch.prompts, given, strict=True)
            ]
        probe = ImageAttention(batch, args.hidden_top_k, args.full_tensors) if measure else None
        with capture(vlm, [probe] if probe else []):
            generation = generate(
                vlm,
                batch,
                args.max_new_tokens,
                args.sample and tag != "decide",
                args.temperature,
                seed=args.seed,
                answers=forced,
                drafts=drafts,
                **inputs,
            )
        if is_first:
            self.shared.keep(generation.cache)
        return [self._answer(batch, row, generation, probe) for row in range(len(rows))]

    def _answer(
        self, batch: Batch, row: int, generation: Generation, probe: ImageAttention | None
    ) -> Answer:
        """The answer of one row of a batch, its attention from the device once."""
        ids = generation.ids[row]
        answer = Answer(
            text=self.vlm.text(ids),
            ids=ids,
            prompt=batch.prompts[row],
            prompt_tokens=batch.lengths[row],
            ended=ids[-1] in self.vlm.eos_ids,
        )
        if probe is None:
            return answer
        patches = len(batch.vision_positions(row))

        def over_steps(per_step: Sequence[Tensor], axis: int) -> Float[np.ndarray, "N ... P"]:
            """This row, along `axis`, of the steps that its answer has."""
            of_row = [step.select(axis, row) for step in per_step[: len(ids)]]
            return torch.stack(of_row)[..., :patches].cpu().numpy()

        answer.attention = {
            "topk": over_steps(probe.topk, 1),
            "mean": over_steps(probe.mean, 0),
            "max": over_steps(probe.largest, 0),
        }
        if probe.whole:
            answer.attention["layers"] = over_steps(probe.layers, 1)
        return answer


@dataclass
class Talk:
    """The loop of one instance. feedback, revision: those of the last accepted revision, of the
    last one where none was accepted."""

    initial: Answer
    current: str
    outputs: list[str]  # the initial answer and the accepted revisions
    feedback: Answer | None = None
    revision: Answer | None = None
    feedbacks: list[str] = field(default_factory=list)
    revisions: list[str] = field(default_factory=list)
    decisions: list[Record] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)  # iterations
    stop_iter: int = 0

    @property
    def current_ids(self) -> list[int]:
        """Ids of the current answer."""
        return self.revision.ids if self.accepted and self.revision else self.initial.ids

    def take(self, iteration: int, critique: Answer, revision: Answer, decided: Fields) -> None:
        """Write down one iteration and what was decided in it."""
        self.feedbacks.append(critique.text)
        self.revisions.append(revision.text)
        self.decisions.append(dict(decided))
        self.stop_iter = iteration
        is_accepted = decided["choice"] == "revision"
        if is_accepted or not self.accepted:
            self.feedback = critique
            self.revision = revision
        if is_accepted:
            self.current = revision.text
            self.outputs.append(revision.text)
            self.accepted.append(iteration)


def converse(args: Settings, ask: Ask, samples: Sequence[Sample]) -> list[Talk]:
    """The loop for all instances of a batch at once, from the initial answer that all of them are
    given or none."""
    rows = list(range(len(samples)))
    questions = [sample.question for sample in samples]
    given = [sample.given for sample in samples if sample.given is not None]
    talks = [
        Talk(answer, answer.text, [answer.text])
        for answer in ask(rows, questions, "initial", True, given or None)
    ]
    # an unparsed decision is asked for again where the next iteration can differ from this one
    ask_again = args.sample or args.order == "random"
    for iteration in range(1, args.max_iterations + 1):
        texts = [
            critique_prompt(questions[row], talks[row].current, args.engineered_prompt)
            for row in rows
        ]
        # a critique is likely to be the last one again, a revision what it revises
        last = [talks[row].feedback for row in rows]
        drafts = [[] if critique is None else critique.ids for critique in last]
        critiques = ask(rows, texts, f"feedback-{iteration}", True, drafts=drafts)
        texts = [
            revise_prompt(questions[row], talks[row].current, critique.text, args.engineered_prompt)
            for row, critique in zip(rows, critiques, strict=True)
        ]
        drafts = [talks[row].current_ids for row in rows]
        revisions = ask(rows, texts, f"revision-{iteration}", True, drafts=drafts)
        orders = [
            order_of(args.seed, samples[row].id, iteration, args.order == "random") for row in rows
        ]
        texts = []
        for row, revision, order in zip(rows, revisions, orders, strict=True):
            options = {"current": talks[row].current, "revision": revision.text}
            texts.append(decide_prompt(questions[row], *(options[name] for name in order)))
        decisions = [
            _decided(args, answer.text, order)
            for answer, order in zip(ask(rows, texts, "decide"), orders, strict=True)
        ]
        for row, critique, revision, decided in zip(
            rows, critiques, revisions, decisions, strict=True
        ):
            talks[row].take(iteration, critique, revision, decided)
        go_on = {"revision", "unparsed"} if ask_again else {"revision"}
        rows = [
            row for row, decided in zip(rows, decisions, strict=True) if decided["choice"] in go_on
        ]
        if not rows:
            break
    return talks


def _decided(args: Settings, text: str, order: tuple[str, str]) -> Record:
    """What an answer to the decide prompt says. order: what A and B stood for."""
    letter = decision_published(text) if args.paper_compat else chosen(text)
    choice = "unparsed" if letter is None else order["AB".index(letter)]
    return {"answer": text, "letter": letter, "order": list(order), "choice": choice}

"""The critique - revise - decide loop of a batch of pictures, with the attention of each answer's
steps to its picture. Volcano (arXiv 2311.07362), algorithm 1; sections 2 to 4 of our study. What a
decision means is in protocol.py, the prompts in vlmdiag/scenes/questions.py.
"""

from types import SimpleNamespace

import torch

from vlmdiag.model.attention import capture
from vlmdiag.model.decoding import answer_ids, generate
from vlmdiag.model.prefix import first_positions, padded_after, shared_start
from vlmdiag.model.probes import ImageAttention
from vlmdiag.model.vision import embeddings
from vlmdiag.pictures.samples import Sample
from vlmdiag.scenes.questions import critique_prompt, decide_prompt, revise_prompt
from vlmdiag.volcano.protocol import decision, decision_published, order_of


class Asker:
    """Asks the pictures of one batch, the vision tower once and the keys and values of system
    prompt and picture shared by all prompts about a picture."""

    def __init__(self, args, vlm, samples, images):
        self.args, self.vlm, self.samples, self.images = args, vlm, samples, images
        self.features, self.start, self.cache, self.prefix = None, 0, None, None

    def __call__(self, rows, texts, tag, measure=False, given=None):
        """[answer, ...] of some instances (rows) to a prompt each: text, ids, prompt, and with
        `measure` the attention of its steps."""
        args, vlm = self.args, self.vlm
        samples = [
            Sample(f"{self.samples[row].id}|{tag}", None, text)
            for row, text in zip(rows, texts, strict=True)
        ]
        batch = vlm.encode(samples, [self.images[row] for row in rows])
        if self.features is None:
            self.grids = batch.grids
        if (
            self.features is None or vlm.family.read_text
        ):  # a connector that reads the question gives each its own features
            self.features = dict(zip(rows, vlm.vision(batch).pooler_output, strict=True))
        start = shared_start([batch])
        batch = padded_after(batch, start) if start else batch
        chosen = torch.tensor(rows, device=vlm.device)
        cache = None
        if (
            self.cache is not None
            and start == self.start
            and torch.equal(batch.input_ids[:, :start], self.prefix[chosen])
        ):
            cache = first_positions(vlm, self.cache, start, rows=chosen)
        if vlm.family.deepstack:
            inputs = {"features": vlm.vision(batch)}
        else:
            inputs = {
                "embeds": embeddings(
                    vlm, batch, SimpleNamespace(pooler_output=[self.features[row] for row in rows])
                ),
                "cache": cache,
            }
        answers = (
            None
            if given is None
            else [
                answer_ids(vlm, prompt, text)
                for prompt, text in zip(batch.prompts, given, strict=True)
            ]
        )
        probe = ImageAttention(batch, args.hidden_top_k, args.full_tensors) if measure else None
        sampled = args.sample and tag != "decide"
        with capture(vlm, [probe] if probe else []):
            found = generate(
                vlm,
                batch,
                args.max_new_tokens,
                sampled,
                args.temperature,
                seed=args.seed,
                answers=answers,
                **inputs,
            )
        if self.cache is None and start and len(rows) == len(self.samples):
            self.cache, self.start, self.prefix = (
                first_positions(vlm, found.cache, start),
                start,
                batch.input_ids[:, :start],
            )
        return [self.answer(row, k, batch, found, probe) for k, row in enumerate(rows)]

    def answer(self, row, k, batch, found, probe):
        """What one instance said. attention: {name: array over its steps}, from the device once per
        answer."""
        vlm, ids = self.vlm, found.ids[k]
        answer = SimpleNamespace(
            ids=ids,
            prompt=batch.prompts[k],
            prompt_tokens=batch.lengths[k],
            ended=ids[-1] in vlm.eos_ids,
            attention={},
        )
        answer.text = vlm.text(ids)
        if probe is not None:
            steps, count = len(ids), len(self.features[row])
            stack = lambda parts, axis: (
                torch.stack([part.select(axis, k) for part in parts[:steps]])[..., :count]
                .cpu()
                .numpy()
            )
            answer.attention = {
                "topk": stack(probe.topk, 1),
                "mean": stack(probe.mean, 0),
                "max": stack(probe.largest, 0),
            }
            if probe.whole:
                answer.attention["layers"] = stack(probe.layers, 1)
        return answer


def converse(args, ask, samples, given):
    """The loop for all instances of a batch at once. [{initial, feedback, revision: answers or
    None, outputs, ...}, ...]"""
    rows = list(range(len(samples)))
    first = ask(
        rows,
        [sample.question for sample in samples],
        "initial",
        True,
        None if given is None else [given[sample.id] for sample in samples],
    )
    talks = [
        SimpleNamespace(
            initial=answer,
            feedback=None,
            revision=None,
            current=answer.text,
            outputs=[answer.text],
            feedbacks=[],
            revisions=[],
            decisions=[],
            accepted=[],
            stop_iter=0,
        )
        for answer in first
    ]
    going = rows
    for iteration in range(1, args.max_iterations + 1):
        texts = [
            critique_prompt(samples[row].question, talks[row].current, args.engineered_prompt)
            for row in going
        ]
        critiques = ask(going, texts, f"feedback-{iteration}", True)
        pairs = list(zip(going, critiques, strict=True))
        texts = [
            revise_prompt(
                samples[row].question, talks[row].current, critique.text, args.engineered_prompt
            )
            for row, critique in pairs
        ]
        revisions = ask(going, texts, f"revision-{iteration}", True)
        orders = [
            order_of(args.seed, samples[row].id, iteration, args.order == "random") for row in going
        ]
        options = [
            [{"current": talks[row].current, "revision": revision.text}[name] for name in order]
            for row, revision, order in zip(going, revisions, orders, strict=True)
        ]
        decided = ask(
            going,
            [
                decide_prompt(samples[row].question, *two)
                for row, two in zip(going, options, strict=True)
            ],
            "decide",
        )
        still = []
        for row, critique, revision, order, answer in zip(
            going, critiques, revisions, orders, decided, strict=True
        ):
            talk = talks[row]
            letter = (decision_published if args.paper_compat else decision)(answer.text)
            choice = None if letter is None else order["AB".index(letter)]
            talk.feedbacks.append(critique.text)
            talk.revisions.append(revision.text)
            talk.decisions.append(
                {
                    "answer": answer.text,
                    "letter": letter,
                    "order": list(order),
                    "choice": choice or "unparsed",
                }
            )
            talk.stop_iter = iteration
            if (
                choice == "revision" or not talk.accepted
            ):  # the last accepted ones, or the last ones where none was
                talk.feedback, talk.revision = critique, revision
            if choice == "revision":
                talk.current = revision.text
                talk.outputs.append(revision.text)
                talk.accepted.append(iteration)
            if choice == "revision" or (choice is None and (args.sample or args.order == "random")):
                still.append(
                    row
                )  # unparsed and all else equal, the next iteration would be the same again
        going = still
        if not going:
            break
    return talks

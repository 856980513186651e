"""Hidden states of swapped questions at the last prompt token, and the answers. Section 8 of our
study: pictures go through the vision tower once, all prompts about one share the keys and values of
their beginning, and one transfer a batch takes the states into a memory-mapped array.
"""

import math
import os
import platform
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import torch

from vlmdiag.groups import PAD, VISION
from vlmdiag.model.attention import capture
from vlmdiag.model.decoding import answer_ids, generate
from vlmdiag.model.prefix import first_positions
from vlmdiag.model.probes import LastStates
from vlmdiag.model.vision import embeddings, more_inputs
from vlmdiag.pictures.samples import Sample
from vlmdiag.swap.pairs import OPPOSITE, SPELLED, picture_at, read_answer, spellings

SENTENCE_END = re.compile(r"(?<!\d)[.!?。！？]|\n")


def open_states(path, shape, dtype):
    """A memory-mapped array of a shape (n, prompts, layers, d), made on disk where it is not there
    yet; ValueError for another shape. It appears at once and whole: a process killed meanwhile
    leaves none, and shards that begin together use the same one.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(
            f".{path.name}.{platform.node().split('.')[0] or 'host'}.{os.getpid()}-0.tmp"
        )  # a name that rundirs sweeps
        np.lib.format.open_memmap(temporary, mode="w+", shape=tuple(shape), dtype=dtype).flush()
        try:
            os.link(temporary, path)
        except FileExistsError:  # another shard's
            pass
        except OSError:  # a file system without hard links
            os.replace(temporary, path)
        temporary.unlink(missing_ok=True)
    states = np.lib.format.open_memmap(path, mode="r+")
    if states.shape != tuple(shape) or states.dtype != np.dtype(dtype):
        raise ValueError(
            f"{path} has shape {states.shape} and {states.dtype}, wanted {tuple(shape)} and {dtype}"
        )
    return states


# --- answers --------------------------------------------------------------------------------------


def is_decided(text, category, letters=None):
    """Whether an unfinished answer need not go on, because what read_answer says of it will stand.

    True once a sentence ends with an answer word in it that is not negated, once the answer is a
    tie, and once it begins with a letter that what follows has closed, '(A' not, 'A)' yes. Until
    then more words could change the reading: 'left' may become 'leftmost' or 'left or right', 'not
    left' may become 'not left nor right'; a tie stays one whatever follows. Past the end of that
    sentence a reading could only become a tie, by a further sentence that names the other word
    beside an 'or': an answer is read up to the sentence that decides."""
    until = (
        read_answer(text[: end.end()], category, letters) for end in SENTENCE_END.finditer(text)
    )
    if any(said is not None and note != "negated" for said, note in until):
        return True
    complete = re.sub(r"[\w\ufffd]+$", "", text)  # without a last word, which may grow
    return (
        read_answer(complete, category)[1] == "tie"
        or read_answer(f"{text} x", category, letters)[1] == "letter"
    )


# --- prompts --------------------------------------------------------------------------------------


def after_picture(batch, at_least=0):
    """(batch, start): every prompt laid out so that its picture ends at position `start`, with
    padding before its beginning and before its rest. Positions and masks say where each token
    stands, so nothing else changes."""
    width, device = batch.groups.shape[1], batch.groups.device
    ends = ((batch.groups == VISION) * torch.arange(1, width + 1, device=device)).amax(1)
    begins = width - torch.tensor(batch.lengths, device=device)
    start, rest = max(at_least, int((ends - begins).max())), int((width - ends).max())
    place = torch.arange(start + rest, device=device)
    source = torch.where(place < start, ends[:, None] - start + place, width - rest - start + place)
    real = torch.where(place < start, source >= begins[:, None], source >= ends[:, None])
    source = source.clamp(min=0)
    moved = {
        name: getattr(batch, name).gather(1, source)
        for name in ("input_ids", "attention_mask", "groups")
    }
    moved |= {
        "attention_mask": moved["attention_mask"] * real,
        "groups": moved["groups"].masked_fill(~real, PAD),
    }
    positions = (
        source
        if batch.position_ids.ndim == 2
        else source[None].expand(len(batch.position_ids), -1, -1)
    )
    return replace(batch, **moved, position_ids=batch.position_ids.gather(-1, positions)), start


class Prompts:
    """Asks questions about the pictures of a batch. A picture goes through the tower once; in a
    causal family, the keys and values of what all prompts about a picture begin with are computed
    once, and the questions then run as rows of one pass. In another family each question is a pass
    over whole prompts.
    """

    def __init__(self, vlm, images, layers):
        self.vlm, self.images, self.layers = vlm, images, layers
        self.features, self.cache, self.start, self.begin, self.pictures = {}, None, 0, None, None

    def __call__(self, rows, questions, limit, pairs=None):
        """Ask several questions about each of some pictures; in the first call, about all. rows: n
        places in the batch; questions: q tuples of n texts; limit: most tokens of an answer; pairs
        (n): what the answers are about, where they have more than one. Returns states (q, n,
        layers, d), and q lists of n (text, log-probabilities of the first step (V,), prompt)."""
        rounds = [
            [*zip(rows, texts, pairs or [None] * len(rows), strict=True)] for texts in questions
        ]
        if "causal" in self.vlm.family.has:
            states, said = self._ask(sum(rounds, []), limit)
        else:
            parts = [self._ask(one, limit) for one in rounds]
            states, said = (
                torch.cat([states for states, _ in parts]),
                sum((said for _, said in parts), []),
            )
        return states.unflatten(0, (len(rounds), len(rows))), [
            said[k : k + len(rows)] for k in range(0, len(said), len(rows))
        ]

    def _ask(self, asked, limit):
        vlm, (rows, questions, pairs) = self.vlm, zip(*asked, strict=True)
        batch = vlm.encode(
            [
                Sample(str(row), None, question)
                for row, question in zip(rows, questions, strict=True)
            ],
            [self.images[row] for row in rows],
        )
        batch, inputs = self._inputs(batch, list(rows))

        def stop(ids):
            texts = [vlm.text(own) for own in ids]
            return [
                is_decided(text, pair["category"], pair.get("letters"))
                for text, pair in zip(texts, pairs, strict=True)
            ]

        with capture(vlm, [probe := LastStates(self.layers)]):
            found = generate(vlm, batch, limit, stop=stop if limit > 1 else None, **inputs)
        texts = [vlm.text(ids) for ids in found.ids]
        return probe.states, [*zip(texts, found.first, batch.prompts, strict=True)]

    def _inputs(self, batch, rows):
        """(batch, what generate() needs beside it)."""
        vlm = self.vlm
        if "causal" not in vlm.family.has:
            if self.pictures != batch.pictures:
                self.pictures, self.features = batch.pictures, vlm.vision(batch)
            return batch, {"features": self.features}
        batch, start = after_picture(batch, self.start)
        if not self.features.keys() >= set(
            batch.pictures
        ):  # a connector that reads the question makes features of its own for each
            self.features |= dict(zip(batch.pictures, vlm.vision(batch).pooler_output, strict=True))
        embeds = embeddings(
            vlm,
            batch,
            SimpleNamespace(pooler_output=[self.features[picture] for picture in batch.pictures]),
        )
        begin, places = (
            (batch.input_ids * batch.attention_mask)[:, :start],
            torch.tensor(rows, device=vlm.device),
        )
        if first_call := self.begin is None:
            first = [rows.index(row) for row in range(len(self.images))]
            self.start, self.begin, self.pictures = (
                start,
                begin[first],
                [batch.pictures[k] for k in first],
            )
        shared = (
            start == self.start
            and torch.equal(begin, self.begin[places])
            and batch.pictures == [self.pictures[row] for row in rows]
        )
        if first_call and shared:
            more = {name: value[first, :start] for name, value in more_inputs(vlm, batch).items()}
            self.cache = vlm.parts.decoder(
                inputs_embeds=embeds[first, :start],
                attention_mask=batch.attention_mask[first, :start],
                position_ids=batch.position_ids[..., first, :start],
                use_cache=True,
                **more,
            ).past_key_values
        cache = (
            first_positions(vlm, self.cache, start, rows=places)
            if shared and self.cache is not None
            else None
        )
        return batch, {"embeds": embeds, "cache": cache}


# --- the batch ------------------------------------------------------------------------------------


def make_process(vlm, layers, states, quad_states, quad_of, max_new_tokens):
    """process([(item, picture), ...]) -> [(record, {}), ...]; writes the states of item.row, and of
    its quad, before the record is committed."""

    @torch.inference_mode()
    def process(loaded):
        items, images = zip(*loaded, strict=True)
        ask, rows, pairs = (
            Prompts(vlm, images, layers),
            list(range(len(items))),
            [item.pair for item in items],
        )
        found, said = ask(rows, questions_of(pairs), max_new_tokens, pairs)
        quads = [(row, quad_of[item.id]) for row, item in enumerate(items) if item.id in quad_of]
        if quads:
            others, _ = ask([row for row, _ in quads], questions_of([quad for _, quad in quads]), 1)
            found = torch.cat([found, others], 1)
        kept = on_cpu(found, states.dtype)  # (2, pairs, then quads, layers, d)
        for row, item in enumerate(items):
            states[item.row] = kept[:, row]
        for k, (row, quad) in enumerate(quads, len(items)):
            quad_states[quad["row"], :2], quad_states[quad["row"], 2:] = kept[:, k], kept[:, row]
        for part in (states, quad_states):
            if part is not None:
                part.flush()
        gaps = margins(vlm, pairs, said)
        return [
            (record(pair, [one[row] for one in said], gaps[row]), {})
            for row, pair in enumerate(pairs)
        ]

    return process


def questions_of(asked):
    """[first questions, second questions] of pairs or quads."""
    return [*zip(*(one["questions"] for one in asked), strict=True)]


def margins(vlm, pairs, said):
    """[(original, swapped), ...]: log-probability of all spellings of the right word at the first
    step, minus that of the opposite's. said: of Prompts."""
    known, gaps = {}, []

    def mass(forms, first, prompt):
        key = (forms, prompt[-1])  # the first token after a prompt depends on nothing else of it
        if key not in known:
            known[key] = torch.tensor(
                sorted({answer_ids(vlm, prompt, form)[0] for form in forms}), device=first.device
            )
        return first[known[key]].logsumexp(0)

    for pair, *both in zip(pairs, *said, strict=True):
        forms = spellings(pair)
        for want, (_, first, prompt) in zip(
            (pair["category"], OPPOSITE[pair["category"]]), both, strict=True
        ):
            gaps.append(
                mass(forms[want], first, prompt) - mass(forms[OPPOSITE[want]], first, prompt)
            )
    return torch.stack(gaps).view(-1, 2).tolist()


def record(pair, said, gaps):
    """What is kept of a pair beside its states. said: (text, ...) of its original and swapped
    question; gaps: their margins."""
    out, expected = {}, (pair["category"], OPPOSITE[pair["category"]])
    for name, want, (text, *_), margin in zip(("orig", "swap"), expected, said, gaps, strict=True):
        read, note = read_answer(text, pair["category"], pair.get("letters"))
        out |= {
            f"pred_{name}": text,
            f"read_{name}": read,
            f"note_{name}": note,
            f"is_correct_{name}": read == want,
        }
        out[f"margin_{name}"] = margin if math.isfinite(margin) else None
    facts = {
        name: pair[name]
        for name in ("index", "question_id", "image_id", "group", "category", "split")
    }
    return (
        facts
        | out
        | {
            "questions": pair["questions"],
            "answers": [SPELLED.get(word, word) for word in expected],
            "caption": out["pred_orig"],
        }
    )


def on_cpu(states, dtype):
    """States in one transfer, as an array of a dtype; ValueError where one does not fit into it."""
    kept = states.to(getattr(torch, str(dtype))).cpu().numpy()
    if not np.isfinite(kept).all():
        raise ValueError(
            f"hidden states are not finite as {dtype}; the largest is"
            f" {states.abs().max().item():.3g} (--state_dtype float32 holds more)"
        )
    return kept


def load_picture(path):
    """load(item) -> (item, picture) for a table."""
    return lambda item: (item, picture_at(path, item.pair["offset"]))

"""Hidden states of swapped questions at the last prompt token, and the answers.

Pictures go through the vision tower once, all prompts about one share the keys and values of their
beginning, and one transfer a batch takes the states to the CPU, into an array on disk:
docs/studies/swap_analysis.md, section 8.
"""

from __future__ import annotations

import io
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from vlmdiag.model.attention import capture
from vlmdiag.model.decoding import answer_ids, generate
from vlmdiag.model.prefix import SharedPicture
from vlmdiag.model.probes import LastStates
from vlmdiag.pictures.samples import AT_HAND, Sample
from vlmdiag.pictures.table import picture_at
from vlmdiag.runs.disk import BROKEN, cannot_write
from vlmdiag.swap.pairs import read_answer, spellings
from vlmdiag.swap.relations import OPPOSITE, SPELLED
from vlmdiag.types import Record

if TYPE_CHECKING:
    from jaxtyping import Float
    from PIL.Image import Image
    from torch import Tensor

    from vlmdiag.swap.pairs import Pair, Quad
    from vlmdiag.types import VLM

SENTENCE_END = re.compile(r"(?<!\d)[.!?。！？]|\n")


@dataclass(frozen=True)
class Item:
    """A pair as the engine takes it. row: its place in the states."""

    pair: Pair
    row: int

    @property
    def id(self) -> str:
        return str(self.pair["id"])

    @property
    def inputs(self) -> list[object]:
        """The questions, what is right, the picture's digest, and the place in the states."""
        names = ("questions", "category", "letters", "image_id")
        return [*(self.pair.get(name) for name in names), self.row]


class Said(NamedTuple):
    """An answer: its text, log-probabilities of the first step (V,), and the prompt it answers."""

    text: str
    first: Tensor
    prompt: str


class States:
    """The rows (prompts, L, d) of an NPY file that open_states() made, to be written one by one.

    Each row is written by itself and brought to the disk, so that processes on several machines may
    fill one file; a memory map would write whole pages, with what it knew of the rows beside.
    """

    def __init__(self, path: Path, dtype: str) -> None:
        self.path = path
        self.dtype = np.dtype(dtype)

    @cached_property
    def _file(self) -> tuple[int, int, tuple[int, ...]]:
        """Its descriptor, where its first row begins, and the shape of a row."""
        there = np.load(self.path, mmap_mode="r")
        # O_DSYNC: a network file system then writes these bytes alone, not the page around them
        flags = os.O_WRONLY | getattr(os, "O_DSYNC", 0) | getattr(os, "O_BINARY", 0)
        return os.open(self.path, flags), there.offset, there.shape[1:]

    def __setitem__(self, row: int, values: np.ndarray) -> None:
        """Write a row. UsageError where the disk is full."""
        try:
            descriptor, start, shape = self._file
            if values.shape != shape:
                raise ValueError(f"a row of {self.path} has shape {shape}, not {values.shape}")
            data = memoryview(values.astype(self.dtype, copy=False).tobytes())
            os.lseek(descriptor, start + row * len(data), os.SEEK_SET)
            while data:
                data = data[os.write(descriptor, data) :]
        except OSError as error:
            raise cannot_write(self.path, error) from error


def open_states(path: Path, shape: Sequence[int], dtype: str, done: int = 0) -> States:
    """The rows of an array of a shape (n, prompts, L, d), which is made where it is not there yet
    and no pair is done. ValueError for another shape, a file that was cut short, or one that is
    missing although so many pairs are done.

    Shards may begin together, and go on where one of them was killed: all write the same header at
    the same place and extend the file to the same size, which takes nothing from rows that are
    there.
    """
    states = States(path, dtype)
    beginning = io.BytesIO()
    facts = {"descr": np.lib.format.dtype_to_descr(states.dtype), "fortran_order": False}
    np.lib.format.write_array_header_1_0(beginning, facts | {"shape": tuple(shape)})
    header = beginning.getvalue()
    size = len(header) + math.prod(shape) * states.dtype.itemsize
    there = _beginning(path, len(header))
    if done and not there:
        raise ValueError(f"{path} is missing, which has the states of {done} finished pairs")
    if not done and header.startswith(there) and (not there or path.stat().st_size < size):
        _extend(path, header, size)
    try:
        found = np.load(path, mmap_mode="r")  # refuses a short file
    except BROKEN as error:
        raise ValueError(f"{path} cannot be read ({error})") from error
    if found.shape != tuple(shape) or found.dtype != states.dtype:
        raise ValueError(
            f"{path} has shape {found.shape} and {found.dtype}, wanted {tuple(shape)} and"
            f" {states.dtype}"
        )
    return states


def _extend(path: Path, header: bytes, size: int) -> None:
    """Make a file that begins with a header, or extend it to a size. UsageError where it cannot be
    written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
        try:
            os.write(descriptor, header)
            os.ftruncate(descriptor, size)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise cannot_write(path, error) from error


def _beginning(path: Path, count: int) -> bytes:
    """The first bytes of a file, none of one that is not there."""
    try:
        with open(path, "rb") as file:
            return file.read(count)
    except FileNotFoundError:
        return b""


# --- answers --------------------------------------------------------------------------------------


def is_decided(text: str, category: str, letters: Mapping[str, str] | None = None) -> bool:
    """Whether an unfinished answer need not go on, because what read_answer says of it will stand.

    True once a sentence ends with an answer word in it that is not negated, once the answer is a
    tie, and once it begins with a letter that what follows has closed, '(A' not, 'A)' yes. Until
    then more words could change the reading: 'left' may become 'leftmost' or 'left or right', 'not
    left' may become 'not left nor right'; a tie stays one whatever follows. Past the end of that
    sentence a reading could only become a tie, by a further sentence that names the other word
    beside an 'or': an answer is read up to the sentence that decides.
    """
    for end in SENTENCE_END.finditer(text):
        answer, note = read_answer(text[: end.end()], category, letters)
        if answer is not None and note != "negated":
            return True
    # without its last word, which may grow
    complete = re.sub(r"[\w\ufffd]+$", "", text)
    if read_answer(complete, category)[1] == "tie":
        return True
    return read_answer(f"{text} x", category, letters)[1] == "letter"


# --- prompts --------------------------------------------------------------------------------------


class Prompts:
    """Asks questions about the pictures of a batch, see SharedPicture."""

    def __init__(self, vlm: VLM, images: Sequence[Image], layers: Sequence[int]) -> None:
        self.vlm = vlm
        self.images = images
        self.layers = layers
        # made of the first call, which asks about all pictures
        self.shared: SharedPicture | None = None

    def __call__(
        self,
        rows: Sequence[int],
        questions: Sequence[Sequence[str]],
        limit: int,
        pairs: Sequence[Pair] | None = None,
    ) -> tuple[Float[Tensor, "q n L d"], list[list[Said]]]:
        """Ask several questions about each of some pictures; in the first call, about all.

        rows: n places in the batch; questions: q tuples of n texts; limit: most tokens of an
        answer; pairs (n): what the answers are about, where they have more than one token. Returns
        states and q lists of n answers.
        """
        about = [None] * len(rows) if pairs is None else pairs
        if "causal" in self.vlm.family.has:
            count = len(questions)
            texts = [text for texts_of_round in questions for text in texts_of_round]
            states, said = self._ask([*rows] * count, texts, limit, [*about] * count)
        else:
            # a pass over whole prompts for each of the questions
            rounds = [self._ask(rows, texts_of_round, limit, about) for texts_of_round in questions]
            states = torch.cat([states_of_round for states_of_round, _ in rounds])
            said = [answer for _, answers in rounds for answer in answers]
        size = len(rows)
        by_question = [said[at : at + size] for at in range(0, len(said), size)]
        return states.unflatten(0, (len(questions), size)), by_question

    def _ask(
        self,
        rows: Sequence[int],
        questions: Sequence[str],
        limit: int,
        pairs: Sequence[Pair | None],
    ) -> tuple[Float[Tensor, "m L d"], list[Said]]:
        """One pass: states and answers of m prompts."""
        vlm = self.vlm
        samples = [
            Sample(str(row), AT_HAND, text) for row, text in zip(rows, questions, strict=True)
        ]
        batch = vlm.encode(samples, [self.images[row] for row in rows])
        if self.shared is None:
            self.shared = SharedPicture(vlm, batch, rows)
        batch, inputs = self.shared.ask(batch, rows)

        def stop(ids: Sequence[Sequence[int]]) -> list[bool]:
            return [
                pair is not None
                and is_decided(vlm.text(answer), pair["category"], pair.get("letters"))
                for answer, pair in zip(ids, pairs, strict=True)
            ]

        probe = LastStates(self.layers)
        with capture(vlm, [probe]):
            answers = generate(vlm, batch, limit, stop=stop if limit > 1 else None, **inputs)
        texts = [vlm.text(ids) for ids in answers.ids]
        said = zip(texts, answers.first, batch.prompts, strict=True)
        return probe.states, [Said(*answer) for answer in said]


# --- the batch ------------------------------------------------------------------------------------


def make_process(
    vlm: VLM,
    layers: Sequence[int],
    states: States,
    quad_states: States | None,
    quad_of: Mapping[str, Quad],
    max_new_tokens: int,
) -> Callable[[Sequence[tuple[Item, Image]]], list[tuple[Record, Record]]]:
    """process([(item, picture), ...]) -> [(record, {}), ...]; writes the states of item.row, and of
    its quad, before the record is committed."""

    @torch.inference_mode()
    def process(loaded: Sequence[tuple[Item, Image]]) -> list[tuple[Record, Record]]:
        items, images = zip(*loaded, strict=True)
        pairs = [item.pair for item in items]
        ask = Prompts(vlm, images, layers)
        asked, said = ask(range(len(items)), questions_of(pairs), max_new_tokens, pairs)
        rows_with_quad = [row for row, item in enumerate(items) if item.id in quad_of]
        quads = [quad_of[items[row].id] for row in rows_with_quad]
        if quads:
            of_quads, _ = ask(rows_with_quad, questions_of(quads), 1)
            asked = torch.cat([asked, of_quads], 1)
        # (2, pairs, then quads, L, d)
        measured = on_cpu(asked, states.dtype)
        for row, item in enumerate(items):
            states[item.row] = measured[:, row]
        if quad_states is not None:
            for at, (row, quad) in enumerate(zip(rows_with_quad, quads), len(items)):
                quad_states[quad["row"]] = np.concatenate([measured[:, at], measured[:, row]])
        gaps = margins(vlm, pairs, said)
        return [
            (record(pair, [answers[row] for answers in said], gaps[row]), {})
            for row, pair in enumerate(pairs)
        ]

    return process


def questions_of(asked: Sequence[Pair] | Sequence[Quad]) -> list[tuple[str, ...]]:
    """[first questions, second questions] of pairs or quads."""
    return [*zip(*(pair["questions"] for pair in asked), strict=True)]


def margins(vlm: VLM, pairs: Sequence[Pair], said: Sequence[Sequence[Said]]) -> list[list[float]]:
    """[[original, swapped], ...]: log-probability of all spellings of the right word at the first
    step, minus that of the opposite's. said: of Prompts."""
    # the first token after a prompt depends on nothing else of it than its last character
    known: dict[tuple[tuple[str, ...], str], Tensor] = {}

    def mass(forms: tuple[str, ...], answer: Said) -> Tensor:
        key = (forms, answer.prompt[-1])
        if key not in known:
            ids = sorted({answer_ids(vlm, answer.prompt, form)[0] for form in forms})
            known[key] = torch.tensor(ids, device=answer.first.device)
        return answer.first[known[key]].logsumexp(0)

    gaps = []
    for pair, *both in zip(pairs, *said, strict=True):
        forms = spellings(pair)
        for right, answer in zip(expected_of(pair), both, strict=True):
            gaps.append(mass(forms[right], answer) - mass(forms[OPPOSITE[right]], answer))
    return torch.stack(gaps).view(-1, 2).tolist()


def expected_of(pair: Pair) -> tuple[str, str]:
    """The categories that answer the original and the swapped question."""
    return pair["category"], OPPOSITE[pair["category"]]


def record(pair: Pair, said: Sequence[Said], gaps: Sequence[float]) -> Record:
    """What is kept of a pair beside its states. said: of its original and swapped question; gaps:
    their margins."""
    kept: Record = {
        "index": pair["index"],
        "question_id": pair["question_id"],
        "image_id": pair["image_id"],
        "group": pair["group"],
        "category": pair["category"],
        "split": pair["split"],
    }
    expected = expected_of(pair)
    for order, right, answer, gap in zip(("orig", "swap"), expected, said, gaps, strict=True):
        category, note = read_answer(answer.text, pair["category"], pair.get("letters"))
        kept[f"pred_{order}"] = answer.text
        kept[f"read_{order}"] = category
        kept[f"note_{order}"] = note
        kept[f"is_correct_{order}"] = category == right
        kept[f"margin_{order}"] = gap if math.isfinite(gap) else None
    kept["questions"] = pair["questions"]
    kept["answers"] = [SPELLED.get(word, word) for word in expected]
    kept["caption"] = kept["pred_orig"]
    return kept


def on_cpu(states: Tensor, dtype: np.dtype) -> np.ndarray:
    """States in one transfer, as an array of a dtype; ValueError where one does not fit into it."""
    array = states.to(getattr(torch, str(dtype))).cpu().numpy()
    if not np.isfinite(array).all():
        raise ValueError(
            f"hidden states are not finite as {dtype}; the largest is"
            f" {states.abs().max().item():.3g} (--state_dtype float32 holds more)"
        )
    return array


def load_picture(path: str) -> Callable[[Item], tuple[Item, Image]]:
    """load(item) -> (item, picture) for a table."""

    def load(item: Item) -> tuple[Item, Image]:
        return item, picture_at(path, item.pair["offset"])

    return load

"""SpatialTunnel: does a model tell depth from height in the picture? Scores of the four yes/no
questions about each picture, and their summary over a run.

    p = sigmoid(logit Yes - logit No) at the first generated position
    v = p where Yes is right and 1 - p where No is, averaged over the four questions
    gap = v_consistent - v_counter

Why Far Looks Up (arXiv 2605.30161), appendix C; docs/studies/swap_analysis.md, section 7. Used by
swap_analysis/spatial_tunnel.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from vlmdiag.cli import UsageError
from vlmdiag.figures import stats
from vlmdiag.model.decoding import answer_ids
from vlmdiag.model.prefix import SharedPicture
from vlmdiag.model.vision import prefill
from vlmdiag.pictures.samples import AT_HAND, Sample
from vlmdiag.scenes.tunnel import ANGLES, SIZES, WORDINGS
from vlmdiag.swap.relations import SPLITS
from vlmdiag.types import Record

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from PIL.Image import Image
    from torch import Tensor
    from transformers.utils import ModelOutput

    from vlmdiag.batch import Batch
    from vlmdiag.types import VLM

AnswerIds = dict[str, list[int]]  # {"Yes": ids, "No": ids}


@dataclass(frozen=True)
class Item:
    """A picture as the engine takes it. entry: its part of tunnel.json."""

    id: str
    image: Path
    entry: Record


# --- the model ------------------------------------------------------------------------------------


def yes_no_ids(vlm: VLM, prompt: str) -> AnswerIds:
    """The first token of each word as it can be spelled after the prompt, with a space before it
    and without. UsageError where the two words begin with the same token."""

    def tokenized(text: str) -> list[int]:
        return list(vlm.tokenizer(text, add_special_tokens=False)["input_ids"])

    lead = tokenized(prompt[-1])
    first_ids = {}
    for word in ("Yes", "No"):
        ids_of_word = {answer_ids(vlm, prompt, word)[0]}
        for space in ("", " "):
            ids = tokenized(f"{prompt[-1]}{space}{word}")
            if ids[: len(lead)] == lead and len(ids) > len(lead):
                ids_of_word.add(ids[len(lead)])
        first_ids[word] = ids_of_word
    # a bare space, which begins both words, says neither
    both = first_ids["Yes"] & first_ids["No"]
    if first_ids["Yes"] <= both or first_ids["No"] <= both:
        raise UsageError(
            f"{vlm.path}: Yes and No begin with the same token after its prompt, so their first"
            " tokens cannot be compared"
        )
    return {word: sorted(ids - both) for word, ids in first_ids.items()}


@torch.inference_mode()
def first_logits(
    vlm: VLM, images: Sequence[Image], questions: Sequence[Sequence[str]]
) -> Float[Tensor, "B Q V"]:
    """Logits of the first generated position, float32. images: B pictures; questions: B lists of Q
    texts.

    The tower runs once a picture. The first question's pass leaves the keys and values of the
    prompt up to the end of the picture, from which the others go on, all in one pass; in a family
    that is not known to be causal each question is a pass over whole prompts.
    """
    rows = range(len(images))
    numbers = range(len(questions[0]))

    def encoded(asked: Sequence[tuple[int, int]]) -> Batch:
        """A batch of (picture, question) numbers."""
        samples = [
            Sample(f"{row}-{number}", AT_HAND, questions[row][number]) for row, number in asked
        ]
        return vlm.encode(samples, [images[row] for row, _ in asked])

    def passed(batch: Batch, pictures: Sequence[int]) -> ModelOutput:
        batch, inputs = shared.ask(batch, pictures)
        return prefill(vlm, batch, **inputs)

    first = encoded([(row, 0) for row in rows])
    shared = SharedPicture(vlm, first)
    output = passed(first, rows)
    shared.keep(output.past_key_values)
    logits = [output.logits[:, -1:].float()]
    if shared.is_causal:
        others = [(row, number) for row in rows for number in numbers[1:]]
        output = passed(encoded(others), [row for row, _ in others])
        logits.append(output.logits[:, -1].float().unflatten(0, (len(rows), -1)))
    else:
        for number in numbers[1:]:
            output = passed(encoded([(row, number) for row in rows]), rows)
            logits.append(output.logits[:, -1:].float())
    return torch.cat(logits, 1)


def make_process(
    vlm: VLM, words: AnswerIds
) -> Callable[[Sequence[tuple[Item, Image]]], list[tuple[Record, Record]]]:
    """process([(item, picture), ...]) -> [(record, {}), ...]. words: of yes_no_ids()."""

    def process(loaded: Sequence[tuple[Item, Image]]) -> list[tuple[Record, Record]]:
        items, images = zip(*loaded, strict=True)
        questions = [[asked["question"] for asked in item.entry["questions"]] for item in items]
        logits = first_logits(vlm, images, questions)
        yes = logits[..., words["Yes"]].logsumexp(-1)
        no = logits[..., words["No"]].logsumexp(-1)
        margins = (yes - no).cpu().double().tolist()
        tops = logits.argmax(-1).cpu().tolist()
        return [
            (score(item.entry, margin, top), {})
            for item, margin, top in zip(items, margins, tops, strict=True)
        ]

    def word_of(token: int) -> str:
        """Yes or No, else the token as it is."""
        for word, ids in words.items():
            if token in ids:
                return word
        return str(vlm.tokenizer.decode([token]))

    def score(entry: Record, margins: Sequence[float], tops: Sequence[int]) -> Record:
        """An item's record. p (4,), v its mean share of the right answer; said: the first token of
        a greedy answer."""
        answers = [asked["answer"] for asked in entry["questions"]]
        p = [1 / (1 + np.exp(-margin)) for margin in np.clip(margins, -700, 700)]
        shares = [
            value if answer == "Yes" else 1 - value
            for value, answer in zip(p, answers, strict=True)
        ]
        names = ("image_id", "image", "part", "instance", "cell", "split")
        record = {name: entry[name] for name in names}
        return record | {
            "s1": entry["far"]["size"],
            "s2": entry["near"]["size"],
            "questions": [asked["question"] for asked in entry["questions"]],
            "answers": answers,
            "margin": margins,
            "p": p,
            "v_each": shares,
            "v": float(np.mean(shares)),
            "said": [word_of(token) for token in tops],
        }

    return process


# --- the summary ----------------------------------------------------------------------------------


def per_question(records: Sequence[Record]) -> dict[str, Float[np.ndarray, "n 4"]]:
    """Measures of each question.

    v: share of the right answer; accuracy: whether it is over a half; exact_match: whether the most
    probable of all tokens is the right word's; said_yes_or_no: whether it is one of the two. NaN
    where the model gave no number.
    """
    shape = (len(records), len(WORDINGS))
    v = np.full(shape, np.nan)
    exact_match = np.zeros(shape)
    said_yes_or_no = np.zeros(shape)
    for row, record in enumerate(records):
        v[row] = [np.nan if value is None else value for value in record["v_each"]]
        said_and_right = zip(record["said"], record["answers"], strict=True)
        exact_match[row] = [said == answer for said, answer in said_and_right]
        said_yes_or_no[row] = [said in ("Yes", "No") for said in record["said"]]
    return {
        "v": v,
        "accuracy": np.where(np.isnan(v), np.nan, v > 0.5),
        "exact_match": exact_match,
        "said_yes_or_no": said_yes_or_no,
    }


def as_json(interval: stats.Interval) -> Record:
    """An interval as JSON holds it."""
    return {name: np.asarray(value).tolist() for name, value in interval._asdict().items()}


def share_interval(values: Float[np.ndarray, "n ..."]) -> stats.Interval:
    """Mean of shares, of which many may be all right or nearly so, with its interval."""
    return stats.mean_interval(values, bounds=stats.SHARES, discrete=True)


def gap_of(high: Float[np.ndarray, " n"], low: Float[np.ndarray, " m"]) -> Record:
    """Difference of the mean shares of two groups of pictures and its interval. n: of both."""
    of_groups = [share_interval(group) for group in (high, low)]
    gap = as_json(stats.difference_of(*of_groups))
    return gap | {"n": [int(interval.n) for interval in of_groups]}


def grid_of(
    records: Sequence[Record], values: Float[np.ndarray, " n"]
) -> Float[np.ndarray, "i far near"]:
    """Values of pictures by instance and angles (16, 16), rows: the far object's angle; NaN where a
    cell has no picture."""
    grid = np.full((_count_of_instances(records), ANGLES, ANGLES), np.nan)
    for record, value in zip(records, values, strict=True):
        far, near = record["cell"]
        grid[record["instance"], far, near] = value
    return grid


def _count_of_instances(records: Sequence[Record]) -> int:
    return int(max((record["instance"] for record in records), default=-1)) + 1


def _by_size(sweep: Sequence[Record]) -> Float[np.ndarray, "i s"]:
    """v of the sweep's pictures by scene and size of the far object."""
    column = {s1: n for n, (s1, _) in enumerate(SIZES)}
    by_size = np.full((_count_of_instances(sweep), len(SIZES)), np.nan)
    v = stats.measured_mean(per_question(sweep)["v"], 1)
    for record, value in zip(sweep, v, strict=True):
        by_size[record["instance"], column[record["s1"]]] = value
    return by_size


def summarize(records: Sequence[Record]) -> Record:
    """What analysis/summary.json says, from the records of a run: everything but "sizes" is about
    the grid of angles. Intervals: bootstrap over pictures, in the sweep over scenes."""
    grid = [record for record in records if record["part"] == "angles"]
    sweep = [record for record in records if record["part"] == "sizes"]
    split = np.array([record["split"] for record in grid])
    of_questions = per_question(grid)
    of_pictures = {name: stats.measured_mean(values, 1) for name, values in of_questions.items()}
    of_pictures["all_four_right"] = of_questions["exact_match"].all(1).astype(float)

    summary: Record = {}
    for name, values in of_pictures.items():
        summary[name] = as_json(share_interval(values))
        for kind in SPLITS:
            mine: Bool[np.ndarray, " n"] = split == kind
            summary[f"{name}_{kind}"] = as_json(share_interval(values[mine]))
    v = of_pictures["v"]
    summary["gap"] = gap_of(v[split == "consistent"], v[split == "counter"])
    summary["questions"] = {
        name: {"wording": list(WORDINGS)} | as_json(share_interval(values))
        for name, values in of_questions.items()
    }
    summary["cells"] = as_json(share_interval(grid_of(grid, v)))
    by_size = _by_size(sweep)
    summary["sizes"] = {
        "s1": [s1 for s1, _ in SIZES],
        "v": as_json(share_interval(stats.measured_mean(by_size, 1))),
        "v_by_s1": as_json(share_interval(by_size)),
    }
    return summary

"""Question lists -> Sample: the one format of all experiments, also as POPE, MMHal-Bench and VQA
name its fields (docs/data.md)."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeGuard
from urllib.parse import unquote, urlsplit

from vlmdiag.cli import CHAT_COMMANDS, UsageError
from vlmdiag.pictures.entries import Entry, checked_id, entries_of, read_list, text_id
from vlmdiag.pictures.samples import Sample, id_of
from vlmdiag.types import Fields, Record


def _without(entry: Entry, *names: str) -> Entry:
    return {name: value for name, value in entry.items() if name not in names}


# the fields of a question list, by whoever writes it: ours, POPE's, MMHal-Bench's, VQA's
_IMAGE = ("image", "image_src", "file_name")
_QUESTION = ("question", "text")
_ANSWER = ("answer", "label", "gold_answer", "gt_answer", "answers")


def read_curated(path: str | Path) -> dict[str, list[Entry]]:
    """{image id: [{"question", and if given "answer", "category"}, ...]} of a curated question file
    {"<image id>": [question or object, ...]} or of a question list, see read_questions(); images
    without a question are left out. UsageError: another form, no question at all."""
    content = read_list(path)
    by_image: dict[str, list[Entry]] = {}
    if isinstance(content, list):
        for sample in read_questions(path):
            entry = sample.extra | {"question": sample.question, "answer": sample.answer}
            by_image.setdefault(str(sample.extra["image_id"]), []).append(entry)
        return by_image
    if not isinstance(content, dict) or not all(isinstance(v, list) for v in content.values()):
        raise UsageError(f"{path}: an object of lists of questions by image id was wanted")
    for image_id, questions in content.items():
        for question in questions:
            entry = {"question": question} if isinstance(question, str) else question
            text = entry.get("question") if isinstance(entry, dict) else None
            if not isinstance(text, str) or not text.strip():
                raise UsageError(
                    f"{path}: image {image_id} has a question that is neither text nor an object"
                    " with 'question'"
                )
            answer = _answer(path, f"a question about image {image_id}", entry)
            by_image.setdefault(image_id, []).append(entry | {"answer": answer})
    if not by_image:
        raise UsageError(f"{path} has no question")
    return by_image


def read_questions(path: str | Path, image_dir: str | Path | None = None) -> list[Sample]:
    """Samples of a question list: JSON or JSON lines of {"image" or "image_id", "question",
    "answer"}. id: '<image id>-<n>', n counting the questions of an image from 0.

    Other names of these fields: image_src, file_name; text; label, gold_answer, gt_answer, answers.
    image: a path, relative to image_dir (default: the list's folder), of a URL its last part; with
    image_id alone it is <image_dir>/<12 digits>.jpg, COCO's naming. An answer true or false is Yes
    or No, and of a list of answers the one given most often counts; all are in extra's 'answers'.
    extra: image_id and every other field. UsageError names the entry that lacks a field.
    """
    folder = Path(image_dir) if image_dir is not None else Path(path).parent
    samples: list[Sample] = []
    count = _Counter()
    asked = list(_asked(path))
    names = [_picture_name(path, n, entry) for n, entry in enumerate(asked)]
    # pictures of several folders may have one name
    of_stem: dict[str, set[str]] = {}
    for named in filter(None, names):
        of_stem.setdefault(Path(named).stem, set()).add(named)
    for n, (entry, name) in enumerate(zip(asked, names, strict=True)):
        image_id = entry.get("image_id")
        if image_id in (None, ""):
            stem = Path(name or "").stem
            image_id = id_of(stem if len(of_stem.get(stem, ())) < 2 else str(name))
        image_id = checked_id(path, f"the image_id of entry {n},", image_id)
        id = text_id(image_id)
        extra: Record = {"image_id": image_id}
        extra |= _without(entry, "image_id", *_IMAGE, *_QUESTION, *_ANSWER)
        if isinstance(answers := _first_of(entry, _ANSWER), list):
            extra["answers"] = answers
        sample = Sample(
            f"{id}-{count.next(id)}",
            folder / (name or f"{id}.jpg"),
            _question(path, n, entry),
            _answer(path, f"entry {n}", entry),
            extra,
        )
        samples.append(sample)
    return samples


def read_mmhal(path: str | Path, image_root: str | Path | None = None) -> list[Sample]:
    """Samples of an MMHal-style list: image_id, image_src (a path or URL), question, gold_answer or
    gt_answer, or these fields' other names in a question list. id: the image id, '-<n>' after it
    from the second question about an image on.

    Nothing is downloaded: the picture of a URL is looked for under its last component in image_root
    (default: the list's folder), a relative path there as well. extra: image_id, image_src and
    every other field.
    """
    root = Path(image_root) if image_root is not None else Path(path).parent
    samples: list[Sample] = []
    count, used = _Counter(), set[str]()
    for entry, asked in zip(_asked(path), read_questions(path, root), strict=True):
        id = asked.id.rpartition("-")[0]
        n = count.next(id)
        name = f"{id}-{n}" if n else id
        while name in used:  # by an image whose id ends in -1
            name = f"{id}-{count.next(id)}"
        used.add(name)
        source = _first_of(entry, _IMAGE)
        if isinstance(source, list) or source is None:
            source = asked.image.name
        extra = _without(entry, *_QUESTION, *_ANSWER, *_IMAGE) | asked.extra
        extra["image_src"] = source
        samples.append(replace(asked, id=name, extra=extra))
    return samples


def _asked(path: str | Path) -> list[Entry]:
    """The entries of a question list, each with a picture and a question."""
    content = read_list(path)
    if isinstance(content, dict) and any(name in content for name in (*_QUESTION, "messages")):
        content = [content]  # JSON lines of one line
    chats = [e for e in content if isinstance(e, dict)] if isinstance(content, list) else []
    if any("messages" in entry or isinstance(entry.get("images"), list) for entry in chats):
        raise UsageError(
            f"{path} has prompts of several pictures or turns, which this command does not take:"
            f" --messages of {', '.join(CHAT_COMMANDS)} does"
        )
    form = None
    if isinstance(content, dict) and isinstance(content.get("questions"), list):
        form = "VQA's"
    elif isinstance(content, list) and content and isinstance(content[0], dict):
        form = "LLaVA's" if "conversations" in content[0] else None
    if form:
        raise UsageError(
            f"{path} is in {form} form; python data/convert_questions.py makes a question list of"
            " it"
        )
    return entries_of(path, content, [("image_id", *_IMAGE), _QUESTION])


def _first_of(entry: Fields, names: Sequence[str]) -> object:
    """The first of some fields that says something."""
    return next((entry[name] for name in names if entry.get(name) not in (None, "")), None)


def _question(path: str | Path, n: int, entry: Fields) -> str:
    """The text of an entry's question."""
    question = _first_of(entry, _QUESTION)
    if not isinstance(question, str) or not question.strip():
        what = "empty" if isinstance(question, str) else f"a {type(question).__name__}"
        raise UsageError(f"{path}: the question of entry {n} is {what}, a text was wanted")
    return question


def _picture_name(path: str | Path, n: int, entry: Fields) -> str | None:
    """The path of an entry's picture as it stands there, None where it has an image_id only."""
    name = _first_of(entry, _IMAGE)
    if isinstance(name, list) and len(name) == 1:
        name = name[0]
    if isinstance(name, list):
        raise UsageError(
            f"{path}: entry {n} has {len(name)} pictures, a question is about one; several in one"
            f" prompt: --messages of {', '.join(CHAT_COMMANDS)}"
        )
    if name is not None and not isinstance(name, str):
        raise UsageError(f"{path}: the image of entry {n} is a {type(name).__name__}, not a path")
    if name and name.startswith(("http://", "https://")):
        try:
            name = os.path.basename(urlsplit(name).path)
        except ValueError:  # no address at all
            name = name.rsplit("/", 1)[-1]
        return unquote(name)
    return name


class _Counter:
    """How often an id occurred before."""

    def __init__(self) -> None:
        self._seen: dict[str, int] = {}

    def next(self, id: str) -> int:
        """0 for the first time, then 1, 2, ..."""
        self._seen[id] = self._seen.get(id, -1) + 1
        return self._seen[id]


def _answer(path: str | Path, what: str, entry: Fields) -> str | None:
    """The answer of an entry as text, None where it has none."""
    value = next((entry[name] for name in _ANSWER if entry.get(name) is not None), None)
    try:
        return as_text(value)
    except TypeError as error:
        raise UsageError(f"{path}: the answer of {what} is {error}, not an answer") from error


def as_text(answer: object) -> str | None:
    """An answer of a list as text: Yes for true, 3 for 3.0, the most frequent of several (the first
    of these), None for nothing. TypeError where it is none."""
    if answer is None or isinstance(answer, str):
        return answer
    if isinstance(answer, bool):
        return "Yes" if answer else "No"
    if isinstance(answer, (int, float)):
        whole = isinstance(answer, float) and answer.is_integer()
        return None if math.isnan(answer) else str(int(answer) if whole else answer)
    if isinstance(answer, list):
        texts = [as_text(one["answer"] if _is_vote(one) else one) for one in answer]
        counts = Counter(text for text in texts if text is not None)
        return counts.most_common(1)[0][0] if counts else None
    raise TypeError(f"a {type(answer).__name__}")


def _is_vote(answer: object) -> TypeGuard[Fields]:
    """One of VQA's ten: {"answer", "answer_confidence", "answer_id"}."""
    return isinstance(answer, dict) and "answer" in answer

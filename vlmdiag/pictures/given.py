"""Answers that a file has for samples, for --answers and --drafts: a list of {"image_id",
"caption"}, such as a run's preds.json, with the ids of an answer's tokens where there are any."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from vlmdiag.cli import UsageError
from vlmdiag.pictures.entries import Entry, checked_id, entries_of, image_key, read_list
from vlmdiag.pictures.samples import Sample

IDS = "generated_ids"
Given = str | tuple[int, ...]
# the text that a model reads in ids, None where it does not have one of them
TextOf = Callable[[tuple[int, ...]], str | None]


def with_answers(
    samples: Sequence[Sample],
    flag: str,
    path: str | Path,
    field: str,
    text_of: TextOf | None = None,
    may_be_empty: bool = False,
    may_lack: bool = False,
) -> list[Sample]:
    """The samples with the answers that a list gives to their images, as Sample.given.

    field: the answer's text in an entry. text_of: entries may have ids of its tokens, with the text
    or without; they count where the model reads the text in them, for the list may be of a model
    with another tokenizer. may_lack: images without an answer have an empty one, where others have
    one. UsageError names the entry that is none, or an image without an answer.
    """
    try:
        given = _read(path, field, text_of, may_be_empty)
    except UsageError as error:
        raise UsageError(
            f"{flag}: {error}; wanted is a JSON list of objects with image_id and {field}"
        ) from error
    image_ids = [sample.extra["image_id"] for sample in samples]
    answers = _of_images(given, image_ids)
    missing = [id for id, answer in zip(image_ids, answers, strict=True) if answer is None]
    if missing:
        lacking = (
            f"{flag}: {path} has no {field} for {len(missing)} of {len(samples)} images that are"
            f" measured, such as {missing[0]}"
        )
        if not may_lack or len(missing) == len(samples):
            raise UsageError(lacking)
        print(f"{lacking}; these are answered without one")
    return [replace(sample, given=one or "") for sample, one in zip(samples, answers, strict=True)]


def _of_images(given: dict[str, Given], image_ids: Sequence[object]) -> list[Given | None]:
    """The answer to each image, None where there is none: the one under the id as it is written,
    else the only one under this id in another writing (42, "42", "000000000042")."""
    alike: dict[str, set[Given]] = {}
    for name, answer in given.items():
        alike.setdefault(image_key(name), set()).add(answer)

    def answer_to(id: object) -> Given | None:
        if str(id) in given:
            return given[str(id)]
        answers = [*alike.get(image_key(id), ())]
        return answers[0] if len(answers) == 1 else None

    return [answer_to(id) for id in image_ids]


def _read(
    path: str | Path, field: str, text_of: TextOf | None, may_be_empty: bool
) -> dict[str, Given]:
    """{id: answer} of a list."""
    given: dict[str, Given] = {}
    for n, entry in enumerate(entries_of(path, read_list(path), ["image_id"])):
        id = checked_id(path, f"the image_id of entry {n},", entry["image_id"])
        try:
            answer = _answer(entry, field, text_of, may_be_empty)
        except ValueError as error:
            raise UsageError(f"{path}: entry {n} (image {id}) {error}") from error
        if given.setdefault(str(id), answer) != answer:
            raise UsageError(f"{path}: entry {n} has a second {field} for image {id}")
    return given


def _answer(entry: Entry, field: str, text_of: TextOf | None, may_be_empty: bool) -> Given:
    """Text or ids of an entry. ValueError says what it has instead."""
    text = entry.get(field)
    ids = entry.get(IDS) if text_of is not None else None
    if text is not None and not _is_text(text):
        raise ValueError(f"has a {field} that is no text: {text!r:.60}")
    if ids is not None and not (isinstance(ids, list) and all(map(_is_id, ids))):
        raise ValueError(f"has {IDS} that are no list of token ids: {ids!r:.60}")
    if ids and text_of is not None:
        read = text_of(tuple(ids))
        if read is not None and text in (None, read):
            return tuple(ids)
        if text is None:
            raise ValueError(f"has {IDS} that the model does not have: {ids!r:.60}")
    if text is None:
        raise ValueError(f"has no {field}")
    if not (text.strip() or may_be_empty):
        raise ValueError(f"has an empty {field}")
    return text


def _is_text(text: object) -> bool:
    """Whether it is a text that a tokenizer takes, without half a surrogate pair."""
    return isinstance(text, str) and not any("\ud800" <= letter <= "\udfff" for letter in text)


def _is_id(id: object) -> bool:
    return isinstance(id, int) and not isinstance(id, bool) and id >= 0

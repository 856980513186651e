"""Swap pairs from a table: two questions about one picture that differ only in the order of the two
objects, and quads that join a vertical and a distance pair about the same two objects.

Why Far Looks Up (arXiv 2605.30161); docs/studies/swap_analysis.md, sections 1.3 to 1.8. No torch.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import TypedDict

from vlmdiag.answers import said
from vlmdiag.cli import UsageError
from vlmdiag.options import chosen, only_named
from vlmdiag.pictures.entries import read_json
from vlmdiag.pictures.samples import annotated_as
from vlmdiag.pictures.table import (
    LETTERS,
    PICTURE_COLUMNS,
    Pictures,
    Row,
    letter_of,
    picture_header_at,
    rows_of,
)
from vlmdiag.scenes.questions import ONE_WORD
from vlmdiag.swap.relations import (
    CATEGORIES,
    GROUP_OF,
    GROUPS,
    OPPOSITE,
    SPELLED,
    WORDS,
    category_of,
)
from vlmdiag.types import Fields

READY = {"original_question", "swapped_question", "original_answer", "swapped_answer", "category"}
EMBSPATIAL = {"category", "question", "answer", "A", "B", "C", "D"}
# option texts that name no object
INVALID = {"", "unknown", "n/a", "none", "nan", "null"}
PHRASINGS = [
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"\bhow are (?P<a>.+?) and (?P<b>.+?) positioned\b",
        r"\bpositions of (?P<a>.+?) and (?P<b>.+?) interact\b",
        r"\barrangement of (?P<a>.+?) and (?P<b>.+?) (?:in|within)\b",
        r"\bbetween (?P<a>.+?) and (?P<b>.+?) (?:in|within)\b",
        r"\blocation of (?P<a>.+?) and (?P<b>.+?) (?:in|within)\b",
        r"\bof (?P<a>.+?) and (?P<b>.+?) (?:in|within)\b",
    )
]
# the two objects of a ready pair's question; with "Compared to" the reference comes first
READY_OBJECTS = re.compile(
    r"(?:Is the (.+?) (?:to the left|above) or .+? the (.+?)\?)"
    r"|(?:Compared to (.+?), is (.+?) far or)"
)
Box = tuple[float, ...]  # x, y, w, h
Boxes = dict[str, list[tuple[str, Box]]]  # {question id: [(name, box), ...]}


class Pair(TypedDict, total=False):
    """A question and the same one with its objects swapped."""

    id: str
    index: int  # row of the table
    question_id: str
    offset: int  # byte of the table at which the row begins that has the picture
    image_id: str  # digest of the picture
    group: str
    category: str  # answer of the original question
    questions: Sequence[str]  # original, swapped
    letters: dict[str, str] | None  # what A and B stand for in both questions
    objects: tuple[str, str] | None  # asked, reference, where the table names them
    # of each object: (k, of n options of that name)
    occurrence: Sequence[tuple[int, int] | None] | None
    split: str | None  # one of SPLITS, for distance pairs with boxes
    dy: float


class Quad(TypedDict, total=False):
    """A vertical question about the two objects of a distance pair, and that pair."""

    id: str  # of the distance pair
    index: int
    image_id: str
    questions: Sequence[str]  # vertical: original, swapped
    vertical: str  # above or under
    signs: list[int]  # they turn the vertical delta into above and the distance delta into far
    split: str | None
    row: int  # its place in the states


# --- the table ------------------------------------------------------------------------------------


def names_in(question: str) -> tuple[str, str] | None:
    """The two objects of a relation question, ('red circle', 'pink cross'), articles dropped; None
    for an unknown phrasing."""

    def without_article(name: str) -> str:
        return re.sub(r"^(?:the|a|an) ", "", name.strip(), flags=re.IGNORECASE)

    for pattern in PHRASINGS:
        match = pattern.search(question)
        if match:
            return without_article(match["a"]), without_article(match["b"])
    return None


def question_about(group: str, a: str, b: str, letters: Mapping[str, str] | None = None) -> str:
    """The prompt that asks for a against b; with letters {"A": category, "B": category} it offers
    the two words to choose from."""
    stems = {
        "horizontal": f"Is the {a} to the left or right of the {b}?",
        "vertical": f"Is the {a} above or below the {b}?",
        "distance": f"Compared to {b}, is {a} far or close from you?",
    }
    if not letters:
        return stems[group] + ONE_WORD
    options = [f"({letter}) {SPELLED.get(name, name)}" for letter, name in letters.items()]
    return f"{stems[group]}\n{'  '.join(options)}\nAnswer with a single letter, A or B."


def both_questions(
    group: str, objects: tuple[str, str], letters: Mapping[str, str] | None = None
) -> list[str]:
    """The original and the swapped question about (asked, reference)."""
    asked, reference = objects
    return [
        question_about(group, asked, reference, letters),
        question_about(group, reference, asked, letters),
    ]


def letters_for(group: str, number: int) -> dict[str, str]:
    """The two options of a multiple-choice question: the canonical category is (A) in every other
    pair of a group."""
    canonical, other = GROUPS[group]
    names = (canonical, other) if number % 2 == 0 else (other, canonical)
    return dict(zip("AB", names, strict=True))


def read_pairs(
    path: str | Path,
    seed: int = 42,
    limit: int = 200,
    multiple_choice: bool = False,
    keep_unnamed: bool = False,
) -> tuple[list[Pair], dict[str, int]]:
    """([pair, ...], {why: rows left out}) of a table in either form, at most `limit` of each
    category (0: all), chosen by a seeded draw.

    A distance row of EmbSpatial's form takes its reference among the other named options by a draw
    that depends on (seed, question id) only; keep_unnamed lets 'unknown' and the like be an object,
    as the published code can. UsageError where the table cannot be read or gives no pair.
    """
    pictures = Pictures()
    try:
        rows = list(_pairs(Path(path), pictures, seed, multiple_choice, keep_unnamed))
    except OSError as error:
        raise UsageError(
            f"--data_path {path} cannot be read ({error.strerror or error})"
        ) from error
    pairs_or_reasons = [row if isinstance(row, str) else _placed(row, pictures) for row in rows]
    left_out = Counter(reason for reason in pairs_or_reasons if isinstance(reason, str))
    pairs = [pair for pair in pairs_or_reasons if not isinstance(pair, str)]
    if not pairs:
        raise UsageError(f"--data_path {path} gives no swap pair ({dict(left_out) or 'no rows'})")
    for category in CATEGORIES:
        ids = [pair["id"] for pair in pairs if pair["category"] == category]
        if limit and len(ids) > limit:
            chosen = set(Random(seed).sample(ids, limit))
            left_out[f"over the limit of {limit} a category"] += len(ids) - limit
            pairs = [pair for pair in pairs if pair["category"] != category or pair["id"] in chosen]
    return pairs, dict(left_out)


def _placed(pair: Pair, pictures: Pictures) -> Pair | str:
    """The pair with its picture, or why it has none."""
    try:
        pair["offset"], pair["image_id"] = pictures.of(pair["id"])
    except ValueError as error:
        return str(error)
    return pair


def _pairs(
    path: Path, pictures: Pictures, seed: int, multiple_choice: bool, keep_unnamed: bool
) -> Iterator[Pair | str]:
    """Yield each row's pair, or why it has none."""
    is_ready = None
    accepted: Counter[str] = Counter()  # multiple-choice pairs so far, by group
    for number, (offset, row) in enumerate(rows_of(path)):
        if is_ready is None:
            is_ready = set(row) >= READY
            has_pictures = not set(row).isdisjoint(PICTURE_COLUMNS)
            if not has_pictures or (not is_ready and not set(row) >= EMBSPATIAL):
                lacking = min((form - set(row) for form in (READY, EMBSPATIAL)), key=len)
                lacking |= set() if has_pictures else {"a picture's column"}
                raise UsageError(
                    f"{path}: a table of ready swap pairs or of EmbSpatial-Bench was wanted"
                    f" (docs/data.md); its first line is {', '.join(row)[:100]!r} and lacks"
                    f" {', '.join(sorted(lacking))}; pairs of generated scenes: python"
                    " data/make_shapes.py"
                )
        pair_id = f"{number:06d}"
        try:
            pictures.add(pair_id, row, offset)
        except ValueError as error:
            yield str(error)
            continue
        common: Pair = {
            "id": pair_id,
            "index": number,
            "question_id": row.get("question_id") or row.get("index") or str(number),
            "offset": offset,
            "image_id": "",  # by _placed(), when all rows were read
        }
        pair = _ready(row, common) if is_ready else _embspatial(row, common, seed, keep_unnamed)
        if multiple_choice and not isinstance(pair, str):
            pair = _with_letters(pair, accepted)
        yield pair


def _with_letters(pair: Pair, accepted: Counter[str]) -> Pair | str:
    """The pair with its two words as options, or why it has none."""
    if pair["objects"] is None:
        return "no object names from which to ask with options"
    group = pair["group"]
    pair["letters"] = letters_for(group, accepted[group])
    pair["questions"] = both_questions(group, pair["objects"], pair["letters"])
    accepted[group] += 1
    return pair


def _ready(row: Row, common: Pair) -> Pair | str:
    """The pair of a ready row."""
    category = category_of(row["category"])
    answers = [category_of(row[name]) for name in ("original_answer", "swapped_answer")]
    if category is None or answers != [category, OPPOSITE[category]]:
        return (
            f"answers {row['original_answer']!r}, {row['swapped_answer']!r} of category"
            f" {row['category']!r}"
        )
    questions = [row["original_question"].strip(), row["swapped_question"].strip()]
    if any(question.lower() in ("", "nan", "none", "null") for question in questions):
        return "an empty question"
    if questions[0] == questions[1]:
        return "the swapped question is the original one"
    match = READY_OBJECTS.match(row["original_question"])
    objects = None
    if match:
        objects = (match[1], match[2]) if match[1] else (match[4], match[3])
    return common | Pair(
        group=GROUP_OF[category],
        category=category,
        questions=[row["original_question"], row["swapped_question"]],
        letters=None,
        objects=objects,
        occurrence=None,
    )


def _embspatial(row: Row, common: Pair, seed: int, keep_unnamed: bool = False) -> Pair | str:
    """The pair of a row of EmbSpatial-Bench."""
    category = category_of(row["category"])
    if category is None:
        return f"category {row['category']!r}"
    group = GROUP_OF[category]
    objects = None
    occurrence = None
    if group == "distance":
        chosen = _distance_objects(row, common["question_id"], seed, keep_unnamed)
        if chosen is None:
            return "no named target or reference among the options"
        objects, occurrence = chosen
    else:
        objects = names_in(row["question"])
        if objects is None:
            return "a question of unknown phrasing"
    return common | Pair(
        group=group,
        category=category,
        questions=both_questions(group, objects),
        letters=None,
        objects=objects,
        occurrence=occurrence,
    )


def _distance_objects(
    row: Row, question_id: str, seed: int, keep_unnamed: bool
) -> tuple[tuple[str, str], list[tuple[int, int] | None]] | None:
    """((target, reference), occurrence of each) among the four options; None without two names."""
    invalid = {""} if keep_unnamed else INVALID
    options = {letter: row.get(letter, "").strip() for letter in LETTERS}
    answer = letter_of(row["answer"].strip(), options)
    target = options.get(answer, "")
    others = {
        text
        for text in options.values()
        if text.lower() not in invalid and text.lower() != target.lower()
    }
    if target.lower() in invalid or not others:
        return None
    reference = Random(f"{seed}|{question_id}").choice(sorted(others))

    def letters_of(name: str) -> list[str]:
        return [letter for letter, text in options.items() if text.lower() == name.lower()]

    of_target = letters_of(target)
    of_reference = letters_of(reference)
    occurrence: list[tuple[int, int] | None] = [
        (of_target.index(answer), len(of_target)),
        (0, 1) if len(of_reference) == 1 else None,
    ]
    return (target, reference), occurrence


# --- places: strata and quads ---------------------------------------------------------------------


def read_boxes(path: str | Path) -> tuple[Boxes, dict[str, tuple[int, int]]]:
    """({question id: [(name, (x, y, w, h)), ...]}, {question id: (width, height)}) of --bbox_file:
    our bboxes.json, or EmbSpatial-Bench's own list of records. The sizes are those of the records
    that say them. Objects without a name or a box of four numbers are left out. UsageError where it
    is no readable JSON, or no record has objects."""
    content = read_json(path)
    records: dict[str, Fields] = {}
    if isinstance(content, dict):
        records = {str(key): record for key, record in content.items() if isinstance(record, dict)}
    elif isinstance(content, list):
        records = {
            str(record.get("question_id")): record for record in content if isinstance(record, dict)
        }
    boxes = {key: _named_boxes(record) for key, record in records.items()}
    if not any(boxes.values()):
        raise UsageError(
            f"--bbox_file {path} has no record with objects that have a name and a bbox, see"
            " docs/data.md"
        )
    sizes = {}
    for key, record in records.items():
        sides = (record.get("image_width"), record.get("image_height"))
        if all(isinstance(side, int) and side > 0 for side in sides):
            sizes[key] = (int(sides[0] or 0), int(sides[1] or 0))
    return boxes, sizes


def _named_boxes(record: Fields) -> list[tuple[str, Box]]:
    """The objects of a record that have a name and a box."""
    objects = record.get("objects") or []
    if isinstance(objects, dict):
        # lists of names and boxes, as some versions of the datasets library give them
        names, boxes = objects.get("name"), objects.get("bbox")
        if not isinstance(names, list) or not isinstance(boxes, list):
            return []
        objects = [{"name": name, "bbox": box} for name, box in zip(names, boxes)]
    if not isinstance(objects, list):
        return []
    named = []
    for entry in objects:
        box = entry.get("bbox") if isinstance(entry, dict) else None
        if isinstance(box, list) and len(box) == 4 and entry.get("name"):
            if all(isinstance(number, (int, float)) and math.isfinite(number) for number in box):
                named.append((str(entry["name"]).lower(), tuple(map(float, box))))
    return named


def heights_of(
    path: str | Path, pairs: Sequence[Pair], sizes: Mapping[str, tuple[int, int]]
) -> dict[str, float]:
    """{pair id: height of the picture that the boxes are in} of a table's distance pairs. sizes: of
    read_boxes(). Left out are pairs whose picture cannot be read, has another shape than its boxes
    say, or is turned by EXIF so that it cannot be told how its boxes lie."""
    heights: dict[str, float] = {}
    for pair in pairs:
        if pair["group"] != "distance":
            continue
        try:
            size, turn = picture_header_at(path, pair["offset"])
        except ValueError:
            continue
        listed = sizes.get(str(pair["question_id"]))
        if listed is None and turn == 1:
            heights[pair["id"]] = size[1]
        elif listed is not None and annotated_as(listed, size, turn) == "shown":
            heights[pair["id"]] = listed[1]
    return heights


def place(
    pairs: Sequence[Pair], boxes: Boxes, heights: Mapping[str, float], band: float = 0.05
) -> tuple[list[Quad], dict[str, int]]:
    """Give distance pairs their 'split' and 'dy', and return (quads, {why: pairs without one}).

    dy = (height of the reference's centre - of the asked object's centre, from the top) / height of
    the picture, positive if the asked object is higher. consistent: the farther object is higher by
    more than `band`; counter: lower; else ambiguous. A quad joins the distance pair with the
    vertical pair about the same two objects, where these differ in height by more than `band`;
    signs turn both differences into 'above' and 'far'. Objects are matched by question id and name,
    and the asked one by its occurrence among equal options where there are as many boxes of that
    name; any other name that occurs twice is no match. heights: of heights_of().
    """
    quads: list[Quad] = []
    left_out: Counter[str] = Counter()
    for pair in pairs:
        pair.setdefault("split", None)
        if pair["group"] != "distance":
            continue
        named_boxes = boxes.get(str(pair["question_id"]))
        objects = pair["objects"]
        if named_boxes is None or objects is None:
            left_out["no boxes or no object names"] += 1
            continue
        if pair["id"] not in heights:
            left_out["no picture of the shape that the boxes are of"] += 1
            continue
        of_asked, of_reference = pair["occurrence"] or (None, None)
        asked = _centre(named_boxes, objects[0], of_asked)
        reference = _centre(named_boxes, objects[1], of_reference)
        if asked is None or reference is None:
            left_out["an object without a box of its own"] += 1
            continue
        dy = (reference - asked) / heights[pair["id"]]
        is_far = pair["category"] == "far"
        pair["dy"] = dy
        pair["split"] = _split(dy if is_far else -dy, band)
        if abs(dy) <= band:
            left_out["the two objects are at one height"] += 1
            continue
        vertical = "above" if dy > 0 else "under"
        letters = letters_for("vertical", len(quads)) if pair["letters"] else None
        quads.append(
            {
                "id": pair["id"],
                "index": pair["index"],
                "image_id": pair["image_id"],
                "questions": both_questions("vertical", objects, letters),
                "vertical": vertical,
                "signs": [1 if vertical == "above" else -1, 1 if is_far else -1],
                "split": pair["split"],
            }
        )
    return quads, dict(left_out)


def _centre(
    named_boxes: Sequence[tuple[str, Box]], name: str, occurrence: tuple[int, int] | None
) -> float | None:
    """Height of an object's centre in pixels from the top, None where its box is not certain."""
    boxes = [box for other, box in named_boxes if other == name.lower()]
    if len(boxes) == 1:
        box = boxes[0]
    elif occurrence and occurrence[1] == len(boxes):
        box = boxes[occurrence[0]]
    else:
        return None
    _, top, _, height = box
    return top + height / 2


def _split(farther: float, band: float) -> str:
    """The stratum; farther: by how much the farther object is higher."""
    if farther > band:
        return "consistent"
    return "counter" if farther < -band else "ambiguous"


# --- answers --------------------------------------------------------------------------------------

LETTER = re.compile(
    r"\s*(?:\(([AB])\)|(?:answer:?\s*|option\s*)?([AB])(?=[).:,]|\s*$))", re.IGNORECASE
)


def spellings(pair: Pair) -> dict[str, tuple[str, ...]]:
    """{category: words that answer it} of the two categories of a pair's group; the letters of a
    multiple-choice pair."""
    categories = (pair["category"], OPPOSITE[pair["category"]])
    letters = pair.get("letters")
    if letters:
        return {
            category: tuple(letter for letter, meant in letters.items() if meant == category)
            for category in categories
        }
    return {
        category: tuple(form for word in WORDS[category] for form in (word, word.capitalize()))
        for category in categories
    }


def read_answer(
    text: str, category: str, letters: Mapping[str, str] | None = None
) -> tuple[str | None, str]:
    """What an answer says of a category's axis: (category or None, note).

    Whole words and synonyms; the first one that is not denied in its clause counts, see
    answers.said(); 'left or right' and an answer that names both without deciding is a tie; an
    answer that only denies one says the other. letters {"A": category, "B": category}: an answer
    that begins with one of them, or chooses one (options.chosen), says what it stands for.
    """
    if letters:
        first = LETTER.match(text)
        option = chosen(text, "".join(letters))
        if option is None and first:
            option = only_named(text, "".join(letters))
        if option is not None:
            is_first = first and (first[1] or first[2]).upper() == option
            return letters[option], "letter" if is_first else "letter named"
    category_by_word = {
        word: name for name in (category, OPPOSITE[category]) for word in WORDS[name]
    }
    mentions = said(text, category_by_word)
    named = [category_by_word[mention.word] for mention in mentions]
    affirmed = [
        name for name, mention in zip(named, mentions, strict=True) if not mention.is_denied
    ]
    if len(set(affirmed)) == 2:
        from_first = text[mentions[0].start :]
        if re.search(r"\b\w+\s+or\s+\w+\b", from_first, re.IGNORECASE):
            return None, "tie"
        return affirmed[0], "both named, the first counts"
    if affirmed:
        return affirmed[0], ""
    if len(set(named)) == 2:
        return None, "both negated"
    if named:
        return OPPOSITE[named[0]], "negated"
    return None, "neither"

"""Swap pairs from a table: two questions about one picture that differ only in the order of the two
objects, and quads that join a vertical and a distance pair about the same two objects. Why Far
Looks Up (arXiv 2605.30161); sections 1.3 to 1.5 of our study. No torch.
"""

import base64
import binascii
import csv
import hashlib
import io
import json
import re
import sys
from collections import Counter
from pathlib import Path
from random import Random

from PIL import Image

from vlmdiag.cli import UsageError
from vlmdiag.scenes.questions import ONE_WORD

CATEGORIES = ("left", "right", "above", "under", "far", "close")
GROUPS = {
    "left": "horizontal",
    "right": "horizontal",
    "above": "vertical",
    "under": "vertical",
    "far": "distance",
    "close": "distance",
}
OPPOSITE = {
    "left": "right",
    "right": "left",
    "above": "under",
    "under": "above",
    "far": "close",
    "close": "far",
}
SPELLED = {"under": "below"}  # what the prompt asks for
WORDS = {
    "left": ("left",),
    "right": ("right",),
    "above": ("above", "over"),
    "under": ("below", "under", "beneath", "underneath"),
    "far": ("far", "farther", "further", "distant"),
    "close": ("close", "closer", "near", "nearer", "nearby"),
}
READY = {
    "original_question",
    "swapped_question",
    "original_answer",
    "swapped_answer",
    "group",
    "category",
}
EMBSPATIAL = {"category", "question", "image", "answer", "A", "B", "C", "D"}
INVALID = {"", "unknown", "n/a", "none", "nan", "null"}  # option texts that name no object
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
csv.field_size_limit(sys.maxsize)  # pictures in base64


def category_of(text):
    """One of CATEGORIES; below and beneath are under. None for anything else."""
    text = text.strip().lower()
    text = "under" if text in ("below", "beneath", "underneath") else text
    return text if text in CATEGORIES else None


# --- the table ------------------------------------------------------------------------------------


def rows_of(path):
    """Yield (byte offset, row as {column: text}) of a TSV; every cell stays text."""
    with open(path, "rb") as file:
        offset = [0]

        def lines():
            for line in file:
                offset.append(offset[-1] + len(line))
                yield line.decode("utf-8")

        reader = csv.reader(lines(), delimiter="\t")
        columns = next(reader, None)
        if not columns:
            raise UsageError(f"{path} is empty")
        seen = len(offset)
        for cells in reader:
            if len(cells) != len(columns):
                raise UsageError(
                    f"{path}: a row of {len(cells)} cells where the header has {len(columns)}"
                )
            yield offset[seen - 1], dict(zip(columns, cells))
            seen = len(offset)


def picture_at(path, offset):
    """The picture of the row that begins at a byte of the table, as PIL RGB; ValueError where it is
    none."""
    with open(path, "rb") as file:
        columns = next(csv.reader([file.readline().decode("utf-8")], delimiter="\t"))
        file.seek(offset)
        stream = io.TextIOWrapper(file, "utf-8", newline="")
        row = dict(zip(columns, next(csv.reader(stream, delimiter="\t"))))
        stream.detach()
    try:
        return Image.open(
            io.BytesIO(base64.b64decode(row.get("image_base64") or row["image"], validate=True))
        ).convert("RGB")
    except (binascii.Error, OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"the picture of the row at byte {offset} cannot be read ({error})"
        ) from error


def names_in(question):
    """The two objects of a relation question, ('red circle', 'pink cross'), articles dropped; None
    for an unknown phrasing."""
    for pattern in PHRASINGS:
        if found := pattern.search(question):
            return tuple(
                re.sub(r"^(?:the|a|an) ", "", found[name].strip(), flags=re.IGNORECASE)
                for name in "ab"
            )
    return None


def question_about(group, a, b, letters=None):
    """The prompt that asks for a against b; with letters {"A": category, "B": category} it offers
    the two words to choose from."""
    stem = {
        "horizontal": f"Is the {a} to the left or right of the {b}?",
        "vertical": f"Is the {a} above or below the {b}?",
        "distance": f"Compared to {b}, is {a} far or close from you?",
    }[group]
    if letters:
        return (
            f"{stem}\n"
            + "  ".join(f"({letter}) {SPELLED.get(name, name)}" for letter, name in letters.items())
            + "\nAnswer with a single letter, A or B."
        )
    return stem + ONE_WORD


def letters_for(group, number):
    """The two options of a multiple-choice question: the canonical category is (A) in every other
    pair of a group."""
    names = [category for category, own in GROUPS.items() if own == group]
    return dict(zip("AB", names if number % 2 == 0 else names[::-1], strict=True))


def read_pairs(path, seed=42, limit=200, multiple_choice=False, keep_unnamed=False):
    """([pair, ...], {why: rows left out}) of a table in either form, at most `limit` of each
    category (0: all), chosen by a seeded draw.

    pair: id, index, question_id, image_id (digest of the picture), offset, group, category (answer
    of the original question), questions and answers (original, swapped), letters (None, or what A
    and B stand for in both), objects (asked, reference) where the table names them, and occurrence
    of each: (k, of n options of that name). A distance row of EmbSpatial's form takes its reference
    among the other named options by a draw that depends on (seed, question id) only; keep_unnamed
    lets 'unknown' and the like be an object, as the published code can.
    """
    try:
        table = list(_pairs(Path(path), seed, multiple_choice, keep_unnamed))
    except OSError as error:
        raise UsageError(
            f"--data_path {path} cannot be read ({error.strerror or error})"
        ) from error
    except UnicodeDecodeError as error:
        raise UsageError(f"--data_path {path} is no UTF-8 table ({error})") from error
    left_out = Counter(why for why in table if isinstance(why, str))
    pairs = [pair for pair in table if not isinstance(pair, str)]
    if not pairs:
        raise UsageError(f"--data_path {path} gives no swap pair ({dict(left_out) or 'no rows'})")
    for category in CATEGORIES:
        own = [pair for pair in pairs if pair["category"] == category]
        if limit and len(own) > limit:
            kept = {pair["id"] for pair in Random(seed).sample(own, limit)}
            left_out[f"over the limit of {limit} a category"] += len(own) - limit
            pairs = [pair for pair in pairs if pair["category"] != category or pair["id"] in kept]
    return pairs, dict(left_out)


def _pairs(path, seed, multiple_choice, keep_unnamed):
    """Yield each row's pair, or why it has none."""
    ready, accepted = None, Counter()
    for number, (offset, row) in enumerate(rows_of(path)):
        if ready is None:
            ready = set(row) >= READY
            if not ready and not set(row) >= EMBSPATIAL:
                raise UsageError(
                    f"{path}: columns {', '.join(row)}; wanted those of ready swap pairs or of"
                    " EmbSpatial-Bench, see data/README.md"
                )
        picture = row.get("image_base64") or row.get("image") or ""
        common = {
            "id": f"{number:06d}",
            "index": number,
            "question_id": row.get("question_id") or row.get("index") or str(number),
            "offset": offset,
        }
        common["image_id"] = hashlib.blake2b(picture.encode(), digest_size=8).hexdigest()
        pair = (
            (_ready(row, common) if ready else _embspatial(row, common, seed, keep_unnamed))
            if picture
            else "no picture"
        )
        if multiple_choice and not isinstance(pair, str):
            if pair["objects"] is None:
                pair = "no object names from which to ask with options"
            else:
                pair["letters"] = letters = letters_for(pair["group"], accepted[pair["group"]])
                pair["questions"] = [
                    question_about(pair["group"], *names, letters)
                    for names in (pair["objects"], pair["objects"][::-1])
                ]
                accepted[pair["group"]] += 1
        yield pair


def _ready(row, common):
    category = category_of(row["category"])
    answers = [category_of(row[name]) for name in ("original_answer", "swapped_answer")]
    if category is None or answers != [category, OPPOSITE[category]]:
        return (
            f"answers {row['original_answer']!r}, {row['swapped_answer']!r} of category"
            f" {row['category']!r}"
        )
    objects = re.match(
        r"(?:Is the (.+?) (?:to the left|above) or .+? the (.+?)\?)|(?:Compared to (.+?), is (.+?)"
        r" far or)",
        row["original_question"],
    )
    found = objects and ((objects[1], objects[2]) if objects[1] else (objects[4], objects[3]))
    questions = [row["original_question"], row["swapped_question"]]
    return common | {
        "group": GROUPS[category],
        "category": category,
        "questions": questions,
        "letters": None,
        "objects": found,
        "occurrence": None,
    }


def _embspatial(row, common, seed, keep_unnamed=False):
    category = category_of(row["category"])
    if category is None:
        return f"category {row['category']!r}"
    group, invalid, occurrence = GROUPS[category], {""} if keep_unnamed else INVALID, None
    if group == "distance":
        options = {letter: row[letter].strip() for letter in "ABCD"}
        answer = row["answer"].strip().upper()
        target = options.get(answer, "")
        others = sorted(
            {
                text
                for text in options.values()
                if text.lower() not in invalid and text.lower() != target.lower()
            }
        )
        if target.lower() in invalid or not others:
            return "no named target or reference among the options"
        objects = target, Random(f"{seed}|{common['question_id']}").choice(others)
        letters = [
            [letter for letter, text in options.items() if text.lower() == name.lower()]
            for name in objects
        ]
        occurrence = [
            (letters[0].index(answer), len(letters[0])),
            (0, 1) if len(letters[1]) == 1 else None,
        ]
    else:
        objects = names_in(row["question"])
        if objects is None:
            return "a question of unknown phrasing"
    questions = [question_about(group, *objects), question_about(group, *objects[::-1])]
    return common | {
        "group": group,
        "category": category,
        "questions": questions,
        "letters": None,
        "objects": objects,
        "occurrence": occurrence,
    }


# --- places: strata and quads ---------------------------------------------------------------------


def read_boxes(path):
    """{question id: [(name, (x, y, w, h)), ...]} of --bbox_file: our bboxes.json, or
    EmbSpatial-Bench's own list of records."""
    try:
        content = json.loads(Path(path).read_bytes())
    except (OSError, ValueError) as error:
        raise UsageError(f"--bbox_file {path} is not readable JSON ({error})") from error
    records = (
        content
        if isinstance(content, dict)
        else {
            str(record.get("question_id")): record for record in content if isinstance(record, dict)
        }
    )
    found = {}
    for key, record in records.items():
        objects = record.get("objects") or []
        if isinstance(
            objects, dict
        ):  # lists of names and boxes, as some versions of the datasets library give them
            objects = [
                {"name": name, "bbox": box}
                for name, box in zip(objects.get("name", []), objects.get("bbox", []))
            ]
        found[str(key)] = [
            (str(one["name"]).lower(), tuple(map(float, one["bbox"])))
            for one in objects
            if one.get("name") and len(one.get("bbox", ())) == 4
        ]
    return found


def place(pairs, boxes, heights, band=0.05):
    """Give distance pairs their 'split' and 'dy', and return (quads, {why: pairs without one}).

    dy = (height of the reference's centre - of the asked object's centre, from the top) / height of
    the picture, positive if the asked object is higher. consistent: the farther object is higher by
    more than `band`; counter: lower; else ambiguous. A quad joins the distance pair with the
    vertical pair about the same two objects, where these differ in height by more than `band`;
    signs turn both differences into 'above' and 'far'. Objects are matched by question id and name,
    and the asked one by its occurrence among equal options where there are as many boxes of that
    name; any other name that occurs twice is no match. heights {pair id: height of the decoded
    picture}."""
    quads, left_out = [], Counter()
    for pair in pairs:
        pair.setdefault("split", None)
        if pair["group"] != "distance":
            continue
        listed = boxes.get(str(pair["question_id"]))
        if listed is None or pair["objects"] is None:
            left_out["no boxes or no object names"] += 1
            continue
        centres = []
        for name, occurrence in zip(
            pair["objects"], pair["occurrence"] or (None, None), strict=True
        ):
            own = [box for other, box in listed if other == name.lower()]
            which = (
                0
                if len(own) == 1
                else occurrence[0]
                if occurrence and occurrence[1] == len(own)
                else None
            )
            centres.append(None if which is None else own[which][1] + own[which][3] / 2)
        if None in centres:
            left_out["an object without a box of its own"] += 1
            continue
        pair["dy"] = dy = (centres[1] - centres[0]) / heights[pair["id"]]
        farther = dy if pair["category"] == "far" else -dy
        pair["split"] = (
            "consistent" if farther > band else "counter" if farther < -band else "ambiguous"
        )
        if abs(dy) <= band:
            left_out["the two objects are at one height"] += 1
            continue
        vertical = "above" if dy > 0 else "under"
        letters = letters_for("vertical", len(quads)) if pair["letters"] else None
        questions = [
            question_about("vertical", *names, letters)
            for names in (pair["objects"], pair["objects"][::-1])
        ]
        signs = [1 if vertical == "above" else -1, 1 if pair["category"] == "far" else -1]
        quads.append(
            {
                "id": pair["id"],
                "index": pair["index"],
                "image_id": pair["image_id"],
                "questions": questions,
                "vertical": vertical,
                "signs": signs,
                "split": pair["split"],
            }
        )
    return quads, dict(left_out)


# --- answers --------------------------------------------------------------------------------------

NEGATION = re.compile(
    r"(?:\b(?:not|never|neither|no|isn't|is not|cannot be)\b)\W+(?:(?!but\b)\w+\W+){0,2}$",
    re.IGNORECASE,
)


LETTER = re.compile(
    r"\s*(?:\(([AB])\)|(?:answer:?\s*|option\s*)?([AB])(?=[).:,]|\s*$))", re.IGNORECASE
)


def spellings(pair):
    """{category: words that answer it} of the two categories of a pair's group; the letters of a
    multiple-choice pair."""
    names = (pair["category"], OPPOSITE[pair["category"]])
    if pair.get("letters"):
        return {
            name: tuple(letter for letter, own in pair["letters"].items() if own == name)
            for name in names
        }
    return {
        name: tuple(form for word in WORDS[name] for form in (word, word.capitalize()))
        for name in names
    }


def read_answer(text, category, letters=None):
    """What an answer says of a category's axis: (category or None, note). Whole words and synonyms;
    the first one that is not negated counts; 'left or right' and an answer that names both without
    deciding is a tie; an answer that only negates one says the other. letters {"A": category, "B":
    category}: an answer that begins with one of them says what it stands for."""
    if letters and (found := LETTER.match(text)):
        return letters[(found[1] or found[2]).upper()], "letter"
    words = {word: name for name in (category, OPPOSITE[category]) for word in WORDS[name]}
    found = [
        (match.start(), words[match[0].lower()], bool(NEGATION.search(text[: match.start()])))
        for match in re.finditer(
            r"(?<!\w)(?:" + "|".join(sorted(words, key=len, reverse=True)) + r")(?!\w)",
            text,
            re.IGNORECASE,
        )
    ]
    plain = [name for _, name, negated in found if not negated]
    if len(set(plain)) == 2 and re.search(
        r"\b\w+\s+or\s+\w+\b", text[found[0][0] :], re.IGNORECASE
    ):
        return None, "tie"
    if plain:
        return plain[0], "both named, the first counts" if len(set(plain)) == 2 else ""
    if len({name for _, name, _ in found}) == 2:
        return None, "both negated"
    if found:
        return OPPOSITE[found[0][1]], "negated"
    return None, "neither"

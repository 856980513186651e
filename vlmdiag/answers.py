"""Is a generated answer right? The first known alternative that stands in it as a whole word
decides. Pure functions on text.

    read("The red circle is below it.", "above") == "below"        read("Yes.", "yes") == "yes"
    read("There is nothing", "no") is None

Alternatives come from the expected answer: 'above' is one of {above, below}, 'two' one of the
numbers, 'B' or '(B)' one of the option letters. An expected answer of no such set, 'column 3, row
4' or 'teddy bear', is right where it occurs as a whole. Case is ignored, negation is not
understood.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split()
COLORS = (
    "red green blue yellow purple violet pink orange brown black white cyan magenta turquoise gold"
    " silver"
).split()
SHAPES = (
    "circle square triangle cross sphere cube rectangle star diamond hexagon cylinder cone"
).split()
LETTERS = "ABCDEFGH"

Alternatives = Mapping[str, tuple[str, ...]]  # what an answer may be read as: the words that say it

ALTERNATIVES: tuple[Alternatives, ...] = (
    {"yes": ("yes",), "no": ("no",)},
    {"left": ("left",), "right": ("right",)},
    {"above": ("above",), "below": ("below", "under", "beneath")},
    {"far": ("far", "farther", "further"), "close": ("close", "closer", "near", "nearer")},
    {str(number): (str(number), word) for number, word in enumerate(NUMBERS)}
    | {"0": ("0", "zero", "none", "no")},
    {color: (color,) for color in COLORS} | {"grey": ("grey", "gray")},
    {shape: (shape,) for shape in SHAPES},
)
# a whole word, and of 3.5 neither the 3 nor the 5
_WHOLE = r"(?<!\w)(?<!\d[.,])(?:{})(?!\w)(?![.,]\d)"
# an option letter, not the article
_LETTER = re.compile(r"(?<![\w'])(?:[B-H]|A(?!\s+[a-z]))(?![\w'])")


def _plain(answer: str) -> str:
    return " ".join(answer.lower().split()).strip(" .!")


def alternatives_of(answer: str) -> tuple[Alternatives | None, str]:
    """The set an expected answer belongs to, {what it is read as: words}, and what it is read as:
    ({...}, 'below') for 'Under.'. (None, answer) if none."""
    plain = _plain(answer)
    for alternatives in ALTERNATIVES:
        for name, words in alternatives.items():
            if plain in words:
                return alternatives, name
    return None, plain


def first_match(text: str, alternatives: Alternatives) -> str | None:
    """The alternative whose word comes first in the text, as a whole word; None where none does."""
    names = {word: name for name, words in alternatives.items() for word in words}
    longest_first = sorted(names, key=len, reverse=True)
    match = re.search(_WHOLE.format("|".join(map(re.escape, longest_first))), text.lower())
    return names[match[0]] if match else None


def _option_of(answer: str) -> str | None:
    """The option letter that an expected answer is, None for another answer."""
    letter = answer.strip(" .()")
    return letter if len(letter) == 1 and letter in LETTERS else None


def read(text: str, answer: str) -> str | None:
    """What a generated text is read as, given the expected answer: the name of an alternative, or
    None."""
    if _option_of(answer):
        match = _LETTER.search(text)
        if match:
            return match[0]
        return _option_of(text.upper())
    alternatives, name = alternatives_of(answer)
    if alternatives is not None:
        return first_match(text, alternatives)
    phrase = r"\s+".join(map(re.escape, name.split()))
    return name if name and re.search(_WHOLE.format(phrase), text.lower()) else None


def is_right(text: str, answer: str) -> bool:
    """Does a generated text give the expected answer?"""
    return read(text, answer) == (_option_of(answer) or alternatives_of(answer)[1])


def token_spans(
    ids: Sequence[int], decode: Callable[[list[int]], str]
) -> tuple[str, list[tuple[int, int]]]:
    """(text, [(start, end), ...]): the decoded answer and the characters that each token wrote,
    none for special tokens. Tokens that only together make a character (bytes) share its span."""
    ids = list(ids)
    text = decode(ids)
    ends = [0]
    unfinished = []  # whether the bytes so far decode to another character
    for count in range(1, len(ids)):
        begun = decode(ids[:count])
        same = _common_start(begun, text)
        unfinished.append(len(begun) > same)
        ends.append(max(ends[-1], same))
    ends.append(len(text))
    spans = [(ends[i], ends[i + 1]) for i in range(len(ids))]
    for i in range(len(ids) - 2, -1, -1):
        if unfinished[i]:
            spans[i] = (spans[i][0], spans[i + 1][1])
    return text, spans


def _common_start(a: str, b: str) -> int:
    """How many first characters two texts share."""
    for index, (left, right) in enumerate(zip(a, b)):
        if left != right:
            return index
    return min(len(a), len(b))


def find_word(text: str, spans: Sequence[tuple[int, int]], word: str) -> list[list[int]]:
    """The tokens of each occurrence of a word or phrase in the text, [[index, ...], ...].

    spans: [start, end) of each token in the text, see token_spans(). Whole words, case ignored.
    """
    phrase = r"\s+".join(map(re.escape, word.split()))
    if not phrase:
        return []
    occurrences = re.finditer(rf"(?<!\w){phrase}(?!\w)", text, re.IGNORECASE)
    return [tokens_within(spans, match.start(), match.end()) for match in occurrences]


def tokens_within(spans: Sequence[tuple[int, int]], first: int, last: int) -> list[int]:
    """Indices of the tokens that share a character with [first, last)."""
    return [i for i, (start, end) in enumerate(spans) if start < last and end > first]

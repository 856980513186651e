"""Is a generated answer right? The first known alternative that it says, as a whole word, decides.
Pure functions on text.

    read("The red circle is below it.", "above") == "below"        read("Yes.", "yes") == "yes"
    read("Not above.", "above") == "below"        read("There is nothing", "no") is None

Alternatives come from the expected answer: 'above' is one of {above, below}, 'two' one of the
numbers, 'B' or '(B)' one of the option letters, of which the chosen one counts (options.py). An
expected answer of no such set, 'column 3, row 4' or 'teddy bear', is right where it is said as a
whole; its article, hyphens and commas are no matter. Numbers are the same in words and in digits:
'twenty-one' is 21, '1,000' is 1000. Case is ignored. A word that is denied in its clause is not
said; of two alternatives that says the other one. 'above or below' says neither.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from vlmdiag.options import chosen

NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"
    " sixteen seventeen eighteen nineteen"
).split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
SCALES = {"dozen": 12, "hundred": 100, "thousand": 1000, "million": 10**6}
COLORS = (
    "red green blue yellow purple violet pink orange brown black white cyan magenta turquoise gold"
    " silver"
).split()
SHAPES = (
    "circle square triangle cross sphere cube rectangle star diamond hexagon cylinder cone"
).split()
LETTERS = "ABCDEFGH"

Alternatives = Mapping[str, tuple[str, ...]]  # what an answer may be read as: the words that say it

COUNTS: Alternatives = {  # and any other number, see read()
    **{str(number): (str(number), word) for number, word in enumerate(NUMBERS)},
    "0": ("0", "zero", "none", "no"),
}
ALTERNATIVES: tuple[Alternatives, ...] = (
    {"yes": ("yes",), "no": ("no",)},
    {"left": ("left",), "right": ("right",)},
    {"above": ("above",), "below": ("below", "under", "beneath")},
    {"far": ("far", "farther", "further"), "close": ("close", "closer", "near", "nearer")},
    COUNTS,
    {color: (color,) for color in COLORS} | {"grey": ("grey", "gray")},
    {shape: (shape,) for shape in SHAPES},
)
# a whole word, and of 3.5, 1/2 and 12:30 none of the numbers
_WHOLE = r"(?<!\w)(?!(?<=\d[.,:/])\d)(?:{})(?!\w)(?!(?<=\d)[.,:/]\d)"
_BETWEEN_WORDS = r"(?<=\w)[\s,-]+(?=\w)"
# what denies the words that follow it, up to four in its clause
_DENIAL = re.compile(
    r"(?:\b(?:not|never|neither|nor|cannot|without)\b|n['’]t\b"
    r"|\b(?:is|are|was|were|do|does|did|ca|wo|has|have|had|could|would|should)nt\b"
    r"|\bno\b(?!\s+(?:it|it['’]s|there|the|that|this|they|i|he|she|we|you|more|less|fewer)\b)"
    r"|\b(?:rather\s+than|instead\s+of|as\s+opposed\s+to|anything\s+but)\b)"
    r"(?!\s+(?:only|just|merely|sure|certain|clear|(?:a\s+)?doubt)\b)"
    r"(?:[^\w.!?;:,\n]+(?!(?:but|and|rather|instead)\b)[\w'’]+){0,4}[^\w.!?;:,\n]*$",
    re.IGNORECASE,
)
# a further alternative of what is denied: not left or to the right
_OR = re.compile(r"\W*\bn?or\W+(?:(?:to|on|at|in)\W+)?(?:the\W+)?", re.IGNORECASE)
_TO = re.compile(r"\s*(?:-|–|to)\s*", re.IGNORECASE)  # 2-3, two to three
_UNDER_IF = re.compile(r"\b(?:if|whether)\b[^.!?;:,\n]*$", re.IGNORECASE)
# words that say something else there
_IDIOM = re.compile(
    r"\bas\s+far\s+as\s+(?:i|we|you|one)\b|\b(?:so|by)\s+far\b|\b(?:that|you)['’](?:s|re)\s+right\b|\ball\s+right\b"
    r"|\bright\s+(?:now|away)\b|\bthe\s+above\s+(?:image|picture|photo|question)\b|\babove\s+all\b"
    r"|\bno\s+(?:doubt|problem|question|matter|way|idea)\b|\b(?:the|this|that|each|no)\s+one\b"
    r"|\b(?:one|two|three)[\s-](?:half|halves|thirds?|quarters?)\b",
    re.IGNORECASE,
)
# what 'no' counts: no circles, but not No, there are two
_COUNTED = re.compile(
    r"\s+(?!(?:there|it|i|the|that|this|they|we|you|more|fewer|less)\b)\w", re.IGNORECASE
)

_ONES = "|".join(NUMBERS[1:10])
_SMALL = rf"(?:(?:{'|'.join(TENS)})(?:[\s-]+(?:{_ONES}))?|{'|'.join(NUMBERS)}|\d{{1,12}})"
_SCALE = rf"[\s-]+(?:{'|'.join(SCALES)})"
# numbers of several words, and from thirteen on
_NUMBER = re.compile(
    rf"(?<!\w)(?<!half )(?:(?:an?|{_SMALL})(?:{_SCALE})+(?:\s+(?:and\s+)?{_SMALL}(?:{_SCALE})*)*"
    rf"|(?:{'|'.join(TENS)})(?:[\s-]+(?:{_ONES}))?|{'|'.join(NUMBERS[13:])})(?!\w)",
    re.IGNORECASE,
)
_POINT_ZERO = re.compile(r"(?<![\d.,])(\d+)\.0+(?![\d.]*\d)")
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?!,?\d)")


class Said(NamedTuple):
    """A word that an answer says, in lower case."""

    word: str
    start: int
    end: int
    is_denied: bool


def said(text: str, words: Iterable[str]) -> list[Said]:
    """Where a text says some words, as whole ones in any case, in order. Left out is what stands in
    an idiom ('as far as') or under an 'if' or 'whether'; denial ends with its clause."""
    longest_first = sorted(words, key=len, reverse=True)
    spelled = (
        r"[\s,-]+".join(map(re.escape, re.split(_BETWEEN_WORDS, word))) for word in longest_first
    )
    pattern = re.compile(_WHOLE.format("|".join(spelled)), re.IGNORECASE)
    idioms = [match.span() for match in _IDIOM.finditer(text)]
    found: list[Said] = []
    for match in pattern.finditer(text):
        start, end = match.span()
        before = text[:start]
        if any(first <= start < last for first, last in idioms) or _UNDER_IF.search(before):
            continue
        is_denied = bool(_DENIAL.search(before))
        if found and found[-1].is_denied and _OR.fullmatch(text[found[-1].end : start]):
            is_denied = True
        found.append(Said(match[0].lower(), start, end, is_denied))
    return found


def _value(number: str) -> str:
    """A number of words in digits."""
    total, current = 0, 0
    for word in re.findall(r"[a-z]+|\d+", number.lower()):
        if word in SCALES:
            current = max(current, 1) * SCALES[word]
            if SCALES[word] >= 1000:
                total, current = total + current, 0
        elif word in TENS:
            current += 10 * (2 + TENS.index(word))
        elif word in NUMBERS or word.isdecimal():
            current += NUMBERS.index(word) if word in NUMBERS else int(word)
    return str(total + current)


def _tidy(text: str) -> str:
    """A text with one kind of apostrophe, one form of each letter, and digits for numbers of
    several words and from thirteen on: 21 for twenty-one, 1000 for 1,000, 3 for 3.0."""
    text = unicodedata.normalize("NFC", text).replace("’", "'")
    text = _THOUSANDS.sub(lambda match: match[0].replace(",", ""), text)
    text = _POINT_ZERO.sub(r"\1", text)
    return _NUMBER.sub(lambda match: _value(match[0]), text)


def _plain(answer: str) -> str:
    return " ".join(_tidy(answer).lower().split()).strip(" .!")


def _in_digits(text: str) -> str:
    """A text with all its numbers in digits."""
    words = re.compile(rf"\b(?:{'|'.join(NUMBERS)})\b", re.IGNORECASE)
    return words.sub(lambda match: str(NUMBERS.index(match[0].lower())), text)


def alternatives_of(answer: str) -> tuple[Alternatives | None, str]:
    """The set an expected answer belongs to, {what it is read as: words}, and what it is read as:
    ({...}, 'below') for 'Under.'. (None, answer) if none."""
    plain = _plain(answer)
    for alternatives in ALTERNATIVES:
        for name, words in alternatives.items():
            if plain in words:
                return alternatives, name
    if plain.isdecimal():
        return COUNTS, plain
    return None, re.sub(r"^(?:an?|the) (?=\w)", "", _in_digits(plain))


def first_match(text: str, alternatives: Alternatives) -> str | None:
    """The alternative that a text says first; None where it says none, or leaves it open ('red or
    blue'). Of two alternatives one that is only denied says the other."""
    names = {word: name for name, words in alternatives.items() for word in words}
    mentions = said(text, names)
    if "yes" in names:  # 'no' says no, it denies nothing
        mentions = [mention._replace(is_denied=False) for mention in mentions]
    elif "no" in names:
        mentions = [mention for mention in mentions if _counts(mention, text)]
    affirmed = [mention for mention in mentions if not mention.is_denied]
    if not affirmed:
        denied = {names[mention.word] for mention in mentions}
        others = [name for name in alternatives if name not in denied]
        return others[0] if len(denied) == len(others) == 1 else None
    first = names[affirmed[0].word]
    for mention, following in zip(affirmed, affirmed[1:]):
        between = text[mention.end : following.start]
        is_tie = (
            bool(_OR.fullmatch(between))
            or ("yes" in names and between.strip().lower() == "and")
            or ("none" in names and bool(_TO.fullmatch(between)))  # of numbers
        )
        if is_tie and names[mention.word] != names[following.word]:
            return None
    return first


def _counts(mention: Said, text: str) -> bool:
    """Whether a word says a number: 'no' does before what it counts, and alone."""
    if mention.word != "no" or text.strip(" .!\n").lower() == "no":
        return True
    return bool(_COUNTED.match(text, mention.end))


def _option_of(answer: str) -> str | None:
    """The option letter that an expected answer is, None for another answer."""
    letter = answer.strip(" .()").upper()
    return letter if len(letter) == 1 and letter in LETTERS else None


def read(text: str, answer: str) -> str | None:
    """What a generated text is read as, given the expected answer: the name of an alternative, or
    None."""
    if _option_of(answer):
        return chosen(text, LETTERS)
    text = _tidy(text)
    alternatives, name = alternatives_of(answer)
    if alternatives is COUNTS:
        others = {number: (number,) for number in re.findall(r"\d+", text)}
        return first_match(text, {**others, **COUNTS})
    if alternatives is not None:
        return first_match(text, alternatives)
    text = _in_digits(text)
    is_said = name and any(not mention.is_denied for mention in said(text, [name]))
    return name if is_said else None


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

"""Is a generated answer right? The first known alternative that stands in it as a whole word
decides. Pure functions on text.

    read("The red circle is below it.", "above") == "below"        read("Yes.", "yes") == "yes"
    read("There is nothing", "no") is None

Alternatives come from the expected answer: 'above' is one of {above, below}, 'two' one of the
numbers, 'B' or '(B)' one of the option letters. An expected answer of no such set, 'column 3, row
4' or 'teddy bear', is right where it occurs as a whole. Case is ignored, negation is not
understood.
"""

import re

NUMBERS = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
]
COLORS = [
    "red",
    "green",
    "blue",
    "yellow",
    "purple",
    "violet",
    "pink",
    "orange",
    "brown",
    "black",
    "white",
    "cyan",
    "magenta",
    "turquoise",
    "gold",
    "silver",
]
SHAPES = [
    "circle",
    "square",
    "triangle",
    "cross",
    "sphere",
    "cube",
    "rectangle",
    "star",
    "diamond",
    "hexagon",
    "cylinder",
    "cone",
]
ALTERNATIVES = (  # what an answer may be read as: the words that say it
    {"yes": ("yes",), "no": ("no",)},
    {"left": ("left",), "right": ("right",)},
    {"above": ("above",), "below": ("below", "under", "beneath")},
    {"far": ("far", "farther", "further"), "close": ("close", "closer", "near", "nearer")},
    {str(number): (str(number), word) for number, word in enumerate(NUMBERS)}
    | {"0": ("0", "zero", "none", "no")},
    {color: (color,) for color in COLORS} | {"grey": ("grey", "gray")},
    {shape: (shape,) for shape in SHAPES},
)
_WHOLE = (  # a whole word, and of 3.5 neither the 3 nor the 5
    r"(?<!\w)(?<!\d[.,])(?:{})(?!\w)(?![.,]\d)"
)
_LETTER = re.compile(
    r"(?<![\w'])(?:[B-H]|A(?!\s+[a-z]))(?![\w'])"
)  # an option letter, not the article


def _plain(answer):
    return " ".join(answer.lower().split()).strip(" .!")


def alternatives_of(answer):
    """The set an expected answer belongs to, {what it is read as: words}, and what it is read as:
    ({...}, 'below') for 'Under.'. (None, answer) if none."""
    plain = _plain(answer)
    for known in ALTERNATIVES:
        for name, words in known.items():
            if plain in words:
                return known, name
    return None, plain


def first_match(text, alternatives):
    """The alternative whose word comes first in the text, as a whole word; None where none does.
    alternatives: {name: words}."""
    names = {word: name for name, words in alternatives.items() for word in words}
    longest_first = sorted(names, key=len, reverse=True)
    found = re.search(_WHOLE.format("|".join(map(re.escape, longest_first))), text.lower())
    return names[found[0]] if found else None


def read(text, answer):
    """What a generated text is read as, given the expected answer: the name of an alternative, or
    None."""
    letter = answer.strip(" .()")
    if len(letter) == 1 and letter in "ABCDEFGH":
        found = _LETTER.search(text)
        return (
            found[0]
            if found
            else (
                text.strip(" .()").upper()
                if text.strip(" .()").upper() in set("ABCDEFGH")
                else None
            )
        )
    known, name = alternatives_of(answer)
    if known is not None:
        return first_match(text, known)
    phrase = r"\s+".join(map(re.escape, name.split()))
    return name if name and re.search(_WHOLE.format(phrase), text.lower()) else None


def is_right(text, answer):
    """Does a generated text give the expected answer?"""
    letter = answer.strip(" .()")
    expected = letter if len(letter) == 1 and letter in "ABCDEFGH" else alternatives_of(answer)[1]
    return read(text, answer) == expected


def token_spans(ids, decode):
    """(text, [(start, end), ...]): the decoded answer and the characters that each token wrote,
    none for special tokens.

    decode(ids) -> text. Tokens that only together make a character (bytes) share its span."""
    ids = list(ids)
    text, ends, unfinished = decode(ids), [0], []
    for count in range(1, len(ids)):
        begun = decode(ids[:count])
        same = next(
            (i for i, (a, b) in enumerate(zip(begun, text)) if a != b), min(len(begun), len(text))
        )
        unfinished.append(len(begun) > same)  # the bytes so far decode to another character
        ends.append(max(ends[-1], same))
    ends.append(len(text))
    spans = [(ends[i], ends[i + 1]) for i in range(len(ids))]
    for i in range(len(ids) - 2, -1, -1):
        if unfinished[i]:
            spans[i] = (spans[i][0], spans[i + 1][1])
    return text, spans

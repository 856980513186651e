"""Names of categories in annotation files, as words that people and models say.

spoken_names("alarm_clock") == ("alarm clock",)
spoken_names("monitor_(computer_equipment) computer_monitor") == ("monitor", "computer monitor")
"""

from __future__ import annotations

import re

# Pascal VOC's names that are no words
_WORDS = {"tvmonitor": "tv", "pottedplant": "potted plant", "diningtable": "dining table"}
_GLOSS = re.compile(r"\([^()]*\)|\[[^\[\]]*\]")  # LVIS: bow_(decorative_ribbons)
_JOINED = re.compile(r"[A-Z]?[a-z]{2,}(?:[A-Z][a-z]+)+")  # AI2-THOR: AlarmClock
_CAPITAL = re.compile(r"(?<=[a-z])(?=[A-Z])")


def spoken_names(name: str) -> tuple[str, ...]:
    """What a category's name says in words, first what one would ask for.

    Underscores are blanks, what stands in brackets explains the word before it and is left out,
    and a bracket within, a comma, a slash or a semicolon parts names that mean the same (LVIS,
    ADE20K, Objects365). Words that are joined are parted (VOC, AI2-THOR). Case stays, which only
    joined words lose. At least one name: the given one where nothing else is left of it.
    """
    words = _GLOSS.sub(";", name.replace("_", " "))
    parts = [" ".join(part.split()) for part in re.split(r"[;,/]", words)]
    said = [_parted(part) for part in parts if re.search(r"\w", part)]
    return tuple(dict.fromkeys(said)) or (name,)


def _parted(word: str) -> str:
    if _JOINED.fullmatch(word):
        return _CAPITAL.sub(" ", word).lower()
    return _WORDS.get(word.lower(), word)

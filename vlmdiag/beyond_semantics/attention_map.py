"""From a word of the answer to its tokens. Pure functions, no model.

Beyond Semantics (arXiv 2503.17349); docs/studies/beyond_semantics.md, section 2.7.
"""

from __future__ import annotations

import re
from collections.abc import Sequence


def find_word(text: str, spans: Sequence[tuple[int, int]], word: str) -> list[list[int]]:
    """The tokens of each occurrence of a word or phrase in the text, [[index, ...], ...].

    spans: [start, end) of each token in the text. Whole words, case ignored.
    """
    phrase = r"\s+".join(map(re.escape, word.split()))
    if not phrase:
        return []
    occurrences = re.finditer(rf"(?<!\w){phrase}(?!\w)", text, re.IGNORECASE)
    return [tokens_within(spans, match.start(), match.end()) for match in occurrences]


def tokens_within(spans: Sequence[tuple[int, int]], first: int, last: int) -> list[int]:
    """Indices of the tokens that share a character with [first, last)."""
    return [i for i, (start, end) in enumerate(spans) if start < last and end > first]

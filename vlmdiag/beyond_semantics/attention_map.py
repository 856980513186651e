"""From attention to vision tokens, and from a word of the answer to its tokens. Pure functions, no
model. Beyond Semantics, section 2.7 of our study."""

import re

import numpy as np


def normalized_entropy(weights, epsilon=0.0):
    """E = -sum p log2 p / log2 P of p = weights / sum: 1 where all P tokens get the same, 0 where
    one gets everything; NaN for P < 2 or no weight at all.

    weights (P,) >= 0. epsilon: added to p, which is then normalised again (the published code:
    1e-10).
    """
    weights = np.asarray(weights, dtype=np.float64).ravel()
    if len(weights) < 2 or not weights.sum() > 0:
        return float("nan")
    p = weights / weights.sum() + epsilon
    p = p / p.sum()
    inside = p[p > 0]
    return float(max(0.0, -(inside * np.log2(inside)).sum() / np.log2(len(p))))


def find_word(text, spans, word):
    """The tokens of each occurrence of a word or phrase in the text, [[index, ...], ...]; whole
    words, case ignored."""
    phrase = r"\s+".join(map(re.escape, word.split()))
    found = re.finditer(rf"(?<!\w){phrase}(?!\w)", text, re.IGNORECASE) if phrase else ()
    return [
        [i for i, (start, end) in enumerate(spans) if start < match.end() and end > match.start()]
        for match in found
    ]

"""The critique - revise - decide loop: what a decision says, and what follows from it. Pure
functions, no model. Volcano (arXiv 2311.07362), algorithm 1 and section 3 of our study; the prompts
are in vlmdiag/scenes/questions.py."""

import re
from random import Random

LETTER = r"[\"'(*\s]*([AB])[\"')*.:,;\s]*"
TOLD = re.compile(
    r"\b(?:option|choice|choose|answer(?:\s+is)?|letter(?:\s+is)?)\b\s*[:=]?\s*[\"'(*]*([AB])(?![\w'])",
    re.IGNORECASE,
)
LEADING = re.compile(r"\s*[\"'(*]*([AB])[.):,](?!\w)")


def decision(text):
    """'A' or 'B' from the answer to the decide prompt; None where it says neither clearly ('Both',
    'A red circle', nothing).

    A letter alone, a leading letter with a sign behind it, or a letter that option, choice, answer
    or letter names; the first of these counts.
    """
    alone = re.fullmatch(LETTER, text, re.IGNORECASE)
    if alone:
        return alone[1].upper()
    found = LEADING.match(text) or TOLD.search(text)
    return found[1].upper() if found else None


def decision_published(text):
    """As published: 'B' if there is any b in the answer, else 'A' if there is any a, else None."""
    text = text.lower()
    return "B" if "b" in text else "A" if "a" in text else None


def order_of(seed, item_id, iteration, randomised):
    """Which answer is option A and which B: ('current', 'revision'), or swapped by a coin that
    depends on (seed, item, iteration) only."""
    options = ("current", "revision")
    return (
        options[::-1]
        if randomised and Random(f"{seed}|{item_id}|{iteration}").random() < 0.5
        else options
    )


def judged(text, gold, is_right):
    """Does a text give the gold answer? None where it cannot be told: no gold answer, or a sentence
    of more than six words that is not given word for word."""
    if not gold:
        return None
    if " ".join(text.split()).strip(" .") == " ".join(gold.split()).strip(" ."):
        return True
    return None if len(gold.split()) > 6 else bool(is_right(text, gold))

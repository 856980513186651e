"""The critique - revise - decide loop: what a decision says, and what follows from it. Pure
functions, no model.

Volcano (arXiv 2311.07362), algorithm 1; docs/studies/volcano.md, section 3. The prompts are in
vlmdiag/scenes/questions.py; a decision is read by options.chosen(), here is what was published.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random


def decision_published(text: str) -> str | None:
    """As published: 'B' if there is any b in the answer, else 'A' if there is any a, else None."""
    text = text.lower()
    if "b" in text:
        return "B"
    return "A" if "a" in text else None


def order_of(seed: int, item_id: str, iteration: int, randomised: bool) -> tuple[str, str]:
    """Which answer is option A and which B: ('current', 'revision'), or swapped by a coin that
    depends on (seed, item, iteration) only."""
    if randomised and Random(f"{seed}|{item_id}|{iteration}").random() < 0.5:
        return "revision", "current"
    return "current", "revision"


def judged(text: str, gold: str | None, is_right: Callable[[str, str], object]) -> bool | None:
    """Does a text give the gold answer? None where it cannot be told: no gold answer, or a sentence
    of more than six words that is not given word for word."""
    if not gold:
        return None
    if " ".join(text.split()).strip(" .") == " ".join(gold.split()).strip(" ."):
        return True
    return None if len(gold.split()) > 6 else bool(is_right(text, gold))

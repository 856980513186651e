"""The six spatial relations, their three groups and the words for them: docs/studies/
swap_analysis.md, sections 1.4 to 1.8. The first category of a group is its canonical one."""

from __future__ import annotations

GROUPS = {
    "horizontal": ("left", "right"),
    "vertical": ("above", "under"),
    "distance": ("far", "close"),
}
CATEGORIES = tuple(category for pair in GROUPS.values() for category in pair)
GROUP_OF = {category: group for group, pair in GROUPS.items() for category in pair}
OPPOSITE = {
    "left": "right",
    "right": "left",
    "above": "under",
    "under": "above",
    "far": "close",
    "close": "far",
}
# s: +1 for the canonical category of a group, -1 for the other
SIGNS = {
    category: 1.0 if category == GROUPS[group][0] else -1.0 for category, group in GROUP_OF.items()
}
# strata of distance pairs: whether the farther object is higher in the picture
SPLITS = ("consistent", "counter", "ambiguous")
# what the prompt asks for where that is another word
SPELLED = {"under": "below"}
# other names of a category in tables and files
SYNONYMS = {"below": "under", "beneath": "under", "near": "close"}
# words of an answer that say a category
WORDS = {
    "left": ("left",),
    "right": ("right",),
    "above": ("above", "over"),
    "under": ("below", "under", "beneath", "underneath"),
    "far": ("far", "farther", "further", "distant"),
    "close": ("close", "closer", "near", "nearer", "nearby"),
}


def category_of(text: str) -> str | None:
    """One of CATEGORIES; below and beneath are under. None for anything else."""
    name = text.strip().rstrip(".").lower()
    if name in ("below", "beneath", "underneath"):
        return "under"
    return name if name in CATEGORIES else None

"""The pairs of token groups and the windows of layers that knockouts are made of. Kept free of
torch, for flags.

arXiv 2410.07149, table 2; docs/studies/llava_interp.md, section 2.9.
"""

from __future__ import annotations

from collections.abc import Sequence

from vlmdiag.cli import UsageError

Pair = tuple[str, str]  # keys that are hidden, queries they are hidden from
Window = tuple[int, int]  # first and last layer

PAPER_PAIRS: tuple[Pair, ...] = (
    ("object", "last_token"),
    ("object+1", "last_token"),
    ("object+2", "last_token"),
    ("other", "last_token"),
    ("object+1", "last_row"),
    ("image-last_row", "last_row"),
)
# of 32 layers
PAPER_WINDOWS: dict[str, Window] = {
    "early": (0, 9),
    "early_mid": (5, 14),
    "mid": (11, 20),
    "mid_late": (15, 24),
    "late": (21, 31),
    "all": (0, 31),
}
GROUP_NAMES = (
    "object",
    "object+1",
    "object+2",
    "other",
    "image",
    "image-last_row",
    "last_row",
    "question",
    "template",
    "last_token",
)
# names in the published results
PUBLISHED: dict[Pair, str] = {
    ("object", "last_token"): "PATCH_TO_LAST_TOK",
    ("object+1", "last_token"): "PATCH_PLUS_ONE_TO_LAST_TOK",
    ("object+2", "last_token"): "PATCH_PLUS_TWO_TO_LAST_TOK",
    ("other", "last_token"): "ALL_MINUS_PATCH",
    ("object+1", "last_row"): "PATCH_PLUS_ONE_TO_LAST_ROW",
    ("image-last_row", "last_row"): "PATCH_TO_LAST_ROW",
}


def parse_pair(text: str) -> Pair:
    """'object+1:last_token' -> (keys that are hidden, queries they are hidden from)."""
    source, _, target = text.partition(":")
    if source not in GROUP_NAMES or target not in GROUP_NAMES:
        raise UsageError(
            f"--pairs {text}: FROM:TO was wanted, each one of {', '.join(GROUP_NAMES)}"
        )
    return source, target


def layer_windows(names: Sequence[str], layers: int) -> dict[str, Window]:
    """{name: (first, last)} inclusive. names: of PAPER_WINDOWS, scaled from 32 layers to `layers`;
    'a-b'; 'sliding:width[:stride]'; 'single' (each layer). UsageError for another name."""
    windows: dict[str, Window] = {}
    for name in names:
        if name in PAPER_WINDOWS:
            first, last = PAPER_WINDOWS[name]
            first = round(first * layers / 32)
            windows[name] = first, max(first, round((last + 1) * layers / 32) - 1)
        elif name == "single" or name.startswith("sliding:"):
            windows |= _sliding(name, layers)
        else:
            windows[name] = _from_to(name, layers)
    return windows


def _sliding(name: str, layers: int) -> dict[str, Window]:
    width, stride = 1, 1
    if name != "single":
        numbers = [_number(text) for text in name.split(":")[1:]]
        width, stride = (*numbers, 1)[:2]
    if not 1 <= width <= layers or stride < 1:
        raise UsageError(f"--windows {name}: the model has {layers} layers")
    starts = range(0, layers - width + 1, stride)
    return {f"{start}-{start + width - 1}": (start, start + width - 1) for start in starts}


def _from_to(name: str, layers: int) -> Window:
    ends = [_number(text) for text in name.split("-")]
    if len(ends) != 2 or not 0 <= ends[0] <= ends[1] < layers:
        raise UsageError(
            f"--windows {name}: one of {', '.join(PAPER_WINDOWS)}, a-b with 0 <= a <= b <"
            f" {layers}, single, sliding:width[:stride]"
        )
    return ends[0], ends[1]


def _number(text: str) -> int:
    return int(text) if text.isdecimal() else -1

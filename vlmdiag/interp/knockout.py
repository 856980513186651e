"""Attention knockout: which queries may not see which keys, in which layers. arXiv 2410.07149,
section 2.9 of our study. Pure functions, tested without a model, but for those that build
capturing.Block."""

import numpy as np
import torch

from vlmdiag.cli import UsageError
from vlmdiag.groups import GROUPS
from vlmdiag.model.attention import Block

PAPER_PAIRS = (
    ("object", "last_token"),
    ("object+1", "last_token"),
    ("object+2", "last_token"),
    ("other", "last_token"),
    ("object+1", "last_row"),
    ("image-last_row", "last_row"),
)
PAPER_WINDOWS = {
    "early": (0, 9),
    "early_mid": (5, 14),
    "mid": (11, 20),
    "mid_late": (15, 24),
    "late": (21, 31),
    "all": (0, 31),
}  # of 32 layers, inclusive
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
PUBLISHED = {
    ("object", "last_token"): "PATCH_TO_LAST_TOK",
    ("object+1", "last_token"): "PATCH_PLUS_ONE_TO_LAST_TOK",
    ("object+2", "last_token"): "PATCH_PLUS_TWO_TO_LAST_TOK",
    ("other", "last_token"): "ALL_MINUS_PATCH",
    ("object+1", "last_row"): "PATCH_PLUS_ONE_TO_LAST_ROW",
    ("image-last_row", "last_row"): "PATCH_TO_LAST_ROW",
}


def layer_windows(names, layers):
    """{name: (first, last)} inclusive. names: of PAPER_WINDOWS, scaled from 32 layers to `layers`;
    'a-b'; 'sliding:width[:stride]'; 'single' (each layer)."""
    found = {}
    for name in names:
        if name in PAPER_WINDOWS:
            first, last = PAPER_WINDOWS[name]
            first = round(first * layers / 32)
            found[name] = first, max(first, round((last + 1) * layers / 32) - 1)
        elif name == "single" or name.startswith("sliding:"):
            numbers = [1, 1] if name == "single" else [*map(_number, name.split(":")[1:]), 1][:2]
            width, stride = numbers
            if not 1 <= width <= layers or stride < 1:
                raise UsageError(f"--windows {name}: the model has {layers} layers")
            found |= {
                f"{a}-{a + width - 1}": (a, a + width - 1)
                for a in range(0, layers - width + 1, stride)
            }
        else:
            first, last = (
                [*map(_number, name.split("-")), None] if name.count("-") == 1 else [None, None]
            )[:2]
            if first is None or last is None or not 0 <= first <= last < layers:
                raise UsageError(
                    f"--windows {name}: one of {', '.join(PAPER_WINDOWS)}, a-b with 0 <= a <= b <"
                    f" {layers}, single, sliding:width[:stride]"
                )
            found[name] = first, last
    return found


def _number(text):
    return int(text) if text.isdecimal() else -1


def parse_pair(text):
    """'object+1:last_token' -> (keys that are hidden, queries they are hidden from)."""
    parts = tuple(text.split(":"))
    if len(parts) != 2 or not set(parts) <= set(GROUP_NAMES):
        raise UsageError(
            f"--pairs {text}: FROM:TO was wanted, each one of {', '.join(GROUP_NAMES)}"
        )
    return parts


def last_row(grid):
    """Indices of the vision tokens of the grid's last row: the tokens whose boxes reach lowest
    (where a grid has tiles, of the lowest row of tiles)."""
    if grid.shape is not None:
        rows, columns = grid.shape
        return np.arange((rows - 1) * columns, rows * columns)
    bottoms, heights = grid.boxes[:, 3], grid.boxes[:, 3] - grid.boxes[:, 1]
    return np.flatnonzero(bottoms > np.nanmax(bottoms) - np.nanmin(heights) / 2)


def positions_of(groups, grid, patches):
    """{group name: positions (n,) in the prompt} for one prompt. groups (T,) codes of
    common.GROUPS; patches {b: vision-token indices of object + b buffers}.

    'other' is the image without object + 1 buffer, 'question' the user's text, 'template' the role
    words (with an answer's given beginning).
    """
    vision = np.flatnonzero(groups == GROUPS.index("vision"))
    row = last_row(grid)
    return {
        "object": vision[patches[0]],
        "object+1": vision[patches[1]],
        "object+2": vision[patches[2]],
        "image": vision,
        "last_row": vision[row],
        "other": vision[np.setdiff1d(np.arange(len(vision)), patches[1])],
        "image-last_row": vision[np.setdiff1d(np.arange(len(vision)), row)],
        "question": np.flatnonzero(groups == GROUPS.index("user")),
        "template": np.flatnonzero(groups == GROUPS.index("template")),
        "last_token": np.array([len(groups) - 1]),
    }


def blocks_for(positions, pairs, windows, length):
    """{(from, to, window): Block} for one prompt of `length` tokens; a pair without a key before a
    query blocks nothing and is left out."""
    found = {}
    for source, target in pairs:
        keys, queries = positions[source], positions[target]
        if not len(keys) or not len(queries) or keys.min() > queries.max():
            continue
        rows = [torch.zeros(1, length, dtype=torch.bool) for _ in range(2)]
        for row, some in zip(rows, (queries, keys)):
            row[0, torch.from_numpy(some)] = True
        found |= {
            (source, target, name): Block(*rows, frozenset(range(a, b + 1)))
            for name, (a, b) in windows.items()
        }
    return found

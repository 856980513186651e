"""How files name layers: "left_L3" in JSON, "orig_L3" in an NPZ, and back. The only place that
spells these keys and takes them apart; everywhere else a layer is a number."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from vlmdiag.types import Fields, Record

# {(series, layer): what is measured}; series "" where there is one only
Cells = dict[tuple[str, int], Any]


def key_of(series: str, layer: int) -> str:
    """A key such as "left_L3", or "L3" for the series ""."""
    return f"{series}_L{layer}" if series else f"L{layer}"


def spelled(cells: Cells) -> Record:
    """{key: cell}, as JSON holds it."""
    return {key_of(series, layer): cell for (series, layer), cell in cells.items()}


def taken_apart(content: Fields) -> Cells:
    """The cells of a file with keys "series_L3", "L3" or "3" (series ""), other keys left out."""
    cells: Cells = {}
    for key, cell in content.items():
        match = re.fullmatch(r"(?:(.+)_)?L?(\d+)", key)
        if match:
            cells[match[1] or "", int(match[2])] = cell
    return cells


def layers_of(names: Iterable[str], series: str) -> list[int]:
    """The layers of one series among names such as those of the arrays of an NPZ, sorted."""
    matches = (re.fullmatch(rf"{re.escape(series)}_L(\d+)", name) for name in names)
    return sorted(int(match[1]) for match in matches if match)

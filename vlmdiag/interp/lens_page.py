"""The interactive page of a logit lens: one HTML file that works offline and holds picture, boxes
and the top tokens of every position in every layer.

Needs neither torch nor a model. lens_page.html is the template: CSS and script inline, placeholders
@@NAME@@. Whatever comes from outside (tokens, prompt, names) is in JSON blocks, which a browser
does not run, and is shown through textContent; the policy in the head allows the template's own
style and script only.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from vlmdiag.figures.layers import state_name, state_tick
from vlmdiag.pictures.mosaic import Mosaic
from vlmdiag.runs import disk
from vlmdiag.types import Record

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from numpy.typing import ArrayLike

    from vlmdiag.pictures.grid import PatchGrid

TEMPLATE = Path(__file__).with_name("lens_page.html")
OVERVIEW = Path(__file__).with_name("lens_overview.html")
LONGER_SIDE = 1000  # pixels of the embedded picture
THUMBNAIL_BYTES = 6000  # of the overview's picture, as data URI
# side and JPEG quality of a thumbnail, tried until it is small enough
THUMBNAILS = ((160, 80), (160, 60), (160, 35), (96, 50), (64, 35), (32, 30))
HEAD_TEXT = 2000  # characters of each fact in the head
HEAD_BYTES = 1 << 18  # the facts end within these
SCHEMA = 3  # of pages: 1 called the embeddings layer 0, 2 had no answer
HEAD_FACTS = ("title", "model", "picture", "prompt", "question")
FACTS = re.compile(rb'<script type="application/json" id="facts">(.*?)</script>', re.DOTALL)


def write_page(
    path: str | Path,
    image: Image.Image,
    grid: PatchGrid | None,
    labels: Sequence[str],
    groups: Sequence[str],
    ids: Int[np.ndarray, "L+1 T k"],
    probs: Float[np.ndarray, "L+1 T k"],
    vocabulary: Mapping[int, str],
    facts: Mapping[str, object],
    turns: Sequence[int] | None = None,
    answer: Sequence[str] = (),
) -> Path:
    """Write the page of one picture and prompt to path, in one step; equal input gives equal bytes.

    image: RGB; grid: None if the places of the vision tokens are unknown. labels: the prompt's
    token at each position; groups: group names, 'vision' in the order of the grid's boxes. ids,
    probs: entry 0 = embeddings, l + 1 = after layer l. vocabulary: {id: string} with every id that
    occurs; facts: {name: string or number}, shown as a table; title, model, picture, prompt and
    question also go to the overview. turns: of a conversation the turn of each position, -1 before
    the first. answer: the answer's tokens; all but the last, which the model did not read, are the
    last positions too, and the first is what the position before them predicts. A grid of several
    pictures is a Mosaic. ValueError where these do not fit.
    """
    ids, probs = np.asarray(ids), np.asarray(probs)
    _check(ids, probs, labels, groups, grid, image)
    used, local = np.unique(ids, return_inverse=True)
    missing = [int(id) for id in used if int(id) not in vocabulary]
    if missing:
        raise ValueError(f"{len(missing)} ids are not in the vocabulary, the first is {missing[0]}")
    names = sorted(set(groups))
    shown = {str(name): _shown(value) for name, value in facts.items()}
    is_wide = len(used) > 1 << 16
    data: Record = {
        "shape": ids.shape,
        "states": [state_name(state) for state in range(len(ids))],
        "ticks": [state_tick(state) for state in range(len(ids))],
        "labels": [str(label) for label in labels],
        "groups": names,
        "group": [names.index(group) for group in groups],
        "vocabulary": [str(vocabulary[int(id)]) for id in used],
        "vocabulary_ids": used.tolist(),
        "wide": is_wide,
        "ids": _base64(local, "<u4" if is_wide else "<u2"),
        "probs": _base64(probs, "<f4"),
        "boxes": None if grid is None else _base64(grid.boxes, "<f4"),
        "grid": None if grid is None else grid.shape,
        "size": image.size,
        "facts": list(shown.items()),
        "picture": picture_uri(image),
        "answer": [str(token) for token in answer],
    }
    if isinstance(grid, Mosaic):
        data["pictures"] = [[len(part.boxes), part.shape] for part, _ in grid.parts]
    if turns is not None:
        data["turns"] = list(turns)
    head: Record = {name: str(shown.get(name, ""))[:HEAD_TEXT] for name in HEAD_FACTS}
    known = " · ".join(head[name] for name in ("picture", "model") if head[name])
    head["schema"] = SCHEMA
    head["title"] = head["title"] or known or Path(path).stem
    head["top_words"] = top_words(ids, groups, vocabulary)
    head["thumbnail"] = thumbnail_uri(image)
    values = {
        "TITLE": html.escape(head["title"]),
        "FACTS": json_block(head),
        "DATA": json_block(data),
    }
    return write_html(path, TEMPLATE.read_text(encoding="utf-8"), values)


def _check(
    ids: Int[np.ndarray, "L+1 T k"],
    probs: Float[np.ndarray, "L+1 T k"],
    labels: Sequence[str],
    groups: Sequence[str],
    grid: PatchGrid | None,
    image: Image.Image,
) -> None:
    """ValueError where the sizes of what a page shows do not fit."""
    is_shaped = ids.ndim == 3 and ids.shape == probs.shape and ids.size > 0
    if not is_shaped or not ids.shape[1] == len(labels) == len(groups):
        raise ValueError(
            f"ids {ids.shape}, probs {probs.shape}, {len(labels)} labels, {len(groups)} groups;"
            " wanted (L+1, T, k) twice, T labels and T groups"
        )
    tokens = list(groups).count("vision")
    if grid is not None and (len(grid.boxes) != tokens or tuple(grid.size) != image.size):
        raise ValueError(
            f"{len(grid.boxes)} boxes over {tuple(grid.size)} pixels for {tokens} vision tokens and"
            f" a picture of {image.size}; the grid belongs to another prompt or picture"
        )


def _shown(value: object) -> str | int | float:
    """A fact as JSON holds it."""
    if isinstance(value, (int, float)) and math.isfinite(value):
        return value
    return str(value)


def top_words(
    ids: Int[np.ndarray, "L+1 T k"],
    groups: Sequence[str],
    vocabulary: Mapping[int, str],
    count: int = 8,
) -> list[tuple[str, int]]:
    """[[word, n]]: the words that are top 1 at most image positions n, in any of the last quarter
    of the layers. Case and spaces ignored."""
    layers = max(1, (len(ids) - 1) // 4)
    in_picture = [group == "vision" for group in groups]
    likeliest = np.asarray(ids)[-layers:, in_picture, 0]
    counts: Counter[str] = Counter()
    for position in likeliest.T:
        words = {str(vocabulary[int(id)]).lstrip("▁Ġ ").strip().lower() for id in position}
        counts.update(word for word in words if _is_word(word))
    by_count = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return by_count[:count]


def _is_word(text: str) -> bool:
    """A word with a letter; of one character only where that says something, as in Chinese."""
    is_spelled = re.fullmatch(r"\w[\w'’-]*", text) and re.search(r"[^\W\d_]", text)
    return bool(is_spelled) and (len(text) > 1 or not text.isascii())


def read_facts(path: str | Path) -> Record:
    """The facts in the head of a page, {} if it is not one of ours. Reads the head only."""
    try:
        with open(path, "rb") as file:
            match = FACTS.search(file.read(HEAD_BYTES))
        facts = json.loads(match[1]) if match else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return facts if isinstance(facts, dict) else {}


# --- pictures -------------------------------------------------------------------------------------


def picture_uri(image: Image.Image, longer_side: int = LONGER_SIDE) -> str:
    """A picture as data URI, scaled down to longer_side, PNG or JPEG, whichever is smaller."""
    scaled = _scaled(image, longer_side)
    png, jpeg = io.BytesIO(), io.BytesIO()
    scaled.save(png, "PNG", optimize=True)
    scaled.save(jpeg, "JPEG", quality=90, subsampling=0)
    if len(jpeg.getvalue()) <= len(png.getvalue()):
        return _data_uri("jpeg", jpeg.getvalue())
    return _data_uri("png", png.getvalue())


def thumbnail_uri(image: Image.Image) -> str:
    """A small JPEG as data URI of at most THUMBNAIL_BYTES."""
    uri = ""
    for side, quality in THUMBNAILS:
        buffer = io.BytesIO()
        _scaled(image, side).save(buffer, "JPEG", quality=quality)
        uri = _data_uri("jpeg", buffer.getvalue())
        if len(uri) <= THUMBNAIL_BYTES:
            break
    return uri


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _scaled(image: Image.Image, longer_side: int) -> Image.Image:
    image = image.convert("RGB")
    scale = min(1, longer_side / max(image.size))
    if scale == 1:
        return image
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


# --- HTML -----------------------------------------------------------------------------------------


def json_block(value: object) -> str:
    """JSON that can stand in any <script> element: pure ASCII, and neither < nor > nor &."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def policy(template: str, frames: str = "") -> str:
    """Content-Security-Policy of a template: nothing but its own style and script, by hash, and
    data: pictures. frames: sources of inner frames."""

    def hashes(tag: str) -> str:
        quoted = []
        for content in re.findall(rf"<{tag}>(.*?)</{tag}>", template, re.DOTALL):
            digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
            quoted.append(f"'sha256-{digest}'")
        return " ".join(quoted)

    frame = f"frame-src {frames}; " if frames else ""
    own = f"style-src {hashes('style')}; script-src {hashes('script')}; img-src data:"
    return (
        f"default-src 'none'; {own}; {frame}base-uri 'none'; form-action 'none';"
        " require-trusted-types-for 'script'; trusted-types 'none'"
    )


def write_html(
    path: str | Path, template: str, values: Mapping[str, str], frames: str = ""
) -> Path:
    """Fill the placeholders @@NAME@@ of a template in a single pass, so that data naming one stays
    as it is, and put the file at path in one step. UsageError where it cannot be written.

    Not Jinja: values are JSON blocks and one escaped title, and the policy is a hash of the
    template's own script, which may not change when it is filled.
    """
    filled = {"POLICY": policy(template, frames), **values}
    text = re.sub("@@([A-Z]+)@@", lambda match: filled[match[1]], template)
    disk.write_bytes(path, text.encode("utf-8", "replace"))
    return Path(path)


def _base64(array: ArrayLike, dtype: str) -> str:
    return base64.b64encode(np.ascontiguousarray(array, dtype).tobytes()).decode()

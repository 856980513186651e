"""The interactive page of a logit lens: one HTML file that works offline and holds picture, boxes
and the top tokens of every position in every layer.

Needs neither torch nor a model. page.html is the template: CSS and script inline, placeholders
@@NAME@@. Whatever comes from outside (tokens, prompt, names) is in JSON blocks, which a browser
does not run, and is shown through textContent; the policy in the head allows the template's own
style and script only.
"""

import base64
import hashlib
import html
import io
import itertools
import json
import math
import os
import re
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from vlmdiag.cli import UsageError

TEMPLATE = Path(__file__).with_name("lens_page.html")
LONGER_SIDE = 1000  # pixels of the embedded picture
THUMBNAIL_SIDE, THUMBNAIL_BYTES = 160, 6000  # of the overview's picture, as data URI
HEAD_TEXT = 2000  # characters of each fact in the head
HEAD_BYTES = 1 << 18  # the facts end within these
_numbers = itertools.count()


def write_page(path, image, grid, labels, groups, ids, probs, vocabulary, facts):
    """Write the page of one picture and prompt to path, in one step; equal input gives equal bytes.

    image: PIL RGB; grid: PatchGrid, or None if the places of the vision tokens are unknown. labels:
    T strings, the prompt's token at each position; groups: T group names, 'vision' in the order of
    the grid's boxes. ids (L+1, T, k) int, vocabulary ids; probs (L+1, T, k) float; entry 0 =
    embeddings, l = after block l. vocabulary: {id: string} with every id that occurs; facts: {name:
    string or number}, shown as a table; title, model, picture, prompt and question also go to the
    overview."""
    ids, probs, groups, labels = np.asarray(ids), np.asarray(probs), list(groups), list(labels)
    vision = [position for position, group in enumerate(groups) if group == "vision"]
    if (
        ids.ndim != 3
        or ids.shape != probs.shape
        or ids.shape[1] != len(labels)
        or len(labels) != len(groups)
        or not ids.size
    ):
        sizes = f"ids {ids.shape}, probs {probs.shape}, {len(labels)} labels, {len(groups)} groups"
        raise ValueError(f"{sizes}; wanted (L+1, T, k) twice, T labels and T groups")
    if grid is not None and (len(grid.boxes) != len(vision) or tuple(grid.size) != image.size):
        found = (
            f"{len(grid.boxes)} boxes over {tuple(grid.size)} pixels for {len(vision)} vision"
            f" tokens and a picture of {image.size}"
        )
        raise ValueError(f"{found}; the grid belongs to another prompt or picture")
    used, local = np.unique(ids, return_inverse=True)
    missing = [int(id) for id in used if int(id) not in vocabulary]
    if missing:
        raise ValueError(f"{len(missing)} ids are not in the vocabulary, the first is {missing[0]}")
    names = sorted(set(groups))
    shown = {
        str(name): value if isinstance(value, int | float) and math.isfinite(value) else str(value)
        for name, value in facts.items()
    }
    data = {
        "shape": ids.shape,
        "labels": [str(label) for label in labels],
        "groups": names,
        "group": [names.index(group) for group in groups],
        "vocabulary": [str(vocabulary[int(id)]) for id in used],
        "vocabulary_ids": used.tolist(),
        "wide": len(used) > 1 << 16,
        "ids": _base64(local, "<u4" if len(used) > 1 << 16 else "<u2"),
        "probs": _base64(probs, "<f4"),
        "boxes": None if grid is None else _base64(grid.boxes, "<f4"),
        "grid": None if grid is None else grid.shape,
        "size": image.size,
        "facts": list(shown.items()),
        "picture": picture_uri(image),
    }
    head = {
        name: str(shown.get(name, ""))[:HEAD_TEXT]
        for name in ("title", "model", "picture", "prompt", "question")
    }
    head["title"] = (
        head["title"]
        or " · ".join(head[name] for name in ("picture", "model") if head[name])
        or Path(path).stem
    )
    head |= {"top_words": top_words(ids, groups, vocabulary), "thumbnail": thumbnail_uri(image)}
    values = {
        "TITLE": html.escape(head["title"]),
        "FACTS": json_block(head),
        "DATA": json_block(data),
    }
    return write_html(path, TEMPLATE.read_text(encoding="utf-8"), values)


def top_words(ids, groups, vocabulary, count=8):
    """[[word, n]]: the words that are top 1 at most image positions n, in any of the last quarter
    of the layers. ids (L+1, T, k); case and spaces ignored."""
    last = np.asarray(ids)[
        -max(1, (len(ids) - 1) // 4) :, [group == "vision" for group in groups], 0
    ]
    counts = Counter()
    for position in last.T:
        words = {str(vocabulary[int(id)]).lstrip("▁Ġ ").strip().lower() for id in position}
        counts.update(
            word
            for word in words
            if re.fullmatch(r"\w[\w'’-]*", word)
            and re.search(r"[^\W\d_]", word)
            and (len(word) > 1 or not word.isascii())
        )
    return [
        [word, n]
        for word, n in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:count]
    ]


def read_facts(path):
    """The facts in the head of a page, {} if it is not one of ours. Reads the head only."""
    try:
        with open(path, "rb") as file:
            found = re.search(
                rb'<script type="application/json" id="facts">(.*?)</script>',
                file.read(HEAD_BYTES),
                re.DOTALL,
            )
        facts = json.loads(found[1]) if found else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return facts if isinstance(facts, dict) else {}


# --- pictures -------------------------------------------------------------------------------------


def picture_uri(image, longer_side=LONGER_SIDE):
    """A picture as data URI, scaled down to longer_side, PNG or JPEG, whichever is smaller."""
    image = _scaled(image, longer_side)
    png, jpeg = io.BytesIO(), io.BytesIO()
    image.save(png, "PNG", optimize=True)
    image.save(jpeg, "JPEG", quality=90, subsampling=0)
    kind, data = min(
        ("jpeg", jpeg.getvalue()), ("png", png.getvalue()), key=lambda pair: len(pair[1])
    )
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def thumbnail_uri(image):
    """A small JPEG as data URI of at most THUMBNAIL_BYTES."""
    for side, quality in (
        (THUMBNAIL_SIDE, 80),
        (THUMBNAIL_SIDE, 60),
        (THUMBNAIL_SIDE, 35),
        (96, 50),
        (64, 35),
        (32, 30),
    ):
        buffer = io.BytesIO()
        _scaled(image, side).save(buffer, "JPEG", quality=quality)
        uri = f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        if len(uri) <= THUMBNAIL_BYTES:
            break
    return uri


def _scaled(image, longer_side):
    image, scale = image.convert("RGB"), min(1, longer_side / max(image.size))
    return (
        image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS)
        if scale < 1
        else image
    )


# --- HTML -----------------------------------------------------------------------------------------


def json_block(value):
    """JSON that can stand in any <script> element: pure ASCII, and neither < nor > nor &."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def policy(template, frames=""):
    """Content-Security-Policy of a template: nothing but its own style and script, by hash, and
    data: pictures. frames: sources of inner frames."""

    def hashes(tag):
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", template, re.DOTALL)
        return " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
            for text in found
        )

    frame = f"frame-src {frames}; " if frames else ""
    own = f"style-src {hashes('style')}; script-src {hashes('script')}; img-src data:"
    return (
        f"default-src 'none'; {own}; {frame}base-uri 'none'; form-action 'none';"
        " require-trusted-types-for 'script'; trusted-types 'none'"
    )


def write_html(path, template, values, frames=""):
    """Fill the placeholders @@NAME@@ of a template in a single pass, so that data naming one stays
    as it is, and put the file at path in one step."""
    values = {"POLICY": policy(template, frames)} | values
    text = re.sub("@@([A-Z]+)@@", lambda match: values[match[1]], template)
    path = Path(path)
    temporary = path.with_name(f".{os.getpid()}-{next(_numbers)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(text.encode("utf-8", "replace"))
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UsageError(f"cannot write {path}: {error.strerror or error}") from error
    return path


def _base64(array, dtype):
    return base64.b64encode(np.ascontiguousarray(array, dtype).tobytes()).decode()

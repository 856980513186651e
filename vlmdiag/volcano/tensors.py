"""What run_volcano_with_image_attention.py --output-visualization-tensors keeps of one instance,
and which tokens of a text a span means.

<input_dir>/<index>_<image id>/ holds visualization_tensors.npz (boxes of the vision tokens; of each
text the attention of the step that predicted token t, the K largest over layers) and tokens.json.
Volcano (arXiv 2311.07362); docs/studies/volcano.md, sections 1.2, 1.3 and 2.2 to 2.8. Needs neither
torch nor a model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vlmdiag.cli import UsageError
from vlmdiag.pictures.grid import PatchGrid
from vlmdiag.runs import disk
from vlmdiag.types import Record
from vlmdiag.volcano.maps import counted, pool_heads

if TYPE_CHECKING:
    from jaxtyping import Float

Arrays = dict[str, "np.ndarray"]
Span = tuple[int, int]  # characters, from start to end

SCHEMA = 1
STAGES = {"initial": "initial response", "feedback": "feedback", "revision": "revision"}
STEPS_AT_ONCE = 64  # bounds the memory of pooling a long text
AGAIN = (
    "delete its folder and run run_volcano_with_image_attention.py --output-visualization-tensors"
    " again"
)


# ---- the files ----


@dataclass(frozen=True)
class Stage:
    """One text of the loop, of T tokens."""

    name: str
    text: str
    tokens: list[str]  # pieces, special tokens as written
    spans: list[Span]  # the characters that a token stands for, empty for special tokens
    ended: bool  # the last token is the stop token
    prompt: str
    # attention of the step that predicted token t to vision token p, the K largest over layers,
    # largest first
    topk: Float[np.ndarray, "T K H P"]

    @property
    def steps(self) -> int:
        """Tokens that count: all but the stop token."""
        return counted(len(self.tokens), self.ended)

    def pieces(self) -> list[str]:
        """What to show of each token: every character of the text once, special tokens as written,
        a dot for the further bytes of one character."""
        shown = []
        done = 0  # characters that are shown
        for token, (start, end) in zip(self.tokens, self.spans):
            piece = self.text[max(start, done) : end] if end > start else token
            shown.append(piece or "\N{MIDDLE DOT}")
            done = max(done, end)
        return shown


@dataclass(frozen=True)
class Instance:
    """One question of a list. stages: {name: Stage}, feedback and revision of the last accepted
    iteration, or of the last one, or absent, if none was."""

    folder: Path
    index: int
    image_id: str
    image: str
    question: str
    gold_answer: str
    model: str
    hidden_top_k: int
    grid: PatchGrid
    vision_encoder: dict[str, int | None]
    accepted: list[int]  # numbers of the accepted iterations
    stages: dict[str, Stage]

    def title(self, name: str) -> str:
        """'initial response', 'feedback' or 'revision', and whether the model refused it."""
        if name == "initial" or self.accepted:
            return STAGES[name]
        return f"{STAGES[name]} (not accepted)"

    def missing(self) -> str | None:
        """One line that says which texts are not there, or None."""
        absent = [title for name, title in STAGES.items() if name not in self.stages]
        if not absent:
            return None
        return (
            f"{' and '.join(absent)} of instance {self.index}: not stored, because no revision was"
            " accepted"
        )


def read_instance(input_dir: str | Path, index: int) -> Instance:
    """The instance with exactly this index. UsageError: no or several such folders, a file that is
    missing, broken or of another version."""
    root = Path(input_dir)
    if not root.is_dir():
        raise UsageError(
            f"{root}: no such folder; make it with run_volcano_with_image_attention.py"
            f" --output-visualization-tensors --output-dir {root}"
        )
    folders = sorted(
        path for path in root.iterdir() if path.is_dir() and re.match(r"\d+_", path.name)
    )
    of_index = [path for path in folders if int(path.name.split("_")[0]) == index]
    if len(of_index) != 1:
        there = [path.name for path in of_index or folders]
        raise UsageError(
            f"{root}: {'several folders' if of_index else 'no folder'} of instance {index}; there"
            f" {'are' if there else 'is'} {', '.join(there) or 'no folder of an instance'}"
        )
    folder = of_index[0]
    record = _read_record(folder / "tokens.json")
    arrays = _read_arrays(folder / "visualization_tensors.npz")
    try:
        return _checked(folder, record, arrays, index)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise UsageError(
            f"{folder}: tokens.json and visualization_tensors.npz do not hold what was wanted"
            f" ({reason}); {AGAIN}"
        ) from error


def _read_record(path: Path) -> Record:
    try:
        record = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise UsageError(f"{path}: no such file; {AGAIN}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not readable JSON ({error}); {AGAIN}") from error
    schema = record.get("schema") if isinstance(record, dict) else None
    if schema != SCHEMA:
        raise UsageError(
            f"{path} has schema {schema!r} where {SCHEMA} was wanted: another version of these"
            f" tools wrote it; {AGAIN}"
        )
    return dict(record)


def _read_arrays(path: Path) -> Arrays:
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            names = [name for name in archive.files if name == "boxes" or name.endswith("_topk")]
            disk.check_size(archive, names)
            return {name: archive[name] for name in names}
    except FileNotFoundError as error:
        raise UsageError(f"{path}: no such file; {AGAIN}") from error
    except disk.BROKEN as error:
        raise UsageError(
            f"{path} cannot be read ({type(error).__name__}: {error}); {AGAIN}"
        ) from error


def _checked(folder: Path, record: Record, arrays: Arrays, index: int) -> Instance:
    """The instance of a record and its arrays; KeyError, TypeError or ValueError say what does not
    fit."""
    if record["index"] != index:
        raise ValueError(f"tokens.json is of instance {record['index']}")
    grid = _grid(record, arrays)
    stages = {
        name: _stage(name, record["stages"][name], arrays, len(grid.boxes), record["hidden_top_k"])
        for name in STAGES
        if record["stages"].get(name) is not None
    }
    of_tokens = {f"{name}_topk" for name in stages} | {"boxes"}
    unpaired = [name for name in arrays if name not in of_tokens]
    if unpaired:
        raise ValueError(f"{unpaired[0]} without its tokens")
    if "initial" not in stages:
        raise ValueError("stages without initial")

    def text_of(name: str) -> str:
        return _sound(str(record[name] if record[name] is not None else ""))

    return Instance(
        folder,
        index,
        image_id=text_of("image_id"),
        image=text_of("image"),
        question=text_of("question"),
        gold_answer=text_of("gold_answer"),
        model=text_of("model"),
        hidden_top_k=int(record["hidden_top_k"]),
        grid=grid,
        vision_encoder=record.get("vision_encoder") or {},
        accepted=list(record["accepted"]),
        stages=stages,
    )


def _grid(record: Record, arrays: Arrays) -> PatchGrid:
    """The grid of the vision tokens; without boxes where it is unknown."""
    if not record["grid"]:
        patches = arrays["initial_topk"].shape[-1]
        return PatchGrid(np.full((patches, 4), np.nan), None, (0, 0))
    boxes = np.asarray(arrays["boxes"], float)
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"boxes of shape {boxes.shape}, (P, 4) was wanted")
    width, height = map(int, record["grid"]["size"])
    shape = record["grid"]["shape"]
    if shape is None:
        return PatchGrid(boxes, None, (width, height))
    shape = tuple(map(int, shape))
    count = int(np.prod(shape))
    is_regular = len(shape) == 2 and min(shape) >= 1 and count <= len(boxes)
    if not is_regular or np.isnan(boxes[:count]).any():
        raise ValueError(
            f"a grid of {shape} for {len(boxes)} vision tokens of which"
            f" {int((~np.isnan(boxes[:, 0])).sum())} have a box"
        )
    return PatchGrid(boxes, shape, (width, height))


def _stage(name: str, entry: Record, arrays: Arrays, patches: int, k: int) -> Stage:
    topk = arrays[f"{name}_topk"]
    tokens = [_sound(token) for token in entry["tokens"]]
    text = _sound(entry["text"])
    spans = [(int(start), int(end)) for start, end in entry["spans"]]
    wanted = (len(tokens), k, topk.shape[2] if topk.ndim == 4 else "H", patches)
    if topk.shape != wanted or topk.dtype.kind != "f" or len(spans) != len(tokens):
        raise ValueError(
            f"{name}: {topk.dtype} of shape {topk.shape} and {len(spans)} spans for {len(tokens)}"
            f" tokens, wanted {wanted}"
        )
    is_sorted = not (topk[:, 1:] > topk[:, :-1]).any()
    if not np.isfinite(topk).all() or (topk < 0).any() or not is_sorted:
        raise ValueError(
            f"{name}: attention that is not finite, negative, or not sorted by layer; was the model"
            " run in float16?"
        )
    if any(not 0 <= start <= end <= len(text) for start, end in spans):
        raise ValueError(f"{name}: spans outside the text of {len(text)} characters")
    ended = bool(entry["ended"]) and bool(tokens)
    prompt = _sound(entry.get("prompt") or "")
    return Stage(name, text, tokens, spans, ended, prompt, topk)


def _sound(text: str) -> str:
    """Text that UTF-8 can hold, of the same length: a lone surrogate becomes '?'."""
    return text.encode("utf-8", "replace").decode()


# ---- attention of tokens ----


def token_maps(instance: Instance, name: str, k: int) -> Float[np.ndarray, "T P"]:
    """c of a stage: mean of the k largest over layers, then heads. UsageError for a k that the file
    or the model cannot give."""
    topk = instance.stages[name].topk
    if k > instance.hidden_top_k:
        raise UsageError(
            f"--hidden-top-k {k}: {instance.folder} holds the {instance.hidden_top_k} largest over"
            " layers; give at most that or run the model again"
        )
    if k > topk.shape[2]:
        raise UsageError(f"--hidden-top-k {k}: the model has {topk.shape[2]} heads")
    pooled = [
        pool_heads(topk[start : start + STEPS_AT_ONCE], k)
        for start in range(0, len(topk), STEPS_AT_ONCE)
    ]
    return np.concatenate(pooled) if pooled else np.zeros((0, topk.shape[3]))


def token_weights(maps: Float[np.ndarray, "T P"]) -> Float[np.ndarray, " T"]:
    """w = mean over p of c[t, p]: how strongly the step that predicted token t looked at the
    picture. maps: of token_maps()."""
    return maps.mean(1)


def strongest_spans(
    weights: Float[np.ndarray, " n"], tokens: Sequence[str], count: int, length: int
) -> list[tuple[int, int]]:
    """Token ranges (start, end) with the largest mean weight, strongest first, not overlapping: at
    most `count`, of `length` tokens each or a shorter text.

    weights: of the tokens that count. Ranges of white space alone cannot be named and are left out.
    """
    length = min(length, len(weights))

    def is_named(start: int) -> bool:
        return any(token.strip() for token in tokens[start : start + length])

    def mean_weight(start: int) -> float:
        return float(np.mean(weights[start : start + length]))

    starts = [start for start in range(len(weights) - length + 1) if is_named(start)]
    chosen: list[tuple[int, int]] = []
    for start in sorted(starts, key=mean_weight, reverse=True):
        if len(chosen) < count and all(abs(start - other) >= length for other, _ in chosen):
            chosen.append((start, start + length))
    return chosen


# ---- spans ----


def split_target(target: str) -> list[str]:
    r"""The pieces of a comma list, without white space around them; \, is a comma and \\ a
    backslash."""
    pieces = [""]
    for escaped, plain in re.findall(r"\\([\\,])|(.)", target, re.DOTALL):
        if plain == ",":
            pieces.append("")
        else:
            pieces[-1] += escaped or plain
    return [piece.strip() for piece in pieces]


def join_target(tokens: Sequence[str]) -> str:
    """The comma list that split_target takes apart into these tokens."""
    return ",".join(re.sub(r"([\\,])", r"\\\1", token.strip()) for token in tokens)


def find_spans(
    tokens: Sequence[str], spans: Sequence[Span], text: str, wanted: str
) -> list[list[int]]:
    """Every occurrence of a comma list of pieces, as lists of token indices, in the order of the
    text; occurrences may overlap.

    Consecutive tokens that equal the pieces, all of them; else the pieces, with or without a blank
    between them, as characters of the text, mapped to all tokens that they touch. Characters may
    begin or end inside a token, but not inside an ASCII word unless a token does so too.
    """
    pieces = split_target(wanted)
    if not any(pieces):
        raise UsageError(
            f"the span {wanted!r} names no token; give a comma list of pieces such as the,red,c"
        )
    bare = [token.strip() for token in tokens]
    count = len(pieces)
    equal = [
        list(range(start, start + count))
        for start in range(len(tokens) - count + 1)
        if bare[start : start + count] == pieces
    ]
    return equal or _touched_by_characters(spans, text, [piece for piece in pieces if piece])


def _touched_by_characters(
    spans: Sequence[Span], text: str, pieces: Sequence[str]
) -> list[list[int]]:
    """The tokens that each occurrence of the pieces in the text touches."""
    borders = {border for span in spans for border in span}

    def cuts_a_word(at: int) -> bool:
        if not 0 < at < len(text) or at in borders:
            return False
        return all(c.isascii() and c.isalnum() for c in text[at - 1 : at + 1])

    occurrences: list[list[int]] = []
    # ahead, so that occurrences may overlap
    pattern = f"(?=({' ?'.join(re.escape(piece) for piece in pieces)}))"
    for match in re.finditer(pattern, text):
        start, end = match.span(1)
        touched = [i for i, (first, last) in enumerate(spans) if first < end and last > start]
        if cuts_a_word(start) or cuts_a_word(end):
            continue
        if touched and touched not in occurrences:
            occurrences.append(touched)
    return occurrences


def find_span(
    tokens: Sequence[str], spans: Sequence[Span], text: str, wanted: str, occurrence: int = 1
) -> list[int]:
    """Token indices of the occurrence-th (from 1) place that find_spans finds. UsageError lists the
    tokens."""
    places = find_spans(tokens, spans, text, wanted)
    if 1 <= occurrence <= len(places):
        return places[occurrence - 1]
    reason = "not in the text"
    if places:
        times = "1 time" if len(places) == 1 else f"{len(places)} times"
        reason = f"{times} in the text, and occurrence {occurrence} was asked for"
    listed = ", ".join(f"{i} {token!r}" for i, token in enumerate(tokens))
    raise UsageError(f"the span {wanted!r}: {reason}; the tokens are {listed}")


# ---- text in figures ----


def numbers(tokens: Sequence[int]) -> str:
    """Indices as '3-5 8'."""
    ranges: list[list[int]] = []
    for token in tokens:
        if ranges and token == ranges[-1][1] + 1:
            ranges[-1][1] = token
        else:
            ranges.append([token, token])
    return " ".join(f"{first}-{last}" if last > first else f"{first}" for first, last in ranges)

"""What run_volcano_with_image_attention.py --output-visualization-tensors keeps of one instance,
and which tokens of a text a span means.

<input_dir>/<index>_<image id>/ holds visualization_tensors.npz (boxes of the vision tokens; of each
text the attention of the step that predicted token t, the K largest over layers) and tokens.json.
Volcano (arXiv 2311.07362), sections 1.2, 1.3 and 2.2 to 2.8 of our study. Needs neither torch nor a
model.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vlmdiag.cli import UsageError
from vlmdiag.pictures.grid import PatchGrid
from vlmdiag.runs import disk, rundirs
from vlmdiag.volcano.maps import counted, pool_heads

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
    """One text of the loop. topk (T, K, H, P): attention of the step that predicted token t to
    vision token p, the K largest over layers, largest first."""

    name: str
    text: str
    tokens: list  # T pieces, special tokens as written
    # T pairs (start, end): the characters of text that a token stands for, empty for special tokens
    spans: list
    ended: bool  # the last token is the stop token
    prompt: str
    topk: np.ndarray

    @property
    def steps(self):
        """Tokens that count: all but the stop token."""
        return counted(len(self.tokens), self.ended)

    def pieces(self):
        """What to show of each token: every character of the text once, special tokens as written,
        a dot for the further bytes of one character."""
        shown, done = [], 0
        for token, (start, end) in zip(self.tokens, self.spans):
            shown.append(
                (self.text[max(start, done) : end] if end > start else token) or "\N{MIDDLE DOT}"
            )
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
    vision_encoder: dict
    accepted: list  # numbers of the accepted iterations
    stages: dict

    def title(self, name):
        """'initial response', 'feedback' or 'revision', and whether the model refused it."""
        return STAGES[name] + " (not accepted)" * (name != "initial" and not self.accepted)

    def missing(self):
        """One line that says which texts are not there, or None."""
        absent = [title for name, title in STAGES.items() if name not in self.stages]
        return (
            f"{' and '.join(absent)} of instance {self.index}: not stored, because no revision was"
            " accepted"
            if absent
            else None
        )


def read_instance(input_dir, index):
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
    found = [path for path in folders if int(path.name.split("_")[0]) == index]
    if len(found) != 1:
        listed = ", ".join(path.name for path in found or folders) or "no folder of an instance"
        raise UsageError(
            f"{root}: {'several folders' if found else 'no folder'} of instance {index}; there"
            f" {'are' if found or folders else 'is'} {listed}"
        )
    record, arrays = (
        _read_record(found[0] / "tokens.json"),
        _read_arrays(found[0] / "visualization_tensors.npz"),
    )
    try:
        return _checked(found[0], record, arrays, index)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise UsageError(
            f"{found[0]}: tokens.json and visualization_tensors.npz do not hold what was wanted"
            f" ({what}); {AGAIN}"
        ) from error


def _read_record(path):
    try:
        record = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise UsageError(f"{path}: no such file; {AGAIN}") from error
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is not readable JSON ({error}); {AGAIN}") from error
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        schema = record.get("schema") if isinstance(record, dict) else None
        raise UsageError(
            f"{path} has schema {schema!r} where {SCHEMA} was wanted: another version of these"
            f" tools wrote it; {AGAIN}"
        )
    return record


def _read_arrays(path):
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            return {
                name: archive[name]
                for name in archive.files
                if name == "boxes" or name.endswith("_topk")
            }
    except FileNotFoundError as error:
        raise UsageError(f"{path}: no such file; {AGAIN}") from error
    except (
        *disk.BROKEN,
        AttributeError,
        TypeError,
    ) as error:  # the last two: an .npy where an NPZ was wanted
        raise UsageError(
            f"{path} cannot be read ({type(error).__name__}: {error}); {AGAIN}"
        ) from error


def _checked(folder, record, arrays, index):
    """The instance of a record and its arrays; KeyError, TypeError or ValueError say what does not
    fit."""
    if record["index"] != index:
        raise ValueError(f"tokens.json is of instance {record['index']}")
    grid = record["grid"] or {"shape": None, "size": (0, 0)}
    boxes = np.asarray(
        (
            arrays["boxes"]
            if record["grid"]
            else np.full((arrays["initial_topk"].shape[-1], 4), np.nan)
        ),
        float,
    )
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"boxes of shape {boxes.shape}, (P, 4) was wanted")
    shape = tuple(map(int, grid["shape"])) if grid["shape"] is not None else None
    width, height = map(int, grid["size"])
    if shape is not None and (
        len(shape) != 2
        or min(shape) < 1
        or np.prod(shape) > len(boxes)
        or np.isnan(boxes[: np.prod(shape)]).any()
    ):
        raise ValueError(
            f"a grid of {shape} for {len(boxes)} vision tokens of which"
            f" {int((~np.isnan(boxes[:, 0])).sum())} have a box"
        )
    stages = {
        name: _stage(name, record["stages"][name], arrays, len(boxes), record["hidden_top_k"])
        for name in STAGES
        if record["stages"].get(name) is not None
    }
    unpaired = [
        key for key in arrays if key.endswith("_topk") and key.removesuffix("_topk") not in stages
    ]
    if "initial" not in stages or unpaired:
        raise ValueError(
            "stages without initial" if not unpaired else f"{unpaired[0]} without its tokens"
        )
    facts = {
        name: _sound(str(record[name] if record[name] is not None else ""))
        for name in ("image_id", "image", "question", "gold_answer", "model")
    }
    encoder, accepted = record.get("vision_encoder") or {}, list(record["accepted"])
    return Instance(
        folder,
        index,
        **facts,
        hidden_top_k=int(record["hidden_top_k"]),
        grid=PatchGrid(boxes, shape, (width, height)),
        vision_encoder=encoder,
        accepted=accepted,
        stages=stages,
    )


def _stage(name, entry, arrays, patches, k):
    topk, tokens, text = (
        arrays[f"{name}_topk"],
        [_sound(token) for token in entry["tokens"]],
        _sound(entry["text"]),
    )
    spans = [(int(start), int(end)) for start, end in entry["spans"]]
    wanted = (len(tokens), k, topk.shape[2] if topk.ndim == 4 else "H", patches)
    if topk.shape != wanted or topk.dtype.kind != "f" or len(spans) != len(tokens):
        raise ValueError(
            f"{name}: {topk.dtype} of shape {topk.shape} and {len(spans)} spans for {len(tokens)}"
            f" tokens, wanted {wanted}"
        )
    if not np.isfinite(topk).all() or (topk < 0).any() or (topk[:, 1:] > topk[:, :-1]).any():
        raise ValueError(
            f"{name}: attention that is not finite, negative, or not sorted by layer; was the model"
            " run in float16?"
        )
    if any(not 0 <= start <= end <= len(text) for start, end in spans):
        raise ValueError(f"{name}: spans outside the text of {len(text)} characters")
    return Stage(
        name,
        text,
        tokens,
        spans,
        bool(entry["ended"]) and bool(tokens),
        _sound(entry.get("prompt") or ""),
        topk,
    )


def _sound(text):
    """Text that UTF-8 can hold, of the same length: a lone surrogate becomes '?'."""
    return text.encode("utf-8", "replace").decode()


# ---- attention of tokens ----


def token_maps(instance, name, k):
    """c (T, P) of a stage: mean of the k largest over layers, then heads. UsageError for a k that
    the file or the model cannot give."""
    topk = instance.stages[name].topk
    if k > instance.hidden_top_k:
        raise UsageError(
            f"--hidden-top-k {k}: {instance.folder} holds the {instance.hidden_top_k} largest over"
            " layers; give at most that or run the model again"
        )
    if k > topk.shape[2]:
        raise UsageError(f"--hidden-top-k {k}: the model has {topk.shape[2]} heads")
    parts = [
        pool_heads(topk[start : start + STEPS_AT_ONCE], k)
        for start in range(0, len(topk), STEPS_AT_ONCE)
    ]
    return np.concatenate(parts) if parts else np.zeros((0, topk.shape[3]))


def token_weights(maps):
    """w (T,) = mean over p of c[t, p]: how strongly the step that predicted token t looked at the
    picture. maps (T, P) of token_maps."""
    return maps.mean(1)


def strongest_spans(weights, tokens, count, length):
    """Token ranges (start, end) with the largest mean weight, strongest first, not overlapping: at
    most `count`, of `length` tokens each or a shorter text.

    weights (n,): of the tokens that count. Ranges of white space alone cannot be named and are left
    out.
    """
    length = min(length, len(weights))
    starts = [
        i
        for i in range(len(weights) - length + 1)
        if any(token.strip() for token in tokens[i : i + length])
    ]
    chosen = []
    for start in sorted(starts, key=lambda i: -np.mean(weights[i : i + length])):
        if len(chosen) < count and all(abs(start - other) >= length for other, _ in chosen):
            chosen.append((start, start + length))
    return chosen


# ---- spans ----


def split_target(target):
    r"""The pieces of a comma list, without white space around them; \, is a comma and \\ a
    backslash."""
    pieces = [""]
    for escaped, plain in re.findall(r"\\([\\,])|(.)", target, re.DOTALL):
        if plain == ",":
            pieces.append("")
        else:
            pieces[-1] += escaped or plain
    return [piece.strip() for piece in pieces]


def join_target(tokens):
    """The comma list that split_target takes apart into these tokens."""
    return ",".join(re.sub(r"([\\,])", r"\\\1", token.strip()) for token in tokens)


def find_spans(tokens, spans, text, wanted):
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
    found = [
        list(range(i, i + len(pieces)))
        for i in range(len(tokens) - len(pieces) + 1)
        if bare[i : i + len(pieces)] == pieces
    ]
    if found:
        return found
    borders = {border for span in spans for border in span}

    def cuts_a_word(at):
        return (
            0 < at < len(text)
            and at not in borders
            and all(c.isascii() and c.isalnum() for c in text[at - 1 : at + 1])
        )

    for match in re.finditer(
        f"(?=({' ?'.join(re.escape(piece) for piece in pieces if piece)}))", text
    ):
        start, end = match.span(1)
        touched = [i for i, (a, b) in enumerate(spans) if a < end and b > start]
        if touched and touched not in found and not cuts_a_word(start) and not cuts_a_word(end):
            found.append(touched)
    return found


def find_span(tokens, spans, text, wanted, occurrence=1):
    """Token indices of the occurrence-th (from 1) place that find_spans finds. UsageError lists the
    tokens."""
    found = find_spans(tokens, spans, text, wanted)
    if not 1 <= occurrence <= len(found):
        listed = ", ".join(f"{i} {token!r}" for i, token in enumerate(tokens))
        times = (
            f"{len(found)} time{'s' * (len(found) != 1)} in the text, and occurrence {occurrence}"
            " was asked for"
            if found
            else "not in the text"
        )
        raise UsageError(f"the span {wanted!r}: {times}; the tokens are {listed}")
    return found[occurrence - 1]


# ---- text in figures ----


def numbers(tokens):
    """Indices as '3-5 8'."""
    breaks = [i for i in range(len(tokens)) if i == 0 or tokens[i] != tokens[i - 1] + 1] + [
        len(tokens)
    ]
    return " ".join(
        f"{tokens[a]}-{tokens[b - 1]}" if b - a > 1 else f"{tokens[a]}"
        for a, b in zip(breaks, breaks[1:])
    )

"""Attention of one generated token to the vision tokens.

Beyond Semantics (arXiv 2503.17349), table 8; docs/studies/beyond_semantics.md, section 2.7. Its
figures: attention_overlay.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vlmdiag.answers import find_word, token_spans
from vlmdiag.beyond_semantics.attention_overlay import AttentionVisualizationResult
from vlmdiag.cli import UsageError
from vlmdiag.model.attention import capture
from vlmdiag.model.decoding import generate
from vlmdiag.model.probes import VisionRows
from vlmdiag.model.prompts import prompt_for
from vlmdiag.pictures.mosaic import side_by_side
from vlmdiag.pictures.samples import Sample
from vlmdiag.pictures.spread import normalized_entropy
from vlmdiag.runs import rundirs

if TYPE_CHECKING:
    from jaxtyping import Float

    from vlmdiag.pictures.grid import PatchGrid
    from vlmdiag.pictures.samples import Chat, Pictures
    from vlmdiag.types import VLM

Span = tuple[int, int]  # [start, end) in the characters of the answer


def token_attention(
    vlm: VLM,
    image: Pictures,
    prompt_text: str,
    target_word: str | None = None,
    token_position: int | None = None,
    max_new_tokens: int = 512,
    occurrence: int = 1,
    step: str | None = None,
    strip_system_prompt: bool = False,
    paper_compat: bool = False,
    chat: Chat | None = None,
) -> AttentionVisualizationResult:
    """Let a model answer and take the attention of one generated token to the picture.

    The token: the first one of the occurrence-th target_word (whole word, case ignored), or
    token_position. step: 'producing' (default), the row that predicted the token, or 'query', the
    row in which the token itself asks. paper_compat: as published, the query row of the first token
    in the answer that equals the word's first one, map and entropy with 1e-10. chat: the prompt of
    several pictures or turns, about the tuple of its pictures; the map is over all of them side by
    side. UsageError: word not in the answer, no such row, no grid.
    """
    step = check_token(target_word, token_position, step, paper_compat)
    vlm.need("decoder-only", "grid")
    sample = Sample("0", Path("picture.png"), prompt_text, chat=chat)
    batch = vlm.encode([sample], [image], strip_system=strip_system_prompt)
    grids = [grid for grid in batch.grids if grid is not None]
    if len(grids) < len(batch.grids):
        raise UsageError(
            f"{vlm.path}: where the vision tokens of {vlm.family.name} lie in the picture (grid) is"
            " unknown, so their attention cannot be drawn"
        )
    if strip_system_prompt and prompt_for(vlm, prompt_text)[1] is None:
        raise UsageError(
            f"{vlm.path}: --strip_system_prompt, but its prompt has no system prompt to leave out"
        )
    probe = VisionRows(batch)
    with capture(vlm, [probe]):
        ids = generate(vlm, batch, max_new_tokens).ids[0]

    def decode(token_ids: Sequence[int]) -> str:
        return vlm.tokenizer.decode(
            token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    text, spans = token_spans(ids, decode)
    tokens = [vlm.tokenizer.decode([token]) for token in ids]
    if token_position is not None:
        position, span = _by_position(vlm, tokens, spans, token_position)
    elif target_word is not None:
        occurrences = _occurrences(vlm, ids, text, spans, target_word, paper_compat)
        position, span = _by_word(vlm, tokens, spans, target_word, occurrences, occurrence)
    row = position if step == "producing" else position + 1
    if row >= len(probe.rows):
        more = "" if ids[-1] in vlm.eos_ids else " or more --max_new_tokens"
        raise UsageError(
            f"{vlm.path}: generation ended with token {position} ({tokens[position]!r}), so no"
            f" later step has it as query; use --step producing{more}"
        )
    on_vision = probe.rows[row][0, batch.vision_positions(0)]
    weights = on_vision.cpu().numpy().astype(np.float64)  # (P,)
    if not np.isfinite(weights).all():
        raise UsageError(
            f"{vlm.path}: the attention of token {position} is not finite; load the model with"
            " --dtype float32"
        )
    grid = grids[0]
    if isinstance(image, tuple):
        shown, grid = side_by_side(image, grids)
    else:
        shown = image
    ends = np.cumsum([len(of_picture.boxes) for of_picture in grids])[:-1]
    by_picture = np.split(weights, ends)
    values = weights
    if paper_compat:
        values = (weights - weights.min()) / (weights.max() - weights.min() + 1e-10)
    if grid.shape is not None and math.prod(grid.shape) == len(weights):
        values = values.reshape(grid.shape)
    return AttentionVisualizationResult(
        generated_text=text,
        attention_map=values,
        image_array=np.asarray(shown),
        normalized_entropy=normalized_entropy(weights, 1e-10 if paper_compat else 0.0),
        token_position=position,
        target_word=target_word,
        step=step,
        tokens=tokens,
        answer_span=span,
        grid=grid,
        outside_share=share_on_padding(grids, weights),
        model_name=rundirs.slug(vlm.path),
        prompt=batch.prompts[0],
        paper_compat=paper_compat,
        grids=grids,
        picture_sums=[float(part.sum()) for part in by_picture],
    )


def check_token(
    target_word: str | None, token_position: int | None, step: str | None, paper_compat: bool
) -> str:
    """The step, by default 'producing'; UsageError for arguments that exclude each other."""
    if (target_word is None) == (token_position is None):
        raise UsageError(
            "give the token as a word of the answer (--target_word) or by its index"
            " (--token_position), one of the two"
        )
    step = step or ("query" if paper_compat else "producing")
    if paper_compat and step != "query":
        raise UsageError(
            "the published code takes the query row: leave --step producing or --paper_compat out"
        )
    return step


def share_on_padding(grids: Sequence[PatchGrid], weights: Float[np.ndarray, " P"]) -> float:
    """Part of the weights that lies on padding around the pictures, in [0, 1]."""
    total = weights.sum()
    if not total > 0:
        return 0.0
    outside = 0.0
    start = 0
    for grid in grids:
        width, height = grid.size
        inside = grid.coverage(np.ones((height, width), bool))
        of_picture = weights[start : start + len(inside)]
        outside += (of_picture * (1 - inside))[grid.has_box].sum()
        start += len(inside)
    return float(outside / total)


def _by_position(
    vlm: VLM, tokens: Sequence[str], spans: Sequence[Span], position: int
) -> tuple[int, Span]:
    """(index of the generated token, the characters it stands for) of --token_position."""
    if not 0 <= position < len(tokens):
        raise UsageError(
            f"--token_position {position}: {vlm.path} generated {len(tokens)} tokens, counted from"
            f" 0: {_listed(tokens)}"
        )
    return position, spans[position]


def _occurrences(
    vlm: VLM, ids: Sequence[int], text: str, spans: Sequence[Span], word: str, paper_compat: bool
) -> list[list[int]]:
    """The generated tokens of each occurrence of a word."""
    if not paper_compat:
        return find_word(text, spans, word)
    first = vlm.tokenizer(word, add_special_tokens=False)["input_ids"][:1]
    return [[i] for i, token in enumerate(ids) if [token] == first]


def _by_word(
    vlm: VLM,
    tokens: Sequence[str],
    spans: Sequence[Span],
    word: str,
    occurrences: Sequence[Sequence[int]],
    occurrence: int,
) -> tuple[int, Span]:
    """(first token, the characters) of an occurrence, from 1; UsageError that lists the generated
    tokens."""
    if not 1 <= occurrence <= len(occurrences):
        times = "1 time" if len(occurrences) == 1 else f"{len(occurrences)} times"
        where = (
            f"{times}, and occurrence {occurrence} was asked for" if occurrences else "not there"
        )
        raise UsageError(
            f"the word {word!r} in the answer of {vlm.path}: {where}; the generated tokens are"
            f" {_listed(tokens)}"
        )
    chosen = occurrences[occurrence - 1]
    return chosen[0], (spans[chosen[0]][0], spans[chosen[-1]][1])


def _listed(tokens: Sequence[str]) -> str:
    return ", ".join(f"{i} {token!r}" for i, token in enumerate(tokens))

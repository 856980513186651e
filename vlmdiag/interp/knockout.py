"""Attention knockout: which queries may not see which keys, in which layers.

arXiv 2410.07149, table 2; docs/studies/llava_interp.md, section 2.9. What does not run a model are
pure functions. Used by scripts/attention_experiment_curate.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from vlmdiag.groups import GROUPS, VISION
from vlmdiag.interp.ablation import CuratedPrompt, Result, curated_prompt, logits_result
from vlmdiag.interp.criteria import names
from vlmdiag.interp.knockout_pairs import Pair, Window, layer_windows
from vlmdiag.interp.objects import buffered
from vlmdiag.interp.targets import LoadedItem
from vlmdiag.model.attention import Block, edit
from vlmdiag.model.decoding import answer_ids, generate
from vlmdiag.model.lens import Lens
from vlmdiag.model.prefix import branches, first_positions
from vlmdiag.types import Record

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from vlmdiag.interp.interventions import Prompt
    from vlmdiag.pictures.grid import PatchGrid
    from vlmdiag.types import VLM

Positions = dict[str, "Int[np.ndarray, ' n']"]  # group name -> positions in the prompt
Key = tuple[str, str, str]  # hidden keys, queries that do not see them, window


def last_row(grid: PatchGrid) -> Int[np.ndarray, " n"]:
    """Indices of the vision tokens of the grid's last row: the tokens whose boxes reach lowest
    (where a grid has tiles, of the lowest row of tiles)."""
    if grid.shape is not None:
        rows, columns = grid.shape
        return np.arange((rows - 1) * columns, rows * columns)
    bottoms = grid.boxes[:, 3]
    heights = grid.boxes[:, 3] - grid.boxes[:, 1]
    return np.flatnonzero(bottoms > np.nanmax(bottoms) - np.nanmin(heights) / 2)


def positions_of(
    groups: Int[np.ndarray, " T"], grid: PatchGrid, patches: Mapping[int, Int[np.ndarray, " n"]]
) -> Positions:
    """Positions of every group in one prompt. groups: codes of GROUPS; patches {b: vision-token
    indices of object + b buffers}.

    'other' is the image without object + 1 buffer, 'question' the user's text, 'template' the role
    words (with an answer's given beginning).
    """
    vision = np.flatnonzero(groups == VISION)
    tokens = np.arange(len(vision))
    row = last_row(grid)
    return {
        "object": vision[patches[0]],
        "object+1": vision[patches[1]],
        "object+2": vision[patches[2]],
        "image": vision,
        "last_row": vision[row],
        "other": vision[np.setdiff1d(tokens, patches[1])],
        "image-last_row": vision[np.setdiff1d(tokens, row)],
        "question": np.flatnonzero(groups == GROUPS.index("user")),
        "template": np.flatnonzero(groups == GROUPS.index("template")),
        "last_token": np.array([len(groups) - 1]),
    }


def blocks_for(
    positions: Positions, pairs: Sequence[Pair], windows: Mapping[str, Window], length: int
) -> dict[Key, Block]:
    """The block of every pair and window in one prompt of `length` tokens; a pair without a key
    before a query blocks nothing and is left out."""
    blocks = {}
    for source, target in pairs:
        keys, queries = positions[source], positions[target]
        if not len(keys) or not len(queries) or keys.min() > queries.max():
            continue
        hidden, blind = _marked(keys, length), _marked(queries, length)
        for name, (first, last) in windows.items():
            layers = frozenset(range(first, last + 1))
            blocks[source, target, name] = Block(blind, hidden, layers)
    return blocks


def _marked(positions: Int[np.ndarray, " n"], length: int) -> Tensor:
    """(1, length) bool, True at the positions."""
    row = torch.zeros(1, length, dtype=torch.bool)
    row[0, torch.from_numpy(positions)] = True
    return row


def knocked_out(
    vlm: VLM, lens: Lens, prompt: Prompt, blocks: Mapping[Key, Block]
) -> dict[Key, Float[Tensor, " V"]]:
    """Logits after the prompt under every knockout. Rows before the first blocked query are the
    same in every layer, so the cached keys and values of the unblocked pass serve; knockouts with
    the same first query share a pass."""
    by_start: dict[int, list[Key]] = {}
    for key, block in blocks.items():
        by_start.setdefault(int(block.queries[0].nonzero()[0]), []).append(key)
    logits: dict[Key, Tensor] = {}
    length = prompt.batch.groups.shape[1]
    for start, keys in by_start.items():
        cache = first_positions(vlm, prompt.cache, start, 1)
        ways = max(1, 2 * length // (length - start))  # a pass of at most two prompts' rows
        for at in range(0, len(keys), ways):
            of_pass = keys[at : at + ways]
            if cache is None:
                for key in of_pass:
                    logits[key] = _alone(vlm, prompt, blocks[key])
                continue
            cuts = [[blocks[key]] for key in of_pass]
            states = branches(vlm, prompt.batch, cache, prompt.embeds, start, cuts, prompt.vision)
            logits |= dict(zip(of_pass, lens.logits(states[:, -1], normed=True)))
    return logits


def _alone(vlm: VLM, prompt: Prompt, block: Block) -> Float[Tensor, " V"]:
    """Log-probabilities after the prompt under one knockout, in a pass over the whole prompt."""
    with edit(vlm, blocks=[block]):
        return generate(vlm, prompt.batch, 1, features=prompt.features).first[0]


def make_process(
    vlm: VLM,
    pairs: Sequence[Pair],
    window_names: Sequence[str],
    threshold: float,
    paper_compat: bool,
) -> Callable[[Sequence[LoadedItem]], list[Result]]:
    """process([(item, picture, mask), ...]) -> [(record, arrays), ...]. UsageError where layers
    have no attention to cut: the picture would flow on through them."""
    vlm.need("every-layer")
    lens = Lens(vlm)
    windows = layer_windows(window_names, len(vlm.parts.layers))

    @torch.no_grad()
    def process(loaded: Sequence[LoadedItem]) -> list[Result]:
        asked = [curated_prompt(vlm, *each, threshold) for each in loaded]
        return [_knock_out(vlm, lens, pairs, windows, one, paper_compat) for one in asked]

    return process


def _knock_out(
    vlm: VLM,
    lens: Lens,
    pairs: Sequence[Pair],
    windows: Mapping[str, Window],
    asked: CuratedPrompt,
    paper_compat: bool,
) -> Result:
    record, batch = asked.record, asked.prompt.batch
    question = asked.text
    right_ids: set[int] | None = None
    if not paper_compat:
        right_ids = {answer_ids(vlm, question, name)[0] for name in names(record["answer"])}

    def result(logits: Float[Tensor, " V"]) -> Record:
        return logits_result(vlm, logits, asked, right_ids)

    unblocked = result(asked.prompt.logits)
    record["conditions"] = {"none": {"vqa": unblocked}}
    record["caption"] = unblocked["generated_token"]
    record["eligible"] = unblocked["correct"]
    if not record["eligible"]:
        return record, {}
    grid = batch.grids[0]
    assert grid is not None  # tokens_of() has refused a model without one
    patches = {b: buffered(grid, asked.tokens, b) for b in (0, 1, 2)}
    positions = positions_of(batch.groups[0].cpu().numpy(), grid, patches)
    blocks = blocks_for(positions, pairs, windows, batch.groups.shape[1])
    done = {(source, target) for source, target, _ in blocks}
    record["skipped"] = [":".join(pair) for pair in pairs if pair not in done]
    logits = knocked_out(vlm, lens, asked.prompt, blocks)
    for key, block in blocks.items():
        hidden = int(block.keys.sum())
        record["conditions"][":".join(key)] = {"vqa": result(logits[key]), "tokens": hidden}
    arrays = {f"positions_{name}": where.astype(np.int32) for name, where in positions.items()}
    return record, arrays

"""Which vision tokens an ablation replaces: the object's, and the sets it is compared with.

arXiv 2410.07149; docs/studies/llava_interp.md, sections 2.5 to 2.7. Pure numpy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from vlmdiag.interp.objects import buffered, random_blob, random_tokens, register_tokens, rng_for

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from vlmdiag.pictures.grid import PatchGrid

SIZES = (5, 10, 20, 40, 60, 100, 250)
BUFFERS = (0, 1, 2)
Tokens = np.ndarray[tuple[int], np.dtype[np.int64]]  # sorted indices of vision tokens


def condition_sets(
    grid: PatchGrid,
    norms: Float[np.ndarray, " P"],
    scores: Float[np.ndarray, " P"] | None,
    tokens: Int[np.ndarray, " n"],
    sizes: Sequence[int],
    draws: int,
    seed: int,
    item_id: str,
    paper_compat: bool = False,
) -> tuple[dict[str, Tokens], dict[str, str]]:
    """({condition: tokens}, {condition: why it cannot be made}).

    norms: of the vision embeddings; scores: integrated gradients; tokens: the object's. Conditions:
    register, patch_<b> (object with b buffers), gradient_<n>, random_<n>, and as many tokens as
    patch_<b> has: gradient_matched_<b>, random_matched_<b>_<draw>, blob_matched_<b>_<draw> (one
    compact piece), all. Random sets never touch the object and its buffer (matched: that of b, else
    of 1); paper_compat: those of given sizes may.
    """
    count = len(grid.boxes)
    patches = {b: buffered(grid, tokens, b) for b in BUFFERS}
    places = np.flatnonzero(grid.has_box)
    outside = {b: np.setdiff1d(places, patch) for b, patch in patches.items()}
    by_score = None if scores is None else np.argsort(-scores, kind="stable")

    chosen: dict[str, Tokens | str] = {"register": register_tokens(norms)}
    chosen |= {f"patch_{b}": patch for b, patch in patches.items()}
    candidates = np.arange(count) if paper_compat else outside[1]
    for n in sizes:
        if by_score is not None:
            too_few = f"there are {count} vision tokens"
            chosen[f"gradient_{n}"] = np.sort(by_score[:n]) if n <= count else too_few
        name = f"random_{n}"
        drawn = random_tokens(rng_for(seed, item_id, name), n, candidates)
        too_few = f"{len(candidates)} tokens lie outside the object and its buffer"
        chosen[name] = too_few if drawn is None else drawn
    for b, patch in patches.items():
        size = len(patch)
        too_few = f"no {size} tokens outside the object and its buffer"
        if by_score is not None:
            chosen[f"gradient_matched_{b}"] = np.sort(by_score[:size])
        for draw in range(draws):
            name = f"random_matched_{b}_{draw}"
            drawn = random_tokens(rng_for(seed, item_id, name), size, outside[b])
            chosen[name] = too_few if drawn is None else drawn
            name = f"blob_matched_{b}_{draw}"
            drawn = random_blob(rng_for(seed, item_id, name), grid, size, outside[b])
            chosen[name] = too_few if drawn is None else drawn
    chosen["all"] = np.arange(count)

    sets: dict[str, Tokens] = {}
    skipped: dict[str, str] = {}
    for name, tokens_or_reason in chosen.items():
        if isinstance(tokens_or_reason, str):
            skipped[name] = tokens_or_reason
        elif len(tokens_or_reason):
            sets[name] = tokens_or_reason
        else:
            skipped[name] = "no token"
    return sets, skipped

"""From attention of every step, layer and head to one map over the picture. Pure functions on
arrays.

Volcano (arXiv 2311.07362); docs/studies/volcano.md, sections 2.2 to 2.7. a (T, L, H, P): softmax
weight of step t (the row that predicted token t), layer l, head h, to vision token p; not
renormalised over the picture.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Float


def pool_layers(a: Float[np.ndarray, "T L H P"], k: int) -> Float[np.ndarray, "T k H P"]:
    """The k largest over layers of each step, head and patch, largest first. What a capture keeps;
    ValueError for k > L."""
    if not 1 <= k <= a.shape[1]:
        raise ValueError(f"the {k} largest of {a.shape[1]} layers")
    return -np.sort(-a, axis=1)[:, :k]


def pool_heads(topk: Float[np.ndarray, "T K H P"], k: int) -> Float[np.ndarray, "T P"]:
    """c: mean of the k largest over layers, then of the k largest over heads, each patch by itself.
    topk: of pool_layers(), K >= k.

    An upper envelope, not a distribution: it may sum to more than 1 over the picture.
    """
    if not 1 <= k <= min(topk.shape[1], topk.shape[2]):
        raise ValueError(
            f"the {k} largest of {topk.shape[1]} kept layers and {topk.shape[2]} heads"
        )
    b = topk[:, :k].astype(np.float64).mean(1)
    return np.sort(b, axis=1)[:, -k:].mean(1)


def top_l_mean(
    c: Float[np.ndarray, "T P"],
    l: int,  # noqa: E741 -- the paper's letter
) -> Float[np.ndarray, " P"]:
    """d: mean of the l largest over steps, each patch by itself; the plain mean where l is the
    number of steps. ValueError unless 1 <= l <= T.

    The published statistic: l is the number of steps of the shorter text, so that the longer text
    gets the mean of its largest values.
    """
    if not 1 <= l <= len(c):
        raise ValueError(f"the {l} largest of {len(c)} steps")
    return np.sort(c, axis=0)[len(c) - l :].mean(0)


def counted(tokens: int, ended: bool) -> int:
    """How many steps of a text count: without the token that ended it."""
    return tokens - bool(ended)


def coverage(values: Float[np.ndarray, " P"], share: float) -> float:
    """Share of patches that together hold `share` of a map's mass, the heaviest first; NaN for a
    map of zeros."""
    total = values.sum()
    if not total > 0:
        return float("nan")
    mass = np.cumsum(np.sort(values)[::-1]) / total
    return float((np.searchsorted(mass, share - 1e-12) + 1) / len(values))

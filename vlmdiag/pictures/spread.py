"""How far a map over the picture spreads. Pure functions, no model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Float


def normalized_entropy(weights: Float[np.ndarray, " P"], epsilon: float = 0.0) -> float:
    """E = -sum p log2 p / log2 P of p = weights / sum, in [0, 1].

    1 where all P tokens get the same, 0 where one gets everything; NaN for P < 2 or no weight at
    all. weights (any shape) >= 0. epsilon: added to p, which is then normalised again (the code of
    Beyond Semantics: 1e-10). docs/studies/beyond_semantics.md, section 2.7.
    """
    weights = np.asarray(weights, dtype=np.float64).ravel()
    if len(weights) < 2 or not weights.sum() > 0:
        return float("nan")
    p = weights / weights.sum() + epsilon
    p = p / p.sum()
    positive = p[p > 0]
    entropy = -(positive * np.log2(positive)).sum()
    # rounding can put the entropy of a single peak just below 0
    return float(max(0.0, entropy / np.log2(len(p))))

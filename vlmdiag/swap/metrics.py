"""Does the difference of two hidden states, of a question and of the same question with its objects
swapped, lie along one spatial axis?

    delta_i = h(swapped_i) - h(original_i)     u_i = delta_i / |delta_i|
    s_i = +1 for left, above, far and -1 for right, under, close
    axis coherence   mean over pairs i < j of cos(s_i u_i, s_j u_j)
                     = (|sum s_i u_i|^2 - n) / (n (n - 1))
    entanglement     (cos(above, far) + cos(under, close) - cos(above, close) - cos(under, far)) / 4
                     of mean deltas

"Why Far Looks Up" (arXiv 2605.30161), equations 1 to 3; docs/studies/swap_analysis.md, sections 2
and 5.2. Pure numpy, one layer at a time in float64, closed forms: no n x n matrix and no shuffling.
Deltas (n, L, d) may be a memory map. A delta that is 0 has no direction: it is left out of every
cosine and counted as `zeros`; one with an infinity or NaN (float16 overflows at 65504) is left out
and counted as `not_finite`. NaN stands where fewer than two are left, with too_few = True.
Intervals are 95 % over whole images (resampling.py, docs/intervals.md). Those of pairs of rows and
of entanglement are NaN below FEW images; copies of an image drawn twice are not paired with each
other there, since a copy agrees with itself and would lift every coherence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from scipy.special import stdtrit

from vlmdiag.figures.stats import DIFFERENCES, FEW, permutation_p
from vlmdiag.swap.relations import CATEGORIES, GROUPS, SIGNS
from vlmdiag.swap.resampling import (
    RESAMPLES,
    ImageSums,
    draws,
    image_codes,
    limits,
    mean_limits,
    sums_by_image,
)
from vlmdiag.types import Record

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

    Array = np.ndarray
    Labels = Sequence[Any] | Array
    Codes = Int[np.ndarray, " n"]
    Rows = Float[np.ndarray, "n d"]

# {field: number} of one layer, {field: (L,)} of all
Numbers = Record
PERMUTATIONS = 9999
ROWS = 256  # of a product of two sets of vectors that are held at once


# --- rows and vectors -----------------------------------------------------------------------------


def checked(
    deltas: Float[np.ndarray, "n L d"], categories: Labels, images: Labels | None = None
) -> tuple[Array, Codes]:
    """(categories (n,) str, image codes (n,)) of deltas. ValueError on other shapes and unknown
    categories."""
    categories = np.asarray(categories, dtype=str)
    if deltas.ndim != 3 or categories.shape != deltas.shape[:1]:
        raise ValueError(
            f"deltas (n, L, d) and n categories are wanted, got {deltas.shape} and"
            f" {categories.shape}"
        )
    unknown = sorted(set(categories.tolist()) - set(CATEGORIES))
    if unknown:
        raise ValueError(
            f"categories {', '.join(map(repr, unknown))}: one of {' '.join(CATEGORIES)} is wanted"
        )
    return categories, image_codes(images, len(categories))


def layer_rows(
    deltas: Float[np.ndarray, "n L d"], layer: int
) -> tuple[Rows, Bool[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """(rows float64 of one layer, which are finite, norms); a row that is not finite reads 0 and
    has norm NaN."""
    rows = np.asarray(deltas[:, layer], dtype=np.float64)
    finite = np.asarray(np.isfinite(rows).all(axis=1))
    if not finite.all():
        rows = np.where(finite[:, None], rows, 0.0)
    return rows, finite, np.where(finite, np.linalg.norm(rows, axis=1), np.nan)


def energy(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"] | None = None) -> float:
    """Sum of squared inner products of all rows of a with all rows of b, b = a unless given; by
    d x d or by blocks of rows, what is less work."""
    b = a if b is None else b
    if a.shape[1] < max(len(a), len(b)):
        return float(((a.T @ a) * (b.T @ b)).sum())
    blocks = (a[start : start + ROWS] @ b.T for start in range(0, len(a), ROWS))
    return float(sum(np.square(block).sum() for block in blocks))


def cosine(a: Float[np.ndarray, " d"], b: Float[np.ndarray, " d"]) -> float:
    """Cosine of two vectors, NaN where one is 0."""
    size = math.sqrt(a @ a) * math.sqrt(b @ b)
    return float(a @ b / size) if size > 0 else math.nan


def _over_layers(per_layer: Sequence[Numbers]) -> Numbers:
    """[{field: number}, one a layer] -> {field: (L,) array}."""
    if not per_layer:
        return {}
    return {field: np.array([layer[field] for layer in per_layer]) for field in per_layer[0]}


ALMOST = 1 - 1e-9  # a cosine that Fisher's scale has room for


# --- consistency and coherence --------------------------------------------------------------------


def pairwise_cosine(units: Rows, codes: Codes | None = None) -> Numbers:
    """Mean and population std of the cosines of all pairs of unit vectors, and the mean's interval
    over images, NaN with fewer than FEW of them.

    mean = (|sum u|^2 - n) / (n (n-1)); second moment = (|U^T U|_F^2 - n) / (n (n-1)):
    docs/studies/swap_analysis.md, section 2. Interval: Student's t on Fisher's scale, with the
    jackknife's error (Efron 1982) over means that leave out one image each.
    """
    n = len(units)
    codes = np.arange(n) if codes is None else codes
    images, sums, counts = sums_by_image(units, codes)
    numbers = {
        "mean": math.nan,
        "std": math.nan,
        "n": n,
        "n_images": len(images),
        "low": math.nan,
        "high": math.nan,
        "too_few": n < 2,
    }
    if n < 2:
        return numbers
    total = sums.sum(0)
    mean = float(_mean_of_pairs(total @ total, n))
    variance = (energy(units) - n) / (n * (n - 1)) - mean**2
    numbers["mean"] = mean
    numbers["std"] = math.sqrt(max(variance, 0.0))
    if len(images) >= FEW:
        squares = total @ total - 2 * sums @ total + np.square(sums).sum(1)
        without = np.arctanh(_mean_of_pairs(squares, n - counts).clip(-ALMOST, ALMOST))
        error = math.sqrt((len(images) - 1) * float(without.var()))
        half = float(stdtrit(len(images) - 1, 0.975)) * error
        middle = np.arctanh(np.clip(mean, -ALMOST, ALMOST))
        low, high = np.tanh(middle - half), np.tanh(middle + half)
        numbers["low"], numbers["high"] = min(float(low), mean), max(float(high), mean)
    return numbers


def _mean_of_pairs(square: Array | float, n: Array | int) -> Array:
    """Mean cosine of the pairs of n unit vectors, of the square of their sum's length."""
    return np.asarray((square - n) / (n * (n - 1)))


def shuffled_label_moments(units: Rows, signs: Float[np.ndarray, " n"]) -> tuple[float, float]:
    """(mean, std) of the coherence when the n labels are dealt out again at random, exactly. units
    not sign-corrected, signs of +1 and -1.

    X = sum_{i != j} s_i s_j g_ij with g = cos: E X = c2 S and E X^2 = 2 A + 4 c2 (R - A) + c4 (S^2
    - 2 A - 4 (R - A)), where S = sum g, A = sum g^2, R = sum_i (sum_{j != i} g_ij)^2 and c2, c4 =
    the mean products of 2 and of 4 different labels. Ours.
    """
    n = len(units)
    if n < 2:
        return math.nan, math.nan
    p = float(np.sum(signs))
    row_sums = units @ units.sum(0) - 1.0  # of g without its diagonal
    S = row_sums.sum()  # noqa: N806 -- the formula's letters
    A = energy(units) - n  # noqa: N806
    R = row_sums @ row_sums  # noqa: N806
    c2 = (p**2 - n) / (n * (n - 1))
    c4 = 0.0
    if n > 3:
        c4 = (p**4 - 6 * p**2 * n + 3 * n**2 + 8 * p**2 - 6 * n) / (n * (n - 1) * (n - 2) * (n - 3))
    second = 2 * A + 4 * c2 * (R - A) + c4 * (S**2 - 2 * A - 4 * (R - A))
    pairs = n * (n - 1)
    return float(c2 * S / pairs), math.sqrt(max(second - (c2 * S) ** 2, 0.0)) / pairs


def _consistency(
    deltas: Float[np.ndarray, "n L d"],
    categories: Labels,
    images: Labels | None,
    members: Mapping[str, Sequence[str]],
    correct_signs: bool,
) -> dict[str, Numbers]:
    """Pairwise cosines within each set of categories, {name of the set: {field: (L,)}}."""
    categories, codes = checked(deltas, categories, images)
    per_layer: dict[str, list[Numbers]] = {name: [] for name in members}
    for layer in range(deltas.shape[1]):
        rows, finite, norms = layer_rows(deltas, layer)
        for name, of_set in members.items():
            mine = np.isin(categories, of_set)
            used = mine & (norms > 0)
            units = rows[used] / norms[used, None]
            null = {}
            if correct_signs:
                signs = np.array([SIGNS[category] for category in categories[used].tolist()])
                null_mean, null_std = shuffled_label_moments(units, signs)
                null = {"null_mean": null_mean, "null_std": null_std}
                units = units * signs[:, None]
            numbers = pairwise_cosine(units, codes[used])
            left_out = {
                "zeros": int((mine & (norms == 0)).sum()),
                "not_finite": int((mine & ~finite).sum()),
            }
            per_layer[name].append(numbers | null | left_out)
    return {name: _over_layers(numbers) for name, numbers in per_layer.items()}


def within_category_consistency(
    deltas: Float[np.ndarray, "n L d"], categories: Labels, images: Labels | None = None
) -> dict[str, Numbers]:
    """{category: {mean, std, n, n_images, low, high, too_few, zeros, not_finite: (L,)}} of the
    cosines within each category."""
    members = {category: (category,) for category in CATEGORIES}
    return _consistency(deltas, categories, images, members, False)


def axis_coherence(
    deltas: Float[np.ndarray, "n L d"], categories: Labels, images: Labels | None = None
) -> dict[str, Numbers]:
    """{group: {mean, std, n, n_images, low, high, null_mean, null_std, too_few, zeros, not_finite:
    (L,)}}: right, under and close flipped, then the cosines within horizontal, vertical, distance;
    null: the same after labels were shuffled in the group. Why Far Looks Up, equations 1 and 2.
    """
    return _consistency(deltas, categories, images, GROUPS, True)


def delta_similarity(deltas: Float[np.ndarray, "n L d"], categories: Labels) -> Numbers:
    """{cosine (L, 6, 6) of the categories' mean deltas in the order of CATEGORIES, norm (L, 6) mean
    |delta|, n (L, 6), categories}; NaN for an empty one.

    Means are of the deltas as they are, so long ones count more. The paper's heatmaps.
    """
    categories, _ = checked(deltas, categories)
    layers = deltas.shape[1]
    cosines = np.full((layers, 6, 6), np.nan)
    norm = np.full((layers, 6), np.nan)
    n = np.zeros((layers, 6), int)
    for layer in range(layers):
        rows, finite, norms = layer_rows(deltas, layer)
        means = np.zeros((6, rows.shape[1]))
        for k, category in enumerate(CATEGORIES):
            mine = (categories == category) & finite
            n[layer, k] = mine.sum()
            if mine.any():
                means[k] = rows[mine].mean(0)
                norm[layer, k] = norms[mine].mean()
        size = np.linalg.norm(means, axis=1)[:, None]
        units = np.divide(means, size, out=np.full_like(means, np.nan), where=size > 0)
        cosines[layer] = np.clip(units @ units.T, -1, 1)
    return {"cosine": cosines, "norm": norm, "n": n, "categories": CATEGORIES}


# --- entanglement of vertical position and distance -----------------------------------------------


VERTICAL_AND_DISTANCE = ("above", "under", "far", "close")
FORMS = ("eq3_raw", "eq3_unit", "group_cosine_raw", "group_cosine_unit")
# sums over the four categories, then over the sign-corrected vertical and distance group
TO_GROUPS = np.array(
    [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1], [1, -1, 0, 0], [0, 0, 1, -1]], float
)


class PairSums(NamedTuple):
    """Inner products of the rows of four categories, summed over pairs of rows, and the numbers of
    pairs, for B resamples: docs/studies/swap_analysis.md, section 8.3."""

    different: Float[np.ndarray, "B 4 4"]  # pairs of rows of different images
    same: Float[np.ndarray, "B 4 4"]  # pairs of rows of one image
    number_different: Float[np.ndarray, "B 4 4"]
    number_same: Float[np.ndarray, "B 4 4"]

    @property
    def all(self) -> Float[np.ndarray, "B 4 4"]:
        """All pairs of rows."""
        return self.different + self.same

    @property
    def number_all(self) -> Float[np.ndarray, "B 4 4"]:
        return self.number_different + self.number_same


def _pair_sums(of_category: Sequence[ImageSums], weights: Float[np.ndarray, "B K"]) -> PairSums:
    """Sums over pairs of rows of two categories a, b. w: how often each image was drawn; a pair of
    different images k, l counts w_k w_l times, a pair of one image k counts w_k times."""
    # S_a[k]: sum of a's rows in image k; T_a = sum_k w_k S_a[k]
    totals = [weights[:, images] @ sums for images, sums, _ in of_category]
    numbers = [weights[:, images] @ counts for images, _, counts in of_category]
    sums = PairSums(*(np.zeros((len(weights), 4, 4)) for _ in range(4)))
    for a in range(4):
        for b in range(a, 4):
            both, in_a, in_b = np.intersect1d(
                of_category[a].images,
                of_category[b].images,
                assume_unique=True,
                return_indices=True,
            )
            w = weights[:, both]
            # S_a[k] . S_b[k] and the number of these pairs, for images that have both
            within = np.einsum("kd,kd->k", of_category[a].sums[in_a], of_category[b].sums[in_b])
            number_within = of_category[a].counts[in_a] * of_category[b].counts[in_b]
            # T_a . T_b holds w_k^2 S_a[k] . S_b[k] of each image, which are no different images
            of_pair = PairSums(
                np.einsum("bd,bd->b", totals[a], totals[b]) - w**2 @ within,
                w @ within,
                numbers[a] * numbers[b] - w**2 @ number_within,
                w @ number_within,
            )
            for matrix, values in zip(sums, of_pair, strict=True):
                matrix[:, a, b] = values
                matrix[:, b, a] = values
    return sums


class Entanglement(NamedTuple):
    """Both forms, for B resamples."""

    eq3: Float[np.ndarray, " B"]
    group_cosine: Float[np.ndarray, " B"]


def _entanglement_of(
    sums: Float[np.ndarray, "B 4 4"], numbers: Float[np.ndarray, "B 4 4"]
) -> Entanglement:
    """Equation 3, and the cosine of the sign-corrected groups' means, from sums of inner products
    and the numbers of summed pairs."""
    # (B, 6, 6): of the four categories, then of the two groups
    sums = TO_GROUPS @ sums @ TO_GROUPS.T
    numbers = np.abs(TO_GROUPS) @ numbers @ np.abs(TO_GROUPS).T
    products = np.divide(sums, numbers, out=np.full_like(sums, np.nan), where=numbers > 0.5)
    squares = np.diagonal(products, axis1=1, axis2=2)
    size = np.sqrt(np.where(squares > 0, squares, np.nan))
    cosines = products / (size[:, :, None] * size[:, None, :])
    above, under, far, close, vertical, distance = range(6)
    eq3 = (
        cosines[:, above, far]
        + cosines[:, under, close]
        - cosines[:, above, close]
        - cosines[:, under, far]
    ) / 4
    return Entanglement(eq3, cosines[:, vertical, distance])


def _both_fits(sums: PairSums) -> tuple[Entanglement, Entanglement]:
    """Entanglement of all pairs of rows, and of those of different images (cross-fitted)."""
    return (
        _entanglement_of(sums.all, sums.number_all),
        _entanglement_of(sums.different, sums.number_different),
    )


def vd_entanglement(
    deltas: Float[np.ndarray, "n L d"],
    categories: Labels,
    images: Labels | None = None,
    num_resamples: int = RESAMPLES,
    seed: int = 0,
) -> Numbers:
    """{form: {value, low, high, crossfit, crossfit_low, crossfit_high, too_few: (L,)}, n:
    {category: (L,)}, n_images: (L,)}, forms eq3_raw and eq3_unit (equation 3 on means of deltas as
    they are, and of unit deltas), group_cosine_raw and group_cosine_unit (cosine of the means of
    sign-corrected vertical and distance deltas, as the released code has it: larger by 1 / sqrt((1
    - cos(above, under)) (1 - cos(far, close)) / 4)).

    crossfit: every inner product of two means, also a mean's with itself, over pairs of rows of
    different images only: what means of two disjoint halves of the images give, averaged over all
    splits. Noise then neither shortens the cosine nor, where one image has both kinds of pairs,
    adds to it; it can exceed 1, and is NaN where a mean's direction does not repeat across images.
    Limits are NaN with fewer than FEW images. docs/studies/swap_analysis.md, sections 2 and 8.3.
    """
    categories, codes = checked(deltas, categories, images)
    mine = np.isin(categories, VERTICAL_AND_DISTANCE)
    # only images with a vertical or a distance pair are drawn
    codes[mine] = np.unique(codes[mine], return_inverse=True)[1].reshape(-1)
    num_images = int(codes[mine].max(initial=-1)) + 1
    weights = draws(num_images, num_resamples, seed)
    once = np.ones((1, num_images))  # every image, as it is
    per_layer: dict[str, list[Numbers]] = {form: [] for form in FORMS}
    n: dict[str, list[int]] = {category: [] for category in VERTICAL_AND_DISTANCE}
    n_images = []
    for layer in range(deltas.shape[1]):
        rows, _, norms = layer_rows(deltas, layer)
        used = {name: (categories == name) & (norms > 0) for name in VERTICAL_AND_DISTANCE}
        for category, of_category in used.items():
            n[category].append(int(of_category.sum()))
        n_images.append(len(np.unique(codes[np.any(list(used.values()), axis=0)])))
        is_resampled = n_images[-1] >= FEW and num_resamples > 0
        for kind in ("raw", "unit"):
            of_categories = [
                sums_by_image(
                    rows[chosen] / (norms[chosen, None] if kind == "unit" else 1.0), codes[chosen]
                )
                for chosen in used.values()
            ]
            measured = _both_fits(_pair_sums(of_categories, once))
            resampled = _both_fits(_pair_sums(of_categories, weights)) if is_resampled else None
            for number, form in enumerate(("eq3", "group_cosine")):
                numbers = _with_limits(measured, resampled, number)
                per_layer[f"{form}_{kind}"].append(numbers)
    forms = {form: _over_layers(numbers) for form, numbers in per_layer.items()}
    counts = {category: np.array(of_layers, int) for category, of_layers in n.items()}
    return forms | {"n": counts, "n_images": np.array(n_images)}


def _with_limits(
    measured: tuple[Entanglement, Entanglement],
    resampled: tuple[Entanglement, Entanglement] | None,
    form: int,
) -> Numbers:
    """One form's fields; measured, resampled: of all pairs of rows, and cross-fitted."""
    value = float(measured[0][form][0])
    crossfit = float(measured[1][form][0])
    low = high = crossfit_low = crossfit_high = math.nan
    if resampled is not None:
        low, high = _as_cosines(value, *limits(resampled[0][form]))
    if resampled is not None and np.isfinite(crossfit):
        crossfit_low, crossfit_high = _as_cosines(crossfit, *limits(resampled[1][form]))
    return {
        "value": value,
        "crossfit": crossfit,
        "low": low,
        "high": high,
        "crossfit_low": crossfit_low,
        "crossfit_high": crossfit_high,
        "too_few": not np.isfinite(value),
    }


def _as_cosines(value: float, low: float, high: float) -> tuple[float, float]:
    """Limits of a cosine, or of equation 3, which cannot leave [-1, 1]: a resample, of which pairs
    of one drawn image count once, can. One beyond goes to the bound, or to a cross-fitted value
    that is beyond it itself."""
    if high > 1:
        high = max(1.0, value)
        low = min(low, value) if low > 1 else low
    if low < -1:
        low = min(-1.0, value)
        high = max(high, value) if high < -1 else high
    return low, high


# --- alignment of the two deltas of one scene -----------------------------------------------------


@lru_cache(maxsize=4)
def _orders(n: int, seed: int) -> Int[np.ndarray, "B n"]:
    """PERMUTATIONS orders of n quads, the same for every layer."""
    rng = np.random.default_rng([seed, n])
    return rng.permuted(np.tile(np.arange(n), (PERMUTATIONS, 1)), axis=1)


@lru_cache(maxsize=4)
def _tosses(images: int, seed: int) -> Float[np.ndarray, "B K"]:
    """PERMUTATIONS tosses of a sign for each image."""
    return np.random.default_rng([seed, images, 1]).choice([-1.0, 1.0], (PERMUTATIONS, images))


def _alignment(
    vertical: Rows, distance: Rows, codes: Codes, num_resamples: int, seed: int
) -> Numbers:
    """One layer's fields of cross_alignment() from rows that are not 0."""
    n = len(vertical)
    fields = (
        "per_sample_mean per_sample_std low high mean_delta_alignment permutation_mean"
        " permutation_std p_value sign_flip_std sign_flip_p_value"
    )
    numbers = dict.fromkeys(fields.split(), math.nan) | {
        "n_samples": n,
        "n_images": len(np.unique(codes)),
        "too_few": n < 2,
    }
    if n < 2:
        return numbers
    u_v = vertical / np.linalg.norm(vertical, axis=1)[:, None]
    u_d = distance / np.linalg.norm(distance, axis=1)[:, None]
    cosines = np.einsum("nd,nd->n", u_v, u_d)
    mean = float(cosines.mean())
    numbers["per_sample_mean"] = mean
    numbers["per_sample_std"] = float(cosines.std())
    numbers["mean_delta_alignment"] = cosine(vertical.mean(0), distance.mean(0))
    numbers["low"], numbers["high"] = mean_limits(cosines, codes, num_resamples, seed, DIFFERENCES)

    # distance deltas dealt out again: mean(u_v) . mean(u_d),
    # |centred U_v U_d^T|_F / (n sqrt(n-1))
    centre_v = u_v.mean(0)
    centre_d = u_d.mean(0)
    expected = float(centre_v @ centre_d)
    spread = math.sqrt(energy(u_v - centre_v, u_d - centre_d)) / (n * math.sqrt(n - 1))
    numbers["permutation_mean"] = expected
    numbers["permutation_std"] = spread
    if spread > 1e-12:
        dealt = (u_v @ u_d.T)[np.arange(n), _orders(n, seed)].mean(1)
        numbers["p_value"] = permutation_p(mean, dealt)

    # the relative sign of the axes tossed for each image: mean 0
    of_images = sums_by_image(cosines, codes).sums / n
    spread = math.sqrt(np.square(of_images).sum())
    numbers["sign_flip_std"] = spread
    if spread > 1e-12:
        tossed = _tosses(len(of_images), seed) @ of_images
        numbers["sign_flip_p_value"] = permutation_p(mean, tossed)
    return numbers


def cross_alignment(
    delta_vert: Float[np.ndarray, "q L d"],
    delta_dist: Float[np.ndarray, "q L d"],
    signs: Float[np.ndarray, "q 2"],
    images: Labels | None = None,
    num_resamples: int = RESAMPLES,
    seed: int = 0,
) -> Numbers:
    """Cosine of the vertical and the distance delta of one scene: {field: (L,), "as_published":
    {field: (L,)}}. signs of +1 and -1 turn the two into above and far; as_published leaves them as
    they are, so that opposite labels cancel.

    per_sample_mean, per_sample_std over n_samples quads, low and high over images;
    mean_delta_alignment = cosine of the two mean deltas. Distance deltas dealt out again to other
    quads: permutation_mean = mean(u_v) . mean(u_d), permutation_std = |centred U_v U_d^T|_F / (q
    sqrt(q-1)), both exact; p_value two-sided from PERMUTATIONS of them, so not below 1e-4. That
    asks whether a scene's own pairing matters, not whether the axes are entangled: perfectly
    entangled ones equal their permutations. What asks it is sign_flip_p_value: the relative sign of
    the two axes is tossed for each image. docs/studies/swap_analysis.md, sections 2 and 5.2.5.
    """
    signs = np.asarray(signs, dtype=np.float64)
    if (
        delta_vert.ndim != 3
        or delta_vert.shape != delta_dist.shape
        or signs.shape != (len(delta_vert), 2)
        or not np.all(np.abs(signs) == 1)
    ):
        raise ValueError(
            f"two arrays (q, L, d) and signs (q, 2) of +-1 are wanted, got {delta_vert.shape},"
            f" {delta_dist.shape}, {signs.shape}"
        )
    codes = image_codes(images, len(signs))
    corrected = []
    published = []
    for layer in range(delta_vert.shape[1]):
        vertical, finite_v, norms_v = layer_rows(delta_vert, layer)
        distance, finite_d, norms_d = layer_rows(delta_dist, layer)
        used = (norms_v > 0) & (norms_d > 0)
        left_out = {
            "zeros": int((finite_v & finite_d & ~used).sum()),
            "not_finite": int((~finite_v | ~finite_d).sum()),
        }
        vertical, distance, of_quad, turn = vertical[used], distance[used], codes[used], signs[used]
        turned = vertical * turn[:, :1], distance * turn[:, 1:]
        corrected.append(_alignment(*turned, of_quad, num_resamples, seed) | left_out)
        published.append(_alignment(vertical, distance, of_quad, num_resamples, seed) | left_out)
    return _over_layers(corrected) | {"as_published": _over_layers(published)}


# --- outlier dimensions, choice of a layer --------------------------------------------------------


def outlier_report(deltas: Float[np.ndarray, "n L d"], categories: Labels, top: int = 5) -> Numbers:
    """How much a few dimensions carry: {dimensions (L, top) by falling energy, share (L, top) of
    sum |delta|^2 that the first 1, 2, ... hold together, coherence {group: (L,)}, coherence_without
    {group: (L,)} without these dimensions, n (L,)}. docs/studies/swap_analysis.md, section 5.2.1.
    """
    categories, _ = checked(deltas, categories)
    layers, width = deltas.shape[1:]
    top = min(top, width)
    dimensions = np.zeros((layers, top), int)
    share = np.full((layers, top), np.nan)
    n = np.zeros(layers, int)
    coherence = {group: np.full(layers, np.nan) for group in GROUPS}
    without = {group: np.full(layers, np.nan) for group in GROUPS}
    signs = np.array([SIGNS[category] for category in categories.tolist()])
    for layer in range(layers):
        rows, finite, _ = layer_rows(deltas, layer)
        held = np.square(rows).sum(0)
        n[layer] = finite.sum()
        dimensions[layer] = np.argsort(-held, kind="stable")[:top]
        if held.sum() > 0:
            share[layer] = np.cumsum(held[dimensions[layer]]) / held.sum()
        rows = rows * signs[:, None]
        for group, pair in GROUPS.items():
            mine = rows[np.isin(categories, pair)]
            coherence[group][layer] = _mean_cosine(mine)
            mine[:, dimensions[layer]] = 0.0
            without[group][layer] = _mean_cosine(mine)
    return {
        "dimensions": dimensions,
        "share": share,
        "coherence": coherence,
        "coherence_without": without,
        "n": n,
    }


def _mean_cosine(rows: Rows) -> float:
    """Mean pairwise cosine of the rows that are not 0; NaN with fewer than two."""
    norms = np.linalg.norm(rows, axis=1)
    n = np.count_nonzero(norms)
    if n < 2:
        return math.nan
    total = (rows[norms > 0] / norms[norms > 0, None]).sum(0)
    return float((total @ total - n) / (n * (n - 1)))


def recommend_layer(
    axis_coherence: Mapping[str, Mapping[int, float | None]],
    total_layers: int,
    k: int = 3,
    frac: float = 0.07,
    plateau: float = 0.85,
    vd: Mapping[int, float | None] | None = None,
) -> Numbers:
    """The layer at which the axes are clearest together. axis_coherence {group: {layer: mean or
    None}}, vd {layer: index} (optional, reported only).

    An axis' plateau: layers with at least `plateau` of its peak; candidates: layers of any plateau
    up to round(total_layers (1 - frac)); ranked by the smallest coherence / peak over the axes, the
    deeper of two equals first. An axis whose peak is not above 0 is ignored.
    docs/studies/swap_analysis.md, section 2.
    """
    curves = {group: _known(curve) for group, curve in axis_coherence.items()}
    peaks = {group: max(curve.values(), default=0.0) for group, curve in curves.items()}
    usable = [group for group in curves if peaks[group] > 0]
    plateaus = {
        group: sorted(
            layer for layer, value in curves[group].items() if value >= plateau * peaks[group]
        )
        for group in usable
    }
    cutoff = round(total_layers * (1 - frac))
    candidates = sorted(
        {layer for layers in plateaus.values() for layer in layers if layer <= cutoff}
    )
    score = {
        layer: min(curves[group].get(layer, -math.inf) / peaks[group] for group in usable)
        for layer in candidates
    }
    ranked = sorted(candidates, key=lambda layer: (score[layer], layer), reverse=True)[:k]
    warnings = [
        f"{group}: {'coherence is nowhere above 0' if curves[group] else 'no pairs'}, not used"
        for group in curves
        if group not in usable
    ]
    if not candidates:
        warnings.append("no layer qualifies")
    stable = _stable_layers(vd or {})
    return {
        "recommended": ranked[0] if ranked else None,
        "top_k": [
            {"layer": layer, "score": score[layer] if math.isfinite(score[layer]) else None}
            for layer in ranked
        ],
        "candidate_range": candidates,
        "per_group_plateau": plateaus,
        "cutoff_layer": cutoff,
        "criteria_applied": {
            "groups": usable,
            "plateau": plateau,
            "frac": frac,
            "k": k,
            "total_layers": total_layers,
        },
        "vd_more_stable_than_median": {str(layer): stable.get(layer) for layer in ranked},
        "warnings": warnings,
    }


def _known(curve: Mapping[int, float | None]) -> dict[int, float]:
    """{layer: value} without the layers that have none."""
    return {
        int(layer): float(value)
        for layer, value in curve.items()
        if value is not None and np.isfinite(value)
    }


def _stable_layers(vd: Mapping[int, float | None], window: int = 3) -> dict[int, bool]:
    """{layer: whether the index varies no more within +-window layers than at the median layer} of
    {layer: index}."""
    known = _known(vd)
    spread = {}
    for layer in known:
        near = [value for other, value in known.items() if abs(other - layer) <= window]
        spread[layer] = float(np.std(near))
    middle = np.median(list(spread.values())) if spread else math.nan
    return {layer: bool(value <= middle) for layer, value in spread.items()}

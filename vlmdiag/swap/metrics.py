"""Does the difference of two hidden states, of a question and of the same question with its objects
swapped, lie along one spatial axis?

    delta_i = h(swapped_i) - h(original_i)     u_i = delta_i / |delta_i|     s_i = +1 for left,
    above, far and -1 for right, under, close
    axis coherence   mean over pairs i < j of cos(s_i u_i, s_j u_j) = (|sum s_i u_i|^2 - n) / (n (n
                     - 1))
    entanglement     (cos(above, far) + cos(under, close) - cos(above, close) - cos(under, far)) / 4
                     of mean deltas

"Why Far Looks Up" (arXiv 2605.30161), equations 1 to 3; sections 2 and 5.2 of our study. Pure
numpy, one layer at a time in float64, closed forms: no n x n matrix and no shuffling. Deltas (n, L,
d) may be a memory map. A delta that is 0 has no direction: it is left out of every cosine and
counted as `zeros`; one with an infinity or NaN (float16 overflows at 65504) is left out and counted
as `not_finite`. NaN stands where fewer than two are left, with too_few = True. Intervals are 95 %
percentile bootstraps that draw whole images (each row its own image where no ids are given); copies
of an image drawn twice are not paired with each other, since a copy agrees with itself and would
lift every coherence.
"""

import math
from functools import lru_cache

import numpy as np

from vlmdiag.figures.stats import wilson_interval

CATEGORIES = ("left", "right", "above", "under", "far", "close")
GROUPS = {
    "horizontal": ("left", "right"),
    "vertical": ("above", "under"),
    "distance": ("far", "close"),
}
SIGNS = {category: sign for pair in GROUPS.values() for category, sign in zip(pair, (1.0, -1.0))}
GROUP_OF = {category: group for group, pair in GROUPS.items() for category in pair}
SPLITS = ("consistent", "counter", "ambiguous")
RESAMPLES = 1000
ROWS = 256  # of a product of two sets of vectors that are held at once


# --- rows, images, draws --------------------------------------------------------------------------


def checked(deltas, categories, images=None):
    """(categories (n,) str, images (n,) codes 0..K-1) of deltas (n, L, d). ValueError on other
    shapes and unknown categories."""
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


def image_codes(images, n):
    """(n,) int codes 0..K-1 of image ids; each row its own image where images is None."""
    if images is None:
        return np.arange(n)
    if len(images) != n:
        raise ValueError(f"{len(images)} image ids for {n} rows")
    return np.unique(np.asarray(images, dtype=str), return_inverse=True)[1].reshape(n)


def layer_rows(deltas, layer):
    """(rows (n, d) float64 of one layer, finite (n,) bool, norms (n,)); a row that is not finite
    reads 0 and has norm NaN."""
    rows = np.asarray(deltas[:, layer], dtype=np.float64)
    finite = np.isfinite(rows).all(axis=1)
    if not finite.all():
        rows = np.where(finite[:, None], rows, 0.0)
    return rows, finite, np.where(finite, np.linalg.norm(rows, axis=1), np.nan)


@lru_cache(maxsize=16)
def draws(num_images, num_resamples=RESAMPLES, seed=0):
    """(num_resamples, K) float: how often each of K images is drawn in each resample, the same at
    every layer."""
    if not num_images:
        return np.zeros((num_resamples, 0))
    drawn = (
        np.random.default_rng(seed)
        .multinomial(num_images, np.full(num_images, 1 / num_images), num_resamples)
        .astype(np.float64)
    )
    drawn.flags.writeable = False
    return drawn


def sums_by_image(values, codes):
    """(images that occur (k,), sums (k, ...), counts (k,)) of values (n, ...) over the rows of each
    image."""
    if not len(codes):
        return codes, values, np.zeros(0)
    order = np.argsort(codes, kind="stable")
    present, starts, counts = np.unique(codes[order], return_index=True, return_counts=True)
    return present, np.add.reduceat(values[order], starts, axis=0), counts.astype(np.float64)


def limits(values, level=0.95):
    """(low, high) of resampled values (B,), over the resamples that have one; NaN where fewer than
    half do."""
    known = values[np.isfinite(values)]
    if 2 * len(known) < max(len(values), 2):
        return math.nan, math.nan
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def mean_limits(values, codes, num_resamples=RESAMPLES, seed=0):
    """(low, high) of the mean of values (n,) over rows when whole images are drawn; NaN with fewer
    than two images."""
    present, sums, counts = sums_by_image(np.asarray(values, dtype=np.float64), codes)
    if len(present) < 2:
        return math.nan, math.nan
    weights = draws(len(present), num_resamples, seed)
    return limits((weights @ sums) / (weights @ counts))


def energy(a, b=None):
    """Sum of squared inner products of all rows of a (n, d) with all rows of b (m, d), b = a unless
    given; by d x d or by blocks of rows, what is less work."""
    b = a if b is None else b
    if a.shape[1] < max(len(a), len(b)):
        return float(((a.T @ a) * (b.T @ b)).sum())
    return float(
        sum(np.square(a[start : start + ROWS] @ b.T).sum() for start in range(0, len(a), ROWS))
    )


def squared_norms(weights, vectors):
    """(B,) |sum_k weights[b, k] vectors[k]|^2. weights (B, K), vectors (K, d)."""
    if len(vectors) < vectors.shape[1]:
        return np.einsum("bk,bk->b", weights @ (vectors @ vectors.T), weights)
    return np.concatenate(
        [
            np.square(weights[start : start + ROWS] @ vectors).sum(1)
            for start in range(0, len(weights), ROWS)
        ]
    )


def cosine(a, b):
    """Cosine of two vectors, NaN where one is 0."""
    size = math.sqrt(a @ a) * math.sqrt(b @ b)
    return float(a @ b / size) if size > 0 else math.nan


def _stacked(per_layer):
    """[{field: number}] of L layers -> {field: (L,) array}."""
    return (
        {field: np.array([row[field] for row in per_layer]) for field in per_layer[0]}
        if per_layer
        else {}
    )


# --- consistency and coherence --------------------------------------------------------------------


def pairwise_cosine(units, codes=None, num_resamples=RESAMPLES, seed=0):
    """Mean and population std of the cosines of all pairs of unit vectors (n, d), and the mean's
    interval over images.

    mean = (|sum u|^2 - n) / (n (n-1)); second moment = (|U^T U|_F^2 - n) / (n (n-1)). Our study's
    section 2.
    """
    n = len(units)
    codes = np.arange(n) if codes is None else codes
    present, sums, counts = sums_by_image(units, codes)
    found = {
        "mean": math.nan,
        "std": math.nan,
        "n": n,
        "n_images": len(present),
        "low": math.nan,
        "high": math.nan,
        "too_few": n < 2,
    }
    if n < 2:
        return found
    total, pairs = sums.sum(0), n * (n - 1)
    mean = (total @ total - n) / pairs
    found |= {
        "mean": float(mean),
        "std": math.sqrt(max((energy(units) - n) / pairs - mean**2, 0.0)),
    }
    if len(present) > 1 and num_resamples:
        weights, own = draws(len(present), num_resamples, seed), np.square(sums).sum(1)
        squares = weights**2
        cosines = squared_norms(weights, sums) - squares @ own + weights @ (own - counts)
        number = (weights @ counts) ** 2 - squares @ counts**2 + weights @ (counts**2 - counts)
        found["low"], found["high"] = limits(
            np.divide(cosines, number, out=np.full(len(number), np.nan), where=number > 0.5)
        )
    return found


def shuffled_label_moments(units, signs):
    """(mean, std) of the coherence when the n labels are dealt out again at random, exactly. units
    (n, d) not sign-corrected, signs (n,) of +1 and -1.

    X = sum_{i != j} s_i s_j g_ij with g = cos: E X = c2 S and E X^2 = 2 A + 4 c2 (R - A) + c4 (S^2
    - 2 A - 4 (R - A)), where S = sum g, A = sum g^2, R = sum_i (sum_{j != i} g_ij)^2 and c2, c4 =
    the mean products of 2 and of 4 different labels. Ours.
    """
    n, p = len(units), float(np.sum(signs))
    if n < 2:
        return math.nan, math.nan
    total = units.sum(0)
    rows = units @ total - 1.0
    whole, squares, chains = rows.sum(), energy(units) - n, rows @ rows
    c2 = (p**2 - n) / (n * (n - 1))
    c4 = (
        (p**4 - 6 * p**2 * n + 3 * n**2 + 8 * p**2 - 6 * n) / (n * (n - 1) * (n - 2) * (n - 3))
        if n > 3
        else 0.0
    )
    second = (
        2 * squares
        + 4 * c2 * (chains - squares)
        + c4 * (whole**2 - 2 * squares - 4 * (chains - squares))
    )
    return float(c2 * whole / (n * (n - 1))), math.sqrt(max(second - (c2 * whole) ** 2, 0.0)) / (
        n * (n - 1)
    )


def _consistency(deltas, categories, images, members, correct, num_resamples, seed):
    categories, codes = checked(deltas, categories, images)
    found = {name: [] for name in members}
    for layer in range(deltas.shape[1]):
        rows, finite, norms = layer_rows(deltas, layer)
        for name, names in members.items():
            mine = np.isin(categories, names)
            used = mine & (norms > 0)
            units, signs = (
                rows[used] / norms[used, None],
                np.array([SIGNS[category] for category in categories[used].tolist()]),
            )
            null = (
                dict(zip(("null_mean", "null_std"), shuffled_label_moments(units, signs)))
                if correct
                else {}
            )
            row = pairwise_cosine(
                units * signs[:, None] if correct else units, codes[used], num_resamples, seed
            )
            left_out = {
                "zeros": int((mine & (norms == 0)).sum()),
                "not_finite": int((mine & ~finite).sum()),
            }
            found[name].append(row | null | left_out)
    return {name: _stacked(rows) for name, rows in found.items()}


def within_category_consistency(deltas, categories, images=None, num_resamples=RESAMPLES, seed=0):
    """{category: {mean, std, n, n_images, low, high, too_few, zeros, not_finite: (L,)}} of the
    cosines within each category. deltas (n, L, d)."""
    return _consistency(
        deltas,
        categories,
        images,
        {name: (name,) for name in CATEGORIES},
        False,
        num_resamples,
        seed,
    )


def axis_coherence(deltas, categories, images=None, num_resamples=RESAMPLES, seed=0):
    """{group: {mean, std, n, n_images, low, high, null_mean, null_std, too_few, zeros, not_finite:
    (L,)}}: right, under and close flipped, then the cosines within horizontal, vertical, distance;
    null: the same after labels were shuffled in the group. deltas (n, L, d). Equations 1 and 2.
    """
    return _consistency(deltas, categories, images, GROUPS, True, num_resamples, seed)


def delta_similarity(deltas, categories):
    """{cosine (L, 6, 6) of the categories' mean deltas in the order of CATEGORIES, norm (L, 6) mean
    |delta|, n (L, 6), categories}; NaN for an empty one.

    Means are of the deltas as they are, so long ones count more. deltas (n, L, d). The paper's
    heatmaps.
    """
    categories, _ = checked(deltas, categories)
    layers = deltas.shape[1]
    cosines, norm, n = (
        np.full((layers, 6, 6), np.nan),
        np.full((layers, 6), np.nan),
        np.zeros((layers, 6), int),
    )
    for layer in range(layers):
        rows, finite, norms = layer_rows(deltas, layer)
        means = np.zeros((6, rows.shape[1]))
        for k, category in enumerate(CATEGORIES):
            mine = (categories == category) & finite
            n[layer, k] = mine.sum()
            if mine.any():
                means[k], norm[layer, k] = rows[mine].mean(0), norms[mine].mean()
        size = np.linalg.norm(means, axis=1)
        units = np.divide(
            means, size[:, None], out=np.full_like(means, np.nan), where=size[:, None] > 0
        )
        cosines[layer] = np.clip(units @ units.T, -1, 1)
    return {"cosine": cosines, "norm": norm, "n": n, "categories": CATEGORIES}


# --- entanglement of vertical position and distance -----------------------------------------------


def entanglement_of_similarity(cosines):
    """Equation 3 of a 6 x 6 delta similarity in the order of CATEGORIES. (..., 6, 6) -> (...)."""
    return (cosines[..., 2, 4] + cosines[..., 3, 5] - cosines[..., 2, 5] - cosines[..., 3, 4]) / 4


_VD = ("above", "under", "far", "close")
_TO_GROUPS = np.array(
    [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1], [1, -1, 0, 0], [0, 0, 1, -1]], float
)


def _entanglement_forms(products, numbers):
    """(equation 3 (B,), cosine of the sign-corrected groups' means (B,)) from sums of inner
    products (B, 4, 4) and the numbers of summed pairs."""
    products, numbers = (
        _TO_GROUPS @ products @ _TO_GROUPS.T,
        np.abs(_TO_GROUPS) @ numbers @ np.abs(_TO_GROUPS).T,
    )
    means = np.divide(products, numbers, out=np.full_like(products, np.nan), where=numbers > 0.5)
    squares = np.diagonal(means, axis1=1, axis2=2)
    size = np.sqrt(np.where(squares > 0, squares, np.nan))
    cosines = means / (size[:, :, None] * size[:, None, :])
    return (cosines[:, 0, 2] + cosines[:, 1, 3] - cosines[:, 0, 3] - cosines[:, 1, 2]) / 4, cosines[
        :, 4, 5
    ]


def _image_products(parts, weights):
    """Sums over pairs of rows of the four categories of weighted inner products: (pairs of
    different images (B, 4, 4), pairs of one image (B, 4, 4), and the numbers of both). parts: four
    of sums_by_image(); a pair of different images counts w_k w_l times, one of the same image w_k
    times.
    """
    totals = [weights[:, present] @ sums for present, sums, _ in parts]
    counts = [weights[:, present] @ number for present, _, number in parts]
    shape = len(weights), 4, 4
    different, same, number_different, number_same = (
        np.zeros(shape),
        np.zeros(shape),
        np.zeros(shape),
        np.zeros(shape),
    )
    for a in range(4):
        for b in range(a, 4):
            shared, in_a, in_b = np.intersect1d(
                parts[a][0], parts[b][0], assume_unique=True, return_indices=True
            )
            own, own_number = (
                np.einsum("kd,kd->k", parts[a][1][in_a], parts[b][1][in_b]),
                parts[a][2][in_a] * parts[b][2][in_b],
            )
            drawn = weights[:, shared]
            for target, value in (
                (different, np.einsum("bd,bd->b", totals[a], totals[b]) - drawn**2 @ own),
                (same, drawn @ own),
                (number_different, counts[a] * counts[b] - drawn**2 @ own_number),
                (number_same, drawn @ own_number),
            ):
                target[:, a, b] = target[:, b, a] = value
    return different, same, number_different, number_same


def vd_entanglement(deltas, categories, images=None, num_resamples=RESAMPLES, seed=0):
    """{form: {value, low, high, crossfit, crossfit_low, crossfit_high, too_few: (L,)}, n:
    {category: (L,)}, n_images: (L,)}, forms eq3_raw and eq3_unit (equation 3 on means of deltas as
    they are, and of unit deltas), group_cosine_raw and group_cosine_unit (cosine of the means of
    sign-corrected vertical and distance deltas, as the released code has it: larger by 1 / sqrt((1
    - cos(above, under)) (1 - cos(far, close)) / 4)). deltas (n, L, d).

    crossfit: every inner product of two means, also a mean's with itself, over pairs of rows of
    different images only: what means of two disjoint halves of the images give, averaged over all
    splits. Noise then neither shortens the cosine nor, where one image has both kinds of pairs,
    adds to it; it can exceed 1, and is NaN where a mean's direction does not repeat across images.
    Our study's sections 2 and 8.3.
    """
    categories, codes = checked(deltas, categories, images)
    mine = np.isin(categories, _VD)
    codes[mine] = np.unique(codes[mine], return_inverse=True)[1].reshape(
        -1
    )  # only images with a vertical or a distance pair are drawn
    num_images = int(codes[mine].max(initial=-1)) + 1
    weights, one = draws(num_images, num_resamples, seed), np.ones((1, num_images))
    found = {form: [] for form in ("eq3_raw", "eq3_unit", "group_cosine_raw", "group_cosine_unit")}
    number, images_used = [], []
    for layer in range(deltas.shape[1]):
        rows, _, norms = layer_rows(deltas, layer)
        used = [(categories == category) & (norms > 0) for category in _VD]
        number.append([int(mine.sum()) for mine in used])
        of_layer = np.unique(codes[np.any(used, axis=0)])
        images_used.append(len(of_layer))
        for kind in ("raw", "unit"):
            parts = [
                sums_by_image(
                    rows[mine] / (norms[mine, None] if kind == "unit" else 1.0), codes[mine]
                )
                for mine in used
            ]
            here, boot = (
                _forms_of(parts, one),
                (_forms_of(parts, weights) if len(of_layer) > 1 and num_resamples else None),
            )
            for k, form in enumerate((f"eq3_{kind}", f"group_cosine_{kind}")):
                row = {"value": float(here[0][k][0]), "crossfit": float(here[1][k][0])}
                row["low"], row["high"] = limits(boot[0][k]) if boot else (math.nan, math.nan)
                row["crossfit_low"], row["crossfit_high"] = (
                    limits(boot[1][k])
                    if boot and np.isfinite(row["crossfit"])
                    else (math.nan, math.nan)
                )
                found[form].append(row | {"too_few": not np.isfinite(row["value"])})
    counts = np.array(number).reshape(-1, 4)
    return {form: _stacked(rows) for form, rows in found.items()} | {
        "n": {category: counts[:, k] for k, category in enumerate(_VD)},
        "n_images": np.array(images_used),
    }


def _forms_of(parts, weights):
    """((eq3, group cosine) of all pairs, (eq3, group cosine) of pairs of different images), each
    (B,)."""
    different, same, number_different, number_same = _image_products(parts, weights)
    return _entanglement_forms(
        different + same, number_different + number_same
    ), _entanglement_forms(different, number_different)


def two_sided(z):
    """Two-sided p of a standard normal z; NaN for NaN."""
    return math.erfc(abs(z) / math.sqrt(2))


def _alignment(vertical, distance, vertical_norms, distance_norms, codes, num_resamples, seed):
    """One layer's fields of cross_alignment() from rows (q, d) whose norms are above 0."""
    n = len(vertical)
    names = (
        "per_sample_mean per_sample_std low high mean_delta_alignment permutation_mean"
        " permutation_std p_value sign_flip_std sign_flip_p_value"
    )
    found = dict.fromkeys(names.split(), math.nan) | {
        "n_samples": n,
        "n_images": len(np.unique(codes)),
        "too_few": n < 2,
    }
    if n < 2:
        return found
    a, b = vertical / vertical_norms[:, None], distance / distance_norms[:, None]
    cosines = np.einsum("nd,nd->n", a, b)
    mean = float(cosines.mean())
    found |= {
        "per_sample_mean": mean,
        "per_sample_std": float(cosines.std()),
        "mean_delta_alignment": cosine(vertical.mean(0), distance.mean(0)),
    }
    found["low"], found["high"] = mean_limits(cosines, codes, num_resamples, seed)
    centre_a, centre_b = a.mean(0), b.mean(0)
    expected, spread = (
        float(centre_a @ centre_b),
        math.sqrt(energy(a - centre_a, b - centre_b)) / (n * math.sqrt(n - 1)),
    )
    found |= {
        "permutation_mean": expected,
        "permutation_std": spread,
        "p_value": two_sided((mean - expected) / spread) if spread > 1e-12 else math.nan,
    }
    spread = math.sqrt(np.square(sums_by_image(cosines, codes)[1]).sum()) / n
    return found | {
        "sign_flip_std": spread,
        "sign_flip_p_value": two_sided(mean / spread) if spread > 1e-12 else math.nan,
    }


def cross_alignment(delta_vert, delta_dist, signs, images=None, num_resamples=RESAMPLES, seed=0):
    """Cosine of the vertical and the distance delta of one scene: {field: (L,), "as_published":
    {field: (L,)}}. delta_vert, delta_dist (q, L, d), signs (q, 2) of +1 and -1 that turn the two
    into above and far; as_published leaves them as they are, so that opposite labels cancel.

    per_sample_mean, per_sample_std over n_samples quads, low and high over images;
    mean_delta_alignment = cosine of the two mean deltas. Distance deltas dealt out again to other
    quads: permutation_mean = mean(u_v) . mean(u_d), permutation_std = |centred U_v U_d^T|_F / (q
    sqrt(q-1)), both exact, p_value two-sided by the normal law. That asks whether a scene's own
    pairing matters, not whether the axes are entangled: perfectly entangled ones equal their
    permutations. What asks it is sign_flip_p_value: the relative sign of the two axes is tossed for
    each image. Our study's sections 2 and 5.2.5.
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
    codes, corrected, published = image_codes(images, len(signs)), [], []
    for layer in range(delta_vert.shape[1]):
        (vertical, finite_v, norms_v), (distance, finite_d, norms_d) = (
            layer_rows(delta_vert, layer),
            layer_rows(delta_dist, layer),
        )
        used = (norms_v > 0) & (norms_d > 0)
        left_out = {
            "zeros": int((finite_v & finite_d & ~used).sum()),
            "not_finite": int((~finite_v | ~finite_d).sum()),
        }
        rest = norms_v[used], norms_d[used], codes[used], num_resamples, seed
        corrected.append(
            _alignment(vertical[used] * signs[used, :1], distance[used] * signs[used, 1:], *rest)
            | left_out
        )
        published.append(_alignment(vertical[used], distance[used], *rest) | left_out)
    return _stacked(corrected) | {"as_published": _stacked(published)}


# --- answers --------------------------------------------------------------------------------------


def accuracy(correct, codes=None, num_resamples=RESAMPLES, seed=0):
    """{n, value, low, high (Wilson, n questions), image_low, image_high (whole images drawn),
    too_few}. correct (n,) bool; NaN for n = 0."""
    correct = np.asarray(correct, dtype=bool)
    codes = np.arange(len(correct)) if codes is None else codes
    value, low, high, n = (
        float(part) for part in wilson_interval(int(correct.sum()), len(correct))
    )
    image_low, image_high = mean_limits(correct, codes, num_resamples, seed)
    return {
        "n": int(n),
        "value": value,
        "low": low,
        "high": high,
        "image_low": image_low,
        "image_high": image_high,
        "too_few": n < 1,
    }


def category_validity(categories, correct_orig, correct_swap, images=None):
    """{category: {n, acc_orig, acc_swap, reliable, too_few, acc_*_low, acc_*_high}}; reliable =
    both at least half. All (n,)."""
    categories, codes, found = (
        np.asarray(categories, dtype=str),
        image_codes(images, len(categories)),
        {},
    )
    for category in CATEGORIES:
        mine = categories == category
        row = _accuracies(
            {
                "orig": np.asarray(correct_orig, bool)[mine],
                "swap": np.asarray(correct_swap, bool)[mine],
            },
            codes[mine],
        )
        found[category] = row | {
            "reliable": bool(row["n"] and row["acc_orig"] >= 0.5 and row["acc_swap"] >= 0.5)
        }
    return found


def _accuracies(correct, codes):
    """{n, too_few, acc_<name>, acc_<name>_low, _high, _image_low, _image_high} of {name: (n,)
    bool}."""
    row = {}
    for name, values in correct.items():
        found = accuracy(values, codes)
        row |= {"n": found["n"], "too_few": found["too_few"], f"acc_{name}": found["value"]}
        row |= {
            f"acc_{name}_{end}": found[end] for end in ("low", "high", "image_low", "image_high")
        }
    return row


def prediction_stats(
    categories,
    correct_orig,
    correct_swap,
    images=None,
    splits=None,
    num_resamples=RESAMPLES,
    seed=0,
):
    """{<part>_n, <part>_acc_orig, _acc_swap, _acc_both and their intervals}, part = horizontal,
    vertical, distance, overall, and distance_<split>; then gap_<orig|swap|both>: {value, low, high,
    too_few} = accuracy of consistent minus that of counter distance pairs, whole images drawn. All
    (n,); splits may hold None. The paper's table 2; our study's sections 1.8 and 2."""
    categories, codes = np.asarray(categories, dtype=str), image_codes(images, len(categories))
    orig, swap = np.asarray(correct_orig, bool), np.asarray(correct_swap, bool)
    correct = {"orig": orig, "swap": swap, "both": orig & swap}
    groups = np.array([GROUP_OF[category] for category in categories.tolist()], dtype=str)
    splits = np.array(
        [str(split) for split in (splits if splits is not None else [None] * len(groups))],
        dtype=str,
    )
    parts = {group: groups == group for group in GROUPS} | {"overall": np.ones(len(groups), bool)}
    parts |= {f"distance_{split}": (groups == "distance") & (splits == split) for split in SPLITS}
    found = {}
    for part, mine in parts.items():
        row = _accuracies({name: values[mine] for name, values in correct.items()}, codes[mine])
        found |= {f"{part}_{field}": value for field, value in row.items()}
    for name, values in correct.items():
        found[f"gap_{name}"] = _gap(
            values,
            parts["distance_consistent"],
            parts["distance_counter"],
            codes,
            num_resamples,
            seed,
        )
    return found


def _gap(values, first, second, codes, num_resamples, seed):
    """Mean of values where first minus that where second, with its interval over the images of
    both."""
    found = {
        "value": math.nan,
        "low": math.nan,
        "high": math.nan,
        "n": [int(first.sum()), int(second.sum())],
        "too_few": not (first.any() and second.any()),
    }
    if found["too_few"]:
        return found
    either = first | second
    present, sums, _ = sums_by_image(
        np.stack([values & first, first, values & second, second], axis=1)[either].astype(
            np.float64
        ),
        codes[either],
    )
    found["value"] = float(values[first].mean() - values[second].mean())
    if len(present) > 1:
        drawn = draws(len(present), num_resamples, seed) @ sums
        shares = np.divide(
            drawn[:, ::2],
            drawn[:, 1::2],
            out=np.full((len(drawn), 2), np.nan),
            where=drawn[:, 1::2] > 0,
        )
        found["low"], found["high"] = limits(shares[:, 0] - shares[:, 1])
    return found


# --- outlier dimensions, choice of a layer --------------------------------------------------------


def outlier_report(deltas, categories, top=5):
    """How much a few dimensions carry: {dimensions (L, top) by falling energy, share (L, top) of
    sum |delta|^2 that the first 1, 2, ... hold together, coherence {group: (L,)}, coherence_without
    {group: (L,)} without these dimensions, n (L,)}. deltas (n, L, d). Our study's section 5.2.1.
    """
    categories, _ = checked(deltas, categories)
    layers, width = deltas.shape[1:]
    top = min(top, width)
    dimensions, share, n = (
        np.zeros((layers, top), int),
        np.full((layers, top), np.nan),
        np.zeros(layers, int),
    )
    coherence, without = ({group: np.full(layers, np.nan) for group in GROUPS} for _ in range(2))
    signs = np.array([SIGNS[category] for category in categories.tolist()])
    for layer in range(layers):
        rows, finite, _ = layer_rows(deltas, layer)
        held = np.square(rows).sum(0)
        n[layer], dimensions[layer] = finite.sum(), np.argsort(-held, kind="stable")[:top]
        if held.sum() > 0:
            share[layer] = np.cumsum(held[dimensions[layer]]) / held.sum()
        rows = rows * signs[:, None]
        for group, names in GROUPS.items():
            mine = rows[np.isin(categories, names)]
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


def _mean_cosine(rows):
    """Mean pairwise cosine of the rows (n, d) that are not 0; NaN with fewer than two."""
    norms = np.linalg.norm(rows, axis=1)
    n, total = np.count_nonzero(norms), (rows[norms > 0] / norms[norms > 0, None]).sum(0)
    return (total @ total - n) / (n * (n - 1)) if n > 1 else math.nan


def recommend_layer(axis_coherence, total_layers, k=3, frac=0.07, plateau=0.85, vd=None):
    """The layer at which the axes are clearest together. axis_coherence {group: {layer: mean or
    None}}, vd {layer: index} (optional, reported only).

    An axis' plateau: layers with at least `plateau` of its peak; candidates: layers of any plateau
    up to round(total_layers (1 - frac)); ranked by the smallest coherence / peak over the axes, the
    deeper of two equals first. An axis whose peak is not above 0 is ignored. Our study's section 2.
    """
    curves = {
        group: {
            int(layer): float(value)
            for layer, value in curve.items()
            if value is not None and np.isfinite(value)
        }
        for group, curve in axis_coherence.items()
    }
    peaks = {group: max(curve.values(), default=0.0) for group, curve in curves.items()}
    usable = [group for group in curves if peaks[group] > 0]
    cutoff = round(total_layers * (1 - frac))
    plateaus = {
        group: sorted(
            layer for layer, value in curves[group].items() if value >= plateau * peaks[group]
        )
        for group in usable
    }
    candidates = sorted(
        {layer for layers in plateaus.values() for layer in layers if layer <= cutoff}
    )
    score = {
        layer: min(curves[group].get(layer, -math.inf) / peaks[group] for group in usable)
        for layer in candidates
    }
    ranked = sorted(candidates, key=lambda layer: (score[layer], layer), reverse=True)[:k]
    warnings = [
        f"{group}: coherence is nowhere above 0, not used"
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


def _stable_layers(vd, window=3):
    """{layer: whether the index varies no more within +-window layers than at the median layer} of
    {layer: index}."""
    known = {
        int(layer): value for layer, value in vd.items() if value is not None and np.isfinite(value)
    }
    spread = {
        layer: float(
            np.std([value for other, value in known.items() if abs(other - layer) <= window])
        )
        for layer in known
    }
    middle = np.median(list(spread.values())) if spread else math.nan
    return {layer: bool(value <= middle) for layer, value in spread.items()}

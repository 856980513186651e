"""Metrics of the swap analysis against slow loops, shuffles and planted axes; what is left out and
what is too few; the tree of result files."""

import csv
import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import stdtrit

from vlmdiag.cli import UsageError
from vlmdiag.swap import metrics, results
from vlmdiag.swap.accuracy import category_validity, prediction_stats
from vlmdiag.swap.metrics import (
    axis_coherence,
    cross_alignment,
    delta_similarity,
    energy,
    outlier_report,
    pairwise_cosine,
    recommend_layer,
    shuffled_label_moments,
    vd_entanglement,
    within_category_consistency,
)
from vlmdiag.swap.relations import CATEGORIES, GROUP_OF, GROUPS, SIGNS
from vlmdiag.swap.resampling import draws

pytestmark = pytest.mark.fast

FEW = {"num_resamples": 50}


def cosines(a, b):
    return (a / np.linalg.norm(a, axis=1, keepdims=True)) @ (
        b / np.linalg.norm(b, axis=1, keepdims=True)
    ).T


def slow_pairs(rows):
    """Mean and population std of the cosines of all pairs, from the whole matrix."""
    values = cosines(rows, rows)[np.triu_indices(len(rows), 1)]
    return values.mean(), values.std()


def noise(n, layers=2, d=24, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, layers, d)) + 0.3 * rng.standard_normal((layers, d)), np.array(
        [CATEGORIES[k % 6] for k in range(n)]
    )


def planted(
    n_per_category=60, layers=1, d=96, angle=60.0, spread=0.7, seed=0, scene=0.0, paired=True
):
    """(deltas, categories, images) with orthogonal horizontal and vertical axes, distance at
    `angle` degrees from vertical, and isotropic noise of norm about `spread`; scene: norm of an
    extra direction of the image that its above and far deltas share (paired: an image has a pair of
    each category).
    """
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.standard_normal((d, 3)))[0].T
    axes = {"horizontal": basis[0], "vertical": basis[1]}
    axes["distance"] = (
        math.cos(math.radians(angle)) * basis[1] + math.sin(math.radians(angle)) * basis[2]
    )
    rows, names, images = [], [], []
    for image in range(n_per_category):
        shared = scene * rng.standard_normal(d) / math.sqrt(d)
        for category in CATEGORIES:
            group = GROUP_OF[category]
            delta = SIGNS[category] * (axes[group] + shared * (group != "horizontal"))
            rows.append(delta + spread * rng.standard_normal((layers, d)) / math.sqrt(d))
            names.append(category)
            images.append(str(image if paired else len(images)))
    return np.array(rows).reshape(len(rows), layers, d), np.array(names), np.array(images)


def entanglement_of_similarity(cosines):
    """Equation 3 of a 6 x 6 delta similarity in the order of CATEGORIES."""
    above, under, far, close = map(CATEGORIES.index, ("above", "under", "far", "close"))
    along = cosines[..., above, far] + cosines[..., under, close]
    return (along - cosines[..., above, close] - cosines[..., under, far]) / 4


# --- consistency and coherence --------------------------------------------------------------------


@pytest.mark.parametrize(
    "d", [5, 24, 300]
)  # fewer and more dimensions than deltas of a category, more than a block of rows
def test_within_category_consistency_is_that_of_the_whole_cosine_matrix(d):
    deltas, categories = noise(120, d=d)
    found = within_category_consistency(deltas, categories)
    for category, layer in itertools.product(CATEGORIES, range(2)):
        expected = slow_pairs(deltas[categories == category, layer])
        assert (found[category]["mean"][layer], found[category]["std"][layer]) == pytest.approx(
            expected, abs=1e-10
        )
        assert found[category]["n"][layer] == 20 and not found[category]["too_few"][layer]


def test_axis_coherence_flips_right_under_and_close():
    deltas, categories = noise(90)
    found = axis_coherence(deltas, categories)
    for group, (first, second) in GROUPS.items():
        for layer in range(2):
            rows = np.concatenate(
                [deltas[categories == first, layer], -deltas[categories == second, layer]]
            )
            assert (found[group]["mean"][layer], found[group]["std"][layer]) == pytest.approx(
                slow_pairs(rows), abs=1e-10
            )


def test_half_precision_memory_maps_give_what_their_values_give(tmp_path):
    deltas, categories = noise(60)
    stored = np.lib.format.open_memmap(
        tmp_path / "deltas.npy", "w+", dtype=np.float16, shape=deltas.shape
    )
    stored[:] = deltas
    a, b = (
        axis_coherence(stored, categories),
        axis_coherence(np.asarray(stored, np.float64), categories),
    )
    for group, field in itertools.product(GROUPS, ("mean", "std", "low", "null_std")):
        assert np.array_equal(a[group][field], b[group][field])


def test_sums_are_held_in_double_precision():
    """Huge equal vectors in single precision: the mean cosine is 1 and the std 0 to double
    precision's digits, no matter the scale."""
    row = np.random.default_rng(0).standard_normal(50).astype(np.float32)
    found = within_category_consistency(np.tile(row * 1e15, (400, 1, 1)), np.array(["far"] * 400))[
        "far"
    ]
    assert found["mean"][0] == pytest.approx(1, abs=1e-12) and found["std"][0] < 1e-6


@pytest.mark.parametrize("spread", [0.3, 1.0, 3.0])
def test_planted_noise_gives_the_coherence_it_must(spread):
    """Two unit axes with isotropic noise of squared norm spread^2: cos of two such deltas is 1 / (1
    + spread^2) on average."""
    deltas, categories, images = planted(200, spread=spread, d=400)
    found = axis_coherence(deltas, categories, images)
    for group in GROUPS:
        assert found[group]["mean"][0] == pytest.approx(1 / (1 + spread**2), abs=0.02)


def test_zero_and_overflowed_deltas_are_left_out_and_counted():
    deltas, categories = noise(36)
    deltas = deltas.astype(np.float32)
    far = np.flatnonzero(categories == "far")
    deltas[far[0]], deltas[far[1], 1, 3], deltas[far[2], 1] = 0, np.inf, np.nan
    found, group = (
        within_category_consistency(deltas, categories)["far"],
        axis_coherence(deltas, categories)["distance"],
    )
    assert (
        found["zeros"].tolist() == [1, 1]
        and found["not_finite"].tolist() == [0, 2]
        and found["n"].tolist() == [5, 3]
    )
    assert found["mean"][1] == pytest.approx(slow_pairs(deltas[far[3:], 1].astype(float))[0])
    assert group["n"].tolist() == [11, 9]
    similar = delta_similarity(deltas, categories)
    assert similar["n"][:, 4].tolist() == [6, 4] and np.isfinite(similar["cosine"]).all()


@pytest.mark.parametrize("n", [0, 1])
def test_too_few_is_said_for_every_category_and_group(n):
    deltas, categories = np.ones((n, 3, 4)), np.array(["above"] * n, dtype=str)
    for found in (
        within_category_consistency(deltas, categories),
        axis_coherence(deltas, categories),
    ):
        for row in found.values():
            assert (
                row["too_few"].tolist() == [True] * 3
                and np.isnan(row["mean"]).all()
                and np.isnan(row["std"]).all()
            )
    assert within_category_consistency(deltas, categories)["above"]["n"].tolist() == [n] * 3
    assert np.isnan(delta_similarity(deltas, categories)["cosine"][:, 4]).all()
    assert vd_entanglement(deltas, categories)["eq3_raw"]["too_few"].all()


def test_unknown_categories_and_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="'below'"):
        axis_coherence(np.ones((1, 1, 2)), ["below"])
    with pytest.raises(ValueError, match=r"\(n, L, d\)"):
        axis_coherence(np.ones((1, 2)), ["far"])
    with pytest.raises(ValueError, match="3 image ids"):
        axis_coherence(np.ones((1, 1, 2)), ["far"], images=[1, 2, 3])


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(2, 9), d=st.integers(1, 6), seed=st.integers(0, 10**6), positive=st.integers(0, 9)
)
def test_shuffled_label_moments_are_those_of_all_shuffles(n, d, seed, positive):
    rng = np.random.default_rng(seed)
    units = rng.standard_normal((n, d))
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    signs = np.where(np.arange(n) < min(positive, n), 1.0, -1.0)
    values = []
    for plus in itertools.combinations(range(n), min(positive, n)):
        dealt = -np.ones(n)
        dealt[list(plus)] = 1
        values.append((np.square((dealt[:, None] * units).sum(0)).sum() - n) / (n * (n - 1)))
    mean, std = shuffled_label_moments(units, rng.permutation(signs))
    assert mean == pytest.approx(np.mean(values), abs=1e-10) and std == pytest.approx(
        np.std(values), abs=1e-7
    )


def test_a_planted_axis_lies_far_outside_the_shuffled_labels_and_noise_inside():
    deltas, categories, images = planted(60, spread=2.0)
    for group, row in axis_coherence(deltas, categories, images).items():
        assert row["mean"][0] > row["null_mean"][0] + 10 * row["null_std"][0], group
    deltas = np.random.default_rng(1).standard_normal(deltas.shape)
    for group, row in axis_coherence(deltas, categories, images).items():
        assert abs(row["mean"][0] - row["null_mean"][0]) < 4 * row["null_std"][0], group


# --- draws of images ------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [3, 40])
def test_the_interval_of_coherence_is_the_slow_jackknifes(d):
    rng = np.random.default_rng(3)
    units = rng.standard_normal((18, d)) + 0.5
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    codes = np.repeat(np.arange(7), [1, 2, 3, 4, 5, 2, 1])

    def mean_of(rows):
        return np.mean([a @ b for a, b in itertools.permutations(rows, 2)])

    without = np.arctanh([mean_of(units[codes != image]) for image in range(7)])
    error = np.sqrt(6 / 7 * np.square(without - without.mean()).sum())
    half = stdtrit(6, 0.975) * error
    found, middle = pairwise_cosine(units, codes), np.arctanh(mean_of(units))
    assert found["mean"] == pytest.approx(mean_of(units)) and found["n_images"] == 7
    wanted = np.tanh(middle - half), np.tanh(middle + half)
    assert (found["low"], found["high"]) == pytest.approx(wanted, abs=1e-9)


def test_pairs_that_agree_and_one_that_does_not_leave_an_interval_of_use():
    rng = np.random.default_rng(0)
    units = rng.normal(size=(32, 32)) + 12 * np.eye(32)[0]
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    few = pairwise_cosine(units[:5])
    assert few["low"] > 0.6 and few["high"] < 0.95
    units[0] *= -1
    found = pairwise_cosine(units)
    assert 0.2 < found["low"] < found["mean"] < found["high"] < 0.95
    same = pairwise_cosine(np.repeat(units[:1], 9, 0))
    assert (same["mean"], same["low"], same["high"]) == pytest.approx((1, 1, 1))


def test_intervals_cover_the_planted_coherence_and_widen_when_rows_share_images():
    covered, truth = 0, 1 / (1 + 1.5**2)
    for seed in range(40):
        deltas, categories, images = planted(25, spread=1.5, d=300, seed=seed, paired=False)
        row = axis_coherence(deltas, categories, images)["vertical"]
        covered += row["low"][0] <= truth <= row["high"][0]
    assert covered >= 33
    deltas, categories, _ = planted(40, spread=0.2, scene=1.5)
    alone, together = (
        axis_coherence(deltas, categories, images)["vertical"]
        for images in (None, np.arange(240) // 24)
    )
    assert together["high"][0] - together["low"][0] > 1.3 * (alone["high"][0] - alone["low"][0])


def test_one_image_has_a_mean_and_no_interval():
    deltas, categories, _ = planted(10)
    row = axis_coherence(deltas, categories, ["same"] * 60)["vertical"]
    assert (
        np.isfinite(row["mean"][0])
        and np.isnan(row["low"][0])
        and np.isnan(row["high"][0])
        and row["n_images"][0] == 1
    )


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 9), st.integers(0, 1000))
def test_energy_is_that_of_whole_matrices(n, m, d, seed):
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((n, d)), rng.standard_normal((m, d))
    assert energy(a, b) == pytest.approx(np.square(a @ b.T).sum())
    assert energy(a) == pytest.approx(np.square(a @ a.T).sum())


# --- similarity and entanglement ------------------------------------------------------------------


def test_delta_similarity_is_the_cosine_of_plain_means():
    deltas, categories = noise(60)
    found = delta_similarity(deltas, categories)
    means = np.array([deltas[categories == category, 1].mean(0) for category in CATEGORIES])
    assert found["cosine"][1] == pytest.approx(cosines(means, means))
    assert found["norm"][1, 2] == pytest.approx(
        np.mean([np.linalg.norm(row) for row in deltas[categories == "above", 1]])
    )


# above-far, below-close, above-close, below-far, above-below, far-close, equation 3, released
# code's form: docs/studies/swap_analysis.md, section 6.3
PUBLISHED = [
    (0.308, 0.307, -0.305, -0.321, -0.984, -0.908, 0.311, 0.319),
    (0.492, 0.437, -0.445, -0.487, -0.997, -0.932, 0.465, 0.474),
    (0.585, 0.576, -0.581, -0.591, -0.989, -0.844, 0.583, 0.609),
    (0.643, 0.614, -0.619, -0.639, -0.994, -0.919, 0.629, 0.643),
    (0.669, 0.617, -0.619, -0.662, -0.996, -0.925, 0.642, 0.655),
    (0.647, 0.564, -0.571, -0.640, -0.996, -0.923, 0.605, 0.618),
    (0.382, 0.372, -0.368, -0.390, -0.998, -0.960, 0.378, 0.382),
    (0.440, 0.427, -0.408, -0.444, -0.982, -0.829, 0.430, 0.452),
    (0.461, 0.435, -0.419, -0.461, -0.982, -0.824, 0.444, 0.467),
    (0.488, 0.418, -0.403, -0.485, -0.986, -0.815, 0.449, 0.473),
    (0.477, 0.400, -0.386, -0.476, -0.989, -0.820, 0.435, 0.457),
    (0.134, 0.100, -0.107, -0.127, -0.997, -0.951, 0.117, 0.118),
]


@pytest.mark.parametrize("row", PUBLISHED)
def test_published_heatmaps_give_the_indices_of_the_study(row):
    """Equation 3 of the printed cosines; and deltas built to have just these cosines give both
    forms through the whole metric."""
    af, uc, ac, uf, au, fc, eq3, group = row
    gram = np.eye(6)
    for a, b, value in ((2, 4, af), (3, 5, uc), (2, 5, ac), (3, 4, uf), (2, 3, au), (4, 5, fc)):
        gram[a, b] = gram[b, a] = value
    assert float(entanglement_of_similarity(gram)) == pytest.approx(eq3, abs=0.0011)
    values, axes = np.linalg.eigh(gram[2:, 2:])
    rows = axes * np.sqrt(
        np.maximum(values, 0)
    )  # printed to three digits, so hardly positive definite
    found = vd_entanglement(rows[:, None], np.array(["above", "under", "far", "close"]))
    assert found["eq3_raw"]["value"][0] == pytest.approx(eq3, abs=0.004)
    assert found["group_cosine_raw"]["value"][0] == pytest.approx(group, abs=0.004)


@pytest.mark.parametrize("angle", [0, 30, 60, 90, 120])
def test_a_planted_angle_between_the_axes_is_recovered(angle):
    deltas, categories, images = planted(150, angle=angle, spread=1.5, d=200)
    found = vd_entanglement(deltas, categories, images, num_resamples=300)
    truth = math.cos(math.radians(angle))
    for form in ("eq3_raw", "eq3_unit", "group_cosine_raw", "group_cosine_unit"):
        assert found[form]["crossfit"][0] == pytest.approx(truth, abs=0.04), form
        assert (
            found[form]["crossfit_low"][0] - 0.02 <= truth <= found[form]["crossfit_high"][0] + 0.02
        )
        assert (
            found[form]["low"][0] <= found[form]["value"][0] + 0.01
            and found[form]["value"][0] - 0.01 <= found[form]["high"][0]
        )
        assert (
            abs(found[form]["value"][0]) <= abs(found[form]["crossfit"][0]) + 0.02
        )  # noise shortens the plain cosine


@pytest.mark.parametrize(("count", "has_limits"), [(2, False), (4, False), (5, True)])
def test_entanglement_of_too_few_images_has_no_interval(count, has_limits):
    found = vd_entanglement(*planted(count, angle=60, spread=0.1, d=20))
    for form in ("eq3_raw", "eq3_unit", "group_cosine_raw", "group_cosine_unit"):
        assert np.isfinite(found[form]["value"][0]) and not found[form]["too_few"][0]
        for limit in ("low", "high", "crossfit_low", "crossfit_high"):
            assert np.isfinite(found[form][limit][0]) == has_limits, (form, limit)


def test_noise_that_two_deltas_of_one_image_share_feigns_entanglement_only_without_crossfit():
    """Orthogonal axes, few images, strong noise common to an image's vertical and distance
    deltas."""
    plain, crossfit = [], []
    for seed in range(30):
        found = vd_entanglement(
            *planted(12, angle=90, spread=0.2, scene=3.0, d=60, seed=seed), num_resamples=0
        )["group_cosine_raw"]
        plain.append(found["value"][0]), crossfit.append(found["crossfit"][0])
    assert np.mean(plain) > 0.25 and abs(np.median(crossfit)) < 0.1


def test_entanglement_is_the_slow_one_and_crossfit_is_the_mean_over_all_halves():
    deltas, categories, images = planted(8, spread=1.0, d=20)
    rows, found = deltas[:, 0], vd_entanglement(deltas, categories, images, num_resamples=0)
    sums = {c: rows[categories == c] for c in CATEGORIES}  # row k is image k's
    mean = {c: sums[c].mean(0) for c in CATEGORIES}
    matrix = cosines(
        np.array([mean[c] for c in CATEGORIES]), np.array([mean[c] for c in CATEGORIES])
    )
    assert found["eq3_raw"]["value"][0] == pytest.approx(entanglement_of_similarity(matrix))
    v, d = (sums["above"] - sums["under"]), (sums["far"] - sums["close"])
    assert found["group_cosine_raw"]["value"][0] == pytest.approx(
        cosines(v.mean(0)[None], d.mean(0)[None])[0, 0]
    )
    order = [int(name) for name in images[categories == "above"]]
    assert order == list(range(8))
    products = np.zeros((2, 2))
    for half in itertools.combinations(range(8), 4):
        rest = [k for k in range(8) if k not in half]
        one, two = ([part[list(rows)].sum(0) for part in (v, d)] for rows in (half, rest))
        products += [[a @ b for b in two] for a in one]
    assert found["group_cosine_raw"]["crossfit"][0] == pytest.approx(
        products[0, 1] / math.sqrt(products[0, 0] * products[1, 1])
    )
    units = {
        c: (sums[c] / np.linalg.norm(sums[c], axis=1, keepdims=True)).mean(0) for c in CATEGORIES
    }
    matrix = cosines(
        np.array([units[c] for c in CATEGORIES]), np.array([units[c] for c in CATEGORIES])
    )
    assert found["eq3_unit"]["value"][0] == pytest.approx(entanglement_of_similarity(matrix))


def slow_group_cosine(rows, categories, images, drawn, crossfit):
    """Cosine of sign-corrected group means in one resample: rows of different images w_k w_l times,
    of one image w_k times, or never with crossfit."""
    sides = [
        [
            (SIGNS[c] * row, int(k), c)
            for row, c, k in zip(rows, categories, images)
            if c in GROUPS[group]
        ]
        for group in ("vertical", "distance")
    ]

    def product(one, two):
        cells = {}
        for (a, k, c), (b, m, e) in itertools.product(one, two):
            of_one_image = 0 if crossfit else drawn[k]
            weight = drawn[k] * drawn[m] if k != m else of_one_image
            cells[c, e] = cells.get((c, e), np.zeros(2)) + weight * np.array([a @ b, 1.0])
        total = sum(cells.values())
        return total[0] / total[1]

    return product(*sides) / math.sqrt(product(sides[0], sides[0]) * product(sides[1], sides[1]))


def test_bootstrap_of_entanglement_is_the_slow_one():
    deltas, categories, images = planted(7, spread=0.8, d=12)
    keep = (
        np.random.default_rng(0).random(len(images)) < 0.8
    )  # images with unequal numbers of pairs
    deltas, categories, images = deltas[keep], categories[keep], images[keep]
    found = vd_entanglement(deltas, categories, images, num_resamples=25, seed=3)[
        "group_cosine_raw"
    ]
    for crossfit, name in ((False, ""), (True, "crossfit_")):
        values = [
            slow_group_cosine(deltas[:, 0], categories, images, drawn, crossfit)
            for drawn in draws(7, 25, seed=3)
        ]
        assert (found[f"{name}low"][0], found[f"{name}high"][0]) == pytest.approx(
            tuple(np.quantile(values, [0.025, 0.975])), abs=1e-9
        )


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 6))
def test_limits_of_a_cosine_never_leave_what_a_cosine_can_be(seed, images):
    """Few scenes whose deltas differ in length by orders, without some of their pairs."""
    random = np.random.default_rng(seed)
    pairs = [
        (name, str(image), random.normal(size=6) * 10 ** random.uniform(-3, 3))
        for image in range(images)
        for name in ("above", "under", "far", "close")
        if random.random() < 0.8
    ]
    if not pairs:
        return
    names, of_images, deltas = (np.array(part) for part in zip(*pairs, strict=True))
    found = vd_entanglement(deltas[:, None], names, of_images, num_resamples=50, seed=seed)
    for form in ("eq3_raw", "eq3_unit", "group_cosine_raw", "group_cosine_unit"):
        for kind, name in (("value", ""), ("crossfit", "crossfit_")):
            value, low, high = (found[form][key][0] for key in (kind, f"{name}low", f"{name}high"))
            if not np.isfinite([value, low, high]).all():
                continue
            beyond = max(1.0, abs(value))  # of a cross-fitted value only
            assert beyond < 1 + 1e-9 or kind == "crossfit"
            assert -beyond - 1e-9 <= low <= high <= beyond + 1e-9


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 30))
def test_the_two_forms_differ_by_the_factor_of_the_study_where_norms_are_equal(seed, d):
    rows = np.random.default_rng(seed).standard_normal((4, d))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    gram = rows @ rows.T
    if min(1 - gram[0, 1], 1 - gram[2, 3]) > 1e-3:
        found = vd_entanglement(rows[:, None], np.array(["above", "under", "far", "close"]))
        factor = 1 / (math.sqrt((1 - gram[0, 1]) / 2) * math.sqrt((1 - gram[2, 3]) / 2))
        assert found["group_cosine_raw"]["value"][0] == pytest.approx(
            found["eq3_raw"]["value"][0] * factor, abs=1e-7
        )


# --- cross alignment ------------------------------------------------------------------------------


def quads(q=40, d=30, cosine=0.6, spread=0.5, seed=0):
    """(vertical, distance (q, 1, d), signs (q, 2)) whose sign-corrected deltas have axes of the
    given cosine."""
    rng = np.random.default_rng(seed)
    axes = np.linalg.qr(rng.standard_normal((d, 2)))[0].T
    signs = rng.choice([-1.0, 1.0], size=(q, 2))
    vertical = axes[0] + spread * rng.standard_normal((q, d)) / math.sqrt(d)
    distance = (
        cosine * axes[0]
        + math.sqrt(1 - cosine**2) * axes[1]
        + spread * rng.standard_normal((q, d)) / math.sqrt(d)
    )
    return (vertical * signs[:, :1])[:, None], (distance * signs[:, 1:])[:, None], signs


def test_cross_alignment_corrects_signs_and_keeps_the_published_form_apart():
    vertical, distance, signs = quads()
    found = cross_alignment(vertical, distance, signs, **FEW)
    plain = np.array([float(cosines(v, d)[0, 0]) for v, d in zip(vertical, distance)])
    assert found["as_published"]["per_sample_mean"][0] == pytest.approx(plain.mean())
    assert found["per_sample_mean"][0] == pytest.approx((plain * signs.prod(1)).mean()) and found[
        "per_sample_std"
    ][0] == pytest.approx((plain * signs.prod(1)).std())
    assert (
        found["mean_delta_alignment"][0] == pytest.approx(0.6, abs=0.08)
        and abs(found["as_published"]["per_sample_mean"][0]) < 0.25
    )
    assert found["sign_flip_p_value"][0] == 1 / 10000 and found["n_samples"][0] == 40


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 6), st.integers(1, 8), st.integers(0, 10**6))
def test_permutation_moments_are_those_of_all_permutations(q, d, seed):
    rng = np.random.default_rng(seed)
    vertical, distance = rng.standard_normal((q, 1, d)), rng.standard_normal((q, 1, d))
    matrix = cosines(vertical[:, 0], distance[:, 0])
    values = [matrix[range(q), order].mean() for order in itertools.permutations(range(q))]
    found = cross_alignment(vertical, distance, np.ones((q, 2)), num_resamples=5)
    assert found["permutation_mean"][0] == pytest.approx(np.mean(values), abs=1e-10)
    assert found["permutation_std"][0] == pytest.approx(np.std(values), abs=1e-7)


def test_p_values_are_even_under_their_nulls_and_perfect_entanglement_equals_its_permutations():
    rng, pairing, flips = np.random.default_rng(0), [], []
    for _ in range(300):
        found = cross_alignment(
            *rng.standard_normal((2, 30, 1, 20)), np.ones((30, 2)), num_resamples=0
        )
        pairing.append(found["p_value"][0]), flips.append(found["sign_flip_p_value"][0])
    for values in (pairing, flips):
        assert 0.01 < np.mean(np.array(values) < 0.05) < 0.1 and 0.4 < np.mean(values) < 0.6
    vertical, _, signs = quads(spread=0.0)
    same = cross_alignment(vertical, vertical * (signs.prod(1))[:, None, None], signs, **FEW)
    assert same["per_sample_mean"][0] == pytest.approx(1) and same["permutation_mean"][
        0
    ] == pytest.approx(1)


def test_quads_without_a_direction_are_left_out_and_too_few_is_said():
    vertical, distance, signs = quads(4)
    vertical[0], distance[1, 0, 0] = 0, np.nan
    found = cross_alignment(vertical, distance, signs, **FEW)
    assert (found["n_samples"][0], found["zeros"][0], found["not_finite"][0]) == (2, 1, 1)
    few = cross_alignment(vertical[:1], distance[:1], signs[:1])
    assert (
        few["too_few"][0]
        and np.isnan(few["per_sample_mean"][0])
        and few["as_published"]["too_few"][0]
    )
    with pytest.raises(ValueError, match=r"\+-1"):
        cross_alignment(vertical, distance, 0 * signs)


# --- answers, outliers, layers --------------------------------------------------------------------


def test_prediction_stats_count_groups_strata_and_their_gap():
    categories = np.array(["left"] * 2 + ["far"] * 6)
    orig, swap = np.array([1, 0, 1, 1, 1, 0, 0, 1], bool), np.array([1, 1, 1, 0, 1, 0, 0, 0], bool)
    splits = [
        None,
        None,
        "consistent",
        "consistent",
        "consistent",
        "counter",
        "counter",
        "ambiguous",
    ]
    found = prediction_stats(categories, orig, swap, [0, 0, 1, 2, 3, 4, 5, 6], splits)
    assert (
        found["horizontal_n"],
        found["horizontal_acc_orig"],
        found["horizontal_acc_swap"],
        found["horizontal_acc_both"],
    ) == (2, 0.5, 1.0, 0.5)
    assert (
        found["overall_n"],
        found["distance_consistent_acc_orig"],
        found["distance_counter_acc_orig"],
        found["distance_ambiguous_n"],
    ) == (8, 1.0, 0.0, 1)
    # 3 and 2 images are too few for limits, whatever they say
    few = found["gap_orig"]
    assert (few["value"], few["n"], few["too_few"]) == (1.0, [3, 2], True)
    assert math.isnan(few["low"]) and math.isnan(few["high"])
    assert (
        found["vertical_n"] == 0
        and math.isnan(found["vertical_acc_both"])
        and found["vertical_too_few"]
    )
    assert (
        found["distance_acc_orig_low"] < 4 / 6 < found["distance_acc_orig_high"]
        and found["distance_acc_orig_image_low"] <= 4 / 6
    )
    validity = category_validity(categories, orig, swap)
    assert (
        validity["left"]["reliable"]
        and not validity["far"]["reliable"]
        and not validity["above"]["reliable"]
        and validity["above"]["too_few"]
    )
    assert tuple(validity) == CATEGORIES


def test_a_gap_has_limits_that_allow_for_images_that_were_not_asked():
    """All 6 consistent pairs right and all 5 counter pairs wrong is no proof of a gap of 1."""
    categories = np.array(["far"] * 11)
    right = np.array([True] * 6 + [False] * 5)
    splits = ["consistent"] * 6 + ["counter"] * 5
    gap = prediction_stats(categories, right, right, range(11), splits)["gap_both"]
    assert (gap["value"], gap["high"], gap["too_few"]) == (1.0, 1.0, False)
    # at most 1 - 0.025 ** (1 / n) of other images answer otherwise
    short = np.hypot(1 - 0.025 ** (1 / 6), 1 - 0.025 ** (1 / 5))
    assert gap["low"] == pytest.approx(1 - short)


def test_two_images_have_no_interval_of_their_pairs():
    units = np.random.default_rng(0).normal(size=(4, 8))
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    few = metrics.pairwise_cosine(units, np.array([0, 0, 1, 1]))
    assert np.isfinite(few["mean"]) and math.isnan(few["low"]) and math.isnan(few["high"])


def test_a_few_planted_dimensions_are_found_and_carry_the_coherence():
    deltas, categories, _ = planted(40, spread=1.0, d=64)
    deltas[:, 0, 7] += (
        # the same in every delta, whatever its label, so it cancels in the sign-corrected mean
        30.0
    )
    found = outlier_report(deltas, categories, top=3)
    assert (
        found["dimensions"][0, 0] == 7
        and found["share"][0, 0] > 0.99
        and (np.diff(found["share"][0]) >= 0).all()
    )
    assert found["coherence_without"]["vertical"][0] > 0.3 > found["coherence"]["vertical"][0]
    rest = np.delete(deltas[:, 0], found["dimensions"][0], axis=1) * np.array(
        [[SIGNS[c]] for c in categories]
    )
    assert found["coherence_without"]["distance"][0] == pytest.approx(
        slow_pairs(rest[np.isin(categories, GROUPS["distance"])])[0]
    )
    assert (
        not np.shares_memory(found["share"], deltas)
        and outlier_report(np.zeros((3, 1, 2)), ["far"] * 3)["n"][0] == 3
    )


def test_recommended_layer_is_on_every_plateau_and_before_the_cutoff():
    curves = {
        "horizontal": {layer: layer / 10 for layer in range(10)},
        "vertical": {layer: 0.9 - abs(layer - 7) / 10 for layer in range(10)},
        "distance": dict.fromkeys(range(10), -0.1) | {3: None},
    }
    found = recommend_layer(curves, 10, frac=0.15, vd={layer: 0.5 for layer in range(10)})
    assert (
        found["cutoff_layer"] == 8
        and found["candidate_range"] == [6, 7, 8]
        and found["recommended"] == 8
    )
    assert [row["layer"] for row in found["top_k"]] == [8, 7, 6] and found["top_k"][0][
        "score"
    ] == pytest.approx(8 / 9)
    assert (
        found["per_group_plateau"] == {"horizontal": [8, 9], "vertical": [6, 7, 8]}
        and len(found["warnings"]) == 1
    )
    assert found["vd_more_stable_than_median"] == {"8": True, "7": True, "6": True}
    assert (
        recommend_layer({"vertical": {0: 1.0, 1: 1.0}}, 4)["recommended"] == 1
    )  # ties: the deeper one
    none = recommend_layer({"vertical": {0: None}, "distance": {0: -1.0}}, 1)
    assert none["recommended"] is None and none["top_k"] == [] and len(none["warnings"]) == 3
    assert (
        recommend_layer({"vertical": {86: 1, 87: 1.0, 88: 1.0}}, 94)["recommended"] == 87
    )  # round(94 * 0.93), the paper's layer


# --- files ----------------------------------------------------------------------------------------


def tree(n_per_category=6, seed=0, right="all"):
    """Arguments of write_results of a small planted set at layers 1, 3, 4."""
    deltas, categories, images = planted(n_per_category, layers=3, d=16, seed=seed)
    base = np.random.default_rng(seed).standard_normal(deltas.shape)
    states = np.stack([base, base + deltas], axis=1).astype(np.float32)
    splits = ["consistent", "counter", "ambiguous"]
    pairs = [
        {
            "id": f"p{k}",
            "index": k,
            "group": GROUP_OF[c],
            "category": c,
            "image_id": images[k],
            "split": splits[k // 6 % 3] if c in ("far", "close") else None,
        }
        for k, c in enumerate(categories.tolist())
    ]
    answers = [
        {
            "pred_orig": "x",
            "pred_swap": 'y, "z"',
            "is_correct_orig": right == "all" or pair["group"] == right,
            "is_correct_swap": True,
            "margin_orig": 0.5,
            "margin_swap": None,
        }
        for pair in pairs
    ]
    return pairs, states, answers, [1, 3, 4]


def read(path):
    return json.loads(path.read_text())


def rows(path):
    with open(path, newline="") as file:
        return list(csv.reader(file))


def names(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def expected_files(scale):
    found = {
        f"json/{name}_{scale}.json"
        for name in ("pred_stats", "category_validity", "vd_ei", "outliers", "recommended_layer")
    } | {f"npz/vectors_{scale}.npz"}
    for tag in ("all_pairs", "both_correct"):
        found |= {
            f"json/sign_corrected_consistency_{scale}_{tag}.json",
            f"json/within_cat_consistency_{scale}_{tag}.json",
            f"csv/predictions_{scale}_{tag}.csv",
        }
        found |= {
            f"csv/delta_{kind}_{scale}_L{layer}_{tag}.csv"
            for kind in ("similarity", "norm")
            for layer in (1, 3, 4)
        }
    return found


def test_the_tree_has_the_overviews_files_and_fields(tmp_path):
    pairs, states, answers, layers = tree()
    vertical, distance, signs = quads(9, d=16)
    given = np.zeros((9, 4, 3, 16), np.float16)
    given[:, 1], given[:, 3] = vertical, distance
    listed = [
        {
            "index": 100 + k,
            "image_id": k % 4,
            "signs": signs[k].tolist(),
            "split": "consistent" if k < 5 else None,
        }
        for k in range(9)
    ]
    chosen = results.write_results(
        tmp_path, "80k", pairs, states, answers, layers, [1, 4], listed, given, num_resamples=20
    )
    assert names(tmp_path) == expected_files("80k") | {
        "json/cross_alignment_80k.json",
        "npz/cross_group_vectors_80k.npz",
    }
    coherence = read(tmp_path / "json/sign_corrected_consistency_80k_all_pairs.json")
    assert set(coherence) == {f"{group}_L{layer}" for group in GROUPS for layer in (1, 3, 4)}
    entry = coherence["vertical_L3"]
    assert (
        {"mean", "std", "n", "low", "high", "null_mean", "null_std", "zeros", "too_few"}
        <= set(entry)
        and entry["n"] == 12
        and entry["too_few"] is False
    )
    deltas = states[:, 1].astype(float) - states[:, 0]
    categories = [pair["category"] for pair in pairs]
    assert entry["mean"] == pytest.approx(axis_coherence(deltas, categories)["vertical"]["mean"][1])
    assert (
        set(coherence["distance_L1"]["strata"]) == {"consistent", "counter", "ambiguous"}
        and coherence["distance_L1"]["strata"]["counter"]["n"] == 4
    )
    within = read(tmp_path / "json/within_cat_consistency_80k_both_correct.json")
    assert set(within) == {f"{category}_L{layer}" for category in CATEGORIES for layer in (1, 3, 4)}
    alignment = read(tmp_path / "json/cross_alignment_80k.json")
    fields = {
        "per_sample_mean",
        "per_sample_std",
        "mean_delta_alignment",
        "permutation_mean",
        "permutation_std",
        "p_value",
        "n_samples",
    }
    assert (
        set(alignment) == {"L1", "L3", "L4"}
        and fields <= set(alignment["L3"])
        and fields <= set(alignment["L3"]["as_published"])
    )
    assert [
        alignment["L3"]["strata"][split]["n_samples"]
        for split in ("consistent", "counter", "ambiguous")
    ] == [5, 0, 0]
    vd = read(tmp_path / "json/vd_ei_80k.json")["L4"]
    assert {
        "eq3_raw",
        "eq3_unit",
        "group_cosine_raw",
        "group_cosine_unit",
        "n",
        "strata",
        "both_correct",
    } <= set(vd) and vd["n"]["far"] == 6
    matrix = rows(tmp_path / "csv/delta_similarity_80k_L3_all_pairs.csv")
    assert (
        matrix[0] == ["", *CATEGORIES]
        and [row[0] for row in matrix[1:]] == list(CATEGORIES)
        and float(matrix[1][1]) == pytest.approx(1)
    )
    assert float(
        entanglement_of_similarity(
            np.array(
                [
                    row[1:]
                    for row in rows(tmp_path / "csv/delta_similarity_80k_L4_all_pairs.csv")[1:]
                ],
                float,
            )
        )
    ) == pytest.approx(vd["eq3_raw"]["value"])
    assert rows(tmp_path / "csv/predictions_80k_all_pairs.csv")[1][:7] == [
        "0",
        "horizontal",
        "left",
        "x",
        'y, "z"',
        "True",
        "True",
    ]
    with np.load(tmp_path / "npz/vectors_80k.npz", allow_pickle=False) as saved:
        assert (
            saved["delta_L4"] == pytest.approx(deltas[:, 2], abs=1e-6)
            and saved["orig_L1"].dtype == np.float32
            and "delta_L3" not in saved
        )
        assert (
            saved["categories_L1"].tolist() == categories
            and saved["is_correct_swap_L4"].all()
            and saved["indices_L4"].tolist() == list(range(36))
        )
    with np.load(tmp_path / "npz/cross_group_vectors_80k.npz", allow_pickle=False) as saved:
        assert (
            saved["delta_vert_L1"].shape == (9, 16)
            and saved["signs"].tolist() == signs.tolist()
            and saved["indices"][0] == 100
        )
    assert (
        read(tmp_path / "json/recommended_layer_80k.json")["recommended"]
        == chosen["recommended"]
        in (1, 3, 4)
    )
    assert read(tmp_path / "json/pred_stats_80k.json")["overall_acc_both"] == 1.0


def test_a_subset_without_pairs_still_has_all_its_files_and_says_too_few(tmp_path):
    pairs, states, answers, layers = tree(right="vertical")
    results.write_results(
        tmp_path,
        "vanilla",
        pairs,
        states,
        answers,
        layers,
        layers,
        quads=[],
        quad_states=np.zeros((0, 4, 3, 16)),
        num_resamples=20,
    )
    assert expected_files("vanilla") <= names(tmp_path)
    entry = read(tmp_path / "json/sign_corrected_consistency_vanilla_both_correct.json")[
        "distance_L3"
    ]
    assert entry["mean"] is None and entry["n"] == 0 and entry["too_few"] is True
    vd = read(tmp_path / "json/vd_ei_vanilla.json")["L3"]
    assert (
        vd["both_correct"]["eq3_raw"]["too_few"] is True
        and vd["both_correct"]["n"]["above"] == 6
        and vd["eq3_raw"]["too_few"] is False
    )
    assert (
        rows(tmp_path / "csv/delta_similarity_vanilla_L1_both_correct.csv")[5] == ["far"] + [""] * 6
    )
    assert read(tmp_path / "json/cross_alignment_vanilla.json")["L1"]["too_few"] is True


def test_rows_not_computed_yet_are_left_out_and_counted(tmp_path):
    pairs, states, answers, layers = tree()
    states[30:] = np.nan
    mask = np.arange(36) < 30
    results.write_results(
        tmp_path / "a",
        "2m",
        pairs,
        states,
        answers[:30] + [None] * 6,
        layers,
        [3],
        mask=mask,
        num_resamples=20,
    )
    results.write_results(
        tmp_path / "b", "2m", pairs[:30], states[:30], answers[:30], layers, [3], num_resamples=20
    )
    assert read(tmp_path / "a/json/pred_stats_2m.json")["n_missing"] == 6
    for name in sorted(names(tmp_path / "b") - {"json/pred_stats_2m.json"}):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_arguments_that_do_not_fit_are_refused(tmp_path):
    pairs, states, answers, layers = tree()
    for changed, message in (
        ((pairs, states[:, :1], answers, layers, [3]), "pairs: states"),
        ((pairs, states, answers[1:], layers, [3]), "35 answers"),
        ((pairs, states, answers, layers, [9]), r"\[9\]"),
    ):
        with pytest.raises(ValueError, match=message):
            results.write_results(tmp_path, "x", *changed)
    assert not names(tmp_path)


def test_summary_has_a_row_per_scale_in_order_of_samples(tmp_path):
    with pytest.raises(UsageError, match="pred_stats"):
        results.write_summary(tmp_path)
    for scale in ("mine", "2m", "vanilla", "80k", "step50"):
        pairs, states, answers, layers = tree(2)
        results.write_results(
            tmp_path, scale, pairs, states, answers, layers, [3], num_resamples=10
        )
    header, *found = rows(results.write_summary(tmp_path))
    assert [row[0] for row in found] == ["vanilla", "step50", "80k", "2m", "mine"]
    first = dict(zip(header, found[0]))
    assert (
        first["horizontal_n"] == "4"
        and first["alignment_deepest"] == ""
        and float(first["vd_ei"]) < 1
        and first["recommended_layer"] in "134"
    )
    assert float(first["vertical_coherence"]) == pytest.approx(
        read(tmp_path / "json/sign_corrected_consistency_vanilla_all_pairs.json")[
            f"vertical_L{first['recommended_layer']}"
        ]["mean"]
    )
    (tmp_path / "json" / "vd_ei_80k.json").write_text("{")
    with pytest.raises(UsageError, match="vd_ei_80k.json"):
        results.write_summary(tmp_path)

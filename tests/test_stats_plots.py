"""Intervals against naive loops and scipy, colours, and files with reproducible bytes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from vlmdiag.cli import UsageError
from vlmdiag.figures import plots, stats

pytestmark = pytest.mark.fast

ROOT = Path(__file__).resolve().parents[1]
RNG = np.random.default_rng(7)


def naive_interval(values, draws, level):
    """Bootstrap-t of one cell, written out: Student's t for few values; a resample of equal values
    has a ratio without an end, and where too many have, Student's t gives the limit."""
    kept = np.array([value for value in values if not np.isnan(value)])
    mean, error = kept.mean(), kept.std(ddof=1) / len(kept) ** 0.5
    tails = [(1 - level) / 2, (1 + level) / 2]
    students = mean + scipy.stats.t.ppf(tails, len(kept) - 1) * error
    if len(kept) < 5:
        return students
    ratios = []
    for draw in draws:
        chosen = np.array([values[i] for i in draw if not np.isnan(values[i])])
        if len(chosen) > 1:
            spread = chosen.std(ddof=1) / len(chosen) ** 0.5
            apart = chosen.mean() - mean
            ratios.append(apart / spread if spread > 1e-6 * error else np.sign(apart) * 1e30)
    low, high = mean - np.quantile(ratios, tails)[::-1] * error
    return [low if low > -1e12 else students[0], high if high < 1e12 else students[1]]


def test_mean_interval_equals_a_naive_loop_over_the_same_draws():
    values = RNG.normal(3, 1, (9, 2, 3))
    values[RNG.random(values.shape) < 0.3] = np.nan
    values[:6, 0, 0], values[6:, 0, 0] = 2.5, (2, 3, 4)  # many resamples of equal values
    values[4:, 1, 1] = np.nan  # few
    found = stats.mean_interval(values, level=0.9, num_resamples=300, seed=5)
    times_drawn = np.random.default_rng(5).multinomial(9, np.full(9, 1 / 9), size=300)
    draws = [np.repeat(np.arange(9), times) for times in times_drawn]
    for cell in np.ndindex(2, 3):
        column = values[(slice(None), *cell)]
        limits = naive_interval(column, draws, 0.9)
        assert found.n[cell] == (~np.isnan(column)).sum()
        np.testing.assert_allclose(
            [found.mean[cell], found.low[cell], found.high[cell]],
            [np.nanmean(column), *limits],
            rtol=1e-9,
        )


def test_too_few_resamples_with_a_value_give_no_interval():
    def known_in(count):
        return np.where(np.arange(10) < count, np.arange(10.0), np.nan)

    low, high = stats.limits(np.stack([known_in(4), known_in(5), known_in(10)], 1), 0.8)
    assert np.isnan(low[0]) and np.isnan(high[0])
    assert low[1] == pytest.approx(np.quantile(np.arange(5.0), 0.1))
    assert high[2] == pytest.approx(np.quantile(np.arange(10.0), 0.9))
    assert stats.limits(np.full(10, np.inf)) == pytest.approx((np.nan, np.nan), nan_ok=True)


def test_a_ratio_is_formed_anew_in_each_resample():
    top, bottom = RNG.gamma(2, size=(2, 40))
    low, high = stats.bootstrap(lambda w: (w @ top) / (w @ bottom), 40, num_resamples=500, seed=3)
    ratios = [(w @ top).sum() / (w @ bottom).sum() for w in stats.draws(40, 500, 3)]
    assert (low, high) == pytest.approx(tuple(np.percentile(ratios, [2.5, 97.5])))
    assert stats.draws(40, 500, 3).sum(1).tolist() == [40] * 500


def test_the_interval_of_many_images_is_that_of_student():
    values = RNG.normal(size=(400, 4))
    found = stats.mean_interval(values, num_resamples=20000)
    error = values.std(0, ddof=1) / 20
    for tail, ends in ((0.025, found.low), (0.975, found.high)):
        wanted = values.mean(0) + scipy.stats.t.ppf(tail, 399) * error
        assert (abs(ends - wanted) < 0.1 * error).all()


def test_the_interval_covers_the_true_mean_about_as_often_as_it_says():
    found = stats.mean_interval(
        np.random.default_rng(0).normal(size=(40, 2000)), level=0.9, num_resamples=1000
    )
    assert 0.88 < np.mean((found.low < 0) & (found.high > 0)) < 0.92


def test_a_skewed_quantity_has_a_long_side():
    """The mean of few values of a long tail is more often too small, which percentiles miss."""
    values = np.random.default_rng(0).lognormal(0, 1, size=(10, 400))
    found = stats.mean_interval(values)
    assert np.mean((found.high - found.mean) > (found.mean - found.low)) > 0.95
    assert np.mean((found.low < np.exp(0.5)) & (np.exp(0.5) < found.high)) > 0.87


def test_bounded_quantities_stay_in_their_bounds_and_equal_ones_are_not_certain():
    shares = np.random.default_rng(0).beta(0.5, 0.1, size=(12, 300))
    found = stats.mean_interval(shares, bounds=(0, 1))
    assert (found.low >= 0).all() and (found.high <= 1).all()
    assert (stats.mean_interval(shares).high > 1).any()
    same = stats.mean_interval(np.tile([1.0, 0.0, 0.5], (20, 1)), bounds=(0, 1), discrete=True)
    exact = stats.proportion_interval([20, 0], [20, 20])
    np.testing.assert_allclose([same.low[0], same.high[1]], [exact.low[0], exact.high[1]])
    assert same.high[0] == 1 and same.low[1] == 0 and same.low[2] < 0.5 < same.high[2]
    # a share that is 0 because the prompt has no such token is 0
    assert stats.mean_interval(np.zeros(20), bounds=(0, 1))[:3] == (0, 0, 0)


def test_means_of_0_and_1_between_these_bounds_are_proportions():
    values = np.array([1.0] * 9 + [0.0] + [np.nan] * 3)
    found = stats.mean_interval(values, bounds=(0, 1), discrete=True)
    assert found == pytest.approx(stats.proportion_interval(9, 10))


def test_many_cells_and_many_images_are_computed_in_parts_with_the_same_draws():
    values = RNG.normal(size=(30, 5000)).astype(np.float32)
    found = stats.mean_interval(values, num_resamples=50)
    for column in (0, stats.CELLS - 1, stats.CELLS, 4999):
        alone = stats.mean_interval(values[:, column], num_resamples=50)
        np.testing.assert_allclose([part[column] for part in found], alone, rtol=1e-12)


def test_the_draws_of_many_images_are_those_of_a_whole_matrix(monkeypatch):
    values = RNG.normal(size=(300, 3))
    values[::7, 1] = np.nan
    means = lambda weights: weights @ np.nan_to_num(values) / 300  # noqa: E731
    whole = stats.mean_interval(values), stats.bootstrap(means, 300)
    monkeypatch.setattr(stats, "WHOLE", 1000)
    monkeypatch.setattr(stats, "WEIGHTS", 7000)
    parts = stats.mean_interval(values), stats.bootstrap(means, 300)
    drawn = np.concatenate([*stats._blocks(300, stats.RESAMPLES, 0, 10**9)])
    assert np.array_equal(drawn, stats.draws(300)) and len(drawn) == stats.RESAMPLES
    for before, after in zip(whole, parts, strict=True):
        for one, other in zip(before, after, strict=True):
            np.testing.assert_allclose(other, one, rtol=1e-12)


def test_images_that_have_one_value_each_have_the_bytes_of_all_products():
    values = RNG.normal(size=(40, 3))
    apart, counts = values - values.mean(axis=0), np.ones((40, 3))
    found = stats._studentized(apart, counts, 0.95, 500, 0)
    weights = stats.draws(40, 500, 0)
    drawn, rows, sums = weights @ (counts > 0), weights @ counts, weights @ apart
    squares = weights @ apart**2 - 2 * (sums / rows) * (weights @ (apart * counts))
    squares = np.maximum(squares + (sums / rows) ** 2 * (weights @ counts**2), 0.0)
    ratio = sums / rows / (np.sqrt(squares * drawn / (drawn - 1)) / rows)
    assert np.array_equal(found, stats.limits(ratio))


def test_a_mean_of_parts_has_the_bytes_of_the_whole():
    values = RNG.normal(size=(1003, 3, 5))
    values[::7, 1] = np.nan
    values[:, 2, 2] = np.nan
    values[5, 0, 0] = np.inf
    whole = stats.measured_mean(values).tobytes()
    for size in (1, 10, 1000, 2000):
        mean = stats.MeasuredMean()
        parts = [values[start : start + size] for start in range(0, len(values), size)]
        for part in parts:
            mean.add(part)
        assert mean.mean().tobytes() == whole, size
        if size == 10:  # sums of parts that are added up afterwards have other bytes
            sums = np.sum([np.nansum(part, axis=0) for part in parts], axis=0)
            counts = (~np.isnan(values)).sum(axis=0)
            assert (sums / np.maximum(counts, 1)).tobytes() != whole
            np.testing.assert_allclose(sums[:2] / counts[:2], mean.mean()[:2], rtol=1e-12)


def test_one_image_has_no_interval_and_none_has_no_mean():
    values = np.array([[1.0, np.nan, 2.0], [np.nan, np.nan, 4.0]])
    found = stats.mean_interval(values)
    np.testing.assert_array_equal(found.n, [1, 0, 2])
    np.testing.assert_array_equal(found.mean, [1, np.nan, 3])
    error = scipy.stats.t.ppf(0.975, 1)
    np.testing.assert_allclose(found.low, [np.nan, np.nan, 3 - error])
    assert np.isnan(stats.mean_interval(np.empty((0, 2))).mean).all()
    assert (
        stats.mean_interval([4.0, 6.0]).mean == 5
        and np.ndim(stats.mean_interval([4.0, 6.0]).low) == 0
    )
    infinite = stats.mean_interval([[np.inf, 1.0], [1.0, 3.0]])
    assert (
        infinite.mean.tolist() == [np.inf, 2] and np.isnan(infinite.low[0]) and infinite.low[1] < 1
    )
    assert stats.mean_interval([[None, 1.0]]).n.tolist() == [0, 1]  # null in a JSON file
    for wrong in (
        lambda: stats.mean_interval(3.0),
        lambda: stats.mean_interval([1.0, 2.0], level=95),
        lambda: stats.paired_difference([1.0], [1.0, 2.0]),
    ):
        with pytest.raises(ValueError):
            wrong()


@settings(max_examples=30, deadline=None)
@given(
    hnp.arrays(float, (6, 2), elements=st.floats(-100, 100)), st.floats(0.1, 10), st.floats(-50, 50)
)
def test_the_interval_moves_and_stretches_with_the_values(values, scale, shift):
    plain, moved = (
        stats.mean_interval(values, num_resamples=100),
        stats.mean_interval(values * scale + shift, num_resamples=100),
    )
    np.testing.assert_allclose(
        np.array(moved[:3]), np.array(plain[:3]) * scale + shift, rtol=1e-6, atol=1e-9
    )
    assert (plain.low <= plain.high).all()


@pytest.mark.parametrize("small", [0, 6.1e-5, 1e-2])
def test_a_limit_is_not_carried_away_by_resamples_of_nearly_equal_images(small):
    found = stats.mean_interval([1, small, 11, 0, 0, 0])
    assert found.high == pytest.approx(6.646, abs=0.01)


def test_a_paired_difference_sees_through_what_the_pairs_share():
    shared, effect = RNG.normal(0, 50, 40), RNG.normal(1, 0.1, 40)
    a, b = shared + effect, shared.copy()
    b[3] = np.nan
    found = stats.paired_difference(a, b)
    assert found.n == 39 and found.low > 0.9 and found.high < 1.1
    assert stats.mean_interval(a).low < stats.mean_interval(b).high
    np.testing.assert_allclose(found.mean, np.delete(effect, 3).mean())


@pytest.mark.parametrize("successes, n", [(0, 10), (7, 10), (10, 10), (1, 1000)])
def test_proportion_interval_agrees_with_scipy(successes, n):
    expected = scipy.stats.binomtest(successes, n).proportion_ci(method="exact")
    found = stats.proportion_interval(successes, n)
    np.testing.assert_allclose([found.low, found.high], [expected.low, expected.high], atol=1e-12)
    assert found.mean == successes / n and np.isnan(stats.proportion_interval([0], [0]).low)


def test_paired_proportions_are_newcombes_with_exact_limits():
    """Limits by hand, for 20 images: both right 12, only the first 5, only the second 1, none 2."""
    first = np.array([1.0] * 17 + [0.0] * 3)
    second = np.array([1.0] * 12 + [0.0] * 5 + [1.0] + [0.0] * 2)
    found = stats.paired_difference(first, second, discrete=True)
    p, q = (stats.proportion_interval(k, 20) for k in (17, 13))
    phi = max(12 * 2 - 5 * 1 - 10, 0) / (17 * 3 * 13 * 7) ** 0.5
    a, b = p.mean - p.low, q.high - q.mean
    assert found.mean == pytest.approx(0.2)
    assert found.low == pytest.approx(0.2 - (a * a - 2 * phi * a * b + b * b) ** 0.5)
    swapped = stats.paired_difference(second, first, discrete=True)
    assert (swapped.low, swapped.high) == pytest.approx((-found.high, -found.low))
    # equal answers throughout are no proof that there is no difference
    same = stats.paired_difference(np.ones(10), np.ones(10), discrete=True)
    assert same.mean == 0 and same.low < -0.2 and same.high > 0.2


def test_a_difference_of_proportions_of_different_images():
    """Newcombe 1998, table II: 56/70 against 48/80 has 0.0524 to 0.3339 by Wilson's limits; exact
    ones reach a little further."""

    def limits(successes, n):
        found = [stats.proportion_interval(*pair) for pair in zip(successes, n)]
        return stats.difference_limits(
            [of.mean for of in found], [(of.low, of.high) for of in found]
        )

    low, high = limits((56, 48), (70, 80))
    assert 0.03 < low < 0.0524 and 0.3339 < high < 0.36
    assert limits((10, 0), (10, 10))[1] == 1


def test_a_label_keeps_its_colour_and_equal_models_share_it():
    for ending in ("", "-normWmean", "-multilayerNorm"):
        assert (
            plots.color_of("tiny-llava" + ending)
            == plots.color_of("llava-v1.5-7b" + ending)
            == plots.color_of(f"llava-v1.5-7b{ending} (no system prompt)")
        )
    assert (
        len(
            {
                plots.color_of("tiny-llava" + ending)
                for ending in ("", "-normWmean", "-multilayerNorm")
            }
        )
        == 3
    )
    assert plots.color_of("vision") == plots.GROUP_COLORS["vision"]
    labels = [
        "tiny-llava",
        "qwen",
        "tiny-llava (no system prompt)",
        "other",
        "tiny-llava-normWmean",
        "blip",
    ]
    colors = plots.model_colors(labels)
    assert (
        list(colors) == labels
        and colors == plots.model_colors(labels[::-1])
        and len(set(colors.values())) == len(labels)
    )
    assert colors["tiny-llava"] == plots.color_of("tiny-llava") and plots.model_colors(["qwen"])[
        "qwen"
    ] == plots.color_of("qwen")
    assert len(plots.model_colors([f"model {number}" for number in range(25)])) == 25


def test_n_in_the_legend():
    assert (
        plots.with_n("a", 5) == "a (n = 5)"
        and plots.with_n("a", [3, 0, 5]) == "a (n = 3 to 5)"
        and plots.with_n("a", [0, 0]) == "a (n = 0)"
    )


def example_figure():
    fig, (left, right) = plots.plt.subplots(1, 2)
    interval = stats.mean_interval(np.random.default_rng(0).normal(size=(5, 4)))
    plots.line_with_band(left, np.arange(4), interval, "tiny-llava", plots.color_of("tiny-llava"))
    left.legend()
    plots.heatmap(right, np.array([[0.1, np.nan], [0.5, 0.9]]), "CMB", vmin=0, vmax=1)
    return fig


def test_lines_have_bands_and_whole_layers_and_nan_cells_are_grey():
    fig = example_figure()
    fig.canvas.draw()
    left, right = fig.axes
    assert (
        left.get_legend().get_texts()[0].get_text() == "tiny-llava (n = 5)"
        and len(left.collections) == 1
    )
    assert all(float(tick).is_integer() for tick in left.get_xticks())
    image = right.images[0]
    assert (
        image.get_array().mask.tolist() == [[False, True], [False, False]]
        and image.cmap.get_bad()[0] == image.cmap.get_bad()[1]
    )
    plots.plt.close(fig)


SAVE = (
    "import sys; from tests import test_stats_plots as t; t.plots.save(t.example_figure(),"
    " sys.argv[1], {'b': 1, 'a': t.Path('x')})"
)


def test_saved_figures_have_reproducible_bytes_and_carry_their_settings(tmp_path, capsys):
    stem = tmp_path / "new" / "llava-v1.5-7b"
    others = plots.plt.get_fignums()
    written = plots.save(example_figure(), f"{stem}.png", {"a": Path("x"), "b": 1})
    assert written == [
        Path(f"{stem}.png"),
        Path(f"{stem}.pdf"),
    ] and capsys.readouterr().out.splitlines() == [f"wrote {path}" for path in written]
    first = [path.read_bytes() for path in written]
    assert plots.plt.get_fignums() == others
    for name in (stem, f"{stem}.pdf"):
        plots.save(example_figure(), name, {"b": 1, "a": Path("x")})
        assert [path.read_bytes() for path in written] == first
    again = tmp_path / "again" / stem.name
    environment = dict(
        os.environ, PYTHONHASHSEED="11", PYTHONWARNINGS="error", MPLBACKEND="agg", TZ="Asia/Tokyo"
    )
    subprocess.run(
        [sys.executable, "-c", SAVE, again],
        check=True,
        cwd=ROOT,
        env=environment,
        capture_output=True,
    )
    assert [Path(f"{again}{ending}").read_bytes() for ending in (".png", ".pdf")] == first
    with Image.open(written[0]) as image:
        assert (
            json.loads(image.text["settings"]) == {"a": "x", "b": 1}
            and "Software" not in image.text
        )
    assert (
        b"/Subject" in first[1]
        and b'"b": 1' in first[1]
        and b"CreationDate" not in first[1]
        and b"/FontFile2" in first[1]
    )
    assert matplotlib.get_backend().lower() == "agg"


def test_files_that_cannot_be_written_are_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot write .*file/x.png"):
        plots.save(example_figure(), tmp_path / "file" / "x", {})
    with pytest.raises(UsageError, match="PNG and PDF"):
        plots.save(example_figure(), tmp_path / "x.svg", {})
    plots.plt.close("all")


def test_csv_keeps_all_digits_and_leaves_unmeasured_cells_empty(tmp_path):
    plots.save_csv(
        tmp_path / "t.csv",
        {
            "layer": range(3),
            "a, b": np.array([1 / 3, np.nan]),
            "c": np.float32([0.5, np.nan, 1]),
            "d": [np.array(np.nan), np.array(2.5), None],  # numbers as arrays of shape ()
        },
    )
    written = (tmp_path / "t.csv").read_text()
    assert written == 'layer,"a, b",c,d\n0,0.3333333333333333,0.5,\n1,,,2.5\n2,,1.0,\n'


def test_rows_of_one_image_count_as_one_image():
    """Ten rows of each of 8 images that are all alike say as much as the 8 images."""
    values = np.random.default_rng(3).normal(size=8)
    once = stats.mean_interval(values)
    tenfold = stats.grouped_mean_interval(10 * values[:, None], np.full((8, 1), 10))
    np.testing.assert_allclose([part[0] for part in tenfold], once, rtol=1e-9)


def test_the_interval_over_images_with_unequal_rows_holds_the_truth():
    rng = np.random.default_rng(4)
    held = []
    for seed in range(300):
        counts = rng.integers(1, 6, 20)
        images = rng.normal(size=20)
        sums = counts * images + rng.normal(size=20) * np.sqrt(counts)
        found = stats.grouped_mean_interval(sums[:, None], counts[:, None], seed=seed)
        held.append(found.low[0] < 0 < found.high[0])
    assert 0.9 < np.mean(held) < 0.99


def test_holm_is_that_of_scipy_step_by_step_and_leaves_out_what_was_not_measured():
    assert stats.holm([0.01, 0.04, 0.03, np.nan]) == pytest.approx(
        [0.03, 0.06, 0.06, np.nan], nan_ok=True
    )
    assert stats.holm([0.5, 0.9]) == [1.0, 1.0]
    assert stats.holm([]) == []


def test_a_p_at_its_floor_is_said_to_be_at_most_that():
    null = np.arange(-50.0, 50)
    p = stats.permutation_p(1e3, null)
    assert p == 1 / 101 and stats.p_text(p, 100) == "<= 0.0099"
    assert stats.p_text(stats.permutation_p(45, null), 100) == "0.11"


def test_a_ratio_of_means_has_the_interval_of_its_inverse_turned_over_and_covers():
    rng = np.random.default_rng(0)
    held = old = 0
    for seed in range(150):
        both = np.exp(rng.normal(size=5) * 0.5)
        under, over = (both * np.exp(rng.normal(size=5) * 0.4) for _ in range(2))
        found = stats.ratio_interval(over, under, seed=seed)
        held += found.low <= 1 <= found.high
        weights = stats.draws(5, 400, seed)
        low, high = stats.limits((weights @ over) / (weights @ under))
        old += low <= 1 <= high
    assert held >= 132 and held > old + 8  # percentiles hold it 0.83 of the time
    back = stats.ratio_interval(under, over, seed=149)
    np.testing.assert_allclose([1 / back.high, 1 / back.low], [found.low, found.high], rtol=1e-9)
    few = stats.ratio_interval([1.0, 0.0, 2.0, 0.0, 1.0], np.ones(5))  # no logarithm of 0
    assert few.low < few.mean == 0.8 < few.high


def test_a_share_that_is_0_in_all_images_is_no_proportion_of_right_answers():
    zeros = np.zeros(30)
    found = stats.paired_difference(zeros, zeros, bounds=stats.DIFFERENCES)
    assert (found.low, found.high) == (0.0, 0.0)
    right = stats.paired_difference(zeros, zeros, bounds=stats.DIFFERENCES, discrete=True)
    assert right.low < -0.05 and right.high > 0.05  # others may differ


@pytest.mark.parametrize(("p", "q"), [(0.05, 0.02), (0.3, 0.3), (0.98, 0.3)])
def test_a_difference_of_shares_holds_the_truth_where_few_images_differ(p, q):
    """Of an answer that is right or wrong and the mean of three, by ten images."""
    rng = np.random.default_rng(0)
    one = (rng.random((10, 300)) < p) * 1.0
    other = rng.binomial(3, q, (10, 300)) / 3
    found = stats.paired_difference(
        one, other, num_resamples=300, bounds=stats.DIFFERENCES, discrete=True
    )
    assert np.mean((found.low <= p - q) & (p - q <= found.high)) > 0.94
    assert (found.low <= found.mean).all() and (found.mean <= found.high).all()
    again = stats.paired_difference(
        other, one, num_resamples=300, bounds=stats.DIFFERENCES, discrete=True
    )
    assert np.allclose(again.low, -found.high) and np.allclose(again.high, -found.low)


def test_a_difference_of_two_intervals_is_as_wide_as_both_allow():
    one, other = stats.interval_of(0.5, 0.2, 0.9, 20), stats.interval_of(0.1, 0.1, 0.4, 12)
    found = stats.difference_of(one, other)
    assert found.mean == pytest.approx(0.4) and found.n == 12
    assert found.low == pytest.approx(0.4 - np.hypot(0.3, 0.3))
    assert found.high == pytest.approx(0.4 + np.hypot(0.4, 0.0))

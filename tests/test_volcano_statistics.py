"""Stages of the critique loop compared: slow references, texts of one distribution and unequal
length, planted effects, and the script on planted runs."""

import csv
import itertools
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from tests.conftest import ROOT, in_process
from vlmdiag.figures import plots
from vlmdiag.figures.stats import permutation_p, ratio_interval
from vlmdiag.runs import rundirs
from vlmdiag.volcano.maps import top_l_mean
from vlmdiag.volcano.stage_statistics import (
    STATISTICS,
    by_image,
    checked,
    compare,
    profile,
    ratio,
    statistics_over_images,
    subsample_weights,
    toss_p,
    weights,
)

SCRIPT = ROOT / "visualize" / "analyze_attention_by_stage.py"
FILES = {
    "attention_by_stage.json",
    "attention_by_stage.csv",
    "attention_by_stage.png",
    "attention_by_stage.pdf",
}
MAPS = {"stage_maps.png", "stage_maps.pdf"}
STAGES = ("initial", "feedback", "revision")


def some(tokens, patches=12, seed=0, scale=1.0):
    return (
        scale * np.random.default_rng([seed, tokens]).exponential(size=(tokens, patches))
    ).astype(np.float32)


def slow(c, mass, shorter):
    """The four statistics of one text by their definitions, token by token."""
    best = [sorted(column, reverse=True) for column in c.astype(float).T.tolist()]
    half = (shorter + 1) // 2
    subsets = list(itertools.combinations(range(len(c)), shorter))
    halves = [
        sum(sorted((float(column[t]) for t in subset), reverse=True)[:half]) / half
        for subset in subsets
        for column in c.T
    ]
    top = np.mean([sum(column[:shorter]) / shorter for column in best])
    return [
        top,
        np.mean([np.mean(column) for column in best]),
        sum(map(float, mass)) / len(mass),
        np.mean(halves),
    ]


# --- statistics -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "second"), [(3, 7), (7, 3), (1, 6), (5, 5), (1, 1), (2, 8)])
def test_each_statistic_is_its_definition(first, second):
    initial, other = some(first), some(second, seed=1)
    masses = initial.sum(1) / 5, other.sum(1) / 5
    observed, _ = compare(initial, other, *masses, 1, np.random.default_rng(0))
    wanted = [slow(c, mass, min(first, second)) for c, mass in zip((initial, other), masses)]
    np.testing.assert_allclose(observed, wanted, rtol=1e-6)


def test_the_published_statistic_is_that_of_the_maps():
    initial, other = some(6), some(40)
    observed, _ = compare(initial, other, initial.sum(1), other.sum(1), 1, np.random.default_rng(0))
    np.testing.assert_allclose(
        observed[:, 0], [top_l_mean(c.astype(float), 6).mean() for c in (initial, other)], rtol=1e-6
    )


@pytest.mark.parametrize(
    ("tokens", "size", "l"), [(9, 4, 2), (30, 8, 4), (30, 30, 7), (12, 1, 1), (500, 200, 100)]
)
def test_subsample_weights_are_the_mean_over_random_draws(tokens, size, l):  # noqa: E741
    w, c, rng = subsample_weights(tokens, size, l), some(tokens, 5), np.random.default_rng(3)
    assert w.min() >= 0 and w.sum() == pytest.approx(1)
    draws = [
        np.sort(c[rng.permutation(tokens)[:size]], axis=0)[size - l :].mean() for _ in range(3000)
    ]
    assert w @ profile(c) == pytest.approx(
        np.mean(draws), abs=5 * float(np.std(draws)) / 3000**0.5 + 1e-6
    )


def test_subsampling_with_the_published_l_is_the_mean_over_tokens():
    np.testing.assert_allclose(subsample_weights(70, 8, 8), 1 / 70)
    np.testing.assert_allclose(weights(8, 8)[0], weights(8, 8)[1])


@pytest.mark.parametrize("wrong", [(5, 3, 0), (5, 3, 4), (5, 6, 2)])
def test_impossible_subsamples_are_refused(wrong):
    with pytest.raises(
        ValueError, match=f"the {wrong[2]} largest of {wrong[1]} of {wrong[0]} tokens"
    ):
        subsample_weights(*wrong)


def test_the_null_pools_all_tokens_and_splits_them_at_the_lengths():
    """With 2 and 3 tokens there are ten splits: the null holds exactly their values, and each of
    them."""
    initial, other = some(2), some(3, seed=1, scale=3)
    masses = initial.sum(1), other.sum(1)
    _, null = compare(initial, other, *masses, 400, np.random.default_rng(0))
    pooled, mass = np.concatenate([initial, other]), np.concatenate(masses)
    splits = [
        (list(chosen), [t for t in range(5) if t not in chosen])
        for chosen in itertools.combinations(range(5), 2)
    ]
    wanted = np.array([[slow(pooled[part], mass[part], 2) for part in split] for split in splits])
    distance = np.abs(null[:, None] - wanted[None]).max(axis=(2, 3))
    assert distance.min(1).max() < 1e-6 and set(distance.argmin(1)) == set(range(10))


def test_no_token_and_no_number_are_refused():
    with pytest.raises(ValueError, match="texts of 0 and 3 counted tokens"):
        compare(some(3)[:0], some(3), np.zeros(0), np.zeros(3), 1, np.random.default_rng(0))
    broken = some(3)
    broken[1, 2:4] = np.nan, np.inf
    with pytest.raises(
        ValueError, match="feedback_mean has 2 of 36 values that are NaN or infinite"
    ):
        checked(broken, "feedback_mean")
    with pytest.raises(ValueError, match=r"\(tokens, patches\) was wanted"):
        checked(np.zeros(3), "x")


def planted(effect=1.0, instances=30, patches=50, seed=0, sigma=0.6):
    """observed, null of instances whose two texts have 8 and 70 tokens of one distribution, the
    second times effect."""
    rng, observed, null = np.random.default_rng(seed), [], []
    for _ in range(instances):
        initial, other = (
            rng.lognormal(0, sigma, (tokens, 1)) * rng.exponential(size=(tokens, patches))
            for tokens in (8, 70)
        )
        one, many = compare(
            initial, effect * other, initial.sum(1), effect * other.sum(1), 100, rng
        )
        observed.append(one)
        null.append(many)
    return np.array(observed), np.array(null)


def test_unequal_lengths_alone_give_a_published_ratio_over_one_and_a_null_that_says_so():
    found = statistics_over_images(*planted(), list(range(30)))
    assert found["top_l"]["ratio"]["low"] > 2 and found["top_l"]["null_ratio"]["low"] > 2
    for name in STATISTICS[1:]:
        row = found[name]
        assert (
            row["ratio"]["low"] < 1 < row["ratio"]["high"]
            and abs(row["null_ratio"]["mean"] - 1) < 0.05
        )
    for row in found.values():
        assert (
            row["null_ratio"]["low"] < row["ratio"]["mean"] < row["null_ratio"]["high"]
            and row["p"] > 0.05
        )


@pytest.mark.parametrize("effect", [1.5, 0.6])
def test_a_planted_effect_is_found_at_its_size_and_the_published_ratio_hides_a_smaller_attention(
    effect,
):
    found = statistics_over_images(*planted(effect), list(range(30)))
    for name in STATISTICS[1:]:
        assert (
            found[name]["ratio"]["low"] < effect < found[name]["ratio"]["high"]
            and found[name]["p"] < 0.02
        )
        assert (
            np.sign(found[name]["difference"]["low"])
            == np.sign(found[name]["difference"]["high"])
            == np.sign(effect - 1)
        )
    assert found["top_l"]["ratio"]["low"] > 1 and found["top_l"]["p"] < 0.02


def test_p_values_are_uniform_where_nothing_differs():
    values = []
    for seed in range(200):
        initial, other = some(6, 8, seed), some(25, 8, seed + 1000)
        observed, null = compare(
            initial, other, initial.sum(1), other.sum(1), 60, np.random.default_rng(seed)
        )
        values.append(
            [
                permutation_p(*pair)
                for pair in zip(observed[1] - observed[0], (null[:, 1] - null[:, 0]).T)
            ]
        )
    for level in (0.1, 0.3, 0.5):
        assert (
            np.abs((np.array(values) <= level).mean(0) - level).max()
            < 3.5 * (level * (1 - level) / 200) ** 0.5 + 1 / 61
        )


def test_p_value_counts_the_observed_and_both_sides():
    null = np.array([-1.0, 0.0, 1.0])
    assert permutation_p(5.0, null) == permutation_p(-5.0, null) == 1 / 4
    assert (
        permutation_p(1.0, null) == permutation_p(-1.0, null) == 3 / 4
        and permutation_p(0.0, null) == 1
    )


def test_the_ratio_is_of_means_and_its_interval_draws_whole_images():
    rng = np.random.default_rng(0)
    initial = rng.uniform(1, 2, 40)
    exact = ratio_interval(3 * initial, initial)
    np.testing.assert_allclose(exact[:3], 3)
    assert exact.n == 40
    noisy = ratio_interval(rng.uniform(2, 4, 40), initial)
    assert noisy.low < noisy.mean < noisy.high
    one = ratio_interval(np.array([2.0]), np.array([1.0]))
    assert one.mean == 2 and np.isnan([one.low, one.high]).all()
    assert np.isnan(ratio_interval(np.ones(3), np.zeros(3)).mean) and np.isnan(ratio(1.0, 0.0))


def test_each_image_counts_once():
    values = np.array([[1.0, 2.0], [3.0, 4.0], [10.0, 20.0]])
    np.testing.assert_allclose(by_image(values, [5, 5, 6]), [[2, 3], [10, 20]])
    observed, null = planted(instances=3)
    twice = np.concatenate([observed, observed[:1]]), np.concatenate([null, null[:1]])
    once, again = (
        statistics_over_images(observed, null, ["a", "b", "c"]),
        statistics_over_images(*twice, ["a", "b", "c", "a"]),
    )
    assert again["top_l"]["ratio"]["n"] == 3
    np.testing.assert_allclose(
        again["token_mean"]["ratio"]["mean"], once["token_mean"]["ratio"]["mean"]
    )


# --- the script -----------------------------------------------------------------------------------


def plant(root, n=12, grid=(4, 5), name=None, extra=0, effect=1.0):
    """A run of n instances on n - 1 pictures. Instances 0, 4, 8: no revision accepted. Odd:
    corrected, but 1 cannot be judged. The stop token's row is 1000."""
    rng, patches = np.random.default_rng(0), grid[0] * grid[1] + extra
    run = rundirs.open_run(
        rundirs.run_path(root, "tiny", "volcano", name), "volcano", {"model_name": "tiny"}
    )
    for i in range(n):
        stages, arrays = dict.fromkeys(STAGES), {}
        for stage, tokens in zip(STAGES, (5, 40, 9)):
            if stage != "initial" and i % 4 == 0:
                continue
            ended = i % 3 > 0
            c = (
                rng.lognormal(0, 0.4, (tokens, 1))
                * rng.exponential(0.01, (tokens, patches))
                * (effect if stage == "feedback" else 1)
            )
            c = np.concatenate([c, np.full((int(ended), patches), 1000.0)]).astype(np.float32)
            arrays |= {f"{stage}_top_k_mean": c, f"{stage}_mean": c / 4, f"{stage}_max": c**0.5}
            facts = {
                "text": stage,
                "tokens": ["a"] * len(c),
                "ended": ended,
                "prompt_tokens": 30 + tokens,
                "vision_tokens": patches,
            }
            stages[stage] = facts
        correct = (
            {"initial": i % 2 == 0, "final": True} if i != 1 else {"initial": None, "final": None}
        )
        record = {
            "index": i,
            "image_id": max(i, 1),
            "question": "?",
            "enhanced": i % 4 != 0,
            "correct": correct,
            "stages": stages,
        }
        run.write(
            f"{i}_{i:04d}", record | {"grid": {"shape": list(grid), "size": [84, 84]}}, arrays
        )
    return run


@pytest.fixture(scope="module")
def analyze():
    script = in_process(SCRIPT)
    return lambda run, *flags: script("--run_dir", run.path, "--num_permutations", 20, *flags)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return plant(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def run(original, tmp_path):
    return rundirs.Run(shutil.copytree(original.path, tmp_path / "tiny"), original.meta)


@pytest.fixture
def unsaved(monkeypatch):
    """Figures are drawn and not written, which takes most of the time."""
    monkeypatch.setattr(plots, "save", lambda fig, *rest: plots.plt.close(fig))


def result(run):
    return json.loads((run.path / "analysis" / "attention_by_stage.json").read_text())


def written(run):
    return {path.name for path in (run.path / "analysis").iterdir()}


def edit(run, id, change):
    """Rewrite an item after change(record, arrays)."""
    record, arrays = run.record(id), run.arrays(id)
    change(record, arrays)
    run.write(id, record, arrays, keep=False)


def test_real_command_line_writes_its_files_without_torch(run):
    code = (
        "import sys, runpy; sys.argv ="
        f" {['x', '--run_dir', str(run.path), '--num-permutations', '5']!r}\ntry:"
        f" runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\nexcept SystemExit as end: assert"
        " not end.code, end.code\nassert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert written(run) == FILES | MAPS
    assert (
        "feedback against initial answer (n = 9 instances, 9 images; mean length 40.0 against 5.0"
        " tokens)" in done.stdout
    )


def test_numbers_are_those_of_the_functions_and_the_stop_token_counts_in_none(
    run, analyze, unsaved
):
    assert analyze(run).returncode == 0
    content = result(run)
    assert (
        content["instances"] == 9
        and content["instances_in_run"] == 12
        and content["settings"]["filter"] == "enhanced"
    )
    for stage, tokens in (("feedback", 40), ("revision", 9)):
        part = content["comparisons"][stage]
        assert part["instances"] == part["images"] == 9 and part["mean_tokens"] == {
            "initial": 5,
            stage: tokens,
        }
        assert part["mean_prompt_tokens"] == {"initial": 35, stage: 30 + tokens}
        ids = [f"{i}_{i:04d}" for i in range(12) if i % 4]
        pairs = [
            [
                run.arrays(id)[f"{name}_top_k_mean"][:count]
                for name, count in (("initial", 5), (stage, tokens))
            ]
            for id in ids
        ]
        means = np.array([[c.astype(float).mean() for c in pair] for pair in pairs]).mean(0)
        row = part["statistics"]["token_mean"]
        np.testing.assert_allclose(
            [row["initial"], row["other"], row["ratio"]["mean"]],
            [*means, means[1] / means[0]],
            rtol=1e-6,
        )
        np.testing.assert_allclose(row["difference"]["mean"], means[1] - means[0], rtol=1e-5)
        mass = part["statistics"]["image_mass"]
        np.testing.assert_allclose([mass["initial"], mass["other"]], means * 20 / 4, rtol=1e-6)
        top = part["statistics"]["top_l"]
        np.testing.assert_allclose(
            top["other"],
            np.mean([top_l_mean(pair[1].astype(float), 5).mean() for pair in pairs]),
            rtol=1e-6,
        )
    assert content["comparisons"]["feedback"]["statistics"]["top_l"]["null_ratio"]["low"] > 1.3
    rows = list(
        csv.DictReader((run.path / "analysis" / "attention_by_stage.csv").read_text().splitlines())
    )
    assert [(row["comparison"], row["statistic"]) for row in rows] == [
        (f"{stage}/initial", name) for stage in STAGES[1:] for name in STATISTICS
    ]
    for row in rows:
        wanted = content["comparisons"][row["comparison"].split("/")[0]]["statistics"][
            row["statistic"]
        ]
        assert (
            float(row["ratio_low"]) == wanted["ratio"]["low"]
            and float(row["p"]) == wanted["p"]
            and row["instances"] == "9"
        )


def test_filters_choose_the_instances(run, analyze, unsaved):
    for flags, n, left_out in (
        ((), 9, 0),
        (("--filter", "corrected"), 5, 0),
        (("--filter", "all"), 12, 3),
    ):
        done = analyze(run, *flags)
        content = result(run)
        assert (
            done.returncode == 0
            and content["instances"] == n
            and len(content["left_out"]["feedback"]["missing"]) == left_out
        )
        assert content["comparisons"]["feedback"]["instances"] == n - left_out
        assert ("3 left out that have none stored" in done.stdout) == bool(left_out)


def test_pools_read_their_own_arrays_and_the_mass_stays(run, analyze, unsaved):
    found = {}
    for pool in ("top_k_mean", "mean", "max"):
        assert analyze(run, "--pool-method", pool).returncode == 0
        found[pool] = result(run)["comparisons"]["feedback"]["statistics"]
    assert found["mean"]["token_mean"]["initial"] == pytest.approx(
        found["top_k_mean"]["token_mean"]["initial"] / 4
    )
    assert found["max"]["token_mean"]["initial"] > 5 * found["top_k_mean"]["token_mean"]["initial"]
    assert (
        found["max"]["image_mass"]
        == found["mean"]["image_mass"]
        == found["top_k_mean"]["image_mass"]
    )


def test_the_same_call_gives_the_same_bytes_and_another_seed_another_null(run, analyze):
    analyze(run)
    first = {name: (run.path / "analysis" / name).read_bytes() for name in FILES | MAPS}
    analyze(run)
    assert first == {name: (run.path / "analysis" / name).read_bytes() for name in FILES | MAPS}
    before = result(run)["comparisons"]["feedback"]["statistics"]["top_l"]
    analyze(run, "--seed", 1)
    after = result(run)["comparisons"]["feedback"]["statistics"]["top_l"]
    assert after["ratio"] == before["ratio"] and after["null_ratio"] != before["null_ratio"]


def test_a_text_of_a_stop_token_only_is_left_out_and_counted(run, analyze, unsaved):
    def empty(record, arrays):
        record["stages"]["feedback"]["ended"] = True
        for pool in ("top_k_mean", "mean", "max"):
            arrays[f"feedback_{pool}"] = arrays[f"feedback_{pool}"][-1:]

    edit(run, "5_0005", empty)
    done = analyze(run)
    assert (
        done.returncode == 0
        and "feedback: 1 left out in which a text has no token but the one that ends it"
        in done.stdout
    )
    content = result(run)
    assert (
        content["left_out"]["feedback"]["empty"] == ["5_0005"]
        and content["left_out"]["revision"]["empty"] == []
    )
    assert (
        content["comparisons"]["feedback"]["instances"] == 8
        and content["comparisons"]["revision"]["instances"] == 9
    )


def test_nan_is_refused_with_the_instance_and_the_array(run, analyze):
    def broken(record, arrays):
        arrays["revision_mean"][2, 3] = np.nan

    edit(run, "6_0006", broken)
    done = analyze(run)
    assert done.returncode == 2 and done.stderr.count("error:") == 1
    assert "6_0006: revision_mean has 1 of" in done.stderr and "NaN" in done.stderr


def test_maps_are_left_out_where_pictures_share_no_grid(run, analyze):
    assert analyze(run).returncode == 0 and written(run) >= MAPS

    def other(record, arrays):
        record["grid"]["shape"] = [5, 4]

    edit(run, "5_0005", other)
    done = analyze(run)
    assert (
        done.returncode == 0
        and "no stage_maps: the pictures have no regular grid" in done.stdout
        and written(run) == FILES
    )


@pytest.mark.parametrize("grid", [None, {"shape": None, "size": [9, 9]}])
def test_maps_are_left_out_without_a_grid(run, analyze, grid):
    for id in run.ids():
        edit(run, id, lambda record, arrays: record.update(grid=grid))
    assert analyze(run).returncode == 0 and written(run) == FILES


def test_tokens_without_a_place_follow_the_grid_and_pictures_may_differ_in_size(tmp_path, analyze):
    run = plant(tmp_path, extra=3)
    assert analyze(run).returncode == 0 and written(run) == FILES | MAPS
    other = plant(tmp_path / "more", grid=(3, 3), n=4)
    for id in other.ids():
        run.write(f"9{id}", other.record(id), other.arrays(id))
    done = analyze(run)
    assert (
        done.returncode == 0
        and result(run)["comparisons"]["feedback"]["instances"] == 12
        and "no stage_maps" in done.stdout
    )


def test_one_instance_and_no_revision_work(run, analyze, tmp_path):
    one = plant(tmp_path / "one", n=2)
    assert analyze(one).returncode == 0
    assert result(one)["comparisons"]["feedback"]["statistics"]["top_l"]["ratio"]["low"] is None
    for id in run.ids():
        edit(run, id, lambda record, arrays: record["stages"].update(revision=None))
    done = analyze(run)
    assert (
        done.returncode == 0
        and set(result(run)["comparisons"]) == {"feedback"}
        and "no instance has all three texts" in done.stdout
    )


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--filter", "right"), "--filter"),
        (("--num_permutations", "0"), "argument --num_permutations"),
        (("--seed", "-1"), "argument --seed: '-1'"),
        (("--pool_method", "sum"), "--pool_method"),
        (("--run_dir", "nowhere"), "no such folder"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(run, analyze, flags, words):
    done = analyze(run, *flags)
    assert (
        done.returncode == 2
        and done.stderr.startswith("error: ")
        and done.stderr.count("\n") == 1
        and words in done.stderr
    )


def test_runs_without_what_is_wanted_are_refused(run, analyze, tmp_path):
    for id in run.ids():
        edit(
            run,
            id,
            lambda record, arrays: record.update(
                enhanced=False, correct={"initial": None, "final": None}
            ),
        )
    for flags, words in (
        ((), "leaves none of the 12 instances"),
        (("--filter", "corrected"), "12 cannot be judged by their gold answer"),
    ):
        done = analyze(run, *flags)
        assert (
            done.returncode == 2
            and words in done.stderr
            and "try another --filter" in done.stderr
            and not written(run)
        )
    for id in run.ids():
        edit(run, id, lambda record, arrays: record["stages"].update(feedback=None, revision=None))
    assert (
        "none of the 12 instances has a token both in its initial answer and in a feedback or"
        " revision" in analyze(run, "--filter", "all").stderr
    )
    empty = rundirs.open_run(tmp_path / "empty", "volcano", {})
    assert "has no finished instance yet" in analyze(empty).stderr
    foreign = rundirs.open_run(tmp_path / "psi", "psi", {})
    assert "'volcano' was wanted" in analyze(foreign).stderr
    empty.write("0_a", {"image_id": 3}, {})
    assert "lacks image_id, stages, enhanced or correct" in analyze(empty).stderr


def test_a_pool_that_was_not_kept_is_named(run, analyze):
    edit(run, "3_0003", lambda record, arrays: arrays.pop("feedback_max"))
    done = analyze(run, "--pool_method", "max")
    assert done.returncode == 2 and "3_0003 has no feedback_max" in done.stderr


def alike_text(rng, tokens, level, effect=0.0):
    """A text whose neighbouring tokens are alike, with a level of its own."""
    steps = np.empty(tokens)
    steps[0] = rng.normal()
    for t in range(1, tokens):
        steps[t] = 0.6 * steps[t - 1] + 0.8 * rng.normal()
    of_token = np.exp(level + effect + 0.3 * steps + 0.15 * rng.normal())
    return of_token[:, None] * rng.dirichlet(np.full(6, 2.0), tokens)


@pytest.mark.parametrize(("effect", "least", "most"), [(0.0, 0.0, 0.12), (0.5, 0.9, 1.0)])
def test_p_is_of_images_and_not_of_tokens_that_are_alike(effect, least, most):
    """Ten images, texts of 8 and 16 tokens: how often p is below 0.05."""
    rng, found = np.random.default_rng(0), []
    for _ in range(60):
        observed, null = [], []
        for _ in range(10):
            level = 0.3 * rng.normal()
            one, other = alike_text(rng, 8, level), alike_text(rng, 16, level, effect)
            each, its_null = compare(one, other, one.sum(1), other.sum(1), 60, rng)
            observed.append(each)
            null.append(its_null)
        of_all = statistics_over_images(np.array(observed), np.array(null), list(range(10)))
        found.append([of_all[name]["p"] <= 0.05 for name in STATISTICS])
    shares = np.mean(found, 0)
    assert (least <= shares).all() and (shares <= most).all(), shares


def test_the_least_p_of_few_images_is_that_of_their_signs():
    tosses = np.array([[a, b, c] for a in (-1, 1) for b in (-1, 1) for c in (-1, 1)] * 100)
    assert toss_p(np.array([1.0, 2.0, 3.0]), tosses) == pytest.approx(201 / 801)
    assert toss_p(np.zeros(3), tosses) == 1

"""The report, the claims and comparisons of runs whose numbers are planted: what they say is what
was planted, of the pictures that count, and nothing that came from outside runs in the page."""

import base64
import json
import re

import numpy as np
import pandas as pd
import pytest
from selenium.webdriver import Keys
from selenium.webdriver.common.by import By

from tests.conftest import ROOT, in_process
from vlmdiag.figures import stats
from vlmdiag.report import catalog, claims, compare, page, quantities
from vlmdiag.runs import cost, rundirs

report, claims_command = (
    in_process(ROOT / "diagnostic_tools" / f"{name}.py") for name in ("report", "claims")
)
BASE, VARIANT = "net", "net-normWmean"
LAYERS, HEADS, STATES = 3, 2, 4


def open_run(root, name, experiment, model=None, settings=None):
    folder = root / name if experiment == rundirs.COCO else root / experiment / name
    free = {"model_path": f"models/{model or name.split('__')[0]}"}
    return rundirs.open_run(folder, experiment, settings or {}, free)


def plant_coco(
    root, model, ratio, change, n=12, first=0, spread=0.02, run_name=None, settings=None
):
    """Vision tokens enter `ratio` times as long as text; logits change by `change`."""
    name = f"{model}__{run_name}" if run_name else model
    measured = {"delta_steps": [1.0], "hidden_norm_kind": "l2"}
    run = open_run(root, f"{name}__sp-0", rundirs.COCO, model, measured | (settings or {}))
    rng = np.random.default_rng(len(model))
    for number in range(first, first + n):
        about_1 = 1 + spread * rng.standard_normal()
        text = np.full(STATES, 2.0)
        arrays = {
            "hidden_norms_vision": text * ratio * about_1,
            "hidden_norms_user_text": text,
            "delta_gv": change * about_1 * rng.choice([-1.0, 1.0], (LAYERS, HEADS)),
            "head_vision_share": np.clip(0.5 + 0.01 * rng.standard_normal((LAYERS, HEADS)), 0, 1),
        }
        run.write(f"{number:05d}", {"image_id": number, "chance_vision_share": 0.9}, arrays)
    return run


def plant_psi(root, model, lost, n=40):
    """Of the right answers, `lost` in ten are lost by the shuffle."""
    run = open_run(root, model, "psi", settings={"num_permutations": 1})
    for number in range(n):
        record = {
            "image_id": number,
            "kind": "colour",
            "original": {"correct": True, "read_as": "red"},
            "permuted": [{"correct": number % 10 >= lost, "read_as": "red"}],
        }
        run.write(f"{number:05d}", record)
    return run


def plant_ablation(root, model, by_object, by_random, n=40):
    """Shares, in fortieths, of right answers that the two kinds of tokens destroy."""
    run = open_run(root, model, "ablation")

    def result(right):
        return {"tokens": 9} | {
            s: {"correct": right, "logprob_yes": 0.0} for s in ("generative", "polling")
        }

    for number in range(n):
        conditions = {
            "none": result(True),
            "patch_1": result(number >= by_object),
            "random_matched_1_0": result(number >= by_random),
            "random_matched_1_1": result(number >= by_random),
        }
        run.write(f"{number:05d}", {"image_id": number, "eligible": True, "conditions": conditions})
    return run


@pytest.fixture
def runs(tmp_path):
    """What a base, its normalised variant and two interventions were planted with."""
    root = tmp_path / "runs"
    plant_coco(root, BASE, 43.0, 0.01)
    plant_coco(root, VARIANT, 1.4, 0.02)
    plant_psi(root, BASE, 1)
    plant_psi(root, VARIANT, 6)
    plant_ablation(root, BASE, 34, 1)
    return root


def found_of(root, **flags):
    found, _ = catalog.find(root)
    return claims.findings(catalog.subjects(found), **flags)


def verdicts(found, model):
    """{(claim, first words of the quantity): verdict}."""
    return {
        (finding.part.claim, finding.part.quantity.split(",")[0].split(" (")[0]): finding.verdict
        for finding in found
        if finding.model == model and finding.verdict != claims.UNTESTABLE
    }


# ---- claims ----


def test_planted_effects_hold_and_their_reverse_does_not(runs, tmp_path):
    found = found_of(runs)
    assert set(verdicts(found, BASE).values()) == {claims.HOLDS}
    assert set(verdicts(found, VARIANT).values()) == {claims.HOLDS}
    other = tmp_path / "reversed"
    plant_coco(other, BASE, 3.0, 0.02)
    plant_coco(other, VARIANT, 9.0, 0.01)
    plant_psi(other, BASE, 6)
    plant_psi(other, VARIANT, 1)
    plant_ablation(other, BASE, 4, 4)
    found = found_of(other)
    assert set(verdicts(found, BASE).values()) == {claims.FAILS}
    assert set(verdicts(found, VARIANT).values()) == {claims.FAILS}


def test_values_are_those_of_a_plain_computation(runs):
    found = {(finding.part.quantity, finding.model): finding for finding in found_of(runs)}
    run = rundirs.read_run(runs / f"{BASE}__sp-0")
    arrays = [run.arrays(id) for id in run.ids()]
    vision = [each["hidden_norms_vision"][0] for each in arrays]
    text = [each["hidden_norms_user_text"][0] for each in arrays]
    norms = found[claims.PARTS[0].quantity, BASE]
    assert float(norms.interval.mean) == pytest.approx(sum(vision) / sum(text), rel=1e-6)
    assert int(norms.interval.n) == len(vision)
    psi = found["position sensitivity index, normalised minus base", VARIANT]
    assert float(psi.interval.mean) == pytest.approx(0.6 - 0.1, abs=1e-12)
    destroyed = next(f for f in found.values() if f.part.claim == 3 and f.interval is not None)
    assert float(destroyed.interval.mean) == pytest.approx(34 / 40 - 1 / 40, abs=1e-12)


def test_intervals_are_simultaneous_over_the_tests_of_the_table(runs):
    found = found_of(runs)
    tests = sum(finding.interval is not None for finding in found)
    assert tests == 6  # lengths of two models, PSI, logits, two settings of the ablation
    norms = next(f for f in found if f.model == BASE and f.interval is not None)
    run = rundirs.read_run(runs / f"{BASE}__sp-0")
    vision, text = (
        np.array([run.arrays(id)[f"hidden_norms_{name}"][0] for id in run.ids()])
        for name in ("vision", "user_text")
    )
    wanted = stats.ratio_interval(vision, text, 1 - 0.05 / tests, claims.RESAMPLES)
    assert norms.interval == wanted
    # a mutant that forgets the number of tests has the narrower one
    assert norms.usual.high - norms.usual.low < wanted.high - wanted.low


def test_few_pictures_decide_nothing_and_wide_intervals_neither(tmp_path):
    plant_coco(tmp_path / "few", BASE, 43.0, 0.01, n=claims.FEWEST - 1)
    (few,) = [f for f in found_of(tmp_path / "few") if f.interval is not None]
    assert few.verdict == claims.OPEN and few.why == "too few: n = 4"
    plant_coco(tmp_path / "wide", BASE, 10.5, 0.01, spread=0.5)
    (wide,) = [f for f in found_of(tmp_path / "wide") if f.interval is not None]
    assert wide.verdict == claims.OPEN and not wide.why


def test_what_no_run_speaks_of_is_not_testable_and_says_which_command_makes_it(runs):
    reasons = {f.part.claim: f.why for f in found_of(runs) if f.verdict == claims.UNTESTABLE}
    for claim, command in {4: "lens_accuracy.py", 5: "attention_experiment_curate.py"}.items():
        assert command in reasons[claim]
    assert "swap_analysis.py" in reasons[6] and "volcano" in reasons[7]


def test_the_only_run_of_an_experiment_is_the_models_whatever_its_name(tmp_path):
    """Not one with vision tokens of another length, nor one of several with names."""
    plant_coco(tmp_path, BASE, 43.0, 0.01, run_name="mine")
    (finding,) = [f for f in found_of(tmp_path) if f.interval is not None]
    assert finding.verdict == claims.HOLDS
    done = claims_command("--runs_dir", tmp_path)
    assert f"{BASE}__mine__sp-0, the only run of its experiment" in done.stdout
    plant_coco(tmp_path, BASE, 4.3, 0.01, run_name="short", settings={"vision_scale": 0.1})
    assert [f.interval for f in found_of(tmp_path) if f.interval] == [finding.interval]
    plant_coco(tmp_path, BASE, 3.0, 0.01, run_name="yours")
    found = found_of(tmp_path)
    assert not [f for f in found if f.interval is not None]
    assert {f.why for f in found if f.part.claim == 1} == {
        "several runs of diagnostic_tools/run_coco_diagnostics.py and none without --run_name:"
        f" {BASE}__mine__sp-0, {BASE}__yours__sp-0"
    }
    plant_coco(tmp_path, BASE, 3.0, 0.01)
    (finding,) = [f for f in found_of(tmp_path) if f.interval is not None]
    assert finding.verdict == claims.FAILS


def test_the_table_of_time_has_the_numbers_that_calls_counted(tmp_path):
    run = plant_psi(tmp_path / "runs", BASE, 1)
    cost.note(run, 40, 30.0)
    done = report("--runs_dir", tmp_path / "runs", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "out" / "index.html").read_text()
    cells = re.findall(rf"psi: {BASE}</th>(.*?)</tr>", text)[0]
    assert re.findall(r">([^<]+)</td>", cells)[:2] == ["40", "0.75"]


def test_a_variant_is_known_by_its_name_or_named(tmp_path):
    for model, ratio in (("mine", 43.0), ("other", 1.4)):
        plant_coco(tmp_path, model, ratio, 0.01)
    ranges = {f.model: f.part.who for f in found_of(tmp_path) if f.interval is not None}
    assert ranges == {"mine": "not normalised", "other": "not normalised"}
    found = found_of(tmp_path, normalised={"other": "mine"})
    assert verdicts(found, "other")[1, "the same with a normalising connector"] == claims.HOLDS
    done = claims_command("--runs_dir", tmp_path, "--normalised", "other", "absent")
    assert done.returncode == 2 and "absent" in done.stderr


@pytest.mark.parametrize(
    "low, high, limits, verdict",
    [
        (10, np.inf, (11, 12), claims.HOLDS),
        (10, np.inf, (9, 12), claims.OPEN),
        (10, np.inf, (8, 10), claims.FAILS),
        (0.5, 2, (0.6, 1.9), claims.HOLDS),
        (0.5, 2, (1.9, 2.1), claims.OPEN),
        (0.5, 2, (2, 3), claims.FAILS),
        (-np.inf, 0.09, (0, 0.05), claims.HOLDS),
        (-np.inf, 0.09, (0.1, 0.5), claims.FAILS),
        (0, np.inf, (np.nan, np.nan), claims.OPEN),
    ],
)
def test_a_verdict_is_where_the_whole_interval_lies(low, high, limits, verdict):
    interval = stats.interval_of(float(np.mean(limits)), *map(float, limits), 30)
    assert claims.verdict_of(interval, low, high) == verdict


def test_every_part_names_its_source_and_a_range():
    for part in claims.PARTS:
        assert part.claim in claims.CLAIMS and part.low < part.high and part.source
        assert np.isfinite(part.low) or np.isfinite(part.high)
    assert {part.claim for part in claims.PARTS} == set(claims.CLAIMS)


# ---- comparisons ----


def test_differences_are_paired_by_picture_and_by_cell(tmp_path):
    rng = np.random.default_rng(5)
    levels = rng.normal(size=20)  # pictures differ far more than the two runs
    ids = [f"{number:03d}" for number in range(20)]
    axes = (("layer", range(2)),)
    first = quantities.Quantity("x", "u", ids, np.stack([levels, 2 * levels], 1), axes)
    order = rng.permutation(20)[:15]
    values = np.stack([2 * levels + 7, levels + 0.5 + 0.01 * rng.normal(size=20)], 1)
    second = quantities.Quantity(
        "x", "u", [ids[k] for k in order] + ["new"], np.vstack([values[order], [[9, 9]]]),
        (("layer", [5, 0]),),
    )  # fmt: skip
    (found,) = compare.differences([first], [second])
    assert found.quantity.axes == (("layer", [0]),) and len(found.quantity.ids) == 15
    kept = sorted(order)
    wanted = stats.paired_difference(values[kept, 1][:, None], levels[kept][:, None])
    assert np.allclose(found.interval, wanted, atol=1e-12)
    assert found.interval.low[0] > 0.45 and found.interval.high[0] < 0.55
    # a mutant that pairs by place has an interval that says nothing
    shuffled = stats.paired_difference(values[order, 1], levels[kept])
    assert shuffled.low < 0 < shuffled.high


def test_the_csv_has_every_number_and_the_comparison_its_pairs(runs, tmp_path):
    out = tmp_path / "out"
    pair = [runs / f"{name}__sp-0" for name in (BASE, VARIANT)]
    done = report("--runs_dir", runs, "--out", out, "--csv", "--compare", *pair)
    assert done.returncode == 0, done.stderr
    numbers = pd.read_csv(out / "numbers.csv")
    ratio = numbers[
        (numbers.model == BASE) & (numbers.quantity == "norm of vision / user text tokens")
    ]
    assert len(ratio) == STATES and ratio["mean"].between(41, 45).all() and (ratio.n == 12).all()
    right = numbers[(numbers.experiment == "psi") & (numbers.cell == "kind all")]
    shuffled = right[(right.model == VARIANT) & right.quantity.str.contains("shuffled")]
    assert shuffled["mean"].item() == pytest.approx(0.4)
    differences = pd.read_csv(out / "differences.csv")
    of_ratio = differences[differences.quantity == "norm of vision / user text tokens"]
    assert np.allclose(of_ratio.difference, of_ratio[VARIANT] - of_ratio[BASE])
    other = report("--runs_dir", runs, "--out", out, "--compare", pair[0], runs / "psi" / BASE)
    assert other.returncode == 2 and "two runs of one experiment" in other.stderr


# ---- the page ----


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A report of planted runs, one with a failure whose message is an attack."""
    folder = tmp_path_factory.mktemp("report")
    root = folder / "runs"
    plant_coco(root, BASE, 43.0, 0.01)
    plant_coco(root, VARIANT, 1.4, 0.02)
    run = plant_ablation(root, BASE, 34, 1)
    run.fail("evil", ValueError("<script>window.pwned = 1</script>"))
    done = report("--runs_dir", root, "--out", folder / "out")
    assert done.returncode == 0, done.stderr
    return folder


def test_the_page_is_one_file_that_asks_for_nothing(written):
    text = (written / "out" / "index.html").read_text()
    assert not re.search(r"""(?:src|href)=["'](?!data:|#)""", text)
    assert "<script>window.pwned" not in text and "&lt;script&gt;window.pwned" in text
    figures = re.findall(r'<img src="data:image/png;base64', text)
    assert len(figures) == len(list((written / "out" / "figures").glob("*.png"))) >= 3
    assert len(text) < 25 * 2**20


def test_the_same_runs_give_the_same_bytes(written):
    before = {path.name: path.read_bytes() for path in (written / "out").rglob("*.*")}
    done = report("--runs_dir", written / "runs", "--out", written / "out")
    assert done.returncode == 0, done.stderr
    assert {path.name: path.read_bytes() for path in (written / "out").rglob("*.*")} == before


def test_figures_past_the_limit_are_linked(written, tmp_path, monkeypatch):
    monkeypatch.setattr(page, "MOST_BYTES", 200_000)
    done = report("--runs_dir", written / "runs", "--out", tmp_path)
    assert done.returncode == 0 and "are linked" in done.stdout
    sources = re.findall(r'<img src="([^"]{0,60})', (tmp_path / "index.html").read_text())
    linked = [source for source in sources if not source.startswith("data:")]
    assert linked and all((tmp_path / source).is_file() for source in linked)


def test_a_broken_run_is_named_and_the_others_are_shown(written, tmp_path):
    root = tmp_path / "runs"
    plant_psi(root, BASE, 1)
    broken = root / "knockout" / "lost"
    broken.mkdir(parents=True)
    (broken / "meta.json").write_text("{")
    done = report("--runs_dir", root, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "out" / "index.html").read_text()
    assert "knockout/lost/meta.json" in text and "Position sensitivity index" in text


def test_a_folder_without_runs_is_a_line(tmp_path):
    for command in (report, claims_command):
        done = command("--runs_dir", tmp_path)
        assert done.returncode == 2 and "has no run directories" in done.stderr


@pytest.fixture(scope="module")
def browser(open_browser):
    return open_browser("1440,900", {"browser": "ALL"})


def test_the_page_is_searched_and_used_by_keyboard(browser, written):
    browser.get((written / "out" / "index.html").as_uri())
    assert browser.execute_script("return window.pwned") is None
    shown = [part for part in browser.find_elements(By.TAG_NAME, "figure") if part.is_displayed()]
    body = browser.find_element(By.TAG_NAME, "body")
    body.send_keys("/")
    field = browser.switch_to.active_element
    assert field.get_attribute("id") == "search"
    field.send_keys("balance cross-modality")
    left = [part for part in browser.find_elements(By.TAG_NAME, "figure") if part.is_displayed()]
    assert 0 < len(left) < len(shown)
    assert all("ross-modality" in part.text for part in left)
    field.send_keys(Keys.CONTROL, "a")
    field.send_keys(Keys.BACKSPACE, Keys.ESCAPE)
    browser.find_element(By.TAG_NAME, "body").send_keys("j")
    assert browser.switch_to.active_element.tag_name == "figure"
    browser.switch_to.active_element.send_keys(Keys.ENTER)
    assert browser.find_element(By.ID, "large").is_displayed()
    browser.find_element(By.ID, "large").send_keys(Keys.ESCAPE)
    assert not browser.find_element(By.ID, "large").is_displayed()
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


@pytest.mark.parametrize("width", [1440, 900, 420])
def test_nothing_is_wider_than_the_window(browser, written, width):
    browser.set_window_size(width, 900)
    browser.get((written / "out" / "index.html").as_uri())
    inner = browser.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
    assert inner[0] <= inner[1]


def test_it_prints_without_its_navigation(browser, written):
    browser.get((written / "out" / "index.html").as_uri())
    data = base64.b64decode(browser.print_page())
    assert data.startswith(b"%PDF")
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert not browser.find_element(By.TAG_NAME, "nav").is_displayed()
    assert browser.find_element(By.TAG_NAME, "figure").is_displayed()
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


def test_claims_are_json_for_other_programs(written):
    rows = json.loads((written / "out" / "claims.json").read_text())
    assert {row["claim"] for row in rows} <= set(claims.CLAIMS)
    held = [row for row in rows if row["verdict"] == claims.HOLDS]
    assert held and all(row["simultaneous"]["n"] >= claims.FEWEST for row in held)

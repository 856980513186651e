"""The hallucination warning: calibration and AUROC on planted data, signals against slow
computations, the command line on a tiny model."""

import json

import numpy as np
import pytest
from PIL import Image

from data import make_shapes
from tests.conftest import ROOT, embeddings, in_process
from vlmdiag.model.decoding import extended, generate
from vlmdiag.pictures.samples import Sample
from vlmdiag.runs import rundirs
from vlmdiag.stethoscope import calibration
from vlmdiag.stethoscope import hallucination as warning
from vlmdiag.stethoscope import warning_signals as signals

script = in_process(ROOT / "diagnostic_tools" / "hallucination_warning.py")
figure = in_process(ROOT / "diagnostic_tools" / "viz_hallucination.py")
TINY = ROOT / "checkpoints" / "tiny-llava"


# --- calibration ----------------------------------------------------------------------------------


def auroc(scores, labels):
    """Of words of which each has a picture of its own."""
    return calibration.auroc_interval(scores, labels, np.arange(len(labels)))["value"]


def test_auroc_is_the_share_of_ordered_pairs():
    rng = np.random.default_rng(0)
    scores, labels = np.round(rng.normal(size=60), 1), rng.random(60) < 0.4  # rounded: ties
    slow = np.mean([(a > b) + 0.5 * (a == b) for a in scores[labels] for b in scores[~labels]])
    assert auroc(scores, labels) == pytest.approx(slow)
    assert auroc(-scores, labels) == pytest.approx(1 - slow) and np.isnan(
        auroc(scores, np.ones(60, bool))
    )


def test_fit_recovers_planted_weights_and_is_calibrated():
    rng = np.random.default_rng(1)
    inputs = rng.normal(size=(8000, 3)) * [1, 5, 0.1] + [0, 3, 1]
    risk = 1 / (1 + np.exp(-(0.5 + 1.5 * inputs[:, 0] - 0.2 * inputs[:, 1])))
    labels = rng.random(8000) < risk
    model = calibration.fit(inputs, labels)
    weights = np.array(model["weights"]) / np.array(model["std"])
    assert weights[:2] == pytest.approx([1.5, -0.2], abs=0.1)
    predicted = calibration.predict(model, inputs)
    assert (
        predicted == pytest.approx(risk, abs=0.08)
        and calibration.expected_calibration_error(predicted, labels) < 0.03
    )
    assert calibration.expected_calibration_error(np.clip(predicted + 0.3, 0, 1), labels) > 0.2
    assert sum(row["n"] for row in calibration.reliability(predicted, labels)) == 8000
    with pytest.raises(ValueError, match="both kinds"):
        calibration.fit(inputs, np.zeros(8000))


def test_the_error_of_auroc_is_that_of_images_drawn_again():
    """Against resampling, on words that images have in common; five copies of every word of an
    image say nothing new."""
    rng = np.random.default_rng(2)
    images = np.repeat(np.arange(60), 3)
    labels = rng.random(180) < 0.4
    of_image = np.repeat(rng.normal(size=60), 3)
    good, bad = labels + of_image + rng.normal(size=180), rng.normal(size=180)
    drawn = []
    for _ in range(600):
        rows = (3 * rng.integers(60, size=60)[:, None] + np.arange(3)).reshape(-1)
        pair = (auroc(scores[rows], labels[rows]) for scores in (good, bad))
        drawn.append([*pair])
    value, parts, count = calibration._auroc_parts(good, labels, images)
    assert value == pytest.approx(auroc(good, labels))
    error = calibration._error(parts, count)
    assert error == pytest.approx(np.std(drawn, axis=0)[0], rel=0.12)
    other = calibration._auroc_parts(bad, labels, images)[1]
    of_difference = np.std(np.subtract(*np.transpose(drawn)))
    assert calibration._error(parts - other, count) == pytest.approx(of_difference, rel=0.12)
    better = calibration.auroc_difference(good, bad, labels, images)
    equal = calibration.auroc_difference(good, good, labels, images)
    assert (equal["value"], equal["low"], equal["high"], equal["p"]) == (0, 0, 0, 1)
    assert better["low"] < better["value"] < better["high"] and 0 < better["p"] < 1
    times = np.repeat(np.arange(180), 5)
    again = calibration.auroc_interval(good[times], labels[times], images[times])
    assert again == pytest.approx(calibration.auroc_interval(good, labels, images))


def test_auroc_of_few_or_of_one_kind_is_not_certain():
    ordered = calibration.auroc_interval(np.arange(8), np.arange(8) > 3, np.arange(8))
    assert ordered["value"] == ordered["high"] == 1 and 0.3 < ordered["low"] < 0.5
    one_kind = calibration.auroc_interval(np.arange(4), np.ones(4, bool), np.arange(4))
    assert all(np.isnan(number) for number in one_kind.values())
    single = calibration.auroc_interval([1, 2, 3], [True, False, True], ["a", "a", "a"])
    assert single["value"] == 0.5 and np.isnan(single["low"])


# --- signals --------------------------------------------------------------------------------------


def test_object_names_are_whole_words_and_longer_ones_first():
    names = ["red circle", "circle", "hot dog", "dog"]
    assert signals.object_words(
        "A Red circle, two dogs and a circle near hot dogs; dogma.", names
    ) == [("red circle", 2, 12), ("dog", 18, 22), ("circle", 29, 35), ("hot dog", 41, 49)]


def test_signals_are_what_their_definitions_say(load, pictures):
    vlm = load("llava-gqa")
    batch = vlm.encode([Sample("0", None, "Describe the image.")], [pictures[0]])
    ids = generate(vlm, batch, 4).ids[0]
    (found,) = signals.measure(vlm, batch, ids, [[1, 2]])
    whole, features = extended(batch, ids), vlm.vision(batch)
    rows = [
        batch.input_ids.shape[1],
        batch.input_ids.shape[1] + 1,
    ]  # the positions before tokens 1 and 2
    logs = []
    for pooled in (
        features.pooler_output,
        [part.mean(0, keepdim=True).expand_as(part) for part in features.pooler_output],
    ):
        features.pooler_output = pooled
        inputs = embeddings(vlm, whole, features)
        logits = vlm.model(
            inputs_embeds=inputs,
            attention_mask=whole.attention_mask,
            position_ids=whole.position_ids,
            output_hidden_states=True,
        )
        logs.append(logits.logits[0, rows].log_softmax(-1)[[0, 1], ids[1:3]].mean().item())
    assert found["log_probability"] == pytest.approx(logs[0], abs=1e-4) and found[
        "llr"
    ] == pytest.approx(logs[0] - logs[1], abs=1e-4)
    clean = vlm.vision(batch)
    states = vlm.model(
        inputs_embeds=embeddings(vlm, batch, clean),
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        output_hidden_states=True,
    ).hidden_states[:-1]
    seen = max(
        vlm.model.lm_head(vlm.parts.norm(state[0, batch.vision_positions(0)]))
        .softmax(-1)[:, id]
        .max()
        .item()
        for state in states
        for id in ids[1:3]
    )
    assert (
        found["lens"] == pytest.approx(seen, abs=1e-5)
        and 0 <= found["visual_share"] <= 1
        and found["relevancy_mass"] > 0
    )


def test_corruptions_are_seeded_and_keep_the_size():
    picture = Image.fromarray(
        np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    )
    for kind in warning.CORRUPTIONS:
        one, same, other = (
            np.asarray(warning.corrupted(picture, kind, seed)) for seed in ("a", "a", "b")
        )
        assert one.shape == (40, 60, 3) and np.array_equal(one, same)
        assert np.array_equal(one, np.asarray(picture)) == (kind == "none") and np.array_equal(
            one, other
        ) == (kind in ("none", "blur"))


# --- command line ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    root = tmp_path_factory.mktemp("hallucination")
    for seed in (11, 12):
        flags = [
            "--out_dir",
            str(root / str(seed)),
            "--num_images",
            "14",
            "--num_train",
            "1",
            "--seed",
            str(seed),
            "--num_workers",
            "1",
        ]
        assert make_shapes.main(flags) == 0
    return root


def flags(sets, seed, *more):
    data = (
        "--image_folder",
        sets / f"{seed}/val2017",
        "--ann_file",
        sets / f"{seed}/annotations/instances_val2017.json",
    )
    return (
        "--model_path",
        TINY,
        *data,
        "--out_root",
        sets / "runs",
        "--no_self_check",
        "--corrupt",
        "noise",
        "covered",
        *more,
    )


def test_fit_test_and_score(sets):
    assert script("test", *flags(sets, 12)).returncode == 2  # nothing is calibrated yet
    picture = sets / "12/val2017/000000000001.jpg"
    one = (
        "score",
        "--model_path",
        TINY,
        "--image",
        picture,
        "--out_root",
        sets / "runs",
        "--no_self_check",
    )
    assert "not calibrated" in script(*one).stdout
    done = script("fit", *flags(sets, 11))
    assert done.returncode == 0, done.stderr
    run = rundirs.read_run(
        sets / "runs/hallucination_warning/tiny-llava__fit", "hallucination_warning"
    )
    records = run.records()
    assert {record["kind"] for record in records} == {"captions", "pope"} and {
        record["corruption"] for record in records
    } == {"noise", "covered"}
    for record in records:
        for word in record["words"]:
            assert word["hallucinated"] == (word["word"] not in record["objects"]) and set(
                word["signals"]
            ) == set(signals.SIGNALS)
        if record["kind"] == "pope":
            assert len(record["words"]) == record["caption"].lower().startswith("yes")
    found = json.loads((run.path / "analysis/calibration.json").read_text())
    for kind, part in found["kinds"].items():
        assert (
            part["n_words"]
            == sum(len(record["words"]) for record in records if record["kind"] == kind)
            and 0 < part["n_hallucinated"] < part["n_words"]
        )
    assert "captions" in found["kinds"]
    done = script("test", *flags(sets, 12))
    assert done.returncode == 0 and "log_probability: AUROC" in done.stdout, done.stderr
    test = rundirs.read_run(
        sets / "runs/hallucination_warning/tiny-llava__test", "hallucination_warning"
    )
    report = json.loads((test.path / "analysis/report.json").read_text())["captions"]
    assert (
        report["signals"]["log_probability"]["over_baseline"]["value"] == 0
        and "p_holm" not in report["signals"]["log_probability"]
    )
    values, labels, _, kinds = warning.table(test)
    mine = kinds == "captions"
    assert report["signals"]["llr"]["auroc"]["value"] == pytest.approx(
        auroc(
            calibration.predict(found["kinds"]["captions"]["models"]["llr"], values[mine][:, [1]]),
            labels[mine],
        )
    )
    assert (
        figure("--run_dir", test.path).returncode == 0
        and (test.path / "analysis/hallucination_captions.png").exists()
    )
    assert "P(hallucinated) = " in script(*one).stdout
    broken = json.loads((run.path / "analysis/calibration.json").read_text()) | {
        "fingerprint": "other"
    }
    (sets / "other.json").write_text(json.dumps(broken))
    done = script(*one, "--calibration", sets / "other.json")
    assert done.returncode == 2 and "another model" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("score", "--model_path", TINY), "score needs --image"),
        (("fit", "--model_path", TINY), "fit needs"),
        (("guess", "--model_path", TINY), "invalid choice"),
    ],
)
def test_wrong_usage_is_one_line(arguments, why):
    done = script(*arguments)
    assert done.returncode == 2 and why in done.stderr and done.stderr.count("\n") == 1


def test_signals_are_read_together_so_one_small_p_of_ten_proves_nothing():
    def report(ps):
        scores = {f"signal{n}": {"over_baseline": {"value": 0.2, "p": p}} for n, p in enumerate(ps)}
        return {"signals": scores | {"log_probability": {"over_baseline": {"value": 0, "p": 1}}}}

    reports = {"captions": report([0.04, 0.5, 0.6, 0.7, 0.8]), "questions": report([0.001, 0.9])}
    warning.correct(reports)
    first, second = (reports[kind]["signals"]["signal0"] for kind in ("captions", "questions"))
    assert first["p_holm"] == pytest.approx(0.24) and not first["beats_baseline"]
    assert second["p_holm"] == pytest.approx(0.007) and second["beats_baseline"]
    assert "p_holm" not in reports["captions"]["signals"]["log_probability"]
    rng = np.random.default_rng(0)
    labels = np.tile([True, False], 40)
    good, bad = labels + rng.normal(size=80) * 0.3, rng.normal(size=80)
    found = calibration.auroc_difference(good, bad, labels, np.arange(80))
    assert found["low"] > 0 and found["p"] < 1e-6
    same = calibration.auroc_difference(good, good, labels, np.arange(80))
    assert same["value"] == 0 and same["p"] == 1

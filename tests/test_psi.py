"""Position sensitivity: answer matching, shuffles that depend on nothing but seed, item and number,
and numbers that follow from planted answers."""

import json
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diagnostic_tools import psi
from vlmdiag.answers import is_right, read
from vlmdiag.beyond_semantics import position_sensitivity, psi_report
from vlmdiag.beyond_semantics.position_sensitivity import psi as index
from vlmdiag.beyond_semantics.position_sensitivity import psi_interval
from vlmdiag.cli import UsageError
from vlmdiag.figures import stats
from vlmdiag.pictures.questions import read_questions
from vlmdiag.runs import rundirs

TOOLS = Path(__file__).resolve().parents[1] / "diagnostic_tools"
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


# --- answers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "answer", "found"),
    [
        ("Yes.", "yes", "yes"),
        ("No, there is not.", "Yes", "no"),
        ("There is nothing here.", "No", None),
        ("yesterday", "Yes", None),
        ("NO", "no.", "no"),
        ("The red circle is to the left of it.", "left", "left"),
        ("leftover", "left", None),
        ("It is right, not left.", "left", "right"),
        ("beneath", "below", "below"),
        ("It is under the cross", "beneath", "below"),
        ("above", "under", "above"),
        ("It is nearer.", "close", "close"),
        ("There are two objects.", "2", "2"),
        ("There are 12.", "2", "12"),
        ("12", "1", "12"),
        ("none", "0", "0"),
        ("3.5", "3", None),
        ("3, I think", "3", "3"),
        ("I see 3.", "three", "3"),
        ("The circle is light-blue.", "blue", "blue"),
        ("gray", "grey", "grey"),
        ("infrared", "red", None),
        ("a pink circle", "circle", "circle"),
        ("column 3,  row 4", "column 3, row 4", "column 3, row 4"),
        ("column 13, row 4", "column 3, row 4", None),
        ("It is at column 3, row 45", "column 3, row 4", None),
        ("A Teddy  bear sits there", "teddy bear", "teddy bear"),
        ("bears", "bear", None),
        ("", "bear", None),
        ("", "yes", None),
        ("B", "B", "B"),
        ("(C) the red one", "C", "C"),
        ("A circle. So the answer is B.", "B", "B"),
        ("A. circle", "A", "A"),
        ("b", "(B)", "B"),
        ("Because", "B", None),
    ],
)
def test_an_answer_is_read_as_the_first_whole_word_that_is_an_alternative(text, answer, found):
    assert read(text, answer) == found


def test_right_means_read_as_what_was_expected():
    assert (
        is_right("It is beneath.", "below")
        and is_right("(B)", "B")
        and is_right("Three.", "3")
        and is_right("a teddy bear", "Teddy bear.")
    )
    assert (
        not is_right("It is above or below.", "below")
        and not is_right("", "no")
        and not is_right("B", "A")
        and not is_right("no", "")
    )


@given(st.text(max_size=30), st.sampled_from(["yes", "left", "3", "red", "teddy bear", "B"]))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_any_text_can_be_read_and_a_word_glued_to_letters_never_counts(text, answer):
    assert read(text, answer) is None or isinstance(read(text, answer), str)
    assert not is_right(f"x{answer}x", answer)
    assert is_right(answer, answer) and is_right(f"{answer}.", answer)


def test_every_answer_of_the_drawn_questions_is_right_and_every_other_of_its_kind_wrong():
    from random import Random

    from vlmdiag.scenes.questions import ask
    from vlmdiag.scenes.scene import floor_scene

    rng, by_kind = Random(0), {}
    for _ in range(600):
        question = ask(rng, floor_scene(rng, 3))
        by_kind.setdefault(question.kind, set()).add(question.answer)
    for answers in by_kind.values():
        for answer in answers:
            assert [other for other in answers if is_right(other, answer)] == [answer]


# --- shuffles and the index -----------------------------------------------------------------------


def test_a_shuffle_is_fixed_by_seed_item_and_number():
    assert position_sensitivity.permutation(0, "000000000001-0", 0, 8) == [1, 7, 6, 0, 5, 2, 3, 4]
    seen = {
        tuple(position_sensitivity.permutation(seed, item, k, 100))
        for seed in (0, 1)
        for item in ("1-0", "1-1")
        for k in (0, 1)
    }
    assert len(seen) == 8 and all(sorted(order) == list(range(100)) for order in seen)


def test_shuffles_are_uniform():
    first = [position_sensitivity.permutation(0, str(n), 0, 5).index(2) for n in range(2000)]
    assert np.abs(np.bincount(first) / 2000 - 0.2).max() < 0.04


def test_tokens_without_a_place_stay():
    from vlmdiag.pictures.grid import PatchGrid

    boxes = np.tile([0.0, 0, 1, 1], (40, 1))
    boxes[7::8] = np.nan
    order = position_sensitivity.shuffled(PatchGrid(boxes, None, (10, 10)), 0, "a", 0)
    assert (
        sorted(order) == list(range(40))
        and (order[7::8] == np.arange(7, 40, 8)).all()
        and (order != np.arange(40)).sum() > 25
    )


def test_psi_of_planted_accuracies():
    assert (
        index(0.8, 0.2) == pytest.approx(0.75)
        and index(0.5, 0.6) == pytest.approx(-0.2)
        and np.isnan(index(0.0, 0.0))
    )
    same = psi_interval([1, 0, 1], [1, 0, 1])
    assert same.mean == 0 and -1 < same.low < 0 < same.high < 1  # three images prove little
    lost = psi_interval([1, 1, 1], [0, 0, 0])
    # a sign test of three images does not exclude that as many would be gained (p = 0.25)
    assert lost.mean == lost.high == 1 and -0.01 < lost.low < 0.5
    assert np.isnan(psi_interval([0, 0], [0, 0])[:3]).all()
    one = psi_interval([1.0], [0.5])
    assert one.mean == 0.5 and np.isnan(one.low) and one.n == 1


def test_the_interval_of_psi_is_paired_and_covers_the_truth():
    rng = np.random.default_rng(0)
    covered = 0
    for n in range(60):
        skill = rng.uniform(0.3, 1, 80)
        original, permuted = rng.random(80) < skill, rng.random(80) < 0.5 * skill
        interval = psi_interval(original, permuted, num_resamples=400, seed=n)
        covered += interval.low <= 0.5 <= interval.high
    assert covered >= 52
    original = rng.random(200) < 0.6
    kept = original * rng.choice([0.25, 0.5, 0.75], 200)
    paired = psi_interval(original, kept)
    mixed = psi_interval(original, rng.permutation(kept))
    assert paired.high - paired.low < 0.5 * (mixed.high - mixed.low)


@pytest.mark.parametrize(("before", "shuffled"), [(0.95, 0.99), (0.9, 0.9), (0.97, 0.5)])
def test_images_that_are_all_right_are_no_proof_that_others_are(before, shuffled):
    """Ten images are often all right where one in ten or twenty is not."""
    rng = np.random.default_rng(0)
    truth = 1 - shuffled / before
    held = 0
    for n in range(100):
        original = (rng.random(10) < before) * 1.0
        permuted = (rng.random((10, 5)) < shuffled).mean(1)
        found = psi_interval(original, permuted, num_resamples=200, seed=n)
        held += bool(found.low <= truth <= found.high)
    assert held >= 90


# --- analysis of planted runs ---------------------------------------------------------------------


def planted_run(root, images=20, shuffles=4):
    """Every image: one 'left_right' question, right in order and in 1 of 4 shuffles, two 'color'
    questions, always right; odd images: a wrong 'count'."""
    run = rundirs.open_run(
        rundirs.run_path(root, "tiny-llava", "psi"),
        "psi",
        {"num_permutations": shuffles, "seed": 0},
    )
    for image in range(images):
        questions = [
            ("left_right", True, [True] + [False] * (shuffles - 1)),
            ("color", True, [True] * shuffles),
            ("color", True, [True] * shuffles),
        ]
        questions += [("count", False, [False] * shuffles)] * (image % 2)
        for n, (kind, right, after) in enumerate(questions):
            answers = [
                {"text": "x", "read_as": "x" if correct else None, "correct": correct, "ids": [1]}
                for correct in [right, *after]
            ]
            record = {
                "image_id": image,
                "kind": kind,
                "caption": "x",
                "original": answers[0],
                "permuted": answers[1:],
            }
            run.write(f"{image:012d}-{n}", record)
    return run


def test_the_table_follows_from_planted_answers(tmp_path, capsys):
    planted_run(tmp_path)
    assert (
        psi.main(["--model_path", "tiny-llava", "--out_root", str(tmp_path), "--analyze_only"]) == 0
    )
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "psi/tiny-llava/analysis/psi.json").read_text())["kinds"]
    assert list(found) == ["all", "color", "count", "left_right"]
    of_kind = found["left_right"]
    assert of_kind["psi"]["mean"] == 0.75 and of_kind["psi"]["n"] == 20
    # all images alike: what the images' difference allows for others
    assert 0.4 < of_kind["psi"]["low"] < 0.75 < of_kind["psi"]["high"] < 0.85
    assert of_kind["accuracy_by_permutation"] == [1, 0, 0, 0]
    assert (
        found["color"]["psi"]["mean"] == 0
        and found["color"]["questions"] == 40
        and found["color"]["images"] == 20
    )
    assert (
        found["count"]["psi"] == {"mean": None, "low": None, "high": None, "n": 10}
        and found["count"]["accuracy"]["mean"] == 0
    )
    original, permuted = (
        np.array([1, 0.75] * 10),
        np.array([2.25 / 3, 2.25 / 4] * 10),
    )  # each image counts once
    assert (
        found["all"]["accuracy"]["mean"] == pytest.approx(0.875) and found["all"]["questions"] == 70
    )
    assert found["all"]["accuracy_permuted"]["low"] == pytest.approx(
        stats.mean_interval(permuted).low
    )
    assert found["all"]["psi"]["mean"] == pytest.approx(1 - permuted.mean() / original.mean())
    assert found["left_right"]["share_without_a_known_answer"] == {"original": 0, "permuted": 0.75}
    assert "left_right" in out and re.search(r"0\.750 \[0\.\d+, 0\.\d+\]", out)
    for ending in (".png", ".pdf"):
        assert (tmp_path / f"psi/tiny-llava/analysis/psi{ending}").stat().st_size > 5000


def test_a_missing_run_is_named(tmp_path):
    with pytest.raises(UsageError, match="elsewhere is not a run directory: no such folder"):
        psi.main(["--model_path", "elsewhere", "--out_root", str(tmp_path), "--analyze_only"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--questions", "nowhere.json"], "nowhere.json: no such file"),
        (["--overwrite", "--shard", "0/2"], "--overwrite removes"),
        (["--overwrite", "--analyze_only"], "--overwrite removes"),
    ],
)
def test_wrong_usage_is_one_line(flags, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        psi.main(["--model_path", "x", "--out_root", str(tmp_path), *flags])


def test_numbers_below_one_and_lists_without_answers_are_refused(tmp_path):
    for flag in ("--num_permutations", "--max_questions", "--batch_size", "--max_new_tokens"):
        with pytest.raises(SystemExit, match="2"):
            psi.parse_args(["--model_path", "x", flag, "0"])
    (tmp_path / "q.json").write_text(
        json.dumps([{"image_id": 1, "image": "a.jpg", "question": "What?"}])
    )
    with pytest.raises(
        UsageError, match="1 questions have no answer to compare with, such as 000000000001-0"
    ):
        psi.main(
            [
                "--model_path",
                "x",
                "--questions",
                str(tmp_path / "q.json"),
                "--out_root",
                str(tmp_path),
            ]
        )


# --- on models ------------------------------------------------------------------------------------


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def questions(tmp_path_factory, pictures):
    """Three pictures, two questions each; answers by kind."""
    folder = tmp_path_factory.mktemp("questions")
    entries = []
    for n, picture in enumerate(pictures, 1):
        picture.save(folder / f"{n}.png")
        place = {"image_id": n, "image": f"{n}.png"}
        entries.append(
            place
            | {"question": "Is there a red circle in the image?", "answer": "Yes", "kind": "yes_no"}
        )
        entries.append(
            place
            | {
                "question": "What color is the cross? Answer with only one word.",
                "answer": "red",
                "kind": "color",
            }
        )
    (folder / "q.json").write_text(json.dumps(entries))
    return folder / "q.json"


@pytest.fixture
def call(monkeypatch, load, questions, tmp_path):
    """call(name, *flags) -> exit code of a run on an already loaded random model, into
    tmp_path/<out>."""

    def run(name, *flags, out="runs"):
        monkeypatch.setattr(psi, "load_from_args", lambda args, path: load(name))
        command = [
            "--model_path",
            str(load(name).path),
            "--questions",
            str(questions),
            "--out_root",
            str(tmp_path / out),
            "--max_new_tokens",
            "4",
        ]
        return psi.main([*command, *flags]), tmp_path / out / "psi" / name

    return run


def records_of(folder):
    return {
        path.stem: json.loads(path.read_text())
        for path in sorted((folder / "per_image").glob("*.json"))
    }


@pytest.mark.parametrize("name", ["llava", "qwen"])
def test_an_identity_permutation_changes_nothing_and_a_real_one_does(name, call, monkeypatch):
    code, folder = call(name, "--num_permutations", "2", "--batch_size", "3")
    assert code == 0
    shuffled = records_of(folder)
    assert len(shuffled) == 6 and not list((folder / "failures").iterdir())
    assert any(
        answer["ids"] != record["original"]["ids"]
        for record in shuffled.values()
        for answer in record["permuted"]
    )
    monkeypatch.setattr(
        position_sensitivity, "permutation", lambda seed, item_id, k, count: list(range(count))
    )
    same = records_of(call(name, "--num_permutations", "2", "--batch_size", "3", out="same")[1])
    for id, record in same.items():
        assert (
            record["original"] == shuffled[id]["original"]
            and record["permuted"] == [record["original"]] * 2
        )


@pytest.mark.parametrize("name", ["llava", "qwen"])
def test_the_shuffled_answer_is_that_of_a_prompt_whose_vision_rows_changed_places(
    name, call, load, questions, pictures
):
    """Oracle: plain embeddings of the prompt with the permuted features written in, no batch, no
    padding."""
    vlm = load(name)
    records = records_of(call(name, "--num_permutations", "2", "--batch_size", "4")[1])
    for row, sample in enumerate(read_questions(questions)):
        batch = vlm.encode([sample], [pictures[row // 2]])
        with torch.no_grad():
            features = vlm.vision(batch).pooler_output[0]
            embeds = vlm.model.get_input_embeddings()(batch.input_ids)
            place = batch.vision_positions(0)
            for k, answer in enumerate(
                [records[sample.id]["original"], *records[sample.id]["permuted"]], -1
            ):
                order = (
                    list(range(len(place)))
                    if k < 0
                    else position_sensitivity.permutation(0, sample.id, k, len(place))
                )
                embeds[0, place] = features[order]
                logits = vlm.model(inputs_embeds=embeds, position_ids=batch.position_ids).logits[
                    0, -1
                ]
                assert int(logits.argmax()) == answer["ids"][0]


def test_resumed_and_rebatched_runs_agree_and_the_tower_runs_once_per_batch(
    call, load, monkeypatch, questions, capsys
):
    vlm, passes = load("llava"), []
    hook = vlm.parts.tower.register_forward_hook(lambda *_: passes.append(1))
    code, folder = call(
        "llava", "--num_permutations", "3", "--batch_size", "2", "--max_questions", "4"
    )
    hook.remove()
    assert code == 0 and len(passes) == 2
    before = {path.name: path.read_bytes() for path in (folder / "per_image").iterdir()}
    (folder / "per_image" / "000000000001-1.json").unlink()
    assert call("llava", "--num_permutations", "3", "--batch_size", "2")[0] == 0
    after = {path.name: path.read_bytes() for path in (folder / "per_image").iterdir()}
    assert len(after) == 12 and all(after[name] == data for name, data in before.items())
    records = records_of(folder)
    alone = records_of(
        call("llava", "--num_permutations", "3", "--batch_size", "1", out="alone")[1]
    )
    assert {id: record["permuted"] for id, record in alone.items()} == {
        id: record["permuted"] for id, record in records.items()
    }
    preds = json.loads((folder / "preds.json").read_text())
    assert len(preds) == 6 and preds[0] == {
        "image_id": 1,
        "caption": records["000000000001-0"]["original"]["text"],
    }
    assert call("llava", "--num_permutations", "3", "--shard", "1/2", out="shard")[0] == 0
    assert "--analyze_only" in capsys.readouterr().out
    with pytest.raises(UsageError, match="num_permutations: now 2, there 3"):
        call("llava", "--num_permutations", "2")


def test_a_missing_picture_is_one_failure_and_exit_code_3(call, questions, tmp_path, pictures):
    entries = json.loads(questions.read_text())[:2]
    for entry in entries:
        entry["image"] = str(questions.parent / entry["image"])
    entries[0]["image"] = "gone.png"
    (tmp_path / "q.json").write_text(json.dumps(entries))
    code, folder = call("llava", "--num_permutations", "1", "--questions", str(tmp_path / "q.json"))
    assert code == 3 and [path.name for path in (folder / "failures").iterdir()] == [
        "000000000001-0.json"
    ]
    assert json.loads((folder / "analysis/psi.json").read_text())["kinds"]["all"]["questions"] == 1


def test_a_model_without_a_grid_is_refused_by_name(load, monkeypatch, questions, tmp_path):
    import common
    from vlmdiag.families import generic

    vlm = load("llava")
    monkeypatch.setattr(
        psi,
        "load_from_args",
        lambda args, path: common.VLM(vlm.model, vlm.processor, generic.FAMILY, vlm.path),
    )
    with pytest.raises(UsageError, match="needs grid, which the family generic lacks"):
        psi.main(
            ["--model_path", vlm.path, "--questions", str(questions), "--out_root", str(tmp_path)]
        )


def test_the_real_command_line_measures_a_model(folders, questions, tmp_path, warm_python):
    command = [
        warm_python,
        "-W",
        "error",
        str(TOOLS / "psi.py"),
        "--model-path",
        str(folders["llava"]),
        "--questions",
        str(questions),
    ]
    command += ["--num-permutations", "1"]
    command += [
        "--max_new_tokens",
        "3",
        "--max_questions",
        "3",
        "--batch_size",
        "3",
        "--vision_scale",
        "0.5",
        "--run_name",
        "half",
        "--no_self_check",
    ]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, env=ONE_THREAD, cwd=tmp_path
    )
    assert (done.returncode, done.stderr) == (0, "") and "PSI" in done.stdout
    folder = tmp_path / "runs/psi/llava__half"
    assert len(records_of(folder)) == 3 and (folder / "analysis/psi.png").exists()
    assert json.loads((folder / "meta.json").read_text())["settings"]["vision_scale"] == 0.5


def test_models_are_rows_of_one_figure_with_the_interval_of_their_psi():
    def summary(psi):
        interval = stats.Interval(psi, psi - 0.1, psi + 0.2, 9)
        return {"psi": interval, "questions": 12, "images": 9}

    undefined = summary(0.0) | {"psi": stats.Interval(np.nan, np.nan, np.nan, 9)}
    figure = psi_report.draw_comparison(
        {"first": {"all": summary(0.1), "far_close": summary(0.3)}, "second": {"all": undefined}}
    )
    (axis,) = figure.axes
    names = [label.get_text().split("\n")[0] for label in axis.get_yticklabels()]
    assert names == ["all", "far close"] and axis.yaxis_inverted()
    drawn = {bars.get_label(): bars for bars in axis.containers}
    assert list(drawn) == ["first (n = 9)", "second (n = 9)"]
    points, _, (reach,) = drawn["first (n = 9)"].lines
    np.testing.assert_allclose(points.get_xdata(), [0.1, 0.3])
    ends = [segment[:, 0] for segment in reach.get_segments()]
    np.testing.assert_allclose(ends, [[0.0, 0.3], [0.2, 0.5]])
    assert [round(row) for row in points.get_ydata()] == [0, 1]
    assert "none right" in "".join(text.get_text() for text in axis.texts)
    psi_report.plots.plt.close(figure)


def test_a_loss_of_one_image_has_limits_that_say_something():
    """Resamples of nearly equal images give no end; what one of 18 images says of others does."""
    original, permuted = np.ones(18), np.ones(18)
    for left in (0.5, 0.0):
        permuted[0] = left
        found = psi_interval(original, permuted)
        assert found.mean == pytest.approx((1 - left) / 18)
        assert found.low <= found.mean < found.high < 0.5

"""The scripts of scripts/ by their command lines on small models and drawn pictures: files, resume,
refusals, tables on planted results."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from common import capture, load_image, load_model
from data import make_shapes
from tests.conftest import ROOT, in_process
from vlmdiag.figures import plots
from vlmdiag.figures.stats import Interval
from vlmdiag.interp import figures
from vlmdiag.interp.knockout_pairs import GROUP_NAMES
from vlmdiag.interp.summary import Effect
from vlmdiag.model.decoding import extended, generate
from vlmdiag.model.lens import Lens
from vlmdiag.model.probes import HiddenStates
from vlmdiag.model.vision import prefill
from vlmdiag.pictures.samples import Sample
from vlmdiag.runs import rundirs

SCRIPTS = ROOT / "scripts"
ablation, curate, attention, summary = (
    in_process(SCRIPTS / f"{name}.py")
    for name in (
        "ablation_experiment",
        "ablation_experiment_curate",
        "attention_experiment_curate",
        "summarize_results",
    )
)
lens, accuracy = (
    in_process(SCRIPTS / "logit_lens" / f"{name}.py")
    for name in ("create_logit_lens", "lens_accuracy")
)
TINY = ROOT / "checkpoints" / "tiny-llava"
ZEROS = (
    "--replacement",
    "zeros",
    "--no_self_check",
    "--gradient_steps",
    3,
    "--sizes",
    5,
    "--draws",
    2,
)


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes") / "set"
    assert (
        make_shapes.main(
            [
                "--out_dir",
                str(folder),
                "--num_images",
                "14",
                "--num_train",
                "2",
                "--seed",
                "1",
                "--num_workers",
                "1",
            ]
        )
        == 0
    )
    return folder


def ok(done, code=0):
    assert done.returncode == code, done.stdout + done.stderr
    return done


def files(folder):
    return {path.name: path.read_bytes() for path in (folder / "per_image").iterdir()}


def test_ablation_measures_resumes_and_writes_the_published_form(coco, tmp_path):
    command = ("--model_path", TINY, "--coco_root", coco, *ZEROS)
    ok(ablation(*command, "--out_root", tmp_path / "a", "--results_file", tmp_path / "out.json"))
    run = rundirs.read_run(tmp_path / "a/ablation/tiny-llava", "ablation")
    records = {id: run.record(id) for id in run.ids()}
    eligible = {id: record for id, record in records.items() if record["eligible"]}
    assert len(eligible) >= 3
    for id, record in eligible.items():
        plain, arrays = record["conditions"]["none"], run.arrays(id)
        assert (
            plain["generative"]["correct"]
            and not record["under_noise"]["correct"]
            and record["category"] in plain["generative"]["text"]
        )
        assert (
            record["gradient_completeness_error"] >= 0
            and record["conditions"]["all"]["tokens"] == record["vision_tokens"] == 144
        )
        assert (
            record["conditions"]["patch_0"]["tokens"]
            == record["object_tokens"]
            == len(arrays["tokens_patch_0"])
        )
        assert not set(arrays["tokens_patch_1"]) & set(arrays["tokens_random_matched_1_0"]) and set(
            arrays["tokens_patch_0"]
        ) < set(arrays["tokens_patch_1"])
        assert {
            "register",
            "patch_2",
            "gradient_5",
            "random_5",
            "gradient_matched_1",
            "blob_matched_0_1",
        } <= set(record["conditions"]) | set(record["skipped"])
    hurt = [
        record["conditions"]["patch_1"]["polling"]["logprob_yes"]
        - record["conditions"]["none"]["polling"]["logprob_yes"]
        for record in eligible.values()
    ]
    spared = [
        record["conditions"]["random_matched_1_0"]["polling"]["logprob_yes"]
        - record["conditions"]["none"]["polling"]["logprob_yes"]
        for record in eligible.values()
    ]
    assert (
        np.mean(hurt) < np.mean(spared) - 1
    )  # the trained model needs the object's tokens and not as many others
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["cfg"] == {"zero_ablation": True} and len(content) == len(eligible) + 1
    first = content[str(next(iter(eligible.values()))["image_id"])]
    assert set(first["no_ablation"]) == {"generative", "polling", "description"} and {
        "register_ablation",
        "patch_ablation_0",
        "image_ablation",
    } <= set(first) | {"register_ablation"}
    assert (
        len(first["indices"]["image_ablation"]) == 144
        and min(first["indices"]["image_ablation"]) > 0
    )
    for id in list(records)[::2]:  # an interrupted run
        (run.path / "per_image" / f"{id}.json").unlink()
    before = files(run.path)
    ok(ablation(*command, "--out_root", tmp_path / "a"))
    ok(ablation(*command, "--out_root", tmp_path / "b", "--shard", "0/2"))
    ok(ablation(*command, "--out_root", tmp_path / "b", "--shard", "1/2"))
    assert (
        files(run.path) == files(tmp_path / "b/ablation/tiny-llava")
        and before.items() <= files(run.path).items()
    )
    refused = ablation(*command, "--out_root", tmp_path / "a", "--threshold", 0.5)
    assert refused.returncode == 2 and "threshold" in refused.stderr


def test_questions_and_knockouts_on_the_trained_model(coco, tmp_path):
    questions = (
        "--model_path",
        TINY,
        "--coco_root",
        coco,
        "--clean_questions_file",
        coco / "clean_questions.json",
        "--out_root",
        tmp_path,
        "--no_self_check",
    )
    ok(
        curate(
            *questions,
            "--replacement",
            "noise",
            "--gradient_steps",
            0,
            "--sizes",
            5,
            "--draws",
            1,
            "--max_images",
            5,
            "--results_file",
            tmp_path / "q.json",
        )
    )
    run = rundirs.read_run(tmp_path / "ablation_vqa/tiny-llava", "ablation_vqa")
    right = [record for record in run.records() if record["eligible"]]
    assert len(run.ids()) == 5 and len(right) >= 4
    for record in right:
        plain = record["conditions"]["none"]["vqa"]
        assert record["prompt"].endswith("ASSISTANT: It is a") and plain["text"].startswith(
            record["answer"]
        )
        assert plain["generated_token"].strip() == record["answer"] and plain[
            "generated_token_prob"
        ] == pytest.approx(np.exp(plain["logprob_first_token"]), abs=1e-5)
        assert (
            plain["logprob_name"] <= plain["logprob_first_token"] + 1e-6
            and "gradient_5" not in record["conditions"]
        )
    assert set(json.loads((tmp_path / "q.json").read_text())[run.ids()[0]]) == {
        "baseline",
        "experiments",
    }
    ok(attention(*questions, "--max_images", 5, "--results_file", tmp_path / "k.json"))
    run = rundirs.read_run(tmp_path / "knockout/tiny-llava", "knockout")
    records = [record for record in run.records() if record["eligible"]]
    assert all(len(record["conditions"]) == 37 and not record["skipped"] for record in records)

    def drop(key):
        of_conditions = [record["conditions"] for record in records]
        logprobs = [
            [of[name]["vqa"]["logprob_first_token"] for name in (key, "none")]
            for of in of_conditions
        ]
        return np.mean([cut - whole for cut, whole in logprobs])

    assert drop("object+1:last_token:all") < -1 and abs(drop("image-last_row:last_row:all")) < 0.2
    published = json.loads((tmp_path / "k.json").read_text())[run.ids()[0]]["attn_block_results"]
    assert len(published) == 36 and {
        "PATCH_TO_LAST_TOK_EARLY",
        "ALL_MINUS_PATCH_ALL_LAYERS",
        "PATCH_TO_LAST_ROW_MID_LATE",
    } <= set(published)
    ok(
        attention(
            *questions,
            "--max_images",
            2,
            "--run_name",
            "own",
            "--pairs",
            "question:last_token",
            "image:question",
            "--windows",
            "single",
            "0-3",
        )
    )
    own = rundirs.read_run(tmp_path / "knockout/tiny-llava__own", "knockout")
    assert len(own.record(own.ids()[0])["conditions"]) == 1 + 2 * 7


def test_knockouts_without_a_shared_prefix_are_the_same(coco, tmp_path, monkeypatch):
    """A family that is not known to be causal runs every knockout in full."""
    questions = (
        "--model_path",
        TINY,
        "--coco_root",
        coco,
        "--clean_questions_file",
        coco / "clean_questions.json",
        "--no_self_check",
        "--max_images",
        2,
    )
    ok(attention(*questions, "--out_root", tmp_path / "a"))
    import dataclasses

    from vlmdiag.families import llava

    monkeypatch.setattr(
        llava, "FAMILY", dataclasses.replace(llava.FAMILY, has=llava.FAMILY.has - {"causal"})
    )
    ok(attention(*questions, "--out_root", tmp_path / "b"))
    one, other = (
        rundirs.read_run(tmp_path / name / "knockout/tiny-llava", "knockout") for name in "ab"
    )
    for id in one.ids():
        for key, found in one.record(id)["conditions"].items():
            assert found["vqa"]["logprob_first_token"] == pytest.approx(
                other.record(id)["conditions"][key]["vqa"]["logprob_first_token"], abs=1e-4
            ), key


def test_every_family_runs_the_scripts(coco, folders, tmp_path):
    """Random Qwen2.5-VL and grouped queries: whatever they answer, the commands go through."""
    for name in ("qwen", "llava-gqa"):
        common = (
            "--model_path",
            folders[name],
            "--coco_root",
            coco,
            "--out_root",
            tmp_path,
            "--no_self_check",
            "--max_images",
            2,
        )
        ok(
            ablation(
                *common,
                *ZEROS[:2],
                "--no_noise_filter",
                "--max_new_tokens",
                4,
                "--gradient_steps",
                2,
            )
        )
        ok(accuracy(*common))
        ok(attention(*common, "--clean_questions_file", coco / "clean_questions.json"))
        ok(
            lens(
                "--model_path",
                folders[name],
                "--image_folder",
                coco / "train2017",
                "--save_folder",
                tmp_path / "pages",
                "--out_root",
                tmp_path,
                "--no_self_check",
            )
        )
    assert len(list((tmp_path / "pages").glob("*.html"))) == 4


def test_lens_pages_are_made_once_and_from_the_run(coco, tmp_path):
    command = (
        "--model_path",
        TINY,
        "--image_folder",
        coco / "train2017",
        "--save_folder",
        tmp_path / "pages",
        "--out_root",
        tmp_path,
        "--no_self_check",
        "--top_k",
        3,
    )
    ok(lens(*command))
    pages = sorted((tmp_path / "pages").glob("tiny-llava_*_logit_lens.html"))
    assert len(pages) == 2
    run = rundirs.read_run(tmp_path / "logit_lens/tiny-llava", "logit_lens")
    record, arrays = run.record(run.ids()[0]), run.arrays(run.ids()[0])
    assert (
        arrays["ids"].shape == arrays["probs"].shape == (7, len(record["labels"]), 3)
        and (np.diff(arrays["probs"], axis=2) <= 0).all()
    )
    assert record["groups"].count("vision") == len(arrays["boxes"]) == 144
    answer = record["answer"]["labels"]
    assert arrays["answer_ids"].shape == arrays["answer_probs"].shape == (7, len(answer) - 1, 3)
    # greedy: what each position before a token predicts in the end, the prompt's last one first
    best = [arrays["ids"][-1, -1, 0], *arrays["answer_ids"][-1, :, 0]]
    assert [record["vocabulary"][str(id)] for id in best] == answer and len(answer) > 8
    assert record["answer"]["text"] == "".join(answer[:-1]).strip()
    vlm = load_model(TINY, self_check=False)
    picture = load_image(coco / "train2017" / record["file_name"])
    batch = vlm.encode([Sample("0", None, "Describe the image.")], [picture])
    written = generate(vlm, batch, 32).ids[0]
    with torch.inference_mode(), capture(vlm, [probe := HiddenStates()]):
        prefill(vlm, extended(batch, written))  # in one pass, not token by token
        wanted = [Lens(vlm).top_k(probe.states[i], 3)[1][0, -len(written) : -1] for i in range(7)]
        shifted = [Lens(vlm).top_k(probe.states[i], 3)[1][0, 1 - len(written) :] for i in range(7)]
    assert np.allclose(arrays["answer_probs"], torch.stack(wanted), atol=1e-4)
    assert not np.allclose(arrays["answer_probs"], torch.stack(shifted), atol=1e-2)
    page = pages[0].read_text()
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert data["answer"] == answer and data["shape"][1] == len(record["labels"] + answer[1:])
    before = [page.read_bytes() for page in pages]
    pages[0].unlink()
    assert (
        "1 pages written" in ok(lens(*command)).stdout
        and [page.read_bytes() for page in pages] == before
    )
    assert lens(*command, "--prompt_text", "Other?").returncode == 2
    assert (
        lens(
            "--image_folder", tmp_path / "nowhere", "--save_folder", tmp_path, "--model_path", TINY
        ).returncode
        == 2
    )


def test_the_lens_reads_names_on_the_trained_models_object_patches(coco, tmp_path):
    done = ok(
        accuracy(
            "--model_path",
            TINY,
            "--coco_root",
            coco,
            "--out_root",
            tmp_path,
            "--no_self_check",
            "--threshold",
            0.3,
        )
    )
    assert "best layer cross fitted" in done.stdout
    folder = tmp_path / "lens_accuracy/tiny-llava/analysis"
    content = json.loads((folder / "lens_accuracy.json").read_text())
    own, shuffled = (
        np.array(content["by_hidden_state"][name]["mean"]) for name in ("own", "shuffled")
    )
    assert own[-2] > 0.8 and own[-2] > shuffled[-2] + 0.3
    best = {name: part["mean"] for name, part in content["best_layer"].items()}
    assert best["per_picture"] >= best["overall"] >= best["cross_fitted"] - 1e-9 and best[
        "overall"
    ] == pytest.approx(own.max())
    made = {f"lens_accuracy.{ending}" for ending in ("json", "csv", "png", "pdf")}
    assert {path.name for path in folder.iterdir()} == made
    again = {name: (folder / name).read_bytes() for name in made}
    ok(accuracy("--model_path", TINY, "--out_root", tmp_path, "--analyze_only"))
    assert {name: (folder / name).read_bytes() for name in made} == again


# --- tables on planted results --------------------------------------------------------------------


def planted(folder, experiment, records, **settings):
    run = rundirs.open_run(folder, experiment, {"model_name": "planted"} | settings)
    for n, record in enumerate(records):
        run.write(f"{n:03d}", {"image_id": n, "eligible": True} | record)
    return run.path


def part(right, logprob=0.0, tokens=4):
    return {"vqa": {"correct": right, "logprob_first_token": logprob}, "tokens": tokens}


def effect(tokens, share=0.5):
    interval = Interval(share, share - 0.2, share + 0.3, 10)
    return Effect(tokens, interval, interval, None, None)


def test_ablation_bars_stand_by_their_tokens_in_words_with_intervals():
    tokens = {
        "all": 144,
        "random_matched_1": 19.4,  # of one picture less than the object's
        "gradient_matched_0": 6,
        "random_20": 20,
        "patch_1": 20,
        "patch_0": 6,
        "blob_matched_0": 6,
    }
    effects = {name: effect(count) for name, count in tokens.items()}
    figure = figures.draw_ablation({"run": {"generative": effects, "polling": effects}})
    (axis,) = figure.axes
    assert [label.get_text() for label in axis.get_yticklabels()] == [
        "object (6 tokens)",
        "as many, highest gradient (6 tokens)",
        "as many, one piece elsewhere (6 tokens)",
        "object and 1 patch around it (20 tokens)",
        "as many, at random elsewhere (19 tokens)",
        "all tokens of the picture (144 tokens)",
    ]
    assert axis.yaxis_inverted() and axis.get_xlim()[0] == 0  # the fewest tokens at the top
    lines = [line for bars in axis.containers[1::2] for line in bars.errorbar[2]]
    ends = [segment[:, 0].tolist() for line in lines for segment in line.get_segments()]
    np.testing.assert_allclose(ends, [[0.3, 0.8]] * 12)
    plots.plt.close(figure)


def test_every_cell_of_a_knockout_says_its_interval_and_every_place_has_words():
    effects = {f"{source}:last_token:all": effect(4, 0.6) for source in GROUP_NAMES[:-1]}
    figure = figures.draw_knockout({"run": effects}, {"run": {"all": [0, 5]}})
    axis = figure.axes[0]
    assert {text.get_text() for text in axis.texts} == {"0.60\n0.40 to 0.90"}
    words = [label.get_text() for label in axis.get_yticklabels()]
    assert len(set(words)) == len(effects) and not re.search("[_+]", "".join(words))
    plots.plt.close(figure)


def test_tables_hold_the_planted_shares(tmp_path):
    records = [
        {
            "conditions": {
                "none": part(n < 8),
                "patch_1": part(n >= 6, -2.0),
                "random_matched_1_0": part(True),
                "random_matched_1_1": part(n > 0),
            }
        }
        for n in range(10)
    ]
    path = planted(tmp_path / "ablation_vqa/planted", "ablation_vqa", records)
    knocked = [
        {"conditions": {"none": part(True), "object:last_token:all": part(n < 3, -1.0)}}
        for n in range(10)
    ]
    other = planted(tmp_path / "knockout/planted", "knockout", knocked, windows={"all": [0, 5]})
    ok(summary("--run_dir", path, other, "--out_dir", tmp_path / "out"))
    rows = [line.split(",") for line in (tmp_path / "out/table1.csv").read_text().splitlines()]
    found = {row[2]: dict(zip(rows[0], row)) for row in rows[1:]}
    assert (
        float(found["patch_1"]["destroyed"]) == 6 / 8 and int(found["patch_1"]["destroyed_n"]) == 8
    )  # items wrong at first count nowhere
    assert (
        float(found["random_matched_1"]["destroyed"]) == 0.5 / 8
        and float(found["patch_1"]["minus_random"]) == 6 / 8 - 0.5 / 8
    )
    assert (
        float(found["patch_1"]["change_of_logprob"]) == -2
        and found["random_matched_1"]["minus_random"] == ""
    )
    assert (
        0
        < float(found["random_matched_1"]["destroyed_low"])
        < 0.5 / 8
        < float(found["random_matched_1"]["destroyed_high"])
        < 0.5
    )
    header, row = [
        line.split(",") for line in (tmp_path / "out/table2.csv").read_text().splitlines()
    ]
    assert dict(zip(header, row))["relative_accuracy"] == "0.3" and row[1:4] == [
        "object",
        "last_token",
        "all",
    ]
    assert "0.300" in (tmp_path / "out/table2.md").read_text()
    assert {
        f"{name}.{ending}" for name in ("ablation", "knockout") for ending in ("png", "pdf")
    } <= {file.name for file in (tmp_path / "out").iterdir()}


def test_a_run_with_nothing_right_and_other_folders_are_refused(tmp_path):
    path = planted(
        tmp_path / "a", "ablation_vqa", [{"conditions": {"none": part(False)}, "eligible": False}]
    )
    for folder, why in (
        (path, "nothing can be destroyed"),
        (tmp_path / "none", "not a run directory"),
    ):
        done = summary("--run_dir", folder, "--out_dir", tmp_path / "out")
        assert done.returncode == 2 and why in done.stderr and done.stderr.count("\n") == 1


# --- refusals and commands ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "flags", "why"),
    [
        (ablation, ["--coco_root", "{none}"], "no such file|no such image folder"),
        (ablation, ["--min_area", "90000"], "object filter"),
        (ablation, [], "--mean_tensor is needed"),
        (ablation, ["--replacement", "zeros", "--per_pass", "0"], "--per_pass"),
        (curate, ["--clean_questions_file", "{none}"], "no such file"),
        (curate, ["--clean_questions_file", "{empty}"], "has no question"),
        (attention, ["--clean_questions_file", "{other}"], "train2017"),
        (
            attention,
            ["--clean_questions_file", "{questions}", "--windows", "9-12"],
            "--windows 9-12",
        ),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(coco, tmp_path, script, flags, why):
    (tmp_path / "empty.json").write_text('{"1": []}')
    (tmp_path / "other.json").write_text('{"123456": ["What is it?"]}')
    names = {
        "none": tmp_path / "nowhere",
        "empty": tmp_path / "empty.json",
        "other": tmp_path / "other.json",
        "questions": coco / "clean_questions.json",
    }
    flags = [flag.format(**names) for flag in flags]
    if "--coco_root" not in flags:
        flags += ["--coco_root", coco]
    done = script("--model_path", TINY, "--no_self_check", "--out_root", tmp_path, *flags)
    assert done.returncode == 2 and re.search(why, done.stderr) and done.stderr.count("\n") == 1, (
        done.stderr
    )


def test_an_object_that_covers_no_token_and_a_damaged_picture_fail_alone(coco, tmp_path):
    copy = tmp_path / "coco"
    shutil.copytree(coco, copy)
    annotations = copy / "annotations/instances_val2017.json"
    content = json.loads(annotations.read_text())
    first, second = content["images"][:2]
    for annotation in content["annotations"]:
        if annotation["image_id"] == first["id"]:
            annotation["segmentation"] = [[50, 50, 53, 50, 53, 54]]
    annotations.write_text(json.dumps(content))
    (copy / "val2017" / second["file_name"]).write_bytes(b"no picture")
    flags = (
        "--min_area",
        0,
        "--max_area",
        1e9,
        "--max_annotations",
        9,
        "--threshold",
        0.5,
        "--max_images",
        4,
    )
    done = accuracy(
        "--model_path", TINY, "--coco_root", copy, "--out_root", tmp_path, "--no_self_check", *flags
    )
    run = rundirs.read_run(tmp_path / "lens_accuracy/tiny-llava", "lens_accuracy")
    failed = run.failed()
    assert done.returncode == 3 and len(run.ids()) == 2 and len(failed) == 2
    assert (
        "covers no token" in failed[f"{first['id']:012d}"]["message"]
        and "not a readable picture" in failed[f"{second['id']:012d}"]["message"]
    )


def test_the_shell_script_runs_from_anywhere(coco, tmp_path, warm_python):
    variables = {
        "COCO_ROOT": str(coco),
        "RUNS": str(tmp_path / "runs"),
        "OUT": str(tmp_path / "out"),
        "MAX_IMAGES": "2",
        "PYTHON": warm_python,
        "MODEL": str(TINY),
    }
    done = subprocess.run(
        ["bash", SCRIPTS / "run_knockout.sh"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | variables,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/knockout.png").exists() and Path(
        tmp_path / "runs/knockout/tiny-llava/meta.json"
    ).exists()

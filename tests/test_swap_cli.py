"""swap_analysis.py by its command line on a tiny model: stages, resume, several scales, merge,
refusals."""

import json
import os
import subprocess

import numpy as np
import pytest

from data import make_shapes
from tests.conftest import ROOT, in_process
from vlmdiag.runs import rundirs

swap = in_process(ROOT / "swap_analysis" / "swap_analysis.py")
TINY = ROOT / "checkpoints" / "tiny-llava"


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("swap-cli") / "set"
    assert (
        make_shapes.main(
            [
                "--out_dir",
                str(folder),
                "--num_images",
                "16",
                "--num_train",
                "1",
                "--seed",
                "5",
                "--num_workers",
                "1",
            ]
        )
        == 0
    )
    return folder


def flags(shapes, folder, *more):
    table = (
        "--data_path",
        shapes / "swap_pairs_ready.tsv",
        "--bbox_file",
        shapes / "bboxes.json",
        "--max_samples_per_category",
        4,
    )
    return (
        "--model_type",
        "tiny",
        *table,
        "--out_root",
        folder / "runs",
        "--output_dir",
        folder / "results",
        "--no_self_check",
        "--rep_layers",
        5,
        *more,
    )


def contents(run):
    return {path.name: path.read_bytes() for path in (run.path / "per_image").glob("*.json")}


def test_stages_resume_and_merge(shapes, tmp_path):
    done = swap(
        *flags(
            shapes,
            tmp_path,
            "--scales",
            f"full={TINY}",
            f"other={TINY}",
            "--layers",
            3,
            5,
            "--stage",
            "pairs",
            "states",
            "metrics",
        )
    )
    assert done.returncode == 0, done.stdout + done.stderr
    run = rundirs.read_run(tmp_path / "runs/swap_analysis/tiny_full", "swap_analysis")
    states, quads = np.load(run.path / "states.npy"), np.load(run.path / "quad_states.npy")
    records = run.records()
    assert (
        states.shape == (len(records), 2, 2, 128)
        and states.dtype == np.float16
        and len(quads) == len((run.path / "quads.jsonl").read_text().splitlines())
    )
    assert (
        np.mean([record["is_correct_orig"] and record["is_correct_swap"] for record in records])
        > 0.8
    )  # the trained model knows these relations
    assert all(
        (record["margin_orig"] > 0) == record["is_correct_orig"]
        for record in records
        if record["read_orig"]
    )
    stats = json.loads((tmp_path / "results/tiny/json/pred_stats_full.json").read_text())
    assert stats["overall_n"] == len(records)
    coherence = json.loads(
        (tmp_path / "results/tiny/json/sign_corrected_consistency_full_all_pairs.json").read_text()
    )
    assert (
        coherence["horizontal_L5"]["mean"] > 0.4 > abs(coherence["horizontal_L5"]["null_mean"])
        and "horizontal_L0" not in coherence
    )
    before = contents(run)
    for id in run.ids()[::3]:  # an interrupted run
        (run.path / "per_image" / f"{id}.json").unlink()
    again = flags(
        shapes, tmp_path, "--scales", f"full={TINY}", "--layers", 3, 5, "--stage", "states"
    )
    assert swap(*again).returncode == 0 and contents(run) == before
    assert swap(*again, "--max_new_tokens", 2).returncode == 2  # other settings
    assert swap(*again, "--max_new_tokens", 2, "--overwrite").returncode == 0
    done = swap("--model_type", "tiny", "--merge", "--output_dir", tmp_path / "results")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "results/tiny/csv/summary.csv").read_text().count("\n") == 3
    assert (tmp_path / "results/tiny/plots/all/cross_scale/sign_corrected.png").exists()
    beside = (
        "--merge_output_dir",
        tmp_path / "merged",
        "--group_name",
        "two",
        "--scales",
        "full",
        "other",
    )
    assert (
        swap(
            "--model_type",
            "tiny",
            "--merge",
            "--output_dir",
            tmp_path / "results",
            *beside,
            "--phase1_only",
        ).returncode
        == 0
    )
    assert (tmp_path / "merged/two/csv/summary.csv").read_bytes() == (
        tmp_path / "results/tiny/csv/summary.csv"
    ).read_bytes()
    assert not (tmp_path / "merged/two/plots").exists()  # --phase1_only
    done = swap(
        "--model_type",
        "tiny",
        "--recommend_layer",
        "--recommend_k",
        1,
        "--recommend_frac",
        0.2,
        "--output_dir",
        tmp_path / "results",
    )
    assert (
        done.returncode == 0
        and "full: layer 5 (" in done.stdout
        and "last one allowed 5" in done.stdout
        and "other: layer 5 (" in done.stdout
    )
    done = swap(
        "--model_type",
        "tiny",
        "--recommend_layer",
        "--recommend_frac",
        0.4,
        "--output_dir",
        tmp_path / "results",
    )
    assert (
        done.returncode == 0 and "full: no layer qualifies" in done.stdout
    )  # layer 5 is among the last ones then
    (tmp_path / "results/tiny/json/vd_ei_full.json").unlink()
    assert (
        swap(*flags(shapes, tmp_path, "--scales", f"full={TINY}", "--rebuild_metrics")).returncode
        == 0
    )  # from the states, no model
    assert (tmp_path / "results/tiny/json/vd_ei_full.json").exists() and (
        tmp_path / "results/tiny/plots/all/strata/strata_full.png"
    ).exists()
    heatmaps = [path.name for path in (tmp_path / "results/tiny/plots/all/heatmap").glob("*.png")]
    assert heatmaps == ["heatmap_full_L5.png"]  # layer 3 was measured, 5 is the representative one


@pytest.mark.parametrize(
    ("more", "quads"),
    [
        ((), True),
        (("--skip_phase_b",), False),
        (("--skip_cross_group",), False),
        (("--skip-cross-group", "--run-phase-b"), True),
    ],
)
def test_quads_are_left_out_on_request(shapes, tmp_path, more, quads):
    done = swap(*flags(shapes, tmp_path, "--scales", f"full={TINY}", "--stage", "pairs", *more))
    assert done.returncode == 0 and ("0 quads" not in done.stdout) == quads, done.stdout


def test_multiple_choice_runs_end_to_end(shapes, tmp_path):
    more = ("--question_type", "mcq", "--phase1-only", "--layers", 5)
    done = swap(*flags(shapes, tmp_path, "--scales", f"full={TINY}", *more))
    assert done.returncode == 0, done.stderr
    run = rundirs.read_run(tmp_path / "runs/swap_analysis/tiny_full", "swap_analysis")
    records = run.records()
    assert all("(A)" in question for record in records for question in record["questions"]) and {
        record["margin_orig"] is not None for record in records
    } == {True}
    assert (tmp_path / "results/tiny/json/pred_stats_full.json").exists() and not (
        tmp_path / "results/tiny/plots"
    ).exists()


def test_one_scale_that_fails_does_not_stop_the_others(shapes, tmp_path):
    done = swap(
        *flags(
            shapes,
            tmp_path,
            "--scales",
            "bad=/no/such/model",
            f"full={TINY}",
            "--stage",
            "states",
            "metrics",
            "--layers",
            5,
        )
    )
    assert done.returncode == 3 and "error: bad" in done.stdout
    assert (tmp_path / "results/tiny/json/pred_stats_full.json").exists()


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (("--scales", "50k"), "known for tiny are scale1"),
        (("--scales", "x=/no/such"), "no such folder"),
        (("--data_path", "none.tsv"), "cannot be read"),
        (("--bbox_file", "none.json"), "no such file"),
        (("--layers", 9), "has 6 layers"),
        (("--stage", "metrics"), "not a run directory"),
        (("--merge",), "python swap_analysis/swap_analysis.py"),
        (("--recommend_layer",), "python swap_analysis/swap_analysis.py"),
        (("--recommend_frac", 1), "--recommend_frac"),
    ],
)
def test_wrong_usage_is_one_line(shapes, tmp_path, more, why):
    scales = (
        ()
        if "--scales" in more or "--merge" in more or "--recommend_layer" in more
        else ("--scales", f"full={TINY}")
    )
    done = swap(*flags(shapes, tmp_path, *scales, *more))
    assert done.returncode == 2 and why in done.stderr and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize("model", ["qwen", "molmo", "nvila"])
def test_the_scripts_of_published_models_go_through_their_scales_and_merge(tmp_path, model):

    def commands(**settings):
        script = ROOT / "swap_analysis" / f"run_{model}.sh"
        done = subprocess.run(
            ["bash", script],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=os.environ | {"PYTHON": "echo"} | settings,
        )
        assert done.returncode == 0, done.stderr
        lines = [line.split() for line in done.stdout.splitlines()]
        assert all(line[0] == "swap_analysis/swap_analysis.py" for line in lines)
        return [swap.module.parse_args(line[1:]) for line in lines]

    *scales, merge = commands()
    known = swap.module.CHECKPOINTS[model]
    assert [args.scales[0] for args in scales] == [
        name for name in known if name != "roborefer"
    ] and merge.merge
    assert all(
        args.model_type == model
        and args.data_path == "data/EmbSpatial-Bench.tsv"
        and args.bbox_file is None
        for args in scales
    )
    one, _ = commands(SCALES="mine=folder", BOXES="boxes.json", OUT="other")
    assert (
        one.scales == ["mine=folder"] and one.bbox_file == "boxes.json" and one.out_dir == "other"
    )


def test_a_known_answer_is_found(tmp_path):
    """Trained on scenes whose height and depth go together, a model's distance axis is its vertical
    one and counter pairs are wrong more often; trained on scenes where the two are free, it is
    not."""
    scenes = [
        "--num_images",
        "60",
        "--num_train",
        "1",
        "--seed",
        "6",
        "--height_depth_correlation",
        "0.5",
        "--num_workers",
        "1",
    ]
    assert make_shapes.main(["--out_dir", str(tmp_path / "set"), *scenes]) == 0
    table = (
        "--data_path",
        tmp_path / "set" / "swap_pairs_ready.tsv",
        "--bbox_file",
        tmp_path / "set" / "bboxes.json",
        "--max_samples_per_category",
        30,
    )
    paths = [f"{name}={ROOT / path}" for name, path in swap.module.CHECKPOINTS["known"].items()]
    where = ("--out_root", tmp_path / "runs", "--output_dir", tmp_path / "results")
    stages = (
        "--layers",
        5,
        "--rep_layers",
        5,
        "--stage",
        "pairs",
        "states",
        "metrics",
        "--no_self_check",
    )
    done = swap("--model_type", "known", *table, "--scales", *paths, *where, *stages)
    assert done.returncode == 0, done.stderr

    def read(kind, name):
        return json.loads((tmp_path / f"results/known/json/{kind}_{name}.json").read_text())

    index = {name: read("vd_ei", name)["L5"]["eq3_raw"] for name in ("correlated", "independent")}
    gap = {name: read("pred_stats", name)["gap_both"] for name in index}
    assert index["correlated"]["high"] < -0.5 < 0 < index["independent"]["low"]
    assert gap["correlated"]["value"] > 0.1 > gap["independent"]["value"]
    for name in index:  # both know the relations they are asked
        assert all(
            read("pred_stats", name)[f"{group}_acc_both"] > 0.6
            for group in ("horizontal", "vertical", "distance")
        )

"""spatial_tunnel.py and its plot by their command lines on a tiny model; p against whole prompts
through the plain model; the summary of planted records."""

import copy
import json
import os
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import common
from data import make_shapes
from swap_analysis import spatial_tunnel
from tests.conftest import ROOT, in_process
from vlmdiag.cli import UsageError
from vlmdiag.figures import stats
from vlmdiag.model import prompts
from vlmdiag.pictures.samples import load_image
from vlmdiag.runs import rundirs
from vlmdiag.scenes import tunnel
from vlmdiag.swap import tunnel_scores

score = in_process(ROOT / "swap_analysis" / "spatial_tunnel.py")
plot = in_process(ROOT / "swap_analysis" / "spatial_tunnel_plot.py")
TINY = ROOT / "checkpoints" / "tiny-llava"


@pytest.fixture(scope="module")
def tunnels(tmp_path_factory):
    """A set cut down to 20 pictures of the grid and one scene of the sweep."""
    folder = tmp_path_factory.mktemp("tunnels") / "set"
    assert (
        make_shapes.main(
            [
                "--out_dir",
                str(folder),
                "--scene",
                "tunnel",
                "--instances",
                "1",
                "--sweep_scenes",
                "1",
                "--num_workers",
                "1",
            ]
        )
        == 0
    )
    rows = json.loads((folder / "tunnel.json").read_text())
    (folder / "tunnel.json").write_text(json.dumps(rows[:256:13] + rows[256:]))
    return folder


def flags(tunnels, folder, *more):
    return (
        "--model_path",
        TINY,
        "--data_dir",
        tunnels,
        "--out_root",
        folder / "runs",
        "--no_self_check",
        "--num_workers",
        1,
        *more,
    )


@pytest.fixture(scope="module")
def measured(tunnels, tmp_path_factory):
    """The finished run of the tiny model."""
    folder = tmp_path_factory.mktemp("measured")
    done = score(*flags(tunnels, folder))
    assert done.returncode == 0, done.stderr
    return rundirs.read_run(folder / "runs/spatial_tunnel/tiny-llava", "spatial_tunnel")


def contents(run):
    files = [*(run.path / "per_image").iterdir(), *(run.path / "analysis").glob("*.json")]
    return {path.name: path.read_bytes() for path in files}


def summary_of(run):
    return json.loads((run.path / "analysis/summary.json").read_text())


# ---- p ----


def spelled(vlm, word):
    """Ids of all tokens of the vocabulary that say a word, with or without a space before it."""
    return [
        i
        for i in range(len(vlm.tokenizer))
        if vlm.tokenizer.convert_ids_to_tokens(i).replace("\u2581", "").replace("\u0120", "")
        == word
    ]


@pytest.mark.parametrize("name", ["tiny-llava", "llava-gqa", "qwen"])
def test_p_is_that_of_the_whole_prompt_through_the_plain_model(tunnels, load, name):
    vlm = common.load_model(TINY, self_check=False) if name == "tiny-llava" else load(name)
    items, _ = spatial_tunnel.read_set(tunnels, 3)
    words = tunnel_scores.yes_no_ids(vlm, prompts.prompt_for(vlm, "QUESTION")[0])
    found = tunnel_scores.make_process(vlm, words)(
        [(item, load_image(item.image)) for item in items]
    )
    yes, no = spelled(vlm, "Yes"), spelled(vlm, "No")
    assert words == {"Yes": yes, "No": no}
    every = []
    for item, (record, arrays) in zip(items, found, strict=True):
        assert not arrays and record["questions"] == [
            asked["question"] for asked in item.entry["questions"]
        ]
        for k, question in enumerate(record["questions"]):
            text, bos = prompts.prompt_for(vlm, question)[0], vlm.tokenizer.bos_token
            inputs = vlm.processor(
                images=load_image(item.image),
                text=text,
                return_tensors="pt",
                add_special_tokens=not (bos and text.startswith(bos)),
            )
            with torch.no_grad():
                shares = vlm.model(**inputs).logits[0, -1].double().softmax(-1)
            p = (shares[yes].sum() / (shares[yes].sum() + shares[no].sum())).item()
            assert record["p"][k] == pytest.approx(p, abs=1e-5)
            right = p if record["answers"][k] == "Yes" else 1 - p
            assert record["v_each"][k] == pytest.approx(right, abs=1e-5)
            top = int(shares.argmax())
            words = dict.fromkeys(yes, "Yes") | dict.fromkeys(no, "No")
            assert record["said"][k] == words.get(top, vlm.tokenizer.decode([top]))
            every.append(p)
        assert record["v"] == pytest.approx(np.mean(record["v_each"]))
    assert np.std(every) > 1e-4  # questions and pictures matter, so an order mixed up would be seen


def test_the_tower_runs_once_a_picture_and_the_beginning_once(tunnels, load, monkeypatch):
    vlm = load("llava")
    items, _ = spatial_tunnel.read_set(tunnels, 2)
    passes, towers, vision = [], [], vlm.vision
    monkeypatch.setattr(
        type(vlm),
        "vision",
        lambda self, batch: towers.append(len(set(batch.pictures))) or vision(batch),
    )
    hook = vlm.parts.layers[0].register_forward_pre_hook(
        lambda module, args: passes.append(tuple(args[0].shape[:2]))
    )
    try:
        tunnel_scores.first_logits(
            vlm,
            [load_image(item.image) for item in items],
            [[asked["question"] for asked in item.entry["questions"]] for item in items],
        )
    finally:
        hook.remove()
    (first, whole), (others, rest) = passes
    assert towers == [2] and (first, others) == (2, 6) and rest < whole - 100


@pytest.mark.parametrize("change", ["not known to be causal", "question before the picture"])
def test_prompts_that_share_no_beginning_are_passed_whole(tunnels, load, monkeypatch, change):
    vlm = load("llava")
    items, _ = spatial_tunnel.read_set(tunnels, 2)
    asked = (
        [load_image(item.image) for item in items],
        [[asked["question"] for asked in item.entry["questions"]] for item in items],
    )
    if change == "question before the picture":
        monkeypatch.setitem(vlm.options, "prompt_template", "USER: {question} {image} ASSISTANT:")
    whole = [
        tunnel_scores.first_logits(vlm, asked[0], [[texts[k], texts[k]] for texts in asked[1]])[
            :, 0
        ]
        for k in range(4)
    ]
    if change == "not known to be causal":
        monkeypatch.setattr(vlm, "family", replace(vlm.family, has=vlm.family.has - {"causal"}))
    towers, vision = [], vlm.vision
    monkeypatch.setattr(
        type(vlm), "vision", lambda self, batch: towers.append(len(batch.pictures)) or vision(batch)
    )
    found = tunnel_scores.first_logits(vlm, *asked)
    assert torch.stack(whole, 1).allclose(found, atol=1e-4, rtol=0) and towers == [2]


def test_words_that_begin_alike_are_refused(load):
    class Bare:
        """A tokenizer that begins every word with the same token."""

        all_special_tokens, added_tokens_decoder = (), {}

        def convert_ids_to_tokens(self, id):
            return "</s>"

        def __call__(self, text, **options):
            return {"input_ids": [1] * (len(text) + 1)}

    class Model:
        path, tokenizer, end_id = "bare", Bare(), 2
        family, processor = SimpleNamespace(markup=()), None

    with pytest.raises(UsageError, match="Yes and No begin with the same token"):
        tunnel_scores.yes_no_ids(Model(), "ASSISTANT:")


# ---- the command ----


def test_the_trained_model_knows_depth_from_height(measured):
    records, summary = measured.records(), summary_of(measured)
    assert len(records) == 31 and {record["part"] for record in records} == {"angles", "sizes"}
    assert (
        summary["v"]["n"] == 20
        and summary["v_consistent"]["mean"] > 0.85
        and summary["v_counter"]["mean"] > 0.85
    )
    assert summary["said_yes_or_no"]["mean"] == 1 and summary["sizes"]["v_by_s1"]["n"] == [1] * 11
    assert (
        np.isfinite(summary["gap"]["low"])
        and summary["gap"]["n"][0] + summary["gap"]["n"][1] + summary["v_ambiguous"]["n"] == 20
    )
    cells = np.array(summary["cells"]["n"])
    assert cells.shape == (16, 16) and cells.sum() == cells.ravel()[::13].sum() == 20
    assert all(
        record["s1"] + record["s2"] == pytest.approx(0.4)
        for record in records
        if record["part"] == "sizes"
    )


def test_an_interrupted_and_a_sharded_run_have_the_same_bytes(tunnels, measured, tmp_path):
    shutil.copytree(measured.path, tmp_path / "runs/spatial_tunnel/tiny-llava")
    run = rundirs.read_run(tmp_path / "runs/spatial_tunnel/tiny-llava", "spatial_tunnel")
    before = contents(measured)
    for id in run.ids()[::3]:
        (run.path / "per_image" / f"{id}.json").unlink()
    (run.path / "analysis/summary.json").unlink()
    assert score(*flags(tunnels, tmp_path)).returncode == 0 and contents(run) == before
    for part in ("1/2", "0/2"):
        done = score(*flags(tunnels, tmp_path / "shards", "--shard", part))
        assert done.returncode == 0, done.stderr
    assert (
        contents(
            rundirs.read_run(tmp_path / "shards/runs/spatial_tunnel/tiny-llava", "spatial_tunnel")
        )
        == before
    )


def test_another_batch_size_gives_the_same_numbers(tunnels, measured, tmp_path):
    assert (
        score(
            *flags(tunnels, tmp_path, "--batch_size", 3, "--max_images", 7, "--run_name", "few")
        ).returncode
        == 0
    )
    for record in rundirs.read_run(
        tmp_path / "runs/spatial_tunnel/tiny-llava__few", "spatial_tunnel"
    ).records():
        assert measured.record(f"{record['image_id']:012d}")["p"] == pytest.approx(
            record["p"], abs=1e-5
        )


def test_a_set_of_another_seed_is_refused(tunnels, measured, tmp_path):
    shutil.copytree(measured.path, tmp_path / "runs/spatial_tunnel/tiny-llava")
    (tmp_path / "other").mkdir()
    for name in ("manifest.json", "tunnel.json", "val2017"):
        os.symlink(tunnels / name, tmp_path / "other" / name)
    (tmp_path / "other/manifest.json").unlink()
    manifest = json.loads((tunnels / "manifest.json").read_text())
    (tmp_path / "other/manifest.json").write_text(
        json.dumps(manifest | {"settings": manifest["settings"] | {"seed": 5}})
    )
    done = score(*flags(tmp_path / "other", tmp_path))
    assert done.returncode == 2 and "data.seed: now 5, there 0" in done.stderr
    manifest["settings"]["instances"] = 9  # more pictures of the same: the run grows
    (tmp_path / "other/manifest.json").write_text(json.dumps(manifest))
    assert score(*flags(tmp_path / "other", tmp_path)).returncode == 0


def spoil(folder, **files):
    folder.mkdir()
    for name, text in files.items():
        (folder / f"{name}.json").write_text(text)
    return folder


@pytest.mark.parametrize(
    ("files", "why"),
    [
        ({}, "it has no manifest.json; make it with data/make_shapes.py --scene tunnel"),
        (
            {
                "manifest": (
                    '{"settings": {"schema": 1, "scene": "floor", "seed": 0}, "complete": true}'
                )
            },
            "it has no tunnel.json",
        ),
        ({"manifest": "[]", "tunnel": "[]"}, "cannot be read"),
        ({"manifest": "{", "tunnel": "[]"}, "cannot be read"),
        (
            {
                "manifest": (
                    '{"settings": {"schema": 1, "scene": "tunnel", "seed": 0}, "complete": false}'
                ),
                "tunnel": "[]",
            },
            "not complete",
        ),
        (
            {
                "manifest": (
                    '{"settings": {"schema": 1, "scene": "tunnel", "seed": 0}, "complete": true}'
                ),
                "tunnel": '[{"image_id": 1}]',
            },
            "lacks image",
        ),
    ],
)
def test_what_is_no_set_is_one_line(tmp_path, files, why):
    done = score(*flags(spoil(tmp_path / "set", **files), tmp_path))
    assert done.returncode == 2 and why in done.stderr and done.stderr.count("\n") == 1, done.stderr


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (("--batch_size", 0), "--batch_size"),
        (("--max_images", 0), "--max_images"),
        (("--model_path", "/no/such"), "no such folder"),
    ],
)
def test_wrong_usage_is_one_line(tunnels, tmp_path, more, why):
    done = score(*flags(tunnels, tmp_path, *more))
    assert done.returncode == 2 and why in done.stderr and done.stderr.count("\n") == 1, done.stderr


# ---- the summary ----


def planted(part="angles", instances=2):
    """Records of a model that reads height off the picture: right by 0.9 where the far object is
    higher, by 0.2 where it is lower, by 0.5 else."""
    grid, values = tunnel.split_grid(), {"consistent": 0.9, "counter": 0.2, "ambiguous": 0.5}
    records = []
    for instance in range(instances):
        for far in range(16):
            for near in range(16):
                split = grid[far, near]
                said = {
                    "consistent": ["No", "Yes", "No", "Yes"],
                    "counter": ["Yes", "No", "Yes", "Yes"],
                    "ambiguous": ["No", "maybe", "No", "No"],
                }[split]
                row = {
                    "part": part,
                    "instance": instance,
                    "cell": [far, near],
                    "split": split,
                    "s1": 0.25,
                    "said": said,
                    "answers": ["No", "Yes", "No", "Yes"],
                }
                records.append(row | {"v_each": [values[split]] * 4})
    return records


def test_planted_records_give_the_planted_summary():
    summary = tunnel_scores.summarize(planted())
    means = {
        name: cell["mean"] for name, cell in summary.items() if isinstance(cell.get("mean"), float)
    }
    assert means["v"] == pytest.approx((116 * 0.9 + 116 * 0.2 + 24 * 0.5) / 256)
    assert (
        means["v_consistent"],
        means["v_counter"],
        means["v_ambiguous"],
        means["gap"],
    ) == pytest.approx((0.9, 0.2, 0.5, 0.7))
    assert (
        means["accuracy_consistent"],
        means["accuracy_counter"],
        means["accuracy_ambiguous"],
    ) == (1, 0, 0)
    assert (
        means["exact_match_consistent"],
        means["exact_match_counter"],
        means["exact_match_ambiguous"],
    ) == (1, 0.25, 0.5)
    assert (means["all_four_right_consistent"], means["all_four_right_counter"]) == (
        1,
        0,
    ) and means["all_four_right"] == pytest.approx(116 / 256)
    assert means["said_yes_or_no_counter"] == 1 and means["said_yes_or_no_ambiguous"] == 0.75
    assert [
        summary[name]["n"] for name in ("v", "v_consistent", "v_counter", "v_ambiguous", "gap")
    ] == [512, 232, 232, 48, [232, 232]]
    # 232 pictures that are all alike are no proof that others are
    assert 0.67 < summary["gap"]["low"] < 0.7 < summary["gap"]["high"] < 0.72
    cells = np.array(summary["cells"]["mean"])
    assert (cells[tunnel.split_grid() == "counter"] == pytest.approx(0.2)) and summary["cells"][
        "n"
    ] == [[2] * 16] * 16
    assert summary["questions"]["exact_match"]["mean"] == pytest.approx(
        [140 / 256, 116 / 256, 140 / 256, 232 / 256]
    )
    assert summary["questions"]["v"]["wording"] == [
        "far closer",
        "near closer",
        "near farther",
        "far farther",
    ]
    assert summary["sizes"]["v_by_s1"]["n"] == [0] * 11


def test_rows_of_the_cells_are_the_far_object():
    records = planted(instances=1)
    for record in records:
        record["v_each"] = [record["cell"][0] / 16 + record["cell"][1] / 1000] * 4
    cells = np.array(tunnel_scores.summarize(records)["cells"]["mean"])
    assert cells[3, 5] == pytest.approx(3 / 16 + 0.005) and cells[15, 0] == pytest.approx(15 / 16)


def test_the_sweep_is_averaged_by_size_over_scenes():
    rng, rows = np.random.default_rng(0), []
    values = rng.random((7, 11))
    for instance in range(7):
        for column, (s1, s2) in enumerate(tunnel.SIZES):
            row = {
                "part": "sizes",
                "instance": instance,
                "cell": [4, 9],
                "split": "consistent",
                "s1": s1,
                "s2": s2,
                "said": ["No"] * 4,
                "answers": ["No", "Yes"] * 2,
            }
            rows.append(row | {"v_each": [values[instance, column]] * 4})
    found = tunnel_scores.summarize(rows)["sizes"]
    wanted = stats.mean_interval(values)
    assert found["s1"][0] == 0.1 and found["s1"][-1] == 0.3 and len(found["s1"]) == 11
    assert (
        found["v_by_s1"]["mean"] == pytest.approx(wanted.mean)
        and found["v_by_s1"]["low"] == pytest.approx(wanted.low)
        and found["v_by_s1"]["n"] == [7] * 11
    )
    assert found["v"]["mean"] == pytest.approx(values.mean()) and found["v"]["n"] == 7


def test_the_gap_has_the_interval_of_two_independent_groups():
    rng = np.random.default_rng(1)
    high, low = rng.normal(0.8, 0.1, 300), rng.normal(0.5, 0.2, 200)
    found = tunnel_scores.gap_of(high, low)
    error = np.sqrt(high.var() / 300 + low.var() / 200)
    assert found["mean"] == pytest.approx(high.mean() - low.mean()) and found["n"] == [300, 200]
    assert (found["high"] - found["low"]) / 2 == pytest.approx(1.96 * error, rel=0.08)


def test_pictures_without_a_number_are_left_out_and_counted():
    records = copy.deepcopy(planted(instances=1))
    for record in records[:10]:
        record["v_each"] = [None] * 4
    records[20]["v_each"][0] = None  # one question of four
    summary = tunnel_scores.summarize(records)
    assert summary["v"]["n"] == 246 and np.array(summary["cells"]["n"]).sum() == 246
    assert tunnel_scores.summarize([])["v"]["n"] == 0


# ---- figures ----


def test_one_run_is_drawn_into_its_analysis_folder(measured, tmp_path):
    shutil.copytree(measured.path, tmp_path / "tiny-llava")
    done = plot("--run_dir", tmp_path / "tiny-llava", "--save_csv")
    assert done.returncode == 0, done.stderr
    made = {path.name for path in (tmp_path / "tiny-llava/analysis").iterdir()} - {"summary.json"}
    names = ("spatial_tunnel_cells", "spatial_tunnel_v", "spatial_tunnel_sizes")
    assert made == {f"{name}.{ending}" for name in names for ending in ("png", "pdf")} | {
        "spatial_tunnel_v.csv"
    }
    rows = (tmp_path / "tiny-llava/analysis/spatial_tunnel_v.csv").read_text().splitlines()
    assert (
        rows[0] == "run,measure,mean,low,high"
        and rows[1].startswith(f"tiny-llava,v,{summary_of(measured)['v']['mean']},")
        and len(rows) == 6
    )


def test_several_runs_are_drawn_together_also_where_two_pictures_were_measured(
    tunnels, measured, tmp_path
):
    assert score(*flags(tunnels, tmp_path, "--max_images", 2)).returncode == 0
    shutil.copytree(measured.path, tmp_path / "runs/spatial_tunnel/whole")
    runs = [tmp_path / "runs/spatial_tunnel" / name for name in ("whole", "tiny-llava")]
    done = plot("--run_dir", *runs)
    assert done.returncode == 0, done.stderr
    assert all(
        (tmp_path / "runs/spatial_tunnel" / f"spatial_tunnel_{name}.png").exists()
        for name in ("cells", "v", "sizes")
    )
    done = plot("--run_dir", runs[1], "--out_dir", tmp_path / "figures")
    assert done.returncode == 0 and {path.stem for path in (tmp_path / "figures").iterdir()} == {
        "spatial_tunnel_cells",
        "spatial_tunnel_v",
    }


def test_a_run_without_a_summary_is_refused(measured, tmp_path):
    shutil.copytree(measured.path, tmp_path / "run")
    for spoiled in (None, "{}", "[]", '{"v": 1}'):
        (tmp_path / "run/analysis/summary.json").unlink(missing_ok=True)
        if spoiled:
            (tmp_path / "run/analysis/summary.json").write_text(spoiled)
        done = plot("--run_dir", tmp_path / "run")
        assert (
            done.returncode == 2
            and "run spatial_tunnel.py again" in done.stderr
            and done.stderr.count("\n") == 1
        ), done.stderr
    done = plot("--run_dir", tmp_path / "none")
    assert done.returncode == 2 and "is not a run directory" in done.stderr

"""The scripts that read runs of run_coco_diagnostics.py, on made-up runs whose numbers are
planted."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import command_module
from vlmdiag.cli import UsageError
from vlmdiag.figures import plots, stats
from vlmdiag.runs import rundirs

TOOLS = Path(__file__).resolve().parents[1] / "diagnostic_tools"
IDS = [f"{number:012d}" for number in (139, 285, 632, 724, 1296, 6818, 16818, 17627)]
DELTAS = [1.0, 0.25]


def script(name):
    return command_module(TOOLS / f"{name}.py")


def make_run(
    root,
    model,
    sp=0,
    layers=6,
    heads=4,
    ids=IDS,
    seed=0,
    norms=True,
    pos_only=False,
    kind="l2",
    deltas=DELTAS,
    image_dir="nowhere",
):
    """A run with numbers drawn from seed, of the shapes and ranges that run_coco_diagnostics.py
    writes. Head (1, 2) sees neither image nor question."""
    rng = np.random.default_rng(seed)
    identity = {
        "model_name": model,
        "delta_steps": deltas,
        "strip_system_prompt": bool(sp),
        "image_dir": Path(image_dir).name,
        "ann_file": "captions.json",
        "hidden_norm_kind": kind,
        "restrict_to_past": True,
        "max_new_tokens": 32,
    }
    run = rundirs.open_run(
        rundirs.run_path(root, model, sp=sp),
        "coco_diagnostics",
        identity,
        {"image_dir": str(image_dir)},
    )
    profile = 0.5 + 0.3 * np.sin(np.linspace(0, 5, layers) + seed)[:, None]
    for id in ids:
        record = {"image_id": int(id), "file_name": f"{id}.jpg", "caption": "a cup"}
        grown = (
            rng.normal(0.004, 0.01, (len(deltas), layers, heads))
            * np.linspace(2, 0.5, layers)[:, None]
        )
        arrays = {
            "alphaV": rng.uniform(0.1, 0.6, (layers, heads)),
            "delta_gv_all": grown,
            "delta_alphaV_all": grown * 0.1,
            "delta_gv_derivative": grown[0] * 1.1,
            "delta_gv": grown[0],
            "delta_alphaV": grown[0] * 0.1,
        }
        if pos_only:
            record |= {"caption": "", "pos_only": True}
        else:
            system, vision, user = np.array([0.0 if sp else 0.7, 0.22, 0.08]) * rng.uniform(
                0.8, 1.2, 3
            )
            three = system + vision + user
            record |= {
                "chance_vision_share": 0.97,
                "mean_sys_share": system / three,
                "mean_vision_withsys_share": vision / three,
                "mean_text_withsys_share": user / three,
                "mean_vision_share": vision / (vision + user),
                "mean_text_share": user / (vision + user),
            }
            by_layer = np.array(
                [
                    np.linspace(0.0, 0.0 if sp else 0.8, layers),
                    np.linspace(0.8, 0.2, layers),
                    np.linspace(0.2, 0.3, layers),
                ]
            )
            by_layer = by_layer * rng.uniform(0.8, 1.2, by_layer.shape)
            arrays["layer_shares"] = by_layer / by_layer.sum(axis=0)
            arrays["head_vision_share"] = np.clip(
                profile + rng.normal(0, 0.15, (layers, heads)), 0, 1
            )
            arrays["head_vision_share"][1, 2] = np.nan
        if norms and not pos_only:
            record["hidden_norms"] = {"kind": kind}
            arrays["hidden_norms_user_text"] = np.geomspace(0.7, 100, layers + 1) * rng.uniform(
                0.9, 1.1, layers + 1
            )
            arrays["hidden_norms_vision"] = np.geomspace(
                36 if seed == 0 else 1, 110, layers + 1
            ) * rng.uniform(0.9, 1.1, layers + 1)
        run.write(
            id, record, {key: np.asarray(value, dtype=np.float32) for key, value in arrays.items()}
        )
    return run


def cli_run(name, *arguments, cwd, code=0):
    """Run a script as a user without a screen does, warnings as errors. On failure: one line on
    stderr, no traceback."""
    command = [sys.executable, "-W", "error", TOOLS / f"{name}.py", *arguments]
    search = os.pathsep.join(filter(None, [str(TOOLS.parent), os.environ.get("PYTHONPATH")]))
    environment = {
        key: value
        for key, value in os.environ.items()
        if key not in ("DISPLAY", "WAYLAND_DISPLAY", "MPLBACKEND")
    } | {"PYTHONPATH": search}
    done = subprocess.run(
        [str(part) for part in command],
        check=False,
        cwd=cwd,
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == code, done.stderr
    assert (
        done.stderr == ""
        if code == 0
        else len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: ")
    )
    return done.stdout if code == 0 else done.stderr


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def number(text):
    return float(text) if text else np.nan


def planted(run, key):
    """One array of every image, read file by file."""
    return np.array(
        [np.load(run.path / "per_image" / f"{id}.npz")[key] for id in run.ids()], dtype=np.float64
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three runs with and one without the system prompt; the second has one image fewer, the third
    more layers and heads. And the pictures."""
    root = tmp_path_factory.mktemp("runs")
    (root / "coco" / "val2017").mkdir(parents=True)
    for id in IDS:
        Image.new("RGB", (32, 24), (200, 30, 30)).save(root / "coco" / "val2017" / f"{id}.jpg")
    make_run(root / "runs", "tiny-llava", seed=0)
    make_run(root / "runs", "tiny-llava-normWmean", seed=1, ids=IDS[1:])
    make_run(root / "runs", "tiny-llava-multilayerNorm", seed=2, layers=9, heads=2 + 1)
    make_run(root / "runs", "tiny-llava", sp=1, seed=3, image_dir=root / "coco" / "val2017")
    return root


@pytest.fixture
def runs(folder, monkeypatch):
    """{name: Run}, with the folder as working directory."""
    monkeypatch.chdir(folder)
    return {
        path.name: rundirs.read_run(path, rundirs.COCO)
        for path in Path("runs").iterdir()
        if path.is_dir()
    }


def test_analyze_writes_the_averages_of_the_chosen_shift(runs, folder, capsys):
    names = ["tiny-llava__sp-0", "tiny-llava-multilayerNorm__sp-0", "tiny-llava-normWmean__sp-0"]
    module = script("analyze_coco_diagnostics")
    for index, extra in enumerate(([], ["--delta-steps", "0.25"])):
        if index:
            assert (
                module.main(
                    ["--run_dir", *(f"runs/{name}" for name in names), "--save_csv", *extra]
                )
                == 0
            )
        else:
            cli_run(
                "analyze_coco_diagnostics",
                "--run_dir",
                *(f"runs/{name}" for name in names),
                "--save_csv",
                cwd=folder,
            )
        rows = table("runs/compare_delta_alphaV_and_abs_delta_gv_layerwise_mean.csv")
        assert (
            len(rows) == 9 and rows[8]["tiny-llava_abs_delta_gv"] == ""
        )  # the longer model sets the rows
        for name in names:
            run = runs[name]
            gv, alpha = (
                planted(run, "delta_gv_all")[:, index],
                planted(run, "delta_alphaV_all")[:, index],
            )
            expected = {
                "alphaV": planted(run, "alphaV"),
                "delta_gv": gv,
                "abs_delta_gv": np.abs(gv),
                "delta_alphaV": alpha,
                "delta_gv_derivative": planted(run, "delta_gv_derivative"),
            }
            for key, values in expected.items():
                average = np.load(run.path / "analysis" / f"avg_{key}.npy")
                assert average.dtype == np.float64
                np.testing.assert_allclose(average, values.mean(axis=0), rtol=1e-12)
            summary = json.loads((run.path / "analysis" / "summary.json").read_text())
            assert (
                summary["images_used"] == len(gv)
                and (summary["L"], summary["H"]) == gv.shape[1:]
                and summary["delta_steps"] == DELTAS[index]
            )
            assert (
                summary["model_name"] == name[:-6]
                and summary["run_dir"] == f"runs/{name}"
                and summary["strip_system_prompt"] is False
            )
            for key, values in (("abs_delta_gv", np.abs(gv)), ("delta_alphaV", alpha)):
                np.testing.assert_allclose(summary[f"mean_avg_{key}"], values.mean(), rtol=1e-12)
                assert (
                    summary[f"mean_avg_{key}_low"]
                    < summary[f"mean_avg_{key}"]
                    < summary[f"mean_avg_{key}_high"]
                )
                column = [number(row[f"{run.label}_{key}"]) for row in rows][: values.shape[1]]
                np.testing.assert_allclose(column, values.mean(axis=(0, 2)), rtol=1e-12)
    for stem in (
        "compare_abs_delta_gv_layerwise_mean",
        "compare_delta_alphaV_and_abs_delta_gv_layerwise_mean",
    ):
        assert all(Path("runs", stem + ending).stat().st_size > 5000 for ending in (".png", ".pdf"))


def test_an_analysis_that_reads_parts_gives_the_bytes_of_whole_arrays(runs, monkeypatch):
    run = runs["tiny-llava__sp-0"]
    both = {}
    for part in (1000, 2):
        monkeypatch.setattr(rundirs, "PART", part)
        script("analyze_coco_diagnostics").main(["--run_dir", str(run.path), "--save_csv"])
        files = [*(run.path / "analysis").glob("avg_*.npy"), run.path / "analysis/summary.json"]
        files += sorted(Path("runs").glob("compare_*.csv"))
        both[part] = {file.name: file.read_bytes() for file in files}
    assert len(both[2]) == 7 and both[2] == both[1000]
    summary = json.loads(both[2]["summary.json"])
    rows = table("runs/compare_delta_alphaV_and_abs_delta_gv_layerwise_mean.csv")
    drawn = {
        "abs_delta_gv": np.abs(planted(run, "delta_gv_all")[:, 0]),
        "delta_alphaV": planted(run, "delta_alphaV_all")[:, 0],
    }
    for name, values in drawn.items():
        whole = stats.mean_interval(stats.measured_mean(values, axis=(1, 2)))
        found = [summary[f"mean_avg_{name}{ending}"] for ending in ("", "_low", "_high")]
        assert found == [float(value) for value in whole[:3]]
        by_layer = stats.mean_interval(stats.measured_mean(values, axis=2))
        for ending, wanted in zip(("", "_low", "_high"), by_layer):
            column = [number(row[f"{run.label}_{name}{ending}"]) for row in rows]
            np.testing.assert_allclose(column, wanted, rtol=1e-12)


def test_curves_carry_their_own_run_whatever_the_order_of_the_arguments(runs, monkeypatch):
    drawn = []

    def keep(fig, path, settings, show=False):
        lines = [line for ax in fig.axes for line in ax.lines if "(n = " in line.get_label()]
        drawn.append(
            {
                (line.get_label(), line.get_color(), *np.round(line.get_ydata(), 12))
                for line in lines
            }
        )
        plots.plt.close(fig)
        return [Path(f"{path}.png")]

    monkeypatch.setattr(plots, "save", keep)
    folders = [f"runs/{name}" for name in runs]
    for name in ("analyze_coco_diagnostics", "system_prompt_plot"):
        module = script(name)
        module.main(["--run_dir", *folders])
        forward, drawn[:] = {frozenset(each) for each in drawn}, []
        module.main(["--run_dir", *folders[::-1]])
        assert {frozenset(each) for each in drawn} == forward
        drawn.clear()
    module = script("viz_cmb_panel")
    for models in (["tiny-llava", "tiny-llava-normWmean"], ["tiny-llava-normWmean", "tiny-llava"]):
        module.main(["--runs_dir", "runs", "--sp", "0", "--models", *models])
    assert drawn[0] == drawn[1] and len(drawn[0]) == 2
    assert {label for label, *_ in drawn[0]} == {
        "tiny-llava (n = 7)",
        "tiny-llava-normWmean (n = 7)",
    }  # the images that both have


def test_analyze_leaves_unmeasured_cells_out(tmp_path):
    run = make_run(tmp_path, "one", ids=IDS[:3])
    for id in IDS[:2]:
        arrays = run.arrays(id)
        arrays["delta_gv_all"][0, 2, 1] = arrays["delta_gv_all"][0, 3, 0] = np.nan
        run.write(id, run.record(id), arrays, keep=False)
    script("analyze_coco_diagnostics").main(["--run_dir", str(run.path)])
    values = planted(run, "delta_gv_all")[:, 0]
    average = np.load(run.path / "analysis" / "avg_delta_gv.npy")
    np.testing.assert_allclose(average[2, 1], values[2, 2, 1])
    np.testing.assert_allclose(
        np.load(run.path / "analysis" / "avg_abs_delta_gv.npy"), np.nanmean(np.abs(values), axis=0)
    )


def test_pies_and_layer_curves_show_the_exact_shares(runs, folder):
    names = ["tiny-llava__sp-1", "tiny-llava__sp-0"]
    cli_run(
        "system_prompt_plot",
        "--run_dir",
        *(f"runs/{name}" for name in names),
        "--save_csv",
        cwd=folder,
    )
    script("system_prompt_plot").main(["--run_dir", "runs/tiny-llava__sp-0", "--side_by_side"])
    fields = {
        "system": "mean_sys_share",
        "vision": "mean_vision_withsys_share",
        "user": "mean_text_withsys_share",
    }
    for name in names:
        run, analysis = runs[name], runs[name].path / "analysis"
        rows = {(row["pie"], row["group"]): row for row in table(analysis / "dataset_pies.csv")}
        for group, field in fields.items():
            row = rows["with_system", group]
            np.testing.assert_allclose(
                float(row["mean"]), np.mean([run.record(id)[field] for id in run.ids()]), rtol=1e-12
            )
            assert float(row["low"]) <= float(row["mean"]) <= float(row["high"]) and row[
                "n"
            ] == str(len(IDS))
        np.testing.assert_allclose(
            sum(float(rows["with_system", group]["mean"]) for group in fields), 1
        )
        np.testing.assert_allclose(
            float(rows["vision_vs_user_masked", "user"]["mean"]),
            np.mean([run.record(id)["mean_text_share"] for id in run.ids()]),
        )
        shares, rows = (
            planted(run, "layer_shares").mean(axis=0),
            table(analysis / "system_vision_user_shares_by_layer.csv"),
        )
        for index, group in enumerate(("system", "vision", "user")):
            np.testing.assert_allclose([float(row[group]) for row in rows], shares[index])
        for stem in ("dataset_pie_vision_vs_user_masked", "system_vision_user_shares_by_layer"):
            assert (analysis / f"{stem}.png").exists() and (analysis / f"{stem}.pdf").exists()
        # nothing is drawn of a system prompt that was not there
        with_system = name.endswith("sp-0")
        assert (analysis / "dataset_pie_with_system.png").exists() == with_system
    assert (
        not Path("runs/compare_system_share_by_layer.png").exists()
        and Path("runs/tiny-llava__sp-0/analysis/dataset_pies_side_by_side.pdf").exists()
    )
    assert not Path("runs/tiny-llava__sp-1/analysis/dataset_pies_side_by_side.pdf").exists()


def test_every_share_is_a_bar_with_its_interval_written_beside_it(runs, monkeypatch):
    drawn = {}

    def keep(fig, path, settings, show=False):
        drawn[Path(path).name] = fig
        plots.plt.close(fig)

    monkeypatch.setattr(plots, "save", keep)
    script("system_prompt_plot").main(
        ["--run_dir", "runs/tiny-llava__sp-0", "runs/tiny-llava-normWmean__sp-0"]
    )
    axis = drawn["dataset_pie_with_system"].axes[0]
    records = runs["tiny-llava-normWmean__sp-0"].records()  # drawn last
    fields = ("mean_sys_share", "mean_vision_withsys_share", "mean_text_withsys_share")
    shares = [np.mean([record[field] for record in records]) for field in fields]
    np.testing.assert_allclose([bar.get_width() for bar in axis.patches], shares)
    for share, text in zip(shares, axis.texts, strict=True):
        assert text.get_text().startswith(f"{share:.1%}  [") and text.get_text().endswith("%]")
    top = drawn["compare_system_share_by_layer"].axes[0].get_ylim()[1]
    curves = drawn["compare_system_share_by_layer"].axes[0].lines
    assert max(line.get_ydata().max() for line in curves) < top < 1
    drawn.clear()
    script("system_prompt_plot").main(["--run_dir", "runs/tiny-llava__sp-1"])
    assert set(drawn) == {"dataset_pie_vision_vs_user_masked", "system_vision_user_shares_by_layer"}
    labels = [
        line.get_label() for line in drawn["system_vision_user_shares_by_layer"].axes[0].lines
    ]
    assert not any(label.startswith("system") for label in labels)


def test_the_maps_of_cmb_are_white_at_chance_and_on_one_scale(runs, monkeypatch):
    drawn = []

    def keep(fig, path, settings, show=False):
        drawn.append(fig)
        plots.plt.close(fig)
        return [Path("x.png")]

    monkeypatch.setattr(plots, "save", keep)
    main = script("viz_cmb_panel").main
    for scale in ("fixed", "auto"):
        main(["--runs_dir", "runs", "--sp", "0", "--scale", scale])
    for fig, scale in zip(drawn, ("fixed", "auto"), strict=True):
        maps = [axis.images[0] for axis in fig.axes if axis.images]
        run = runs["tiny-llava__sp-0"]
        chance = np.mean([record["chance_vision_share"] for record in run.records()[1:]])
        values = np.ma.masked_invalid(planted(run, "head_vision_share")[1:])
        cmb = values.mean(axis=0).filled(np.nan)
        shown = np.ma.filled(maps[0].get_array(), np.nan)
        np.testing.assert_allclose(shown, cmb - chance, atol=1e-7)
        assert len(maps) == 3 and all(image.norm(0) == 0.5 for image in maps)
        (reach,) = {image.norm.vmax for image in maps}
        if scale == "fixed":
            assert reach == pytest.approx(min(chance, 1 - chance))


def test_cmb_maps_average_the_images_that_all_shown_runs_have(runs, folder, tmp_path):
    cli_run(
        "viz_cmb_panel",
        "--runs_dir",
        "runs",
        "--sp",
        "0",
        "--coco_root",
        "coco",
        "--out",
        tmp_path / "cmb.png",
        "--save_csv",
        "--no_show",
        cwd=folder,
    )
    rows = table(tmp_path / "cmb.csv")
    assert {row["model"] for row in rows} == {
        "tiny-llava",
        "tiny-llava-normWmean",
        "tiny-llava-multilayerNorm",
    } and {row["n"] for row in rows} == {"7"}
    for label in ("tiny-llava", "tiny-llava-multilayerNorm"):
        values = planted(runs[f"{label}__sp-0"], "head_vision_share")[
            1:
        ]  # the second run lacks the first image
        found = {
            (int(row["layer"]), int(row["head"])): number(row["cmb"])
            for row in rows
            if row["model"] == label
        }
        assert np.isnan(found.pop((1, 2))) and len(found) == values[0].size - 1
        for cell, value in found.items():
            np.testing.assert_allclose(value, values[:, cell[0], cell[1]].mean())
    with Image.open(tmp_path / "cmb.png") as image:
        stored = json.loads(image.text["settings"])
    assert stored["images"] == 7 and stored["labels"][0] == "tiny-llava"


def test_cmb_of_one_image(runs, tmp_path, monkeypatch, capsys):
    main = script("viz_cmb_panel").main
    common = ["--runs_dir", "runs", "--sp", "0"]
    assert (
        main(
            [
                *common,
                "--image_key",
                "000000006818",
                "--coco_root",
                "coco",
                "--out",
                str(tmp_path / "one"),
                "--save_csv",
                "--scale",
                "auto",
            ]
        )
        == 0
    )
    rows = [row for row in table(tmp_path / "one.csv") if row["model"] == "tiny-llava-normWmean"]
    expected = (
        runs["tiny-llava-normWmean__sp-0"].arrays("000000006818")["head_vision_share"].astype(float)
    )
    np.testing.assert_allclose([number(row["cmb"]) for row in rows], expected.ravel())
    # The run's own image folder serves without --coco_root, --npz_basename wins, and the default
    # name says what is shown.
    names = []

    def keep(fig, path, settings, show=False):
        names.append((str(path), len(fig.axes)))
        plots.plt.close(fig)
        return [Path("x.png")]

    monkeypatch.setattr(plots, "save", keep)
    main(
        [
            "--runs_dir",
            "runs",
            "--sp",
            "1",
            "--npz_basename",
            f"{IDS[0]}.npz",
            "--image_key",
            "nothing",
        ]
    )
    main(common)
    assert names == [(f"cmb_panel_sp-1_{IDS[0]}.png", 3), ("cmb_panel_sp-0_averaged.png", 5)]
    for arguments, message in [
        (["--image_key", "6818"], f"fits 2 of the 7 .*: {IDS[5]}, {IDS[6]}"),
        (["--image_key", "999"], "fits 0 of the 7"),
        (["--npz_basename", f"{IDS[0]}.npz"], "fits 0 of the 7"),  # the second run lacks this image
        (["--image_key", IDS[1]], "no picture for .*--img_path"),
        (
            ["--image_key", IDS[1], "--img_path", "runs/tiny-llava__sp-0/meta.json"],
            "not a readable picture",
        ),
        (["--use_key", "cmb_baseline"], "has no cmb_baseline"),
        (
            ["--models", "tiny-llava", "llava"],
            "--models llava is not among the runs; there are tiny-llava",
        ),
        (["--models", "tiny-llava", "tiny-llava"], "named twice"),
    ]:
        with pytest.raises(UsageError, match=message):
            main([*common, *arguments])


def test_hidden_norms_average_each_images_own_ratio(runs, folder, tmp_path, monkeypatch):
    arguments = [
        "--runs_dir",
        "runs",
        "--sp",
        "0",
        "--mode",
        "avg",
        "--logy",
        "--early_k",
        "3",
        "--out",
        str(tmp_path / "norms.png"),
        "--save_csv",
    ]
    out = cli_run("viz_hidden_norms", *arguments, cwd=folder)
    rows = table(tmp_path / "norms.csv")
    assert len(rows) == 10 and list(rows[0])[:4] == [
        "hidden_state",
        "tiny-llava_user_text",
        "tiny-llava_vision",
        "tiny-llava_ratio",
    ]
    run = runs["tiny-llava__sp-0"]
    user, vision = (planted(run, f"hidden_norms_{group}")[1:] for group in ("user_text", "vision"))
    for name, values in (("user_text", user), ("vision", vision), ("ratio", vision / user)):
        np.testing.assert_allclose(
            [float(row[f"tiny-llava_{name}"]) for row in rows[:7]], values.mean(axis=0)
        )
    early = np.log10((vision / user).mean(axis=0))[:3].mean()
    assert (
        "tiny-llava: log10 of the mean ratio vision / user text, mean over the first 3 hidden"
        f" states: {early:+.3f} (n = 7)" in out
    )

    drawn = []
    monkeypatch.setattr(
        plots,
        "save",
        lambda fig, path, settings, show=False: (drawn.append((str(path), fig)), [Path("x.png")])[
            1
        ],
    )
    main = script("viz_hidden_norms").main
    main(["--runs_dir", "runs", "--sp", "1"])
    main(["--runs_dir", "runs", "--sp", "1", "--early_k", "0", "--no_ratio_log10"])
    chosen = ["--models", "tiny-llava-normWmean", "tiny-llava", "--titles", "+ norm", "base"]
    main(["--runs_dir", "runs", "--sp", "0", "--mode", "image", "--image_key", IDS[5], *chosen])
    (name, shaded), (_, plain), (image_name, panels) = drawn
    assert (
        name == "hidden_norms_avg_sp-1.png"
        and image_name == f"hidden_norms_panel_sp-0_{IDS[5]}.png"
    )
    run = runs["tiny-llava__sp-1"]
    ratio = (planted(run, "hidden_norms_vision") / planted(run, "hidden_norms_user_text")).mean(
        axis=0
    )
    np.testing.assert_allclose(shaded.axes[2].lines[0].get_ydata(), np.log10(ratio))
    np.testing.assert_allclose(plain.axes[2].lines[0].get_ydata(), ratio)
    assert len(shaded.axes[2].patches) == 1 and not plain.axes[2].patches
    assert shaded.axes[0].get_ylim() == shaded.axes[1].get_ylim()  # lengths are compared
    assert "without the system prompt" in shaded.get_suptitle()
    assert [ax.get_title().split("\n")[0] for ax in panels.axes[:2]] == ["+ norm", "base"] and len(
        panels.axes
    ) == 4
    user = runs["tiny-llava__sp-0"].arrays(IDS[5])["hidden_norms_user_text"]
    np.testing.assert_allclose(panels.axes[1].lines[0].get_ydata(), user.astype(float))
    plots.plt.close("all")
    for extra, message in [
        (
            ["--models", "tiny-llava", "--titles", "a", "b"],
            "--titles: 1 different titles are wanted",
        ),
        (["--titles", "a", "b", "c"], "give --models too"),
        (["--mode", "image"], "needs the image"),
        (["--image_key", "1"], "add --mode image"),
    ]:
        with pytest.raises(UsageError, match=message):
            main(["--runs_dir", "runs", "--sp", "0", *extra])


def test_what_a_run_lacks_is_named_with_the_flag_that_makes_it(tmp_path):
    bare = make_run(tmp_path / "a", "bare", ids=IDS[:2], norms=False)
    only = make_run(tmp_path / "b", "only", ids=IDS[:2], pos_only=True)
    rms = make_run(tmp_path / "c", "rms", ids=IDS[:2], kind="rms")
    make_run(tmp_path / "c", "l2", ids=IDS[:2])
    apart = make_run(tmp_path / "d", "apart", ids=IDS[2:4], deltas=[0.25, 1.0])
    make_run(tmp_path / "d", "other", ids=IDS[:2])
    empty = make_run(tmp_path / "e", "empty", ids=[])
    assert (
        script("analyze_coco_diagnostics").main(["--run_dir", str(only.path)]) == 0
    )  # the RoPE probe is what a pos-only run has
    cases = [
        ("viz_hidden_norms", ["--runs_dir", bare.path.parent, "--sp", 0], "--probe_hidden_norms"),
        ("viz_hidden_norms", ["--runs_dir", rms.path.parent, "--sp", 0], "different norms"),
        (
            "viz_hidden_norms",
            ["--runs_dir", apart.path.parent, "--sp", 0],
            "no image was measured in all of apart, other",
        ),
        ("viz_cmb_panel", ["--runs_dir", only.path.parent, "--sp", 0], "without --pos_only"),
        ("viz_cmb_panel", ["--runs_dir", tmp_path, "--sp", 1], "no runs with --sp 1"),
        ("viz_cmb_panel", ["--runs_dir", empty.path.parent, "--sp", 0], "no finished image"),
        ("system_prompt_plot", ["--run_dir", only.path], "without --pos_only"),
        ("system_prompt_plot", ["--run_dir", empty.path], "no image with attention shares"),
        ("system_prompt_plot", ["--run_dir", bare.path, bare.path], "more than once"),
        (
            "analyze_coco_diagnostics",
            ["--run_dir", bare.path, "--delta_steps", 3],
            "was measured with 1, 0.25",
        ),
        (
            "analyze_coco_diagnostics",
            ["--run_dir", bare.path, apart.path],
            r"first shifts differ \(0.25, 1 positions\)",
        ),
        ("analyze_coco_diagnostics", ["--run_dir", tmp_path], "not a run directory"),
    ]
    modules = {name: script(name) for name, _, _ in cases}
    for name, arguments, message in cases:
        with pytest.raises(UsageError, match=message):
            modules[name].main([str(argument) for argument in arguments])


def test_failures_are_one_line_and_exit_code_2(runs, folder):
    assert "is not a run directory" in cli_run(
        "analyze_coco_diagnostics", "--run_dir", "runs", cwd=folder, code=2
    )
    blocked = ["--runs_dir", "runs", "--sp", "0", "--out", "coco/val2017/000000000139.jpg/x.png"]
    assert "cannot write" in cli_run("viz_hidden_norms", *blocked, cwd=folder, code=2)
    if sys.platform.startswith("linux"):
        assert "no window can be opened" in cli_run(
            "viz_cmb_panel", "--runs_dir", "runs", "--sp", "0", "--show", cwd=folder, code=2
        )


def test_a_window_opens_only_when_asked(runs, tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(plots, "use_windows", lambda: opened.append("backend"))
    monkeypatch.setattr(plots.plt, "show", lambda: opened.append("window"))
    arguments = ["--runs_dir", "runs", "--sp", "1", "--out", str(tmp_path / "x")]
    script("viz_cmb_panel").main([*arguments, "--no_show"])
    assert opened == []
    script("viz_cmb_panel").main([*arguments, "--show"])
    assert opened == ["backend", "window"]


def test_the_same_command_writes_the_same_bytes(runs, folder, tmp_path):
    arguments = ["--runs_dir", "runs", "--sp", "1", "--out", tmp_path / "cmb.png", "--save_csv"]
    files = [tmp_path / f"cmb.{ending}" for ending in ("png", "pdf", "csv")]
    cli_run("viz_cmb_panel", *arguments, cwd=folder)
    first = [file.read_bytes() for file in files]
    script("viz_cmb_panel").main([str(argument) for argument in arguments])
    assert [file.read_bytes() for file in files] == first

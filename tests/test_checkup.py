"""The checkup: its commands are ones that the scripts take, it goes on after one that fails, and
says so."""

import json
import shlex
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import ROOT, in_process
from tests.test_readmes import accept

checkup = in_process(ROOT / "diagnostic_tools" / "checkup.py")


def commands(*flags):
    done = checkup("--dry_run", *flags)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if not line.startswith("#")]
    return [shlex.split(line) for line in lines]


def value(words, flag):
    return words[words.index(flag) + 1]


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("b.PNG", "a.jpg", "c d.jpeg"):
        Image.new("RGB", (32, 24)).save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    return folder


@pytest.mark.parametrize("size", ["quick", "paper"])
def test_every_command_is_one_that_its_script_takes(tmp_path, pictures, size):
    coco = tmp_path / "coco"
    (coco / "annotations").mkdir(parents=True)
    (coco / "val2017").mkdir()
    (coco / "annotations" / "instances_val2017.json").write_text("{}")
    out = ["--size", size, "--out", tmp_path / "out", "--runs_dir", tmp_path / "runs"]
    model = ["--model_path", "org/model"]
    for flags in ([], model, [*model, "--images", pictures], [*model, "--images", coco]):
        found = commands(*out, *flags)
        assert len({words[1] for words in found}) >= 7
        for words in found:
            accept(Path(), words)


def test_embedded_models_get_what_their_variant_is_about():
    by_model = {}
    for words in commands():
        if "--model_path" in words:
            by_model.setdefault(Path(value(words, "--model_path")).name, set()).add(words[1])
        elif "--scales" in words:
            path = value(words, "--scales").removeprefix("full=")
            by_model.setdefault(Path(path).name, set()).add(words[1])
    of_variant = {"diagnostic_tools/run_coco_diagnostics.py", "diagnostic_tools/psi.py"}
    assert by_model["tiny-llava-normWmean"] == by_model["tiny-llava-multilayerNorm"] == of_variant
    assert by_model["tiny-llava-independent"] == {"swap_analysis/swap_analysis.py"}
    assert len(by_model["tiny-llava"]) >= 9


def test_pictures_alone_are_described_and_scenes_asked_about(tmp_path, pictures):
    found = commands("--model_path", "m", "--images", pictures, "--out", tmp_path / "out")
    (coco,) = [words for words in found if words[1].endswith("run_coco_diagnostics.py")]
    assert value(coco, "--image_dir") == str(pictures)
    listed = json.loads(Path(value(coco, "--ann_file")).read_text())["images"]
    assert [image["file_name"] for image in listed] == ["a.jpg", "b.PNG", "c d.jpeg"]
    (knockout,) = [words for words in found if "attention_experiment_curate" in words[1]]
    assert "shapes-interp" in value(knockout, "--coco_root")


def test_a_folder_without_questions_leaves_out_what_needs_them(tmp_path):
    coco = tmp_path / "coco"
    (coco / "annotations").mkdir(parents=True)
    (coco / "annotations" / "instances_val2017.json").write_text("{}")
    scripts = {words[1] for words in commands("--model_path", "m", "--images", coco)}
    assert "scripts/ablation_experiment.py" in scripts
    for script in ("ablation_experiment_curate.py", "attention_experiment_curate.py"):
        assert f"scripts/{script}" not in scripts
    assert "diagnostic_tools/psi.py" not in scripts


def test_wrong_folders_are_a_line(tmp_path):
    for folder, reason in ((tmp_path / "nowhere", "no such folder"), (tmp_path, "no pictures")):
        done = checkup("--dry_run", "--images", folder)
        assert done.returncode == 2 and reason in done.stderr


def test_it_goes_on_after_a_command_that_fails_and_says_why(tmp_path, monkeypatch):
    def program(text):
        return ["-c", text]

    module = checkup.module
    planned = [
        module.Step("good", program("print('fine')")),
        module.Step("bad", program("import sys; print('error: no such thing'); sys.exit(2)")),
        module.Step("partly", program("import sys; sys.exit(3)")),
        module.Step("last", program(f"open({str(tmp_path / 'there')!r}, 'w')")),
    ]
    monkeypatch.setattr(module, "steps", lambda _: iter(planned))
    done = checkup("--out", tmp_path / "out")
    assert done.returncode == 3 and (tmp_path / "there").exists()
    assert "ended with 2" in done.stdout and "error: no such thing" in done.stdout
    assert "not measured: bad" in done.stdout and "some items failed" in done.stdout
    logs = sorted((tmp_path / "out" / "logs").iterdir())
    assert [log.name for log in logs] == [
        "01_good.txt",
        "02_bad.txt",
        "03_partly.txt",
        "04_last.txt",
    ]
    assert logs[0].read_text() == "fine\n"


def test_ctrl_c_in_a_command_ends_the_checkup(tmp_path, monkeypatch):
    module = checkup.module
    ended = ["-c", "import sys; sys.exit(130)"]
    late = ["-c", f"open({str(tmp_path / 'late')!r}, 'w')"]
    planned = [module.Step("ended", ended), module.Step("late", late)]
    monkeypatch.setattr(module, "steps", lambda _: iter(planned))
    done = checkup("--out", tmp_path / "out")
    assert done.returncode == 130 and not (tmp_path / "late").exists()


def test_the_last_line_is_a_bars_last_state(tmp_path):
    log = tmp_path / "log"
    log.write_bytes(b"begin\npictures:  10%\rpictures:  40%\r\r")
    assert checkup.module.last_line(log) == "pictures:  40%"
    log.write_bytes(b"x" * 5000 + b"\nend\n\n")
    assert checkup.module.last_line(log) == "end"
    assert checkup.module.last_line(tmp_path / "none") == ""

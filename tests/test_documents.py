"""The commands of the five documents, as they are typed there (tests/documents.txt): each is taken
by the real parser, and those that the tiny models allow run one after the other."""

import json
import os
import shlex
import subprocess

import pytest

from tests.conftest import ROOT, command_module
from vlmdiag import cli
from vlmdiag.swap import saved

TINY = ROOT / "checkpoints" / "tiny-llava"
NOTHING = ("backup_and_replace_model_arch.sh", "restore_original_model_arch.sh")


def typed():
    """[(folder, words)] of the table."""
    folder, lines = ".", []
    for line in (ROOT / "tests" / "documents.txt").read_text().splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["cd"]:
            folder = words[1]
        elif words:
            lines.append((folder, words))
    return lines


COMMANDS = typed()
TOOLS, VOLCANO = (
    [words for folder, words in COMMANDS if words[0] == "python" and part in f"{folder}/{words[1]}"]
    for part in ("diagnostic_tools", "visualize")
)
of_table = pytest.mark.parametrize(
    ("folder", "words"), COMMANDS, ids=[f"{n}-{words[1]}" for n, (_, words) in enumerate(COMMANDS)]
)


def parsed(path, arguments):
    """Arguments as the command's own parser reads them."""
    module = command_module(path)
    parse = getattr(module, "parse_args", None)
    return parse(arguments) if parse else saved.parse_args(module.__doc__, arguments)


@pytest.mark.fast
@of_table
def test_a_documents_command_is_taken_as_it_is_typed(folder, words, monkeypatch):
    if words[0] == "chmod":
        assert all((ROOT / folder / name).is_file() for name in words[2:])
        return
    script = ROOT / folder / words[1]
    assert script.is_file()
    if words[0] == "bash":
        assert subprocess.run(["bash", "-n", script]).returncode == 0
        return
    if "cli.call(" in script.read_text():
        real = []
        monkeypatch.setattr(cli, "call", lambda *called: real.extend(called))
        command_module(script).main(words[2:])
        script, arguments = ROOT / real[0], real[1]
    else:
        arguments = words[2:]
    assert parsed(script, arguments)


@pytest.mark.fast
@pytest.mark.parametrize("name", NOTHING)
def test_a_step_that_is_not_needed_says_so(name):
    done = subprocess.run([ROOT / "visualize" / name], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("nothing to do")
    assert done.stdout.count("\n") == 1


def test_the_documents_spelling_of_a_script_runs_it(call, shapes):
    tiny = ("--model_path", TINY, "--image_dir", shapes / "train2017")
    misspelt, real = (
        call(shapes, f"scripts/{name}_acts_size.py", *tiny) for name in ("esimate", "estimate")
    )
    assert misspelt == real and real[0] == 0
    code, said = call(
        shapes,
        "scripts/ablation_experiment_phi.py",
        *("--coco_root", shapes, "--replacement", "zeros"),
    )
    assert code == 2 and "xtuner/llava-phi-3-mini-hf" in said and said.count("\n") == 1


@pytest.fixture(scope="module")
def shapes(tmp_path_factory, warm_python):
    folder = tmp_path_factory.mktemp("documents") / "COCO"
    flags = ["--out_dir", str(folder), "--num_images", "4", "--num_train", "4"]
    subprocess.run([warm_python, ROOT / "data/make_shapes.py", *flags], check=True)
    return folder


@pytest.fixture
def call(warm_python):
    """call(folder, script, *arguments) -> (exit code, what it said)."""

    def run(folder, script, *arguments):
        done = subprocess.run(
            [warm_python, ROOT / script, *map(str, arguments)],
            cwd=folder,
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout + done.stderr

    return run


def with_values(words, values):
    """Words with the values that a machine without the document's data needs; None leaves a flag
    out with its values."""
    out, flag = [], None
    for word in words:
        flag = word if word.startswith("--") else flag
        if flag in values and values[flag] is None:
            continue
        is_value = not word.startswith("--")
        out.append(values[flag] if is_value and flag in values else word)
    return out


def test_the_analyses_read_what_the_documents_run_without_system_prompt_made(
    tmp_path, shapes, call
):
    folder = tmp_path / "diagnostic_tools"
    (tmp_path / "checkpoints").mkdir()
    folder.mkdir()
    for name in ("", "-multilayerNorm", "-normWmean"):
        (tmp_path / "checkpoints" / f"llava-v1.5-7b{name}").symlink_to(
            ROOT / "checkpoints" / f"tiny-llava{name}"
        )
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "COCO").symlink_to(shapes)
    captions = shapes / "annotations" / "captions_val2017.json"
    key = json.loads(captions.read_text())["images"][0]["id"]
    values = {"--device": "cpu", "--weights_type": "safetensors", "--image_key": f"{key:012d}"}
    values |= {"--vision_tower_path": None, "--max_images": "2", "--max_new_tokens": "4"}
    values["--out"] = "cmb.png"
    for words in TOOLS:
        if words[1] in ("demo_meta.py", "viz_attention_image.py"):
            continue
        arguments = with_values(words[2:], values)
        code, said = call(folder, f"diagnostic_tools/{words[1]}", *arguments)
        assert code == 0, said
        if "--sp" in words or any("__sp-0" in word for word in words):
            assert "without a system prompt" in said or "--strip_system_prompt" in said
    assert (folder / "cmb.png").stat().st_size > 1000


def test_figure_4_is_made_after_figure_5(tmp_path, shapes, call):
    (tmp_path / "visualize" / "data").mkdir(parents=True)
    rows = json.loads((shapes / "mmhal_shapes.json").read_text())[:3]
    for row in rows:
        row["image_src"] = str(shapes / row["image_src"])
    (tmp_path / "visualize" / "data" / "MMHal-bench.json").write_text(json.dumps(rows))
    values = {"--model-path": str(TINY), "--instance-idx": "2", "--vision-encoder-name": None}
    values["--feedback-target-tokens"] = None
    for words in VOLCANO:
        arguments = with_values(words[2:], values)
        code, said = call(tmp_path, words[1], *arguments)
        assert code == 0, said
    runs = os.listdir(tmp_path / "runs" / "volcano")
    assert sorted(runs) == ["tiny-llava", "tiny-llava__sample-engineered-tensors"]
    made = {file.name for file in (tmp_path / "visualize" / "figures").iterdir()}
    assert "greedy_image_attention_top_k_mean.png" in made
    assert any(name.startswith("image_heatmap_2") for name in made)
    # tensors besides, of the greedy answers: no conflict, and asked again it goes on
    more = [word for word in VOLCANO[0][2:] if word != "--visualize-avg-attention-all"]
    arguments = [*with_values(more, values), "--output-visualization-tensors"]
    for counted in ("3 computed", "0 computed"):
        code, said = call(tmp_path, VOLCANO[0][1], *arguments)
        assert code == 0 and counted in said, said

"""The READMEs' commands, files, fields and numbers hold. Blocks of commands in a README are fenced
as

    ```bash         Python commands are run as they stand, in a copy of the repository (other
                    READMEs than diagnostic_tools/: on a few pictures)
    ```bash real    needs real weights, data or a cluster: Python commands are parsed by the
                    script's own parser
    ```bash setup   sets the machine up: files are looked for, nothing is run
    ```python       README.md: run as it stands; models/README.md: test_own_model.py runs it
Shell scripts are never run from a block, only checked with bash -n: they download, or run these
tests. A block starts at the repository's root, `cd` counts within it, an unset variable is 0.
diagnostic_tools/README.md is run command by command, in one checkout.

    python tests/test_readmes.py

runs its commands anew and writes the tables of numbers on the tiny models into
docs/measured/beyond_semantics.md, whose commands come after those of the README.
"""

import argparse
import ast
import contextlib
import io
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import test_benchmark
from tests.conftest import command_module
from tests.test_house import FOLDERS
from vlmdiag.cli import UsageError
from vlmdiag.pictures import spread
from vlmdiag.runs import rundirs

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ROOT / "diagnostic_tools"
NUMBERS = (
    ROOT / "docs" / "measured" / "beyond_semantics.md"
)  # of its README's commands, and some more
BENCHMARKS = ROOT / "benchmarks" / "README.md"
READMES = [
    path
    for name in (
        "README.md",
        "diagnostic_tools/README.md",
        "diagnostic_tools/STETHOSCOPE.md",
        "scripts/README.md",
        "visualize/README.md",
        "swap_analysis/README.md",
        "data/README.md",
        "models/README.md",
        "checkpoints/README.md",
        "benchmarks/README.md",
        "docs/README.md",
        "CONTRIBUTING.md",
    )
    if (path := ROOT / name).exists()
]
# pages of the documentation whose commands stand in a README too, with what they print
READMES += [
    ROOT / "docs" / "checkup.md",
    ROOT / "docs" / "page.md",
    ROOT / "docs" / "data.md",
    ROOT / "docs" / "your_model.md",
    *sorted((ROOT / "docs" / "diagnoses").glob("*.md")),
    *sorted((ROOT / "docs" / "measured").glob("*.md")),
]
MODELS = ("tiny-llava", "tiny-llava-normWmean", "tiny-llava-multilayerNorm")
LIMITS = {
    "--max_images": "2",
    "--max_questions": "4",
    "--num_images": "4",
    "--num_train": "2",
    "--max_samples_per_category": "3",
}  # given to the scripts that have them
SEED = r"""
python vlm_token_norms.py \
--model_path ../checkpoints/llava-v1.5-7b \
--vision_tower_path ../checkpoints/clip-vit-large-patch14-336 \
--coco_root ../Data/COCO \
--device cuda \
--weights_type bin \
--max_images 20 \
--save_vectors \
--out_dir outputs/token_norms
python run_coco_diagnostics.py \
  --model_path ../checkpoints/llava-v1.5-7b \
  --image_dir ../Data/COCO/val2017 \
  --ann_file ../Data/COCO/annotations/captions_val2017.json \
  --out_root runs \
  --restrict_to_past \
  --max_new_tokens 32 \
  --probe_hidden_norms \
  --hidden_norm_kind l2 \
  --strip_system_prompt \
  --max_images 20
python analyze_coco_diagnostics.py --run_dir runs/llava-v1.5-7b__sp-0 runs/llava-v1.5-7b-multilayerNorm__sp-0 runs/llava-v1.5-7b-normWmean__sp-0
python system_prompt_plot.py --run_dir runs/llava-v1.5-7b__sp-0 runs/llava-v1.5-7b-multilayerNorm__sp-0 runs/llava-v1.5-7b-normWmean__sp-0
python viz_cmb_panel.py \
  --runs_dir runs \
  --sp 0 \
  --coco_root ../Data/COCO/ \
  --out cmb.png
python viz_cmb_panel.py \
  --runs_dir runs \
  --sp 0 \
  --image_key 000000006818 \
  --coco_root ../Data/COCO/ \
  --out cmb_panel_sp0_000000006818.png
python viz_hidden_norms.py \
  --runs_dir runs \
  --sp 0 \
  --mode avg \
  --logy \
  --early_k 6 \
  --out hidden_norms_avg_sp0.png
python viz_attention_image.py
"""  # the user's document, diagnostic_tools


# --- reading READMEs ------------------------------------------------------------------------------


def steps(block):
    """[(folder, words), ...] of a block: continued lines joined, comments and variables set for one
    command dropped, `cd` followed."""
    found, folder = [], Path()
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(
            re.sub(r"\$(\w+|\{\w+\})", lambda m: os.environ.get(m[1].strip("{}"), "0"), line),
            comments=True,
        )
        while words and re.fullmatch(r"\w+=.*", words[0], re.DOTALL):
            words = words[1:]
        if words[:1] == ["cd"]:
            folder = folder / words[1]
        elif words:
            found.append((folder, words))
    return found


def blocks(path):
    """[(info string, first line, text), ...] of a README's fenced blocks."""
    text = path.read_text()
    found = re.finditer(r"^```(.*)\n((?:.*\n)*?)```$", text, re.MULTILINE)
    return [(match[1].strip(), text[: match.start()].count("\n") + 2, match[2]) for match in found]


def name_of(words):
    """The script of a command, or the command."""
    return Path(words[1]).name if len(words) > 1 else words[0]


def commands(*kinds):
    """pytest parameters (README, folder, words) of all commands in blocks of these kinds."""
    return [
        pytest.param(
            path, folder, words, id=f"{path.relative_to(ROOT)}:{line}-{name_of(words)}-{number}"
        )
        for path in READMES
        for info, line, text in blocks(path)
        if info in kinds
        for number, (folder, words) in enumerate(steps(text))
    ]


class Parsed(BaseException):
    """Raised in place of what a script does once its arguments are parsed."""


def refusal(path, arguments):
    """What a script's own parser has against the arguments, or None."""
    original = argparse.ArgumentParser.parse_args

    def only_parse(self, *args):
        original(self, *args)
        raise Parsed

    module, error = command_module(path), io.StringIO()
    with contextlib.redirect_stderr(error), pytest.MonkeyPatch.context() as patch:
        for name, value in {"ID": "0", "COUNT": "8", "MAX": "7"}.items():  # for --shard auto
            patch.setenv(f"SLURM_ARRAY_TASK_{name}", value)
        try:
            if hasattr(module, "parse_args"):
                module.parse_args(arguments)
            else:
                patch.setattr(argparse.ArgumentParser, "parse_args", only_parse)
                module.main(arguments)
        except (SystemExit, UsageError) as end:
            return error.getvalue() or str(end)
        except Parsed:
            pass
    return None


def accept(folder, words):
    """Fail unless the command of a README could run: its script is there and takes the
    arguments."""
    if words[0] == "python":
        path = ROOT / folder / words[1]
        assert path.is_file(), f"{shlex.join(words)}: no {path}"
        assert (why := refusal(path, words[2:])) is None, f"{shlex.join(words)}: {why}"
    elif words[:2] == ["pip", "install"]:
        assert all((ROOT / folder / name).is_file() for name in words if name.endswith(".txt"))
    else:
        path = ROOT / folder / (words[1] if words[0] == "bash" else words[0])
        assert path.suffix == ".sh", (
            f"{shlex.join(words)}: neither python, nor pip install, nor a shell script"
        )
        assert path.is_file(), f"{shlex.join(words)}: no {path}"
        assert words[0] == "bash" or os.access(path, os.X_OK), f"{path} is not executable"
        checked = subprocess.run(["bash", "-n", path], capture_output=True, text=True)
        assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize("path", READMES, ids=[str(path.relative_to(ROOT)) for path in READMES])
def test_blocks_are_fenced_in_a_known_way(path):
    known = {"", "bash", "bash real", "bash setup", "python"}
    assert [(line, info) for info, line, _ in blocks(path) if info not in known] == []
    assert path.read_text().count("\n```") % 2 == 0


@pytest.mark.parametrize(("path", "folder", "words"), commands("bash", "bash real", "bash setup"))
def test_a_script_takes_the_arguments_that_a_readme_gives_it(path, folder, words):
    accept(folder, words)


def commands_of_docstring(script):
    """[words, ...] of the indented commands in a script's docstring, and the lines of flags that
    follow a line without a backslash."""
    lines = (ast.get_docstring(ast.parse(script.read_text())) or "").splitlines()
    indented = [line if line.startswith("    ") else "" for line in lines]
    loose = [
        line
        for before, line in zip(["", *indented], indented)
        if re.match(r" {6,}--?\w", line) and not before.endswith("\\") or re.search(r"\\ +\S", line)
    ]
    joined = "\n".join(indented).replace("\\\n", " ")
    block = "\n".join(line for line in joined.splitlines() if line.startswith("    python "))
    return [words for _, words in steps(block)], loose


@pytest.mark.parametrize("folder", [*FOLDERS, "benchmarks"])
def test_the_commands_of_docstrings_are_whole_and_parse(folder):
    for script in sorted((ROOT / folder).rglob("*.py")):
        found, loose = commands_of_docstring(script)
        assert loose == [], f"{script}: no command takes these in: {loose}"
        for words in found:
            if words[1] == "-m":
                continue
            at_root = (ROOT / words[1]).is_file()
            accept(Path() if at_root else script.parent.relative_to(ROOT), words)


@pytest.mark.parametrize(
    "words", [words for _, words in steps(SEED)], ids=lambda words: f"{words[1]}-{len(words)}"
)
def test_the_documented_commands_are_accepted(words):
    accept(Path("diagnostic_tools"), words)
    dashed = [re.sub("_", "-", word) if word.startswith("--") else word for word in words]
    accept(Path("diagnostic_tools"), dashed)


def test_the_documented_commands_stand_in_the_readme():
    real = [
        words
        for info, _, text in blocks(TOOLS / "README.md")
        if info == "bash real"
        for _, words in steps(text)
    ]
    assert [
        words for _, words in steps(SEED.replace("../Data/", "../data/")) if words not in real
    ] == []


@pytest.mark.parametrize("path", READMES, ids=[str(path.relative_to(ROOT)) for path in READMES])
def test_a_file_that_a_readme_names_exists(path):
    text = re.sub(r"https?://\S+", "", path.read_text())
    present = {
        file.relative_to(ROOT).as_posix()
        for pattern in ("*", "*/*", "*/*/*")
        for file in ROOT.glob(pattern)
    }
    for name in set(re.findall(r"(?<![\w<>*./-])[\w./-]*\w\.(?:py|sh|ipynb)\b", text)):
        if "/" in name:
            assert any((folder / name).exists() for folder in (ROOT, path.parent)), name
        else:
            assert any(file.split("/")[-1] == name for file in present), name


PAGES = [*READMES, ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("path", PAGES, ids=[str(path.relative_to(ROOT)) for path in PAGES])
def test_a_link_leads_to_a_file_or_a_heading_that_is_there(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        page = path.parent / name if name else path
        assert page.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
            anchors = [re.sub(r"[^\w -]", "", heading.lower()) for heading in headings]
            assert anchor in [heading.replace(" ", "-") for heading in anchors], target


def test_a_module_that_a_page_names_by_its_room_exists():
    for path in PAGES:
        for name in re.findall(r"`(vlmdiag/[\w/]+(?:\.\w+|/)?)`", path.read_text()):
            assert (ROOT / name).exists(), f"{path}: {name}"


def test_a_flag_that_the_readme_names_exists():
    known = set()
    for path in TOOLS.glob("*.py"):
        if "def parse_args" in path.read_text():
            with (
                contextlib.redirect_stdout(io.StringIO()) as shown,
                contextlib.suppress(SystemExit),
            ):
                command_module(path).parse_args(["--help"])
            known |= set(re.findall(r"--[\w-]+", shown.getvalue()))
    make_shapes = {"--num_images", "--seed"}
    pages = (TOOLS / "README.md").read_text() + NUMBERS.read_text()
    text = re.sub(r"^#.*$", "", pages, flags=re.MULTILINE)
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text)) - known - make_shapes == set()


# --- running --------------------------------------------------------------------------------------


def make_checkout(folder, models=MODELS):
    """A copy of the repository's code in which commands may write, with links to the tiny
    models."""
    missing = [
        name for name in models if not (ROOT / "checkpoints" / name / "config.json").exists()
    ]
    if missing:
        pytest.fail(
            f"checkpoints/{missing[0]} is missing: train the tiny models with python"
            " checkpoints/train_tiny.py",
            pytrace=False,
        )
    leave = shutil.ignore_patterns(
        "__pycache__",
        ".*",
        "*.egg-info",
        "runs",
        "outputs",
        "results",
        "COCO",
        "mmhal",
        "shapes*",
        "tiny-llava*",
        "smol-llava*",
        "tests",
    )
    shutil.copytree(ROOT, folder, ignore=leave, dirs_exist_ok=True)
    for path in (ROOT / "checkpoints").glob("tiny-llava*") if models else ():
        (folder / "checkpoints" / path.name).symlink_to(path)
    return folder


def environment(**more):
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in ("MPLBACKEND", "DISPLAY", "MODEL", "RUNS", "OUT", "WORD", "IMAGE")
    }
    return (
        kept | {"PYTHONWARNINGS": "error", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""} | more
    )


def run(words, cwd, **more):
    return subprocess.run(
        [str(word) for word in words],
        cwd=cwd,
        env=environment(**more),
        capture_output=True,
        text=True,
    )


def run_commands(checkout, python):
    """Run the commands of diagnostic_tools/README.md and of its page of numbers as one program.
    Returns the finished process."""
    words = [
        words[1:]
        for path in (TOOLS / "README.md", NUMBERS)
        for info, _, text in blocks(path)
        if info == "bash"
        for _, words in steps(text)
    ]
    program = f"""\
import subprocess, sys
for words in {words!r}:
    subprocess.run([sys.executable, *words], check=True, cwd={str(checkout)!r})
"""
    (checkout / "commands.py").write_text(program)
    return run([python, "-u", checkout / "commands.py"], checkout / "diagnostic_tools")


@pytest.fixture(scope="session")
def finished(tmp_path_factory, warm_python):
    """(checkout in which every command of diagnostic_tools/README.md was run, the finished
    process)."""
    checkout = make_checkout(tmp_path_factory.mktemp("checkout"))
    return checkout, run_commands(checkout, warm_python)


@pytest.fixture(scope="session")
def checkout(finished):
    if finished[1].returncode:
        pytest.fail(
            "a command of diagnostic_tools/README.md"
            f" failed:\n{finished[1].stdout[-2000:]}\n{finished[1].stderr[-4000:]}",
            pytrace=False,
        )
    return finished[0]


@pytest.mark.slow
def test_the_commands_of_the_tools_write_figures_that_can_be_read(checkout, finished):
    wrote = [
        line.removeprefix("wrote ")
        for line in finished[1].stdout.splitlines()
        if line.startswith("wrote ") and line.endswith(".png")
    ]
    assert len(wrote) >= 25
    for name in wrote:
        with Image.open(checkout / name) as picture:
            picture.verify()


@pytest.mark.slow
def test_the_page_of_files_names_every_file_and_field(checkout):
    pages = (ROOT / "docs" / "files.md").read_text() + (TOOLS / "README.md").read_text()  # flags
    words = set(re.findall(r"\w+", pages))
    run = rundirs.read_run(checkout / "runs" / "tiny-llava__sp-0", rundirs.COCO)
    psi = rundirs.read_run(checkout / "runs" / "psi" / "tiny-llava", "psi")
    record, answer, id = run.record(run.ids()[0]), psi.record(psi.ids()[0]), run.ids()[0]
    fields = {
        *record,
        *record["shares"],
        *record["hidden_norms"],
        *record["spans"],
        *record["groups"],
        *run.arrays(id),
        *answer,
        *answer["original"],
    }
    meta = json.loads((run.path / "meta.json").read_text())
    flags = {
        "do_sample",
        "temperature",
        "seed",
        "save_hidden_grid",
        "save_hidden_plots",
        "pos_only",
        "image_aspect",
    }
    fields |= {*meta, *meta["settings"], *meta["free"]} - flags
    for name in (
        "runs/tiny-llava__sp-0/analysis/summary.json",
        "outputs/attention/attention_tiny-llava.json",
    ):
        fields |= set(json.loads((checkout / name).read_text()))
    fields -= {
        f"mean_avg_{name}_{end}"
        for name in ("abs_delta_gv", "delta_alphaV")
        for end in ("low", "high")
    }
    norms = json.loads(
        (checkout / "outputs/token_norms/tiny-llava/token_norms_comparison.json").read_text()
    )
    kinds = json.loads((psi.path / "analysis" / "psi.json").read_text())["kinds"]
    fields |= {
        *norms,
        *norms["text"],
        *norms["vision_over_text"],
        *kinds["all"],
        *kinds["all"]["psi"],
    }
    for name in (
        "outputs/token_norms/tiny-llava/vectors.npz",
        "outputs/attention/attention_tiny-llava.npz",
    ):
        with np.load(checkout / name) as arrays:
            fields |= set(arrays.files)
    assert sorted(fields - words) == []
    made = [
        file
        for folder in ("runs", "outputs")
        for file in (checkout / folder).rglob("*")
        if file.is_file() and not file.name.startswith(".")
    ]
    stems = {
        file.stem
        for file in made
        if file.parent.name not in ("per_image", "failures", "counters")
        and not file.name.startswith("stack-")
    }
    named_by_the_command = ("attention_", "cmb_", "hidden_norms_")
    assert {stem for stem in stems - words if not stem.startswith(named_by_the_command)} == set()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "folder", "words"),
    [
        row
        for row in commands("bash")
        if row.values[0] not in (TOOLS / "README.md", NUMBERS, BENCHMARKS)
    ],
)
def test_a_command_for_the_tiny_models_runs(path, folder, words, request, warm_python):
    if words[0] != "python":
        return accept(folder, words)
    limits = [
        part
        for flag, value in LIMITS.items()
        if refusal(ROOT / folder / words[1], [*words[2:], flag, value]) is None
        for part in (flag, value)
    ]
    root = request.getfixturevalue("data_checkout" if path.parent.name == "data" else "checkout")
    done = run([warm_python, *words[1:], *limits], root / folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_the_quick_benchmarks_of_the_readme_are_those_of_test_benchmark():
    quick = [row.values[2] for row in commands("bash") if row.values[0] == BENCHMARKS]
    scripts = [f"benchmarks/bench_{name}.py" for name in test_benchmark.SCRIPTS]
    assert quick == [["python", script, "--quick"] for script in scripts]


@pytest.mark.slow
def test_the_quickstart_of_the_readme_runs_as_it_is_printed(tmp_path, warm_python):
    in_order = [
        (info, text) for info, _, text in blocks(ROOT / "README.md") if info in ("bash", "python")
    ]
    # the others: test_a_command_for_the_tiny_models_runs
    first = next(n for n, (info, _) in enumerate(in_order) if info == "python")
    (_, draw), (_, quickstart), (_, in_memory) = in_order[first - 1 : first + 2]
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    for _, words in steps(draw):
        done = run([warm_python, ROOT / words[1], *words[2:]], tmp_path)
        assert done.returncode == 0, done.stderr
    (tmp_path / "quickstart.py").write_text(quickstart)
    done = run([warm_python, "quickstart.py"], tmp_path)
    assert done.returncode == 0, done.stderr
    shares = re.findall(r"(\d\.\d\d) of the attention goes to the picture", done.stdout)
    assert len(shares) == len(done.stdout.splitlines()) > 5
    assert all(0 < float(share) < 1 for share in shares)
    (tmp_path / "in_memory.py").write_text(in_memory)
    done = run([warm_python, "in_memory.py"], tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def data_checkout(tmp_path_factory):
    return make_checkout(tmp_path_factory.mktemp("data"), models=())


# --- the shell script -----------------------------------------------------------------------------


def printed(output):
    """The commands that the script printed before it ran them."""
    return [shlex.split(line[2:])[1:] for line in output.splitlines() if line.startswith("+ ")]


@pytest.mark.slow
def test_the_shell_script_goes_on_with_the_runs_of_the_readme(checkout, tmp_path, warm_python):
    shell = ["bash", checkout / "diagnostic_tools" / "run_beyond_semantics.sh"]
    done = run(shell, tmp_path, MODEL="checkpoints/tiny-llava", MAX_IMAGES="20", PYTHON=warm_python)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("images: 0 computed, 20 done before, 0 failed") == 2
    assert done.stdout.count("questions: 0 computed, 40 done before, 0 failed") == 1
    assert "WORD=teddy" in done.stdout
    for name in (
        "cmb_sp0",
        "cmb_sp1",
        "cmb_panel_sp0_000000000001",
        "hidden_norms_avg_sp0",
        "hidden_norms_avg_sp1",
    ):
        assert (checkout / "outputs" / f"{name}.png").exists(), name
    assert not any(tmp_path.iterdir())


@pytest.fixture
def recorder(tmp_path):
    """An interpreter that runs one-liners but of scripts only leaves behind what the shell script
    looks for: run directories as of one model without a system prompt, `first`, and others with
    one. psi.py ends with 3. recorder(cwd, **variables) -> (exit code, printed commands by script,
    all output).
    """
    fake = tmp_path / "python"
    fake.write_text(f"""#!{sys.executable}
import os, sys
from pathlib import Path
arguments = sys.argv[1:]
if arguments[0] == "-c":
    os.execv(sys.executable, [sys.executable, *arguments])
if arguments[0].endswith("run_coco_diagnostics.py"):
    runs = Path(arguments[arguments.index("--out_root") + 1])
    for flag, model in zip(arguments, arguments[1:]):
        if flag == "--model_path":
            sp = int("--strip_system_prompt" in arguments or model.endswith("first"))
            items = runs / f"{{Path(model).name}}__sp-{{sp}}" / "per_image"
            items.mkdir(parents=True)
            (items / "7.json").touch()
sys.exit(3 if arguments[0].endswith("psi.py") else 0)
""")
    fake.chmod(0o755)

    def start(cwd, **variables):
        done = run(["bash", TOOLS / "run_beyond_semantics.sh"], cwd, PYTHON=str(fake), **variables)
        calls = {}
        for words in (
            shlex.split(line[2:])[1:] for line in done.stdout.splitlines() if line.startswith("+ ")
        ):
            accept(Path(), ["python", *words])
            calls.setdefault(Path(words[0]).stem, []).append(words[1:])
        return done.returncode, calls, done.stdout + done.stderr

    return start


def test_the_shell_script_runs_everything_on_the_tiny_models(recorder, tmp_path):
    code, calls, output = recorder(tmp_path, RUNS="r", OUT="o")
    assert code == 3, output
    scripts = {path.stem for path in TOOLS.glob("*.py") if "def main" in path.read_text()} - {
        "make_walkthrough",
        "check_model",
        "pack_run",
        "checkup",
        "report",
        "claims",
    }
    stethoscope = {
        stem for stem in scripts if f"| `{stem}.py` |" in (TOOLS / "STETHOSCOPE.md").read_text()
    }
    assert scripts - stethoscope <= set(calls) and len(stethoscope) == 7
    plain, stripped = calls["run_coco_diagnostics"]
    models = [word for name in MODELS for word in ("--model_path", f"checkpoints/{name}")]
    assert plain[:6] == stripped[:6] == models and stripped == [*plain, "--strip_system_prompt"]
    for name in ("analyze_coco_diagnostics", "system_prompt_plot"):
        assert calls[name] == [
            ["--run_dir", *(f"{tmp_path}/r/{model}__sp-{sp}" for model in MODELS)] for sp in (0, 1)
        ]
    assert (
        len(calls["vlm_token_norms"]) == 1
        and len(calls["viz_cmb_panel"]) == 4
        and len(calls["viz_hidden_norms"]) == 2
    )
    assert calls["viz_attention_image"] == [[*models, "--out_dir", f"{tmp_path}/o/attention"]]
    assert {"data/shapes/val2017", "data/shapes/annotations/captions_val2017.json", "200"} <= set(
        plain
    )
    assert {"data/shapes/questions.json", "400"} <= set(calls["psi"][0])


def test_the_shell_script_passes_its_variables_on(recorder, tmp_path):
    models, here = [tmp_path / "first", tmp_path / "second"], tmp_path / "here"
    for folder in (*models, here, here / "pictures"):
        folder.mkdir()
    for name in ("captions.json", "asked.json", "bear.jpg"):
        (here / name).touch()
    files = {
        "IMAGE_DIR": "pictures",
        "ANN_FILE": "captions.json",
        "QUESTIONS": "asked.json",
        "IMAGE": "bear.jpg",
    }
    more = {
        "RUNS": "r",
        "OUT": "o",
        "MAX_IMAGES": "5",
        "BATCH_SIZE": "4",
        "MODEL": f"{models[0]} ../second",
        "WORD": "teddy",
    }
    code, calls, output = recorder(here, **files, **more)
    assert code == 3, output
    plain, stripped = calls["run_coco_diagnostics"]
    assert [word for word in plain if word.startswith("/")] == [
        *map(str, models),
        f"{here}/pictures",
        f"{here}/captions.json",
        f"{here}/r",
    ]
    assert (
        stripped[:2] == ["--model_path", str(models[1])]
        and stripped.count("--model_path") == 1
        and stripped[-1] == "--strip_system_prompt"
    )
    pairs = [["second__sp-0"], ["first__sp-1", "second__sp-1"]]
    assert calls["analyze_coco_diagnostics"] == [
        ["--run_dir", *(f"{here}/r/{name}" for name in names)] for names in pairs
    ]
    assert {"teddy", f"{here}/bear.jpg", f"{here}/o/attention"} <= set(
        calls["viz_attention_image"][0]
    )
    assert {f"{here}/asked.json", "10", "4"} <= set(calls["psi"][0])


def test_the_shell_script_ends_where_a_command_is_wrong(recorder, tmp_path):
    given = {"OUT": "o", "MODEL": "no/such"}
    code, calls, output = recorder(tmp_path, RUNS="r", **given)
    assert code == 3 and "viz_attention_image" not in calls and "no attention overlay" in output
    (tmp_path / "python").write_text("#!/bin/sh\nexit 2\n")
    code, calls, _ = recorder(tmp_path, RUNS="r2", **given)
    assert code == 2 and len(calls) <= 1


# --- numbers --------------------------------------------------------------------------------------


def shares_of(run, *names):
    return [float(np.mean([record[name] for record in run.records()])) for name in names]


def numbers(checkout):
    """{row of the page's table: its cells}, from what the README's commands left."""
    rows = {}

    def add(row, *values):
        rows.setdefault(row, []).append(" / ".join(f"{value:.3g}" for value in values))

    for model in MODELS:
        runs = [
            rundirs.read_run(checkout / "runs" / f"{model}__sp-{sp}", rundirs.COCO) for sp in (0, 1)
        ]
        norms = json.loads(
            (
                checkout / "outputs" / "token_norms" / model / "token_norms_comparison.json"
            ).read_text()
        )
        add("norm of a text token", norms["text"]["mean_over_images"])
        add("norm of a vision token", norms["vision"]["mean_over_images"])
        for sp, run in enumerate(runs):
            add(f"CMB, sp-{sp}", np.nanmean(run.stack("head_vision_share")[1]["head_vision_share"]))
        add(
            "system / vision / user share, sp-0",
            *shares_of(
                runs[0], "mean_sys_share", "mean_vision_withsys_share", "mean_text_withsys_share"
            ),
        )
        add("vision share of vision + user, sp-0", *shares_of(runs[0], "mean_vision_share"))
        summary = json.loads((runs[0].path / "analysis" / "summary.json").read_text())
        add("mean abs(delta_gv), sp-0", summary["mean_avg_abs_delta_gv"])
        add("mean delta_alphaV, sp-0", summary["mean_avg_delta_alphaV"])
        arrays = runs[0].stack(["hidden_norms_vision", "hidden_norms_user_text"])[1]
        ratio = np.log10((arrays["hidden_norms_vision"] / arrays["hidden_norms_user_text"]).mean(0))
        add("log10 (vision / user text norm), hidden state 0, sp-0", ratio[0])
        add("the same, mean of the first 6", ratio[:6].mean())
        add(
            "normalised entropy, drawn picture",
            json.loads(
                (checkout / "outputs" / "attention" / f"attention_{model}.json").read_text()
            )["normalized_entropy"],
        )
        kinds = json.loads(
            (checkout / "runs" / "psi" / model / "analysis" / "psi.json").read_text()
        )["kinds"]
        for row, kind in (("PSI, all questions", "all"), ("PSI, left or right", "left_right")):
            value = kinds[kind]["psi"]["mean"]
            add(row, math.nan if value is None else value)
    return rows


def differences(checkout):
    """{row of the page's table of published definitions: its last cell}."""
    ours, paper = (
        rundirs.read_run(checkout / folder / "tiny-llava__sp-0", rundirs.COCO)
        for folder in ("runs", "runs/paper")
    )
    both = [
        run.stack(
            ["head_vision_share", "delta_gv", "hidden_norms_vision", "hidden_norms_user_text"]
        )[1]
        for run in (ours, paper)
    ]
    maps = [
        json.loads((checkout / "outputs" / folder / "attention_tiny-llava.json").read_text())
        for folder in ("attention", "paper/attention")
    ]
    norms = [
        json.loads((checkout / "outputs" / folder / "token_norms_comparison.json").read_text())
        for folder in ("token_norms/tiny-llava", "paper/token_norms")
    ]
    with np.load(checkout / "outputs" / "attention" / "attention_tiny-llava.npz") as arrays:
        entropy = spread.normalized_entropy
        change = abs(entropy(arrays["map"], 1e-10) - entropy(arrays["map"]))
    system, vision, text = (
        np.array([record[f"mean_{name}_share"] for record in ours.records()])
        for name in ("sys", "vision", "text")
    )
    product = (vision * (1 - system)).mean() / ((vision + text) * (1 - system) + system).mean()

    def against(what, pair):
        return f"{what} {pair[0]:.3g}, published {pair[1]:.3g}"

    last = [
        against(words, [arrays[f"hidden_norms_{name}"][:, -1].mean() for arrays in both])
        for words, name in (("vision norm", "vision"), ("user text norm", "user_text"))
    ]
    return {
        "RoPE probe: query row": against(
            "mean abs(delta_gv)", [np.nanmean(np.abs(arrays["delta_gv"])) for arrays in both]
        ),
        "CMB: a head that sees neither group": against(
            "mean CMB", [np.nanmean(arrays["head_vision_share"]) for arrays in both]
        ),
        "shares: denominator 0": against(
            "vision share", [shares_of(run, "mean_vision_share")[0] for run in (ours, paper)]
        ),
        "last hidden state": "; ".join(last),
        "overlay: row of the token": against(
            "normalised entropy", [record["normalized_entropy"] for record in maps]
        ),
        "overlay: which token": against("token", [record["token_position"] for record in maps]),
        "overlay: entropy and map": f"entropies differ by {change:.0e}",
        "three-way pie": against(
            "vision", [*shares_of(ours, "mean_vision_withsys_share"), product]
        ),
        "token norms: picture": against(
            "vision norm", [summary["vision"]["mean_over_images"] for summary in norms]
        ),
    }


def table_rows(text, table):
    """{first cell: (line, later cells)} of the table whose header starts with a word."""
    start = re.search(rf"^\| {table} \|.*\n\|[-|]+\n", text, re.MULTILINE)
    lines = text[start.end() :].split("\n\n")[0].splitlines()
    return {
        cells[0]: (line, cells[1:]) for line in lines if (cells := line.strip("| ").split(" | "))
    }


def filled(text, checkout):
    """The page with the numbers of the tiny models."""
    for table, cells in (
        ("measure", {row: [cell] for row, cell in differences(checkout).items()}),
        ("quantity", numbers(checkout)),
    ):
        rows = table_rows(text, table)
        for name, values in cells.items():
            line, old = rows[name]
            text = text.replace(
                line, f"| {' | '.join([name, *old[: len(old) - len(values)], *values])} |", 1
            )
    return text


@pytest.mark.slow
def test_the_numbers_of_the_page_are_those_of_the_tiny_models(checkout):
    text = NUMBERS.read_text()
    advice = "run python tests/test_readmes.py, which writes them"
    for table in ("measure", "quantity"):
        now = table_rows(filled(text, checkout), table)
        for name, (line, _) in table_rows(text, table).items():
            number = r"-?\d+(?:\.\d+)?(?:e[-+]?\d+)?"
            assert re.sub(number, "#", line) == re.sub(number, "#", now[name][0]), advice
            for written, found in zip(
                re.findall(number, line), re.findall(number, now[name][0]), strict=True
            ):
                loose = (
                    0.05 if "PSI" in name else 5e-4
                )  # greedy ties fall differently on other machines
                assert math.isclose(float(written), float(found), rel_tol=0.05, abs_tol=loose), (
                    f"{name}: {written} written, {found} found; {advice}"
                )


@pytest.mark.slow
def test_the_sizes_of_the_page_are_those_of_the_tiny_models(checkout):
    text = " ".join(NUMBERS.read_text().split())
    for model in MODELS:
        runs = [
            rundirs.read_run(checkout / "runs" / f"{model}__sp-{sp}", rundirs.COCO) for sp in (0, 1)
        ]
        records = [run.record("000000000001") for run in runs]
        counts = [
            {
                group: sum(end - start for start, end in parts)
                for group, parts in record["spans"].items()
            }
            for record in records
        ]
        layers, heads = runs[0].arrays("000000000001")["alphaV"].shape
        lengths = [sum(count.values()) for count in counts]
        vision, user = counts[0]["vision"], counts[0]["user"] + counts[0]["template"]
        assert (
            f"L = {layers}, H = {heads}, P = {vision} and T = {lengths[0]} " in text
            and f"system prompt, {lengths[1]} without it" in text
        )
        assert (
            f"{vision} / {vision + user} = {vision / (vision + user):.3f}" in text
            and f"role strings make {user} tokens" in text
        )
        assert (
            records[0]["chance_vision_share"]
            == records[1]["chance_vision_share"]
            == pytest.approx(vision / (vision + user))
        )


def main():
    with tempfile.TemporaryDirectory() as folder:
        checkout = make_checkout(Path(folder) / "checkout")
        done = run_commands(checkout, sys.executable)
        if done.returncode:
            sys.exit(f"{done.stdout}{done.stderr}")
        NUMBERS.write_text(filled(NUMBERS.read_text(), checkout))
        print(f"wrote {NUMBERS}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

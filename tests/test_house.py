"""The building: imports point one way, commands answer before anything heavy is loaded, versions
are written once, a wheel works in any folder."""

import ast
import contextlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest
from packaging.requirements import Requirement

from tests.conftest import ROOT

pytestmark = pytest.mark.fast

FOLDERS = ("diagnostic_tools", "swap_analysis", "visualize", "scripts", "data", "checkpoints")
COMMANDS = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
SOURCES = [ROOT / "common.py", *COMMANDS]
for folder in ("vlmdiag", "benchmarks", "tests"):
    SOURCES += sorted((ROOT / folder).rglob("*.py"))


def imports_of(path):
    """Modules that a file imports, those for types included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (f"{node.module}.{name.name}" for name in node.names)


def test_nothing_in_the_package_imports_common_or_a_command():
    for path in sorted((ROOT / "vlmdiag").rglob("*.py")):
        roots = {name.split(".")[0] for name in imports_of(path)}
        assert not roots & {"common", "benchmarks", "tests", *FOLDERS}, path


def test_commands_do_not_import_commands():
    for path in COMMANDS:
        roots = {name.split(".")[0] for name in imports_of(path)}
        assert not roots & {"benchmarks", "tests", *FOLDERS}, path


def test_families_import_no_other_room_and_pictures_none_that_reads_a_model():
    allowed = {
        "families": {"families", "pictures", "batch", "groups", "cli", "types"},
        "pictures": {"pictures", "cli", "groups", "types"},
        "model": {"model", "families", "pictures", "runs", "batch", "groups", "cli", "types"},
        "figures": {"figures", "runs", "pictures", "cli", "groups", "types"},
    }
    for room, others in allowed.items():
        for path in sorted((ROOT / "vlmdiag" / room).glob("*.py")):
            names = [name.split(".") for name in imports_of(path)]
            rooms = {name[1] for name in names if name[0] == "vlmdiag" and len(name) > 1}
            assert rooms - {"CHECKOUT"} <= others, f"{path}: {sorted(rooms - others)}"


def test_only_a_users_own_family_is_loaded_by_its_path():
    for path in SOURCES:
        text = path.read_text()
        # two stand in for an interpreter that is given a script, which sees what lies beside it
        if path.name in ("test_house.py", "warm.py", "ray_actor.py"):
            continue
        assert "sys.path" not in text, path
        if path != ROOT / "vlmdiag" / "families" / "__init__.py":
            assert "spec_from_file_location" not in text, path


HELP = """
import contextlib, importlib, io, sys
for name in sys.argv[1:]:
    module = importlib.import_module(name)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        getattr(module, "parse_args", module.main)(["--help"])
    heavy = {"torch", "transformers", "matplotlib", "pandas", "gradio"} & set(sys.modules)
    assert not heavy, f"{name} loads {', '.join(sorted(heavy))} before its arguments are parsed"
"""


def test_arguments_are_parsed_before_anything_heavy_is_loaded():
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in COMMANDS]
    done = subprocess.run(
        [sys.executable, "-c", HELP, *names], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr.splitlines()[-1]


def test_a_mistyped_flag_is_named_with_the_nearest_right_one():
    command = [sys.executable, str(ROOT / "diagnostic_tools" / "psi.py")]
    done = subprocess.run(
        [*command, "--model_path", "x", "--num_permutation", "3"], capture_output=True, text=True
    )
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "--num_permutation" in done.stderr and "did you mean --num_permutations?" in done.stderr


# --- signatures ---------------------------------------------------------------------------------


def annotations_of(function):
    """(name, annotation) of what a function takes and returns; not of *args and **options, which it
    hands on."""
    arguments = function.args.posonlyargs + function.args.args + function.args.kwonlyargs
    named = [(argument.arg, argument.annotation) for argument in arguments]
    return [*named, ("return", function.returns)]


def test_no_signature_says_any():
    """JSON's objects are Record and Fields (vlmdiag/types.py); what is read from them is not typed,
    all else is."""
    said = []
    for path in [ROOT / "common.py", *(ROOT / "vlmdiag").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                said += [
                    f"{path.relative_to(ROOT)}:{node.lineno} {node.name}, {name}"
                    for name, annotation in annotations_of(node)
                    if annotation is not None
                    and "Any" in re.findall(r"\w+", ast.unparse(annotation))
                ]
    assert not said, said


# --- versions -------------------------------------------------------------------------------------


def pins(file):
    """{package: version} of a requirements file."""
    lines = [line.split("#")[0].strip() for line in (ROOT / file).read_text().splitlines()]
    return dict(line.split("==") for line in lines if "==" in line)


def test_tested_versions_lie_in_the_ranges_and_each_has_one():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for name in ("timm", "torchvision"):  # the tests run on stand-ins (tests/stubs)
        del extras[name]
    tested = {
        "requirements.txt": project["dependencies"] + extras.pop("page"),
        "requirements-test.txt": [line for lines in extras.values() for line in lines],
    }
    for file, ranges in tested.items():
        wanted = {Requirement(line).name: Requirement(line).specifier for line in ranges}
        assert set(pins(file)) == set(wanted), file
        for name, version in pins(file).items():
            assert version in wanted[name], f"{file}: {name}=={version}, {wanted[name]}"


# --- a wheel --------------------------------------------------------------------------------------

NOTEBOOK = """
import common, vlmdiag
from common import GroupMass, capture, edit, generate, load_model
from vlmdiag.interp import lens_page
assert common.__file__.startswith({where!r}) and vlmdiag.__file__.startswith({where!r})
assert lens_page.TEMPLATE.exists()
vlm = load_model({model!r})
"""


# what a module of an optional part imports; everywhere else the base has to bring it
OPTIONAL = {
    "av": "video",
    "bitsandbytes": "quantisation",
    "gguf": "gguf",
    "gradio": "page",
    "fastapi": "page",
    "starlette": "page",
    "uvicorn": "page",
    "peft": "adapters",
    "ray": "ray",
    "sklearn": "calibration",
}


def brought_by_the_base():
    """Import names of the base dependencies and of all that these need."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    todo, found = [Requirement(line) for line in declared], set()
    while todo:
        requirement = todo.pop()
        name = requirement.name.lower().replace("_", "-")
        wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if name in found or not wanted:
            continue
        found.add(name)
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            lines = importlib.metadata.requires(name) or []
            todo += [Requirement(line) for line in lines]
    distributions = importlib.metadata.packages_distributions()
    return {
        module
        for module, names in distributions.items()
        if found & {name.lower().replace("_", "-") for name in names}
    }


def imports_at_work(path):
    """Modules that a file imports when it runs: not those for types alone."""
    tree = ast.parse(path.read_text())
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            yield from (name.name.split(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]


def test_what_the_package_and_its_commands_import_is_declared():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(OPTIONAL.values()) <= set(extras["optional-dependencies"])
    here = {*sys.stdlib_module_names, "vlmdiag", "common"}
    known = here | brought_by_the_base() | set(OPTIONAL)
    for path in [ROOT / "common.py", *COMMANDS, *sorted((ROOT / "vlmdiag").rglob("*.py"))]:
        unknown = set(imports_at_work(path)) - known
        assert not unknown, f"{path}: {', '.join(sorted(unknown))} is nobody's dependency"


@pytest.mark.slow
def test_a_wheel_works_in_a_folder_with_modules_of_these_names(tmp_path):
    source = tmp_path / "source"  # a build leaves folders behind
    for name in ("vlmdiag", "benchmarks"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("common.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
    done = subprocess.run(
        [*build, "-w", str(tmp_path / "wheel"), str(source)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    installed = tmp_path / "installed"
    (wheel,) = (tmp_path / "wheel").iterdir()
    zipfile.ZipFile(wheel).extractall(installed)
    templates = {path.name for path in (ROOT / "vlmdiag").rglob("*.html")}
    assert templates == {path.name for path in (installed / "vlmdiag").rglob("*.html")}
    work = tmp_path / "work"
    for name in ("models", "data", "scripts", "visualize", "plots"):
        (work / name).mkdir(parents=True)
        (work / name / "__init__.py").write_text("raise ImportError('not this one')")
    for name in ("stats", "cli", "grid", "engine"):
        (work / f"{name}.py").write_text("raise ImportError('not this one')")
    model = str(ROOT / "checkpoints" / "tiny-llava")
    program = NOTEBOOK.format(where=str(installed), model=model)
    environment = os.environ | {"PYTHONPATH": str(installed)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=work, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_a_citation_of_a_study_names_a_section_that_is_there():
    headings = {}
    for page in (ROOT / "docs" / "studies").glob("*.md"):
        headings[page.name] = page.read_text()
    for path in SOURCES:
        text = " ".join(path.read_text().split())
        for page, section in re.findall(
            r"docs/studies/(\w+\.md)(?:, sections? ([\d.]+|N\d))?", text
        ):
            assert page in headings, f"{path}: {page}"
            number = section.rstrip(".")
            found = re.search(rf"(^|[\s#*(]){re.escape(number)}\b", headings[page], re.MULTILINE)
            assert not number or found, f"{path}: {page} has no section {number}"

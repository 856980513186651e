"""Every experiment on a pretended GPU, and on two (tests/second_device.py): no tensor is left on
another device, and what is measured is what is measured on the CPU.

    python -m tests.test_devices LIBRARY tower llava qwen3_vl   # families, as JSON
"""

import importlib
import json
import os
import pkgutil
import shutil
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.same_bytes import COMMANDS, MODEL, SHAPES, numbers_of
from tests import random_models

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("c++"), reason="needs a C++ compiler"),
]

ROOT = Path(__file__).resolve().parents[1]
PICTURES = f"{SHAPES}/val2017/000000000001.jpg {SHAPES}/val2017/000000000002.jpg"
MORE = [
    f"diagnostic_tools/check_model.py {MODEL} --json outputs/model.json --out outputs/grid.png",
    f"diagnostic_tools/viz_attention_image.py --model_path {MODEL} --token_position 2"
    " --out_dir outputs/attention",
    f"diagnostic_tools/run_coco_diagnostics.py --model_path {MODEL} --out_root runs"
    f" --images {PICTURES} --run_name several",
    f"diagnostic_tools/relevancy_maps.py --model_path {MODEL} --out_root runs --images {PICTURES}"
    " --run_name several",
    f"diagnostic_tools/hallucination_warning.py fit --model_path {MODEL} --out_root runs"
    f" --image_dir {SHAPES}/val2017 --ann_file {SHAPES}/annotations/instances_val2017.json",
]
KINDS = {".json", ".npz"}

BUILDERS, FIRST = {}, []  # all random models; one of each family's file
for _module in pkgutil.iter_modules(random_models.__path__):
    _models = importlib.import_module(f"tests.random_models.{_module.name}").MODELS
    BUILDERS |= _models
    FIRST.append(next(iter(_models)))
# and what else has parts of its own: deepstack, shared keys and values, experts, a T5, windows
FURTHER = ["qwen3_vl", "qwen3_vl_moe", "gemma4", "gemma3-window", "blip2-t5", "nvila-s2"]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    from tests import second_device

    path = tmp_path_factory.mktemp("device") / "second_device.so"
    second_device.build(path)
    return path


def python(module, *arguments, cwd=ROOT):
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "MPLBACKEND": "Agg",
    }
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        check=False,
        cwd=cwd,
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


# ---- commands ----


def needed(line):
    """Does a command run a model, or make what another one reads?"""
    makes = ("make_shapes.py", "calculate_mean_vector.py")
    runs_model = f" {MODEL}" in line or "--model_type" in line
    return (runs_model and "--merge" not in line) or any(name in line for name in makes)


def written(folder, how, library):
    """What all commands write about a model that lies so."""
    folder.mkdir(parents=True)
    (folder / "checkpoints").symlink_to(ROOT / "checkpoints")
    lines = [line for of_kind in COMMANDS.values() for line in of_kind if needed(line)] + MORE
    commands = folder.parent / "commands.json"
    without_figures = {"swap_analysis/swap_analysis.py": ["--stage", "states"]}
    words = [line.split() for line in lines]
    commands.write_text(json.dumps([each + without_figures.get(each[0], []) for each in words]))
    python("tests.second_device", library, how, commands, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory, library):
    return written(tmp_path_factory.mktemp("cpu") / "files", "cpu", library)


def numbers_in(path, folder):
    """{place: value} of what was measured, without digests of the files themselves."""
    if path.suffix == ".json":
        return {
            place: value
            for place, value in numbers_of(json.loads(path.read_text().replace(str(folder), ".")))
            if not place.startswith(".checks") and not place.endswith(".device")
        }
    arrays = np.load(path, allow_pickle=False)
    return {"": arrays} if path.suffix == ".npy" else dict(arrays)


def is_near(one, other):
    """float32 in another order, and states that are kept in float16."""
    if not isinstance(one, float) and getattr(one, "dtype", np.dtype(int)).kind != "f":
        return np.array_equal(one, other)
    one, other = np.asarray(one, float), np.asarray(other, float)
    largest = np.nanmax(np.abs(one), initial=1e-3)
    return np.allclose(one, other, rtol=2e-3, atol=2e-4 * largest, equal_nan=True)


@pytest.mark.parametrize("how", ["one", "tower"])
def test_commands_measure_on_devices_what_they_measure_on_the_cpu(on_cpu, how, tmp_path, library):
    found = written(tmp_path / "files", how, library)
    measured = [path for path in found.glob("runs/**/per_image/*") if path.suffix in KINDS]
    measured += [*found.glob("runs/**/*states.npy"), *found.glob("outputs/**/*.json")]
    assert len(measured) > 200
    for path in measured:
        one = numbers_in(on_cpu / path.relative_to(found), on_cpu)
        other = numbers_in(path, found)
        assert one.keys() == other.keys()
        apart = [name for name in one if not is_near(one[name], other[name])]
        assert not apart, f"{path}: {apart[:5]}"


# ---- families ----


def plan_of(case):
    """Two knockouts and two ablations of any model whose vision tokens have a place."""
    from benchmarks import variants_interventions as variants
    from vlmdiag.model.attention import Block

    case.vlm.need("grid")
    batch = variants.encode(case)
    vision = batch.vision_positions(0).cpu()
    last, some = torch.zeros(2, 1, batch.input_ids.shape[1], dtype=torch.bool)
    last[0, -1] = True
    some[0, vision[:5]] = True
    blocks = {layers: Block(last, some, layers) for layers in (frozenset([0]), None)}
    with torch.no_grad():
        mean = torch.cat(case.vlm.vision(batch).pooler_output).mean(0)
    sets = {"two": np.array([1, 2]), "all": np.arange(len(vision))}
    return variants.Plan(blocks, sets, mean, [(case.samples[0].question, 4), (variants.YES_NO, 2)])


def outcomes(vlm):
    """{experiment: None, or why it refuses the model}. Other errors are raised."""
    from benchmarks import cases, variants_growth, variants_interventions, variants_swap
    from vlmdiag.cli import UsageError

    variants_interventions.make_plan = lambda case, tokens: plan_of(case)
    variants_swap.plant = lambda vlm: lambda answer: None  # whatever it answers
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        case = cases.Case(vlm, cases.make_samples(Path(folder), 2), 4, Path(folder))
        for name, (make, _) in variants_growth.EXPERIMENTS.items():
            try:
                make(case)()
                found[name] = None
            except UsageError as error:
                found[name] = str(error)
    return found


def main():
    """{model: None, or what went wrong} of some models that are placed so."""
    import common
    from tests import second_device
    from vlmdiag.model.selfcheck import check

    library, how, *names = sys.argv[1:]
    second_device.install(library)
    wrong = {}
    for name in names:
        try:
            with tempfile.TemporaryDirectory() as folder:
                vlm = common.load_model(BUILDERS[name](Path(folder) / name), self_check=False)
                wanted = outcomes(vlm)
                vlm.__dict__.pop("_rotary", None)  # is found again
                second_device.place(vlm, how)
                check(vlm)
                found = outcomes(vlm)
            wrong[name] = None if found == wanted else f"{wanted} became {found}"
        except Exception:
            wrong[name] = traceback.format_exc()
    print("\n" + json.dumps(wrong))


MANY = sorted({*FIRST, *FURTHER})
FEW = ["llava", "molmo-d", "qwen2_vl"]


@pytest.mark.parametrize(("how", "names"), [("one", MANY), ("tower", MANY), ("offload", FEW)])
def test_families_run_on_one_device_on_two_and_partly_offloaded(how, names, library):
    wrong = json.loads(python("tests.test_devices", library, how, *names).split("\n")[-2])
    assert list(wrong) == names
    assert not any(wrong.values()), "\n".join(f"{name}: {error}" for name, error in wrong.items())


def test_the_pretended_device_refuses_what_a_gpu_refuses(library, tmp_path):
    script = tmp_path / "refuses.py"
    script.write_text(
        "import sys, torch\n"
        "from tests import second_device\n"
        "second_device.install(sys.argv[1])\n"
        "here, there = (torch.ones(3, 3).to(f'pretend:{n}') for n in (0, 1))\n"
        "host = torch.ones(3, 3)\n"
        "assert (here + torch.tensor(2.0)).sum().item() == 27\n"
        "assert here[torch.tensor([0, 2])].shape == (2, 3)\n"
        "assert torch.equal((there @ there).cpu(), host @ host)\n"
        "wrong = [lambda: here + there, lambda: here @ host, lambda: torch.cat([here, there]),\n"
        "         lambda: here.numpy(), lambda: here[torch.tensor([0]).to('pretend:1')],\n"
        "         lambda: here.double(), lambda: host.double().to('pretend:0'),\n"
        "         lambda: torch.where(host > 0, here, here), lambda: host.mul_(here)]\n"
        "for call in wrong:\n"
        "    try:\n"
        "        call()\n"
        "    except (RuntimeError, TypeError):\n"
        "        continue\n"
        "    raise SystemExit('not refused')\n"
    )
    done = subprocess.run(
        [sys.executable, str(script), str(library)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    main()

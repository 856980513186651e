"""Runs that are killed at any file operation, or at any time, end with the bytes of one that was
not (tests/kills.py does as much of it as is wanted); so do shards that start together where there
are no hard links, and a run whose inputs have changed does not go on."""

import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

from tests.conftest import ROOT
from tests.kills import KINDS, digests

# a file system without hard links, as FAT and some network shares, on which making states.npy takes
# a while: a slow disk writes all its zeros
WITHOUT_LINKS = """
import os, runpy, sys, time

def link(source, target, **options):
    raise OSError(1, "Operation not permitted")

def truncate(descriptor, size, real=os.ftruncate):
    time.sleep({seconds})
    real(descriptor, size)

os.link, os.ftruncate = link, truncate
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("kind", ["coco", "swap", "mean"])
def test_a_killed_run_goes_on_to_the_same_bytes(kind):
    command = [sys.executable, "-m", "tests.kills", "--kinds", kind, "--trials", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 of 2 trials end in the same bytes" in done.stdout
    assert int(re.search(r"(\d+) calls killed", done.stdout)[1]) >= 1


def start(python, script, *arguments):
    """Popen of a command of the repository."""
    return subprocess.Popen(
        [*python, str(ROOT / script), *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture
def call(warm_python):
    """call(command) -> (exit code, what it printed)."""

    def run(command):
        process = start([warm_python], *command)
        said = process.communicate(timeout=300)[0]
        return process.returncode, said

    return run


@pytest.fixture
def make_data(call):
    def make(folder, seed):
        shutil.rmtree(folder, ignore_errors=True)
        flags = ["--num_images", "24", "--num_train", "40", "--seed", str(seed)]
        code, said = call(["data/make_shapes.py", "--out_dir", str(folder), *flags])
        assert code == 0, said

    return make


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["coco", "swap", "mean"])
def test_other_pictures_under_the_same_names_are_measured_or_an_error(
    kind, tmp_path, call, make_data
):
    data = tmp_path / "shapes"
    make_data(data, seed=0)
    again, fresh = (KINDS[kind].commands(str(tmp_path / name), data)[0] for name in ("a", "b"))
    code, said = call(again)
    assert code == 0, said
    make_data(data, seed=5)
    code, said = call(again)
    assert call(fresh)[0] == 0
    assert code or digests(tmp_path / "a") == digests(tmp_path / "b"), said


@pytest.mark.slow
def test_shards_that_start_together_without_hard_links_keep_each_others_states(
    tmp_path, call, make_data
):
    make_data(tmp_path / "shapes", seed=0)
    whole, sharded = (
        KINDS["swap"].commands(str(tmp_path / name), tmp_path / "shapes")[0]
        for name in ("whole", "sharded")
    )
    assert call(whole)[0] == 0
    shards = []
    for index, seconds in enumerate((6, 12)):
        python = [sys.executable, "-c", WITHOUT_LINKS.format(seconds=seconds)]
        shards.append(start(python, *sharded, "--shard", f"{index}/2"))
    for shard in shards:
        said = shard.communicate(timeout=300)[0]
        assert shard.returncode == 0, said
    states = [np.load(next((tmp_path / name).rglob("states.npy"))) for name in ("whole", "sharded")]
    assert np.array_equal(*states)

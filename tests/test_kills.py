"""Runs that are killed at any file operation, or at any time, end with the bytes of one that was not.
tests/kills.py does as much of it as is wanted."""

import os
import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("kind", ["coco", "swap", "mean"])
def test_a_killed_run_goes_on_to_the_same_bytes(kind):
    command = [sys.executable, "-m", "tests.kills", "--kinds", kind, "--trials", "4"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 of 4 trials end in the same bytes" in done.stdout
    assert int(re.search(r"(\d+) calls killed", done.stdout)[1]) >= 1

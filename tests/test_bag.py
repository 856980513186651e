"""Malformed inputs of every kind are answered in one line by every script (tests/bag.py has them
all, a part of it runs here)."""

import os
import subprocess
import sys

import pytest

from tests import bag
from tests.conftest import ROOT

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.mark.fast
def test_the_bag_is_large_and_its_names_tell_cases_apart():
    names = [case.name for case in bag.cases()]
    assert len(names) >= 300 and len(set(names)) == len(names)


@pytest.mark.parametrize(
    "every", [pytest.param(29, marks=pytest.mark.slow), pytest.param(1, marks=pytest.mark.campaign)]
)
def test_malformed_inputs_are_answered_in_one_line(every):
    command = [sys.executable, "-m", "tests.bag", "--every", str(every)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

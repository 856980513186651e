"""--shard auto by what launchers say, run_slurm.sh on a stand-in for SLURM, and the lines of a
log."""

import io
import itertools
import json
import os
import re
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT
from vlmdiag import cli
from vlmdiag.runs import progress, shards

pytestmark = pytest.mark.fast


def array(index, *indices, step=1):
    """What SLURM sets for a task of an array."""
    names = {"ID": index, "COUNT": len(indices), "MIN": min(indices), "MAX": max(indices)}
    return {f"SLURM_ARRAY_TASK_{k}": str(v) for k, v in (names | {"STEP": step}).items()}


def task(index, count):
    """What srun sets; SLURM_NTASKS is what the job asked for."""
    numbers = {"SLURM_PROCID": index, "SLURM_STEP_NUM_TASKS": count, "SLURM_NTASKS": 8}
    return {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"} | {k: str(v) for k, v in numbers.items()}


def rank(index, count, agents=1):
    """What torchrun sets."""
    return {"RANK": str(index), "WORLD_SIZE": str(count), "GROUP_WORLD_SIZE": str(agents)}


@pytest.mark.parametrize(
    ("environment", "shard"),
    [
        (array(0, 0, 1, 2, 3), (0, 4)),
        (array(3, 0, 1, 2, 3), (3, 4)),
        (array(5, 5, 6, 7), (0, 3)),
        (array(7, 1, 3, 5, 7, step=2), (3, 4)),
        ({"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": "5"}, (2, 5)),
        ({"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_MAX": "5"}, (2, 6)),
        (task(1, 4), (1, 4)),
        (task(0, 1), (0, 1)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, (0, 4)),
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "4"}, (3, 4)),
        (rank(2, 8), (2, 8)),
        (rank(0, 1), (0, 1)),
        # the batch script of a job with one task, on its own or in an array
        ({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, (0, 1)),
        (
            array(2, 0, 1, 2) | {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"},
            (2, 3),
        ),
        (array(1, 0, 1, 2) | task(3, 4), (7, 12)),
        (array(1, 0, 1) | rank(2, 4), (6, 8)),
        # torchrun on the nodes of one srun, and one by itself in each task
        (task(1, 2) | rank(5, 8, agents=2), (5, 8)),
        (task(1, 2) | rank(3, 4), (7, 8)),
        # a script that exports both
        (task(1, 4) | {"RANK": "1", "WORLD_SIZE": "4"}, (1, 4)),
        # an allocation by salloc: nothing of it is a shard
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"} | rank(1, 2), (1, 2)),
    ],
)
def test_a_process_finds_its_shard(environment, shard):
    assert shards.auto(environment) == shard


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({}, "none is set: give i/n"),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}, "none is set"),
        ({"SLURM_ARRAY_TASK_ID": "3"}, "neither SLURM_ARRAY_TASK_COUNT"),
        (array(3, 1, 3, 7), "no range from 1 in steps of 1.* submit a range such as 0-2"),
        (array(2, 1, 3, 5, step=2), "2 is none of them"),
        (array(9, 0, 1), "9 is none of them"),
        ({"SLURM_ARRAY_TASK_ID": "x", "SLURM_ARRAY_TASK_COUNT": "2"}, "is 'x', which is no number"),
        ({"SLURM_PROCID": "1"}, "SLURM_PROCID is set and .*SLURM_NTASKS is not"),
        ({"SLURM_PROCID": "4", "SLURM_NTASKS": "4"}, "both count from 0"),
        ({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, "with srun"),
        ({"RANK": "1"}, "RANK is set and WORLD_SIZE is not"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is set and RANK is not"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "no number"),
        (task(1, 4) | {"RANK": "0", "WORLD_SIZE": "4"}, "srun says task 1 of 4 and RANK"),
        (task(1, 4) | rank(1, 6, agents=3), "give i/n"),
    ],
)
def test_what_does_not_fit_is_one_line_and_exit_code_2(environment, words, monkeypatch, capsys):
    for name in [*os.environ]:
        if name.startswith("SLURM_") or name in ("RANK", "WORLD_SIZE", "GROUP_WORLD_SIZE"):
            monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    parser = cli.parser("")
    cli.add_run_arguments(parser)
    with pytest.raises(SystemExit) as end:
        parser.parse_args(["--shard", "auto"])
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1 and re.search(words, said), said


@pytest.mark.parametrize(("jobs", "tasks", "ranks"), [(3, 2, 4), (1, 3, 1), (4, 1, 2), (2, 3, 3)])
def test_all_processes_together_are_all_shards_once(jobs, tasks, ranks):
    found = []
    for j, t, r in itertools.product(range(jobs), range(tasks), range(ranks)):
        environment = array(j + 5, *range(5, 5 + jobs)) | task(t, tasks) | rank(r, ranks)
        found.append(shards.auto(environment))
    count = jobs * tasks * ranks
    assert sorted(found) == [(i, count) for i in range(count)]


# --- run_slurm.sh ---------------------------------------------------------------------------------

SBATCH = """#!/usr/bin/env python3
import json, os, subprocess, sys
words = sys.argv[1:]
at = next(n for n, word in enumerate(words) if word.endswith("run_slurm.sh"))
options, command = words[:at], words[at:]
jobs = os.path.join(os.environ["FAKE"], "jobs")
number = str(100 + len(open(jobs).readlines()) if os.path.exists(jobs) else 100)
open(jobs, "a").write(json.dumps([options, command[1:]]) + "\\n")
array = [option.split("=")[1] for option in options if option.startswith("--array=")]
first, last = map(int, array[0].split("-")) if array else (0, 0)
for index in range(first, last + 1):
    own = dict(os.environ, SLURM_JOB_ID=number, SLURM_PROCID="0", SLURM_CPUS_PER_TASK="3",
               SLURM_NTASKS=os.environ.get("TASKS", "1"))
    if array:
        own |= dict(SLURM_ARRAY_JOB_ID=number, SLURM_ARRAY_TASK_ID=str(index),
                    SLURM_ARRAY_TASK_COUNT=str(last - first + 1), SLURM_ARRAY_TASK_MIN=str(first),
                    SLURM_ARRAY_TASK_MAX=str(last), SLURM_ARRAY_TASK_STEP="1")
    done = subprocess.run(["bash", *command], env=own, capture_output=True, text=True)
    with open(os.path.join(os.environ["FAKE"], "log"), "a") as log:
        log.write(done.stdout + done.stderr + f"exit {done.returncode}\\n")
print(number + ";cluster")
"""
SRUN = """#!/usr/bin/env python3
import os, subprocess, sys
count = int(sys.argv[1].removeprefix("--ntasks="))
command = [word for word in sys.argv[2:] if not word.startswith("--kill-on-bad-exit")]
assert os.environ["SRUN_CPUS_PER_TASK"] == "3"
worst = 0
for task in range(count):
    step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": str(count), "SLURM_PROCID": str(task)}
    own = os.environ | step
    worst = max(worst, subprocess.run(command, env=own).returncode)
sys.exit(worst)
"""
SCONTROL = """#!/bin/sh
echo "$@" >> "$FAKE/requeued"
"""
# a command that is like those that fill a run directory
COMMAND = """
import json, os, signal, sys, time
from vlmdiag import cli
parser = cli.parser("")
cli.add_run_arguments(parser)
parser.add_argument("--then", action="store_true")
parser.add_argument("--slow", action="store_true")
args = parser.parse_args()
line = "then" if args.then else json.dumps(args.shard)
open(os.path.join(os.environ["FAKE"], "shards"), "a").write(line + "\\n")
if args.slow and args.shard != (0, 1):
    # SLURM's signal to the batch script, which has started srun, which has started the task
    parent = lambda process: int(open(f"/proc/{process}/stat").read().split(") ")[1].split()[1])
    os.kill(parent(parent(os.getppid())), signal.SIGUSR1)
    time.sleep(2)
sys.exit(3 if args.shard == (1, 2) else 0)
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """slurm(arguments, **environment) -> (exit code, output) of run_slurm.sh, where SLURM's
    commands stand in for it: jobs run at once, one after the other."""
    for name, text in (("sbatch", SBATCH), ("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "measure.py").write_text(COMMAND)
    for name in [*os.environ]:
        if name.startswith(("SLURM_", "SRUN_")) or name in ("RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name)

    def call(*arguments, **more):
        path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
        own = os.environ | {"PATH": path, "FAKE": str(tmp_path), "PYTHON": sys.executable} | more
        own["PYTHONPATH"] = str(ROOT)
        command = ["bash", str(ROOT / "run_slurm.sh"), *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=own, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    return call


def lines(path):
    return path.read_text().splitlines() if path.exists() else []


def test_one_template_submits_an_array_and_what_follows_it(slurm, tmp_path):
    options = "--gpus=1 --time=12:00:00"
    code, said = slurm(
        "2", "measure.py", "--run_name", "a b", SBATCH=options, THEN="measure.py --then"
    )
    assert code == 0 and "array 100 of 2 jobs, then 101" in said, said
    assert lines(tmp_path / "shards") == ["[0, 2]", "[1, 2]", "[0, 1]", "then"]
    (of_array, array_command), (of_merge, merge_command) = map(json.loads, lines(tmp_path / "jobs"))
    assert {"--gpus=1", "--time=12:00:00", "--array=0-1", "--job-name=measure"} <= set(of_array)
    assert {"--gpus=1", "--dependency=afterany:100", "--job-name=measure-merge"} <= set(of_merge)
    assert array_command == ["--task", "measure.py", "--run_name", "a b"]
    assert merge_command == ["--merge", "measure.py", "--run_name", "a b"]
    # failed items are no failed job
    log = (tmp_path / "log").read_text()
    assert log.count("exit 0\n") == 3 and log.count("some items failed") == 1, log


def test_tasks_within_the_jobs_of_an_array_are_shards_of_their_own(slurm, tmp_path):
    assert slurm("2", "measure.py", TASKS="3")[0] == 0
    found = lines(tmp_path / "shards")
    assert found == [f"[{i}, 6]" for i in range(6)] + ["[0, 1]"]


def test_an_error_is_the_jobs_and_the_rest_goes_on(slurm, tmp_path):
    (tmp_path / "measure.py").write_text("import sys; sys.exit(2 if '--shard' in sys.argv else 0)")
    assert slurm("2", "measure.py")[0] == 0
    assert [line for line in lines(tmp_path / "log") if line[:5] == "exit "] == ["exit 2"] * 2 + [
        "exit 0"
    ]


@pytest.mark.parametrize(
    ("codes", "code"),
    [
        ((3, 2, 0), 2),
        ((2, 3, 3), 2),
        ((1, 3, 0), 1),
        ((3, 0, 3), 0),
        ((0, 0, 0), 0),
        ((3, 9, 2), 9),
    ],
)
def test_a_job_of_several_tasks_ends_with_the_worst_error(slurm, tmp_path, codes, code):
    """srun's own code is the greatest: 3, done with failures, would hide a 2, a wrong call."""
    (tmp_path / "measure.py").write_text(
        "import os, sys\n"
        f"sys.exit({codes}[int(os.environ['SLURM_PROCID'])] if '--shard' in sys.argv else 0)"
    )
    assert slurm("1", "measure.py", "--run_name", "a b", TASKS="3")[0] == 0
    log = lines(tmp_path / "log")
    assert [line for line in log if line[:5] == "exit "] == [f"exit {code}", "exit 0"]
    assert log.count("some items failed, see failures/ in the run directory") == codes.count(3)


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="needs /proc")
def test_a_job_whose_time_is_nearly_over_is_queued_again(slurm, tmp_path):
    assert slurm("2", "measure.py", "--slow")[0] == 0
    assert lines(tmp_path / "requeued") == ["requeue 100_0", "requeue 100_1"]


def test_nothing_is_submitted_by_a_wrong_call_or_a_dry_run(slurm, tmp_path):
    for wrong in (
        [],
        ["0", "measure.py"],
        ["2"],
        ["2", "no.py"],
        ["2", "measure.py", "--shard", "0/2"],
    ):
        code, said = slurm(*wrong)
        assert code == 2 and said.startswith("error: ") and said.count("\n") == 1, said
    code, said = slurm("2", "measure.py", DRY="1", SBATCH="--gpus=1")
    assert code == 0 and said.count("sbatch --gpus=1 --job-name=measure") == 2
    assert not (tmp_path / "jobs").exists()


def test_the_template_is_right_for_the_shell_and_for_sbatch():
    text = (ROOT / "run_slurm.sh").read_text()
    assert os.access(ROOT / "run_slurm.sh", os.X_OK)
    head = list(itertools.takewhile(lambda line: line.startswith("#"), text.splitlines()))
    assert sum(line.startswith("#SBATCH ") for line in head) >= 4  # before any command
    assert subprocess.run(["bash", "-n", str(ROOT / "run_slurm.sh")]).returncode == 0


# --- progress -------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    """A clock that is set by hand."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])

    def forward(seconds):
        now[0] += seconds

    return forward


def test_a_log_gets_a_line_a_minute(clock, capsys):
    with progress.Progress(1000, "images") as bar:
        for n in range(100):
            clock(7)
            bar.update(2, failed=int(n % 25 == 0))
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 700 // 63
    assert said[0] == "images: 18 of 1000 (1.8%), 1 failed, 0.29 per s, 57 min left"
    assert said[-1].startswith("images: 198 of 1000 (19.8%), 4 failed, 0.29 per s, 47 min left")


def test_the_rate_is_that_of_the_last_ten_minutes(clock, capsys):
    with progress.Progress(10_000, "pairs") as bar:
        for _ in range(20):  # 10 per s
            clock(60)
            bar.update(600 - 60 * 9)
        for _ in range(11):  # then 0.05 per s
            clock(60)
            bar.update(3)
    said = capsys.readouterr().err.splitlines()
    assert "1.00 per s" in said[19] and "3.00 per min" in said[-1]
    assert re.search(r"2 d \d+ h left", said[-1]), said[-1]


def test_a_short_loop_says_nothing_and_one_that_stands_still_says_so(clock, capsys):
    with progress.Progress(10, "images") as bar:
        clock(59)
        bar.update(10)
    assert capsys.readouterr().err == ""
    with progress.Progress(10, "images") as bar:
        clock(60)
        bar.update(0)
    assert "0 of 10 (0.0%), 0 failed, 0.00 per min, standing still" in capsys.readouterr().err


def test_a_terminal_has_a_bar(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress.Progress(4, "images") as bar:
        bar.update(2)
        time.sleep(0.15)
        bar.update(2, failed=1)
    said = terminal.getvalue()
    assert "images" in said and "4/4" in said and "failed=1" in said


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min"),
        (3599, "1 h 0 min"),
        (27_600, "7 h 40 min"),
        (190_000, "2 d 5 h"),
    ],
)
def test_durations_are_short(seconds, words):
    assert progress._duration(seconds) == words

"""The engine: killed, sharded and resumed runs give the same bytes; every kind of failure costs as
little as it can."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tqdm import tqdm

from vlmdiag.cli import UsageError
from vlmdiag.runs import disk, leases, rundirs
from vlmdiag.runs.engine import exit_code, run_items
from vlmdiag.runs.rundirs import open_run, read_run

ROOT = Path(__file__).resolve().parent.parent


def items(n):
    return [SimpleNamespace(id=f"{i:03d}", image=f"{i}.jpg", n=i) for i in range(n)]


def load(item):
    return item.n


def process(numbers):
    """Results that depend on the whole batch, so that a batch cut differently gives other bytes."""
    return [
        (
            {"image_id": n, "caption": f"{n} of {numbers}"},
            {"a": np.arange(n + 3) / (1 + sum(numbers)), "b": np.float32(n)},
        )
        for n in numbers
    ]


def new(folder):
    return open_run(folder, "demo", {"model": "tiny"})


@pytest.fixture(autouse=True, scope="module")
def short_leases():
    with pytest.MonkeyPatch.context() as patch:
        shorten_leases(patch.setattr)
        yield


def shorten_leases(setattr=setattr):
    """So that no run waits a minute for one that was killed while it made a file."""
    setattr(leases, "BEAT", 0.05)
    setattr(leases, "PERIOD", 0.4)


def contents(run):
    return {path.name: path.read_bytes() for path in (run.path / "per_image").iterdir()}


_reference = {}


def reference(n, batch_size):
    """What an uninterrupted single process writes."""
    if (n, batch_size) not in _reference:
        with tempfile.TemporaryDirectory() as folder:
            run_items(run := new(folder), items(n), load, process, batch_size)
            _reference[n, batch_size] = contents(run)
    return _reference[n, batch_size]


# ---- the same bytes ----


class Killed(BaseException):
    pass


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 9),
    batch_size=st.integers(1, 4),
    workers=st.sampled_from([0, 2]),
    kills=st.lists(
        st.tuples(st.sampled_from(["replace", "fsync", "process"]), st.integers(1, 12)),
        min_size=1,
        max_size=3,
    ),
)
def test_a_run_killed_at_any_point_resumes_to_the_same_bytes(n, batch_size, workers, kills):
    with tempfile.TemporaryDirectory() as folder:
        for where, kth in kills:
            calls, real = Counter(), {"replace": os.replace, "fsync": os.fsync}

            def dying(name, function, calls=calls, where=where, kth=kth):
                def call(*args):
                    calls[name] += 1
                    if calls[where] >= kth:  # and everything after it, as in a dead process
                        raise Killed
                    return function(*args)

                return call

            with pytest.MonkeyPatch.context() as patched:
                for name, function in real.items():
                    patched.setattr(os, name, dying(name, function))
                with contextlib.suppress(Killed):
                    run_items(
                        new(folder),
                        items(n),
                        load,
                        dying("process", process),
                        batch_size,
                        num_workers=workers,
                    )
            for path in Path(folder, "per_image").glob("*.json"):  # what is marked done is whole
                json.loads(path.read_text())
                assert (
                    path.with_suffix(".npz").read_bytes()
                    == reference(n, batch_size)[path.stem + ".npz"]
                )
        run = new(folder)
        counts = run_items(run, items(n), load, process, batch_size, num_workers=workers)
        assert counts["done"] + counts["skipped"] == n and counts["failed"] == 0
        assert contents(run) == reference(n, batch_size)


def kill_and_resume(folder):
    """Fork a run, kill it after a short while, three times a folder; then finish it. Returns how
    many were killed while they ran."""

    shorten_leases()
    # tqdm's own lock is one for all forks: who is killed with it leaves it locked for ever
    tqdm.set_lock(threading.RLock())

    def slow(numbers):
        time.sleep(0.005)
        return process(numbers)

    interrupted = 0
    for seed in range(12):
        for delay in np.random.default_rng(seed).uniform(0, 0.06, 3):
            child = os.fork()
            if child == 0:
                try:
                    run_items(new(folder / str(seed)), items(24), load, slow, 3, num_workers=2)
                finally:
                    os._exit(0)
            time.sleep(delay)
            os.kill(child, signal.SIGKILL)
            interrupted += os.WIFSIGNALED(os.waitpid(child, 0)[1])
        run_items(run := new(folder / str(seed)), items(24), load, slow, 3)
        # and temporary files of the killed, until they are dead (runs.leases)
        found = {name: data for name, data in contents(run).items() if not name.startswith(".")}
        assert found == reference(24, 3)
    return interrupted


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_process_killed_by_the_system_resumes_to_the_same_bytes(tmp_path):
    """In a process of its own: forking one that has run threads may leave locks held."""
    code = (
        "import pathlib, sys; from tests import test_engine; print('killed',"
        " test_engine.kill_and_resume(pathlib.Path(sys.argv[1])))"
    )
    command, path = [sys.executable, "-c", code, str(tmp_path)], str(ROOT)
    done = subprocess.run(
        command,
        check=False,
        capture_output=True,
        text=True,
        timeout=200,
        env=os.environ | {"PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) >= 6


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_shards_give_the_same_bytes_as_one_process(tmp_path, order):
    run, parts = new(tmp_path), []
    for index in order:
        parts.append(run_items(new(tmp_path), items(20), load, process, 3, shard=(index, 3)))
    assert contents(run) == reference(20, 3) and [part["done"] for part in parts] == [
        {0: 8, 1: 6, 2: 6}[index] for index in order
    ]
    assert run_items(run, items(20), load, process, 3) == {"done": 0, "skipped": 20, "failed": 0}


def test_shards_at_the_same_time_share_a_run(tmp_path):
    threads = [
        threading.Thread(
            target=run_items, args=(new(tmp_path), items(20), load, process, 3, (i, 4))
        )
        for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert contents(new(tmp_path)) == reference(20, 3)


def test_a_run_grows_and_its_batches_stay(tmp_path):
    run_items(new(tmp_path), items(9), load, process, 3)
    run = new(tmp_path)
    assert run_items(run, items(20), load, process, 3) == {"done": 11, "skipped": 9, "failed": 0}
    assert contents(run) == reference(20, 3)


def test_a_batch_with_a_missing_item_is_computed_whole_and_only_that_item_written(tmp_path):
    run = new(tmp_path)
    run_items(run, items(9), load, process, 3)
    (tmp_path / "per_image/004.json").unlink()
    stamps = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "per_image").iterdir()}
    seen = []
    counts = run_items(
        run, items(9), load, lambda numbers: seen.append(numbers) or process(numbers), 3
    )
    assert (
        seen == [[3, 4, 5]]
        and counts == {"done": 1, "skipped": 8, "failed": 0}
        and contents(run) == reference(9, 3)
    )
    changed = {
        path.name
        for path in (tmp_path / "per_image").iterdir()
        if stamps.get(path.name) != path.stat().st_mtime_ns
    }
    assert changed == {"004.json", "004.npz"}


@pytest.mark.parametrize("workers", [1, 5])
def test_loading_threads_change_nothing_and_do_not_run_far_ahead(tmp_path, workers):
    loaded, consumed, ahead = Counter(), Counter(), []

    def jittery(item):
        time.sleep(random.random() * 0.002)
        loaded[threading.current_thread() is threading.main_thread()] += 1
        return item.n

    def watching(numbers):
        ahead.append(sum(loaded.values()) - sum(consumed.values()))
        consumed[0] += len(numbers)
        return process(numbers)

    run_items(run := new(tmp_path), items(40), jittery, watching, 3, num_workers=workers)
    assert contents(run) == reference(40, 3) and loaded == {False: 40}
    assert max(ahead) <= max(3 * 3, 2 * workers + 2 * 3)


# ---- failures ----


def test_a_picture_that_does_not_load_fails_alone(tmp_path, capsys):
    def picky(item):
        if item.n == 4:
            raise ValueError("4.jpg: truncated")
        return item.n

    for workers in (0, 2):
        run = new(tmp_path / str(workers))
        counts = run_items(run, items(9), picky, process, 3, num_workers=workers)
        assert counts == {"done": 8, "skipped": 0, "failed": 1} and exit_code(counts, run) == 3
        assert (
            "1 of 9 items failed" in (said := capsys.readouterr().out)
            and str(run.path / "failures") in said
        )
        failure = run.failed()["004"]
        assert failure["message"] == "4.jpg: truncated" and failure["facts"] == {
            "stage": "load",
            "image": "4.jpg",
        }
        counts = run_items(run, items(9), load, process, 3)  # tried again by the next call
        assert (
            counts == {"done": 1, "skipped": 8, "failed": 0}
            and run.failed() == {}
            and exit_code(counts) == 0
        )


def test_an_item_that_breaks_its_batch_fails_alone_and_is_tried_once_per_call(tmp_path):
    tried = Counter()

    def breaks(numbers):
        tried.update(numbers)
        if 4 in numbers:
            raise KeyError("no such token")
        return process(numbers)

    run = new(tmp_path)
    for call in (1, 2):
        counts = run_items(run, items(9), load, breaks, 3)
        assert (
            counts["failed"] == 1
            and run.failed()["004"]["type"] == "KeyError"
            and run.failed()["004"]["facts"]["stage"] == "process"
        )
        assert tried[4] == 2 * call  # with its batch, then alone
    assert run.ids() == [item.id for item in items(9) if item.n != 4]
    assert tried[0] == 1 and tried[3] == 3  # done items are not computed alone again


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried"),
        MemoryError(),
        RuntimeError("MPS backend out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_out_of_memory_halves_the_batch(tmp_path, error):
    sizes = []

    def hungry(numbers):
        sizes.append(len(numbers))
        if len(numbers) > 2:
            raise error
        return process(numbers)

    run = new(tmp_path)
    assert run_items(run, items(7), load, hungry, 7) == {"done": 7, "skipped": 0, "failed": 0}
    assert sizes == [7, 4, 2, 2, 3, 2, 1] and run.counters()["oom_halvings"] == 3


def test_what_was_computed_is_counted_with_its_time_and_memory(tmp_path):
    def slow(numbers):
        time.sleep(0.05)
        return process(numbers)

    run = new(tmp_path)
    for first, now in ((6, 6), (10, 4), (10, 0)):  # the last call has nothing left to do
        before = run.counters()
        run_items(run, items(first), load, slow, 2)
        after = run.counters()
        assert after["items_measured"] - before.get("items_measured", 0) == now
        spent = after["milliseconds"] - before.get("milliseconds", 0)
        assert spent >= 50 * now / 2 if now else spent == 0
    assert after["peak_mib"] > 20 and "peak_gpu_mib" not in after


def test_out_of_memory_in_any_forward_gives_every_item(tmp_path):
    for kth in range(1, 9):
        calls = Counter()

        def kth_fails(numbers, calls=calls, kth=kth):
            calls[0] += 1
            if calls[0] == kth and len(numbers) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return process(numbers)

        run = new(tmp_path / str(kth))
        assert run_items(run, items(10), load, kth_fails, 4)["done"] == 10
        assert run.ids() == [item.id for item in items(10)]


def test_the_failed_pass_is_freed_before_the_halves_run(tmp_path):
    held = []

    class Tensor:
        pass

    def hungry(numbers):
        activations = Tensor()
        assert all(other() is None for other in held), "an earlier pass is still in memory"
        held.append(weakref.ref(activations))
        if len(numbers) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return process(numbers)

    assert run_items(new(tmp_path), items(4), load, hungry, 4)["failed"] == 0 and len(held) == 7


def test_out_of_memory_at_batch_one_is_that_items_failure(tmp_path):
    def hungry(numbers):
        if 2 in numbers:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return process(numbers)

    run = new(tmp_path)
    assert (
        run_items(run, items(4), load, hungry, 4) == {"done": 3, "skipped": 0, "failed": 1}
        and run.failed()["002"]["type"] == "OutOfMemoryError"
    )


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: device-side assert triggered"),
        torch.AcceleratorError("an illegal memory access was encountered"),
        UsageError("no such layer"),
        KeyboardInterrupt(),
    ],
)
def test_what_no_retry_can_mend_ends_the_run_with_everything_before_it_written(
    tmp_path, error, batch_size
):
    def third(numbers):
        if 6 in numbers:
            raise error
        return process(numbers)

    run = new(tmp_path)
    with pytest.raises(type(error)):
        run_items(run, items(9), load, third, batch_size, num_workers=2)
    assert run.ids() == [item.id for item in items(6)] and run.failed() == {}
    run_items(run, items(9), load, process, batch_size)
    assert contents(run) == reference(9, batch_size)


def test_a_usage_error_while_loading_ends_the_run(tmp_path):
    def wrong(item):
        raise UsageError("no such image folder")

    for workers in (0, 2):
        with pytest.raises(UsageError, match="no such image folder"):
            run_items(run := new(tmp_path), items(3), wrong, process, num_workers=workers)
    assert run.failed() == {}


def test_a_full_disk_stops_the_run_soon_and_what_is_written_stays(tmp_path, monkeypatch):
    run, write, computed = new(tmp_path), disk.write, []

    def full(path, data, **options):
        if path.name == "005.npz":
            raise UsageError("the disk is full")
        return write(path, data, **options)

    monkeypatch.setattr(disk, "write", full)
    with pytest.raises(UsageError, match="the disk is full"):
        run_items(
            run,
            items(60),
            load,
            lambda numbers: computed.append(numbers) or time.sleep(0.002) or process(numbers),
        )
    assert (
        len(computed) < 30
        and run.ids()[:5] == [item.id for item in items(5)]
        and not run.is_done("005")
    )
    monkeypatch.setattr(disk, "write", write)
    run_items(run, items(60), load, process)
    assert contents(run) == reference(60, 1)


def test_results_wait_for_the_disk_only_up_to_a_bound(tmp_path, monkeypatch):
    computed, written, ahead = Counter(), Counter(), []
    run, write = new(tmp_path), rundirs.Run.write

    def slow(self, *args, **options):
        time.sleep(0.003)
        written[0] += 1
        return write(self, *args, **options)

    def counting(numbers):
        ahead.append(computed[0] - written[0])
        computed[0] += len(numbers)
        return process(numbers)

    monkeypatch.setattr(rundirs.Run, "write", slow)
    run_items(run, items(30), load, counting, 2)
    assert max(ahead) <= 2 * 2 + 3 and written[0] == 30


def test_wrong_numbers_of_results_are_not_an_items_failure(tmp_path):
    with pytest.raises(RuntimeError, match="returned 1 results for 3 items"):
        run_items(run := new(tmp_path), items(3), load, lambda numbers: process(numbers)[:1], 3)
    assert run.failed() == {}


def test_an_id_that_occurs_twice_is_refused(tmp_path):
    with pytest.raises(UsageError, match="the id 001 occurs more than once"):
        run_items(new(tmp_path), items(3) + items(2)[1:], load, process)


def test_one_closing_line_says_what_happened(tmp_path, capsys):
    run = new(tmp_path)
    run_items(run, items(3), load, process)
    run_items(run, items(5), load, process, progress="pictures")
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("images: 3 computed, 0 done before, 0 failed") and second.startswith(
        "pictures: 2 computed, 3 done before"
    )
    assert read_run(tmp_path, "demo").ids() == run.ids()

"""What a process removes or makes in a folder that other machines share: without hard links,
process ids, host names, or clocks that agree."""

import os
import threading
import time

import pytest

from vlmdiag.cli import UsageError
from vlmdiag.runs import disk, leases
from vlmdiag.runs.rundirs import open_run

pytestmark = pytest.mark.fast


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """A beat is 0.1 s, and a lease that is unchanged for 0.6 s is dead."""
    monkeypatch.setattr(leases, "BEAT", 0.1)
    monkeypatch.setattr(leases, "PERIOD", 0.6)
    monkeypatch.setattr(leases, "_suspects", {})
    monkeypatch.setattr(leases, "_swept", set())
    monkeypatch.setattr(leases, "_held", set())
    monkeypatch.setattr(leases, "_beating", None)


def leave(folder, name="a.json", token="0123456789abcdef", older=0.0):
    """A temporary file as a dead process leaves it."""
    file = folder / f".{name}.{token}.tmp"
    file.write_bytes(b"half")
    now = time.time() - older
    os.utime(file, (now, now))
    return file


def after_a_period():
    time.sleep(leases.PERIOD + 0.05)


# --- temporary files ------------------------------------------------------------------------------


def test_a_leftover_is_removed_once_this_process_saw_it_unchanged_for_a_period(tmp_path):
    left = leave(tmp_path)
    disk.write(tmp_path / "b.json", b"{}")
    after_a_period()
    assert left.exists()  # nobody has looked again
    disk.write(tmp_path / "b.json", b"{}")
    assert sorted(os.listdir(tmp_path)) == ["b.json"]


@pytest.mark.parametrize("clock", [-7200, 7200])
def test_a_file_that_is_renewed_stays_whatever_its_owners_clock_says(tmp_path, clock):
    """Another container: equal host name, equal process id, a clock two hours off."""
    left = leave(tmp_path)
    stop = threading.Event()

    def renew():
        n = 0
        while not stop.wait(0.1):
            n += 1
            when = time.time() + max(clock, -leases.AGE / 2) + n
            os.utime(left, (when, when))

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        for _ in range(15):
            disk.write(tmp_path / "b.json", b"{}")
            time.sleep(0.1)
    finally:
        stop.set()
        thread.join()
    assert left.exists()


def test_a_writer_that_takes_long_renews_its_own(tmp_path):
    with disk.in_one_step(tmp_path / "large.bin") as file:
        file.write_bytes(b"begun")
        before = file.stat().st_mtime_ns
        leases._suspects[file] = (leases.look(file), time.monotonic())  # as another process sees it
        for _ in range(12):
            time.sleep(0.1)
            leases._sweep_suspects()
        assert file.stat().st_mtime_ns > before
    assert (tmp_path / "large.bin").read_bytes() == b"begun"


def test_age_is_counted_by_the_servers_clock(tmp_path, monkeypatch):
    """Our own clock is years off."""
    old, young = leave(tmp_path, older=2 * leases.AGE), leave(tmp_path, "b", "f" * 16, 60)
    for wrong in (0.0, 4e9):
        monkeypatch.setattr(time, "time", lambda wrong=wrong: wrong)
        leases.sweep(tmp_path)
        assert not old.exists() and young.exists()


def test_what_a_killed_sweep_left_goes_at_once(tmp_path):
    """It holds nothing, so nobody can be at work on it."""
    leave(tmp_path, "now")
    leases.sweep(tmp_path)
    assert os.listdir(tmp_path) == []


def test_leftovers_of_older_versions_go_and_files_of_others_stay(tmp_path):
    ours = [".a.b.npz.host.4190001-3.tmp", ".a.json.0123456789abcdef.tmp", ".meta.json.1.lease"]
    others = [".mine.tmp", ".a.b.c.d.tmp", "notes.tmp", ".hidden.lease", "a.0123456789abcdef.tmp"]
    for name in (*ours, *others):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (0, 0))
    leases.sweep(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(others)


@pytest.mark.parametrize("place", ["", "acts", "pages"])
def test_leftovers_are_swept_wherever_a_file_is_written(tmp_path, place):
    (tmp_path / place).mkdir(exist_ok=True)
    left = leave(tmp_path / place, older=2 * leases.AGE)
    disk.write_json(tmp_path / place / "new.json", {})
    assert not left.exists()


def test_a_writer_that_was_taken_for_dead_writes_again(tmp_path, monkeypatch):
    fsync, taken = os.fsync, []

    def slow(descriptor):
        fsync(descriptor)
        for left in tmp_path.glob(".*.tmp") if not taken else ():
            taken.append(left)
            left.unlink()

    monkeypatch.setattr(os, "fsync", slow)
    disk.write(tmp_path / "a.json", b"{}")
    assert taken and (tmp_path / "a.json").read_bytes() == b"{}"


def test_a_folder_that_is_gone_is_one_line(tmp_path):
    with pytest.raises(UsageError, match="nothing already computed is lost"):
        disk.write(tmp_path / "gone" / "a.json", b"{}")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_beats_by_itself(tmp_path):
    with disk.in_one_step(tmp_path / "parent"):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                with disk.in_one_step(tmp_path / "child") as file:
                    before = file.stat().st_mtime_ns
                    time.sleep(0.5)
                    code = int(file.stat().st_mtime_ns == before)
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# --- files made once ------------------------------------------------------------------------------


def race(path, count=8):
    """The contents that won and lost a race to make a file once."""
    barrier, won = threading.Barrier(count), {}

    def make(who):
        barrier.wait()
        won[who] = disk.write_once(path, b"%d\n" % who)

    threads = [threading.Thread(target=make, args=(who,)) for who in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [who for who in won if won[who]]


def test_of_many_exactly_one_makes_a_file_and_the_others_find_it_whole(tmp_path):
    for n in range(20):
        (winner,) = race(tmp_path / f"{n}")
        assert (tmp_path / f"{n}").read_bytes() == b"%d\n" % winner
    assert sorted(os.listdir(tmp_path)) == sorted(map(str, range(20)))


@pytest.mark.parametrize("generations", [0, 1, 3])
def test_one_of_many_succeeds_makers_that_died(tmp_path, generations):
    """Each of the dead came as far as to be the one who makes it."""
    path = tmp_path / "meta.json"
    path.touch()
    for generation in range(1, generations + 1):
        (tmp_path / f".meta.json.{generation}.lease").touch()
    (winner,) = race(path)
    assert path.read_bytes() == b"%d\n" % winner
    assert os.listdir(tmp_path) == ["meta.json"]


def test_a_maker_that_is_slow_is_waited_for(tmp_path):
    path = tmp_path / "states.npy"
    path.touch()

    def make():
        time.sleep(0.4)
        path.write_bytes(b"slow")

    thread = threading.Thread(target=make)
    thread.start()
    assert not disk.write_once(path, b"quick")
    thread.join()
    assert path.read_bytes() == b"slow"


def test_one_that_looked_before_another_succeeded_does_not_replace_its_file(tmp_path, monkeypatch):
    path, wait = tmp_path / "meta.json", leases.wait_until
    path.touch()

    def late(is_there, *watched):
        dead = wait(is_there, *watched)
        path.write_bytes(b"of another")  # between our verdict and our claim
        return dead

    monkeypatch.setattr(leases, "wait_until", late)
    assert not disk.write_once(path, b"ours")
    assert path.read_bytes() == b"of another" and os.listdir(tmp_path) == ["meta.json"]


def test_results_without_settings_are_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(leases, "PERIOD", 60.0)
    run = open_run(tmp_path / "run", "demo", {})
    run.write("a", {}, {})
    (run.path / "meta.json").unlink()
    began = time.monotonic()
    with pytest.raises(UsageError, match="no meta.json"):
        open_run(run.path, "demo", {})
    assert time.monotonic() - began < 10 and not (run.path / "meta.json").exists()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads all")
def test_settings_that_may_not_be_read_are_not_made_again(tmp_path):
    run = open_run(tmp_path / "run", "demo", {})
    meta = run.path / "meta.json"
    content = meta.read_bytes()
    meta.chmod(0)
    with pytest.raises(UsageError):
        open_run(run.path, "demo", {"other": 1})
    meta.chmod(0o600)
    assert meta.read_bytes() == content

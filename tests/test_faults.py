"""Run directories on file systems and machines that misbehave."""

import builtins
import errno
import io
import os
import pathlib
import resource
import signal
import subprocess
import sys
import threading
import time
import zipfile

import numpy as np
import pytest

from tests.conftest import ROOT
from vlmdiag import cli
from vlmdiag.cli import UsageError
from vlmdiag.pictures.samples import list_pictures
from vlmdiag.runs import disk, leases
from vlmdiag.runs.rundirs import open_run, read_run
from vlmdiag.swap.states import open_states

pytestmark = pytest.mark.fast


@pytest.fixture
def run(tmp_path):
    return open_run(tmp_path / "run", "demo", {"a": 1})


@pytest.mark.parametrize("size", [100, 150, 180])
def test_a_long_id_is_written(run, size):
    run.write("y" * size, {}, {"a": np.zeros(2)})
    assert run.is_done("y" * size)


@pytest.mark.parametrize("id", ["\ud800", "a\udcff", "CON", "a:b", "x.", "-", "~", "*"])
def test_an_odd_id_is_written_or_refused_in_one_line(run, id):
    for act in (lambda: run.write(id, {"id": id}, {}), lambda: run.fail(f"{id}f", ValueError("x"))):
        try:
            act()
        except UsageError as error:
            assert "\n" not in str(error)


def test_another_container_with_the_same_host_name_sweeps_while_one_writes(run, monkeypatch):
    stop = threading.Event()

    def sweep():
        while not stop.is_set():
            leases.sweep(run.path / "per_image")

    thread = threading.Thread(target=sweep)
    monkeypatch.setattr(os, "fsync", lambda _: time.sleep(0.02))
    monkeypatch.setattr(os, "getpid", lambda: 4190001)  # no process of ours has it
    thread.start()
    try:
        for n in range(20):
            run.write(f"i{n}", {"n": n}, {"a": np.zeros(3)})
    finally:
        stop.set()
        thread.join()


@pytest.fixture
def no_links(monkeypatch):
    """A file system without hard links."""

    def refuse(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)


def test_a_run_is_made_on_a_file_system_without_hard_links(tmp_path, no_links):
    open_run(tmp_path / "run", "demo", {"a": 1}).write("a", {"n": 1}, {})
    assert open_run(tmp_path / "run", "demo", {"a": 1}).ids() == ["a"]


def test_an_empty_meta_that_a_kill_left_is_made_again(tmp_path, no_links, monkeypatch):
    monkeypatch.setattr(leases, "PERIOD", 0.5)  # a minute
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "meta.json").touch()
    open_run(tmp_path / "run", "demo", {"a": 1})


@pytest.mark.parametrize("seconds", [0.3, 2])
def test_settings_whose_bytes_come_late_are_waited_for(tmp_path, run, no_links, seconds):
    folder = tmp_path / "late"
    folder.mkdir()
    (folder / "meta.json").touch()

    def fill():
        time.sleep(seconds)
        (folder / "meta.json").write_bytes((run.path / "meta.json").read_bytes())

    thread = threading.Thread(target=fill)
    thread.start()
    try:
        open_run(folder, "demo", {"a": 1})
    finally:
        thread.join()


@pytest.mark.parametrize("seconds", [0.5, 3])
def test_settings_of_another_client_that_are_seen_late_are_waited_for(run, monkeypatch, seconds):
    run.write("a", {}, {})
    began = time.monotonic()
    opened, exists = builtins.open, pathlib.Path.exists

    def is_hidden(path):
        is_meta = isinstance(path, (str, os.PathLike)) and pathlib.Path(path).name == "meta.json"
        return is_meta and time.monotonic() - began < seconds

    def opening(path, mode="r", *more, **options):
        if is_hidden(path) and mode[0] == "r":
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(path))
        return opened(path, mode, *more, **options)

    for module in (builtins, io):  # pathlib has it from io
        monkeypatch.setattr(module, "open", opening)
    monkeypatch.setattr(pathlib.Path, "exists", lambda path: not is_hidden(path) and exists(path))
    open_run(run.path, "demo", {"a": 1})
    assert time.monotonic() - began >= seconds


@pytest.mark.parametrize("ending", ["npz", "json"])
def test_an_empty_file_does_not_count_as_done(run, ending):
    run.write("a", {"caption": "x"}, {"a": np.zeros(3)})
    (run.path / "per_image" / f"a.{ending}").write_bytes(b"")
    assert not run.is_done("a")


@pytest.mark.parametrize("content", [b"", b"[" * 100_000])
def test_a_damaged_record_is_named_in_one_line(run, content):
    run.write("a", {"caption": "x"}, {})
    (run.path / "per_image" / "a.json").write_bytes(content)
    with pytest.raises(UsageError, match="a.json"):
        run.finish()


def npz(path, header, data=b"", encrypted=False):
    """An NPZ with one array whose header is given as it stands in the file."""
    length = len(header).to_bytes(2, "little")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", b"\x93NUMPY\x01\x00" + length + header + data)
    if encrypted:
        content = bytearray(path.read_bytes())
        content[6] |= 1  # the flag of the local entry, and of the directory
        content[content.index(b"PK\x01\x02") + 8] |= 1
        path.write_bytes(content)


FLOATS = "{'descr': '<f8', 'fortran_order': False, 'shape': (%s,)}\n"


@pytest.mark.parametrize(
    ("header", "encrypted"),
    [
        (FLOATS % 10**15, False),
        (FLOATS % 10**30, False),
        (FLOATS % 2, True),
        ("{'descr': '<f8', 'fortran_order': False, 'shape': (2", False),
        ("(" * 3000, False),
        ("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}", False),
        ("\x00\x01\x02", False),
    ],
)
def test_an_npz_that_lies_is_named_in_one_line(tmp_path, header, encrypted):
    npz(tmp_path / "a.npz", header.encode(), b"\0" * 16, encrypted)
    with pytest.raises(UsageError, match="a.npz cannot be read") as caught:
        disk.read_npz(tmp_path / "a.npz")
    assert "\n" not in str(caught.value)


def test_an_npz_that_unpacks_to_more_than_memory_is_refused_before_it_is_read(
    tmp_path, monkeypatch
):
    np.savez_compressed(tmp_path / "a.npz", a=np.zeros(3000), small=np.zeros(3))
    monkeypatch.setattr(disk, "NPZ_LIMIT", 20_000)
    with pytest.raises(UsageError, match="a.npz cannot be read .*its arrays take"):
        disk.read_npz(tmp_path / "a.npz")
    assert disk.read_npz(tmp_path / "a.npz", ["small"])["small"].shape == (3,)


def test_a_record_of_more_than_the_limit_is_refused_before_it_is_read(tmp_path, monkeypatch):
    (tmp_path / "a.json").write_text(f'{{"a": "{"x" * 1000}"}}')
    assert disk.read_json(tmp_path / "a.json")
    monkeypatch.setattr(disk, "JSON_LIMIT", 1000)
    with pytest.raises(UsageError, match="a.json cannot be read .it has more than"):
        disk.read_json(tmp_path / "a.json")


@pytest.mark.parametrize("damage", ["5000 digits", "a folder"])
def test_a_damaged_counter_is_no_traceback(run, damage):
    run.count("oom_halvings")
    counter = run.path / "counters" / "x.txt"
    if damage == "a folder":
        counter.mkdir()
    else:
        counter.write_bytes(b"9" * 5000 + b"\n")
    try:
        open_run(run.path, "demo", {"a": 1})
    except UsageError:
        return


# --- what the system does not let us have ---------------------------------------------------------


def ending(main, capsys):
    """(exit code, what is said) of a command."""
    with pytest.raises(SystemExit) as end:
        cli.run(main)
    return end.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    "act",
    [
        lambda path: read_run(path / ("x" * 300)),
        lambda path: open(path / ("é" * 200)),
        lambda path: os.open(path, os.O_WRONLY),
        lambda path: (path / "file" / "below").stat(),
    ],
)
def test_a_file_that_the_system_refuses_is_one_line_in_every_command(tmp_path, capsys, act):
    (tmp_path / "file").touch()
    code, said = ending(lambda: act(tmp_path), capsys)
    assert code == 2 and said.count("\n") == 1 and str(tmp_path) in said and len(said) < 500


def test_an_error_of_ours_stays_a_traceback(tmp_path):
    for error in (KeyError("a"), FileNotFoundError(errno.ENOENT, "x", "y"), OSError("no number")):

        def fail(error=error):
            raise error

        with pytest.raises(type(error)):
            cli.run(fail)


def test_a_folder_of_pictures_that_may_not_be_read_is_one_line(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(pathlib.Path, "iterdir", refuse)
    with pytest.raises(UsageError, match="cannot be read .Permission denied"):
        list_pictures(tmp_path)


@pytest.mark.parametrize("room", [0, 60])
def test_output_to_a_full_disk_ends_without_a_traceback(tmp_path, room):
    """The standard output and the standard error in a file that may not grow."""

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))

    for script in ("print('x' * 40, flush=True); print('y' * 40)", "print('x' * 200)"):
        code = f"from vlmdiag import cli\ncli.run(lambda: exec({script!r}))"
        with open(tmp_path / "log", "wb") as log:
            done = subprocess.run(
                [sys.executable, "-c", code], stdout=log, stderr=log, preexec_fn=limit, cwd=ROOT
            )
        assert done.returncode == 2
        assert b"Traceback" not in (tmp_path / "log").read_bytes()


def test_states_that_are_damaged_or_cannot_be_written_are_named(tmp_path, monkeypatch):
    path = tmp_path / "states.npy"
    for content in (b"hello", b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="states.npy"):
            open_states(path, (2, 2, 1, 4), "float16", done=2)
    path.unlink()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "ftruncate", full)
    with pytest.raises(UsageError, match="the disk is full .*states.npy"):
        open_states(path, (2, 2, 1, 4), "float16")

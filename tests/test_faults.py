"""Run directories on file systems and machines that misbehave."""

import builtins
import errno
import io
import os
import pathlib
import threading
import time
import zipfile

import numpy as np
import pytest

from vlmdiag.cli import UsageError
from vlmdiag.runs import disk, leases
from vlmdiag.runs.rundirs import open_run

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

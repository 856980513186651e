"""Packed runs are read, resumed and unpacked as if they were not; a run that goes on reads a file
only if it has changed; packing may be killed anywhere."""

import json
import os
import signal
import zipfile

import numpy as np
import pytest

from tests.conftest import ROOT, in_process
from vlmdiag.cli import UsageError
from vlmdiag.pictures.samples import Sample
from vlmdiag.runs import checked, disk, engine, packing, packs, rundirs
from vlmdiag.runs.rundirs import open_run, read_run

pytestmark = pytest.mark.fast


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Packs of four items; what is flushed here survives a killed process anyway."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr(packs, "SIZE", 4)
    monkeypatch.setattr(packing, "SIZE", 4)


def write(run, n, keep=True):
    """Item n: records and arrays of several kinds, the odd ones without a caption."""
    record = {
        "image_id": n,
        "text": "façade 羊 \udc80",
        "x": [0.1 * n, None],
        "nested": {"a": [1, {}]},
    }
    if n % 2 == 0:
        record["caption"] = f"item {n}"
    arrays = {"share": np.full((2, 3), n, np.float32), "norm": np.arange(4) + n, "s": np.array("é")}
    run.write(f"{n:03d}", record, arrays, keep, inputs=f"{n:016x}")


def new_run(folder, n=10):
    run = open_run(folder, "demo", {"a": 1})
    for i in range(n):
        write(run, i)
    run.finish()
    return run


def items(run):
    """{file: (bytes, time)} of per_image/."""
    folder = run.path / "per_image"
    return {
        name: (folder.joinpath(name).read_bytes(), folder.joinpath(name).stat().st_mtime_ns)
        for name in sorted(os.listdir(folder))
    }


def contents(found):
    return {name: data for name, (data, _) in found.items()}


def seen(run):
    """What all readers say of a run."""
    ids = run.ids()
    stacked_ids, stacked = run.stack(["share", "norm"])
    return {
        "ids": ids,
        "records": run.records(),
        "single": [run.record(id) for id in ids],
        "arrays": [{k: v.tolist() for k, v in run.arrays(id).items()} for id in ids],
        "stack": (stacked_ids, {key: array.tolist() for key, array in stacked.items()}),
        "done": [(run.is_done(id), run.is_whole(id), run.inputs(id)) for id in ids],
        "finished": run.finished([*ids, "nowhere"]),
        "preds": run.finish().read_bytes(),
        "failed": run.failed(),
        "not there": run.is_done("nowhere"),
    }


def reopened(run):
    return open_run(run.path, "demo", {"a": 1})


def loose(run):
    return sorted(name for name in os.listdir(run.path / "per_image") if name[0] != ".")


# --- packed and not ------------------------------------------------------------------------------


def test_a_packed_run_reads_as_before_and_unpacks_to_the_same_bytes(tmp_path):
    run = new_run(tmp_path / "run")
    before, wanted = items(run), seen(run)
    outcome = packing.pack(reopened(run))
    assert outcome == (10, 3, {}) and loose(run) == []
    for each in (run, reopened(run), read_run(run.path, "demo")):
        assert seen(each) == wanted
    assert packing.pack(reopened(run)).items == 0  # nothing to do
    packing.unpack(reopened(run))
    after = items(run)
    assert contents(after) == contents(before) and not (run.path / "packed").exists()
    assert all(after[name][1] == before[name][1] for name in before if name.endswith(".json"))
    for each in (run, reopened(run)):
        assert seen(each) == wanted


def test_packs_are_files_that_other_tools_read(tmp_path):
    run = new_run(tmp_path / "run", 4)
    wanted = items(run)
    packing.pack(run)
    (lines,) = (run.path / "packed").glob("*.jsonl")
    rows = [json.loads(line) for line in lines.read_text("utf-8").splitlines()]
    assert [row["id"] for row in rows] == ["000", "001", "002", "003"]
    assert rows[2]["record"]["caption"] == "item 2"
    (archive,) = (run.path / "packed").glob("*.zip")
    with zipfile.ZipFile(archive) as file:
        assert file.read("001.npz") == wanted["001.npz"][0]
        with file.open("001.npz") as npz, np.load(npz) as arrays:
            assert (arrays["share"] == 1).all()


def test_a_resumed_run_has_items_beside_its_packs_and_packing_again_merges(tmp_path):
    run = new_run(tmp_path / "run")
    packing.pack(run)
    again = reopened(run)
    assert not again.write("003", {"other": 1}, {})  # done already
    for i in (10, 11, 12):
        write(again, i)
    whole = new_run(tmp_path / "whole", 13)
    wanted = seen(whole)
    assert len(loose(run)) == 6 and seen(again) == wanted and seen(reopened(run)) == wanted
    assert packing.pack(reopened(run)).items == 3
    sizes = [len(pack.items) for pack in packed(run)]
    assert sorted(sizes) == [1, 4, 4, 4] and loose(run) == []
    assert seen(again) == wanted and seen(reopened(run)) == wanted
    packing.unpack(reopened(run))
    assert contents(items(run)) == contents(items(whole))


def packed(run):
    run = reopened(run)
    run.packed.refresh()
    return list(run.packed.packs.values())


def test_an_item_that_was_computed_again_counts_and_its_old_one_goes(tmp_path):
    run = new_run(tmp_path / "run")
    packing.pack(run)
    run.write("002", {"caption": "new"}, {"share": np.zeros((2, 3))}, keep=False)
    for each in (run, reopened(run)):
        assert each.record("002") == {"caption": "new"} and not each.arrays("002")["share"].any()
        assert each.finished(["002"]) == {"002": None}
    assert packing.pack(reopened(run)).items == 1
    assert reopened(run).record("002") == {"caption": "new"}
    assert sum("002" in pack.items for pack in packed(run)) == 1 and len(run.ids()) == 10


def test_a_run_of_an_older_version_is_packed_to_the_byte(tmp_path):
    """Without digests, written with other spaces, with a number that JSON has not."""
    run = new_run(tmp_path / "run", 4)
    folder = run.path / "per_image"
    record = json.loads((folder / "001.json").read_text())
    record.pop("checks")
    (folder / "001.json").write_bytes(json.dumps(record).encode() + b"}\n"[1:])
    (folder / "002.json").write_bytes(b'{"caption": NaN,\r\n "b": 1e400}\n')
    np.savez(folder / "003.npz", share=np.ones((2, 3)))
    reference = (folder / "003.json").read_bytes()
    (folder / "003.json").write_bytes(json.dumps({"n": 3}).encode() + b"\n")
    assert reference != (folder / "003.json").read_bytes()
    before = contents(items(run))
    assert packing.pack(reopened(run)).left == {}
    assert reopened(run).record("001") == record and reopened(run).record("002")["b"] == np.inf
    packing.unpack(reopened(run))
    assert contents(items(run)) == before


@pytest.mark.parametrize("experiment", ["measure", "in shards"])
def test_a_run_that_is_packed_in_between_ends_with_the_same_bytes(tmp_path, experiment):
    samples = [Sample(f"{n:02d}", tmp_path / "no.jpg", f"{n}?") for n in range(11)]

    def process(batch):
        return [({"n": item.question, "caption": "x"}, {"x": np.ones(3)}) for item in batch]

    def measure(folder, some, shard=(0, 1)):
        run = open_run(folder, "demo", {})
        counts = engine.run_items(run, some, lambda item: item, process, 2, shard)
        run.finish()
        return run, counts

    whole, _ = measure(tmp_path / "whole", samples)
    run, _ = measure(tmp_path / "run", samples[:6])
    packing.pack(run)
    if experiment == "in shards":
        for index in range(3):
            run, counts = measure(tmp_path / "run", samples, (index, 3))
            packing.pack(run)
    else:
        run, counts = measure(tmp_path / "run", samples)
        assert counts == {"done": 5, "skipped": 6, "failed": 0}
    packing.pack(run)
    assert (run.path / "preds.json").read_bytes() == (whole.path / "preds.json").read_bytes()
    packing.unpack(reopened_any(run))
    assert contents(items(run)) == contents(items(whole))
    with pytest.raises(UsageError, match="of other questions"):
        packing.pack(run)
        measure(tmp_path / "run", [Sample("00", tmp_path / "no.jpg", "another?")])


def reopened_any(run):
    return read_run(run.path)


def test_a_reader_that_was_open_before_finds_the_packs(tmp_path):
    run = new_run(tmp_path / "run")
    readers = [read_run(run.path, "demo") for _ in range(5)]
    readers[0].ids()
    packing.pack(run)
    assert readers[0].record("003")["image_id"] == 3
    assert readers[1].is_done("003") and readers[2].arrays("003")["norm"][0] == 3
    assert readers[3].finished(["003"]) and len(readers[4].ids()) == 10


# --- kills and damage -----------------------------------------------------------------------------


def killed(run, mode, nth, command):
    """How many files a call that was not killed renamed or removed; None of one that was, in a fork
    at the nth such operation."""
    ends, starts = os.pipe()
    child = os.fork()
    if child == 0:
        count = 0

        def wrapped(function):
            def call(*args, **options):
                nonlocal count
                count += 1
                if mode == "before" and count == nth:
                    os.kill(os.getpid(), signal.SIGKILL)
                result = function(*args, **options)
                if mode == "after" and count == nth:
                    os.kill(os.getpid(), signal.SIGKILL)
                return result

            return call

        try:
            os.replace, os.unlink = wrapped(os.replace), wrapped(os.unlink)
            command(reopened(run))
            os.write(starts, str(count).encode())
        finally:
            os._exit(0)
    os.close(starts)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    said = os.read(ends, 100)
    os.close(ends)
    assert code in (0, -9) and (code or said), code
    return int(said) if code == 0 else None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("command", ["pack", "unpack"])
def test_killed_anywhere_nothing_is_lost(tmp_path, command):
    do, undo = packing.pack, packing.unpack
    run = new_run(tmp_path / "run", 6)
    wanted, bytes_before = seen(run), contents(items(run))
    if command == "unpack":
        do, undo = undo, do
        undo(reopened(run))
    total = killed(run, "", 0, do)
    kills, points = 0, range(1, total + 1, 2)
    for n in points:
        undo(reopened(run))
        kills += killed(run, ("before", "after")[n // 2 % 2], n, do) is None
        after = reopened(run)
        assert after.finished(wanted["ids"]) == wanted["finished"], n
        assert after.records() == wanted["records"] and after.stack("norm")[1]["norm"][5, 0] == 5
    assert kills >= 0.7 * len(points) > 5
    packing.pack(reopened(run))
    assert seen(reopened(run)) == wanted and loose(run) == []
    packing.unpack(reopened(run))
    assert {k: v for k, v in contents(items(run)).items() if k[0] != "."} == bytes_before


def test_a_pack_that_is_not_what_was_written_removes_nothing(tmp_path, monkeypatch):
    run = new_run(tmp_path / "run", 4)
    before = items(run)
    real = disk.from_disk

    def rotten(file):
        data = bytearray(file.read_bytes())
        data[50] ^= 1
        file.write_bytes(data)
        real(file)

    monkeypatch.setattr(disk, "from_disk", rotten)
    with pytest.raises(UsageError, match="nothing was removed"):
        packing.pack(run)
    assert items(run) == before and reopened(run).ids() == ["000", "001", "002", "003"]


@pytest.mark.parametrize("ending", [".zip", ".jsonl"])
@pytest.mark.parametrize("how", ["a byte", "cut", "gone"])
def test_damaged_items_of_a_pack_are_computed_again_and_named_by_readers(tmp_path, ending, how):
    run = new_run(tmp_path / "run", 8)
    wanted, before = seen(run), contents(items(run))
    packing.pack(run)
    pack = packed(run)[1]
    file, entry = pack.file(ending), pack.items["006"]
    at = entry.npz_at + 40 if ending == ".zip" else entry.line_at + 9
    data = bytearray(file.read_bytes())
    data[at] ^= 255
    if how == "gone":
        file.unlink()
    else:
        file.write_bytes(data if how == "a byte" else data[:at])
    reader = read_run(run.path, "demo")
    with pytest.raises(UsageError, match=file.name):
        [reader.record(id) and reader.arrays(id) for id in reader.ids()]
    monkeypatch_read = rundirs.READ[:]
    rundirs.READ[:] = [reader]
    try:
        assert file.name in rundirs.damage()
    finally:
        rundirs.READ[:] = monkeypatch_read
    again = reopened(run)
    lost = {"a byte": {"006"}, "cut": {"006", "007"}, "gone": {"004", "005", "006", "007"}}[how]
    assert set(wanted["ids"]) - set(again.finished(wanted["ids"])) == lost
    for id in sorted(lost):
        assert not again.is_done(id)
        write(again, int(id))
    assert seen(again) == wanted and seen(reopened(run)) == wanted
    assert packing.pack(reopened(run)).left == {}
    packing.unpack(reopened(run))
    assert contents(items(run)) == before


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"schema": 9, "items": {}}', '{"schema": 1, "items": {"a": [1]}}']
)
def test_a_broken_index_is_named(tmp_path, text):
    run = new_run(tmp_path / "run", 4)
    packing.pack(run)
    (index,) = (run.path / "packed").glob("*.json")
    index.write_text(text)
    for call in (lambda: reopened(run).ids(), lambda: read_run(run.path, "demo").record("001")):
        with pytest.raises(UsageError, match=index.name):
            call()


def test_a_damaged_item_is_left_for_the_command_that_made_the_run(tmp_path):
    run = new_run(tmp_path / "run", 5)
    npz, data = run.path / "per_image/001.npz", (run.path / "per_image/001.npz").read_bytes()
    npz.write_bytes(data[:50] + bytes(9) + data[59:])
    other = disk.npz_bytes({"share": np.full((2, 3), 7, np.float32)})
    (run.path / "per_image/003.npz").write_bytes(other)  # whole, and another one
    outcome = packing.pack(reopened(run))
    assert set(outcome.left) == {"001", "003"} and outcome.items == 3
    assert run.path.joinpath("per_image/003.json").exists()
    assert not reopened(run).is_done("001")


def test_overwrite_removes_packs_too_and_results_in_packs_need_settings(tmp_path):
    run = new_run(tmp_path / "run", 5)
    packing.pack(run)
    meta = (run.path / "meta.json").read_bytes()
    (run.path / "meta.json").unlink()
    with pytest.raises(UsageError, match="no meta.json"):
        reopened(run)
    (run.path / "meta.json").write_bytes(meta)
    assert open_run(run.path, "demo", {"b": 2}, overwrite=True).ids() == []
    assert not (run.path / "packed").exists()


def test_the_command_packs_and_unpacks(tmp_path):
    pack_run = in_process(ROOT / "diagnostic_tools/pack_run.py")
    run = new_run(tmp_path / "run", 5)
    before = contents(items(run))
    done = pack_run(str(run.path))
    assert done.returncode == 0 and "5 items packed, 2 packs now" in done.stdout, done.stderr
    assert loose(run) == []
    assert pack_run(str(run.path), "--unpack").returncode == 0
    assert contents(items(run)) == before
    done = pack_run(str(tmp_path / "nowhere"))
    assert done.returncode == 2 and "no such folder" in done.stderr and done.stderr.count("\n") == 1


# --- what was found whole is not read again -------------------------------------------------------


@pytest.fixture
def reads(monkeypatch):
    """Names of the files of items that are read."""
    read, names = disk.read_json, []

    def counted(path, *more):
        names.append(path.name)
        return read(path, *more)

    monkeypatch.setattr(disk, "read_json", counted)
    return names


@pytest.fixture
def old_enough(monkeypatch):
    monkeypatch.setattr(checked, "RECENT", -(10**9))


def test_a_call_that_goes_on_reads_no_item_twice(tmp_path, reads, old_enough):
    run = new_run(tmp_path / "run")
    reads.clear()
    again = reopened(run)
    assert len(again.finished(run.ids())) == 10
    again.finish()
    assert [name for name in reads if name != "meta.json"] == []
    (run.path / checked.NAME).write_text("{broken")
    third = reopened(run)
    assert len(third.finished(run.ids())) == 10 and len(reads) >= 10


def test_what_was_just_written_is_read_once_more(tmp_path, reads):
    run = new_run(tmp_path / "run")
    reads.clear()
    assert len(reopened(run).finished(run.ids())) == 10
    assert len([name for name in reads if name != "meta.json"]) == 10


@pytest.mark.parametrize("ending", ["npz", "json"])
@pytest.mark.parametrize("time_kept", [False, True])
def test_a_file_that_changed_is_read_again(tmp_path, ending, time_kept, old_enough):
    run = new_run(tmp_path / "run")
    file = run.path / "per_image" / f"004.{ending}"
    stat, data = file.stat(), bytearray(file.read_bytes())
    data[60:64] = bytes(4)
    file.write_bytes(data)  # of the same size
    if time_kept:
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    again = reopened(run)
    assert set(run.ids()) - set(again.finished(run.ids())) == {"004"}
    assert not again.is_done("004")


def test_packs_are_read_to_their_end_once_and_when_they_changed(tmp_path, monkeypatch, old_enough):
    run = new_run(tmp_path / "run")
    packing.pack(run)
    calls, real = [], packs.damaged_items
    monkeypatch.setattr(packs, "damaged_items", lambda pack: calls.append(pack) or real(pack))
    assert len(reopened(run).finished(run.ids())) == 10 and calls == []
    pack = packed(run)[0]
    pack.file(".zip").write_bytes(pack.file(".zip").read_bytes())
    again = reopened(run)
    assert len(again.finished(run.ids())) == 10 and len(calls) == 1
    again.known.save()
    assert len(reopened(run).finished(run.ids())) == 10 and len(calls) == 1


def test_pictures_that_did_not_change_are_not_read_again(tmp_path, monkeypatch, old_enough):
    from vlmdiag.runs import inputs

    pictures = [tmp_path / f"{n}.jpg" for n in range(3)]
    for picture in pictures:
        picture.write_bytes(picture.name.encode() * 9)
    samples = [Sample(picture.stem, picture, "?") for picture in pictures]
    run = open_run(tmp_path / "run", "demo", {})

    def resume():
        again = open_run(run.path, "demo", {})
        process = lambda batch: [({}, {}) for _ in batch]  # noqa: E731
        return engine.run_items(again, samples, lambda item: item, process)

    resume()
    resume()  # reads the pictures and notes them
    opened, real = [], open

    def counted(path, *more):
        opened.append(path)
        return real(path, *more)

    monkeypatch.setattr(inputs, "open", counted, raising=False)
    assert resume()["skipped"] == 3 and opened == []
    pictures[1].write_bytes(b"1.jpX" * 9)  # of the same size
    with pytest.raises(UsageError, match="such as 1"):
        resume()


def test_two_calls_keep_what_each_found(tmp_path, old_enough):
    run = open_run(tmp_path / "run", "demo", {"a": 1})
    first, second = reopened(run), reopened(run)
    for n in range(4):
        write((first, second)[n % 2], n)
    first.known.read()
    second.known.save()
    first.known.save()
    assert len(json.loads((run.path / checked.NAME).read_bytes())["items"]) == 4


# --- NPZ ------------------------------------------------------------------------------------------


def test_the_quick_reader_says_what_numpy_says(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        "f": np.asfortranarray(rng.normal(size=(3, 4)).astype(np.float16)),
        "empty": np.zeros((0, 4)),
        "scalar": np.array(2.5),
        "text": np.array(["a", "bcé"]),
        "flag": np.array([True, False]),
        "large": rng.integers(0, 9, 5000),
    }
    data = disk.npz_bytes(arrays)
    (tmp_path / "a.npz").write_bytes(data)
    assert disk._members(data).keys() == arrays.keys()
    found = disk.read_npz(tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as stored:
        for name, array in found.items():
            other = stored[name]
            assert array.dtype == other.dtype and np.array_equal(array, other), name
            assert array.flags.writeable and array.flags.f_contiguous == other.flags.f_contiguous
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "b.npz", **arrays)
        other = disk.read_npz(tmp_path / "b.npz")
        assert all(np.array_equal(other[name], array) for name, array in arrays.items())

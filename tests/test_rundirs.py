"""Run directories: what is written is whole, settings are guarded, readers name the broken file."""

import errno
import json
import os
import random
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

from vlmdiag.cli import UsageError
from vlmdiag.runs import disk, leases, rundirs
from vlmdiag.runs.rundirs import COCO, find_runs, open_run, read_run, run_path, slug

pytestmark = pytest.mark.fast

REPO = Path(__file__).resolve().parent.parent
SETTINGS = {
    "model": "tiny",
    "prompt": "Describe the image.",
    "decoding": {"max_new_tokens": 32, "temperature": 1},
}


def new_run(folder, n=0, experiment="demo"):
    run = open_run(folder, experiment, SETTINGS)
    for i in range(n):
        run.write(
            f"{i:03d}",
            {"image_id": i, "caption": f"item {i}"},
            {"share": np.full((2, 3), i, np.float32), "norm": np.arange(4) + i},
        )
    return run


def files(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file()
    }


def python(code, *args):
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        cwd=REPO,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


# ---- names ----


@pytest.mark.parametrize(
    "name, folder",
    [
        ("llava-hf/llava-1.5-7b-hf", "llava-1.5-7b-hf"),
        ("../checkpoints/llava-v1.5-7b/", "llava-v1.5-7b"),
        ("/models/llava-lora/checkpoint-500", "llava-lora_checkpoint-500"),
        ("/models/llava-lora/checkpoint-500/", "llava-lora_checkpoint-500"),
        ("""/models/a b:c\\d|e*f?g"h'i<j>k""", "a-b-c-d-e-f-g-h-i-j-k"),
    ],
)
def test_a_model_path_gives_the_folder_name_of_the_papers(name, folder):
    assert slug(name) == folder


def test_run_paths_follow_the_documented_layout():
    assert run_path("runs", "x/llava-v1.5-7b", sp=0) == Path("runs/llava-v1.5-7b__sp-0")
    assert run_path("runs", "x/llava-v1.5-7b", run_name="long answers", sp=1) == Path(
        "runs/llava-v1.5-7b__long-answers__sp-1"
    )
    assert run_path("runs", "x/llava-v1.5-7b", "token_norms", "b/c") == Path(
        "runs/token_norms/llava-v1.5-7b__b-c"
    )


@pytest.mark.parametrize("id", ["", "a/b", "a\\b", "..", ".hidden", "a\0b", "x" * 200])
def test_ids_that_cannot_be_file_names_are_refused(tmp_path, id):
    run = new_run(tmp_path / "run")
    for call in (
        lambda: run.write(id, {}, {}),
        lambda: run.is_done(id),
        lambda: run.fail(id, ValueError("x")),
        lambda: run.arrays(id),
    ):
        with pytest.raises(UsageError, match="item id"):
            call()


# ---- items ----


def test_an_item_comes_back_as_it_was_written(tmp_path):
    run = new_run(tmp_path / "run")
    record = {
        "z": "façade 羊",
        "a": np.float32(0.5),
        "nan": float("nan"),
        "list": (np.int64(3), np.inf),
        "array": np.array([[1.0, np.nan]]),
    }
    record |= {7: Path("a/b"), "lone": "\udc80"}
    arrays = {
        "file": np.arange(3),
        "empty": np.zeros((0, 4), np.float16),
        "scalar": np.array(2.5),
        "text": np.array(["a", "bc"]),
    }
    assert run.write("000000000042", record, arrays)
    text = (run.path / "per_image/000000000042.json").read_text()
    assert "façade 羊" in text and text.startswith('{\n "z"')
    expected = {
        "z": "façade 羊",
        "a": 0.5,
        "nan": None,
        "list": [3, None],
        "array": [[1.0, None]],
        "7": "a/b",
        "lone": "\udc80",
    }
    assert run.record("000000000042") == expected and list(run.record("000000000042")) == list(
        expected
    )
    with np.load(run.path / "per_image/000000000042.npz", allow_pickle=False) as stored:
        for key, array in arrays.items():
            assert stored[key].dtype == array.dtype and np.array_equal(stored[key], array)
    assert run.arrays("000000000042").keys() == arrays.keys()


def test_equal_arrays_give_equal_npz_bytes_at_any_time(tmp_path, monkeypatch):
    arrays = {"a": np.random.default_rng(0).normal(size=(8, 8)), "b": np.arange(3)}
    first = disk.npz_bytes(arrays)
    monkeypatch.setattr(time, "time", lambda: 2e9)
    monkeypatch.setattr(time, "localtime", lambda *_: (2033, 5, 18, 3, 33, 20, 2, 138, 0))
    assert disk.npz_bytes(arrays) == first
    (tmp_path / "a.npz").write_bytes(first)
    assert {info.date_time for info in zipfile.ZipFile(tmp_path / "a.npz").infolist()} == {
        (1980, 1, 1, 0, 0, 0)
    }
    assert len(disk.npz_bytes({"zeros": np.zeros(100_000)})) < 2000  # compressed


def test_pickled_arrays_are_never_written(tmp_path):
    run = new_run(tmp_path / "run")
    with pytest.raises(ValueError, match="[Oo]bject"):
        run.write("a", {}, {"objects": np.array([{}, None])})
    assert files(run.path / "per_image") == {}


def test_an_item_without_its_json_or_npz_is_not_done(tmp_path):
    run = new_run(tmp_path / "run", 1)
    assert run.is_done("000") and not run.is_done("001") and run.ids() == ["000"]
    for ending in ("json", "npz"):
        (run.path / f"per_image/000.{ending}").unlink()
        assert not run.is_done("000")
        assert run.write("000", {}, {})


def test_a_done_item_is_kept_unless_asked(tmp_path):
    run = new_run(tmp_path / "run", 1)
    before = files(run.path / "per_image")
    assert not run.write("000", {"other": 1}, {})
    assert files(run.path / "per_image") == before
    assert run.write("000", {"other": 1}, {}, keep=False) and run.record("000") == {"other": 1}


def test_a_failure_is_noted_and_goes_away_with_success(tmp_path):
    run = new_run(tmp_path / "run")
    try:
        raise ValueError("no such layer")
    except ValueError as error:
        run.fail("a", error, stage="load", size=np.int64(3))
    assert (
        run.failed()["a"]["type"] == "ValueError"
        and run.failed()["a"]["message"] == "no such layer"
    )
    assert (
        run.failed()["a"]["facts"] == {"stage": "load", "size": 3}
        and "test_rundirs.py" in run.failed()["a"]["traceback"]
    )
    run.write("a", {}, {})
    assert run.failed() == {} and files(run.path / "failures") == {}
    run.fail("a", ValueError("late"))  # a done item stays done
    assert run.failed() == {} and files(run.path / "failures") == {}


def test_preds_are_rebuilt_from_the_items(tmp_path):
    run = new_run(tmp_path / "run", 3)
    run.write("extra", {"image_id": 9}, {})  # no caption
    run.write("010-0", {"caption": "by id"}, {})
    (run.path / "preds.json").write_text("half")
    run.finish()
    expected = [{"image_id": i, "caption": f"item {i}"} for i in range(3)] + [
        {"image_id": "010-0", "caption": "by id"}
    ]
    assert json.loads((run.path / "preds.json").read_text()) == expected


def test_a_run_without_captions_has_no_preds(tmp_path):
    run = new_run(tmp_path / "run")
    run.write("sums", {"image_id": 9}, {})
    (run.path / "preds.json").write_text("[]")  # of an older version
    run.finish()
    assert not (run.path / "preds.json").exists()
    run.write("other", {"caption": "by id"}, {})
    assert json.loads(run.finish().read_text()) == [{"image_id": "other", "caption": "by id"}]


def test_preds_of_a_shard_that_finishes_late_miss_nothing(tmp_path, monkeypatch):
    run, other, write = new_run(tmp_path / "run", 2), new_run(tmp_path / "run"), disk.write

    def interleaved(
        path, data, **options
    ):  # another shard commits its last item and finishes between our listing and our writing
        if path.name == "preds.json" and "late" not in other.ids():
            monkeypatch.setattr(disk, "write", write)
            other.write("late", {"caption": "x"}, {})
            other.finish()
        return write(path, data, **options)

    monkeypatch.setattr(disk, "write", interleaved)
    run.finish()
    assert len(json.loads((run.path / "preds.json").read_text())) == 3


def test_counters_add_up_between_threads_and_are_part_of_meta_when_read(tmp_path):
    run = new_run(tmp_path / "run")
    threads = [
        threading.Thread(target=lambda: [run.count("oom_halvings") for _ in range(50)])
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    run.count("retries", 3)
    assert (
        run.counters()
        == {"oom_halvings": 200, "retries": 3}
        == read_run(run.path, "demo").meta["counters"]
    )


def test_a_peak_is_the_largest_of_all_processes(tmp_path):
    run = new_run(tmp_path / "run")
    for key, values in {"peak_mib": (700, 900, 300), "mib": (700, 900, 300)}.items():
        for value in values:
            run.count(key, value)
    other = run.path / "counters" / f"peak_mib.{'0' * 16}.txt"  # of another process
    other.write_text("800\n1200\n")
    assert run.counters() == {"peak_mib": 1200, "mib": 1900}


# ---- settings ----


def test_meta_holds_settings_and_versions(tmp_path):
    open_run(tmp_path / "run", "demo", SETTINGS, free={"batch_size": 8})
    meta = json.loads((tmp_path / "run/meta.json").read_text())
    assert (meta["schema"], meta["experiment"], meta["settings"], meta["free"]) == (
        rundirs.SCHEMA,
        "demo",
        SETTINGS,
        {"batch_size": 8},
    )
    assert {"python", "numpy", "torch", "transformers", "pillow"} <= meta[
        "versions"
    ].keys() and meta["versions"]["numpy"] == np.__version__


def test_every_differing_setting_is_listed_with_both_values(tmp_path):
    new_run(tmp_path / "run", 1)
    other = {
        "model": "large",
        "prompt": SETTINGS["prompt"],
        "decoding": {"max_new_tokens": 64, "temperature": 1.0},
        "probe": True,
    }
    with pytest.raises(UsageError) as caught:
        open_run(tmp_path / "run", "demo", other)
    message = str(caught.value)
    differences = (
        'model: now "large", there "tiny"',
        "decoding.max_new_tokens: now 64, there 32",
        "probe: now true, there not set",
    )
    for part in (*differences, "--overwrite", "--run_name"):
        assert part in message
    assert "prompt" not in message and "temperature" not in message and "\n" not in message


def test_settings_are_compared_as_json_and_free_ones_may_differ(tmp_path):
    identity = {
        "layers": (1, 2),
        "scale": np.float32(0.5),
        "none": None,
        "nan": float("nan"),
        "path": Path("a/b"),
        3: {"x": ()},
    }
    open_run(tmp_path / "run", "demo", identity, free={"max_images": 20})
    open_run(tmp_path / "run", "demo", identity, free={"max_images": 5000})


def test_another_experiment_or_schema_is_refused(tmp_path):
    run = new_run(tmp_path / "run", 1)
    for call in (
        lambda: open_run(run.path, "other", SETTINGS),
        lambda: read_run(run.path, "other"),
    ):
        with pytest.raises(UsageError, match="'demo'"):
            call()
    meta = run.path / "meta.json"
    meta.write_text(meta.read_text().replace('"schema": 1', '"schema": 99'))
    for call in (lambda: open_run(run.path, "demo", SETTINGS), lambda: read_run(run.path, "demo")):
        with pytest.raises(UsageError, match="schema 99"):
            call()


def test_overwrite_removes_what_a_run_owns_and_nothing_else(tmp_path):
    run = new_run(tmp_path / "run", 2)
    run.count("oom_halvings")
    run.finish()
    run.stack(["norm"])
    (run.path / "notes.txt").write_text("mine")
    again = open_run(run.path, "demo", SETTINGS | {"model": "large"}, overwrite=True)
    assert (
        again.ids() == []
        and again.counters() == {}
        and sorted(files(run.path)) == ["meta.json", "notes.txt"]
    )


@pytest.mark.parametrize("name, text", [("holiday.jpg", "x"), ("meta.json", '{"album": 1}')])
def test_overwrite_refuses_a_folder_that_is_no_run(tmp_path, name, text):
    (tmp_path / "per_image").mkdir()
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match="not a run directory"):
        open_run(tmp_path, "demo", SETTINGS, overwrite=True)
    assert files(tmp_path) == {name: text.encode()}


def test_overwrite_of_nothing_is_a_new_run(tmp_path):
    assert open_run(tmp_path / "a/b/run", "demo", SETTINGS, overwrite=True).ids() == []


def test_results_without_meta_are_not_adopted(tmp_path):
    run = new_run(tmp_path / "run", 1)
    (run.path / "meta.json").unlink()
    with pytest.raises(UsageError, match="no meta.json"):
        open_run(run.path, "demo", SETTINGS)


def test_a_place_that_cannot_be_written_is_a_usage_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="cannot write"):
        open_run(tmp_path / "file/run", "demo", SETTINGS)


OPEN = """
import sys, time
from pathlib import Path
from vlmdiag.cli import UsageError
from vlmdiag.runs.rundirs import open_run
assert "torch" not in sys.modules, "rundirs must not import torch"
folder, who = Path(sys.argv[1]), sys.argv[2]
(folder / f"ready-{who}").touch()
while not (folder / "go").exists():
    pass
try:
    open_run(folder / "run", "demo", {"who": who})
    print("created")
except UsageError as error:
    print(error)
"""


def test_of_racing_processes_one_creates_meta_and_the_others_compare(tmp_path):
    racers = [python(OPEN, tmp_path, who) for who in range(3)]
    while len(list(tmp_path.glob("ready-*"))) < len(racers) and all(
        racer.poll() is None for racer in racers
    ):
        time.sleep(0.01)
    (tmp_path / "go").touch()
    said = [racer.communicate(timeout=30) for racer in racers]
    winner = json.loads((tmp_path / "run/meta.json").read_text())["settings"]["who"]
    assert [out.strip() == "created" for out, _ in said] == [
        str(who) == winner for who in range(3)
    ], said
    assert all(f'there "{winner}"' in out for out, _ in said if out.strip() != "created")
    assert list((tmp_path / "run").rglob("*.tmp")) == []


@pytest.mark.parametrize("hard_links", [True, False])
def test_of_racing_threads_exactly_one_creates_meta(tmp_path, monkeypatch, hard_links):
    if not hard_links:
        monkeypatch.setattr(
            os, "link", lambda *_: (_ for _ in ()).throw(OSError(errno.EPERM, "no hard links here"))
        )
    barrier, outcome = threading.Barrier(8), {}

    def race(who):
        barrier.wait()
        try:
            outcome[who] = open_run(tmp_path / "run", "demo", {"who": who}) and "created"
        except UsageError as error:
            outcome[who] = str(error)

    threads = [threading.Thread(target=race, args=(who,)) for who in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winner = json.loads((tmp_path / "run/meta.json").read_text())["settings"]["who"]
    assert {who for who, said in outcome.items() if said == "created"} == {winner}
    assert all(f"there {winner}" in said for who, said in outcome.items() if who != winner)


# ---- trouble ----

FULL_DISK = """
import resource, sys
import numpy as np
from vlmdiag.runs.rundirs import open_run
run = open_run(sys.argv[1], "demo", {})
run.write("small", {"n": 1}, {"a": np.zeros(10)})
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
from vlmdiag import cli
cli.run(lambda: run.write("large", {"n": 2}, {"a": np.random.default_rng(0).normal(size=100_000)}))
"""


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path):
    process = python(FULL_DISK, tmp_path / "run")
    _, said = process.communicate(timeout=30)
    assert process.returncode == 2, said
    assert (
        said.count("\n") == 1
        and "full" in said
        and "large.npz" in said
        and "nothing already computed is lost" in said
    )
    run = read_run(tmp_path / "run", "demo")
    assert run.ids() == ["small"] and run.arrays("small")["a"].shape == (10,)
    assert sorted(files(run.path / "per_image")) == ["small.json", "small.npz"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EIO])
def test_an_error_of_the_disk_leaves_no_temporary_file(tmp_path, monkeypatch, code):
    run = new_run(tmp_path / "run", 1)
    before = files(run.path)

    def broken(_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(UsageError, match="nothing already computed is lost") as caught:
        run.write("new", {}, {})
    assert ("full" in str(caught.value)) == (code != errno.EIO) and files(run.path) == before


def test_readers_name_the_broken_file(tmp_path):
    run = new_run(tmp_path / "run", 3)
    npz, record = run.path / "per_image/001.npz", run.path / "per_image/001.json"
    whole = npz.read_bytes()
    pickled = tmp_path / "pickled.npz"
    np.savez(pickled, share=np.array([{}]), norm=np.array([{}]))
    np.save(tmp_path / "single.npy", np.arange(3))
    truncated = [b"", b"PK", whole[:40], whole[: len(whole) // 2], whole[:-1]]
    for damaged in (
        *truncated,
        whole[:60] + b"\xff" * 20 + whole[80:],
        pickled.read_bytes(),
        (tmp_path / "single.npy").read_bytes(),
    ):
        npz.write_bytes(damaged)
        for call in (lambda: run.arrays("001"), lambda: run.stack(["share", "norm"])):
            with pytest.raises(UsageError, match=r"001\.npz cannot be read.*delete it"):
                call()
    npz.unlink()
    with pytest.raises(UsageError, match=r"001\.npz"):
        run.stack(["share"])
    for damaged in (b"", b'{"a": ', b"[1]", b"\xff"):
        record.write_bytes(damaged)
        with pytest.raises(UsageError, match=r"001\.json .*delete it"):
            run.records()


def test_any_flipped_byte_of_an_npz_is_noticed_or_harmless(tmp_path):
    run, rng = new_run(tmp_path / "run", 1), random.Random(0)
    npz, expected = run.path / "per_image/000.npz", run.arrays("000")
    whole = npz.read_bytes()
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        npz.write_bytes(damaged)
        try:
            arrays = run.arrays("000")
        except UsageError as error:
            assert "000.npz" in str(error)
        else:
            assert all(
                np.array_equal(array, expected[key])
                for key, array in arrays.items()
                if key in expected
            )


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": 1}'])
def test_a_broken_meta_is_named(tmp_path, text, monkeypatch):
    monkeypatch.setattr(leases, "PERIOD", 0.1)
    run = new_run(tmp_path / "run", 1)
    (run.path / "meta.json").write_text(text)
    for call in (lambda: read_run(run.path, "demo"), lambda: open_run(run.path, "demo", SETTINGS)):
        with pytest.raises(UsageError, match=r"meta\.json"):
            call()


def test_what_is_no_run_is_named(tmp_path):
    with pytest.raises(UsageError, match="no such folder"):
        read_run(tmp_path / "missing", "demo")
    with pytest.raises(UsageError, match="no meta.json"):
        read_run(tmp_path, "demo")


# ---- analyses ----


def test_a_stack_is_cached_until_an_item_changes(tmp_path, monkeypatch):
    run = new_run(tmp_path / "run", 3)
    run.write("003", {}, {"share": np.zeros((2, 3))})  # lacks norm
    ids, stacked = run.stack(["share", "norm"])
    assert (
        ids == ["000", "001", "002"]
        and stacked["share"].shape == (3, 2, 3)
        and stacked["norm"][2, 0] == 2
    )
    assert run.stack("share")[0] == ["000", "001", "002", "003"]
    with monkeypatch.context() as patched:
        patched.setattr(np, "stack", None)  # the second call reads the cache
        again_ids, again = run.stack(["share", "norm"])
    assert again_ids == ids and all(np.array_equal(again[key], stacked[key]) for key in stacked)
    run.write("001", {}, {"share": np.ones((2, 3)), "norm": np.full(4, 50)}, keep=False)
    assert run.stack(["share", "norm"])[1]["norm"][1, 0] == 50
    run.write("004", {}, {"share": np.ones((2, 3)), "norm": np.arange(4)})
    assert run.stack(["share", "norm"])[0] == ["000", "001", "002", "004"]
    for cache in (run.path / "analysis").glob("stack-*.npz"):
        cache.write_bytes(b"PK broken")
    assert run.stack(["share", "norm"])[0] == ["000", "001", "002", "004"]


def test_parts_of_a_stack_are_those_of_the_whole_with_and_without_a_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(rundirs, "PART", 3)
    run = new_run(tmp_path / "run", 8)
    run.write("002a", {}, {"share": np.zeros((2, 3))})  # lacks norm
    run.write("005", {}, {"share": np.ones((2, 3)), "norm": np.full(4, 0.5)}, keep=False)
    ids, stacked = run.stack(["share", "norm"])
    assert ids == [f"{n:03d}" for n in range(8)] and stacked["norm"][5, 0] == 0.5
    for id, row in zip(ids, stacked["norm"], strict=True):
        assert np.array_equal(row, run.arrays(id)["norm"]), id
    (cache,) = (run.path / "analysis").glob("stack-*.npz")
    for is_cached in (True, False):
        if not is_cached:  # nor can it be
            cache.unlink()
            cache.parent.rmdir()
        parts = [*run.parts(["share", "norm"])]
        assert [len(of_part) for of_part, _ in parts] == [3, 2, 3]
        assert sum((of_part for of_part, _ in parts), []) == ids
        for key, whole in stacked.items():
            joined = np.concatenate([part[key] for _, part in parts])
            assert joined.dtype == whole.dtype and np.array_equal(joined, whole), key


def test_a_damaged_part_of_a_cache_is_read_from_the_items(tmp_path, monkeypatch):
    monkeypatch.setattr(rundirs, "PART", 3)
    run = new_run(tmp_path / "run", 7)
    wanted = run.stack(["norm"])[1]["norm"].tolist()
    (cache,) = (run.path / "analysis").glob("stack-*.npz")
    data = cache.read_bytes()
    at = data.rindex(np.asarray(wanted[4]).tobytes())
    cache.write_bytes(data[:at] + b"\xff" + data[at + 1 :])
    assert run.stack(["norm"])[1]["norm"].tolist() == wanted
    assert cache.read_bytes() == data


def test_a_run_that_may_only_be_read_can_be_stacked(tmp_path):
    run = new_run(tmp_path / "run", 2)
    (run.path / "analysis").rmdir()
    assert read_run(run.path, "demo").stack(["norm"])[0] == ["000", "001"]


def test_stacking_unlike_shapes_names_the_key_and_two_items(tmp_path):
    run = new_run(tmp_path / "run", 2)
    run.write("007", {}, {"share": np.zeros((5, 3)), "norm": np.zeros(4)})
    assert run.stack(["norm"])[0] == ["000", "001", "007"]
    with pytest.raises(UsageError, match=r"share has shape \(2, 3\) for 000 but \(5, 3\) for 007"):
        run.stack(["share"])


def test_stacking_what_no_item_has_says_what_there_is(tmp_path):
    run = new_run(tmp_path / "run", 1)
    with pytest.raises(
        UsageError, match="none of its 1 items has all of delta_gv; the first has norm, share"
    ):
        run.stack(["delta_gv"])
    with pytest.raises(UsageError, match="none of its 0 items"):
        new_run(tmp_path / "empty").stack(["norm"])


def test_coco_runs_are_found_by_system_prompt_and_labelled(tmp_path):
    for name in ("tiny__sp-0", "tiny__sp-1", "base__long__sp-0", "plain"):
        new_run(tmp_path / name, experiment=COCO)
    new_run(tmp_path / "other__sp-0", experiment="demo")
    (tmp_path / "junk__sp-0").mkdir()
    assert [run.label for run in find_runs(tmp_path, 0)] == ["base__long", "tiny"]
    assert [run.label for run in find_runs(tmp_path, "1")] == ["tiny (no system prompt)"]
    assert read_run(tmp_path / "other__sp-0", "demo").label == "other__sp-0"
    with pytest.raises(
        UsageError, match="run_coco_diagnostics.py --model_path MODEL --strip_system_prompt"
    ):
        find_runs(tmp_path / "nowhere", 1)

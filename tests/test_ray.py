"""--engine ray on a real Ray of two nodes: whatever ends in the middle, a worker, a node, the
driver, the run completes, with the bytes of one plain process. An item that ends its worker is a
failure."""

import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests import stand_in
from tests.conftest import ROOT, in_process
from tests.kills import KINDS, MODEL, digests
from vlmdiag.cli import UsageError
from vlmdiag.runs import attempts, ray_actor, ray_engine, rundirs

ray = pytest.importorskip("ray", reason="pip install 'vlm-diagnostics[ray]'")
pytestmark = pytest.mark.ray

STAND_IN = in_process(ROOT / "tests" / "stand_in.py")
RAY = ["--engine", "ray", "--cpus_per_worker", "1", "--gpus_per_worker", "0"]
SECONDS = 240  # for one call


@pytest.fixture(scope="module")
def cluster():
    """A Ray of two nodes with two cores each, joined by this process."""
    from ray.cluster_utils import Cluster

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    quick = {"health_check_period_ms": 1000, "health_check_failure_threshold": 5}
    of_a_node = {"num_cpus": 2, "object_store_memory": 80 * 2**20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=of_a_node | {"_system_config": quick})
    cluster.second = cluster.add_node(num_cpus=2, object_store_memory=80 * 2**20)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def run_of(folder):
    return folder / "stand_in"


def call(folder, *flags, workers=2):
    """The stand-in by Ray, in this process as the driver."""
    return STAND_IN("--out_root", folder, *RAY, "--ray_workers", workers, *flags)


def plain(folder, *flags):
    done = STAND_IN("--out_root", folder, *flags)
    assert done.returncode == 0, done.stderr
    return digests(folder)


def failures(folder):
    return {
        file.stem: json.loads(file.read_text())
        for file in (run_of(folder) / "failures").glob("*.json")
    }


def assert_clean(folder):
    """Nothing is left beside what a plain run writes and the list of files found whole."""
    kept = {"analysis", "counters", "failures", "meta.json", "per_image", "preds.json"}
    assert {path.name for path in run_of(folder).iterdir()} - {".checked.json"} == kept


# ---- the same bytes ----


def test_any_number_of_workers_gives_the_bytes_of_one_process(cluster, tmp_path):
    flags = ["--items", 20, "--batch_size", 3, "--num_workers", 0]
    wanted = plain(tmp_path / "plain", *flags)
    for workers in (1, 3):
        done = call(folder := tmp_path / str(workers), *flags, workers=workers)
        assert done.returncode == 0, done.stderr
        assert "20 computed, 0 done before, 0 failed" in done.stdout
        assert done.stdout.count("the model has been loaded") == 1
        assert "model in this process: False" in done.stdout
        assert digests(folder) == wanted
        assert_clean(folder)
    other = plain(tmp_path / "other", "--items", 20, "--batch_size", 4)
    assert other != wanted  # the bytes tell how the batches were cut
    done = call(tmp_path / "3", *flags)
    assert "0 computed, 20 done before, 0 failed" in done.stdout


def test_a_run_grows_and_shards_go_by_ray_too(cluster, tmp_path):
    wanted = plain(tmp_path / "plain", "--items", 15, "--batch_size", 2)
    assert call(tmp_path / "a", "--items", 6, "--batch_size", 2).returncode == 0
    done = call(tmp_path / "a", "--items", 15, "--batch_size", 2, "--shard", "0/2")
    assert "stand_in: 8 images" in done.stdout and done.returncode == 0
    done = call(tmp_path / "a", "--items", 15, "--batch_size", 2)
    assert done.returncode == 0 and digests(tmp_path / "a") == wanted
    done = call(tmp_path / "a", "--setting", "b")
    assert done.returncode == 2 and 'setting: now "b", there "a"' in done.stderr
    done = call(tmp_path / "a", "--setting", "b", "--overwrite", "--items", 3)
    assert done.returncode == 0 and len(digests(tmp_path / "a")) == 2 * 3 + 1


def test_an_error_of_one_item_is_that_items_failure(cluster, tmp_path):
    flags = ["--items", 9, "--batch_size", 3, "--raises", 4]
    STAND_IN("--out_root", tmp_path / "plain", *flags)
    done = call(tmp_path / "ray", *flags)
    assert done.returncode == 3 and "8 computed, 0 done before, 1 failed" in done.stdout
    assert "the same command tries them again" in done.stdout
    assert digests(tmp_path / "ray") == digests(tmp_path / "plain")
    assert failures(tmp_path / "ray")["00004"]["message"] == "4 does not go"


# ---- what a worker does ----


def test_a_worker_computes_a_batch_while_it_writes_the_one_before(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(tmp_path)  # what an actor adds is gone after the test
    args = stand_in.parse_args(["--out_root", str(tmp_path), "--items", "2", "--num_workers", "0"])
    actor = ray_actor.Actor(ray_actor.Call("tests/stand_in.py", "make_worker", args, ROOT, {}))
    actor.start()
    actor.open()
    is_computed, write, process = threading.Event(), rundirs.Run.write, actor.worker.process

    def write_late(run, id, *rest, **more):
        assert id != "00000" or is_computed.wait(60)
        return write(run, id, *rest, **more)

    def noted(numbers):
        results = process(numbers)
        if numbers == [1]:
            is_computed.set()
        return results

    monkeypatch.setattr(rundirs.Run, "write", write_late)
    actor.worker = dataclasses.replace(actor.worker, process=noted)
    assert actor.compute(ray_actor.Unit(0), None) is None
    assert attempts.tried(run_of(tmp_path)).keys() == {"00000"}  # as long as it is not written
    assert actor.compute(ray_actor.Unit(1), None) == ray_actor.Report([], "")
    assert actor.run.is_done("00000") and "00000" not in attempts.tried(run_of(tmp_path))
    assert actor.written() == ray_actor.Report([], "") and actor.written() is None
    assert actor.run.is_done("00001") and not attempts.tried(run_of(tmp_path))


# ---- what ends ----


def test_a_worker_that_is_killed_is_replaced(cluster, tmp_path):
    wanted = plain(tmp_path / "plain", "--items", 18, "--batch_size", 3)
    flags = ["--items", 18, "--batch_size", 3, "--ends_once", 4, 16, "--unusable", 9]
    done = call(tmp_path / "ray", *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len([*(tmp_path / "ray").glob(f"{stand_in.FIRST}*")]) == 3  # all three have happened
    assert digests(tmp_path / "ray") == wanted
    assert_clean(tmp_path / "ray")


@pytest.mark.parametrize(
    ("batch_size", "ends"), [(1, "--ends"), (4, "--ends"), (1, "--ends_written")]
)
def test_an_item_that_ends_its_worker_is_tried_three_times(cluster, tmp_path, batch_size, ends):
    """And no other item fails, though one is written while the next one is computed."""
    flags = ["--items", 8, "--batch_size", batch_size, "--writing", 0.2, ends, 5]
    done = call(tmp_path, *flags)
    assert done.returncode == 3 and "7 computed, 0 done before, 1 failed" in done.stdout
    (failure,) = failures(tmp_path).values()
    assert [len(failure["facts"]["attempts"]), *failures(tmp_path)] == [3, "00005"]
    assert "its process ended 3 times" in failure["message"]
    for attempt in failure["facts"]["attempts"]:
        assert {"at", "on", "process", "ended"} == set(attempt)
    assert len({attempt["process"] for attempt in failure["facts"]["attempts"]}) == 3
    assert_clean(tmp_path)
    done = call(tmp_path, *flags)  # tried again: once
    assert done.returncode == 3 and "0 computed, 7 done before, 1 failed" in done.stdout
    assert len(failures(tmp_path)["00005"]["facts"]["attempts"]) == 4
    done = call(tmp_path, "--items", 8, "--batch_size", batch_size)  # it has been mended
    assert done.returncode == 0 and not failures(tmp_path)


def test_attempts_of_a_driver_that_was_killed_count(cluster, tmp_path):
    flags = ["--items", 4, "--batch_size", 4]
    plain(tmp_path, *flags)
    (run_of(tmp_path) / "per_image" / "00002.json").unlink()
    (run_of(tmp_path) / "attempts").mkdir()
    line = {"ids": ["00000", "00001", "00002", "00003"], "at": "then", "on": "there"}
    file = run_of(tmp_path) / "attempts" / "00000+3.txt"
    file.write_text(2 * (json.dumps(line | {"process": 1}) + "\n") + '{"ids": ["000')
    done = call(tmp_path, *flags, "--ends", 2)
    assert done.returncode == 3, done.stdout + done.stderr
    kept = failures(tmp_path)["00002"]["facts"]["attempts"]
    assert [attempt["at"] for attempt in kept][:2] == ["then", "then"] and len(kept) == 3
    assert_clean(tmp_path)


def test_a_batch_that_takes_too_long_ends_its_worker(cluster, tmp_path):
    wanted = plain(tmp_path / "plain", "--items", 8, "--batch_size", 2)
    flags = ["--items", 8, "--batch_size", 2, "--batch_timeout", 3]
    done = call(tmp_path / "once", *flags, "--hangs_once", 3)
    assert done.returncode == 0 and digests(tmp_path / "once") == wanted
    done = call(tmp_path / "ever", *flags, "--hangs", 3)
    assert done.returncode == 3
    (failure,) = failures(tmp_path / "ever").values()
    assert "it took longer than --batch_timeout 3 s" in failure["message"]


def test_what_waits_behind_a_slow_batch_goes_to_another_worker(cluster, tmp_path):
    done = call(tmp_path, "--items", 14, "--hangs_once", 0, "--batch_timeout", 12)
    assert done.returncode == 0, done.stdout + done.stderr
    items = (run_of(tmp_path) / "per_image").glob("*.json")
    first, *times = [file.stat().st_mtime for file in sorted(items)]
    assert len(times) == 13 and max(times) - min(times) < 9 and first - min(times) > 11


def test_a_worker_that_cannot_load_ends_the_call_at_once(cluster, tmp_path):
    done = call(tmp_path, "--does_not_load", workers=3)
    assert done.returncode == 2 and done.stderr == "error: no such model: stand-in\n"
    done = call(tmp_path, "--ends_loading")
    assert done.returncode == 2 and "3 Ray workers in a row ended before" in done.stderr
    assert not run_of(tmp_path).exists()


# ---- the driver ----


def start(folder, *flags, address=True):
    """Popen of the stand-in as a driver of its own. address: of this cluster; else its own Ray."""
    command = [sys.executable, "-m", "tests.stand_in", "--out_root", folder, *RAY, *flags]
    if address:
        command += ["--ray_address", ray.get_runtime_context().gcs_address]
    return subprocess.Popen(
        [str(word) for word in command],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a job in the background of a shell ignores Ctrl-C, and hands that down
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for(condition, seconds=SECONDS):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def count(folder):
    return len([*(run_of(folder) / "per_image").glob("*.json")])


def test_a_driver_that_is_killed_goes_on_with_other_workers(cluster, tmp_path):
    flags = ["--items", 24, "--batch_size", 2]
    wanted = plain(tmp_path / "plain", *flags)
    driver = start(tmp_path / "ray", *flags, "--seconds", 0.5, "--ray_workers", 2)
    wait_for(lambda: count(tmp_path / "ray") >= 4)
    driver.kill()
    driver.communicate()
    assert count(tmp_path / "ray") < 24
    done = call(tmp_path / "ray", *flags, workers=3)
    assert done.returncode == 0, done.stdout + done.stderr
    before = int(re.search(r"(\d+) done before", done.stdout)[1])
    assert 4 <= before < 24 and digests(tmp_path / "ray") == wanted
    assert_clean(tmp_path / "ray")


def test_ctrl_c_leaves_a_run_that_goes_on_and_blames_no_item(cluster, tmp_path):
    flags = ["--items", 100, "--batch_size", 2]  # 12 s, so that the signal is in time
    driver = start(tmp_path, *flags, "--seconds", 0.5, "--ray_workers", 2)
    wait_for(lambda: count(tmp_path) >= 4)
    driver.send_signal(signal.SIGINT)
    said = driver.communicate(timeout=SECONDS)[1]
    assert driver.returncode == 130, said
    assert said.splitlines()[-1] == "interrupted; run the same command again to go on"
    assert not [*(run_of(tmp_path) / "attempts").glob("*.txt")]
    done = call(tmp_path, *flags)
    assert done.returncode == 0 and count(tmp_path) == 100


def test_without_an_address_ray_starts_and_ends_with_the_call(cluster, tmp_path):
    sessions = Path(tempfile.gettempdir(), "ray")
    started = {path.name for path in sessions.glob("session_2*")}
    driver = start(tmp_path, "--items", 5, "--ray_workers", 1, address=False)
    said, errors = driver.communicate(timeout=SECONDS)
    assert driver.returncode == 0 and "5 computed" in said, errors
    assert "torch in this process: False" in said  # nor a model: the call itself stays small
    assert not errors
    (session,) = {path.name for path in sessions.glob("session_2*")} - started

    def is_running(process):
        with contextlib.suppress(OSError):
            return session.encode() in Path(process, "cmdline").read_bytes()
        return False

    wait_for(lambda: not any(map(is_running, Path("/proc").glob("[0-9]*"))), 30)


# ---- flags ----


def test_flags_of_ray_need_the_engine_and_room(cluster, tmp_path):
    done = STAND_IN("--out_root", tmp_path, "--ray_workers", 2)
    assert done.returncode == 2 and "--ray_workers needs --engine ray" in done.stderr
    done = STAND_IN("--out_root", tmp_path, "--engine", "ray", "--gpus_per_worker", 1)
    assert done.returncode == 2 and "has no room: there are 4 CPUs and 0 GPUs" in done.stderr


# ---- experiments ----


def _volcano(folder, data):
    flags = f"--model-path {MODEL} --input {data}/mmhal_shapes.json --max_images 6 --batch_size 2"
    flags += f" --max_new_tokens 4 --out_root {folder} --out_dir {folder}/out"
    return [["visualize/run_volcano_with_image_attention.py", *flags.split(), "--log", ""]]


COMMANDS = {name: kind.commands for name, kind in KINDS.items()} | {"volcano": _volcano}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    from data import make_shapes

    folder = tmp_path_factory.mktemp("data") / "shapes"
    flags = ["--num_images", "24", "--num_train", "70", "--seed", "0"]
    assert make_shapes.main(["--out_dir", str(folder), *flags]) == 0
    return folder


def kill_one(folder, is_over):
    """Kill a worker that is computing, after one has written an item."""
    while not is_over.wait(0.005):
        if not [*folder.rglob("per_image/*.json")]:
            continue
        for file in folder.rglob("attempts/*.txt"):
            with contextlib.suppress(OSError, ValueError, IndexError):
                os.kill(json.loads(file.read_text().splitlines()[-1])["process"], signal.SIGKILL)
                return


def measured(kind, folder, data, flags):
    """The bytes of an experiment; flags: of its first command."""
    first, *others = COMMANDS[kind](str(folder), data)
    for script, *arguments in [[*first, *flags], *others]:
        done = in_process(ROOT / script)(*arguments)
        assert done.returncode == 0, done.stdout + done.stderr
    return digests(folder)


@pytest.mark.parametrize("kind", [*COMMANDS])
def test_an_experiment_of_which_a_worker_is_killed_gives_the_same_bytes(
    cluster, data, tmp_path, kind
):
    wanted = measured(kind, tmp_path / "plain", data, [])
    is_over = threading.Event()
    watcher = threading.Thread(target=kill_one, args=[tmp_path / "ray", is_over], daemon=True)
    watcher.start()
    found = measured(kind, tmp_path / "ray", data, [*RAY, "--ray_workers", "2"])
    is_over.set()
    watcher.join()
    assert len(wanted) > 4 and found == wanted


def test_a_script_outside_the_checkout_finds_the_modules_beside_it(cluster, tmp_path):
    from tests.test_own_measure import write_page

    write_page(tmp_path)
    command = [sys.executable, "run_attention_entropy.py", "--image_dir", "pictures"]
    command += ["--model_path", "checkpoints/tiny-llava", "--out_root"]
    address = ["--ray_workers", "2", "--ray_address", ray.get_runtime_context().gcs_address]
    for name, flags in (("plain", []), ("ray", [*RAY, *address])):
        done = subprocess.run(
            [*command, name, *flags], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0 and "2 computed" in done.stdout, done.stderr
    assert "2 Ray workers" in done.stdout
    found = digests(tmp_path / "ray")
    assert len(found) == 2 * 2 + 1 and found == digests(tmp_path / "plain")


def test_the_benchmark_runs(cluster, capsys):
    from benchmarks import bench_engine

    flags = "--workers 1 --batches 3 --seconds 0.2 --calls 5 --items 30"
    assert bench_engine.main(flags.split()) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["efficiency"]["1"] > 0 and figures["seconds_of_items"]["ray"] >= 0


# ---- at the end: a node is lost ----


def test_a_node_that_is_killed_costs_what_was_on_it(cluster, tmp_path):
    flags = ["--items", 40, "--batch_size", 2]
    wanted = plain(tmp_path / "plain", *flags)
    lost = []

    def kill_node():
        wait_for(lambda: count(tmp_path / "ray") >= 6)
        cluster.remove_node(cluster.second, allow_graceful=False)
        lost.append(count(tmp_path / "ray"))

    watcher = threading.Thread(target=kill_node, daemon=True)
    watcher.start()
    done = call(tmp_path / "ray", *flags, "--seconds", 1, workers=3)
    watcher.join(5)
    assert done.returncode == 0, done.stdout + done.stderr
    assert lost and lost[0] < 40 and digests(tmp_path / "ray") == wanted
    assert_clean(tmp_path / "ray")


def test_a_call_whose_nodes_are_all_lost_ends(monkeypatch):
    """No actor would ever come. Looked for now and then, and only while nothing comes."""
    monkeypatch.setattr(ray_engine.time, "monotonic", lambda: clock[0])
    clock, asked = [100.0], []
    driver = object.__new__(ray_engine._Driver)
    driver.looked = 0.0

    def nodes():
        asked.append(clock[0])
        return [{"Alive": False}, {"Alive": clock[0] < 115}]

    driver.ray = SimpleNamespace(nodes=nodes)
    for clock[0] in (100.0, 105.0, 111.0):
        driver._look_for_nodes()
    assert asked == [100.0, 111.0]
    clock[0] = 130.0
    with pytest.raises(UsageError, match="no node of the Ray cluster lives"):
        driver._look_for_nodes()

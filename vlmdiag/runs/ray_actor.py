"""One of the processes that compute the batches of a run for runs.ray_engine: it holds a model, and
does what it is handed. Neither Ray nor torch is imported here; the script brings what it needs.
"""

from __future__ import annotations

import contextlib
import io
import os
import runpy
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vlmdiag import CHECKOUT
from vlmdiag.cli import UsageError
from vlmdiag.runs import attempts, cost, disk, engine, experiment, rundirs
from vlmdiag.types import Fields

if TYPE_CHECKING:
    from vlmdiag.runs.experiment import Worker
    from vlmdiag.runs.rundirs import Run

WRITERS = 8  # threads; a batch is to be on the disk before the next one has been computed
VISIBLE = 20.0  # seconds in which a file that another machine wrote is seen here


class Unit(NamedTuple):
    """What an actor is handed: a batch by its number, or one item of it."""

    batch: int
    item: int | None = None


class Call(NamedTuple):
    """What an actor starts from. Everything is plain, so that one can be started at any time."""

    script: str  # below the checkout where it is in it, which may lie elsewhere on other machines
    function: str
    args: Namespace
    folder: str
    environment: dict[str, str]


class Plan(NamedTuple):
    """What is to be done, as the actor says that opened the run."""

    path: str
    created: object  # what tells this run directory from others
    experiment: str
    progress: str
    about: str
    facts: Fields
    ids: list[str]  # of all items of this call
    done: set[str]  # of those that were done before
    batches: dict[int, list[str]]  # those that are left


class Report(NamedTuple):
    """What an actor says of a unit: the ids that failed, and what was printed."""

    failed: list[str]
    said: str


class Actor:
    """A process with a model. The methods take and return plain values; UsageError is the caller's
    mistake and ends the call, any other exception too."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.pool: ThreadPoolExecutor | None = None
        self.writer = ThreadPoolExecutor(1, "writer")
        self.writing: Future[Report] | None = None  # of the last unit
        self.loading: dict[Unit, list[Future[Any]]] = {}
        self.largest = 0  # of the batches so far, in bytes of pictures

    def start(self) -> str:
        """Load the model; what was printed."""
        for name, value in self.call.environment.items():
            if name.startswith(("HF_", "TRANSFORMERS_")):
                os.environ.setdefault(name, value)  # a machine may have caches of its own
            else:
                os.environ[name] = value  # the numbers depend on it, as on how many threads
        try:
            os.chdir(self.call.folder)
        except OSError as error:
            raise UsageError(
                f"{self.call.folder} is not there on {attempts.HOST} ({error.strerror}): start"
                " from a folder that all machines see"
            ) from error
        path = CHECKOUT / self.call.script
        sys.path.insert(0, str(path.parent))  # as for a command: it may import what lies beside it
        with contextlib.redirect_stdout(io.StringIO()) as said:
            script = runpy.run_path(str(path), run_name="worker")
            self.worker: Worker[Any, Any] = script[self.call.function](self.call.args)
        if self.call.args.num_workers:
            self.pool = ThreadPoolExecutor(self.call.args.num_workers, "load")
        return said.getvalue()

    def open(self) -> Plan:
        """Open the run directory and see what is left to do: one actor in a call."""
        args, worker = self.call.args, self.worker
        self.run, self.batches = experiment.open_worker(worker, args.shard, args.overwrite)
        items = [item for batch in self.batches for item in batch]
        done = engine.done_before(self.run, items)
        batches = {
            number: [item.id for item in batch]
            for number, batch in enumerate(self.batches)
            if any(item.id not in done for item in batch)
        }
        return Plan(
            str(worker.path),
            created_of(self.run),
            worker.experiment,
            worker.progress,
            worker.about,
            worker.facts,
            [item.id for item in items],
            done,
            batches,
        )

    def join(self, path: str, created: object) -> None:
        """Open the run directory that another actor has opened."""
        worker = self.worker
        if str(worker.path) != path or not is_seen(Path(path), created):
            raise UsageError(
                f"{path} is another folder on {attempts.HOST}: the run directory has to lie where"
                " all machines see it under the same name (--out_root)"
            )
        self.run = rundirs.open_run(path, worker.experiment, worker.identity, worker.free)
        self.batches = engine.batches_of(worker.items, worker.batch_size, self.call.args.shard)

    def compute(self, unit: Unit, ahead: Unit | None) -> Report | None:
        """Compute what is left of a unit and begin to write it; the report of the unit before, None
        where there is none. ahead: what is likely to follow, whose pictures are decoded
        meanwhile."""
        items = self._items(unit)
        ids = [item.id for item in items]
        started = time.monotonic()
        attempts.begin(self.run.path, ids)
        with contextlib.redirect_stdout(io.StringIO()) as said:
            # by an actor that ended before the unit did; all others are in the plan
            done = {id for id in ids if self.run.is_done(id) and self.run.is_whole(id)}
            work: engine.Work[engine.Item, object] = engine.Work(
                self.run, self.worker.process, done, len(items), WRITERS
            )
            if len(done) < len(items):
                work.compute_loaded(self._loaded(unit, ahead))
        cost.note(self.run, len(items) - len(done), time.monotonic() - started)
        before = self.written()
        self.writing = self.writer.submit(self._finish, work, ids, said.getvalue())
        return before

    def written(self) -> Report | None:
        """The report of the last unit, once it is on the disk; None where that was asked before."""
        writing, self.writing = self.writing, None
        return writing.result() if writing else None

    def _finish(self, work: engine.Work[engine.Item, object], ids: list[str], said: str) -> Report:
        try:
            work.flush()
        finally:
            work.close()
        attempts.done(self.run.path, ids)
        return Report(sorted(work.failed), said)

    def _items(self, unit: Unit) -> Sequence[engine.Item]:
        batch = self.batches[unit.batch]
        return batch if unit.item is None else [batch[unit.item]]

    def _loaded(
        self, unit: Unit, ahead: Unit | None
    ) -> Sequence[engine.Loaded[engine.Item, object]]:
        """load() of a unit's items, in threads where there are any, and those of the next begun."""
        load = self.worker.load
        if self.pool is None:
            return [engine.attempt(load, item) for item in self._items(unit)]
        is_small = 2 * self.largest <= engine.AHEAD
        wanted = [unit, ahead] if ahead and is_small else [unit]
        self.loading = {
            each: self.loading.get(each)
            or [self.pool.submit(engine.attempt, load, item) for item in self._items(each)]
            for each in wanted
        }
        loaded = [future.result() for future in self.loading.pop(unit)]
        size = sum(engine.picture_bytes(content) for _, content in loaded)
        self.largest = max(self.largest, size)
        return loaded


def created_of(run: Run) -> object:
    """What tells a run directory from any other."""
    return [run.meta.get("digest"), run.meta.get("created")]


def is_seen(path: Path, created: object) -> bool:
    """Whether the run directory that was created so lies at path, which a network file system may
    show late."""
    until = time.monotonic() + VISIBLE
    while True:
        with contextlib.suppress(UsageError):
            meta = disk.read_json(path / "meta.json")
            return [meta.get("digest"), meta.get("created")] == created
        if time.monotonic() > until:
            return False
        time.sleep(0.2)

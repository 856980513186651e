"""--engine ray: the batches of a run handed out to several processes, on one machine or many.

Ray starts the processes and tells which of them have ended; nothing else is left to it. What is
done stands in the run directory, which all processes write to, and batches are cut as everywhere,
so the bytes are those of one process, whoever computes a batch, and after any of them was killed.

    driver (this process, without a model)          actors, one model each
    start() -----------------------------------> make_worker(args) of the script
    open() / join() ---------------------------> the run directory; batches that are left
    compute(unit) -----------------------------> load, process; what failed of the unit before
    written() ---------------------------------> what failed of the last unit

An actor has one unit, and knows the next one, whose pictures it decodes meanwhile; one with nothing
left to do takes what is reserved for another. It writes a unit while it computes the next one. An
actor that ends is replaced, and what it computed or wrote is tried again; what is tried is noted
before, until it is written (runs.attempts). Whatever was tried before is computed while nothing
else is, or is written, on its actor: so a unit may be blamed once for another's fault, not again. A
batch that was on two actors when they ended is taken apart, and an item that was on three is a
failure.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import time
from argparse import Namespace
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tqdm import tqdm

from vlmdiag import CHECKOUT
from vlmdiag.cli import UsageError
from vlmdiag.runs import attempts, engine, experiment, leases, rundirs
from vlmdiag.runs.progress import Progress
from vlmdiag.runs.ray_actor import Actor, Call, Plan, Report, Unit, is_seen
from vlmdiag.types import Record

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorHandle

    from vlmdiag.runs.experiment import Outcome, Worker
    from vlmdiag.runs.rundirs import Run

MOST = 3  # times that an item is tried which ends its process
# actors in a row, and as many more as there are at a time, that may end before anything is done
LOOK = 10.0  # seconds between looks whether a node lives, while nothing comes
IN_A_ROW = 8
CORES = 2  # of an actor
# what of this process's environment the numbers, or what is found, may depend on
ENVIRONMENT = ("OMP_", "MKL_", "TORCH_", "PYTORCH_", "CUBLAS_", "HF_", "TRANSFORMERS_")


def compute(
    args: Namespace, make_worker: Callable[[Namespace], Worker[engine.AnyItem, engine.Content]]
) -> Outcome:
    """The items of this call, by the actors of a cluster. UsageError: Ray is not installed or not
    there, too little room for an actor, what make_worker() or an actor raises as such."""
    with cluster(args) as resources:
        return _Driver(args, make_worker, resources).run()


# --- the cluster ----------------------------------------------------------------------------------


class Resources(NamedTuple):
    """How many actors there are, and what each takes."""

    actors: int
    cpus: int
    gpus: float


@contextlib.contextmanager
def cluster(args: Namespace) -> Iterator[Resources]:
    """Ray, joined, or started for this call and ended with it."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise UsageError(
            f"--engine ray needs Ray ({error}): pip install 'vlm-diagnostics[ray]', or 'ray>=2.50'"
        ) from error
    if ray.is_initialized():  # by whoever calls this
        yield _resources(args, ray.cluster_resources())
        return
    address = args.ray_address or os.environ.get("RAY_ADDRESS")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "CRITICAL"}
    try:
        if address:
            ray.init(address=address, **quiet)
        else:
            # workers beside other work as processes without Ray are: Ray's own default is 15
            os.environ.setdefault("RAY_worker_niceness", "0")
            # whether as many cores are there as the flags ask for is the caller's business
            cores = args.ray_workers and args.ray_workers * (args.cpus_per_worker or CORES)
            quiet |= {"include_dashboard": False, "object_store_memory": 100 * 2**20}
            ray.init(address="local", num_cpus=cores, **quiet)
    except Exception as error:  # noqa: BLE001 -- Ray raises it as such where it starts too slowly
        where = f"the Ray cluster at {address} cannot be joined" if address else "Ray cannot start"
        reason = " ".join(str(error).split())[:300]
        raise UsageError(f"{where} ({type(error).__name__}: {reason})") from error
    try:
        yield _resources(args, ray.cluster_resources())
    finally:
        ray.shutdown()


def _resources(args: Namespace, there: dict[str, float]) -> Resources:
    """What the flags ask for, with as many actors as there is room for where they do not say.
    UsageError where there is room for none; more than there is room for wait for more machines."""
    of_gpus, of_cpus = there.get("GPU", 0.0), there.get("CPU", 0.0)
    cpus = args.cpus_per_worker or max(1, min(CORES, int(of_cpus)))
    gpus = args.gpus_per_worker
    if gpus is None:
        gpus = 1.0 if of_gpus and getattr(args, "device", None) in (None, "cuda") else 0.0
    if args.ray_workers:
        return Resources(args.ray_workers, cpus, gpus)
    count = int(min(of_cpus // cpus, of_gpus // gpus if gpus else of_cpus))
    if not count:
        raise UsageError(
            f"a worker of {cpus} CPUs and {gpus:g} GPUs (--cpus_per_worker, --gpus_per_worker) has"
            f" no room: there are {of_cpus:g} CPUs and {of_gpus:g} GPUs"
        )
    return Resources(count, cpus, gpus)


# --- the driver -----------------------------------------------------------------------------------


@dataclass
class _Hand:
    """An actor as the driver sees it."""

    actor: ActorHandle
    coming: ObjectRef | None  # what it was asked for, None while it waits
    is_open: bool = False  # whether it has loaded its model and joined the run
    unit: Unit | None = None  # what it computes
    writing: Unit | None = None  # what it computed before, which may not be on the disk yet
    reserved: Unit | None = None  # what it is likely to get next
    since: float = 0.0  # when it was asked for what it does now

    @property
    def units(self) -> list[Unit]:
        """What is lost if it ends now, the older one first."""
        return [unit for unit in (self.writing, self.unit) if unit]


class _Driver:
    """Hands out what is left, takes what comes back, and replaces what ends."""

    def __init__(
        self,
        args: Namespace,
        make_worker: Callable[[Namespace], Worker[engine.AnyItem, engine.Content]],
        resources: Resources,
    ) -> None:
        import ray

        self.ray: Any = ray
        self.looked = 0.0  # when it was seen that a node lives
        self.args = args
        script = Path(make_worker.__code__.co_filename).resolve()
        if script.is_relative_to(CHECKOUT):
            script = script.relative_to(CHECKOUT)
        environment = {
            name: value
            for name, value in os.environ.items()
            if name.startswith(ENVIRONMENT) and "TOKEN" not in name
        }
        self.call = Call(str(script), make_worker.__name__, args, os.getcwd(), environment)
        self.resources = resources
        # a restart is ours to decide
        self.actor_class = ray.remote(Actor).options(
            num_cpus=resources.cpus,
            num_gpus=resources.gpus,
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy="SPREAD",
        )
        self.hands: list[_Hand] = []
        self.opening: _Hand | None = None
        self.plan: Plan | None = None
        self.left: deque[Unit] = deque()
        self.tried: dict[str, list[Record]] = {}
        self.failed: set[str] = set()
        self.in_a_row = 0  # actors that ended without having done anything
        self.asked = time.monotonic()
        self.is_patient = False  # whether the user knows that no actor has come yet

    def run(self) -> Outcome:
        """Everything that is left."""
        try:
            while self.plan is None:
                self._turn()
            run = self._seen_run()
            plan, workers = self.plan, f"{self.resources.actors} Ray workers"
            about = f"{plan.about}, {workers}" if plan.about else workers
            print(experiment.first_line(run.path, len(plan.ids), plan.progress, about))
            self._begin(run)
            count = sum(len(self._ids(unit)) for unit in self.left)
            begun = time.monotonic()
            with Progress(count, self.plan.progress) as self.bar:
                while self.left or any(hand.units or hand.reserved for hand in self.hands):
                    self._turn()
        finally:
            self._dismiss()
        attempts.clear(run.path, set(self.plan.ids))
        for name in ("", "per_image", "failures"):
            leases.sweep(run.path / name)  # of workers that were killed
        counts = {
            "done": len(self.plan.ids) - len(self.plan.done) - len(self.failed),
            "skipped": len(self.plan.done),
            "failed": len(self.failed),
        }
        engine.print_counts(counts, self.plan.progress, count, time.monotonic() - begun)
        return experiment.Outcome(run, counts, self.plan.ids, self.plan.facts)

    def _seen_run(self) -> Run:
        assert self.plan is not None
        path = Path(self.plan.path)
        if not is_seen(path, self.plan.created):
            raise UsageError(
                f"{path} was opened on another machine and is not seen here: the run directory has"
                " to lie where all machines see it under the same name (--out_root)"
            )
        return rundirs.read_run(path, self.plan.experiment)

    def _begin(self, run: Run) -> None:
        """Units of all batches that are left; those apart of which an item has ended its process
        before."""
        assert self.plan is not None
        self.open_run = run
        self.tried = attempts.tried(run.path)
        for id, failure in run.failed().items():
            earlier = failure.get("facts", {}).get("attempts")
            if isinstance(earlier, list):
                self.tried[id] = earlier + self.tried.get(id, [])
        for number in self.plan.batches:
            self.left.extend(self._units_of(number))

    def _units_of(self, number: int) -> list[Unit]:
        """A batch as a whole, or its items where it ended its process too often."""
        assert self.plan is not None
        ids = self.plan.batches[number]
        worst = max(len(self.tried.get(id, ())) for id in ids)
        if worst < MOST - 1:
            return [Unit(number)]
        return [Unit(number, at) for at, id in enumerate(ids) if id not in self.plan.done]

    def _ids(self, unit: Unit | None) -> list[str]:
        assert self.plan is not None
        if unit is None:
            return []
        ids = self.plan.batches[unit.batch]
        return ids if unit.item is None else [ids[unit.item]]

    # --- one turn ---------------------------------------------------------------------------------

    def _turn(self) -> None:
        """Hire, hand out, wait for what comes first."""
        self._hire()
        self._let_in()
        for hand in self.hands:
            self._hand_out(hand)
        waited_for = {hand.coming: hand for hand in self.hands if hand.coming}
        ready, _ = self.ray.wait([*waited_for], num_returns=1, timeout=1.0)
        for future in ready:
            self._take(waited_for[future])
        if not ready:
            self._look_for_nodes()
        self._look_at_the_clock()

    def _look_for_nodes(self) -> None:
        """UsageError where nothing came for a while because no node lives: no actor would ever."""
        if time.monotonic() - self.looked < LOOK:
            return
        self.looked = time.monotonic()
        if not any(node["Alive"] for node in self.ray.nodes()):
            raise UsageError(
                "no node of the Ray cluster lives; nothing already computed is lost, the same"
                " command goes on from there"
            )

    def _hire(self) -> None:
        """Keep as many actors as there are to be, and not more than there is work."""
        wanted = self.resources.actors
        if self.plan is not None:
            busy = sum(bool(hand.unit or hand.reserved) for hand in self.hands)
            wanted = min(wanted, len(self.left) + busy)
        while len(self.hands) < wanted:
            actor = self.actor_class.remote(self.call)
            self.hands.append(_Hand(actor, actor.start.remote()))

    def _hand_out(self, hand: _Hand) -> None:
        """A unit for an actor that computes none, and what is likely to follow. Where there is
        none, or one of the two was tried before, it is first to write what it has computed."""
        if hand.coming or not hand.is_open:
            return
        unit, hand.since = self._next(hand), time.monotonic()
        tried = any(self.tried.get(id) for each in (unit, hand.writing) for id in self._ids(each))
        if hand.writing and (unit is None or tried):
            hand.reserved = unit
            hand.coming = hand.actor.written.remote()
        elif unit:
            hand.unit = unit
            if self.args.num_workers and self.left:
                hand.reserved = self.left.popleft()
            hand.coming = hand.actor.compute.remote(unit, hand.reserved)

    def _next(self, hand: _Hand) -> Unit | None:
        """What was reserved for it, else the first that is left, else what another has reserved."""
        if hand.reserved:
            unit, hand.reserved = hand.reserved, None
            return unit
        if self.left:
            return self.left.popleft()
        for other in self.hands:
            if other.reserved:
                unit, other.reserved = other.reserved, None
                return unit
        return None

    def _take(self, hand: _Hand) -> None:
        """What an actor has done, or how it has ended."""
        try:
            value = self.ray.get(hand.coming)
        except self.ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, UsageError):
                raise UsageError(str(error.cause)) from None
            if "CUDA error" not in str(error):
                raise
            self._lost(hand, "a CUDA error, after which a process is of no use")
        except self.ray.exceptions.RayError as error:
            self._lost(hand, _reason(error))
        else:
            hand.coming = None
            self._arrived(hand, value)

    def _arrived(self, hand: _Hand, value: object) -> None:
        """An actor has loaded its model (what it printed), opened the run directory (the plan),
        joined the others there, or computed its unit or written the one before (the report of
        that)."""
        if hand.is_open:
            if isinstance(value, Report):
                self._done(self._ids(hand.writing), value)
            hand.writing, hand.unit = hand.unit, None
            self.in_a_row = 0
        elif isinstance(value, str):
            if not self.plan and not self.opening:
                _print(value)
        else:
            if isinstance(value, Plan):
                self.plan = value
            hand.is_open = True

    def _let_in(self) -> None:
        """Have one of the actors that have loaded their model open the run directory, then the
        others join."""
        for hand in self.hands:
            if hand.coming or hand.is_open:
                continue
            if self.plan:
                hand.coming = hand.actor.join.remote(self.plan.path, self.plan.created)
            elif self.opening not in self.hands:
                self.opening = hand
                hand.coming = hand.actor.open.remote()

    def _done(self, ids: list[str], report: Report) -> None:
        self.failed.update(report.failed)
        _print(report.said)
        self.bar.update(len(ids), len(report.failed))

    # --- what ends --------------------------------------------------------------------------------

    def _lost(self, hand: _Hand, reason: str) -> None:
        """An actor has ended: what was on it goes back, what it was computing, or had not written
        yet, counts as tried."""
        self.hands.remove(hand)
        with contextlib.suppress(Exception):
            self.ray.kill(hand.actor)
        self.in_a_row += 1
        limit = IN_A_ROW + self.resources.actors if self.plan else 3
        if self.in_a_row >= limit:
            raise UsageError(
                f"{self.in_a_row} Ray workers in a row ended before anything was done"
                f" ({reason.rstrip('.')}); nothing already computed is lost, the same command goes"
                " on from there"
            )
        if hand.reserved:
            self.left.appendleft(hand.reserved)
        if hand.writing and not attempts.last(self.open_run.path, self._ids(hand.writing)):
            self.left.appendleft(hand.writing)  # it had been written, which only was not said yet
            hand.writing = None
        for unit in hand.units:
            self._broke(unit, reason)

    def _broke(self, unit: Unit, reason: str) -> None:
        """A unit during which its actor ended."""
        assert self.plan is not None
        ids = self._ids(unit)
        _print(f"a worker ended at {', '.join(ids[:4])}{', ...' * (len(ids) > 4)}: {reason}")
        attempt = attempts.last(self.open_run.path, ids) | {"ended": reason}
        for id in ids:
            self.tried.setdefault(id, []).append(attempt)
        if unit.item is None:
            units = self._units_of(unit.batch)
            if units[0].item is not None:
                self.bar.update(len(ids) - len(units))
            self.left.extend(units)
        elif len(self.tried[ids[0]]) < MOST:
            self.left.append(unit)
        else:
            self._give_up(ids[0], reason)

    def _give_up(self, id: str, reason: str) -> None:
        """An item that has ended its process too often is a failure."""
        error = RuntimeError(
            f"its process ended {len(self.tried[id])} times while this was computed; the last time:"
            f" {reason}"
        )
        self.open_run.fail(id, error, stage="process", attempts=self.tried[id])
        self.failed.add(id)
        self.bar.update(1, failed=1)

    def _look_at_the_clock(self) -> None:
        """End actors that take too long; say once if none has come."""
        now = time.monotonic()
        limit = self.args.batch_timeout
        for hand in [*self.hands] if limit else []:
            if hand.units and now - hand.since > limit:
                self._lost(hand, f"it took longer than --batch_timeout {limit:g} s")
        if not self.is_patient and self.plan is None and now - self.asked > 120:
            self.is_patient = True
            _print(
                "no Ray worker is ready yet: one takes"
                f" {self.resources.cpus} CPUs and {self.resources.gpus:g} GPUs, free are"
                f" {_free(self.ray.available_resources())}\n"
            )

    def _dismiss(self) -> None:
        """End all actors, and forget what was begun for no fault of its own."""
        begun = [hand for hand in self.hands if hand.units]
        for hand in self.hands:
            with contextlib.suppress(Exception):
                self.ray.kill(hand.actor)
        self.hands.clear()
        if begun and self.plan:
            # they come when the actor has ended
            futures = [hand.coming for hand in begun if hand.coming]
            with contextlib.suppress(Exception):
                self.ray.wait(futures, num_returns=len(futures), timeout=10)
            for unit in (unit for hand in begun for unit in hand.units):
                attempts.undo(Path(self.plan.path), self._ids(unit))


def _print(text: str) -> None:
    """What an actor has printed, above the bar."""
    if text.strip():
        tqdm.write(text.rstrip("\n"), file=sys.stdout)


def _free(there: dict[str, float]) -> str:
    return f"{there.get('CPU', 0):g} and {there.get('GPU', 0):g}"


def _reason(error: BaseException) -> str:
    """In a few words why an actor has ended, without what Ray has to say in general."""
    text = " ".join(str(error).split())
    for pattern in (
        r"Worker exit detail: (.*?)(?: Some common causes|$)",
        r".*\b(\w+Error: .*)",
        r"((?:The actor|The node|Its node)[^.]*(?:died|dead|lost)[^.]*\.)",
    ):
        if found := re.search(pattern, text):
            return found[1][:300]
    return text[:300] or type(error).__name__

"""A script's work, and the one call that runs it.

    def make_worker(args):                      # loads the model; opens and computes nothing
        vlm = load_from_args(args)
        return worker_for(args, vlm, "relevancy", samples, load, process, settings, free)

    return run_worker(args, make_worker, finish)      # the exit code

In this process, as one shard of several, or by Ray in many processes (--engine ray): the script
does not know which.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Generic, NamedTuple

from vlmdiag.cli import RAY_FLAGS, UsageError
from vlmdiag.runs import engine, rundirs
from vlmdiag.types import Fields

if TYPE_CHECKING:
    from vlmdiag.runs.rundirs import Run
    from vlmdiag.types import VLM


@dataclass(frozen=True)
class Worker(Generic[engine.AnyItem, engine.Content]):
    """What a script does with one model. Nothing of it is done yet: the engine opens the run
    directory, cuts the items into batches and calls load() and process() (engine.run_items)."""

    path: Path  # of the run directory
    experiment: str
    identity: Fields  # settings that the numbers depend on (rundirs.open_run)
    free: Fields  # settings that may differ between calls
    items: Sequence[engine.AnyItem]  # all of them, in order
    load: Callable[[engine.AnyItem], engine.Content]
    process: engine.Process[engine.Content]
    batch_size: int = 1
    progress: str = "images"  # what an item is called
    about: str = ""  # the model in a few words
    # what has to be done once a call, before the first batch, with the items of this call
    prepare: Callable[[Run, Sequence[engine.AnyItem]], None] | None = None
    facts: Fields = field(default_factory=dict)  # plain values of the model that finish() needs


class Outcome(NamedTuple):
    """What a call did: its run directory, {"done", "skipped", "failed"}, the ids of its items, and
    the worker's facts."""

    run: Run
    counts: dict[str, int]
    ids: list[str]
    facts: Fields


def worker_for(
    args: Namespace,
    vlm: VLM,
    experiment: str,
    items: Sequence[engine.AnyItem],
    load: Callable[[engine.AnyItem], engine.Content],
    process: engine.Process[engine.Content],
    settings: Fields,
    free: Fields,
    path: Path | None = None,
    batch_size: int = 1,
    progress: str = "images",
    prepare: Callable[[Run, Sequence[engine.AnyItem]], None] | None = None,
    facts: Fields | None = None,
) -> Worker[engine.AnyItem, engine.Content]:
    """The worker of a script that shows prompts to a model.

    args: the flags of add_model_arguments() and cli.add_run_arguments(). settings: what the numbers
    depend on besides the model, its dtype and its prompt, which are put in front of them; free:
    what may differ between calls, besides the device. path: the run directory, by default
    <out_root>/<experiment>/<model>[__<run_name>]. The rest: see Worker.
    """
    from vlmdiag.model.identity import file_digests, identity_of
    from vlmdiag.model.prompts import prompt_for

    if path is None:
        path = rundirs.run_path(args.out_root, vlm.path, experiment, args.run_name)
    prompt = prompt_for(vlm, "QUESTION")
    system = prompt.text[slice(*prompt.system)] if prompt.system else ""
    identity = identity_of(vlm) | {"prompt": prompt.text} | dict(settings)
    free = dict(free) | {"model_path": vlm.path, "device": str(vlm.device)}
    # what tells a user which part of the model or the prompt another call has differently
    free |= {"model_files": file_digests(vlm.path), "system_prompt": system}
    about = f"{vlm.family.name} on {vlm.device}, {identity['dtype']}"
    return Worker(
        path,
        experiment,
        identity,
        free,
        items,
        load,
        process,
        batch_size,
        progress,
        about,
        prepare,
        facts or {},
    )


def open_worker(
    worker: Worker[engine.AnyItem, engine.Content], shard: tuple[int, int], overwrite: bool
) -> tuple[Run, list[list[engine.AnyItem]]]:
    """(the run directory, new or with the same settings, the batches of this call), prepared.
    UsageError: see rundirs.open_run(); an id that occurs twice."""
    batches = engine.batches_of(worker.items, worker.batch_size, shard)
    run = rundirs.open_run(worker.path, worker.experiment, worker.identity, worker.free, overwrite)
    if worker.prepare:
        worker.prepare(run, [item for batch in batches for item in batch])
    return run, batches


def first_line(path: Path, count: int, progress: str, about: str) -> str:
    """What a call says before it computes."""
    return f"{path}: {count} {progress}, {about}"


def run_worker(
    args: Namespace,
    make_worker: Callable[[Namespace], Worker[engine.AnyItem, engine.Content]],
    finish: Callable[[Namespace, Outcome], int | None] | None = None,
) -> int:
    """Do a script's work with one model; returns the exit code.

    args: plain values, the flags of cli.add_run_arguments() among them. make_worker(args): a
    function of the script's own file, which other processes call too. finish(args, outcome): what
    has to be done with the run when the items are done, in this process, without the model; it
    may return a higher exit code. UsageError: other settings than the run was made with, a place
    that cannot be written.
    """
    if args.engine == "ray":
        from vlmdiag.runs.ray_engine import compute

        outcome = compute(args, make_worker)
    else:
        outcome = _compute(args, make_worker(args))
    outcome.run.finish()
    code = engine.exit_code(outcome.counts, outcome.run)
    return max(code, (finish and finish(args, outcome)) or 0)


def _compute(args: Namespace, worker: Worker[engine.AnyItem, engine.Content]) -> Outcome:
    """The items of this process."""
    given = [name for name in RAY_FLAGS if getattr(args, name) is not None]
    if given:
        raise UsageError(f"--{given[0]} needs --engine ray")
    run, batches = open_worker(worker, args.shard, args.overwrite)
    print(first_line(run.path, len(worker.items), worker.progress, worker.about))
    counts = engine.run_items(
        run,
        worker.items,
        worker.load,
        worker.process,
        worker.batch_size,
        args.shard,
        args.num_workers,
        worker.progress,
    )
    return Outcome(run, counts, [item.id for batch in batches for item in batch], worker.facts)

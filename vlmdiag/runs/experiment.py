"""The one call that runs an experiment: open its run directory, compute its items, finish.

outcome = run_experiment(args, vlm, "relevancy", samples, load, process, settings, free)
return outcome.code
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from vlmdiag.model.identity import file_digests, identity_of
from vlmdiag.model.prompts import prompt_for
from vlmdiag.runs import engine, rundirs
from vlmdiag.types import Fields

if TYPE_CHECKING:
    from vlmdiag.runs.rundirs import Run
    from vlmdiag.types import VLM


class Outcome(NamedTuple):
    """What a call did: its run directory, {"done", "skipped", "failed"}, and the exit code."""

    run: Run
    counts: dict[str, int]
    code: int


def open_experiment(
    args: Namespace,
    vlm: VLM,
    experiment: str,
    settings: Fields,
    free: Fields,
    path: Path | None = None,
) -> Run:
    """The run directory of an experiment, new or with the same settings.

    args: the flags of add_model_arguments() and engine.add_run_arguments(). settings: what the
    numbers depend on besides the model, its dtype and its prompt, which are put in front of them;
    free: what may differ between calls, besides the device. path: the run directory, by default
    <out_root>/<experiment>/<model>[__<run_name>]. UsageError: see rundirs.open_run().
    """
    if path is None:
        path = rundirs.run_path(args.out_root, vlm.path, experiment, args.run_name)
    prompt = prompt_for(vlm, "QUESTION")
    system = prompt.text[slice(*prompt.system)] if prompt.system else ""
    identity = identity_of(vlm) | {"prompt": prompt.text} | dict(settings)
    free = dict(free) | {"model_path": vlm.path, "device": str(vlm.device)}
    # what tells a user which part of the model or the prompt another call has differently
    free |= {"model_files": file_digests(vlm.path), "system_prompt": system}
    return rundirs.open_run(path, experiment, identity, free, args.overwrite)


def run_experiment(
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
) -> Outcome:
    """Open the run directory of an experiment and compute the items that it lacks.

    load, process, batch_size, progress: see engine.run_items(); the rest: see open_experiment().
    UsageError: other settings than the run was made with, a place that cannot be written.
    """
    run = open_experiment(args, vlm, experiment, settings, free, path)
    return complete(args, vlm, run, items, load, process, batch_size, progress)


def complete(
    args: Namespace,
    vlm: VLM,
    run: Run,
    items: Sequence[engine.AnyItem],
    load: Callable[[engine.AnyItem], engine.Content],
    process: engine.Process[engine.Content],
    batch_size: int = 1,
    progress: str = "images",
) -> Outcome:
    """The second half of run_experiment(), for scripts that write into the run in between."""
    dtype = run.meta["settings"]["dtype"]
    print(f"{run.path}: {len(items)} {progress}, {vlm.family.name} on {vlm.device}, {dtype}")
    counts = engine.run_items(
        run, items, load, process, batch_size, args.shard, args.num_workers, progress
    )
    run.finish()
    return Outcome(run, counts, engine.exit_code(counts, run))

"""Which runs and images a figure shows, and their arrays."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vlmdiag.cli import UsageError

if TYPE_CHECKING:
    from vlmdiag.runs.rundirs import Array, Run


def run_labels(runs: Sequence[Run]) -> list[str]:
    """One label a run: its own, whatever the order of the arguments; runs of one name in several
    folders are told apart by the folder. UsageError for a run that is given twice."""
    names = [run.label for run in runs]
    labels = []
    for run in runs:
        is_unique = names.count(run.label) == 1
        labels.append(run.label if is_unique else f"{run.label}, {run.path.parent}")
    for label in labels:
        if labels.count(label) > 1:
            raise UsageError(f"the run {label} is given more than once")
    return labels


def select_runs(runs: Sequence[Run], models: Sequence[str] | None) -> list[Run]:
    """The runs that --models names, in that order: by folder name, label or model name. For None
    all of them, sorted by label. UsageError for a name that none or an earlier one has."""
    if models is None:
        return sorted(runs, key=lambda run: run.label)
    by_name: dict[str, Run] = {}
    for run in runs:
        for name in (run.path.name, _model_of(run), run.label):
            by_name.setdefault(name, run)
    chosen: list[Run] = []
    for model in models:
        named = by_name.get(model)
        if named is None or named in chosen:
            what = "is not among the runs" if named is None else "is named twice"
            known = ", ".join(_model_of(run) for run in runs)
            raise UsageError(f"--models {model} {what}; there are {known}")
        chosen.append(named)
    return chosen


def _model_of(run: Run) -> str:
    return run.path.name.split("__sp-")[0]


def read_arrays(run: Run, keys: Sequence[str], advice: str) -> tuple[list[str], dict[str, Array]]:
    """run.stack(keys), or a UsageError with the advice that says how to make what the run lacks."""
    _check_keys(run, keys, advice)
    return run.stack(keys)


def read_parts(
    run: Run, keys: Sequence[str], advice: str
) -> Iterator[tuple[list[str], dict[str, Array]]]:
    """run.parts(keys), or a UsageError with the advice that says how to make what the run lacks."""
    _check_keys(run, keys, advice)
    return run.parts(keys)


def _check_keys(run: Run, keys: Sequence[str], advice: str) -> None:
    ids = run.ids()
    if not ids:
        raise UsageError(
            f"{run.path} has no finished image yet; run the command that makes it again"
        )
    missing = sorted(set(keys) - set(run.arrays(ids[0])))
    if missing:
        raise UsageError(f"{run.path} has no {', '.join(missing)}; {advice}")


def comparison_path(runs: Sequence[Run], name: str) -> Path:
    """Where a figure that compares runs goes: beside the first of them, '<name>_sp1' if none of
    them had a system prompt."""
    if all(str(run.path).endswith("__sp-1") for run in runs):
        name += "_sp1"
    return Path(os.path.abspath(runs[0].path)).parent / name


def shared_ids(runs: Sequence[Run], ids: Sequence[Sequence[str]]) -> list[str]:
    """The sorted item ids that every run has. ids: one list a run. UsageError if there are none."""
    shared = sorted(set(ids[0]).intersection(*ids[1:]))
    if not shared:
        raise UsageError(
            f"no image was measured in all of {', '.join(run.label for run in runs)}; select fewer"
            " with --models or measure the same images"
        )
    return shared


def find_id(
    ids: Sequence[str], image_key: str | None = None, npz_basename: str | None = None
) -> str:
    """The one id that --npz_basename names exactly or --image_key is a part of; an id that equals
    the key wins. UsageError lists a few where it is not one."""
    key = npz_basename.removesuffix(".npz") if npz_basename else image_key or ""
    matches = [id for id in ids if id == key]
    if not matches and not npz_basename:
        matches = [id for id in ids if key in id]
    if len(matches) == 1:
        return matches[0]
    listed = matches or ids
    few = ", ".join(listed[:5])
    if len(listed) > 5:
        few += ", ..."
    flag = "--npz_basename" if npz_basename else "--image_key"
    raise UsageError(
        f"{flag} {key!r} fits {len(matches)} of the {len(ids)} images that all shown runs have;"
        f" give one of: {few}"
    )

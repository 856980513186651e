"""Which run directories there are, and which of them are one model's.

A run belongs to the model that its settings name, whatever its folder is called: swap_analysis/
tiny_full is a run of tiny-llava.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vlmdiag.cli import UsageError
from vlmdiag.runs import rundirs
from vlmdiag.runs.rundirs import Run

SWAP = "swap_analysis"
SP = ("", "__sp-0", "__sp-1")


@dataclass
class Subject:
    """One model: its run of every experiment, and where its swap results are."""

    name: str
    runs: dict[str, Run] = field(default_factory=dict)  # by experiment
    # by experiment: the names of several runs of which none is the model's more than the others
    unclear: dict[str, list[str]] = field(default_factory=dict)
    results: tuple[Path, str] | None = None  # folder and scale of swap_analysis.py


def model_of(run: Run) -> str:
    """The name of a run's model, as run directories have it."""
    return rundirs.slug(run.meta["free"].get("model_path") or run.label)


def experiment_of(run: Run) -> str:
    name: str = run.meta["experiment"]
    return name


def find(runs_dir: str | Path) -> tuple[list[Run], list[str]]:
    """(the runs in a folder or one below it, by experiment and label; what could not be read, a
    line each). UsageError where there is none."""
    root = Path(runs_dir)
    folders = sorted(
        {file.parent for depth in (1, 2) for file in root.glob("*/" * depth + "meta.json")}
    )
    if (root / "meta.json").is_file():
        folders = [root, *folders]
    runs, broken = [], []
    for folder in folders:
        try:
            runs.append(rundirs.read_run(folder))
        except UsageError as error:
            broken.append(str(error))
    if not runs:
        reason = f": {broken[0]}" if broken else ""
        raise UsageError(
            f"{root} has no run directories{reason}; run_checkup.sh makes some, or any command of"
            " the five diagnoses"
        )
    return sorted(runs, key=lambda run: (experiment_of(run), run.label)), broken


def subjects(
    runs: Sequence[Run], results_dir: str | Path | None = None, names: Sequence[str] | None = None
) -> list[Subject]:
    """The models of the runs, in the order of `names` or of the alphabet. Of several runs of one
    experiment a model's is the one without --run_name and with its system prompt, else the only one
    that measured the model as it is; UsageError for a name that no run has."""
    found: dict[str, Subject] = {}
    named: dict[str, dict[str, list[Run]]] = {}  # by model and experiment
    for run in sorted(runs, key=_preference):
        name, experiment = model_of(run), experiment_of(run)
        subject = found.setdefault(name, Subject(name))
        is_plain = run.path.name in [f"{name}{ending}" for ending in SP]
        if is_plain or experiment == SWAP:
            subject.runs.setdefault(experiment, run)
        elif run.meta["settings"].get("vision_scale", 1) == 1:
            named.setdefault(name, {}).setdefault(experiment, []).append(run)
    for name, subject in found.items():
        for experiment, others in named.get(name, {}).items():
            if experiment in subject.runs:
                continue
            if len(others) == 1:
                subject.runs[experiment] = others[0]
            else:
                subject.unclear[experiment] = [run.path.name for run in others]
        if results_dir is not None and SWAP in subject.runs:
            subject.results = _results_of(subject.runs[SWAP], Path(results_dir))
    unknown = sorted(set(names or ()) - set(found))
    if unknown:
        raise UsageError(f"no run is of {', '.join(unknown)}; there are {', '.join(sorted(found))}")
    chosen = (found[name] for name in names or sorted(found))
    return [subject for subject in chosen if subject.runs or subject.unclear]


def _preference(run: Run) -> tuple[bool, bool, str]:
    """Runs that come first: with the system prompt, without a --run_name, of one model alone
    ('tiny-llava_full' before 'tiny_full')."""
    name = run.path.name
    without_system = name.endswith("__sp-1")
    has_name = "__" in name.removesuffix("__sp-0").removesuffix("__sp-1")
    return without_system, has_name or not name.startswith(model_of(run)), name


def _results_of(run: Run, results_dir: Path) -> tuple[Path, str] | None:
    """Where swap_analysis.py wrote the tree of a run: <results_dir>/<model_type>, of its scale."""
    name, _, run_name = run.path.name.partition("__")
    model_type, _, scale = name.rpartition("_")
    folder = results_dir / (f"{model_type}__{run_name}" if run_name else model_type)
    return (folder, scale) if (folder / "json" / f"vd_ei_{scale}.json").is_file() else None

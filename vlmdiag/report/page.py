"""One self-contained page of a folder of run directories, and the folder of its figures.

report.html is the template: Jinja2 with autoescape, style and script inline, nothing fetched. The
same runs give the same bytes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jinja2 import Environment, FileSystemLoader
from PIL import Image

from vlmdiag.figures import plots
from vlmdiag.report import claims, compare, sections
from vlmdiag.report.catalog import SWAP, Subject, experiment_of, model_of
from vlmdiag.report.quantities import quantities_of
from vlmdiag.runs import disk
from vlmdiag.runs.rundirs import Run
from vlmdiag.types import Fields, Record

if TYPE_CHECKING:
    from vlmdiag.figures.stats import Interval

TEMPLATES = Path(__file__).parent
MOST_BYTES = 24 * 2**20  # of a page; figures past it are linked
MOST_FAILURES = 20  # of a run, in full
DPI = 200  # pixels an inch of a figure's PNG, as saved


class Figures:
    """The figures of a report: files in <out>/figures, embedded in the page while there is room."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.bytes = 0
        self.linked = 0

    def add(self, drawn: sections.Drawn, settings: Fields) -> Record:
        """Save a figure, or copy the PNG of one with its PDF; returns what the template shows."""
        path = self.out / "figures" / re.sub(r"[^\w.+-]", "-", drawn.name)
        if not isinstance(drawn.figure, Path):
            return self.entry(plots.save(drawn.figure, path, settings, quiet=True)[0], drawn)
        for ending in (".png", ".pdf"):
            there = drawn.figure.with_suffix(ending)
            if there.is_file():
                disk.write_bytes(f"{path}{ending}", there.read_bytes())
        return self.entry(Path(f"{path}.png"), drawn)

    def entry(self, png: Path, drawn: sections.Drawn) -> Record:
        data = png.read_bytes()
        with Image.open(png) as picture:
            width, height = picture.size
        relative = png.relative_to(self.out).as_posix()
        source = relative
        if self.bytes + 4 * len(data) // 3 <= MOST_BYTES:
            source = "data:image/png;base64," + base64.b64encode(data).decode()
            self.bytes += len(source)
        else:
            self.linked += 1
        scale = 100 / DPI  # 100 of CSS's pixels an inch
        return {
            "anchor": f"figure-{png.stem}",
            "title": drawn.title,
            "what": drawn.what,
            "how": drawn.how,
            "source": source,
            "width": round(width * scale),
            "height": round(height * scale),
            "file": relative,
        }


def write(
    out: Path,
    title: str,
    runs: Sequence[Run],
    broken: Sequence[str],
    subjects: Sequence[Subject],
    found: Sequence[claims.Finding],
    compared: tuple[Run, Run] | None = None,
) -> Path:
    """Draw the figures and write <out>/index.html; returns its path."""
    figures = Figures(out)
    by_experiment = _grouped(runs)
    results = {
        folder: subject.name
        for subject in subjects
        for folder, _ in [subject.results or (None, "")]
    }
    swap = [
        drawn
        for folder, name in results.items()
        if folder is not None
        for drawn in sections.swap_figures(folder, name)
    ]
    shown = [
        _section(name, of, figures, swap if name == SWAP else ())
        for name, of in by_experiment.items()
    ]
    shown = [section for section in shown if section["figures"] or section["notes"]]
    anchors = {section["experiment"]: section["anchor"] for section in shown}
    differences: list[Record] = []
    difference_title = ""
    if compared:
        first, second = (run.label for run in compared)
        difference_title = f"{second} minus {first}"
        differences = [figures.add(*each) for each in _differences(compared)]
    models = list(dict.fromkeys(map(model_of, runs)))
    values: Record = {
        "title": title,
        "lead": f"Runs: {len(runs)}. Models: {', '.join(models)}.",
        "models": models,
        "broken": broken,
        "measured": [
            _measured(name, of, models, anchors)
            for name, of in by_experiment.items()
            if name != "mean_vector"  # what other experiments need
        ],
        "costs": [cost for cost in map(cost_of, runs) if cost],
        "claims": list(_claims(found)),
        "verdicts": _verdicts(found),
        "tests": sum(finding.interval is not None for finding in found),
        "sections": shown,
        "differences": differences,
        "difference_title": difference_title,
        "failures": [failure for failure in map(_failures, runs) if failure["lines"]],
        "settings": [_settings(run) for run in runs],
    }
    # what an injected script would have to know depends on the whole page
    values["nonce"] = hashlib.sha256(repr(values).encode("utf-8", "replace")).hexdigest()[:32]
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    path = out / "index.html"
    text = environment.get_template("report.html").render(values)
    plots.write_file(path, text.encode("utf-8", "backslashreplace"))
    if figures.linked:
        where = out / "figures"
        print(f"{figures.linked} figures past {MOST_BYTES >> 20} MB are linked: keep {where}")
    return path


def _grouped(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs by experiment, in the order of sections.EXPERIMENTS."""
    grouped: dict[str, list[Run]] = {name: [] for name in sections.EXPERIMENTS}
    for run in runs:
        grouped.setdefault(experiment_of(run), []).append(run)
    return {name: of for name, of in grouped.items() if of}


def _section(
    name: str, runs: Sequence[Run], figures: Figures, more: Sequence[sections.Drawn | str] = ()
) -> Record:
    """The figures of an experiment's runs, and more that were drawn elsewhere."""
    about = sections.experiment(runs[0])
    section: Record = {
        "experiment": name,
        "anchor": f"experiment-{name}",
        "title": about.title,
        "question": about.question,
        "paper": about.paper,
        "figures": [],
        "notes": [],
    }
    settings = {"runs": [str(run.path.name) for run in runs]}
    done = [run for run in runs if run.ids()]
    section["notes"] += [f"{run.label} has no finished item" for run in runs if not run.ids()]
    for drawn in [*(sections.figures_of(done) if done else ()), *more]:
        if isinstance(drawn, str):
            section["notes"].append(drawn)
        else:
            section["figures"].append(figures.add(drawn, settings))
    return section


def _differences(compared: tuple[Run, Run]) -> Iterator[tuple[sections.Drawn, Fields]]:
    first, second = compared
    labels = first.label, second.label
    for number, found in enumerate(compare.differences(*map(quantities_of, compared))):
        drawn = sections.Drawn(
            f"difference_{number:02d}_{found.quantity.name}",
            found.quantity.name[0].upper() + found.quantity.name[1:],
            compare.draw(found, *labels),
            f"{labels[1]} minus {labels[0]}, in {found.quantity.unit}, on"
            f" {len(found.quantity.ids)} pictures that both have.",
            "Where the interval does not reach 0, the two differ.",
        )
        yield drawn, {"runs": [run.path.name for run in compared]}


def _measured(
    name: str, runs: Sequence[Run], models: Sequence[str], anchors: Mapping[str, str]
) -> Record:
    """A row of the first table."""
    about = sections.experiment(runs[0])
    cells: list[list[str]] = []
    for model in models:
        lines = []
        for run in runs:
            if model_of(run) != model:
                continue
            failed = len(run.failed())
            name_of = "" if run.label in (model, f"{model}_full") else f"{run.label}: "
            lines.append(f"{name_of}{len(run.ids())}" + (f", {failed} failed" if failed else ""))
        cells.append(lines)
    return {
        "title": about.title if about is not sections.OTHER else name,
        "question": about.question,
        "anchor": anchors.get(name),
        "cells": cells,
    }


def cost_of(run: Run) -> Record | None:
    """What a run's calls counted of their time and memory; None for a run of older versions."""
    counted = run.meta.get("counters", {})
    items, milliseconds = counted.get("items_measured"), counted.get("milliseconds")
    if not items or milliseconds is None:
        return None
    memory = [f"{counted['peak_mib'] / 1024:.1f} GiB"] if "peak_mib" in counted else []
    if "peak_gpu_mib" in counted:
        memory.append(f"{counted['peak_gpu_mib'] / 1024:.1f} GiB of the GPU")
    return {
        "run": f"{experiment_of(run)}: {run.label}",
        "count": items,
        "seconds": f"{milliseconds / 1000 / items:.2f}",
        "memory": ", ".join(memory),
    }


def value_text(interval: Interval) -> str:
    """'0.53 [0.41, 0.66]'."""
    mean, low, high = (float(bound) for bound in interval[:3])
    digits = 2 if not np.isfinite(mean) or abs(mean) >= 0.1 or mean == 0 else 3
    limits = f" [{low:.{digits}f}, {high:.{digits}f}]" if np.isfinite(low) else ""
    return f"{mean:.{digits}f}{limits}"


def range_text(low: float, high: float) -> str:
    """'above 0.1', 'below 2' or '0.5 to 2'."""
    if np.isinf(high):
        return f"above {low:g}"
    return f"below {high:g}" if np.isinf(low) else f"{low:g} to {high:g}"


def _verdicts(found: Sequence[claims.Finding]) -> Record:
    """Claims by models, where a model has a testable part."""
    models = [
        name
        for name in dict.fromkeys(finding.model for finding in found)
        if any(finding.model == name and finding.interval is not None for finding in found)
    ]
    rows = []
    for number, claim in claims.CLAIMS.items():
        cells = []
        for name in models:
            of_model = [f for f in found if f.part.claim == number and f.model == name]
            cells.append(claims.of_claim(of_model) if of_model else "")
        rows.append({"number": number, "wording": claim.wording, "cells": cells})
    return {"models": models, "rows": rows}


def _claims(found: Sequence[claims.Finding]) -> Iterator[Record]:
    for number, claim in claims.CLAIMS.items():
        of_claim = [finding for finding in found if finding.part.claim == number]
        if not of_claim:
            continue
        rows = [
            {
                "quantity": finding.part.quantity,
                "range": range_text(finding.part.low, finding.part.high),
                "model": finding.model,
                "value": value_text(finding.interval),
                "n": int(finding.interval.n),
                "verdict": finding.verdict,
                "why": finding.why,
            }
            for finding in of_claim
            if finding.interval is not None
        ]
        untestable: dict[str, list[str]] = {}
        for finding in of_claim:
            if finding.interval is None:
                models = untestable.setdefault(finding.why, [])
                if finding.model not in models:
                    models.append(finding.model)
        sources = dict.fromkeys(
            f"{finding.part.quantity}: {range_text(finding.part.low, finding.part.high)}."
            f" {finding.part.source[0].upper()}{finding.part.source[1:]}."
            for finding in of_claim
        )
        missing = [f"{', '.join(models)}: {why}" for why, models in untestable.items()]
        yield {"number": number, **claim._asdict(), "rows": rows} | {
            "untestable": missing,
            "sources": list(sources),
        }


def _failures(run: Run) -> Record:
    failed = run.failed()
    lines = [
        f"{id}: {failure.get('type')}: {failure.get('message')}"
        for id, failure in list(failed.items())[:MOST_FAILURES]
    ]
    if len(failed) > MOST_FAILURES:
        lines.append(f"and {len(failed) - MOST_FAILURES} more, in {run.path / 'failures'}")
    return {"name": f"{experiment_of(run)}: {run.label}", "lines": lines}


def _settings(run: Run) -> Record:
    content = {name: run.meta.get(name) for name in ("settings", "free", "versions", "created")}
    return {
        "name": f"{experiment_of(run)}: {run.label}",
        "text": json.dumps(content, indent=1, ensure_ascii=False, sort_keys=True),
    }


def flattened(value: object, path: str = "") -> Iterator[tuple[str, float]]:
    """Every number in nested JSON, with its place: ('kinds.all.psi.mean', 0.2)."""
    if isinstance(value, Mapping):
        for key, entry in value.items():
            yield from flattened(entry, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for index, entry in enumerate(value):
            yield from flattened(entry, f"{path}.{index}")
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield path, value


def analyses_of(run: Run) -> Iterator[tuple[str, str, float]]:
    """(file, place, number) of the JSON files that analyses of a run wrote."""
    for file in sorted((run.path / "analysis").glob("*.json")):
        content = disk.read_json(file)
        content.pop("settings", None)
        for place, number in flattened(content):
            yield file.name, place, number

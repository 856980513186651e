"""The table, file and figure of a run of diagnostic_tools/psi.py.

Beyond Semantics (arXiv 2503.17349), table 2; docs/studies/beyond_semantics.md, section 2.8.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np

from vlmdiag.beyond_semantics.position_sensitivity import summarise
from vlmdiag.cli import UsageError
from vlmdiag.figures import plots, stats
from vlmdiag.types import Fields, Record

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from vlmdiag.figures.stats import Interval
    from vlmdiag.runs.rundirs import Run

Summaries = dict[str, Record]  # {'all' or kind of question: summarise() of its records}
MEASURES = ("accuracy", "accuracy_permuted", "psi")


def summaries_of(run: Run) -> Summaries:
    """Summaries of all questions of a run and of each kind. UsageError for a run without a finished
    question."""
    records = run.records()
    if not records:
        raise UsageError(
            f"{run.path} has no finished question yet; run the command that makes it again, without"
            " --analyze_only"
        )
    summaries = {"all": summarise(records)}
    kinds = sorted({record["kind"] for record in records})
    if len(kinds) > 1:
        for kind in kinds:
            of_kind = [record for record in records if record["kind"] == kind]
            summaries[kind] = summarise(of_kind)
    return summaries


def analyse(run: Run) -> Summaries:
    """Print the table of a run, write analysis/psi.json and the figure; returns the summaries."""
    summaries = summaries_of(run)
    print(table_of(run.label, summaries))
    settings = run.meta["settings"]
    content = {
        "definition": "PSI = (accuracy - accuracy_permuted) / accuracy, each image counting once",
        "settings": settings,
        "kinds": _plain(summaries),
    }
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    stem = run.path / "analysis" / "psi"
    plots.write_file(stem.with_suffix(".json"), text.encode())
    figure = draw(run.label, settings["num_permutations"], summaries)
    plots.save(figure, stem, settings | {"questions_used": summaries["all"]["questions"]})
    return summaries


def table_of(label: str, summaries: Summaries) -> str:
    """The summaries as lines of text."""
    lines = [
        f"{label}: mean [95 % interval over images]",
        f"{'kind':14s}{'questions':>10s}{'images':>8s}  {'accuracy':20s}{'shuffled':20s}PSI",
    ]
    for kind, summary in summaries.items():
        cells = "".join(f"{_shown(summary[name]):20s}" for name in MEASURES)
        counts = f"{summary['questions']:10d}{summary['images']:8d}"
        lines.append(f"{kind:14s}{counts}  {cells}".rstrip())
    return "\n".join(lines)


def _shown(interval: Interval) -> str:
    return f"{interval.mean:.3f} [{interval.low:.2f}, {interval.high:.2f}]"


def _plain(value: object) -> object:
    """Intervals and numpy numbers as JSON holds them, NaN as null."""
    if isinstance(value, stats.Interval):
        return {name: _plain(number) for name, number in value._asdict().items()}
    if isinstance(value, dict):
        return {name: _plain(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and math.isnan(value) else value


def draw(label: str, num_permutations: int, summaries: Summaries) -> Figure:
    """Two bars per kind with intervals: accuracy in order and shuffled; PSI above them."""
    count = len(summaries)
    figure, axis = plt.subplots(figsize=(max(5.2, 1.8 + 1.15 * count), 4.6))
    place = np.arange(count, dtype=float)
    place[1:] += 0.25  # all questions stand apart from the kinds
    in_order = (-0.2, "accuracy", "vision tokens in order", 1.0)
    shuffled = (0.2, "accuracy_permuted", f"shuffled (mean of {num_permutations})", 0.4)
    color = plots.color_of(label)
    for shift, name, bar_label, opacity in (in_order, shuffled):
        mean, low, high = (
            np.array([summary[name][bound] for summary in summaries.values()]) for bound in range(3)
        )
        error = np.clip([mean - low, high - mean], 0, None)
        x = place + shift
        axis.bar(x, mean, 0.38, color=color, alpha=opacity, label=bar_label)
        axis.errorbar(x, mean, error, fmt="none", ecolor="#222222", elinewidth=1, capsize=2.5)
    for middle, summary in zip(place, summaries.values()):
        axis.text(middle, 1.12, _score(summary["psi"]), ha="center", va="top", fontsize=7.5)
    names = [_kind_label(kind, summary) for kind, summary in summaries.items()]
    axis.set_xticks(place, names, fontsize=8)
    centre = place[-1] / 2
    axis.set(
        xlim=(min(-0.55, centre - 1.3), max(place[-1] + 0.55, centre + 1.3)),
        ylim=(0, 1.24),
        ylabel="accuracy (95 % interval over images)",
        title=f"{label}\nRight answers with vision tokens in order and shuffled",
    )
    axis.set_yticks(np.linspace(0, 1, 6))
    axis.grid(False, axis="x")
    axis.set_axisbelow(True)
    axis.legend(loc="upper right", ncols=2, frameon=False, borderaxespad=0)
    return figure


def _score(psi: Interval) -> str:
    """PSI as it is written above the bars of a kind."""
    if math.isnan(psi.mean):
        return "PSI undefined\n(none right)"
    if math.isnan(psi.low):
        return f"PSI {psi.mean:.2f}"
    return f"PSI {psi.mean:.2f}\n[{psi.low:.2f}, {psi.high:.2f}]"


def _kind_label(kind: str, summary: Fields) -> str:
    questions = _counted(summary["questions"], "question")
    images = _counted(summary["images"], "image")
    return f"{kind.replace('_', ' ')}\n{questions}\n{images}"


def _counted(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"

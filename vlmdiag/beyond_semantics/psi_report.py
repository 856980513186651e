"""The table, file and figures of runs of diagnostic_tools/psi.py.

Beyond Semantics (arXiv 2503.17349), table 2; docs/studies/beyond_semantics.md, section 2.8.
"""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np

from vlmdiag.beyond_semantics.position_sensitivity import summarise
from vlmdiag.cli import UsageError
from vlmdiag.figures import plots, stats
from vlmdiag.runs import selection
from vlmdiag.types import Fields, Record

if TYPE_CHECKING:
    from jaxtyping import Float
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from vlmdiag.figures.stats import Interval
    from vlmdiag.runs.rundirs import Run

Summaries = dict[str, Record]  # {'all' or kind of question: summarise() of its records}
NOTED = 0.05  # share of answers that could not be read, from which on the table says so
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


def compare(runs: Sequence[Run]) -> None:
    """Write the figure of several runs beside the first of them."""
    labels = selection.run_labels(runs)
    figure = draw_comparison({label: summaries_of(run) for label, run in zip(labels, runs)})
    path = selection.comparison_path(runs, "compare_psi")
    plots.save(figure, path, {"runs": [str(run.path) for run in runs]})


def table_of(label: str, summaries: Summaries) -> str:
    """The summaries as lines of text."""
    width = max(14, 2 + max(map(len, summaries)))
    lines = [
        f"{label}: each image counting once, mean [95 % interval over images]",
        f"{'kind':{width}s}{'questions':>10s}{'images':>8s}  {'accuracy':20s}{'shuffled':20s}PSI",
    ]
    for kind, summary in summaries.items():
        cells = "".join(f"{_shown(summary[name]):20s}" for name in MEASURES)
        counts = f"{summary['questions']:10d}{summary['images']:8d}"
        lines.append(f"{kind:{width}s}{counts}  {cells}".rstrip())
    unread = summaries["all"]["share_without_a_known_answer"]["original"]
    if unread > NOTED:
        lines.append(
            f"{unread:.0%} of the answers were read as no answer that the question may have: see"
            " 'text' and 'read_as' in per_image/"
        )
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
    """Accuracy in order and shuffled, and PSI, both with intervals; a row a kind of question."""
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(9.6, 1.7 + 0.52 * len(summaries)), sharey=True, width_ratios=(1.15, 1)
    )
    rows = np.arange(len(summaries), dtype=float)
    color = plots.color_of(label)
    in_order = (-0.13, "accuracy", "in order", {"color": color})
    shuffled = (
        0.13,
        "accuracy_permuted",
        f"shuffled, mean of {num_permutations}",
        {"color": color, "markerfacecolor": "white"},
    )
    for shift, name, words, look in (in_order, shuffled):
        _points(left, rows + shift, [summary[name] for summary in summaries.values()], words, look)
    _points(
        right, rows, [summary["psi"] for summary in summaries.values()], "PSI", {"color": color}
    )
    left.set(xlim=(-0.02, 1.02), xlabel="accuracy", title="Right answers")
    left.set_yticks(rows, [_kind_label(*entry) for entry in summaries.items()], fontsize=8)
    left.set_ylim(len(rows) - 0.5, -0.5)
    _psi_axis(right)
    left.legend(loc="lower left", fontsize=8)
    figure.suptitle(f"{label}: vision tokens in order and shuffled, 95 % intervals over images")
    return figure


def draw_comparison(of_runs: dict[str, Summaries]) -> Figure:
    """PSI of several models, a block a kind of question and a row a model in it."""
    kinds = list(dict.fromkeys(kind for summaries in of_runs.values() for kind in summaries))
    colors = plots.model_colors(list(of_runs))
    figure, axis = plt.subplots(
        figsize=(7.2, 1.8 + len(kinds) * (0.2 + 0.2 * len(of_runs)) + 0.2 * len(of_runs))
    )
    shift = 0.7 / len(of_runs)
    for number, (label, summaries) in enumerate(of_runs.items()):
        there = [kind for kind in kinds if kind in summaries]
        rows = np.array([kinds.index(kind) for kind in there], dtype=float)
        rows += (number - (len(of_runs) - 1) / 2) * shift
        words = plots.with_n(label, [summaries["all"]["images"]])
        intervals = [summaries[kind]["psi"] for kind in there]
        _points(axis, rows, intervals, words, {"color": colors[label]})
    first = {kind: next(s[kind] for s in of_runs.values() if kind in s) for kind in kinds}
    names = [_kind_label(kind, summary) for kind, summary in first.items()]
    axis.set_yticks(range(len(kinds)), names, fontsize=8)
    axis.set_ylim(len(kinds) - 0.5, -0.5)
    for edge in range(1, len(kinds)):
        axis.axhline(edge - 0.5, color=plots.EVEN_COLOR, linewidth=0.5)
    _psi_axis(axis)
    axis.set_title("Position sensitivity by kind of question, 95 % intervals over images")
    plots.legends([axis], below=True)
    return figure


def _points(
    axis: Axes,
    rows: Float[np.ndarray, " K"],
    intervals: Sequence[Interval],
    label: str,
    look: Fields,
) -> None:
    """Means with their intervals, one a row; what is undefined is said."""
    mean, low, high = (np.array([interval[end] for interval in intervals]) for end in range(3))
    reach = np.nan_to_num(np.clip([mean - low, high - mean], 0, None))
    axis.errorbar(mean, rows, xerr=reach, fmt="o", markersize=5, capsize=2.5, label=label, **look)
    for row in rows[np.isnan(mean)]:
        axis.text(0, row, " undefined: none right", va="center", fontsize=7.5)


def _psi_axis(axis: Axes) -> None:
    axis.axvline(0, color=plots.EVEN_COLOR, linewidth=1, linestyle="--", zorder=0)
    low, high = axis.get_xlim()
    axis.set_xlim(min(low, -0.05), max(high, 0.5))
    axis.set(
        title="Position sensitivity",
        xlabel="PSI (0: order not used, 1: each right answer needs it)",
    )
    axis.grid(axis="y", visible=False)


def _kind_label(kind: str, summary: Fields) -> str:
    questions = _counted(summary["questions"], "question")
    images = _counted(summary["images"], "image")
    name = textwrap.fill(kind.replace("_", " "), 26)
    return f"{name}\n{questions}, {images}"


def _counted(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"

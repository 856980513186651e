"""How much of the attention goes to the system prompt, to the image and to the question: shares of
a run's images, bars and curves.

Beyond Semantics (arXiv 2503.17349), figure 6; docs/studies/beyond_semantics.md, sections 1.5 and
2.5. Used by diagnostic_tools/system_prompt_plot.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.ticker import PercentFormatter

from vlmdiag.cli import UsageError
from vlmdiag.figures import plots, stats
from vlmdiag.figures.layers import LAYER_AXIS
from vlmdiag.runs import selection
from vlmdiag.types import Fields, Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from vlmdiag.figures.stats import Interval
    from vlmdiag.runs.rundirs import Run

GROUPS = ("system", "vision", "user")
AGAIN = "make the run again with run_coco_diagnostics.py --overwrite, without --pos_only"


class Pie(NamedTuple):
    """Token groups whose shares sum to 1, and the fields of an image's JSON that hold them. The
    published script draws them as pies, so files are called that."""

    groups: Sequence[str]
    fields: Sequence[str]
    title: str


PIES = {
    "with_system": Pie(
        GROUPS,
        ("mean_sys_share", "mean_vision_withsys_share", "mean_text_withsys_share"),
        "Attention to system prompt, image and user text",
    ),
    "vision_vs_user_masked": Pie(
        GROUPS[1:],
        ("mean_vision_share", "mean_text_share"),
        "Attention to image and user text, system prompt left out",
    ),
}


@dataclass(frozen=True)
class Shares:
    """What a run's images say. pies: {pie: Interval (groups,)}; layers: {group: Interval (L,)}."""

    pies: Mapping[str, Interval]
    layers: Mapping[str, Interval]


def read_shares(run: Run) -> Shares:
    """Shares of each image, averaged over the images of a run. UsageError where it has none."""
    fields = sorted({field for pie in PIES.values() for field in pie.fields})
    shares: dict[str, list[float]] = {field: [] for field in fields}
    for id in run.ids():  # of 100,000 images; only these numbers are kept
        record = run.record(id)
        if record.get("pos_only"):
            continue
        missing = [field for field in fields if field not in record]
        if missing:
            raise UsageError(f"{run.path}: an image has no {', '.join(missing)}; {AGAIN}")
        for field in fields:
            shares[field].append(record[field])
    if not shares[fields[0]]:
        raise UsageError(f"{run.path} has no image with attention shares; {AGAIN}")
    pies = {
        name: stats.mean_interval(
            np.column_stack([shares[field] for field in pie.fields]), bounds=stats.SHARES
        )
        for name, pie in PIES.items()
    }
    arrays = selection.read_arrays(run, ["layer_shares"], AGAIN)[1]
    of_groups = stats.mean_interval(arrays["layer_shares"], bounds=stats.SHARES)  # (3, L)
    layers = {}
    for row, group in enumerate(GROUPS):
        layers[group] = stats.Interval(*(bound[row] for bound in of_groups))
    return Shares(pies, layers)


def draw_pie(axis: Axes, name: str, interval: Interval, label: str) -> None:
    """A bar for each share, with its interval drawn and written."""
    pie = PIES[name]
    rows = np.arange(len(pie.groups))
    reach = np.clip([interval.mean - interval.low, interval.high - interval.mean], 0, None)
    axis.barh(
        rows,
        np.nan_to_num(interval.mean),
        0.6,
        xerr=np.nan_to_num(reach),
        color=[plots.color_of(group) for group in pie.groups],
        error_kw={"elinewidth": 1, "capsize": 3},
    )
    for row, (mean, low, high) in enumerate(zip(interval.mean, interval.low, interval.high)):
        place = np.nanmax([0, mean, high]) + 0.02
        axis.text(place, row, f"{mean:.1%}  [{low:.1%}, {high:.1%}]", va="center", fontsize=9)
    axis.set_yticks(rows, pie.groups)
    axis.set(
        xlim=(0, 1.45),
        xticks=np.linspace(0, 1, 6),
        ylim=(len(rows) - 0.5, -0.5),
        xlabel="share, mean [95 % interval over images]\nlayers, heads and tokens of the answer"
        " averaged",
    )
    axis.xaxis.set_major_formatter(PercentFormatter(1))
    axis.grid(axis="y", visible=False)
    axis.set_title(f"{pie.title}\n{plots.with_n(label, interval.n)}", fontsize=10)


def draw_run(run: Run, label: str, shares: Shares, settings: Fields, side_by_side: bool) -> None:
    """Write the shares and the curves of one run into its analysis folder; those of the system
    prompt only where it saw one."""
    analysis = run.path / "analysis"
    groups = shown_groups(shares)
    pies = [name for name, pie in PIES.items() if set(pie.groups) <= set(groups)]
    if side_by_side:
        figure, axes = plt.subplots(1, len(pies), figsize=(5.8 * len(pies), 2.9), squeeze=False)
        for axis, name in zip(axes[0], pies):
            draw_pie(axis, name, shares.pies[name], label)
        plots.save(figure, analysis / "dataset_pies_side_by_side", settings)
    else:
        for name in pies:
            figure, axis = plt.subplots(figsize=(5.8, 2.9))
            draw_pie(axis, name, shares.pies[name], label)
            plots.save(figure, analysis / f"dataset_pie_{name}", settings)
    figure = layers_figure(
        {group: shares.layers[group] for group in groups},
        {group: plots.color_of(group) for group in groups},
        f"Attention shares by layer: {label}",
        f"share of attention to\n{', '.join(groups[:-1])} and {groups[-1]}",
    )
    plots.save(figure, analysis / "system_vision_user_shares_by_layer", settings)


def shown_groups(shares: Shares) -> Sequence[str]:
    """The token groups that a run's prompts have: no system prompt, nothing to show of it."""
    return GROUPS if np.nan_to_num(shares.layers["system"].mean).any() else GROUPS[1:]


def system_figure(shares: Mapping[str, Shares]) -> Figure:
    """The system prompt's share by layer, a line a run. shares: by the run's label."""
    figure = layers_figure(
        {label: of_run.layers["system"] for label, of_run in shares.items()},
        plots.model_colors(list(shares)),
        "Attention to the system prompt by layer",
        "system share of attention to\nsystem prompt, image and user text",
    )
    tops = [np.nanmax(of_run.layers["system"].high, initial=0) for of_run in shares.values()]
    figure.axes[0].set_ylim(0, 1.2 * max(tops) or 1)
    return figure


def layers_figure(
    curves: Mapping[str, Interval], colors: Mapping[str, str], title: str, ylabel: str
) -> Figure:
    """Shares against the layer, one line with its band for each label."""
    figure, axis = plt.subplots(figsize=(7.5, 4.6))
    for label, interval in curves.items():
        layers = np.arange(len(interval.mean))
        plots.line_with_band(axis, layers, interval, label, colors[label])
    axis.set(title=title, xlabel=f"{LAYER_AXIS}; mean over heads and tokens of the answer")
    axis.set(ylabel=ylabel, ylim=(-0.02, 1.02))
    plots.legends([axis])
    return figure


def save_tables(run: Run, shares: Shares) -> None:
    """Write the drawn numbers of one run as two CSV files into its analysis folder."""
    slices = []
    for name, pie in PIES.items():
        for row, group in enumerate(pie.groups):
            numbers = {key: bound[row] for key, bound in shares.pies[name]._asdict().items()}
            slices.append({"pie": name, "group": group} | numbers)
    plots.save_csv(run.path / "analysis" / "dataset_pies.csv", pd.DataFrame(slices))
    columns: Record = {"layer": range(len(shares.layers["system"].mean))}
    for group, interval in shares.layers.items():
        for ending, values in zip(("", "_low", "_high", "_n"), interval):
            columns[f"{group}{ending}"] = values
    plots.save_csv(run.path / "analysis" / "system_vision_user_shares_by_layer.csv", columns)

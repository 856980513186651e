"""How much of the attention goes to the system prompt, to the image and to the question: shares of
a run's images, pies and curves.

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
    """The token groups of a pie, and the fields of an image's JSON that hold their shares."""

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
    records = [record for record in run.records() if not record.get("pos_only")]
    if not records:
        raise UsageError(f"{run.path} has no image with attention shares; {AGAIN}")
    missing = [field for pie in PIES.values() for field in pie.fields if field not in records[0]]
    if missing:
        raise UsageError(f"{run.path}: its images have no {', '.join(missing)}; {AGAIN}")
    pies = {}
    for name, pie in PIES.items():
        shares = [[record[field] for field in pie.fields] for record in records]
        pies[name] = stats.mean_interval(shares, bounds=stats.SHARES)
    arrays = selection.read_arrays(run, ["layer_shares"], AGAIN)[1]
    of_groups = stats.mean_interval(arrays["layer_shares"], bounds=stats.SHARES)  # (3, L)
    layers = {}
    for row, group in enumerate(GROUPS):
        layers[group] = stats.Interval(*(bound[row] for bound in of_groups))
    return Shares(pies, layers)


def draw_pie(axis: Axes, name: str, interval: Interval, label: str) -> None:
    """One pie. Thick slices carry their percentage; the legend gives every share, also the thin
    ones, with its interval."""
    pie = PIES[name]
    wedges, _ = axis.pie(
        np.nan_to_num(interval.mean),
        colors=[plots.color_of(group) for group in pie.groups],
        startangle=90,
        counterclock=False,
        wedgeprops={"edgecolor": "white"},
    )
    for group, wedge, share in zip(pie.groups, wedges, np.nan_to_num(interval.mean)):
        if share > 0.08:
            angle = np.deg2rad((wedge.theta1 + wedge.theta2) / 2)
            axis.text(
                0.62 * np.cos(angle),
                0.62 * np.sin(angle),
                f"{share:.1%}",
                ha="center",
                va="center",
                weight="bold",
                color="white" if group == "vision" else "black",
            )
    entries = [
        f"{group}  {mean:.1%}  [{low:.1%}, {high:.1%}]"
        for group, mean, low, high in zip(pie.groups, interval.mean, interval.low, interval.high)
    ]
    axis.legend(
        wedges,
        entries,
        loc="upper center",
        bbox_to_anchor=(0.5, 0.02),
        frameon=False,
        title="mean [95 % interval over images]",
        title_fontsize=8.5,
    )
    axis.set(xlim=(-1.1, 1.1), ylim=(-1.1, 1.1))
    axis.set_title(f"{pie.title}\n{plots.with_n(label, interval.n)}", fontsize=10)


def draw_run(run: Run, label: str, shares: Shares, settings: Fields, side_by_side: bool) -> None:
    """Write the pies and the curves of one run into its analysis folder."""
    analysis = run.path / "analysis"
    if side_by_side:
        figure, axes = plt.subplots(1, 2, figsize=(10, 5))
        for axis, name in zip(axes, PIES):
            draw_pie(axis, name, shares.pies[name], label)
        plots.save(figure, analysis / "dataset_pies_side_by_side", settings)
    else:
        for name in PIES:
            figure, axis = plt.subplots(figsize=(5.4, 5))
            draw_pie(axis, name, shares.pies[name], label)
            plots.save(figure, analysis / f"dataset_pie_{name}", settings)
    figure = layers_figure(
        shares.layers,
        {group: plots.color_of(group) for group in GROUPS},
        f"Attention shares by layer: {label}",
        "share of attention to\nsystem prompt, image and user text",
    )
    plots.save(figure, analysis / "system_vision_user_shares_by_layer", settings)


def system_figure(shares: Mapping[str, Shares]) -> Figure:
    """The system prompt's share by layer, a line a run. shares: by the run's label."""
    return layers_figure(
        {label: of_run.layers["system"] for label, of_run in shares.items()},
        plots.model_colors(list(shares)),
        "Attention to the system prompt by layer",
        "system share of attention to\nsystem prompt, image and user text",
    )


def layers_figure(
    curves: Mapping[str, Interval], colors: Mapping[str, str], title: str, ylabel: str
) -> Figure:
    """Shares against the layer, one line with its band for each label."""
    figure, axis = plt.subplots(figsize=(7.5, 4.6))
    for label, interval in curves.items():
        layers = np.arange(len(interval.mean))
        plots.line_with_band(axis, layers, interval, label, colors[label])
    axis.set(title=title, xlabel=LAYER_AXIS, ylabel=ylabel, ylim=(-0.02, 1.02))
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

"""Paired differences between two runs of one experiment: two models, or two settings.

Only pictures that both runs have count, and only cells that both have, such as layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from vlmdiag.figures import plots, stats
from vlmdiag.report.quantities import Axis, Quantity, cells_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from vlmdiag.figures.stats import Interval

MOST_ROWS = 40  # of a panel of points
ALONG = ("layer", "after layer")  # axes along which a line is drawn


class Difference(NamedTuple):
    """The second minus the first, of one quantity."""

    quantity: Quantity  # of the first, its shared pictures and cells
    interval: Interval


def differences(first: Sequence[Quantity], second: Sequence[Quantity]) -> list[Difference]:
    """Of the quantities that both have, in the order of the first."""
    by_name = {quantity.name: quantity for quantity in second}
    found = []
    for one in first:
        other = by_name.get(one.name)
        if other is None or len(other.axes) != len(one.axes):
            continue
        ids = [id for id in one.ids if id in set(other.ids)]
        axes = [
            (name, [tick for tick in ticks if tick in set(of_other)])
            for (name, ticks), (_, of_other) in zip(one.axes, other.axes, strict=True)
        ]
        if not ids or not all(ticks for _, ticks in axes):
            continue
        a, b = (_chosen(quantity, ids, axes) for quantity in (one, other))
        bounds = stats.DIFFERENCES if one.bounds == stats.SHARES else None
        interval = stats.paired_difference(b, a, bounds=bounds, discrete=one.discrete)
        found.append(Difference(one._replace(ids=ids, values=a, axes=tuple(axes)), interval))
    return found


def _chosen(quantity: Quantity, ids: Sequence[str], axes: Sequence[Axis]) -> np.ndarray:
    """Its values of the pictures and cells."""
    row_of = {id: row for row, id in enumerate(quantity.ids)}
    values = quantity.values[[row_of[id] for id in ids]]
    for number, ((_, wanted), (_, ticks)) in enumerate(zip(axes, quantity.axes, strict=True), 1):
        place = {tick: index for index, tick in enumerate(ticks)}
        values = np.take(values, [place[tick] for tick in wanted], axis=number)
    return values


def table_of(found: Sequence[Difference], first: str, second: str, experiment: str) -> pd.DataFrame:
    """A row for each cell: the means of both, their difference with its interval, n."""
    tables = []
    for quantity, interval in found:
        mean = np.ravel(quantity.interval().mean)
        difference = np.ravel(interval.mean)
        columns = {
            "experiment": experiment,
            "quantity": quantity.name,
            "unit": quantity.unit,
            "cell": cells_of(quantity),
            first: mean,
            second: mean + difference,
            "difference": difference,
            "low": np.ravel(interval.low),
            "high": np.ravel(interval.high),
            "n": np.ravel(interval.n),
        }
        tables.append(pd.DataFrame(columns))
    return pd.concat(tables) if tables else pd.DataFrame()


def draw(difference: Difference, first: str, second: str) -> Figure:
    """One quantity: a line along layers, a map of layers and heads, or points."""
    quantity, interval = difference
    names = [name for name, _ in quantity.axes]
    if names == ["layer", "head"]:
        figure, axis = plt.subplots(figsize=(6.4, 4.6))
        _draw_map(axis, interval)
    elif names and names[-1] in ALONG and len(names) <= 2:
        figure, axis = plt.subplots(figsize=(7.5, 4.2))
        _draw_lines(axis, quantity, interval)
    else:
        rows = int(np.prod(np.shape(interval.mean)))
        figure, axis = plt.subplots(figsize=(7.5, 1.4 + 0.26 * min(rows, MOST_ROWS)))
        _draw_points(axis, quantity, interval)
    axis.set_title(f"{quantity.name}\n{second} minus {first}", fontsize=10)
    return figure


def _draw_map(axis: Axes, interval: Interval) -> None:
    """Differences of heads; those whose interval has 0 in it are pale."""
    reach = np.nanmax(np.abs(interval.mean), initial=1e-12)
    image = plots.heatmap(axis, interval.mean, "", -reach, reach, cmap="RdBu_r")
    is_clear = (np.asarray(interval.low) > 0) | (np.asarray(interval.high) < 0)
    image.set_alpha(np.where(is_clear, 1.0, 0.3))
    assert axis.figure is not None
    label = f"difference (pale: the 95 % interval has 0), n = {np.max(interval.n)}"
    axis.figure.colorbar(image, ax=axis, label=label)


def _draw_lines(axis: Axes, quantity: Quantity, interval: Interval) -> None:
    *outer, (along, ticks) = quantity.axes
    names = outer[0][1] if outer else [""]
    for row, name in enumerate(names):
        bounds = [np.asarray(bound)[row] if outer else np.asarray(bound) for bound in interval]
        color = plots.GROUP_COLORS.get(str(name)) or plots.CYCLE[row % len(plots.CYCLE)]
        label = str(name).replace("_", " ") or "difference"
        plots.line_with_band(axis, np.arange(len(ticks)), stats.Interval(*bounds), label, color)
    axis.axhline(0, color=plots.EVEN_COLOR, linewidth=0.9)
    shown = np.unique(np.linspace(0, len(ticks) - 1, min(len(ticks), 12)).round().astype(int))
    axis.set_xticks(shown, [str(ticks[index]) for index in shown])
    axis.set(xlabel=along, ylabel=f"difference ({quantity.unit})")
    plots.legends([axis])


def _draw_points(axis: Axes, quantity: Quantity, interval: Interval) -> None:
    mean, low, high, n = (np.ravel(bound) for bound in interval)
    order = np.arange(len(mean))
    if len(order) > MOST_ROWS:  # the largest
        order = np.sort(np.argsort(-np.abs(np.nan_to_num(mean)))[:MOST_ROWS])
    labels = cells_of(quantity)
    places = np.arange(len(order))[::-1]
    error = np.clip([mean[order] - low[order], high[order] - mean[order]], 0, None)
    axis.errorbar(mean[order], places, xerr=error, fmt="o", color=plots.BLUE, capsize=3)
    axis.axvline(0, color=plots.EVEN_COLOR, linewidth=0.9)
    names = [f"{labels[row].replace('_', ' ') or quantity.name} (n = {n[row]})" for row in order]
    axis.set_yticks(places, names, fontsize=8)
    axis.set(xlabel=f"difference ({quantity.unit})", ylim=(-0.8, len(order) - 0.2))
    axis.grid(False, axis="y")

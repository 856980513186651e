"""Cross-modality balance of each layer and head: the maps of several runs, and their mean by layer.

Beyond Semantics (arXiv 2503.17349), figure 7; docs/studies/beyond_semantics.md, sections 1.6 and
2.4. Used by diagnostic_tools/viz_cmb_panel.py.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.lines import Line2D

from vlmdiag.cli import UsageError
from vlmdiag.figures import plots, stats
from vlmdiag.figures.layers import LAYER_AXIS
from vlmdiag.pictures.samples import load_image
from vlmdiag.runs import selection

if TYPE_CHECKING:
    from jaxtyping import Float, UInt8
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from vlmdiag.runs.rundirs import Run


@dataclass(frozen=True)
class Balance:
    """CMB of one run over the shown images. chance: the share of evenly spread attention."""

    label: str
    values: Float[np.ndarray, "n L H"]
    chance: float

    @property
    def mean(self) -> Float[np.ndarray, "L H"]:
        """Mean over images, NaN where a head saw neither image nor question in any."""
        return stats.measured_mean(self.values)


def read_maps(run: Run, key: str) -> tuple[list[str], Float[np.ndarray, "n L H"]]:
    """(ids, maps) of one run."""
    if key == "head_vision_share":
        advice = "make it with run_coco_diagnostics.py without --pos_only"
    else:
        advice = "no script writes it; leave out --use_key"
    ids, arrays = selection.read_arrays(run, [key], advice)
    return ids, arrays[key]


def balance_of(
    run: Run, label: str, ids: Sequence[str], maps: Float[np.ndarray, "n L H"], shown: Sequence[str]
) -> Balance:
    """The shown images of a run. ids: of its maps, sorted as `shown` is."""
    values = maps[np.isin(ids, shown)].astype(np.float64)
    chance = np.mean([run.record(id)["chance_vision_share"] for id in shown])
    return Balance(label, values, float(chance))


def find_picture(
    run: Run, id: str, img_path: str | None, coco_root: str | None
) -> UInt8[np.ndarray, "height width 3"]:
    """The picture of an item: img_path, else by its file name below coco_root and in the folder
    that the run read. UsageError where there is none."""
    name = Path(run.record(id)["file_name"])
    folders = [Path(run.meta["free"]["image_dir"])]
    if coco_root:
        folders = [Path(coco_root, split) for split in ("val2017", "train2017", "")] + folders
    places = [Path(img_path)] if img_path else [folder / name for folder in folders]
    there = [place for place in places if place.is_file()]
    if not there:
        raise UsageError(
            f"no picture for {id} at {', '.join(map(str, places))}; name it with --img_path"
        )
    try:
        return np.asarray(load_image(there[0]))
    except ValueError as error:
        raise UsageError(str(error)) from error


def panel_figure(
    balances: Sequence[Balance],
    scale: str,
    id: str | None = None,
    picture: UInt8[np.ndarray, "height width 3"] | None = None,
) -> Figure:
    """A map a run, white at its chance level. Of one image, beside its picture, or of the mean over
    images, beside the mean over heads by layer.

    scale: where the colours end, as far below chance as above: 'fixed', at 0 or 1, whichever is
    nearer to chance, or 'auto', at the 99th percentile of the distances.
    """
    figure, axes = panel_axes(len(balances) + 1)
    if picture is not None:
        axes[0].imshow(picture)
        axes[0].set_title(f"image {id}")
        axes[0].axis("off")
        draw_maps(figure, axes[1:], balances, scale)
    else:
        draw_maps(figure, axes[:-1], balances, scale, counted=True)
        draw_layers(axes[-1], balances)
        figure.legend(handles=run_handles(balances), loc="outside lower center", ncols=4)
    figure.suptitle(
        "Cross-modality balance: share of a head's vision + user attention that goes to the image"
    )
    return figure


def panel_axes(count: int) -> tuple[Figure, list[Axes]]:
    """A figure with count panels in rows of at most four."""
    columns = min(count, 4)
    rows = -(-count // columns)
    size = (4.1 * columns + 0.8, 4.1 * rows + 0.3)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
    for axis in axes.flat[count:]:
        axis.remove()
    return figure, list(axes.flat[:count])


def draw_maps(
    figure: Figure,
    axes: Sequence[Axes],
    balances: Sequence[Balance],
    scale: str,
    counted: bool = False,
) -> None:
    """Layer x head maps of CMB - chance: white at chance, blue above, red below, on one scale with
    one bar. counted: the title says how many images."""
    means = [balance.mean - balance.chance for balance in balances]
    reach = max(min(balance.chance, 1 - balance.chance) for balance in balances)
    if scale != "fixed":
        reach = np.nanpercentile(np.abs(np.concatenate([mean.ravel() for mean in means])), 99)
    reach = float(reach) or 0.01
    for axis, balance, mean in zip(axes, balances, means):
        images = f"n = {len(balance.values)}, " if counted else ""
        overall = stats.measured_mean(mean, axis=(0, 1)) + balance.chance
        numbers = f"{images}mean CMB {overall:.3f}, chance {balance.chance:.3f}"
        title = f"{textwrap.fill(balance.label, 38)}\n{numbers}"
        image = plots.heatmap(axis, mean, title, -reach, reach, cmap="RdBu")
    low, high = (end(end(mean) for mean in map(_known, means)) for end in (min, max))
    beyond = {(False, False): "neither", (True, False): "min", (False, True): "max"}
    extend = beyond.get((low < -reach, high > reach), "both")
    figure.colorbar(image, ax=axes, extend=extend, label="CMB - chance")


def _known(values: Float[np.ndarray, "L H"]) -> list[float]:
    """The values that there are, 0 where there are none."""
    return values[np.isfinite(values)].tolist() or [0.0]


def draw_layers(axis: Axes, balances: Sequence[Balance]) -> None:
    """Mean over heads by layer for every run, its chance level as a dashed line."""
    colors = plots.model_colors([balance.label for balance in balances])
    for balance in balances:
        color = colors[balance.label]
        of_heads = stats.measured_mean(balance.values, axis=2)
        interval = stats.mean_interval(of_heads, bounds=stats.SHARES)
        layers = np.arange(len(interval.mean))
        plots.line_with_band(axis, layers, interval, balance.label, color)
        axis.axhline(balance.chance, color=color, linestyle="--", linewidth=1.1)
    axis.set(
        title="Mean over heads; band: 95 % interval\nover images, dashed: chance",
        xlabel=LAYER_AXIS,
        ylabel="CMB",
    )


def run_handles(balances: Sequence[Balance]) -> list[Line2D]:
    """The runs' colours, for the legend of the figure."""
    colors = plots.model_colors([balance.label for balance in balances])
    return [Line2D([], [], color=color, label=label) for label, color in colors.items()]


def table_of(balances: Sequence[Balance]) -> pd.DataFrame:
    """One row for each cell of the maps: model, layer, head, cmb, n."""
    tables = []
    for balance in balances:
        table = pd.DataFrame(balance.mean).stack(future_stack=True).rename("cmb").reset_index()
        table.columns = ["layer", "head", "cmb"]
        table.insert(0, "model", balance.label)
        tables.append(table.assign(n=len(balance.values)))
    return pd.concat(tables)

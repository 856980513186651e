"""The figure of the maps of panels.py: the picture, a map over it for each panel, coverage below
each, one colour bar."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap, Normalize

from vlmdiag.cli import UsageError
from vlmdiag.figures.plots import drawable
from vlmdiag.pictures import overlay
from vlmdiag.pictures.samples import load_image
from vlmdiag.volcano.panels import ELLIPSIS, numbers_of

if TYPE_CHECKING:
    from jaxtyping import Float
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from PIL import Image

    from vlmdiag.pictures.grid import PatchGrid
    from vlmdiag.volcano.panels import MapSettings, Panel
    from vlmdiag.volcano.tensors import Instance

ALPHA = 0.75  # opacity of a map over the grey picture
PANEL = 2.75  # inches


def read_picture(instance: Instance) -> Image.Image:
    """The picture that was measured. UsageError where it cannot be read or is another one."""
    try:
        picture = load_image(instance.image)
    except (OSError, ValueError) as error:
        raise UsageError(f"{error}; --no_overlay draws the patches without the picture") from error
    if picture.size != tuple(instance.grid.size):
        sizes = (
            f"{picture.width} x {picture.height} pixels, and {instance.grid.size[0]} x"
            f" {instance.grid.size[1]} were measured"
        )
        raise UsageError(
            f"{instance.image} has {sizes}: another picture; --no_overlay draws the patches"
            " without it"
        )
    return picture


def draw(
    instance: Instance, panels: Sequence[Panel], scale: tuple[float, float], args: MapSettings
) -> Figure:
    """The picture and the maps, coverage below each, one colour bar. scale: (vmin, vmax)."""
    grid, (vmin, vmax) = instance.grid, scale
    picture = None if args.no_overlay else read_picture(instance)
    normalize = Normalize(vmin, vmax if vmax > vmin else vmin + max(abs(vmin), 1e-12))
    count = len(panels) + (picture is not None)
    figure, axes = panel_axes(count, _ratio(grid, picture is None))
    colors = plt.get_cmap("viridis")
    ground = None
    if picture is not None:
        picture = overlay.at_pixel_size(picture)
        grid = grid.rescaled(picture.size)
        ground = overlay.pale(picture.convert("L"), darkest=0.35)  # the map keeps its colours
        overlay.show_picture(axes[0], np.asarray(picture))
        axes[0].set_title("Picture", fontsize=10)
        # of the colour bar: the map over the picture's mean grey
        opaque = colors(np.linspace(0, 1, 256))[:, :3]
        colors = ListedColormap(ALPHA * opaque + (1 - ALPHA) * ground.mean())
    for axis, panel in zip(axes[count - len(panels) :], panels):
        draw_map(axis, panel.values, grid, normalize, ground)
        axis.set_title(textwrap.fill(drawable(panel.title), 32), fontsize=10, parse_math=False)
        axis.set_xlabel(_coverage(panel, instance.grid), fontsize=7.5)
    bar = overlay.color_bar(
        figure, normalize, colors, ax=axes, extend="max", aspect=30, pad=0.015, fraction=0.04
    )
    bar.set_label(
        f"attention to a vision token\n(top-{args.hidden_top_k} layers and heads)", fontsize=8
    )
    bar.ax.tick_params(labelsize=7.5)
    bar.ax.ticklabel_format(style="sci", scilimits=(-2, 2), useMathText=True)
    bar.ax.yaxis.get_offset_text().set_fontsize(7.5)
    title = _title(instance, args, int(11.2 * figure.get_figwidth()))
    figure.suptitle(title, fontsize=10, parse_math=False)
    return figure


def panel_axes(count: int, ratio: float) -> tuple[Figure, list[Axes]]:
    """A figure with so many panels, each `ratio` times as high as wide, without ticks and frame."""
    columns = count
    if count > 4:
        columns = 3 if count in (5, 6, 9) else 4
    rows = -(-count // columns)
    width = max(columns * PANEL + 0.9, 5.2)
    figure = plt.figure(figsize=(width, rows * (PANEL * ratio + 0.78) + 0.6))
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.set(xticks=[], yticks=[])
        axis.grid(False)
        axis.spines[:].set_visible(False)
    for axis in axes[count:]:
        axis.remove()
    return figure, list(axes[:count])


def _ratio(grid: PatchGrid, cells_alone: bool) -> float:
    """Height over width of a panel: of the picture, or of the cells, which may reach past it."""
    left, top, right, bottom = (0, 0, *grid.size)
    if cells_alone:
        left, top = np.nanmin(grid.boxes[:, :2], 0)
        right, bottom = np.nanmax(grid.boxes[:, 2:], 0)
    return float(np.clip((bottom - top) / (right - left), 0.4, 1.6))


def _coverage(panel: Panel, grid: PatchGrid) -> str:
    """What is written below a map."""
    shown = numbers_of(panel, grid)
    half = 100 * shown["share_of_patches_with_50_percent"]
    most = 100 * shown["share_of_patches_with_90_percent"]
    return (
        f"{panel.statistic}: {shown['mean']:.3g}\nentropy {shown['normalized_entropy']:.3f}\n50"
        f" % in {half:.0f} %, 90 % in {most:.0f} % of patches"
    )


def _title(instance: Instance, args: MapSettings, width: int) -> str:
    """What is shown, and of which question, in lines of so many characters."""
    how = "mean over the steps of each text"
    if args.paper_compat:
        how = "mean of the l largest steps (published)"
    refused = ", no revision accepted" if len(instance.stages) > 1 and not instance.accepted else ""
    question = textwrap.shorten(
        f"{Path(instance.model).name}, instance {instance.index}: {instance.question}",
        2 * width - 20,
        placeholder=ELLIPSIS,
    )
    title = textwrap.fill(f"Attention to the picture, {how}{refused}", width)
    return f"{title}\n{textwrap.fill(drawable(question), width)}"


def draw_map(
    axis: Axes,
    values: Float[np.ndarray, " P"],
    grid: PatchGrid,
    normalize: Normalize,
    ground: Float[np.ndarray, "height width 3"] | None = None,
) -> None:
    """One map (P,) over the pale picture, or as plain patches where there is none."""
    if ground is not None:
        overlay.show_picture(axis, ground)
        overlay.show_map(axis, grid.paint(values, smooth=False), "viridis", ALPHA, normalize)
    elif grid.shape is not None:
        rows, columns = grid.shape
        (left, top), (right, bottom) = grid.boxes[0, :2], grid.boxes[rows * columns - 1, 2:]
        axis.imshow(
            values[: rows * columns].reshape(rows, columns),
            cmap="viridis",
            norm=normalize,
            extent=(left, right, bottom, top),
            interpolation="nearest",
        )
    else:
        overlay.show_map(axis, grid.paint(values, smooth=False), "viridis", None, normalize)

"""A map over a picture: bring picture and grid to the size at which they are shown, make the
picture pale so that its own colours are still known and those of the map stay apart, paint the map
on it patch by patch, add the colour bar.

    shown = at_pixel_size(picture)
    grid = batch.grids[0].rescaled(shown.size)
    heat = painted(grid, values)
    show_picture(axis, pale(shown))
    show_map(axis, heat, "YlOrRd", opacity_of(heat, heat.max()))
    color_bar(figure, norm, "YlOrRd", label="attention", ax=axis)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.cm import ScalarMappable
from PIL import Image

if TYPE_CHECKING:
    from jaxtyping import Float, UInt8
    from matplotlib.axes import Axes
    from matplotlib.colorbar import Colorbar
    from matplotlib.colors import Colormap, Normalize
    from matplotlib.figure import Figure, SubFigure
    from matplotlib.image import AxesImage

    from vlmdiag.pictures.grid import PatchGrid

ColorbarOption = Any  # what Figure.colorbar takes: ax, cax, label, shrink, ...
SHOWN = 1024  # pixels of the longer side of a picture in a figure


# ---- size ----


def at_pixel_size(picture: Image.Image, longer_side: int = SHOWN) -> Image.Image:
    """The picture shrunk to a longer side of so many pixels, or enlarged in whole multiples to at
    most as many, so that each of its own pixels stays a square."""
    times = longer_side // max(picture.size)
    if times:
        width, height = (side * times for side in picture.size)
        return picture.resize((width, height), Image.Resampling.NEAREST)
    return at_smooth_size(picture, longer_side)


def at_smooth_size(
    picture: Image.Image,
    longer_side: int,
    most_enlarged: float = float("inf"),
    how: Image.Resampling = Image.Resampling.LANCZOS,
) -> Image.Image:
    """The picture with a longer side of so many pixels, enlarged at most so many times."""
    factor = min(most_enlarged, longer_side / max(picture.size))
    width, height = (max(1, round(side * factor)) for side in picture.size)
    return picture.resize((width, height), how)


# ---- colours ----


def pale(picture: Image.Image, darkest: float = 0.5) -> Float[np.ndarray, "height width 3"]:
    """The picture in its colours with half its contrast, from `darkest` to `darkest` + 0.5 of
    white, so that the colours of a map over it stay apart."""
    return np.asarray(picture.convert("RGB"), float) / 255 * 0.5 + darkest


def painted(
    grid: PatchGrid, values: Float[np.ndarray, " P"], smooth: bool = False
) -> Float[np.ndarray, "height width"]:
    """Values of the vision tokens as a map over the picture, each token's cell in one colour, or
    smooth between the cells' centres; 0 where nothing lies and where a token has no value (NaN).
    """
    return np.nan_to_num(grid.paint(np.nan_to_num(values), smooth=smooth))


def opacity_of(
    heat: Float[np.ndarray, "*shape"], ceiling: float, most: float = 0.9
) -> Float[np.ndarray, "*shape"]:
    """How much of a map is seen over the picture, in [0, most]: what has no value shows the
    picture. The root lets small values be seen too."""
    return most * np.sqrt(np.clip(heat / ceiling, 0, 1))


def blended(
    ground: Float[np.ndarray, "height width 3"],
    heat: Float[np.ndarray, "height width"],
    ceiling: float,
    table: UInt8[np.ndarray, "256 3"],
    most: float = 0.9,
) -> Image.Image:
    """A map over the pale picture as a picture itself.

    table: colours of the values from 0 to the ceiling; most: opacity of the ceiling's.
    """
    colors = table[(np.clip(heat / ceiling, 0, 1) * 255).astype(int)]
    opacity = opacity_of(heat, ceiling, most)[..., None]
    pixels = 255 * ground * (1 - opacity) + colors * opacity
    return Image.fromarray(pixels.astype(np.uint8))


# ---- axes ----


def show_picture(
    axis: Axes,
    pixels: Float[np.ndarray, "height width 3"] | UInt8[np.ndarray, "height width 3"],
    frame: bool = False,
) -> None:
    """Draw a picture, its colours in [0, 1] or as bytes, without ticks; frame: keep the axis'
    lines."""
    axis.imshow(pixels)
    axis.set(xticks=[], yticks=[])
    if not frame:
        axis.grid(False)
        axis.spines[:].set_visible(False)


def show_map(
    axis: Axes,
    heat: Float[np.ndarray, "height width"],
    colors: str | Colormap,
    opacity: float | Float[np.ndarray, "height width"] | None,
    norm: Normalize | None = None,
) -> AxesImage:
    """Draw a map over the picture that the axis shows; places without a value (NaN) stay clear.

    opacity: None is 1. norm: which value gets which colour; None: from the smallest to the
    largest.
    """
    return axis.imshow(
        np.ma.masked_invalid(heat), cmap=colors, norm=norm, alpha=opacity, interpolation="nearest"
    )


def color_bar(
    figure: Figure | SubFigure, norm: Normalize, colors: str | Colormap, **options: ColorbarOption
) -> Colorbar:
    """The colour bar of maps over pictures, opaque and without lines.

    options: label, and where it goes, as Figure.colorbar takes them (ax, cax, shrink, ...).
    """
    bar = figure.colorbar(ScalarMappable(norm, colors), **options)
    bar.ax.grid(False)
    return bar

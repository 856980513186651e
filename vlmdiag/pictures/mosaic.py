"""Several pictures of one prompt side by side: one picture and one grid, so that what draws on one
picture draws on all of them with one range of colours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from vlmdiag.pictures.chats import recorded_sources
from vlmdiag.pictures.grid import PatchGrid
from vlmdiag.pictures.samples import load_image, load_pictures

if TYPE_CHECKING:
    from collections.abc import Mapping

    from jaxtyping import Float
    from numpy.typing import ArrayLike

    from vlmdiag.types import Fields

IN_A_ROW = 4
HEIGHT = 600  # pixels at most of each picture, all of which get the same


@dataclass(frozen=True)
class Mosaic(PatchGrid):
    """The vision tokens of several pictures, one after the other, on a canvas that shows them all.

    parts: each picture's grid in pixels of its place on the canvas, and the (x, y) of that place.
    boxes: on the canvas, cut off at their picture's edges; NaN where nothing is left.
    """

    parts: tuple[tuple[PatchGrid, tuple[int, int]], ...] = ()

    @classmethod
    def of(
        cls, parts: Sequence[tuple[PatchGrid, tuple[int, int]]], size: tuple[int, int]
    ) -> Mosaic:
        """The canvas of `size` with these parts."""
        boxes = []
        for grid, (x, y) in parts:
            low = np.clip(grid.boxes[:, :2], 0, grid.size)
            high = np.clip(grid.boxes[:, 2:], 0, grid.size)
            inside = (high > low).all(1, keepdims=True)
            shown = np.concatenate([low, high], 1) + np.array([x, y, x, y])
            boxes.append(np.where(inside, shown, np.nan))
        return cls(np.concatenate(boxes), None, size, tuple(parts))

    def paint(self, values: ArrayLike, smooth: bool = True) -> Float[np.ndarray, "height width"]:
        """Each picture's values on its place, NaN between the pictures; see PatchGrid.paint()."""
        of_tokens = np.asarray(values, float)
        if of_tokens.shape != (len(self.boxes),):
            raise ValueError(f"{of_tokens.shape} values for {len(self.boxes)} vision tokens")
        canvas = np.full(self.size[::-1], np.nan)
        counts = np.cumsum([len(grid.boxes) for grid, _ in self.parts])[:-1]
        for (grid, (x, y)), part in zip(self.parts, np.split(of_tokens, counts), strict=True):
            room = canvas[y : y + grid.size[1], x : x + grid.size[0]]
            room[:] = grid.paint(part, smooth)[: room.shape[0], : room.shape[1]]
        return canvas

    def rescaled(self, size: tuple[int, int]) -> Mosaic:
        """The mosaic on a canvas of another size."""
        across, down = size[0] / self.size[0], size[1] / self.size[1]
        parts = []
        for grid, (x, y) in self.parts:
            place = round(x * across), round(y * down)
            own = max(1, round(grid.size[0] * across)), max(1, round(grid.size[1] * down))
            parts.append((grid.rescaled(own), place))
        return Mosaic.of(parts, size)


def side_by_side(
    pictures: Sequence[Image.Image], grids: Sequence[PatchGrid]
) -> tuple[Image.Image, Mosaic]:
    """The pictures at one height, IN_A_ROW in a row on white, and their grids on that canvas."""
    height = min(HEIGHT, max(picture.height for picture in pictures))
    gap = max(2, height // 40)
    places: list[tuple[int, int]] = []
    sizes: list[tuple[int, int]] = []
    x = y = 0
    for number, picture in enumerate(pictures):
        if number and number % IN_A_ROW == 0:
            x, y = 0, y + height + gap
        places.append((x, y))
        sizes.append((max(1, round(picture.width * height / picture.height)), height))
        x += sizes[-1][0] + gap
    width = max(place[0] + own[0] for place, own in zip(places, sizes, strict=True))
    canvas = Image.new("RGB", (width, y + height), "white")
    parts = []
    for picture, grid, place, own in zip(pictures, grids, places, sizes, strict=True):
        canvas.paste(picture.resize(own, Image.Resampling.BICUBIC), place)
        parts.append((grid.rescaled(own), place))
    return canvas, Mosaic.of(parts, canvas.size)


# --- in run directories ---------------------------------------------------------------------------


def recorded(
    record: Fields, arrays: Mapping[str, np.ndarray], folder: str | Path | None = None
) -> tuple[Image.Image, PatchGrid | None]:
    """The picture of a record and its grid, of several pictures their mosaic; None where the grid
    is unknown. folder: where pictures lie under their names. record: "grid" or "grids" as
    Batch.places() has them; arrays: boxes, picture."""
    if "images" not in record:
        picture = load_image(Path(folder or ".") / record["file_name"])
        if record["grid"] is None:
            return picture, None
        shape, size = record["grid"]["shape"], record["grid"]["size"]
        return picture, PatchGrid(arrays["boxes"], shape and tuple(shape), tuple(size))
    pictures = load_pictures(recorded_sources(record["images"], folder))
    known = record.get("grids")
    grids = []
    for number, picture in enumerate(pictures):
        shape, boxes = None, np.empty((0, 4))
        if known:
            shape = known[number]["shape"]
            boxes = arrays["boxes"][arrays["picture"] == number]
        grids.append(PatchGrid(boxes, shape and tuple(shape), picture.size))
    canvas, mosaic = side_by_side(pictures, grids)
    return canvas, mosaic if known else None

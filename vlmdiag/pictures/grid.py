"""Where the vision tokens lie in the original picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from numpy.typing import ArrayLike

Region = tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels of the original picture


def cells(rows: int, columns: int, region: Region) -> Float[np.ndarray, "rows columns 4"]:
    """Boxes of equal cells over a region."""
    x0, y0, x1, y1 = region
    xs = np.linspace(x0, x1, columns + 1)
    ys = np.linspace(y0, y1, rows + 1)
    left, top = np.meshgrid(xs[:-1], ys[:-1])
    right, bottom = np.meshgrid(xs[1:], ys[1:])
    return np.stack([left, top, right, bottom], -1)


@dataclass(frozen=True)
class PatchGrid:
    """Each vision token's box in pixels of the original picture. P: vision tokens.

    boxes: x0, y0, x1, y1 of token p, NaN where a token has no box of its own; they may reach past
    the picture where it was padded. shape: (rows, columns) if the first rows * columns tokens are
    one regular grid in row-major order, else None. size: (width, height) of the picture.
    """

    boxes: Float[np.ndarray, "P 4"]
    shape: tuple[int, int] | None
    size: tuple[int, int]

    @classmethod
    def regular(cls, rows: int, columns: int, region: Region, size: tuple[int, int]) -> PatchGrid:
        """A grid of equal cells over a region of the original picture."""
        width, height = size
        boxes = cells(rows, columns, region).reshape(-1, 4)
        return cls(boxes, (rows, columns), (width, height))

    @property
    def has_box(self) -> Bool[np.ndarray, " P"]:
        """Which tokens stand for a place in the picture."""
        return ~np.isnan(self.boxes[:, 0])

    def paint(self, values: ArrayLike, smooth: bool = True) -> Float[np.ndarray, "height width"]:
        """Values (P,) as a map over the original picture, NaN where no token lies.

        smooth: bilinear between cell centres (regular grids only); else each pixel has the mean of
        the tokens over it. ValueError where there is not one value per token.
        """
        of_tokens = np.asarray(values, float)
        if of_tokens.shape != (len(self.boxes),):
            raise ValueError(
                f"values of shape {of_tokens.shape} for a grid of {len(self.boxes)} vision tokens"
            )
        if smooth and self.shape is not None:
            return self._paint_smooth(of_tokens, self.shape)
        width, height = self.size
        total = np.zeros((height, width))
        count = np.zeros((height, width))
        boxed = self.has_box
        for (x0, y0, x1, y1), value in zip(self.boxes[boxed], of_tokens[boxed], strict=True):
            rows = slice(max(0, round(y0)), max(0, round(y1)))
            columns = slice(max(0, round(x0)), max(0, round(x1)))
            total[rows, columns] += value
            count[rows, columns] += 1
        return np.where(count > 0, total / np.maximum(count, 1), np.nan)

    def _paint_smooth(
        self, of_tokens: Float[np.ndarray, " P"], shape: tuple[int, int]
    ) -> Float[np.ndarray, "height width"]:
        rows, columns = shape
        width, height = self.size
        x0, y0 = self.boxes[0, :2]
        x1, y1 = self.boxes[rows * columns - 1, 2:]
        # A picture with one pixel per token, whose border pixels are repeated once around it; the
        # transform maps the centre of each output pixel to it.
        tokens = of_tokens[: rows * columns].reshape(rows, columns)
        small = np.pad(tokens, 1, mode="edge").astype(np.float32)
        per_x = columns / (x1 - x0)
        per_y = rows / (y1 - y0)
        transform = (per_x, 0, 1 - x0 * per_x, 0, per_y, 1 - y0 * per_y)
        large = Image.fromarray(small).transform(
            (width, height), Image.Transform.AFFINE, transform, Image.Resampling.BILINEAR
        )
        painted = np.asarray(large, float).copy()
        ys, xs = np.mgrid[:height, :width] + 0.5
        painted[(xs < x0) | (xs > x1) | (ys < y0) | (ys > y1)] = np.nan
        return painted

    def rescaled(self, size: tuple[int, int]) -> PatchGrid:
        """The grid in pixels of its picture at another size (width, height)."""
        factors = np.array([size[0] / self.size[0], size[1] / self.size[1]] * 2)
        return PatchGrid(self.boxes * factors, self.shape, size)

    def coverage(self, mask: Bool[np.ndarray, "height width"]) -> Float[np.ndarray, " P"]:
        """Share of each token's box that a picture mask covers, in [0, 1]; 0 for tokens without a
        box or off the picture. ValueError for a mask of another size."""
        width, height = self.size
        if mask.shape != (height, width):
            raise ValueError(
                f"mask of shape {mask.shape} for a picture of {width} x {height} pixels"
            )
        sums = np.pad(np.asarray(mask, float).cumsum(0).cumsum(1), ((1, 0), (1, 0)))

        def area(x: Float[np.ndarray, " P"], y: Float[np.ndarray, " P"]) -> Float[np.ndarray, " P"]:
            """Integral of the mask over [0, x] x [0, y], bilinear between pixel corners."""
            x, y = np.clip(x, 0, width), np.clip(y, 0, height)
            i = np.minimum(y.astype(int), height - 1)
            j = np.minimum(x.astype(int), width - 1)
            a, b = y - i, x - j
            upper = (1 - b) * sums[i, j] + b * sums[i, j + 1]
            lower = (1 - b) * sums[i + 1, j] + b * sums[i + 1, j + 1]
            return (1 - a) * upper + a * lower

        x0, y0, x1, y1 = np.nan_to_num(self.boxes).T
        full = np.maximum((x1 - x0) * (y1 - y0), 1e-12)
        covered = area(x1, y1) - area(x0, y1) - area(x1, y0) + area(x0, y0)
        return np.where(self.has_box, covered / full, 0.0)

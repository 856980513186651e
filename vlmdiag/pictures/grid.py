"""Where the vision tokens lie in the original picture."""

from dataclasses import dataclass

import numpy as np
from PIL import Image


def cells(rows, columns, region):
    """Boxes (rows, columns, 4) of equal cells over `region` = (x0, y0, x1, y1)."""
    x0, y0, x1, y1 = region
    xs, ys = np.linspace(x0, x1, columns + 1), np.linspace(y0, y1, rows + 1)
    (left, top), (right, bottom) = np.meshgrid(xs[:-1], ys[:-1]), np.meshgrid(xs[1:], ys[1:])
    return np.stack([left, top, right, bottom], -1)


@dataclass(frozen=True)
class PatchGrid:
    """Each vision token's box in pixels of the original picture.

    boxes (P, 4) float: x0, y0, x1, y1 of token p, NaN where a token has no box of its own; they may
    reach past the picture where it was padded. shape (rows, columns) if the first rows * columns
    tokens are one regular grid in row-major order, else None. size: (width, height) of the picture.
    """

    boxes: np.ndarray
    shape: tuple | None
    size: tuple

    @classmethod
    def regular(cls, rows, columns, region, size):
        """A grid of equal cells over `region` = (x0, y0, x1, y1) of the original picture."""
        return cls(cells(rows, columns, region).reshape(-1, 4), (rows, columns), tuple(size))

    @property
    def has_box(self):
        """(P,) bool: tokens that stand for a place in the picture."""
        return ~np.isnan(self.boxes[:, 0])

    def paint(self, values, smooth=True):
        """Values (P,) as a map over the original picture, (height, width) float, NaN where no token
        lies.

        smooth: bilinear between cell centres (regular grids only); else each pixel has the mean of
        the tokens over it.
        """
        values = np.asarray(values, float)
        if values.shape != (len(self.boxes),):
            raise ValueError(
                f"values of shape {values.shape} for a grid of {len(self.boxes)} vision tokens"
            )
        width, height = self.size
        if smooth and self.shape is not None:
            rows, columns = self.shape
            x0, y0 = self.boxes[0, :2]
            x1, y1 = self.boxes[rows * columns - 1, 2:]
            # one pixel of `cells` per token: transform maps output pixel centres to it, edge values
            # extend to the border cells
            cells = np.pad(values[: rows * columns].reshape(rows, columns), 1, mode="edge").astype(
                np.float32
            )
            ax, ay = columns / (x1 - x0), rows / (y1 - y0)
            transform = (ax, 0, 1 - x0 * ax, 0, ay, 1 - y0 * ay)
            painted = np.asarray(
                Image.fromarray(cells).transform(
                    (width, height), Image.Transform.AFFINE, transform, Image.Resampling.BILINEAR
                ),
                float,
            ).copy()
            ys, xs = np.mgrid[:height, :width] + 0.5
            painted[(xs < x0) | (xs > x1) | (ys < y0) | (ys > y1)] = np.nan
            return painted
        total, count = np.zeros((height, width)), np.zeros((height, width))
        for (x0, y0, x1, y1), value in zip(
            self.boxes[self.has_box], values[self.has_box], strict=True
        ):
            rows, columns = (
                slice(max(0, round(y0)), max(0, round(y1))),
                slice(max(0, round(x0)), max(0, round(x1))),
            )
            total[rows, columns] += value
            count[rows, columns] += 1
        return np.where(count > 0, total / np.maximum(count, 1), np.nan)

    def coverage(self, mask):
        """Share of each token's box that a picture mask covers. mask (height, width) bool -> (P,)
        in [0, 1]; 0 for tokens without a box or off the picture."""
        width, height = self.size
        if mask.shape != (height, width):
            raise ValueError(
                f"mask of shape {mask.shape} for a picture of {width} x {height} pixels"
            )
        sums = np.pad(np.asarray(mask, float).cumsum(0).cumsum(1), ((1, 0), (1, 0)))

        def area(x, y):  # integral of the mask over [0, x] x [0, y], bilinear between pixel corners
            x, y = np.clip(x, 0, width), np.clip(y, 0, height)
            i, j = np.minimum(y.astype(int), height - 1), np.minimum(x.astype(int), width - 1)
            a, b = y - i, x - j
            return (1 - a) * ((1 - b) * sums[i, j] + b * sums[i, j + 1]) + a * (
                (1 - b) * sums[i + 1, j] + b * sums[i + 1, j + 1]
            )

        boxes = np.nan_to_num(self.boxes)
        x0, y0, x1, y1 = boxes.T
        full = np.maximum((x1 - x0) * (y1 - y0), 1e-12)
        return np.where(
            self.has_box, (area(x1, y1) - area(x0, y1) - area(x1, y0) + area(x0, y0)) / full, 0.0
        )

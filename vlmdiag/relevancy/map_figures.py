"""Relevancy over the picture for every token of an answer, from a run of
diagnostic_tools/relevancy_maps.py. Used by diagnostic_tools/viz_relevancy.py.

Shapes: T tokens, K layers, N positions, S cells of the picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.colors import Normalize
from PIL import Image

from vlmdiag.cli import UsageError
from vlmdiag.figures import plots
from vlmdiag.pictures import overlay
from vlmdiag.pictures.mosaic import IN_A_ROW, Mosaic, recorded
from vlmdiag.relevancy import rules
from vlmdiag.types import Record

if TYPE_CHECKING:
    from jaxtyping import Float
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

    from vlmdiag.pictures.grid import PatchGrid
    from vlmdiag.runs.rundirs import Run

SHOWN = 480  # pixels of the longer side of a picture
COLORS = "YlOrRd"


class Words(NamedTuple):
    """Some words of the prompt or the answer, and their positions."""

    title: str
    labels: list[str]
    positions: list[int]


@dataclass(frozen=True)
class Maps:
    """What a run holds of one item, and its picture at display size."""

    record: Record
    rows: Float[np.ndarray, "T K N"]
    cells: Float[np.ndarray, "T K S"]  # NaN: a hidden sink
    hidden: int | None  # how many sinks are left out; None: they are kept
    picture: Image.Image
    grid: PatchGrid

    @classmethod
    def read(cls, run: Run, id: str, folder: str | Path | None, hide_sinks: bool) -> Maps:
        """The maps of one item, over several pictures side by side. UsageError where the places of
        its cells are unknown. folder: where its picture is; those of a chat know it themselves."""
        record = run.record(id)
        arrays = run.arrays(id)
        if folder is None and "images" not in record:
            raise UsageError(f"--image_dir is needed: where the picture of {id} is")
        try:
            picture, grid = recorded(record, arrays, folder)
        except (OSError, ValueError) as error:
            raise UsageError(f"{run.path}: the picture of {id}: {error} (--image_dir)") from error
        if grid is None:
            raise UsageError(
                f"{run.path}: where the vision tokens lie in the picture (grid) is unknown for this"
                " model, so nothing can be drawn on it"
            )
        is_vision = np.array([group == "vision" for group in record["groups"]])
        cells = arrays.get("cells", arrays["rows"][..., is_vision]).copy()
        hidden = None
        if hide_sinks:
            is_sink = rules.sinks(torch.from_numpy(arrays["vision_norms"])).numpy()
            if len(is_sink) != cells.shape[-1]:
                raise UsageError(
                    "--sinks hide: the maps are over the tower's patches, whose norms the run does"
                    " not hold"
                )
            cells[..., is_sink] = np.nan
            hidden = int(is_sink.sum())
        side = SHOWN
        if isinstance(grid, Mosaic):
            side = SHOWN * min(IN_A_ROW, len(grid.parts))
        picture = overlay.at_smooth_size(picture, side, how=Image.Resampling.BICUBIC)
        grid = grid.rescaled(picture.size)
        return cls(record, arrays["rows"], cells, hidden, picture, grid)

    def draw(self, axis: Axes, values: Float[np.ndarray, " S"], ceiling: float, title: str) -> None:
        """One map over the picture; colours from 0 to the ceiling, what has no relevancy shows the
        picture."""
        overlay.show_picture(axis, overlay.pale(self.picture), frame=True)
        heat = overlay.painted(self.grid, values)
        opacity = overlay.opacity_of(heat, ceiling)
        overlay.show_map(axis, heat, COLORS, opacity, Normalize(0, ceiling))
        axis.set_title(title, fontsize=8.5)

    def words_before(self, token: int) -> list[Words]:
        """The question, and the answer up to a token."""
        groups, labels = self.record["groups"], self.record["labels"]
        first = len(labels) - len(self.record["tokens"])
        question = [i for i, group in enumerate(groups[:first]) if group == "user"]
        earlier = list(range(first, first + token))
        return [
            Words("question", [labels[i] for i in question], question),
            Words("earlier answer", [labels[i] for i in earlier], earlier),
        ]

    @property
    def panel(self) -> tuple[float, float]:
        """Inches of a map with its title, (width, height): wider for pictures side by side."""
        width, height = self.picture.size
        if not isinstance(self.grid, Mosaic) or width <= height:
            return 2.3, 2.6
        wide = min(2.3 * width / height, 2.3 * IN_A_ROW)
        return wide, wide * height / width + 0.6

    def layer_index(self, layer: int | None) -> int:
        """Where a layer stands among those of the run; None: the last."""
        layers = self.record["layers"]
        if layer is None:
            return len(layers) - 1
        if layer not in layers:
            raise UsageError(f"--layer {layer}: the run holds layers {', '.join(map(str, layers))}")
        return layers.index(layer)


def shown(text: str) -> str:
    """Text as a figure can draw it."""
    return plots.drawable(text).replace("$", r"\$").strip() or repr(text)


def tokens_figure(
    maps: Maps, layer: int | None, max_tokens: int, ceiling: float | None = None
) -> Figure:
    """The picture, then one overlay a token, all on one colour scale. layer: up to which relevancy
    is gathered; ceiling: relevancy at the top of the colours, None: what three of four tokens do
    not reach anywhere, so that a token of large relevancy leaves the others their colours."""
    record = maps.record
    k = maps.layer_index(layer)
    total = len(record["tokens"])
    count = min(max_tokens, total)
    width, height = maps.panel
    columns = min(round(13.8 / width), count + 1)
    rows = -(-(count + 1) // columns)
    largest = np.nanmax(maps.cells[:count, k], axis=-1)
    ceiling = ceiling or float(np.percentile(largest, 75)) or 1.0
    size = (width * columns + 0.8, height * rows + 0.6)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    overlay.show_picture(axes.flat[0], np.asarray(maps.picture.convert("RGB")), frame=True)
    axes.flat[0].set_title("picture", fontsize=8.5)
    for token, axis in zip(range(count), axes.flat[1:]):
        share = record["visual_share"][token][k]
        if share is None or np.isnan(share):
            visual = "no relevancy"
        else:
            visual = f"visual share {share:.2f}"
        probability = record["probabilities"][token]
        title = f"{token}: {shown(record['tokens'][token])}\np = {probability:.2f}, {visual}"
        maps.draw(axis, maps.cells[token, k], ceiling, title)
    _bar(figure, ceiling, axes, clipped=largest.max() > ceiling)
    more = f", first {count} of {total} tokens" if count < total else ""
    hidden = "" if maps.hidden is None else f", {maps.hidden} sinks hidden"
    figure.suptitle(
        f"{shown(record['question'][:90])}\nrelevancy gathered up to layer"
        f" {record['layers'][k]}{more}{hidden}",
        fontsize=9.5,
    )
    return figure


def token_figure(maps: Maps, token: int, layer: int | None, ceiling: float | None = None) -> Figure:
    """One token: the map up to each layer, and what question and earlier answer contribute up to
    `layer`."""
    record = maps.record
    layers = record["layers"]
    if not 0 <= token < len(record["tokens"]):
        raise UsageError(
            f"--token {token}: the answer has {len(record['tokens'])} tokens, counted from 0"
        )
    k = maps.layer_index(layer)
    spread = np.linspace(0, len(layers) - 1, min(6, len(layers)))
    chosen = sorted({round(i) for i in spread} | {k})[-6:]
    largest = float(np.nanmax(maps.cells[token, chosen]))
    ceiling = ceiling or largest or 1.0
    width, height = maps.panel
    columns = min(round(13.8 / width), len(chosen))
    rows = -(-len(chosen) // columns)
    heights = (3.1 + height * rows - 2.6, 3.1)
    figure = plt.figure(figsize=(width * columns + 0.8, sum(heights)), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=heights)
    grid = top.subplots(rows, columns, squeeze=False)
    axes = grid.ravel()
    for axis in axes[len(chosen) :]:
        axis.set_axis_off()
    for axis, index in zip(axes, chosen):
        maps.draw(axis, maps.cells[token, index], ceiling, f"up to layer {layers[index]}")
    _bar(top, ceiling, grid, clipped=largest > ceiling)
    word_lists = maps.words_before(token)
    widths = [max(3, len(words.labels)) for words in word_lists]
    bars = bottom.subplots(1, 2, width_ratios=widths, sharey=True)
    for axis, words in zip(bars, word_lists):
        draw_words(axis, words, maps.rows[token, k, words.positions], layers[k])
    bars[0].set_ylabel("relevancy")
    share = record["visual_share"][token][k]
    visual = "none" if share is None else f"{share:.2f}"
    probability = record["probabilities"][token]
    figure.suptitle(
        f"{shown(record['question'][:90])} -> token {token}: {shown(record['tokens'][token])} (p ="
        f" {probability:.2f}, visual share {visual})",
        fontsize=9.5,
    )
    return figure


def draw_words(axis: Axes, words: Words, values: Sequence[float] | np.ndarray, layer: int) -> None:
    """Relevancy of some words as bars."""
    places = range(len(words.labels))
    color = plots.ORANGE if words.title == "question" else plots.GREEN
    axis.bar(places, values, color=color)
    labels = [shown(label) for label in words.labels]
    axis.set_xticks(places, labels, rotation=60, ha="right", fontsize=8)
    title = f"{words.title}, layer {layer}" if words.labels else f"{words.title}: none yet"
    axis.set_title(title, fontsize=9)
    axis.grid(axis="x", visible=False)


def _bar(figure: Figure | SubFigure, ceiling: float, axes: np.ndarray, clipped: bool) -> None:
    """The colour bar of all maps. clipped: some value lies above its top."""
    norm = Normalize(0, ceiling)
    extend = "max" if clipped else "neither"
    overlay.color_bar(
        figure, norm, COLORS, ax=axes, label="relevancy", shrink=0.7, aspect=25, extend=extend
    )

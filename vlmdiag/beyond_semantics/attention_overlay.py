"""Attention of one generated token over the picture: what a measurement holds, and its figures.

Beyond Semantics (arXiv 2503.17349); docs/studies/beyond_semantics.md, section 2.7. Used by
diagnostic_tools/viz_attention_image.py and notebooks.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, cast

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.ticker import PercentFormatter
from PIL import Image

from vlmdiag.figures import plots
from vlmdiag.pictures import overlay
from vlmdiag.types import Fields

if TYPE_CHECKING:
    from jaxtyping import Float, UInt8
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

    from vlmdiag.pictures.grid import PatchGrid

PANEL = 4.6  # inches, of each panel in a comparison
COLORS = "BuPu"
ALPHA = 0.85  # opacity of the most attention
AVERAGED = "Attention of one answer token in one picture, mean over all layers and heads"


@dataclass
class AttentionVisualizationResult:
    """What one model attended to at one generated token."""

    generated_text: str
    # (rows, columns) where the vision tokens are one grid, else (P,); share of the attention that
    # is not on BOS
    attention_map: Float[np.ndarray, "*shape"]
    # the original picture; several side by side
    image_array: UInt8[np.ndarray, "height width 3"]
    normalized_entropy: float
    token_position: int  # of the generated tokens, from 0
    target_word: str | None
    step: str  # producing or query
    tokens: list[str]  # the generated tokens
    answer_span: tuple[int, int]  # characters of generated_text that are drawn as the target
    grid: PatchGrid
    # part of the attention on vision tokens that lies on padding around the picture
    outside_share: float
    model_name: str
    prompt: str
    paper_compat: bool = False
    grids: list[PatchGrid] = field(default_factory=list)  # one per picture, in its own pixels
    picture_sums: list[float] = field(default_factory=list)  # attention to each picture


def clearing(alpha: float) -> Colormap:
    """Colours of attention: clear at the least, purple of opacity `alpha` at the most."""
    colors = plt.get_cmap(COLORS)(np.linspace(0.25, 1, 256))
    colors[:, 3] = np.linspace(0, alpha, 256)
    return ListedColormap(colors)


def shown(
    result: AttentionVisualizationResult,
) -> tuple[UInt8[np.ndarray, "height width 3"], Float[np.ndarray, "height width"]]:
    """The picture at the size of the figure, and the attention of each of its pixels."""
    picture = overlay.at_pixel_size(Image.fromarray(result.image_array))
    grid = result.grid.rescaled(picture.size)
    return np.asarray(picture), grid.paint(result.attention_map.ravel(), smooth=False)


def visualize_attention_overlay(
    result: AttentionVisualizationResult,
    alpha: float = ALPHA,
    axis: Axes | None = None,
    ends: tuple[float, float] | None = None,
) -> Figure:
    """The attention map over the picture in its colours, patch by patch from clear at the least to
    `alpha` at the most, with a colour bar.

    alpha: opacity of the most. axis: where to draw; None: a figure of its own. ends: the least and
    the most, of all panels that are compared; None: of what is shown.
    """
    if axis is None:
        width = 5.4 if len(result.grids) < 2 else 2 * PANEL
        axis = plt.figure(figsize=_figsize(result.image_array, width)).subplots()
        axis.figure.suptitle(AVERAGED, fontsize=8.5)
    figure = cast("Figure", axis.figure)
    picture, heat = shown(result)
    overlay.show_picture(axis, picture)
    norm = Normalize(*(ends or (np.nanmin(heat), np.nanmax(heat))))
    overlay.show_map(axis, heat, clearing(alpha), None, norm)
    beside = axis.inset_axes((1.02, 0, 0.04, 1))  # as high as the picture
    bar = overlay.color_bar(figure, norm, clearing(alpha), cax=beside)
    bar.ax.tick_params(labelsize=7)
    if result.paper_compat:
        bar.set_label("attention, 0 = smallest, 1 = largest of all vision tokens", fontsize=8)
    else:
        bar.set_label("attention to a vision token, % of all but BOS", fontsize=8)
        bar.ax.yaxis.set_major_formatter(PercentFormatter(1, symbol=""))
    axis.set_title(_title(result))
    axis.set_xlabel(_marked_answer(result), fontsize=8)
    return figure


def _title(result: AttentionVisualizationResult) -> str:
    """Model, token and entropy."""
    name = result.target_word
    if name is None:
        name = result.tokens[result.token_position].strip()
    token = f"{_drawable(repr(name))} (token {result.token_position}, {result.step} step)"
    padding = ""
    if result.outside_share >= 0.005:
        padding = f", {result.outside_share:.0%} on padding"
    entropy = f"normalised entropy {result.normalized_entropy:.2f}{padding}"
    sums = result.picture_sums
    if len(sums) > 1:
        shares = [f"{number}: {part / sum(sums):.0%}" for number, part in enumerate(sums)]
        entropy += f"\nof it on picture {_wrapped(', '.join(shares))}"
    return f"{result.model_name}\n{token}\n{entropy}"


def _marked_answer(result: AttentionVisualizationResult) -> str:
    """The answer with the target in brackets, its leading space outside of them."""
    start, end = result.answer_span
    target = result.generated_text[start:end]
    first = start + len(target) - len(target.lstrip())
    before, after = result.generated_text[:first], result.generated_text[end:]
    marked = f"{before}[{result.generated_text[first:end]}]{after}"
    return _wrapped(f"Answer: {marked.strip()}", start)


def save_attention_overlay(
    result: AttentionVisualizationResult,
    path: str | Path,
    alpha: float = ALPHA,
    settings: Fields | None = None,
) -> list[Path]:
    """Write the overlay of one result as PNG and PDF; returns the two paths."""
    facts = dict(settings or {}) | {"model": result.model_name, "prompt": result.prompt}
    return plots.save(visualize_attention_overlay(result, alpha), path, facts)


def plot_attention_comparison(
    results: Sequence[AttentionVisualizationResult], question: str, alpha: float = ALPHA
) -> Figure:
    """The picture and one overlay per result, all on one colour range, up to four panels in a
    row."""
    panels = len(results) + 1
    is_wide = len(results[0].grids) > 1  # pictures side by side
    columns = 1 if is_wide else min(4, panels)
    rows = -(-panels // columns)
    width = 2 * PANEL if is_wide else PANEL
    figure = plt.figure(figsize=_figsize(results[0].image_array, width, columns, rows))
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    picture = overlay.at_pixel_size(Image.fromarray(results[0].image_array))
    overlay.show_picture(axes[0], np.asarray(picture))
    axes[0].set_title("Picture")
    axes[0].set_xlabel(_wrapped(f"Question: {question}"), fontsize=8)
    heats = [shown(result)[1] for result in results]
    ends = (min(map(np.nanmin, heats)), max(map(np.nanmax, heats)))
    for axis, result in zip(axes[1:], results):
        visualize_attention_overlay(result, alpha, axis, ends)
    for axis in axes[panels:]:
        axis.remove()
    figure.suptitle(f"{AVERAGED}; one colour range for all panels", fontsize=10)
    return figure


def _figsize(
    pixels: UInt8[np.ndarray, "height width 3"], width: float, columns: int = 1, rows: int = 1
) -> tuple[float, float]:
    """Inches for panels of a picture with its colour bar, title and answer."""
    shape = np.clip(pixels.shape[0] / pixels.shape[1], 0.3, 1.6)
    return width * columns, ((width - 1) * shape + 1.5) * rows


def _drawable(text: str) -> str:
    """Text without formulas, as the figures' font can draw it."""
    return plots.drawable(text).replace("$", r"\$")


def _wrapped(text: str, centre: int = 0, width: int = 58, lines: int = 4) -> str:
    """Text in at most so many lines, cut around a character of interest."""
    text = _drawable(" ".join(text.split()))
    room = width * lines - 8
    start = max(0, min(centre - room // 2, len(text) - room))
    before = "... " if start else ""
    after = " ..." if start + room < len(text) else ""
    return textwrap.fill(before + text[start : start + room] + after, width)

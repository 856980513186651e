"""Attention of one generated token over the picture: what a measurement holds, and its figures.
Used by viz_attention_image.py and notebooks."""

import textwrap
from dataclasses import dataclass

import numpy as np
from matplotlib.ticker import PercentFormatter
from PIL import Image

from vlmdiag.figures import plots
from vlmdiag.pictures.grid import PatchGrid

SHOWN = 1024  # pixels of the longer side of a picture in a figure


@dataclass
class AttentionVisualizationResult:
    """What one model attended to at one generated token."""

    generated_text: str
    # (rows, columns) where the vision tokens are one grid, else (P,); share of the attention that
    # is not on BOS
    attention_map: np.ndarray
    image_array: np.ndarray  # (height, width, 3) uint8, the original picture
    normalized_entropy: float
    token_position: int  # of the generated tokens, from 0
    target_word: str | None
    step: str  # producing or query
    tokens: list  # the generated tokens as text
    answer_span: tuple  # characters of generated_text that are drawn as the target
    grid: PatchGrid
    outside_share: (
        float  # part of the attention on vision tokens that lies on padding around the picture
    )
    model_name: str
    prompt: str
    paper_compat: bool = False


def visualize_attention_overlay(result, alpha=0.55, axis=None):
    """The attention map over the picture, min to max of what is shown, with a colour bar ->
    figure."""
    figure = (
        axis.figure
        if axis is not None
        else plots.plt.figure(figsize=_figsize(result.image_array, 5.4))
    )
    axis = axis if axis is not None else figure.subplots()
    picture = _at_display_size(result.image_array)
    scale = np.array(
        [picture.width / result.grid.size[0], picture.height / result.grid.size[1]] * 2
    )
    shown = PatchGrid(result.grid.boxes * scale, result.grid.shape, picture.size).paint(
        result.attention_map.ravel()
    )
    _plain_picture(axis, picture)
    heat = axis.imshow(
        np.ma.masked_invalid(shown), cmap="RdYlBu_r", alpha=alpha, interpolation="nearest"
    )
    bar = figure.colorbar(heat, cax=axis.inset_axes([1.02, 0, 0.04, 1]))  # as high as the picture
    unit = (
        "attention, 0 = smallest, 1 = largest of all vision tokens"
        if result.paper_compat
        else "attention to a vision token, % of all but BOS"
    )
    bar.set_label(unit, fontsize=8)
    bar.ax.tick_params(labelsize=7)
    bar.ax.grid(False)
    bar.solids.set_alpha(1)
    if not result.paper_compat:
        bar.ax.yaxis.set_major_formatter(PercentFormatter(1, symbol=""))
    name = (
        result.target_word
        if result.target_word is not None
        else result.tokens[result.token_position].strip()
    )
    padding = f", {result.outside_share:.0%} on padding" if result.outside_share >= 0.005 else ""
    where = f"{_drawable(repr(name))} (token {result.token_position}, {result.step} step)"
    axis.set_title(
        f"{result.model_name}\n{where}\nnormalised entropy {result.normalized_entropy:.2f}{padding}"
    )
    start, end = result.answer_span
    lead = len(result.generated_text[start:end]) - len(result.generated_text[start:end].lstrip())
    marked = f"{result.generated_text[: start + lead]}[{result.generated_text[start + lead : end]}]{result.generated_text[end:]}"
    axis.set_xlabel(_wrapped(f"Answer: {marked.strip()}", start), fontsize=8)
    return figure


def save_attention_overlay(result, path, alpha=0.55, settings=None):
    """Write the overlay of one result as PNG and PDF."""
    return plots.save(
        visualize_attention_overlay(result, alpha),
        path,
        (settings or {}) | {"model": result.model_name, "prompt": result.prompt},
    )


def plot_attention_comparison(results, question, alpha=0.55):
    """The picture and one overlay per result, up to four panels in a row -> figure."""
    columns = min(4, len(results) + 1)
    rows = -(-(len(results) + 1) // columns)
    figure = plots.plt.figure(figsize=_figsize(results[0].image_array, 4.6, columns, rows))
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    _plain_picture(axes[0], _at_display_size(results[0].image_array))
    axes[0].set_title("Picture")
    axes[0].set_xlabel(_wrapped(f"Question: {question}"), fontsize=8)
    for axis, result in zip(axes[1:], results):
        visualize_attention_overlay(result, alpha, axis)
    for axis in axes[len(results) + 1 :]:
        axis.remove()
    return figure


def _at_display_size(pixels):
    """The picture with a longer side of at most SHOWN pixels, and at least half as many where it is
    small (whole multiples)."""
    picture = Image.fromarray(pixels)
    times = SHOWN // max(picture.size)
    if times > 1:
        return picture.resize(
            (picture.width * times, picture.height * times), Image.Resampling.NEAREST
        )
    picture.thumbnail((SHOWN, SHOWN))
    return picture


def _figsize(pixels, width, columns=1, rows=1):
    """Inches for panels of a picture with its colour bar, title and answer."""
    shape = np.clip(pixels.shape[0] / pixels.shape[1], 0.3, 1.6)
    return width * columns, ((width - 1) * shape + 1.5) * rows


def _plain_picture(axis, picture):
    axis.imshow(np.asarray(picture))
    axis.grid(False)
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)


def _drawable(text):
    """Text without formulas, as the figures' font can draw it."""
    return plots.drawable(text).replace("$", r"\$")


def _wrapped(text, centre=0, width=58, lines=4):
    """Text in at most so many lines, cut around a character of interest."""
    text = _drawable(" ".join(text.split()))
    room = width * lines - 8
    start = max(0, min(centre - room // 2, len(text) - room))
    cut = (
        ("... " if start else "")
        + text[start : start + room]
        + (" ..." if start + room < len(text) else "")
    )
    return textwrap.fill(cut, width)

"""A text as coloured boxes, drawn with matplotlib: the same as the page of text_page.py."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import matplotlib.pyplot as plt
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.patches import Rectangle

from vlmdiag.figures import plots
from vlmdiag.figures.plots import BREAK, drawable
from vlmdiag.types import Record
from vlmdiag.volcano.text_page import (
    COLORS,
    ink,
    mean_weight,
    size_of,
    ticks_of,
    title_of,
    whose_scale,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from matplotlib.typing import ColorType

    from vlmdiag.volcano.tensors import Instance, Stage
    from vlmdiag.volcano.text_page import Weights

# inches, but for the font size
WIDTH = 7.2
MARGIN = 0.18
SIZE = 11.5
LINE = 0.31
PAD = 0.035
ABOVE = 0.78
BELOW = 0.84
GAP = 0.2  # before the stop token


class Placed(NamedTuple):
    """A token, or a part of one, in a figure."""

    token: int
    text: str
    x: float
    line: int


def advance(text: str) -> float:
    """Width in inches of text drawn at SIZE, blanks at its ends included."""
    font = get_font(findfont(FontProperties()))
    font.set_size(SIZE, 72)
    return float(sum(font.load_char(ord(c)).linearHoriAdvance / 65536 for c in text) / 72)


def words_of(stage: Stage) -> list[list[tuple[int, str]]]:
    """The tokens that count, (index, text to draw), by words: one begins with a blank or after a
    line break."""
    words: list[list[tuple[int, str]]] = []
    for i, token in enumerate(stage.pieces()[: stage.steps]):
        if not words or token.startswith(" ") or BREAK in words[-1][-1][1]:
            words.append([])
        words[-1].append((i, drawable(token)))
    return words


def boxes_of(stage: Stage, room: float) -> tuple[list[Placed], int]:
    """Places of all tokens and the number of lines; a line ends before a blank, or after a line
    break; a word is split only if it is wider than a line."""
    placed: list[Placed] = []
    x = 0.0
    line = 0
    for word in words_of(stage):
        if x > 0 and x + sum(advance(text) for _, text in word) > room:
            x = 0.0
            line += 1
        for i, text in word:
            # no blank at the beginning of a line
            shown = text.lstrip(" ") or text if x == 0 else text
            for piece in cut(shown, room):
                if x > 0 and x + advance(piece) > room:
                    x = 0.0
                    line += 1
                placed.append(Placed(i, piece, x, line))
                x += advance(piece)
        if BREAK in word[-1][1]:
            x = 0.0
            line += 1
    if stage.ended:
        text = drawable(stage.tokens[-1].strip())
        if x > 0:
            x += GAP
        if x > 0 and x + advance(text) > room:
            x = 0.0
            line += 1
        placed.append(Placed(len(stage.tokens) - 1, text, x, line))
    return placed, 1 + max((place.line for place in placed), default=0)


def cut(text: str, room: float) -> list[str]:
    """Text in pieces that are no wider than a line."""
    pieces = [""]
    for c in text:
        if pieces[-1] and advance(pieces[-1] + c) > room:
            pieces.append("")
        pieces[-1] += c
    return pieces


def shorten(text: str, room: float) -> str:
    """Text on one line of small type, cut to the room."""
    text = drawable(" ".join(text.split()))
    while advance(text) * 8.5 / SIZE > room:
        text = text[:-2].rstrip(" .") + "\N{HORIZONTAL ELLIPSIS}"
    return text


def draw(
    instance: Instance, stage: Stage, weights: Weights, scale: Normalize, k: int, own_scale: bool
) -> Figure:
    """The text as coloured boxes over a colour bar with numbers. k: --hidden_top_k."""
    room = WIDTH - 2 * MARGIN
    placed, lines = boxes_of(stage, room)
    height = ABOVE + lines * LINE + BELOW
    figure = plt.figure(figsize=(WIDTH, height))
    figure.set_layout_engine("none")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(height, 0))
    axes.axis("off")
    title = title_of(instance, stage)
    axes.text(MARGIN, 0.26, title, fontsize=12, fontweight="bold", parse_math=False)
    small: Record = {"fontsize": 8.5, "color": "#3d4653", "parse_math": False}
    axes.text(MARGIN, 0.46, shorten(instance.question, room), **small)
    n = size_of(stage) + (" and the stop token" if stage.ended else "")
    of_model = f"{Path(instance.model).name}, instance {instance.index}, {n}"
    axes.text(MARGIN, 0.62, shorten(of_model, room), **small)
    for place in placed:
        is_stop = stage.ended and place.token == len(stage.tokens) - 1
        _draw_token(axes, place, COLORS(float(scale(weights[place.token]))), is_stop)

    mean = mean_weight(stage, weights)
    bar_axes = figure.add_axes((MARGIN / WIDTH, 0.42 / height, 2.6 / WIDTH, 0.12 / height))
    _draw_bar(figure, bar_axes, scale, mean)
    words = (
        f"mean attention to a vision token, top-{k} layers and heads\nsmallest to"
        f" largest of {whose_scale(instance, own_scale)}"
    )
    x = MARGIN + 2.9
    beside: Record = {"fontsize": 7.5, "va": "center"}
    axes.text(x, height - 0.56, words, color="#3d4653", linespacing=1.35, **beside)
    axes.text(x, height - 0.29, f"mean of this text {mean:.3g}", color="#B34D00", **beside)
    return figure


def _draw_token(axes: Axes, place: Placed, color: ColorType, is_stop: bool) -> None:
    """A coloured box and its text; the stop token's is wider and dashed."""
    baseline = ABOVE + place.line * LINE + 0.2
    edge: Record = {"edgecolor": "white", "linewidth": 0.5}
    pad = 0.0
    if is_stop:
        edge = {"edgecolor": "#5d6775", "linewidth": 0.8, "linestyle": (0, (3, 2))}
        pad = PAD
    corner = (place.x + MARGIN - pad, baseline - 0.165)
    width = advance(place.text) + 2 * pad
    axes.add_patch(Rectangle(corner, width, 0.235, facecolor=color, **edge))
    blanks = place.text[: len(place.text) - len(place.text.lstrip(" "))]
    axes.text(
        place.x + MARGIN + advance(blanks),
        baseline,
        place.text.strip(" "),
        fontsize=SIZE,
        color=ink(color),
        parse_math=False,
    )


def _draw_bar(figure: Figure, bar_axes: Axes, scale: Normalize, mean: float) -> None:
    """The colour bar with the mean of this text."""
    mappable = plt.cm.ScalarMappable(scale, COLORS)
    bar = figure.colorbar(mappable, cax=bar_axes, orientation="horizontal")
    ticks = ticks_of(scale)
    bar.set_ticks(ticks, labels=[f"{tick:.3g}" for tick in ticks])
    bar.ax.tick_params(labelsize=7.5, length=2)
    first, middle, last = bar.ax.get_xticklabels()
    first.set_horizontalalignment("left")
    middle.set_horizontalalignment("center")
    last.set_horizontalalignment("right")
    bar.ax.grid(False)
    bar.outline.set_linewidth(0.5)
    bar.ax.plot([mean, mean], [-0.25, 1.25], color=plots.VERMILION, linewidth=1.4, clip_on=False)
    bar.ax.set_xlim(scale.vmin, scale.vmax)

"""The stethoscope's pictures and pieces of HTML, from arrays. Text of a model or a person is
escaped by the templates of panels.html; nothing is loaded from anywhere.

Colours show the value itself from 0 to a ceiling: Greens probability, Reds visual contribution,
Purples entropy, Blues the lens and what a head gives to the picture, yellow to red what lies over
the picture; red to blue, white at chance, the balance of picture and question.

Shapes: T tokens of the answer, P vision tokens, S cells of a map over the picture, N positions.
"""

from __future__ import annotations

import base64
import functools
import io
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jinja2
import matplotlib
import numpy as np
from PIL import Image, ImageDraw

from vlmdiag.figures.layers import state_name
from vlmdiag.pictures import overlay

if TYPE_CHECKING:
    from jaxtyping import Float, Int, UInt8
    from markupsafe import Markup

    from vlmdiag.pictures.grid import PatchGrid
    from vlmdiag.stethoscope.analysis import Analysis

SHOWN = 420  # pixels of the longer side of a picture in the page
MARK = (0, 114, 178)  # selected patches
CHOSEN = (213, 94, 0)  # the chosen head
MOST_DECADES = 12  # of a log axis
COLORS = {  # by matplotlib's name, (256, 3) uint8 from 0 to the ceiling
    name: (matplotlib.colormaps[name](np.linspace(0, 1, 256))[:, :3] * 255).round().astype(np.uint8)
    for name in ("Greens", "Reds", "Purples", "Blues", "YlOrRd", "RdBu")
}
_loader = jinja2.FileSystemLoader(Path(__file__).parent)
_environment = jinja2.Environment(loader=_loader, autoescape=True)
templates: Any = _environment.get_template("panels.html").module  # its macros


# ---- text and colours ----


def shown(text: object) -> str:
    """A token as it is written in the page, before escaping: a space in front is left out, line
    breaks and what cannot be seen are marked."""
    written = "".join(_visible(c) for c in str(text).encode("utf-8", "replace").decode())
    without_space = written.strip(" ")
    if without_space:
        return without_space
    return "\N{OPEN BOX}" * len(written) if written else "\N{EMPTY SET}"


def _visible(character: str) -> str:
    if character == "\n":
        return "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}"
    return character if character.isprintable() else "\N{REPLACEMENT CHARACTER}"


def number(value: float) -> str:
    """A value with the digits that tell it apart."""
    if math.isnan(value):
        return "none"
    if math.isinf(value):
        return "\N{INFINITY}"
    if value == 0 or abs(value) >= 0.1:
        return f"{value:.2f}"
    return f"{value:.3f}" if abs(value) >= 0.001 else f"{value:.0e}"


def color(
    values: Float[np.ndarray, "*shape"], ceiling: float, name: str
) -> UInt8[np.ndarray, "*shape 3"]:
    """Values from 0 to the ceiling as colours; NaN as 0."""
    finite = np.nan_to_num(np.asarray(values, float), posinf=np.inf)
    share = np.clip(finite / (ceiling or 1.0), 0, 1)
    return COLORS[name][(share * 255).astype(int)]


def style(rgb: UInt8[np.ndarray, " 3"]) -> str:
    """CSS of a coloured cell with text that can be read on it."""
    r, g, b = (int(channel) for channel in rgb)
    is_light = 0.299 * r + 0.587 * g + 0.114 * b > 140
    return f"background:rgb({r},{g},{b});color:{'#111' if is_light else '#fff'}"


# ---- pieces ----


class Cell(NamedTuple):
    """A coloured cell. name: what stands above its text, if anything; marked: framed."""

    text: str
    value: str
    style: str
    title: str
    name: str = ""
    marked: bool = False


class Bar(NamedTuple):
    """A horizontal bar. width: in per cent, with one digit."""

    label: str
    value: str
    width: str
    title: str


class Look(NamedTuple):
    """How maps lie over the picture. opacity: of the largest value, in per cent; smooth: between
    the patches' centres, else patch by patch."""

    opacity: float = 90
    smooth: bool = False


class Piece(NamedTuple):
    """A coloured piece of the answer's text."""

    text: str
    style: str
    title: str


PLAIN = Look()


def page(*pieces: str) -> str:
    """A panel, of the pieces that other functions of this file make."""
    return str(templates.page(pieces))


def note(text: str) -> Markup:
    return templates.note(text)


def heading(text: str) -> Markup:
    return templates.heading(text)


def progress(share: float, what: str) -> str:
    """A panel that says how far a computation is."""
    return page(templates.progress(f"{share:.3f}", f"{share:.0%}", what))


def scale(ceiling: float, name: str, what: str, floor: float = 0) -> Markup:
    """The colours from the floor to the ceiling, and what they show."""
    stops = ["rgb({},{},{})".format(*COLORS[name][i]) for i in (0, 64, 128, 191, 255)]
    return templates.scale(",".join(stops), f"{floor:g}", number(ceiling), what)


def strip(
    labels: Sequence[str],
    values: Float[np.ndarray, " K"],
    ceiling: float,
    name: str,
    titles: Sequence[str],
    marked: int | None = None,
    what: str = "",
) -> Markup:
    """Coloured cells, one a token. marked: index of the chosen one."""
    colors = color(values, ceiling, name)
    cells = [
        Cell(
            shown(label), number(float(values[i])), style(colors[i]), titles[i], marked=i == marked
        )
        for i, label in enumerate(labels)
    ]
    return templates.cells(cells) + scale(ceiling, name, what)


def bars(
    labels: Sequence[str],
    values: Float[np.ndarray, " K"] | Sequence[float],
    ceiling: float | None = None,
    fill: str = "#E69F00",
    titles: Sequence[str] | None = None,
) -> Markup:
    """Horizontal bars from 0, values >= 0. ceiling: of a full bar; None: the largest."""
    ceiling = ceiling or float(np.max(values, initial=0)) or 1.0
    rows = []
    for label, title, value in zip(labels, titles or labels, values, strict=True):
        width = 100 * min(1, max(0, float(value)) / ceiling)
        rows.append(Bar(shown(label), number(float(value)), f"{width:.1f}", title))
    return templates.bars(rows, fill)


def log_bars(
    labels: Sequence[str], values: Float[np.ndarray, " K"], fill: str = "#E69F00"
) -> Markup:
    """Horizontal bars of probabilities on a log axis, from the power of ten below the smallest (at
    least MOST_DECADES below 1 are not shown) to 1, and the numbers themselves."""
    decades = log_decades(values)
    rows = []
    for label, value in zip(labels, np.asarray(values, float), strict=True):
        width = 100 * (1 + math.log10(max(float(value), 10.0**-decades)) / decades)
        rows.append(Bar(shown(label), probability(float(value)), f"{width:.1f}", shown(label)))
    step = -(-decades // 6)
    ticks = [
        (f"{100 * (1 - power / decades):.1f}", "1" if power == 0 else f"1e-{power}")
        for power in range(0, decades + 1, step)
    ]
    return templates.bars(rows, fill, ticks)


def log_decades(values: Float[np.ndarray, " K"]) -> int:
    """Powers of ten below 1 that a log axis of probabilities has."""
    least = max(float(np.min(values, initial=1.0)), 10.0**-MOST_DECADES)
    return max(1, math.ceil(-math.log10(least)))


def probability(value: float) -> str:
    """A probability with three digits, however small."""
    return f"{value:.3f}" if value >= 0.01 or value == 0 else f"{value:.1e}"


def candidates(
    words: Mapping[int, str], ids: Int[np.ndarray, " k"], probs: Float[np.ndarray, " k"]
) -> str:
    """Likeliest tokens as one line a token, for a title. words: {id: text}."""
    lines = []
    for rank, (id, p) in enumerate(zip(ids, probs, strict=True), 1):
        lines.append(f"{rank}. {shown(words[int(id)])}  {p:.4f}")
    return "\n".join(lines)


def evolution_strip(analysis: Analysis, token: int) -> Markup:
    """What the lens reads at the token's producing row after every layer, with the top candidates
    on hover, and the produced token's probability."""
    evolution = analysis.evolution()
    words, ids, probs = evolution.words, evolution.ids[token], evolution.probs[token]
    names = [state_name(state) for state in range(len(ids))]
    colors = color(probs[:, 0], 1.0, "Blues")
    cells = []
    for i, name in enumerate(names):
        cells.append(
            Cell(
                text=shown(words[int(ids[i, 0])]),
                value=number(float(probs[i, 0])),
                style=style(colors[i]),
                title=f"{name}\n{candidates(words, ids[i], probs[i])}",
                name=name,
            )
        )
    ranks = list(zip(names, evolution.rank[token], strict=True))
    return (
        templates.cells(cells)
        + scale(1.0, "Blues", "probability of the likeliest token after each layer")
        + heading(f"Probability of what was produced: {shown(analysis.tokens[token])}")
        + bars(
            [f"{name} (rank {rank})" for name, rank in ranks],
            evolution.chosen[token],
            1.0,
            "#0072B2",
            [f"{name}: rank {rank}" for name, rank in ranks],
        )
    )


def answer_text(
    analysis: Analysis, values: Float[np.ndarray, " T"], ceiling: float, what: str
) -> Markup:
    """The answer with every token's background by its value."""
    colors = color(values, ceiling, "YlOrRd")
    pieces = []
    written = 0  # characters so far: tokens that share a character do not write it twice
    for i, (start, stop) in enumerate(analysis.spans):
        text = analysis.text[max(start, written) : stop]
        written = max(written, stop)
        if text:
            title = f"{i}: {shown(analysis.tokens[i])}, {number(float(values[i]))}"
            pieces.append(Piece(_printable(text), style(colors[i]), title))
    return templates.answer(pieces) + scale(ceiling, "YlOrRd", what)


def _printable(text: str) -> str:
    """Text with line breaks; what else cannot be seen, or written as UTF-8, is marked."""
    visible = "".join(c if c == "\n" else _visible(c) for c in text)
    return visible.encode("utf-8", "replace").decode()


# ---- over the picture ----


class Canvas:
    """A picture at the page's size with its grid, and pale for what is drawn over it.

    grid: over the original picture; None: nothing can be drawn over it.
    """

    def __init__(
        self, picture: Image.Image, grid: PatchGrid | None, longer_side: int = SHOWN
    ) -> None:
        self.picture = overlay.at_smooth_size(picture, longer_side, most_enlarged=4.0)
        self.grid = None if grid is None else grid.rescaled(self.picture.size)
        self._pale = overlay.pale(self.picture)

    @property
    def cells(self) -> PatchGrid:
        """The grid; ValueError without one."""
        if self.grid is None:
            raise ValueError("where the cells lie in the picture is unknown")
        return self.grid

    @functools.cached_property
    def original(self) -> Markup:
        """The picture itself."""
        return figure(self.picture, "The picture itself")

    def overlay(
        self, values: Float[np.ndarray, " S"], ceiling: float, look: Look = PLAIN
    ) -> Image.Image:
        """Values >= 0 over the pale picture, from yellow to red; what has none, and NaN, shows the
        picture."""
        heat = overlay.painted(self.cells, values, look.smooth)
        return overlay.blended(
            self._pale, heat, ceiling or 1.0, COLORS["YlOrRd"], look.opacity / 100
        )

    def patches(self, chosen: Iterable[int]) -> Image.Image:
        """The picture with its grid lines and the chosen cells framed."""
        image = self.picture.convert("RGB").copy()
        draw = ImageDraw.Draw(image, "RGBA")
        boxes = self.cells.boxes
        for box in boxes[self.cells.has_box].tolist():
            draw.rectangle(box, outline=(255, 255, 255, 90))
        for index in chosen:
            box = boxes[index].tolist()
            draw.rectangle(box, fill=(*MARK, 110), outline=(*MARK, 255), width=2)
        return image

    def cell(self, x: float, y: float) -> int | None:
        """Index of the smallest cell under the point (x, y), shares of width and height: a tile's,
        not the thumbnail's; None where no cell lies."""
        x *= self.picture.width
        y *= self.picture.height
        x0, y0, x1, y1 = np.nan_to_num(self.cells.boxes, nan=-1.0).T
        is_under = self.cells.has_box & (x0 <= x) & (x < x1) & (y0 <= y) & (y < y1)
        under = np.flatnonzero(is_under)
        if not len(under):
            return None
        areas = (x1 - x0) * (y1 - y0)
        return int(under[np.argmin(areas[under])])


def figure(image: Image.Image, alt: str) -> Markup:
    """An <img> that holds the picture itself."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=88, subsampling=0)
    data = base64.b64encode(buffer.getvalue()).decode()
    return templates.image(image.width, image.height, alt, data)


def over_picture(
    canvas: Canvas,
    values: Float[np.ndarray, " S"],
    ceiling: float,
    alt: str,
    what: str,
    look: Look = PLAIN,
    beside: bool = True,
) -> Markup:
    """A map over the picture with its scale, or a note where its place is unknown. beside: with
    the picture itself beside it."""
    if canvas.grid is None:
        return note(
            "Where this model's image tokens lie in the picture is unknown, so nothing is drawn"
            " on it."
        )
    drawn = [figure(canvas.overlay(values, ceiling, look), alt), scale(ceiling, "YlOrRd", what)]
    return templates.pair([drawn, [canvas.original]], "maps") if beside else drawn[0] + drawn[1]


def word_bars(
    analysis: Analysis, rows: Float[np.ndarray, " N"], token: int, ceiling: float | None = None
) -> Markup:
    """Two lists of bars: relevancy of the question's tokens and of the earlier answer's."""
    prompt = range(analysis.prompt_length)
    question = [i for i in prompt if analysis.groups[i] == "user"]
    earlier = list(range(analysis.prompt_length, analysis.prompt_length + token))
    ceiling = ceiling or float(np.max(rows[question + earlier], initial=0)) or 1.0
    return (
        heading("Relevancy to User Input")
        + _bars_of(analysis, rows, question, ceiling, "#E69F00")
        + heading("Relevancy to Previous Answer")
        + _bars_of(analysis, rows, earlier, ceiling, "#009E73")
    )


def _bars_of(
    analysis: Analysis,
    rows: Float[np.ndarray, " N"],
    positions: list[int],
    ceiling: float,
    fill: str,
) -> Markup:
    if not positions:
        return note("None yet: this is the first token.")
    labels = [f"{i - positions[0]}: {shown(analysis.labels[i])}" for i in positions]
    return bars(labels, rows[positions], ceiling, fill)


def export_link(name: str, archive: Path, where: str) -> str:
    """A link to an exported file by its secret name. where: its run directory, '' for none."""
    size = f"{archive.stat().st_size / 2**20:.1f} MiB"
    return page(templates.export(name, archive.name, size, where))


# ---- panels ----


def canvas(analysis: Analysis, count: int, longer_side: int = SHOWN) -> Canvas:
    """The Canvas of an analysis for maps over `count` cells."""

    def make() -> Canvas:
        return Canvas(analysis.picture, analysis.place(count), longer_side)

    return analysis.once(("canvas", count, longer_side), make)


def named(analysis: Analysis, token: int) -> str:
    """A token of the answer by its number and text."""
    return f"token {token}: {shown(analysis.tokens[token])}"


def ceiling_of(values: Float[np.ndarray, "*shape"] | Sequence[float], percent: float) -> float:
    """The value at the top of the colours: `percent` of the largest."""
    values = np.asarray(values, float)
    return float(np.max(values[np.isfinite(values)], initial=0)) * percent / 100 or 1.0


def head_name(head: int | None) -> str:
    """A head, or for None the mean over all."""
    return "mean over heads" if head is None else f"head {head}"


MEASURES = {  # of the answer's tokens: (its colours, what they show)
    "probability": ("Greens", "probability (pale: not sure)"),
    "contribution": ("Reds", "of it from the picture, not words"),
    "entropy": ("Purples", "bits of entropy (dark: a guess)"),
}


def token_colors(analysis: Analysis, by: str) -> str:
    """A style sheet that colours the tokens to choose from by one of MEASURES, and its legend. The
    contribution is the maximum's share at the last layer."""
    name, what = MEASURES[by]
    ceiling = 1.0
    if by == "contribution":
        values = analysis.contribution("max", "share")[:, -1]
    elif by == "entropy":
        values = analysis.evolution().entropy[:, -1]
        ceiling = ceiling_of(values, 100)
    else:
        values = analysis.probabilities
    styles = [style(rgb) for rgb in color(values, ceiling, name)]
    return page(templates.token_styles(styles), scale(ceiling, name, what))


def probability_panel(analysis: Analysis, token: int) -> str:
    """Strip of the produced tokens' probabilities, alternatives of each on hover, and of the chosen
    token as bars."""
    evolution = analysis.evolution()
    words = evolution.words
    titles = []
    for i, label in enumerate(analysis.tokens):
        alternatives = candidates(words, evolution.ids[i, -1], evolution.probs[i, -1])
        titles.append(f"{i}: {shown(label)}\n{alternatives}")
    place = "among the likeliest"
    if analysis.answer_ids[token] not in evolution.ids[token, -1]:
        place = f"not among them, at rank {evolution.rank[token, -1]}"
    return page(
        strip(
            analysis.tokens,
            analysis.probabilities,
            1.0,
            "Greens",
            titles,
            token,
            "probability of the token that was produced",
        ),
        heading(f"Alternatives to token {token}: {shown(analysis.tokens[token])}"),
        log_bars(
            [words[int(i)] for i in evolution.ids[token, -1]], evolution.probs[token, -1], "#009E73"
        ),
        note(
            f"The token that was produced is {place}. Probabilities are the model's own, before"
            " temperature and top-p."
        ),
    )


def contribution_panel(
    analysis: Analysis, token: int, layer: int, how: str, kind: str, percent: float
) -> str:
    """Strip of the tokens' visual contribution, see Analysis.contribution()."""
    values = analysis.contribution(how, kind)[:, layer]
    if kind == "share":
        ceiling = percent / 100
        what = f"{how} R_img / ({how} R_img + {how} R_text)"
    else:
        ceiling = ceiling_of(values, percent)
        what = f"{how} R_img / {how} R_text"
    titles = [
        f"{i}: {shown(label)}\nvisual contribution {number(float(value))}"
        for i, (label, value) in enumerate(zip(analysis.tokens, values, strict=True))
    ]
    what = f"{what}, gathered up to layer {layer}"
    return page(strip(analysis.tokens, values, ceiling, "Reds", titles, token, what))


def evolution_panel(analysis: Analysis, token: int) -> str:
    """What the lens reads after every layer."""
    return page(
        heading(f"What the model would say after each layer, {named(analysis, token)}"),
        evolution_strip(analysis, token),
    )


def relevancy_map(
    analysis: Analysis, token: int, layer: int, hide: bool
) -> tuple[Float[np.ndarray, " S"], int]:
    """(map, how many sinks are left out of it). hide: leave them out."""
    values = analysis.relevancy().picture[token, layer]
    is_sink = analysis.sinks()
    if not hide or len(is_sink) != len(values):
        return values, 0
    return np.where(is_sink, np.nan, values), int(is_sink.sum())


def relevancy_panel(
    analysis: Analysis, token: int, layer: int, percent: float, hide: bool, look: Look = PLAIN
) -> tuple[str, str]:
    """(overlay, word bars)"""
    relevancy = analysis.relevancy()
    values, hidden = relevancy_map(analysis, token, layer, hide)
    share = float(analysis.contribution("max", "share")[token, layer])
    ratio = float(analysis.contribution("sum", "ratio")[token, layer])
    of_token = float(relevancy.picture[token].max())
    of_any = float(relevancy.picture.max())
    text = (
        f"Visual Contribution: share of the maximum {number(share)}; Sum R_img / R_text:"
        f" {number(ratio)}. Largest on the picture: {number(of_token)} of this token,"
        f" {number(of_any)} of any token of the answer"
    )
    if hidden:
        text += f". {hidden} vision tokens of outlying norm are left out"
    elif hide:
        text += ". No vision token has an outlying norm"
    overlaid = over_picture(
        canvas(analysis, len(values)),
        values,
        ceiling_of(relevancy.picture[token], percent),
        f"Relevancy to Image of {named(analysis, token)}, layer {layer}",
        f"relevancy, gathered up to layer {layer}",
        look,
    )
    pieces = [heading(f"Relevancy to Image, {named(analysis, token)}"), overlaid, note(text)]
    if relevancy.instruction is not None:
        total = float(relevancy.instruction[token, layer].sum())
        pieces.append(
            note(
                "Relevancy of the instruction that the Q-Former reads beside the picture:"
                f" {number(total)} in sum."
            )
        )
    return page(*pieces), page(word_bars(analysis, relevancy.rows[token, layer], token))


def attention_panel(
    analysis: Analysis, token: int, layer: int, head: int | None, percent: float, look: Look = PLAIN
) -> str:
    """Raw attention over the picture, and how much each head looks at it. head: None for the
    mean."""
    maps = analysis.attention(layer)[token]  # (H, P)
    values = maps.mean(0) if head is None else maps[head]
    of_heads = maps.sum(-1)
    title = f"Attention of {named(analysis, token)}, layer {layer}, {head_name(head)}"
    ceiling = ceiling_of(values, percent)
    view = canvas(analysis, len(values))
    return page(
        heading(title),
        over_picture(view, values, ceiling, title, "attention weight", look),
        note(f"On the whole picture: {number(float(values.sum()))} of 1."),
        heading(f"Attention to the picture by head, layer {layer}"),
        bars([f"head {h}" for h in range(len(of_heads))], of_heads, 1.0, "#0072B2"),
    )


def heads_panel(analysis: Analysis, token: int, layer: int, head: int | None, measure: str) -> str:
    """All heads of all layers as one small map, with the chosen ones framed. measure: 'mass', how
    much of a head's attention lies on the picture, or 'balance', CMB against chance."""
    heads = analysis.looking_heads()
    if measure == "mass":
        values = heads.mass[token]
        ceiling = ceiling_of(values, 100)
        colors = color(values, ceiling, "Blues")
        legend = scale(ceiling, "Blues", "of a head's attention is on the picture")
        text = f"Mean over all heads: {number(float(values.mean()))}."
    else:
        values = heads.balance[token]
        reach = min(heads.chance, 1 - heads.chance) or 0.01
        away = np.nan_to_num(values - heads.chance)
        colors = color(away + reach, 2 * reach, "RdBu")
        legend = scale(
            heads.chance + reach,
            "RdBu",
            "picture / (picture + question)",
            round(heads.chance - reach, 3),
        )
        above = int((away > 0).sum())
        text = (
            f"White: chance ({heads.chance:.3f}, the picture's share of the tokens). Blue: {above}"
            f" of {values.size} heads look at the picture more than that; red: less."
        )
    side = max(4, SHOWN // max(values.shape))
    enlarged = np.repeat(np.repeat(colors, side, 0), side, 1)
    image = Image.fromarray(enlarged)
    left, right = (0, values.shape[1]) if head is None else (head, head + 1)
    frame = (left * side, layer * side, right * side - 1, (layer + 1) * side - 1)
    ImageDraw.Draw(image).rectangle(frame, outline=CHOSEN, width=max(2, side // 10))
    alt = f"Heads of all layers, layer {layer}, {head_name(head)} chosen"
    written = " ".join("none" if np.isnan(value) else f"{value:.3f}" for value in values.flat)
    return page(templates.heads(figure(image, alt), *values.shape, written), legend, note(text))


def cells_of(analysis: Analysis, source: str) -> int:
    """How many cells the maps of a source have."""
    if source == "attention":
        return len(analysis.vision)
    return analysis.relevancy().picture.shape[-1]


def selected(analysis: Analysis, source: str) -> list[int]:
    """Indices of the selected patches that are cells of a source's maps, sorted; none where the
    place of its cells is unknown."""
    grid = canvas(analysis, cells_of(analysis, source)).grid
    if grid is None:
        return []
    return sorted(index for index in analysis.patches if index < len(grid.boxes))


def patch_panel(analysis: Analysis, source: str, layer: int, head: int | None) -> tuple[str, str]:
    """(the picture to be clicked, the answer coloured by what looked there)"""
    view = canvas(analysis, cells_of(analysis, source))
    if view.grid is None:
        advice = ""
        if source == "attention":
            advice = "Choose relevancy: it may reach cells whose place is known."
        return page(over_picture(view, np.zeros(0), 1, "", "")), page(note(advice))
    chosen = selected(analysis, source)
    picture = page(figure(view.patches(chosen), f"The picture with {len(chosen)} selected patches"))
    if not chosen:
        return picture, page(note("Click patches of the picture; click again to take one out."))
    return picture, page(*_looked_at(analysis, chosen, source, layer, head))


def _looked_at(
    analysis: Analysis, chosen: Collection[int], source: str, layer: int, head: int | None
) -> list[Markup]:
    """The answer coloured by how much each token looked at the chosen patches."""
    values = analysis.looked_at(chosen, source, layer, head)
    what = "attention to the selected patches"
    title = f"layer {layer}, {head_name(head)}"
    if source == "relevancy":
        what = "share of the token's relevancy over the picture"
        title = f"layer {layer}"
    count = "1 patch" if len(chosen) == 1 else f"{len(chosen)} patches"
    order = np.argsort(-values, kind="stable")[:12]
    labels = [f"{i}: {shown(analysis.tokens[i])}" for i in order]
    return [
        heading(f"{count}, {title}"),
        answer_text(analysis, values, ceiling_of(values, 100), what),
        heading("Tokens that looked there most"),
        bars(labels, values[order], fill="#D55E00"),
    ]


def compare_panel(
    analysis: Analysis,
    first: tuple[int, int],
    second: tuple[int, int],
    percent: float,
    look: Look = PLAIN,
) -> str:
    """Two (token, layer) side by side, on one colour scale."""
    relevancy = analysis.relevancy()
    pairs = (first, second)
    ceiling = ceiling_of([relevancy.picture[pair].max() for pair in pairs], percent)
    words = max(
        float(relevancy.rows[token, layer][analysis.visible_text(token)].max())
        for token, layer in pairs
    )
    columns = []
    for token, layer in pairs:
        values = relevancy.picture[token, layer]
        share = float(analysis.contribution("max", "share")[token, layer])
        title = f"{named(analysis, token)}, layer {layer}"
        view = canvas(analysis, len(values), SHOWN // 2)
        p = probability(float(analysis.probabilities[token]))
        alt = f"Relevancy of {title}"
        columns.append(
            [
                heading(title),
                over_picture(view, values, ceiling, alt, "relevancy", look, beside=False),
                note(f"p = {p}, visual contribution {number(share)} (share of the maximum)"),
                heading("Prediction evolution"),
                evolution_strip(analysis, token),
                word_bars(analysis, relevancy.rows[token, layer], token, words),
            ]
        )
    return page(templates.pair(columns))

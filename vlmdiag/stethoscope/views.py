"""The stethoscope's pictures and pieces of HTML, from arrays. Text of a model or a person is
escaped; nothing is loaded from anywhere.

Colours show the value itself from 0 to a ceiling: Greens probability, Reds visual contribution,
Blues the lens, yellow to red what lies over the picture.
"""

import base64
import html
import io
import math

import matplotlib
import numpy as np
from PIL import Image, ImageDraw

from vlmdiag.pictures.grid import PatchGrid

SHOWN = 520  # pixels of the longer side of a picture in the page
MARK = (0, 114, 178)  # selected patches
_MAPS = {
    name: (matplotlib.colormaps[name](np.linspace(0, 1, 256))[:, :3] * 255).round().astype(np.uint8)
    for name in ("Greens", "Reds", "Blues", "YlOrRd")
}

CSS = """
.st { color: var(--body-text-color); font-size: 15px; line-height: 1.45; }
.st h4 { margin: 14px 0 6px; font-size: 15px; }
.st .note { color: var(--body-text-color) !important; opacity: .85; font-size: 14px; margin: 4px 0; }
.st .cells { display: flex; flex-wrap: wrap; gap: 3px; }
.st .cell { border: 2px solid transparent; border-radius: 4px; padding: 3px 7px; text-align: center; min-width: 38px; font-size: 14.5px; }
.st .cell small { display: block; font-size: 12.5px; }
.st .cell * { color: inherit !important; }
.st .cell.on { border-color: #D55E00; outline: 2px solid #D55E00; }
.st .cell bdi { white-space: pre; }
.st .scale { display: flex; align-items: center; gap: 8px; font-size: 13.5px; margin: 6px 0; }
.st .scale i { display: inline-block; width: 160px; height: 12px; border: 1px solid #8888; }
.st table.bars { border-collapse: collapse; width: 100%; border: 0 !important; margin: 0; }
.st table.bars tr, .st table.bars td { border: 0 !important; background: none; }
.st table.bars td { padding: 1px 6px; font-size: 14px; vertical-align: middle; }
.st table.bars td:first-child { text-align: right; white-space: pre; width: 1%; }
.st table.bars td:last-child { width: 1%; white-space: nowrap; font-variant-numeric: tabular-nums; }
.st .bar { height: 13px; min-width: 1px; border-radius: 2px; }
.st .scroll { max-height: 420px; overflow-y: auto; }
.st .pair { display: flex; flex-wrap: wrap; gap: 20px; align-items: flex-start; }
.st .pair > div { flex: 1 1 320px; min-width: 0; }
.st img { max-width: 100%; height: auto; display: block; }
.st p.answer { font-size: 17px; line-height: 2; margin: 6px 0; }
.st p.answer span { padding: 3px 1px; border-radius: 3px; white-space: pre-wrap; }
#pat_picture img { cursor: crosshair; }
#examples .grid-container { grid-template-columns: repeat(3, minmax(0, 1fr)) !important; }
"""


# ---- text and colours ----


def shown(text):
    """A token as it is written in the page, before escaping: a space in front is left out, line
    breaks and what cannot be seen are marked."""
    text = str(text).encode("utf-8", "replace").decode()
    text = "".join("\u21b5" if c == "\n" else c if c.isprintable() else "\ufffd" for c in text)
    return text.strip(" ") or ("\u2423" * len(text) if text else "\u2205")


def escaped(text):
    return html.escape(shown(text), quote=True)


def number(value):
    """A value with the digits that tell it apart."""
    if not math.isfinite(value):
        return "none" if math.isnan(value) else "\u221e"
    return (
        f"{value:.2f}"
        if value == 0 or abs(value) >= 0.1
        else f"{value:.3f}"
        if abs(value) >= 0.001
        else f"{value:.0e}"
    )


def color(values, ceiling, name):
    """Values (...) from 0 to the ceiling as colours (..., 3) uint8; NaN as 0."""
    share = np.clip(
        np.nan_to_num(np.asarray(values, float), posinf=np.inf) / (ceiling or 1.0), 0, 1
    )
    return _MAPS[name][(share * 255).astype(int)]


def style(rgb):
    """CSS of a coloured cell with text that can be read on it."""
    r, g, b = (int(part) for part in rgb)
    return f"background:rgb({r},{g},{b});color:{'#111' if 0.299 * r + 0.587 * g + 0.114 * b > 140 else '#fff'}"


def scale(ceiling, name, what):
    stops = ",".join("rgb({},{},{})".format(*_MAPS[name][i]) for i in (0, 64, 128, 191, 255))
    return (
        '<div class="scale"><span>0</span><i'
        f' style="background:linear-gradient(90deg,{stops})"></i><span>{number(ceiling)}'
        f" {html.escape(what)}</span></div>"
    )


def page(*parts):
    return '<div class="st">' + "".join(parts) + "</div>"


def note(text):
    return f'<p class="note">{html.escape(text)}</p>'


def heading(text):
    return f"<h4>{html.escape(text)}</h4>"


def progress(share, what):
    return page(
        f'<p>{html.escape(what)}: {share:.0%}</p><progress max="1" value="{share:.3f}"'
        ' style="width:100%"></progress>'
    )


# ---- pieces ----


def strip(labels, values, ceiling, name, titles, marked=None, what=""):
    """Coloured cells, one a token or layer. labels, titles: K strings; values (K,); marked: index
    of the chosen one."""
    colors = color(values, ceiling, name)
    cells = [
        f'<div class="cell{" on" if i == marked else ""}" style="{style(colors[i])}"'
        f' title="{html.escape(titles[i], quote=True)}">'
        f"<bdi>{escaped(label)}</bdi><small>{number(float(values[i]))}</small></div>"
        for i, label in enumerate(labels)
    ]
    return f'<div class="cells">{"".join(cells)}</div>' + scale(ceiling, name, what)


def bars(labels, values, ceiling=None, fill="#E69F00", titles=None):
    """Horizontal bars from 0. labels: K strings; values (K,) >= 0."""
    ceiling = ceiling or float(np.max(values, initial=0)) or 1.0
    rows = []
    for i, (label, value) in enumerate(zip(labels, values, strict=True)):
        width = 100 * min(1, max(0, float(value)) / ceiling)
        rows.append(
            f'<tr title="{html.escape((titles or labels)[i], quote=True)}"><td><bdi>{escaped(label)}</bdi></td>'
            '<td><div class="bar"'
            f' style="background:{fill};width:{width:.1f}%"></div></td><td>{number(float(value))}</td></tr>'
        )
    return f'<div class="scroll"><table class="bars">{"".join(rows)}</table></div>'


def candidates(words, ids, probs):
    """Likeliest tokens as one line a token, for a title. words: {id: text}; ids, probs (k,)."""
    return "\n".join(
        f"{n}. {shown(words[int(i)])}  {p:.4f}"
        for n, (i, p) in enumerate(zip(ids, probs, strict=True), 1)
    )


def probability_panel(analysis, token):
    """Strip of the chosen tokens' probabilities, alternatives of each on hover, and of the chosen
    token as bars."""
    evolution = analysis.evolution()
    words = evolution.words
    titles = [
        f"{i}: {shown(label)}\n{candidates(words, evolution.ids[i, -1], evolution.probs[i, -1])}"
        for i, label in enumerate(analysis.tokens)
    ]
    others = [words[int(i)] for i in evolution.ids[token, -1]]
    place = (
        "among the likeliest"
        if analysis.ids[token] in evolution.ids[token, -1]
        else f"not among them, at rank {evolution.rank[token, -1]}"
    )
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
        bars(others, evolution.probs[token, -1], 1.0, "#009E73"),
        note(
            f"The token that was produced is {place}. Probabilities are the model's own, before"
            " temperature and top-p."
        ),
    )


def evolution_strip(analysis, token):
    """What the lens reads at the token's producing row after every layer, with the top candidates
    on hover, and the produced token's probability."""
    evolution = analysis.evolution()
    words = evolution.words
    names = ["embeddings"] + [f"layer {layer}" for layer in range(evolution.ids.shape[1] - 1)]
    tops, colors = evolution.probs[token, :, 0], color(evolution.probs[token, :, 0], 1.0, "Blues")
    cells = []
    for i, name in enumerate(names):
        title = f"{name}\n{candidates(words, evolution.ids[token, i], evolution.probs[token, i])}"
        word = escaped(words[int(evolution.ids[token, i, 0])])
        cells.append(
            f'<div class="cell" style="{style(colors[i])}"'
            f' title="{html.escape(title, quote=True)}">'
            f"<small>{name}</small><bdi>{word}</bdi><small>{number(float(tops[i]))}</small></div>"
        )
    ranks = [f"{name}: rank {rank}" for name, rank in zip(names, evolution.rank[token])]
    return (
        f'<div class="cells">{"".join(cells)}</div>'
        + scale(1.0, "Blues", "probability of the likeliest token after each layer")
        + heading(f"Probability of what was produced: {shown(analysis.tokens[token])}")
        + bars(
            [f"{name} (rank {rank})" for name, rank in zip(names, evolution.rank[token])],
            evolution.chosen[token],
            1.0,
            "#0072B2",
            ranks,
        )
    )


def answer_text(analysis, values, ceiling, what):
    """The answer with every token's background by its value (T,)."""
    colors, parts, end = color(values, ceiling, "YlOrRd"), [], 0
    for i, (start, stop) in enumerate(analysis.spans):
        start = max(start, end)
        piece = analysis.text[start:stop]
        if piece:
            piece = html.escape(
                "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in piece)
                .encode("utf-8", "replace")
                .decode()
            )
            parts.append(
                f'<span style="{style(colors[i])}" title="{i}: {escaped(analysis.tokens[i])},'
                f' {number(float(values[i]))}">{piece}</span>'
            )
        end = max(end, stop)
    return f'<p class="answer">{"".join(parts)}</p>' + scale(ceiling, "YlOrRd", what)


# ---- over the picture ----


class Canvas:
    """A picture at the page's size with its grid, and grey for what is drawn over it. grid:
    PatchGrid over the original, or None."""

    def __init__(self, picture, grid, longer_side=SHOWN):
        factor = min(4.0, longer_side / max(picture.size))
        size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
        self.picture, self.size = picture.resize(size, Image.Resampling.LANCZOS), size
        self.grid = None
        if grid is not None:
            factors = np.array([size[0] / picture.width, size[1] / picture.height] * 2)
            self.grid = PatchGrid(grid.boxes * factors, grid.shape, size)
        self._grey = np.asarray(self.picture.convert("L"), np.float32)[..., None] * 0.5 + 127.5

    def overlay(self, values, ceiling):
        """Values (P,) >= 0 over the pale grey picture, from yellow to red; what has none shows the
        picture. -> PIL. NaN: left out, drawn cell by cell."""
        painted = np.nan_to_num(
            self.grid.paint(np.nan_to_num(values), smooth=not np.isnan(values).any())
        )
        share = np.clip(painted / (ceiling or 1.0), 0, 1).astype(np.float32)
        alpha = 0.9 * np.sqrt(share)[..., None]
        return Image.fromarray(
            (self._grey * (1 - alpha) + color(share, 1.0, "YlOrRd") * alpha).astype(np.uint8)
        )

    def patches(self, chosen, values=None, ceiling=1.0):
        """The picture with its grid lines and the chosen cells framed, over an overlay where values
        (P,) are given. -> PIL"""
        image = (
            self.picture.convert("RGB").copy() if values is None else self.overlay(values, ceiling)
        )
        draw = ImageDraw.Draw(image, "RGBA")
        for box in self.grid.boxes[self.grid.has_box].tolist():
            draw.rectangle(box, outline=(255, 255, 255, 90))
        for index in chosen:
            draw.rectangle(
                self.grid.boxes[index].tolist(), fill=(*MARK, 110), outline=(*MARK, 255), width=2
            )
        return image

    def cell(self, x, y):
        """Index of the smallest cell under the point (x, y), shares of width and height: a tile's,
        not the thumbnail's; None where no cell lies."""
        x, y = x * self.size[0], y * self.size[1]
        x0, y0, x1, y1 = np.nan_to_num(self.grid.boxes, nan=-1.0).T
        found = np.flatnonzero(self.grid.has_box & (x0 <= x) & (x < x1) & (y0 <= y) & (y < y1))
        return (
            int(min(found, key=lambda cell: (x1[cell] - x0[cell]) * (y1[cell] - y0[cell])))
            if len(found)
            else None
        )


def figure(image, alt):
    """An <img> that holds the picture itself."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=88, subsampling=0)
    data = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<img width="{image.width}" height="{image.height}" alt="{html.escape(alt, quote=True)}"'
        f' src="data:image/jpeg;base64,{data}">'
    )


def over_picture(canvas, values, ceiling, alt, what):
    if canvas.grid is None:
        return note(
            "Where this model's image tokens lie in the picture is unknown, so nothing is drawn"
            " on it."
        )
    return figure(canvas.overlay(values, ceiling), alt) + scale(ceiling, "YlOrRd", what)


def word_bars(analysis, rows, token, ceiling=None):
    """Two lists of bars: relevancy (N,) of the question's tokens and of the earlier answer's."""
    question = [i for i in range(analysis.prompt_length) if analysis.groups[i] == "user"]
    earlier = list(range(analysis.prompt_length, analysis.prompt_length + token))
    ceiling = ceiling or float(np.max(rows[question + earlier], initial=0)) or 1.0
    parts = []
    for title, positions, fill in (
        ("Relevancy to User Input", question, "#E69F00"),
        ("Relevancy to Previous Answer", earlier, "#009E73"),
    ):
        first = positions[0] if positions else 0
        labels = [f"{i - first}: {shown(analysis.labels[i])}" for i in positions]
        parts += [
            heading(title),
            (
                bars(labels, rows[positions], ceiling, fill)
                if positions
                else note("None yet: this is the first token.")
            ),
        ]
    return "".join(parts)


# ---- panels ----


def canvas(analysis, count, longer_side=SHOWN):
    """The Canvas of an analysis for maps over `count` cells."""
    return analysis.once(
        ("canvas", count, longer_side),
        lambda: Canvas(analysis.picture, analysis.place(count), longer_side),
    )


def named(analysis, token):
    return f"token {token}: {shown(analysis.tokens[token])}"


def ceiling_of(values, percent):
    """The value at the top of the colours: `percent` of the largest."""
    values = np.asarray(values, float)
    return float(np.max(values[np.isfinite(values)], initial=0)) * percent / 100 or 1.0


def contribution_panel(analysis, token, layer, how, kind, percent):
    values = analysis.contribution(how, kind)[:, layer]
    ceiling = percent / 100 if kind == "share" else ceiling_of(values, percent)
    what = (
        f"{how} R_img / ({how} R_img + {how} R_text)"
        if kind == "share"
        else f"{how} R_img / {how} R_text"
    )
    titles = [
        f"{i}: {shown(label)}\nvisual contribution {number(float(value))}"
        for i, (label, value) in enumerate(zip(analysis.tokens, values))
    ]
    return page(
        strip(
            analysis.tokens,
            values,
            ceiling,
            "Reds",
            titles,
            token,
            f"{what}, gathered up to layer {layer}",
        )
    )


def evolution_panel(analysis, token):
    return page(
        heading(f"What the model would say after each layer, {named(analysis, token)}"),
        evolution_strip(analysis, token),
    )


def relevancy_map(analysis, token, layer, hide):
    """(values (S,), how many sinks are left out)."""
    values, out = analysis.relevancy().picture[token, layer], analysis.sinks()
    if not hide or len(out) != len(values):
        return values, 0
    return np.where(out, np.nan, values), int(out.sum())


def relevancy_panel(analysis, token, layer, percent, hide):
    """(overlay, word bars)"""
    found = analysis.relevancy()
    values, hidden = relevancy_map(analysis, token, layer, hide)
    ceiling = ceiling_of(found.picture[token], percent)
    share = float(analysis.contribution("max", "share")[token, layer])
    ratio = float(analysis.contribution("sum", "ratio")[token, layer])
    text = (
        f"Visual Contribution: share of the maximum {number(share)}; Sum R_img / R_text:"
        f" {number(ratio)}. Largest on the picture: "
    )
    text += (
        f"{number(float(found.picture[token].max()))} of this token,"
        f" {number(float(found.picture.max()))} of any token of the answer"
    )
    text += (
        f". {hidden} vision tokens of outlying norm are left out"
        if hidden
        else ". No vision token has an outlying norm"
        if hide
        else ""
    )
    alt = f"Relevancy to Image of {named(analysis, token)}, layer {layer}"
    picture = over_picture(
        canvas(analysis, len(values)),
        values,
        ceiling,
        alt,
        f"relevancy, gathered up to layer {layer}",
    )
    own = ""
    if found.instruction is not None:
        own = note(
            "Relevancy of the instruction that the Q-Former reads beside the picture:"
            f" {number(float(found.instruction[token, layer].sum()))} in sum."
        )
    return page(
        heading(f"Relevancy to Image, {named(analysis, token)}"), picture, note(text), own
    ), page(word_bars(analysis, found.rows[token, layer], token))


def attention_panel(analysis, token, layer, head, percent):
    """head: None for the mean."""
    maps = analysis.attention(layer)[token]
    values, mass = maps.mean(0) if head is None else maps[head], maps.sum(-1)
    name = "mean over heads" if head is None else f"head {head}"
    title = f"Attention of {named(analysis, token)}, layer {layer}, {name}"
    return page(
        '<div class="pair"><div>',
        heading(title),
        over_picture(
            canvas(analysis, len(values)),
            values,
            ceiling_of(values, percent),
            title,
            "attention weight",
        ),
        note(f"On the whole picture: {number(float(values.sum()))} of 1."),
        "</div><div>",
        heading(f"Attention to the picture by head, layer {layer}"),
        bars([f"head {h}" for h in range(len(mass))], mass, 1.0, "#0072B2"),
        "</div></div>",
    )


def cells_of(analysis, source):
    """How many cells the maps of a source have."""
    return len(analysis.vision) if source == "attention" else analysis.relevancy().picture.shape[-1]


def selected(analysis, source):
    """Indices of the selected patches that are cells of a source's maps, sorted; none where the
    place of its cells is unknown."""
    grid = canvas(analysis, cells_of(analysis, source)).grid
    return (
        []
        if grid is None
        else sorted(index for index in analysis.patches if index < len(grid.boxes))
    )


def patch_panel(analysis, source, layer, head):
    """(the picture to be clicked, the answer coloured by what looked there)"""
    view = canvas(analysis, cells_of(analysis, source))
    if view.grid is None:
        return page(over_picture(view, None, 1, "", "")), page(
            note(
                "Choose relevancy: it may reach cells whose place is known."
                if source == "attention"
                else ""
            )
        )
    chosen = selected(analysis, source)
    picture = page(figure(view.patches(chosen), f"The picture with {len(chosen)} selected patches"))
    if not chosen:
        return picture, page(note("Click patches of the picture; click again to take one out."))
    values = analysis.looked_at(chosen, source, layer, head)
    name = (
        "" if source == "relevancy" else ", mean over heads" if head is None else f", head {head}"
    )
    count = f"{len(chosen)} {'patch' if len(chosen) == 1 else 'patches'}"
    what = (
        "share of the token's relevancy over the picture"
        if source == "relevancy"
        else "attention to the selected patches"
    )
    order = np.argsort(-values, kind="stable")[:12]
    return picture, page(
        heading(f"{count}, layer {layer}{name}"),
        answer_text(analysis, values, ceiling_of(values, 100), what),
        heading("Tokens that looked there most"),
        bars([f"{i}: {shown(analysis.tokens[i])}" for i in order], values[order], fill="#D55E00"),
    )


def compare_panel(analysis, first, second, percent):
    """Two (token, layer) side by side, on one colour scale."""
    found = analysis.relevancy()
    ceiling = ceiling_of(
        [found.picture[token, layer].max() for token, layer in (first, second)], percent
    )
    words = max(
        float(found.rows[token, layer][analysis.visible_text(token)].max())
        for token, layer in (first, second)
    )
    parts = []
    for token, layer in (first, second):
        values, share = (
            found.picture[token, layer],
            float(analysis.contribution("max", "share")[token, layer]),
        )
        title = f"{named(analysis, token)}, layer {layer}"
        parts.append(
            f"<div>{heading(title)}{over_picture(canvas(analysis, len(values), SHOWN // 2), values, ceiling, f'Relevancy of {title}', 'relevancy')}"
            f"{note(f'p = {analysis.probabilities[token]:.3f}, visual contribution {number(share)} (share of the maximum)')}"
            f"{heading('Prediction evolution')}{evolution_strip(analysis, token)}{word_bars(analysis, found.rows[token, layer], token, words)}</div>"
        )
    return page('<div class="pair">', *parts, "</div>")

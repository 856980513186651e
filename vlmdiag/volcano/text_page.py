"""A text of the critique - revise - decide loop, each token coloured by its attention to the
picture: colour scale, strongest spans, and the page as HTML.

    w[t] = mean over the P vision tokens of c[t, p], see maps.pool_heads()

Volcano (arXiv 2311.07362), figure 4 above; docs/studies/volcano.md, sections 1.2 and 2.6. The
figure is drawn by text_figure.py.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import jinja2
import matplotlib
from markupsafe import Markup
from matplotlib.colors import Normalize, to_hex, to_rgb

from vlmdiag.figures.plots import BREAK, visible
from vlmdiag.types import Record
from vlmdiag.volcano.tensors import STAGES, find_spans, join_target, strongest_spans

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Float
    from matplotlib.typing import ColorType

    from vlmdiag.volcano.tensors import Instance, Stage

    Weights = Float[np.ndarray, " T"]

COLORS = matplotlib.colormaps["BuGn"]
_loader = jinja2.FileSystemLoader(Path(__file__).parent)
_environment = jinja2.Environment(loader=_loader, autoescape=True, keep_trailing_newline=True)


class NamedSpan(NamedTuple):
    """A range of tokens as a comma list for --feedback-target-tokens."""

    target: str
    occurrence: int  # which place of the text the list means, from 1
    start: int
    end: int
    weight: float  # mean over its tokens


def named_spans(stage: Stage, weights: Weights, count: int, length: int) -> list[NamedSpan]:
    """The strongest spans of a text, strongest first."""
    spans = []
    for start, end in strongest_spans(weights[: stage.steps], stage.tokens, count, length):
        target = join_target(stage.tokens[start:end])
        places = find_spans(stage.tokens, stage.spans, stage.text, target)
        occurrence = places.index(list(range(start, end))) + 1
        weight = float(weights[start:end].mean())
        spans.append(NamedSpan(target, occurrence, start, end, weight))
    return spans


# ---- words and colours ----


def size_of(stage: Stage) -> str:
    """How many tokens count, in words."""
    return "1 token" if stage.steps == 1 else f"{stage.steps} tokens"


def times(weight: float, mean: float) -> str:
    """A weight as a multiple of the mean."""
    return f"{weight / mean:.2f}x" if mean > 0 else "-"


def title_of(instance: Instance, stage: Stage) -> str:
    """Title of a page and a figure."""
    return f"Attention to the picture while writing the {instance.title(stage.name)}"


def whose_scale(instance: Instance, own_scale: bool) -> str:
    """The texts whose weights end the colour scale."""
    if own_scale or len(instance.stages) == 1:
        return "this text"
    return f"{', '.join(STAGES[name] for name in instance.stages)} together"


def mean_weight(stage: Stage, weights: Weights) -> float:
    """Mean over the tokens that count, 0 without any."""
    return float(weights[: stage.steps].mean()) if stage.steps else 0.0


def scale_of(weights: Iterable[float]) -> Normalize:
    """Colour scale from the smallest to the largest weight, others clipped; from 0 where all are
    the same, to 1 without weights."""
    known = list(weights)
    low = min(known, default=0.0)
    high = max(known, default=1.0)
    return Normalize(float(low) if low < high else 0.0, float(high) or 1.0, clip=True)


def ticks_of(scale: Normalize) -> list[float]:
    """Both ends and the middle."""
    low, high = float(scale.vmin or 0.0), float(scale.vmax or 0.0)
    return [low, (low + high) / 2, high]


def ink(color: ColorType) -> str:
    """Black or white, whichever is easier to read on a colour (WCAG luminance)."""
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color))
    return "#000000" if 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 else "#ffffff"


# ---- page ----


def page_of(
    instance: Instance,
    stage: Stage,
    weights: Weights,
    scale: Normalize,
    spans: Iterable[NamedSpan],
    k: int,
    own_scale: bool,
) -> str:
    """A page that works offline: no script, style allowed by its hash, all that comes from outside
    escaped. k: --hidden_top_k."""
    mean = mean_weight(stage, weights)
    levels = [round(255 * float(scale(weight))) for weight in weights]
    style = _style(set(levels), 100 * float(scale(mean)))
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    end = "and the stop token" if stage.ended else "cut off at the limit"
    facts = {
        "Question": instance.question,
        "Gold answer": instance.gold_answer,
        "Model": instance.model,
        "Instance": f"{instance.index}, {instance.image_id}",
        "Tokens": f"{stage.steps}, {end}",
    }
    return _environment.get_template("text_page.html").render(
        policy=(
            f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
        ),
        # no text of a model or a list is in it
        style=Markup(style),
        title=title_of(instance, stage),
        instance=instance,
        facts=[(name, _each_visible(text)) for name, text in facts.items() if text],
        tokens=_tokens(stage, weights, levels, mean),
        ticks=[f"{tick:.3g}" for tick in ticks_of(scale)],
        whose_scale=whose_scale(instance, own_scale),
        mean=f"{mean:.3g}",
        spans=[
            {
                "target": visible(span.target),
                "start": span.start,
                "occurrence": span.occurrence,
                "weight": f"{span.weight:.4g}",
                "times": times(span.weight, mean),
            }
            for span in spans
        ],
        k=k,
        patches=stage.topk.shape[3],
    )


def _style(levels: Iterable[int], mean_percent: float) -> str:
    """The style with the colours of these levels (0 to 255), the ramp and the mark of the mean."""
    by_level = {level: to_hex(COLORS(level)) for level in sorted(levels)}
    return _environment.get_template("text_page_style.html").render(
        colors=[(level, color, ink(color)) for level, color in by_level.items()],
        ramp=", ".join(to_hex(COLORS(level)) for level in range(0, 256, 15)),
        mean_percent=f"{mean_percent:.2f}",
    )


def _each_visible(text: str) -> str:
    """Text whose characters are made visible one by one, so that line breaks stay arrows."""
    return "".join(map(visible, text))


def _tokens(stage: Stage, weights: Weights, levels: Iterable[int], mean: float) -> list[Record]:
    """What the page shows of each token."""
    tokens = []
    for index, (piece, weight, level) in enumerate(zip(stage.pieces(), weights, levels)):
        is_stop = stage.ended and index == len(stage.tokens) - 1
        name = visible(piece.strip(" "))
        if is_stop:
            text = piece.strip()
            compared = "stop token"
            meaning = "stop token, not counted"
        else:
            # blanks that a browser would drop: all but single ones between two characters
            text = re.sub(r"(?<=.) | (?=\s|$)", "\N{NO-BREAK SPACE}", piece)
            compared = times(weight, mean)
            meaning = f"{compared} the mean of this text"
        tokens.append(
            {
                "index": index,
                "level": level,
                "is_stop": is_stop,
                "tip": f"token {index} {name!r}: {weight:.3g}, {meaning}",
                # a line break after each arrow; join() escapes what it joins
                "shown": Markup(f"{BREAK}<br>").join(visible(text).split(BREAK)),
                "name": name,
                "weight": f"{weight:.4g}",
                "times": compared,
            }
        )
    return tokens

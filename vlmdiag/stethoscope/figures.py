"""The stethoscope's panels as figures for paper; views.py draws the same for a page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.colors import Normalize

from vlmdiag.figures import plots
from vlmdiag.figures.layers import OUTPUT_AXIS, state_tick
from vlmdiag.pictures import overlay
from vlmdiag.stethoscope import views
from vlmdiag.stethoscope.views import Canvas, ceiling_of, cells_of, named, selected

if TYPE_CHECKING:
    from jaxtyping import Float
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from vlmdiag.stethoscope.analysis import Analysis

COLUMNS = 20  # tokens in one figure
WORDS = 40  # tokens of question and earlier answer
PICTURE = 480  # pixels of a picture's longer side


@dataclass(frozen=True)
class Shown:
    """Where the page's controls stand. head, att_head, pat_head: None for the mean over heads; the
    ceilings are in per cent, as on the page."""

    token: int = 0
    vc_layer: int = -1
    vc_mode: str = "max"
    vc_kind: str = "share"
    vc_ceiling: float = 100
    rel_layer: int = -1
    rel_ceiling: float = 100
    rel_hide: bool = False
    att_layer: int = -1
    att_head: int | None = None
    att_ceiling: float = 100
    pat_source: str = "attention"
    pat_layer: int = -1
    pat_head: int | None = None
    cmp_layer: int = -1
    cmp_token: int = 0
    cmp_other: int = -1
    cmp_ceiling: float = 100
    map_opacity: float = 90
    map_smooth: bool = False

    @property
    def look(self) -> views.Look:
        """Of all maps over the picture."""
        return views.Look(self.map_opacity, self.map_smooth)


def looked_at(analysis: Analysis, shown: Shown, chosen: Sequence[int]) -> Float[np.ndarray, " T"]:
    """How much each token looked at the chosen patches, as the patch selector says it."""
    layer = shown.pat_layer % analysis.model.depth
    return analysis.looked_at(chosen, shown.pat_source, layer, shown.pat_head)


def label(text: str) -> str:
    """A token as a figure can draw it."""
    return views.shown(text).replace("$", r"\$")


def window(analysis: Analysis, token: int) -> tuple[list[int], list[str]]:
    """At most COLUMNS tokens around the chosen one, and their labels."""
    start = max(0, min(token - COLUMNS // 2, len(analysis.tokens) - COLUMNS))
    which = list(range(start, min(start + COLUMNS, len(analysis.tokens))))
    return which, [f"{i}:{label(analysis.tokens[i])}" for i in which]


def draw_probabilities(analysis: Analysis, shown: Shown) -> Figure:
    """Probability of every token, and the alternatives to the chosen one."""
    which, labels = window(analysis, shown.token)
    lens = analysis.evolution()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), width_ratios=(3, 1.4))
    left.bar(range(len(which)), analysis.probabilities[which], color=plots.GREEN)
    _token_axis(left, labels)
    left.set(title="probability of the token that was produced", ylabel="probability", ylim=(0, 1))
    others = [label(lens.words[int(i)]) for i in lens.ids[shown.token, -1]]
    probs = lens.probs[shown.token, -1]
    right.barh(range(len(others)), probs, color=plots.SKY)
    numbers = [views.probability(float(p)) for p in probs]
    right.set_yticks(range(len(others)), [f"{a}  {b}" for a, b in zip(others, numbers)], fontsize=8)
    right.set(
        title=f"alternatives to {label(named(analysis, shown.token))}",
        xlabel="probability (log axis)",
        xscale="log",
        xlim=(10.0 ** -views.log_decades(probs), 1),
    )
    right.invert_yaxis()
    return figure


def draw_contribution(analysis: Analysis, shown: Shown) -> Figure:
    """Visual contribution of tokens by layer."""
    which, labels = window(analysis, shown.token)
    of_tokens = analysis.contribution(shown.vc_mode, shown.vc_kind)  # (T, L)
    values = of_tokens[which].T
    image = f"{shown.vc_mode} R_img"
    text = f"{shown.vc_mode} R_text"
    is_share = shown.vc_kind == "share"
    what = f"{image} / ({image} + {text})" if is_share else f"{image} / {text}"
    figure, axis = plt.subplots(figsize=(11, 0.22 * len(values) + 2.6))
    title = f"visual contribution: {what}, gathered up to each layer"
    top = shown.vc_ceiling / 100
    if not is_share:  # of the layer that the page shows
        top = ceiling_of(of_tokens[:, shown.vc_layer], shown.vc_ceiling)
    colored = plots.heatmap(axis, values, title, 0, top, "", cmap="Reds")
    figure.colorbar(colored, ax=axis, label=what).ax.grid(False)
    _token_axis(axis, labels)
    return figure


def draw_evolution(analysis: Analysis, shown: Shown) -> Figure:
    """The likeliest token after each layer, written into its cell."""
    which, labels = window(analysis, shown.token)
    lens = analysis.evolution()
    tops = lens.probs[which, :, 0].T  # (L + 1, tokens)
    ids = lens.ids[which, :, 0].T
    words = np.vectorize(lambda id: label(lens.words[int(id)])[:9], otypes=[object])(ids)
    size = (2.2 + 0.78 * len(which), 0.36 * len(tops) + 2.2)
    figure, axis = plt.subplots(figsize=size)
    sns.heatmap(
        tops,
        vmin=0,
        vmax=1,
        cmap="Blues",
        annot=words,
        fmt="",
        annot_kws={"fontsize": 9},
        cbar_kws={"label": "probability"},
        ax=axis,
    )
    axis.grid(False)
    axis.set(title="likeliest token after each layer (final norm and LM head)", ylabel=OUTPUT_AXIS)
    axis.set_yticks(
        np.arange(len(tops)) + 0.5, [state_tick(state) for state in range(len(tops))], rotation=0
    )
    axis.set_xticks(np.arange(len(labels)) + 0.5, labels, rotation=60, ha="right", fontsize=8)
    return figure


def draw_relevancy(analysis: Analysis, shown: Shown) -> Figure | None:
    """Relevancy of the chosen token; None where its place in the picture is unknown."""
    layer = shown.rel_layer % analysis.model.depth
    ceiling = ceiling_of(analysis.relevancy().picture[shown.token], shown.rel_ceiling)
    pairs = [(shown.token, layer)]
    return _relevancy_rows(analysis, pairs, ceiling, shown.look, shown.rel_hide)


def draw_compare(analysis: Analysis, shown: Shown) -> Figure | None:
    """Relevancy of two tokens or layers; None where its place in the picture is unknown."""
    depth = analysis.model.depth
    pairs = [(shown.token, shown.cmp_layer % depth), (shown.cmp_token, shown.cmp_other % depth)]
    largest = [analysis.relevancy().picture[pair].max() for pair in pairs]
    return _relevancy_rows(analysis, pairs, ceiling_of(largest, shown.cmp_ceiling), shown.look)


def _relevancy_rows(
    analysis: Analysis,
    pairs: Sequence[tuple[int, int]],
    ceiling: float,
    look: views.Look,
    hide: bool = False,
) -> Figure | None:
    """A row for each (token, layer): relevancy over the picture, and over words. ceiling: of the
    colours; hide: leave out vision tokens of outlying norm."""
    relevancy = analysis.relevancy()
    maps = [views.relevancy_map(analysis, token, layer, hide)[0] for token, layer in pairs]
    if analysis.place(len(maps[0])) is None:
        return None
    words = max(
        float(relevancy.rows[token, layer][analysis.visible_text(token)].max())
        for token, layer in pairs
    )
    figure, axes = plt.subplots(
        len(pairs), 2, figsize=(11.5, 4.3 * len(pairs)), squeeze=False, width_ratios=(1, 1.5)
    )
    for (token, layer), values, (left, right) in zip(pairs, maps, axes, strict=True):
        share = float(analysis.contribution("max", "share")[token, layer])
        title = (
            f"relevancy of {named(analysis, token)}, layer {layer}\nvisual contribution {share:.2f}"
        )
        _over_picture(left, analysis, values, ceiling, title, look)
        _words(right, analysis, relevancy.rows[token, layer], token, words)
    return figure


def draw_attention(analysis: Analysis, shown: Shown) -> Figure | None:
    """Raw attention over the picture and by head; None where its place is unknown."""
    layer = shown.att_layer % analysis.model.depth
    maps = analysis.attention(layer)[shown.token]  # (H, P)
    if analysis.place(maps.shape[-1]) is None:
        return None
    values = maps.mean(0) if shown.att_head is None else maps[shown.att_head]
    head = views.head_name(shown.att_head)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.5))
    title = f"attention of {named(analysis, shown.token)}\nlayer {layer}, {head}"
    ceiling = ceiling_of(values, shown.att_ceiling)
    _over_picture(left, analysis, values, ceiling, title, shown.look)
    right.bar(range(len(maps)), maps.sum(-1), color=plots.BLUE)
    right.set(
        title=f"attention to the picture by head, layer {layer}",
        xlabel="head",
        ylabel="attention",
        ylim=(0, 1),
    )
    plots.layer_ticks(right)
    return figure


def draw_patches(analysis: Analysis, shown: Shown) -> Figure | None:
    """The selected patches, and how much each token looked at them; None without one."""
    chosen = selected(analysis, shown.pat_source)
    if not chosen:
        return None
    grid = analysis.place(cells_of(analysis, shown.pat_source))
    canvas = Canvas(analysis.picture, grid, PICTURE)
    values = looked_at(analysis, shown, chosen)
    which, labels = window(analysis, int(np.argmax(values)))
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.8), width_ratios=(1, 1.5))
    left.imshow(np.asarray(canvas.patches(chosen)))
    left.set(xticks=[], yticks=[], title=f"{len(chosen)} selected patches")
    right.bar(range(len(which)), values[which], color=plots.VERMILION)
    _token_axis(right, labels)
    what = "share of the picture's relevancy"
    if shown.pat_source == "attention":
        what = "attention to the patches"
    right.set(title=f"{what}, layer {shown.pat_layer % analysis.model.depth}", ylabel=what)
    return figure


# ---- parts of figures ----


def _token_axis(axis: Axes, labels: Sequence[str]) -> None:
    axis.set_xticks(range(len(labels)), labels, rotation=60, ha="right", fontsize=8)


def _over_picture(
    axis: Axes,
    analysis: Analysis,
    values: Float[np.ndarray, " S"],
    ceiling: float,
    title: str,
    look: views.Look,
) -> None:
    """A map over the picture with its colour bar."""
    canvas = Canvas(analysis.picture, analysis.place(len(values)), PICTURE)
    overlay.show_picture(axis, np.asarray(canvas.overlay(values, ceiling, look)), frame=True)
    axis.set_title(title.replace("$", r"\$"), fontsize=9)
    clipped = "max" if np.nanmax(values) > ceiling else "neither"
    overlay.color_bar(
        axis.figure, Normalize(0, ceiling), "YlOrRd", ax=axis, shrink=0.7, extend=clipped
    )


def _words(
    axis: Axes, analysis: Analysis, rows: Float[np.ndarray, " N"], token: int, ceiling: float
) -> None:
    """Relevancy of the question and of the answer before a token, the last WORDS of them."""
    before = range(analysis.prompt_length + token)
    positions = [i for i in before if analysis.groups[i] in ("user", "generated")][-WORDS:]
    is_question = [analysis.groups[i] == "user" for i in positions]
    colors = [plots.ORANGE if question else plots.GREEN for question in is_question]
    axis.bar(range(len(positions)), rows[positions], color=colors)
    _token_axis(axis, [label(analysis.labels[i]) for i in positions])
    axis.set_ylim(0, ceiling * 1.05 or 1)
    axis.set_title("relevancy of question (orange) and earlier answer (green)", fontsize=9)


FIGURES: dict[str, Callable[[Analysis, Shown], Figure | None]] = {
    "probabilities": draw_probabilities,
    "contribution": draw_contribution,
    "evolution": draw_evolution,
    "relevancy": draw_relevancy,
    "attention": draw_attention,
    "patches": draw_patches,
    "compare": draw_compare,
}

"""The stethoscope's page: its layout, what each of its panels draws, and what happens when a person
does something. Numbers come from analysis.py, pieces of HTML from views.py.

Gradio calls the events as generators; what they yield are the new values of components.
"""

from __future__ import annotations

import argparse
import functools
import html
import math
import os
import secrets
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any, ParamSpec, TypeVar, cast

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported

import gradio as gr
import torch
from fastapi import FastAPI
from gradio.events import Dependency
from gradio.routes import App
from PIL import Image
from starlette.routing import Mount
from starlette.types import ASGIApp

from vlmdiag.cli import UsageError
from vlmdiag.runs import rundirs
from vlmdiag.scenes.scene import floor_scene, render
from vlmdiag.stethoscope import views
from vlmdiag.stethoscope.analysis import (
    Analysis,
    Decoding,
    Model,
    hallucination_warning,
    read_picture,
)
from vlmdiag.stethoscope.export import Shown, export
from vlmdiag.stethoscope.limits import FILE_LIMIT, QUESTION_LIMIT
from vlmdiag.stethoscope.server import COOKIE
from vlmdiag.stethoscope.sessions import Session, Sessions

EXAMPLES = (54, 7, 21)  # seeds of the drawn pictures
QUESTION = "Describe the image."
FIRST = "Choose a picture, type a question and press Ask."
# where a picture was clicked, as shares of its width and height
CLICKS = """element.addEventListener('click', event => {
  const image = event.target.closest('img');
  if (!image) return;
  const box = image.getBoundingClientRect();
  trigger('click', {
    x: (event.clientX - box.left) / box.width,
    y: (event.clientY - box.top) / box.height,
  });
});"""
# a cell of the map of heads was clicked, or reached by an arrow key; CHOSEN_HEAD moves the sliders
# there. The map is drawn anew each time, so where an arrow key starts from is kept here, until a
# slider is moved
HEADS = """const grid = () => element.querySelector('.heads');
let keyboard = false;
let chosen = null;
const choose = (layer, head) => {
  const {layers, heads} = grid().dataset;
  const within = (value, end) => Math.max(0, Math.min(end - 1, value));
  chosen = [within(layer, layers), within(head, heads)];
  element.dataset.chosen = JSON.stringify(chosen);
  trigger('click');
};
for (const kind of ['input', 'click'])
  document.addEventListener(kind, event => {
    if (event.target.closest('#att_layer, #att_head')) chosen = null;
  });
const slider = id => Number(document.querySelector(`#${id} input[type=range]`).value);
const under = event => {
  const image = event.target.closest('.heads img');
  if (!image) return null;
  const box = image.getBoundingClientRect();
  const {layers, heads} = grid().dataset;
  return [
    Math.floor((event.clientY - box.top) / box.height * layers),
    Math.floor((event.clientX - box.left) / box.width * heads),
  ];
};
element.addEventListener('click', event => {
  const cell = under(event);
  if (cell) choose(...cell);
});
element.addEventListener('pointermove', event => {
  const cell = under(event);
  if (!cell) return;
  const {heads, values} = grid().dataset;
  const value = values.split(' ')[cell[0] * heads + cell[1]];
  event.target.title = `layer ${cell[0]}, head ${cell[1]}: ${value}`;
});
element.addEventListener('keydown', event => {
  const steps = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]};
  const step = steps[event.key];
  if (!step || !grid()) return;
  event.preventDefault();
  const [layer, head] = chosen ?? [slider('att_layer'), slider('att_head')];
  choose(layer + step[0], head + step[1]);
});
for (const kind of ['focusin', 'pointerdown'])
  document.addEventListener(kind, event => { keyboard = element.contains(event.target); });
new MutationObserver(() => {
  if (keyboard && document.activeElement === document.body) grid()?.focus({preventScroll: true});
}).observe(element, {childList: true, subtree: true});"""
CHOSEN_HEAD = "() => JSON.parse(document.querySelector('[data-chosen]').dataset.chosen)"
ONE_MORE = "count => count + 1"
CSS = """
.st { color: var(--body-text-color); font-size: 15px; line-height: 1.45; }
.st h4 { margin: 8px 0 6px; font-size: 15px; }
.st .note {
  color: var(--body-text-color) !important;
  opacity: .85;
  font-size: 14px;
  margin: 4px 0;
}
.st .cells { display: flex; flex-wrap: wrap; gap: 3px; }
.st .cell {
  border: 2px solid transparent;
  border-radius: 4px;
  padding: 3px 7px;
  text-align: center;
  min-width: 38px;
  font-size: 14.5px;
}
.st .cell small { display: block; font-size: 12.5px; }
.st .cell * { color: inherit !important; }
.st .cell.on { border-color: #D55E00; outline: 2px solid #D55E00; }
.st .cell bdi { white-space: pre; }
.st .scale {
  display: flex;
  flex-wrap: wrap;
  align-items: center;
  gap: 2px 8px;
  font-size: 13.5px;
  margin: 6px 0;
}
.st .scale i { flex: 1 1 70px; max-width: 160px; height: 12px; border: 1px solid #8888; }
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
.st .pair.maps { gap: 8px; }
.st .pair.maps > div { flex: 1 1 120px; }
.st .axis { position: relative; height: 18px; font-size: 12.5px; border-top: 1px solid #8888; }
.st .axis span { position: absolute; transform: translateX(-50%); white-space: nowrap; }
.st .axis span:first-child { transform: translateX(-100%); }
.st .heads {
  display: grid;
  grid-template-columns: auto minmax(0, 270px);
  justify-content: start;
  gap: 2px 6px;
  font-size: 12.5px;
}
.st .heads:focus-visible { outline: 2px solid #0072B2; outline-offset: 3px; }
.st .heads img { width: 100%; height: 250px; cursor: pointer; }
.st .heads .rows, .st .heads .columns { display: flex; justify-content: space-between; }
.st .heads .rows { flex-direction: column; text-align: right; }
.st .heads .columns { grid-column: 2; }
.st p.answer { font-size: 17px; line-height: 2; margin: 6px 0; }
.st p.answer span { padding: 3px 1px; border-radius: 3px; white-space: pre-wrap; }
#pat_picture img { cursor: crosshair; }
#examples .grid-container { grid-template-columns: repeat(3, minmax(0, 1fr)) !important; }
#examples .grid-wrap { overflow: hidden; }
#upload .icon-wrap { display: none; }
#upload .wrap { font-size: 14px; line-height: 1.3; min-height: 0; padding: 0; }
#preview img { max-height: 33vh; width: auto; margin: 0 auto; }
#tokens label { position: relative; padding: 4px 8px; gap: 0; }
#tokens label span { margin: 0; color: inherit; }
#tokens label input { position: absolute; opacity: 0; }
#tokens label.selected { outline: 3px solid #D55E00; }
#tokens label:focus-within { box-shadow: 0 0 0 5px #56B4E9; }
#coloring { align-items: center; flex-wrap: wrap; gap: 2px 14px; padding: 0 12px; }
#coloring > * { flex: 0 1 auto !important; min-width: 0 !important; width: auto !important; }
#coloring .html-container { padding: 0 !important; }
#color_by label { padding: 4px 8px; }
button[role=tab] { padding: 4px 6px !important; font-size: 13.5px !important; }
.tabitem > .column, #result { gap: 10px; }
.help .html-container { padding: 4px 12px 0 !important; }
#asking { gap: 10px; }
"""
THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
# events that only draw what is kept, and those that compute
FAST = {
    "show_progress": "hidden",
    "concurrency_limit": 8,
    "trigger_mode": "always_last",
    "api_visibility": "private",
    "preprocess": False,  # checked() does it: Gradio knows no choices of a session that it dropped
}
SLOW = {"concurrency_limit": 8, "api_visibility": "private"}

Component = Any  # of Gradio
SomePanel = TypeVar("SomePanel", bound="Panel")
Values = dict[Component, Any]  # of components, as Gradio hands them in and takes them back
Arguments = ParamSpec("Arguments")


def told(function: Callable[Arguments, Iterator[Values]]) -> Callable[Arguments, Iterator[Values]]:
    """An event whose errors become messages in the page, which stays as it was."""

    @functools.wraps(function)
    def event(*args: Arguments.args, **options: Arguments.kwargs) -> Iterator[Values]:
        try:
            yield from function(*args, **options)
        except (UsageError, ValueError) as error:
            raise gr.Error(html.escape(str(error)), print_exception=False) from error
        except torch.OutOfMemoryError as error:
            raise gr.Error(
                "The GPU's memory is full: generate fewer tokens, or start with --part-on-cpu.",
                print_exception=False,
            ) from error
        except gr.Error:
            raise
        except Exception as error:
            traceback.print_exc()
            raise gr.Error(
                f"{type(error).__name__}: the log has the details. Nothing else is lost.",
                print_exception=False,
            ) from error

    return event


def checked(now: Values) -> Values:
    """Where controls stand, as the browser says. UsageError for what they cannot show."""
    return {control: _checked(control, value) for control, value in now.items()}


def _checked(control: Component, value: object) -> object:
    if isinstance(control, gr.Slider | gr.Number):
        number = value if isinstance(value, int | float) else math.nan
        if isinstance(value, bool) or not control.minimum <= number <= control.maximum:
            raise UsageError(
                f"{control.label}: {control.minimum} to {control.maximum} is wanted, not {value!r}"
            )
        if control.step != 1:
            return float(number)
        if number != int(number):
            raise UsageError(f"{control.label}: a whole number is wanted, not {value!r}")
        return int(number)
    if isinstance(control, gr.Checkbox):
        return bool(value)
    choices = [choice for _, choice in control.choices]
    if choices:
        fits = value in choices
    else:  # a token of the answer, none before there is one
        fits = value is None or (type(value) is int and value >= 0)
    if not fits:
        raise UsageError(f"{control.label}: {value!r} is none of the choices")
    return value


def visitor_of(request: gr.Request) -> tuple[str, str]:
    """Who has sent an event: (the browser's cookie, this opening of the page in it)."""
    return request.cookies.get(COOKIE, ""), str(request.session_hash)


def examples() -> list[Image.Image]:
    """The drawn pictures to start with."""
    return [render(floor_scene(Random(seed), 3, square=True)) for seed in EXAMPLES]


def gone(session: Session) -> str:
    """What is said where an answer is no longer kept."""
    return f"This answer is no longer kept: {session.ended}. Press Ask to get it again."


def computing(share: float) -> str:
    """How much of the relevancy is computed."""
    return views.progress(share, "Computing relevancy of every token")


# ---- controls ----


def layer_slider(depth: int, elem_id: str, label: str = "Layer (from 0)") -> Component:
    return gr.Slider(0, depth - 1, depth - 1, step=1, label=label, elem_id=elem_id)


def ceiling_slider(elem_id: str, label: str = "Darkest colour at, %") -> Component:
    return gr.Slider(5, 100, 100, step=1, label=label, elem_id=elem_id)


def head_slider(heads: int, elem_id: str) -> Component:
    return gr.Slider(-1, heads - 1, -1, step=1, label="Head (-1: mean)", elem_id=elem_id)


def head_of(value: float) -> int | None:
    """Where a head slider stands; None: mean over heads."""
    return None if value < 0 else int(value)


# ---- panels ----


class Panel:
    """A tab: made inside of its layout, with controls and outputs; draw() gives one piece of HTML
    for each output."""

    id: str
    title: str

    help: str  # one or two sentences: what is shown, and how to read it

    def __init__(self, depth: int, heads: int, look: Sequence[Component]) -> None:
        self.depth = depth
        self.heads = heads
        self.opacity, self.drawn_as = look
        self.controls: list[Component] = []
        self.outputs: list[Component] = []
        gr.HTML(views.page(views.note(self.help)), elem_classes="help")
        self.layout()

    def look(self, now: Values) -> views.Look:
        """How maps lie over the picture."""
        return views.Look(now[self.opacity], now[self.drawn_as] == "smooth")

    def layout(self) -> None:
        """Make the panel's components."""
        self.outputs = [gr.HTML(elem_id=self.id)]

    def needs_relevancy(self, now: Values) -> bool:
        """Does what it draws need relevancy? now: values of the page's components."""
        return False

    def draw(self, analysis: Analysis, token: int, now: Values) -> Sequence[str]:
        """The HTML of each output, for a token of the answer."""
        raise NotImplementedError


class Probabilities(Panel):
    """Probability of every token with its alternatives."""

    id = "probability"
    title = "Answer Probabilities"
    help = (
        "How sure the model was of each token that it wrote: dark green is sure, pale is a guess."
        " Point at a token to see what else it could have said; choose one above to see that as"
        " bars, each step of whose axis is ten times less likely."
    )

    def draw(self, analysis: Analysis, token: int, now: Values) -> Sequence[str]:
        return [views.probability_panel(analysis, token)]


class Contribution(Panel):
    """Visual contribution of every token."""

    id = "contribution"
    title = "Visual Contribution"
    help = (
        "Did a token come from the picture or from the words before it? 1 (dark red): from the"
        " picture alone; 0: from words alone; 0.5: from both alike."
    )

    def layout(self) -> None:
        with gr.Row():
            self.layer = layer_slider(self.depth, "vc_layer")
            self.mode = gr.Dropdown(
                [("strongest of them", "max"), ("all together", "sum"), ("average one", "mean")],
                value="max",
                label="Patches and words count by the",
                elem_id="vc_mode",
            )
            self.kind = gr.Radio(
                [("picture of picture + words", "share"), ("picture / words", "ratio")],
                value="share",
                label="Measure (the second as published)",
            )
            self.ceiling = ceiling_slider("vc_ceiling")
        self.controls = [self.layer, self.mode, self.kind, self.ceiling]
        super().layout()

    def needs_relevancy(self, now: Values) -> bool:
        return True

    def draw(self, analysis: Analysis, token: int, now: Values) -> Sequence[str]:
        layer, mode, kind, percent = (now[control] for control in self.controls)
        return [views.contribution_panel(analysis, token, layer, mode, kind, percent)]


class PredictionEvolution(Panel):
    """What the logit lens reads after every layer."""

    id = "evolution"
    title = "Prediction Evolution in LLM"
    help = (
        "What the model would have said had it stopped after each layer: where the right word"
        " appears, the model has made up its mind. The first box, embeddings, is before any layer:"
        " there it has only the token that it read last, and often reads just that back."
    )

    def draw(self, analysis: Analysis, token: int, now: Values) -> Sequence[str]:
        return [views.evolution_panel(analysis, token)]


class RelevancyAnalysis(Panel):
    """Relevancy over the picture and over words."""

    id = "relevancy"
    title = "Relevancy Analysis"
    help = (
        "Which patches of the picture, and which words, made the model say this token: red"
        " mattered most. A pale map means that the token came from words rather than from the"
        " picture."
    )

    def layout(self) -> None:
        with gr.Row():
            self.layer = layer_slider(self.depth, "rel_layer")
            self.ceiling = ceiling_slider("rel_ceiling", "Darkest colour at, % of its largest")
            self.hide = gr.Checkbox(
                False,
                label="Leave out patches that glow for every word",
                info="vision tokens much longer than the others",
            )
        with gr.Row():
            picture = gr.HTML(elem_id="rel_picture", scale=3, min_width=320)
            words = gr.HTML(elem_id="rel_words", scale=2, min_width=280)
        self.controls = [self.layer, self.ceiling, self.hide]
        self.outputs = [picture, words]

    def needs_relevancy(self, now: Values) -> bool:
        return True

    def draw(self, analysis: Analysis, token: int, now: Values) -> Sequence[str]:
        layer, percent, hide = (now[control] for control in self.controls)
        return views.relevancy_panel(analysis, token, layer, percent, hide, self.look(now))


class RawAttention(Panel):
    """Raw attention by layer and head."""

    id = "attention"
    title = "Raw Attention"
    help = (
        "Where a head looks while the model writes this token. The small map has every head of"
        " every layer: click a cell, or step through it with the arrow keys, to see that head."
        " Looking is not using: what mattered is in Relevancy Analysis."
    )

    def layout(self) -> None:
        with gr.Row():
            self.layer = layer_slider(self.depth, "att_layer")
            self.head = head_slider(self.heads, "att_head")
            self.ceiling = ceiling_slider("att_ceiling")
        with gr.Row():
            picture = gr.HTML(elem_id="attention", scale=2, min_width=280)
            with gr.Column(scale=1, min_width=260):
                self.measure = gr.Radio(
                    [("attention on it", "mass"), ("against chance (CMB)", "balance")],
                    value="mass",
                    label="Which heads look at the picture, by",
                    elem_id="att_measure",
                )
                self.overview = gr.HTML(elem_id="att_heads", js_on_load=HEADS)
        self.controls = [self.layer, self.head, self.ceiling, self.measure]
        self.outputs = [picture, self.overview]

    def draw(self, analysis: Analysis, token: int, now: Values) -> Sequence[str]:
        layer, head, percent, measure = (now[control] for control in self.controls)
        head = head_of(head)
        return [
            views.attention_panel(analysis, token, layer, head, percent, self.look(now)),
            views.heads_panel(analysis, token, layer, head, measure),
        ]


class PatchSelector(Panel):
    """Which words looked at chosen patches."""

    id = "patches"
    title = "Patch Selector"
    help = (
        "The other way round: click patches of the picture to see which words of the answer looked"
        " there (red: most). Click a patch again to take it out."
    )

    def layout(self) -> None:
        with gr.Row():
            self.source = gr.Radio(
                ["attention", "relevancy"], value="attention", label="What looked there, by"
            )
            self.layer = layer_slider(self.depth, "pat_layer")
            self.head = head_slider(self.heads, "pat_head")
            self.clear = gr.Button("Clear", elem_id="pat_clear")
        with gr.Row():
            self.picture = gr.HTML(elem_id="pat_picture", js_on_load=CLICKS, scale=1, min_width=320)
            words = gr.HTML(elem_id="pat_words", scale=1)
        self.controls = [self.source, self.layer, self.head]
        self.outputs = [self.picture, words]

    def needs_relevancy(self, now: Values) -> bool:
        return bool(now[self.source] == "relevancy")

    def draw(self, analysis: Analysis, token: int, now: Values) -> Sequence[str]:
        source, layer, head = (now[control] for control in self.controls)
        return views.patch_panel(analysis, source, layer, head_of(head))

    def toggle(self, analysis: Analysis, source: str, x: float, y: float) -> None:
        """Select the patch under a point of the picture, or take it out again."""
        view = views.canvas(analysis, views.cells_of(analysis, source))
        cell = None if view.grid is None else view.cell(x, y)
        if cell is not None:
            analysis.patches ^= {cell}


class Compare(Panel):
    """Two tokens or layers side by side."""

    id = "compare"
    title = "Compare"
    help = (
        "Two tokens, or one token at two layers, side by side. Equal colours are equal relevancy,"
        " so the two maps can be compared."
    )

    def layout(self) -> None:
        with gr.Row():
            self.layer = layer_slider(self.depth, "cmp_layer", "Layer (from 0) of the token")
            self.token = gr.Dropdown([], label="Other token", elem_id="cmp_token")
            self.other = layer_slider(self.depth, "cmp_other", "Layer (from 0) of the other")
            self.ceiling = ceiling_slider("cmp_ceiling")
        self.controls = [self.layer, self.token, self.other, self.ceiling]
        super().layout()

    def needs_relevancy(self, now: Values) -> bool:
        return True

    def draw(self, analysis: Analysis, token: int, now: Values) -> Sequence[str]:
        layer, other_token, other_layer, percent = (now[control] for control in self.controls)
        other = (token if other_token is None else other_token, other_layer)
        look = self.look(now)
        return [views.compare_panel(analysis, (token, layer), other, percent, look)]


class Export(Panel):
    """All of it as files; draws nothing."""

    id = "export"
    title = "Export"
    help = "All that the panels show now, as files: the numbers, the figures and the picture."

    def layout(self) -> None:
        self.button = gr.Button("Export everything", variant="primary", elem_id="export_all")
        self.files = gr.HTML(elem_id="exported")


# ---- the page ----


class Page:
    """The page of one model. blocks: what Gradio serves."""

    def __init__(self, model: Model, args: argparse.Namespace, sessions: Sessions) -> None:
        self.model = model
        self.args = args
        self.sessions = sessions
        self.name = rundirs.slug(args.model_name)
        self.pictures = examples()
        self.blocks = gr.Blocks(
            title="LVLM stethoscope",
            analytics_enabled=False,
            fill_width=True,
            delete_cache=(600, 3600),
        )
        with self.blocks:
            gr.HTML(str(views.templates.title(self.name)))
            # how many answers there were, what else was done, and when relevancy was last missing:
            # a change of these starts an event
            self.answers = gr.Number(0, visible="hidden")
            self.done = gr.Number(0, visible="hidden")
            self.missing = gr.Number(0, visible="hidden")
            with gr.Row():
                with gr.Column(scale=1, min_width=260, elem_id="asking"):
                    self._lay_out_picture()
                    self._lay_out_question()
                with gr.Column(scale=3, min_width=480, elem_id="result"):
                    self._lay_out_answer()
                    self._lay_out_panels()
            self._connect()

    def app(self, auth: str | None) -> tuple[ASGIApp, App, set[str]]:
        """(what a server runs, Gradio's part of it, its files that everybody may read). auth:
        user:password that the page asks for."""
        user, _, password = (auth or "").partition(":")
        self.blocks.queue(max_size=64)
        # of a session it keeps which choices its menus have; what was asked is in sessions.py
        self.blocks.state_session_capacity = 64
        outer = FastAPI(openapi_url=None)
        gr.mount_gradio_app(
            outer,
            self.blocks,
            "/",
            auth=[(user, password)] if auth else None,
            max_file_size=FILE_LIMIT,
            footer_links=[],
            enable_monitoring=False,
            ssr_mode=False,
            mcp_server=False,
            pwa=False,
            css=CSS,
            theme=THEME,
            run_history=False,
        )
        public = {path for block in self.blocks.blocks.values() for path in block.keep_in_cache}
        return outer, cast(App, cast(Mount, outer.routes[-1]).app), public

    # ---- layout ----

    def _lay_out_picture(self) -> None:
        self.upload = gr.File(
            label="Upload a picture",
            file_count="single",
            height=70,
            show_label=False,
            elem_id="upload",
        )
        self.gallery = gr.Gallery(
            self.pictures,
            label="Examples",
            show_label=False,
            columns=3,
            height=124,
            allow_preview=False,
            interactive=False,
            buttons=[],
            elem_id="examples",
            format="png",
            object_fit="contain",
        )
        self.preview = gr.HTML(views.page(views.note("No picture yet.")), elem_id="preview")

    def _lay_out_question(self) -> None:
        self.question = gr.Textbox(
            QUESTION, label="User", max_length=QUESTION_LIMIT, lines=1, elem_id="question"
        )
        with gr.Row():
            self.ask = gr.Button("Ask", variant="primary", elem_id="ask", min_width=120)
            self.stop = gr.Button("Stop", elem_id="stop", scale=0, min_width=80)
        with gr.Accordion("Decoding", open=False):
            self._lay_out_decoding()
        with gr.Accordion("Maps over the picture", open=True):
            self.drawn_as = gr.Radio(
                ["patches", "smooth"], value="patches", label="Drawn as", elem_id="map_drawn_as"
            )
            self.opacity = gr.Slider(
                0, 100, 90, step=1, label="Opacity of the colours, %", elem_id="map_opacity"
            )

    def _lay_out_answer(self) -> None:
        with gr.Row():
            self.answer = gr.Textbox(
                label=f"{self.name} (every question stands alone)",
                lines=2,
                interactive=False,
                scale=3,
                elem_id="answer",
            )
            self.warning = gr.Textbox(
                label="Hallucination warning",
                lines=2,
                max_lines=3,
                interactive=False,
                scale=2,
                elem_id="warning",
            )
        with gr.Row(elem_id="coloring"):
            text = views.page(views.note("Answer tokens, coloured by"))
            gr.HTML(text, scale=0, min_width=190)
            self.color_by = gr.Radio(
                ["probability", ("visual contribution", "contribution"), "entropy"],
                value="probability",
                label="Colour of the answer's tokens",
                show_label=False,
                container=False,
                scale=0,
                min_width=375,
                elem_id="color_by",
            )
            self.colors = gr.HTML(elem_id="token_colors", scale=1, min_width=240)
        self.tokens = gr.Radio(
            [], label="Answer Tokens for Selection", show_label=False, elem_id="tokens"
        )

    def _lay_out_decoding(self) -> None:
        args = self.args
        with gr.Row():
            do_sample = gr.Checkbox(args.do_sample, label="Sample (off: the likeliest token)")
            seed = gr.Number(0, label="Seed", step=1, precision=0, minimum=0, maximum=2**31)
        with gr.Row():
            temperature = gr.Slider(0.1, 2, args.temperature, step=0.05, label="Temperature")
            top_p = gr.Slider(0.05, 1, args.top_p, step=0.05, label="Top P")
        start = min(args.max_length, 128)
        length = gr.Slider(1, args.max_length, start, step=1, label="Max new tokens")
        self.decoding = [do_sample, temperature, top_p, length, seed]  # as answer_question() reads

    def _lay_out_panels(self) -> None:
        self.panels: dict[str, Panel] = {}
        with gr.Tabs(overflow_behavior="wrap") as self.tabs:
            self._tab(Probabilities)
            self.contribution = self._tab(Contribution)
            self._tab(PredictionEvolution)
            self.relevancy = self._tab(RelevancyAnalysis)
            self.attention = self._tab(RawAttention)
            self.patches = self._tab(PatchSelector)
            self.compare = self._tab(Compare)
            self.export = self._tab(Export)
        panels = list(self.panels)
        self.open = gr.Radio(panels, value=panels[0], visible="hidden", elem_id="open_panel")

    def _tab(self, kind: type[SomePanel]) -> SomePanel:
        with gr.Tab(kind.title, id=kind.id):
            panel = kind(self.model.depth, self.model.heads, (self.opacity, self.drawn_as))
        self.panels[kind.id] = panel
        return panel

    # ---- which event changes what ----

    def _connect(self) -> None:
        controls = [control for panel in self.panels.values() for control in panel.controls]
        controls += [self.tokens, self.opacity, self.drawn_as]
        self.outputs = [output for panel in self.panels.values() for output in panel.outputs]
        # a set: Gradio then hands in {component: value}
        everything = {self.open, *controls}
        of_an_answer = [
            self.answer,
            self.tokens,
            self.compare.token,
            self.warning,
            self.colors,
            self.export.files,
        ]
        of_a_picture = [self.preview, *of_an_answer, *self.outputs]
        chosen = [
            self.upload.upload(
                self.take_upload, [self.upload], of_a_picture, show_progress="hidden", **SLOW
            ),
            self.gallery.select(
                self.pick_example, None, of_a_picture, show_progress="hidden", **SLOW
            ),
        ]
        asked = gr.on(
            [self.ask.click, self.question.submit],
            self.answer_question,
            [self.question, *self.decoding],
            of_an_answer,
            show_progress="minimal",
            trigger_mode="once",
            **SLOW,
        )
        self._count(asked, self.answers)
        self.stop.click(None, None, None, cancels=[asked], api_visibility="private")
        gr.on(
            [self.answers.change, self.color_by.input],
            self.color_tokens,
            [self.color_by],
            [self.colors],
            **FAST,
        )
        # What is done only changes what is chosen, here in the browser or in the session. One event
        # draws, after all of it: always_last makes it one at a time, with the newest values.
        for tab in self.tabs.children:
            tab.select(None, None, self.open, js=f"() => '{tab.id}'", api_visibility="private")
        head = [self.attention.layer, self.attention.head]
        chosen.append(
            self.attention.overview.click(
                None, None, head, js=CHOSEN_HEAD, api_visibility="private"
            )
        )
        every_click = FAST | {"trigger_mode": "multiple"}
        chosen.append(
            self.patches.picture.click(self.click_patch, self.patches.source, None, **every_click)
        )
        chosen.append(self.patches.clear.click(self.clear_patches, None, None, **FAST))
        computed = self.missing.change(
            self.compute, None, self.outputs, show_progress="hidden", **SLOW
        )
        for event in (*chosen, computed):
            self._count(event, self.done)
        drawing = [part.change for part in (self.open, self.answers, self.done)]
        drawing += [self.blocks.load, *(control.input for control in controls)]
        gr.on(drawing, self.show, everything, [*self.outputs, self.missing], **FAST)
        exporting = SLOW | {"preprocess": False}
        self.export.button.click(self.export_files, everything, self.export.files, **exporting)
        self.blocks.unload(self.leave)

    def _count(self, event: Dependency, number: Component) -> None:
        """One more, once an event has succeeded."""
        event.success(None, number, number, js=ONE_MORE, api_visibility="private")

    # ---- events ----

    @told
    def show(self, now: Values, request: gr.Request) -> Iterator[Values]:
        """Draw the open panel. Where relevancy is missing, compute() begins."""
        now = checked(now)
        panel = self.panels[now[self.open]]
        with self.sessions.at(visitor_of(request)) as session:
            session.waiting = ""
            if not panel.outputs:
                return
            analysis = session.current
            if analysis is None or now[self.tokens] is None:
                text = gone(session) if session.ended else FIRST
                yield dict.fromkeys(panel.outputs, views.page(views.note(text)))
            elif panel.needs_relevancy(now) and not analysis.has_relevancy:
                session.waiting = panel.id
                yield {panel.outputs[0]: computing(0.0), self.missing: time.time()}
            else:
                token = min(now[self.tokens], len(analysis.tokens) - 1)
                yield dict(zip(panel.outputs, panel.draw(analysis, token, now), strict=True))

    @told
    def compute(self, request: gr.Request) -> Iterator[Values]:
        """Compute relevancy; how far it is stands in the panel that waits for it, if it is open."""
        with self.sessions.at(visitor_of(request)) as session:
            if session.current is None:
                return
            for share in session.current.relevancy_steps():
                if session.waiting:
                    yield {self.panels[session.waiting].outputs[0]: computing(share)}

    def _with_picture(self, session: Session, picture: Image.Image) -> Iterator[Values]:
        """A new picture: what stood there of another one goes."""
        session.current = None
        session.picture = picture
        session.turn += 1
        session.ended = ""
        small = views.Canvas(picture, None, 420).picture
        yield dict.fromkeys(self.outputs, views.page(views.note(FIRST))) | {
            self.preview: views.page(views.figure(small, "The chosen picture")),
            self.answer: "",
            self.warning: "",
            self.colors: "",
            self.tokens: gr.update(choices=[], value=None),
            self.compare.token: gr.update(choices=[], value=None),
            self.export.files: "",
        }

    @told
    def take_upload(self, path: str | None, request: gr.Request) -> Iterator[Values]:
        """A file was uploaded, or taken away."""
        if path is None:
            return
        with self.sessions.at(visitor_of(request)) as session:
            picture = read_picture(path)
            session.origin = Path(path)
            yield from self._with_picture(session, picture)

    @told
    def pick_example(self, chosen: gr.SelectData, request: gr.Request) -> Iterator[Values]:
        """An example was clicked."""
        index = chosen.index
        if type(index) is not int or not 0 <= index < len(self.pictures):
            raise UsageError("there is no such example")
        with self.sessions.at(visitor_of(request)) as session:
            session.origin = index
            yield from self._with_picture(session, self.pictures[index])

    def _picture(self, session: Session) -> Image.Image:
        """The chosen picture, read again where it is no longer kept."""
        if session.picture is not None:
            return session.picture
        if session.origin is None:
            raise UsageError("choose a picture first")
        if isinstance(session.origin, int):
            session.picture = self.pictures[session.origin]
        elif session.origin.exists():
            session.picture = read_picture(session.origin)
        else:
            raise UsageError("the picture is no longer kept: choose it again")
        return session.picture

    @told
    def answer_question(
        self,
        question: str,
        do_sample: bool,
        temperature: float,
        top_p: float,
        length: float,
        seed: float,
        request: gr.Request,
    ) -> Iterator[Values]:
        """Stream the answer; then the tokens to choose from."""
        with self.sessions.at(visitor_of(request)) as session:
            picture = self._picture(session)
            turn = session.turn
            values = (do_sample, temperature, top_p, length, seed)
            decoding = Decoding(*checked(dict(zip(self.decoding, values, strict=True))).values())
            analysis = session.analysis(self.model, picture, question, decoding)
            session.current = None
            for text in analysis.answer():
                yield {self.answer: text}
            analysis.evolution()
            if session.turn != turn:
                raise UsageError("another picture was chosen meanwhile; ask again")
            session.current = analysis
            session.ended = ""
            choices = [(f"{i}:{views.shown(token)}", i) for i, token in enumerate(analysis.tokens)]
            yield {
                self.answer: analysis.text,
                self.tokens: gr.update(choices=choices, value=0),
                self.compare.token: gr.update(choices=choices, value=min(1, len(choices) - 1)),
                self.warning: " ".join([hallucination_warning(analysis), *analysis.missing()]),
                self.colors: "",
                self.export.files: "",
            }

    @told
    def color_tokens(self, by: str, request: gr.Request) -> Iterator[Values]:
        """A measure of the tokens was chosen, or there are new tokens."""
        by = checked({self.color_by: by})[self.color_by]
        with self.sessions.at(visitor_of(request)) as session:
            analysis = session.current
            if analysis is None:
                yield {self.colors: ""}
                return
            if by == "contribution":
                for share in analysis.relevancy_steps():
                    yield {self.colors: computing(share)}
            yield {self.colors: views.token_colors(analysis, by)}

    @told
    def click_patch(
        self, source: str, event: gr.EventData, request: gr.Request
    ) -> Iterator[Values]:
        """The picture of the patch selector was clicked."""
        source = str(checked({self.patches.source: source})[self.patches.source])
        with self.sessions.at(visitor_of(request)) as session:
            if session.current is not None:
                self.patches.toggle(session.current, source, float(event.x), float(event.y))
        yield from ()  # nothing of it is drawn here

    @told
    def clear_patches(self, request: gr.Request) -> Iterator[Values]:
        """No patch is selected any more."""
        with self.sessions.at(visitor_of(request)) as session:
            if session.current is not None:
                session.current.patches = set()
        yield from ()  # nothing of it is drawn here

    @told
    def export_files(
        self,
        now: Values,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 (Gradio finds it there)
    ) -> Iterator[Values]:
        """Everything that the panels show, as files. A page with a password serves people who are
        not at this machine: nothing of theirs stays on it."""
        shown = self._shown(checked(now))
        with self.sessions.at(visitor_of(request)) as session:
            analysis = session.current
            if analysis is None:
                first = "ask a question first, then export"
                raise UsageError(gone(session) if session.ended else first)
            for share in analysis.relevancy_steps():
                progress(share / 2, "Computing relevancy")
            progress(0.6, "Drawing")
            folder = self.sessions.new_folder(session)
            stays = self.args.auth is None
            root = self.args.out_root if stays else folder
            run_path, archive = export(analysis, shown, self.args.model_name, root, folder)
            name = secrets.token_urlsafe(32)
            session.exports[name] = archive
            where = str(run_path) if stays else ""
            yield {self.export.files: views.export_link(name, archive, where)}

    def leave(self, request: gr.Request) -> None:
        """The page was closed."""
        self.sessions.close(visitor_of(request))

    def _shown(self, now: Values) -> Shown:
        """Where the controls stand."""
        token = now[self.tokens] or 0
        other = now[self.compare.token]
        return Shown(
            token=token,
            vc_layer=now[self.contribution.layer],
            vc_mode=now[self.contribution.mode],
            vc_kind=now[self.contribution.kind],
            vc_ceiling=now[self.contribution.ceiling],
            rel_layer=now[self.relevancy.layer],
            rel_ceiling=now[self.relevancy.ceiling],
            rel_hide=now[self.relevancy.hide],
            att_layer=now[self.attention.layer],
            att_head=head_of(now[self.attention.head]),
            att_ceiling=now[self.attention.ceiling],
            pat_source=now[self.patches.source],
            pat_layer=now[self.patches.layer],
            pat_head=head_of(now[self.patches.head]),
            cmp_layer=now[self.compare.layer],
            cmp_token=token if other is None else other,
            cmp_other=now[self.compare.other],
            cmp_ceiling=now[self.compare.ceiling],
            map_opacity=now[self.opacity],
            map_smooth=now[self.drawn_as] == "smooth",
        )

"""What happens in a vision-language model while it answers? A page: ask about a picture, choose a
token of the answer, look at what it came from.

    python diagnostic_tools/demo_meta.py
    python diagnostic_tools/demo_meta.py --model-name checkpoints/llava-v1.5-7b --part-on-cpu
    python diagnostic_tools/demo_meta.py --host 0.0.0.0 --auth me:a-long-password

Probability of every token with its alternatives, visual contribution, prediction evolution (logit
lens), relevancy over the picture and over words, raw attention by layer and head, which words
looked at chosen patches, two tokens or layers side by side, and all of it as files.
LVLM-Stethoscope's page with its defects left out (README). Everything is computed when it is first
looked at (stethoscope.py) and drawn from what is kept (stethoscope_views.py).

On tiny-llava ask "Describe the image." about the first example: the warm patches of each colour
word lie on the object of that colour, and the last layers agree on every word. A shape word after
it comes from the words before it more than from the picture.
"""

import functools
import html
import ipaddress
import os
import shutil
import traceback
from pathlib import Path
from random import Random

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported

import gradio as gr
import torch

from common import add_model_arguments, load_from_args
from vlmdiag import cli
from vlmdiag.cli import UsageError
from vlmdiag.runs import rundirs
from vlmdiag.scenes.scene import floor_scene, render
from vlmdiag.stethoscope import views
from vlmdiag.stethoscope.analysis import (
    FILE_LIMIT,
    QUESTION_LIMIT,
    TOKEN_LIMIT,
    Decoding,
    Model,
    Session,
    hallucination_warning,
    part_on_cpu,
    read_picture,
)
from vlmdiag.stethoscope.export import Shown, export
from vlmdiag.stethoscope.warning_signals import find_calibration

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = (54, 7, 21)  # seeds of the drawn pictures
QUESTION = "Describe the image."
FIRST = "Choose a picture, type a question and press Ask."
CLICKS = """element.addEventListener('click', event => {
  const image = event.target.closest('img');
  if (!image) return;
  const box = image.getBoundingClientRect();
  trigger('click', {x: (event.clientX - box.left) / box.width, y: (event.clientY - box.top) / box.height});
});"""


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--model-name",
        "--model-path",
        default=str(ROOT / "checkpoints" / "tiny-llava"),
        help="folder or hub id of the model",
    )
    parser.add_argument(
        "--part-on-cpu",
        action="store_true",
        help="vision tower and connector on the CPU, the rest on the GPU",
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; any other than this machine's own needs --auth",
    )
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--auth", default=None, help="user:password that the page asks for")
    parser.add_argument("--out_root", default="runs", help="where exports go")
    parser.add_argument(
        "--max-length",
        type=int,
        default=512,
        help=f"most tokens of an answer, at most {TOKEN_LIMIT}",
    )
    parser.add_argument(
        "--do-sample", action="store_true", help="the page starts with sampling switched on"
    )
    parser.add_argument(
        "--temperature", type=float, default=1.0, help="of sampling, where the page starts"
    )
    parser.add_argument(
        "--top_p", type=float, default=1.0, help="of sampling, where the page starts"
    )
    parser.add_argument(
        "--num-beams", type=int, default=1, help="1: a beam has no single row that produced a token"
    )
    parser.add_argument("--load-8bit", action="store_true", help="as --quantize_type int8")
    parser.add_argument("--load-4bit", action="store_true", help="as --quantize_type 4bit")
    parser.add_argument(
        "--cfg-path",
        default=None,
        help=(
            "not needed: a checkpoint's own config.json says all; refused with a line that says so"
        ),
    )
    parser.add_argument("--options", nargs="+", default=None, help="as --cfg-path")
    add_model_arguments(parser, path=False)
    args = parser.parse_args(argv)
    if args.cfg_path or args.options:
        parser.error(
            "--cfg-path and --options set up a MiniGPT-4 code base that is not used here: give"
            " --model-name the checkpoint's folder instead"
        )
    if args.num_beams != 1:
        parser.error(
            "--num-beams: beams have no single row that produced a token, so only 1 can be looked"
            " into; try --do-sample for other answers"
        )
    if not 1 <= args.max_length <= TOKEN_LIMIT:
        parser.error(f"--max-length {args.max_length}: 1 to {TOKEN_LIMIT} tokens")
    if not 0.1 <= args.temperature <= 2 or not 0.05 <= args.top_p <= 1:
        parser.error(
            "--temperature lies between 0.1 and 2, --top_p between 0.05 and 1 (no sampling: leave"
            " --do-sample out)"
        )
    if args.load_8bit + args.load_4bit + (args.quantize_type is not None) > 1:
        parser.error("--load-8bit, --load-4bit and --quantize_type exclude each other")
    args.quantize_type = (
        "int8" if args.load_8bit else "4bit" if args.load_4bit else args.quantize_type
    )
    if args.auth is not None and not all(args.auth.partition(":")[::2]):
        parser.error("--auth: user:password is wanted")
    if not loopback(args.host) and args.auth is None:
        parser.error(
            f"--host {args.host} lets other machines in: give --auth user:password as well"
        )
    return args


def loopback(host):
    """Does this address take connections of this machine only?"""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


# ---- events ----


def told(function):
    """An event whose errors become messages in the page. Generators; the page stays as it was."""

    @functools.wraps(function)
    def event(*args, **options):
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


def examples():
    return [render(floor_scene(Random(seed), 3, square=True)) for seed in EXAMPLES]


def working(analysis, needs_relevancy):
    """Yield pieces of HTML while what a panel needs is computed."""
    if needs_relevancy:
        for share in analysis.relevancy_steps():
            yield views.progress(share, "Computing relevancy of every token")


def layer_slider(depth, label="LLM Layer", **options):
    return gr.Slider(0, depth - 1, depth - 1, step=1, label=label, **options)


def ceiling_slider(label="Colour ceiling, % of the largest", **options):
    return gr.Slider(5, 100, 100, step=1, label=label, **options)


def head_slider(heads, elem_id):
    return gr.Slider(-1, heads - 1, -1, step=1, label="Head (-1: mean over heads)", elem_id=elem_id)


def build(model, args):
    """The page, as gr.Blocks."""
    depth, heads, name = model.depth, model.heads, rundirs.slug(args.model_name)
    pictures = examples()
    with gr.Blocks(
        title="LVLM stethoscope", analytics_enabled=False, fill_width=True, delete_cache=(600, 3600)
    ) as demo:
        gr.HTML(
            f"<h1 style='font-size:24px;margin:4px 0'>LVLM stethoscope: {html.escape(name)}</h1>"
        )
        session, picture, panel = gr.State(None), gr.State(None), gr.State("probability")
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                upload = gr.File(
                    label="Upload a picture", file_count="single", height=120, elem_id="upload"
                )
                gallery = gr.Gallery(
                    pictures,
                    label="or pick an example",
                    columns=3,
                    height=165,
                    allow_preview=False,
                    interactive=False,
                    buttons=[],
                    elem_id="examples",
                    format="png",
                    object_fit="contain",
                )
                preview = gr.HTML(views.page(views.note("No picture yet.")), elem_id="preview")
            with gr.Column(scale=4, min_width=360):
                question = gr.Textbox(
                    QUESTION, label="User", max_length=QUESTION_LIMIT, lines=2, elem_id="question"
                )
                with gr.Row():
                    ask = gr.Button("Ask", variant="primary", elem_id="ask")
                    stop = gr.Button("Stop", elem_id="stop", scale=0, min_width=110)
                with gr.Accordion("Decoding", open=False):
                    with gr.Row():
                        do_sample = gr.Checkbox(
                            args.do_sample, label="Sample (off: the likeliest token)"
                        )
                        seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**31)
                    with gr.Row():
                        temperature = gr.Slider(
                            0.1, 2, args.temperature, step=0.05, label="Temperature"
                        )
                        top_p = gr.Slider(0.05, 1, args.top_p, step=0.05, label="Top P")
                    length = gr.Slider(
                        1,
                        args.max_length,
                        min(args.max_length, 128),
                        step=1,
                        label="Max new tokens",
                    )
                answer = gr.Textbox(
                    label=f"{name} (every question stands alone)",
                    lines=3,
                    interactive=False,
                    elem_id="answer",
                )
                warning = gr.Textbox(
                    label="Hallucination warning", interactive=False, elem_id="warning"
                )
        tokens = gr.Radio([], label="Answer Tokens for Selection", elem_id="tokens")
        with gr.Tabs(overflow_behavior="wrap") as tabs:
            with gr.Tab("Answer Probabilities", id="probability"):
                probability = gr.HTML(elem_id="probability")
            with gr.Tab("Visual Contribution", id="contribution"):
                with gr.Row():
                    vc_layer = layer_slider(depth, elem_id="vc_layer")
                    vc_mode = gr.Dropdown(
                        ["max", "sum", "mean"],
                        value="max",
                        label="Calculation mode",
                        elem_id="vc_mode",
                    )
                    vc_kind = gr.Radio(
                        [("share of image and text", "share"), ("ratio, as published", "ratio")],
                        value="share",
                        label="Measure",
                    )
                    vc_ceiling = ceiling_slider("Max vc, % of the scale", elem_id="vc_ceiling")
                contribution = gr.HTML(elem_id="contribution")
            with gr.Tab("Prediction Evolution in LLM", id="evolution"):
                evolution = gr.HTML(elem_id="evolution")
            with gr.Tab("Relevancy Analysis", id="relevancy"):
                with gr.Row():
                    rel_layer = layer_slider(depth, elem_id="rel_layer")
                    rel_ceiling = ceiling_slider(
                        "Colour ceiling, % of the token's largest in any layer",
                        elem_id="rel_ceiling",
                    )
                    rel_hide = gr.Checkbox(False, label="Leave out vision tokens of outlying norm")
                with gr.Row():
                    rel_picture, rel_words = (
                        gr.HTML(elem_id="rel_picture", scale=3, min_width=320),
                        gr.HTML(elem_id="rel_words", scale=2, min_width=280),
                    )
            with gr.Tab("Raw Attention", id="attention"):
                with gr.Row():
                    att_layer, att_head, att_ceiling = (
                        layer_slider(depth, elem_id="att_layer"),
                        head_slider(heads, "att_head"),
                        ceiling_slider(elem_id="att_ceiling"),
                    )
                attention = gr.HTML(elem_id="attention")
            with gr.Tab("Patch Selector", id="patches"):
                with gr.Row():
                    pat_source = gr.Radio(
                        ["attention", "relevancy"], value="attention", label="What looked there, by"
                    )
                    pat_layer, pat_head = (
                        layer_slider(depth, elem_id="pat_layer"),
                        head_slider(heads, "pat_head"),
                    )
                    pat_clear = gr.Button("Clear", elem_id="pat_clear")
                with gr.Row():
                    pat_picture, pat_words = (
                        gr.HTML(elem_id="pat_picture", js_on_load=CLICKS, scale=1, min_width=320),
                        gr.HTML(elem_id="pat_words", scale=1),
                    )
            with gr.Tab("Compare", id="compare"):
                with gr.Row():
                    cmp_layer = layer_slider(
                        depth, "Layer of the selected token", elem_id="cmp_layer"
                    )
                    cmp_token = gr.Dropdown([], label="Other token", elem_id="cmp_token")
                    cmp_other = layer_slider(depth, "Layer of the other token", elem_id="cmp_other")
                    cmp_ceiling = ceiling_slider(elem_id="cmp_ceiling")
                compare = gr.HTML(elem_id="compare")
            with gr.Tab("Export", id="export"):
                export_button = gr.Button(
                    "Export everything", variant="primary", elem_id="export_all"
                )
                exported = gr.File(label="Files", interactive=False, elem_id="exported")
                where = gr.Textbox(
                    label="Run directory on this machine", interactive=False, elem_id="where"
                )

        shown = {
            "probability": [probability],
            "contribution": [contribution],
            "evolution": [evolution],
            "relevancy": [rel_picture, rel_words],
            "attention": [attention],
            "patches": [pat_picture, pat_words],
            "compare": [compare],
            "export": [],
        }
        controls = {
            "contribution": [vc_layer, vc_mode, vc_kind, vc_ceiling],
            "relevancy": [rel_layer, rel_ceiling, rel_hide],
            "attention": [att_layer, att_head, att_ceiling],
            "patches": [pat_source, pat_layer, pat_head],
            "compare": [cmp_layer, cmp_token, cmp_other, cmp_ceiling],
        }
        everything = {
            session,
            tokens,
            panel,
            *(control for some in controls.values() for control in some),
        }
        outputs = [output for some in shown.values() for output in some]

        def draw(analysis, now, token):
            """The HTML of the panel that is open, one piece for each of its outputs."""
            get, name = lambda *some: [now[control] for control in some], now[panel]
            head = lambda value: None if value < 0 else int(value)
            if name == "probability":
                return [views.probability_panel(analysis, token)]
            if name == "contribution":
                return [views.contribution_panel(analysis, token, *get(*controls[name]))]
            if name == "evolution":
                return [views.evolution_panel(analysis, token)]
            if name == "relevancy":
                return views.relevancy_panel(analysis, token, *get(*controls[name]))
            if name == "attention":
                layer, number, percent = get(*controls[name])
                return [views.attention_panel(analysis, token, layer, head(number), percent)]
            if name == "patches":
                source, layer, number = get(*controls[name])
                return views.patch_panel(analysis, source, layer, head(number))
            layer, other, second, percent = get(*controls["compare"])
            return [
                views.compare_panel(
                    analysis, (token, layer), (token if other is None else other, second), percent
                )
            ]

        @told
        def show(now):
            """Draw the open panel, computing first what it needs."""
            analysis, places = now[session] and now[session].current, shown[now[panel]]
            if not places:
                return
            if analysis is None or now[tokens] is None:
                yield dict.fromkeys(places, views.page(views.note(FIRST)))
                return
            needs = now[panel] in ("contribution", "relevancy", "compare") or (
                now[panel] == "patches" and now[pat_source] == "relevancy"
            )
            for piece in working(analysis, needs):
                yield {places[0]: piece}
            yield dict(
                zip(
                    places,
                    draw(analysis, now, min(now[tokens], len(analysis.tokens) - 1)),
                    strict=True,
                )
            )

        @told
        def choose(now, chosen):
            """A new picture: what stood there of another one goes."""
            kept = now or Session()
            kept.current, kept.turn = None, kept.turn + 1
            empty = dict.fromkeys(outputs, views.page(views.note(FIRST)))
            image = views.Canvas(chosen, None, 420).picture
            yield empty | {
                session: kept,
                picture: chosen,
                preview: views.page(views.figure(image, "The chosen picture")),
                answer: "",
                warning: "",
                tokens: gr.update(choices=[], value=None),
                cmp_token: gr.update(choices=[], value=None),
                exported: None,
                where: "",
            }

        @told
        def take(now, path):
            if path is not None:
                yield from choose.__wrapped__(now, read_picture(path))

        @told
        def pick(now, chosen: gr.SelectData):
            yield from choose.__wrapped__(now, pictures[chosen.index])

        @told
        def reply(now, chosen, text, sample, heat, mass, count, start):
            """Stream the answer; then the tokens to choose from."""
            if chosen is None:
                raise UsageError("choose a picture first")
            kept = now or Session()
            turn = kept.turn
            analysis = kept.analysis(
                model, chosen, text, Decoding(sample, heat, mass, int(count), int(start))
            )
            kept.current = None
            for piece in analysis.answer():
                yield {answer: piece}
            analysis.evolution()
            if kept.turn != turn:
                raise UsageError("another picture was chosen meanwhile; ask again")
            kept.current = analysis
            choices = [(f"{i}:{views.shown(token)}", i) for i, token in enumerate(analysis.tokens)]
            yield {
                session: kept,
                answer: analysis.text,
                tokens: gr.update(choices=choices, value=0),
                cmp_token: gr.update(choices=choices, value=min(1, len(choices) - 1)),
                warning: " ".join([hallucination_warning(analysis), *analysis.missing()]),
                exported: None,
                where: "",
            }

        @told
        def click(now, event: gr.EventData):
            analysis = now[session] and now[session].current
            if analysis is not None:
                view = views.canvas(analysis, views.cells_of(analysis, now[pat_source]))
                cell = view.cell(float(event.x), float(event.y)) if view.grid is not None else None
                analysis.patches ^= {cell} if cell is not None else set()
            yield from show.__wrapped__(now)

        @told
        def clear(now):
            if now[session] and now[session].current:
                now[session].current.patches = set()
            yield from show.__wrapped__(now)

        @told
        def files(now, progress=gr.Progress()):  # noqa: B008 (Gradio finds it there)
            analysis = now[session] and now[session].current
            if analysis is None:
                raise UsageError("ask a question first, then export")
            for share in analysis.relevancy_steps():
                progress(share / 2, "Computing relevancy")
            progress(0.6, "Drawing")
            at = lambda control: None if now[control] < 0 else int(now[control])
            seen = Shown(
                now[tokens] or 0,
                now[vc_layer],
                now[vc_mode],
                now[vc_kind],
                now[rel_layer],
                now[rel_hide],
                now[att_layer],
                at(att_head),
                now[pat_source],
                now[pat_layer],
                at(pat_head),
                now[cmp_layer],
                now[cmp_token] or 0,
                now[cmp_other],
            )
            found, archive = export(analysis, seen, args.model_name, args.out_root)
            yield {exported: str(archive), where: str(found)}
            shutil.rmtree(archive.parent)  # Gradio has a copy of its own by now

        fast = {
            "show_progress": "hidden",
            "concurrency_limit": 8,
            "trigger_mode": "always_last",
            "api_visibility": "private",
        }
        slow = {"concurrency_limit": 8, "api_visibility": "private"}
        panes = [
            session,
            picture,
            preview,
            answer,
            warning,
            tokens,
            cmp_token,
            exported,
            where,
            *outputs,
        ]
        upload.upload(take, [session, upload], panes, show_progress="hidden", **slow)
        gallery.select(pick, [session], panes, show_progress="hidden", **slow)
        asked = gr.on(
            [ask.click, question.submit],
            reply,
            [session, picture, question, do_sample, temperature, top_p, length, seed],
            [session, answer, tokens, cmp_token, warning, exported, where],
            show_progress="minimal",
            trigger_mode="once",
            **slow,
        )
        asked.success(show, everything, outputs, **fast)
        stop.click(None, None, None, cancels=[asked], api_visibility="private")
        sliders = [control.input for some in controls.values() for control in some]
        gr.on([tokens.input, *sliders], show, everything, outputs, **fast)
        for tab in tabs.children:
            tab.select(
                functools.partial(str, tab.id),
                None,
                panel,
                show_progress="hidden",
                api_visibility="private",
            ).then(show, everything, outputs, **fast)
        pat_picture.click(click, everything, outputs, **(fast | {"trigger_mode": "multiple"}))
        pat_clear.click(clear, everything, outputs, **fast)
        export_button.click(files, everything, [exported, where], **slow)
        demo.load(show, everything, outputs, **fast)
    return demo


def serve(args, prevent_thread_lock=False):
    """Load the model and start the page. Returns the gr.Blocks, whose local_url says where."""
    vlm = load_from_args(args, args.model_name)
    try:
        calibrated = find_calibration(args.model_name, args.out_root)
    except UsageError as error:
        print(f"hallucination warning off: {error}")
        calibrated = None
    model = Model(vlm, calibrated)
    if args.part_on_cpu and not part_on_cpu(vlm):
        print("--part-on-cpu: the whole model is on the CPU already")
    demo = build(model, args).queue(max_size=64)
    user, _, password = (args.auth or "").partition(":")
    try:
        demo.launch(
            server_name=args.host,
            server_port=args.port,
            auth=[(user, password)] if args.auth else None,
            share=False,
            prevent_thread_lock=True,
            quiet=True,
            show_error=True,
            max_file_size=FILE_LIMIT,
            footer_links=[],
            enable_monitoring=False,
            ssr_mode=False,
            mcp_server=False,
            pwa=False,
            inbrowser=False,
            state_session_capacity=16,
            css=views.CSS,
            theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
            run_history=False,
        )
    except OSError as error:
        raise UsageError(
            f"--port {args.port} of {args.host} is taken or cannot be listened on; choose"
            " another one"
        ) from error
    print(f"{args.model_name}: open {demo.local_url}", flush=True)
    if not prevent_thread_lock:
        demo.block_thread()
    return demo


def main(argv=None):
    serve(parse_args(argv))
    return 0


if __name__ == "__main__":
    cli.run(main)

"""Which tokens of an answer, a critique and a revision look at the picture? The texts of one
instance, each token coloured by its attention to the picture.

    w[t] = mean over the P vision tokens of c[t, p], c[t, p] = mean of the k largest heads of the
    mean of the k largest layers, k = --hidden_top_k,
    in the step that predicted token t: its query is the token before. Weights are those of the
    softmax over the whole prompt, stop token not counted.
Volcano (arXiv 2311.07362), figure 4 above; our study, sections 1.2 and 2.6.

    python visualize/text_attention_heatmap.py --input-dir outputs/volcano \\
        --output-dir outputs/volcano/figures --instance-idx 8

It reads what run_volcano_with_image_attention.py --output-visualization-tensors left in
--input-dir. Writes text_heatmap_<idx>_q2i_attention (initial response), _f2i_ (feedback) and _r2i_
(revision), each as .html, .png and .pdf, and prints the strongest spans as comma lists for
image_attention_heatmap.py --feedback-target-tokens. One colour scale for the three, smallest to
largest weight, so that colours compare; --own_scale gives each text its own, as published. Words
that name things should be darker than those between them."""

import base64
import hashlib
import html
import re
import shlex
import sys
from pathlib import Path

import numpy as np
from matplotlib.colors import Normalize, to_hex, to_rgb
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.patches import Rectangle

from vlmdiag import cli
from vlmdiag.figures import plots
from vlmdiag.figures.plots import BREAK, drawable, visible
from vlmdiag.volcano.tensors import (
    STAGES,
    find_spans,
    join_target,
    read_instance,
    strongest_spans,
    token_maps,
    token_weights,
)

PAGES = {"initial": "q2i", "feedback": "f2i", "revision": "r2i"}
COLORS = plots.plt.get_cmap("BuGn")
WIDTH, MARGIN, SIZE, LINE, PAD = 7.2, 0.18, 11.5, 0.31, 0.035  # inches, but for the font size
STYLE = """
:root { color-scheme: light; }
body { margin: 0; background: #fff; color: #1a1f27; font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main { max-width: 860px; margin: 0 auto; padding: 28px 24px 48px; }
h1 { font-size: 20px; margin: 0 0 12px; font-weight: 650; }
h2 { font-size: 14px; margin: 26px 0 6px; font-weight: 650; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 16px; margin: 0 0 20px; font-size: 14px; }
dt { color: #5d6775; }
dd { margin: 0; overflow-wrap: anywhere; white-space: pre-wrap; unicode-bidi: isolate; }
.text { font-size: 20px; line-height: 1.9; margin: 0; padding: 14px 18px; border: 1px solid #dde1e7; border-radius: 8px;
  overflow-wrap: anywhere; unicode-bidi: isolate; }
.t { padding: 4px 0; box-shadow: inset 1px 0 rgb(255 255 255 / 60%); }
.t:hover { outline: 2px solid #d55e00; }
.stop { margin-left: 14px; padding: 2px 6px; font-size: 14px; border: 1px dashed #5d6775; border-radius: 4px; box-shadow: none; }
.legend { margin: 16px 0 0; font-size: 12.5px; color: #3d4653; }
.ramp { position: relative; max-width: 380px; height: 14px; border: 1px solid #c9ced6; margin: 4px 0 2px; }
.mean { position: absolute; top: -4px; bottom: -4px; width: 2px; margin-left: -1px; background: #d55e00; }
.ticks { max-width: 380px; display: flex; justify-content: space-between; font-variant-numeric: tabular-nums; }
.key { color: #b34d00; }
.note { font-size: 13px; color: #5d6775; margin: 14px 0 0; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: 2px 14px 2px 0; text-align: left; white-space: pre-wrap; overflow-wrap: anywhere; border-bottom: 1px solid #eef0f3; }
th { color: #5d6775; font-weight: 500; }
td.n, th.n { text-align: right; }
code { font: 13px ui-monospace, Menlo, "DejaVu Sans Mono", monospace; unicode-bidi: isolate; }
summary { cursor: pointer; margin: 26px 0 6px; font-size: 14px; font-weight: 650; }
@media print { details > * { display: none; } .t, .ramp, .stop { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
"""


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--input-dir",
        required=True,
        help="folder with the <index>_<image id> folders of run_volcano_with_image_attention.py",
    )
    parser.add_argument("--output-dir", required=True, help="where pages and figures go")
    parser.add_argument(
        "--instance-idx",
        type=int,
        required=True,
        help="index of the instance in the list of questions, from 0",
    )
    parser.add_argument(
        "--hidden-top-k",
        type=int,
        default=3,
        help="k largest over layers and heads; at most what the run stored",
    )
    parser.add_argument(
        "--own_scale",
        action="store_true",
        help="a colour scale for each text; else one for all, so that colours compare",
    )
    parser.add_argument(
        "--top_spans", type=int, default=5, help="how many of the strongest spans to print"
    )
    parser.add_argument("--span_length", type=int, default=3, help="tokens of such a span")
    args = parser.parse_args(argv)
    if args.instance_idx < 0 or args.top_spans < 0 or min(args.hidden_top_k, args.span_length) < 1:
        parser.error(
            "--instance-idx and --top_spans start at 0, --hidden-top-k and --span_length at 1"
        )
    return args


def named_spans(stage, weights, count, length):
    """The strongest spans as [(target, occurrence, start, end, mean weight)]."""
    rows = []
    for start, end in strongest_spans(weights[: stage.steps], stage.tokens, count, length):
        target = join_target(stage.tokens[start:end])
        places = find_spans(stage.tokens, stage.spans, stage.text, target)
        rows.append(
            (
                target,
                places.index(list(range(start, end))) + 1,
                start,
                end,
                float(weights[start:end].mean()),
            )
        )
    return rows


def print_spans(instance, stage, rows, mean):
    print(
        f"{instance.title(stage.name)}: {size_of(stage)}, mean weight {mean:.3g}"
        + ("; strongest spans:" if rows else "")
    )
    for target, occurrence, start, end, weight in rows:
        place = f"tokens {start}-{end - 1}" if end - start > 1 else f"token {start}"
        print(
            f"  {weight:.3g}  {times(weight, mean)}  {shlex.quote(target)}  {place}"
            + (f", occurrence {occurrence}" if occurrence > 1 else "")
        )
    if rows:
        targets = " ".join(
            shlex.quote(" " * row[0].startswith("-") + row[0]) for row in rows
        )  # a leading blank keeps argparse from seeing a flag
        occurrences = (
            f" --occurrence {' '.join(str(row[1]) for row in rows)}"
            if any(row[1] > 1 for row in rows)
            else ""
        )
        where = "" if stage.name == "feedback" else f" --stage {stage.name}"
        print(f"  --feedback-target-tokens {targets}{occurrences}{where}")


def size_of(stage):
    return f"{stage.steps} token{'s' * (stage.steps != 1)}"


def times(weight, mean):
    return f"{weight / mean:.2f}x" if mean > 0 else "-"


def ink(color):
    """Black or white, whichever is easier to read on a colour (WCAG luminance)."""
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color))
    return "#000000" if 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 else "#ffffff"


def title_of(instance, stage):
    return f"Attention to the picture while writing the {instance.title(stage.name)}"


def scale_of(weights):
    """Colour scale from the smallest to the largest weight, others clipped; from 0 where all are
    the same, to 1 without weights."""
    low, high = min(weights, default=0.0), max(weights, default=1.0)
    return Normalize(float(low) if low < high else 0.0, float(high) or 1.0, clip=True)


def ticks_of(scale):
    return [scale.vmin, (scale.vmin + scale.vmax) / 2, scale.vmax]


def whose_scale(instance, args):
    """The texts whose weights end the colour scale."""
    return (
        "this text"
        if args.own_scale or len(instance.stages) == 1
        else f"{', '.join(STAGES[name] for name in instance.stages)} together"
    )


# ---- page ----


def page_of(instance, stage, weights, scale, rows, args):
    """A page that works offline: no script, style allowed by its hash, all that comes from outside
    escaped."""
    mean = float(weights[: stage.steps].mean()) if stage.steps else 0.0
    levels = [round(255 * float(scale(w))) for w in weights]
    colors = {level: to_hex(COLORS(level)) for level in sorted(set(levels))}
    style = STYLE + "".join(
        f".c{level} {{ background: {color}; color: {ink(color)}; }}\n"
        for level, color in colors.items()
    )
    style += (
        ".ramp { background: linear-gradient(to right,"
        f" {', '.join(to_hex(COLORS(level)) for level in range(0, 256, 15))}); }}\n"
    )
    style += f".mean {{ left: {100 * float(scale(mean)):.2f}%; }}\n"
    policy = (
        "default-src 'none'; style-src"
        f" 'sha256-{base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()}'; base-uri"
        " 'none'; form-action 'none'"
    )
    body, cells = [], []
    for i, (token, weight, level) in enumerate(zip(stage.pieces(), weights, levels)):
        stop, name = stage.ended and i == len(stage.tokens) - 1, visible(token.strip(" "))
        tip = f"token {i} {name!r}: {weight:.3g}, " + (
            "stop token, not counted" if stop else f"{times(weight, mean)} the mean of this text"
        )
        shown = html.escape(
            visible(
                token.strip() if stop else re.sub(r"(?<=.) | (?=\s|$)", "\N{NO-BREAK SPACE}", token)
            )
        ).replace(BREAK, f"{BREAK}<br>")
        body.append(
            f'<span class="t c{level}{" stop" * stop}" title="{html.escape(tip)}">{shown}</span>'
        )
        cells.append(
            f'<tr><td class="n">{i}<td>{html.escape(name)}<td class="n">{weight:.4g}<td'
            f' class="n">{"stop token" if stop else times(weight, mean)}</tr>\n'
        )
    facts = {
        "Question": instance.question,
        "Gold answer": instance.gold_answer,
        "Model": instance.model,
    }
    facts |= {
        "Instance": f"{instance.index}, {instance.image_id}",
        "Tokens": (
            f"{stage.steps}" + (", and the stop token" if stage.ended else ", cut off at the limit")
        ),
    }
    listed = "".join(
        f"<dt>{name}<dd>{html.escape(''.join(map(visible, text)))}\n"
        for name, text in facts.items()
        if text
    )
    spans = "".join(
        f"<tr><td><code>{html.escape(visible(target))}</code>"
        + "".join(
            f'<td class="n">{number}'
            for number in (start, occurrence, f"{weight:.4g}", times(weight, mean))
        )
        for target, occurrence, start, _, weight in rows
    )
    heads = "".join(
        f'<th class="n">{head}'
        for head in ("first token", "occurrence", "mean weight", "times the mean")
    )
    k = args.hidden_top_k
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(f"{title_of(instance, stage)}, instance {instance.index}")}</title>
<style>{style}</style>
</head>
<body><main>
<h1>{title_of(instance, stage)}</h1>
<dl>{listed}</dl>
<p class="text">{"".join(body)}</p>
<div class="legend">mean attention to a vision token, in the step that predicted the token
<div class="ramp"><span class="mean"></span></div>
<div class="ticks">{"".join(f"<span>{tick:.3g}</span>" for tick in ticks_of(scale))}</div>
The scale goes from the smallest to the largest weight of {whose_scale(instance, args)}. <span class="key">&#9474; Mean of this text: {mean:.3g}</span></div>
{f"<h2>Strongest spans</h2><table><tr><th>tokens{heads}{spans}</table>" if rows else ""}
<details><summary>Weight of each token</summary>
<table><tr><th class="n">token<th>text<th class="n">weight<th class="n">times the mean</tr>
{"".join(cells)}</table></details>
<p class="note">Weight: softmax attention over the whole prompt, mean of the {k} largest over layers, then of the {k} largest over heads, then over
{stage.topk.shape[3]} vision tokens. The stop token does not set the scale.</p>
</main></body>
</html>
"""


# ---- figure ----


def advance(text):
    """Width in inches of text drawn at SIZE, blanks at its ends included."""
    font = get_font(findfont(FontProperties()))
    font.set_size(SIZE, 72)
    return sum(font.load_char(ord(c)).linearHoriAdvance / 65536 for c in text) / 72


def boxes_of(stage, room):
    """[(token, text, x, line)] and the number of lines; a line ends before a blank, or after a line
    break; a word is split only if it is wider than a line."""
    words = []
    for i, token in enumerate(stage.pieces()[: stage.steps]):
        if not words or token.startswith(" ") or BREAK in words[-1][-1][1]:
            words.append([])
        words[-1].append((i, drawable(token)))
    placed, x, line = [], 0.0, 0
    for word in words:
        if x > 0 and x + sum(advance(text) for _, text in word) > room:
            x, line = 0.0, line + 1
        for i, text in word:
            for part in cut(text.lstrip(" ") or text if x == 0 else text, room):
                if x > 0 and x + advance(part) > room:
                    x, line = 0.0, line + 1
                placed.append((i, part, x, line))
                x += advance(part)
        if BREAK in word[-1][1]:
            x, line = 0.0, line + 1
    if stage.ended:
        text = drawable(stage.tokens[-1].strip())
        x, line = (
            (0.0, line + 1)
            if x > 0 and x + 0.2 + advance(text) > room
            else (x + 0.2 * (x > 0), line)
        )
        placed.append((len(stage.tokens) - 1, text, x, line))
    return placed, 1 + max((line for *_, line in placed), default=0)


def cut(text, room):
    """Text in parts that are no wider than a line."""
    parts = [""]
    for c in text:
        if parts[-1] and advance(parts[-1] + c) > room:
            parts.append("")
        parts[-1] += c
    return parts


def draw(instance, stage, weights, scale, args):
    """The text as coloured boxes over a colour bar with numbers -> figure."""
    room = WIDTH - 2 * MARGIN
    placed, lines = boxes_of(stage, room)
    question = shorten(f"{instance.question}", room)
    above, below = 0.78, 0.84
    height = above + lines * LINE + below
    figure = plots.plt.figure(figsize=(WIDTH, height))
    figure.set_layout_engine("none")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(height, 0))
    axes.axis("off")
    axes.text(
        MARGIN, 0.26, title_of(instance, stage), fontsize=12, fontweight="bold", parse_math=False
    )
    n = size_of(stage) + (" and the stop token" if stage.ended else "")
    axes.text(MARGIN, 0.46, question, fontsize=8.5, color="#3d4653", parse_math=False)
    axes.text(
        MARGIN,
        0.62,
        shorten(f"{Path(instance.model).name}, instance {instance.index}, {n}", room),
        fontsize=8.5,
        color="#3d4653",
        parse_math=False,
    )
    for i, text, x, line in placed:
        color, stop = COLORS(float(scale(weights[i]))), stage.ended and i == len(stage.tokens) - 1
        baseline, wide = above + line * LINE + 0.2, advance(text)
        edge = (
            {"edgecolor": "#5d6775", "linewidth": 0.8, "linestyle": (0, (3, 2))}
            if stop
            else {"edgecolor": "white", "linewidth": 0.5}
        )
        axes.add_patch(
            Rectangle(
                (x + MARGIN - PAD * stop, baseline - 0.165),
                wide + 2 * PAD * stop,
                0.235,
                facecolor=color,
                **edge,
            )
        )
        lead = advance(text[: len(text) - len(text.lstrip(" "))])
        axes.text(
            x + MARGIN + lead,
            baseline,
            text.strip(" "),
            fontsize=SIZE,
            color=ink(color),
            parse_math=False,
        )
    mean = float(weights[: stage.steps].mean()) if stage.steps else 0.0
    bar_axes = figure.add_axes((MARGIN / WIDTH, 0.42 / height, 2.6 / WIDTH, 0.12 / height))
    bar = figure.colorbar(
        plots.plt.cm.ScalarMappable(scale, COLORS), cax=bar_axes, orientation="horizontal"
    )
    bar.set_ticks(ticks_of(scale), labels=[f"{tick:.3g}" for tick in ticks_of(scale)])
    bar.ax.tick_params(labelsize=7.5, length=2)
    for label, side in zip(bar.ax.get_xticklabels(), ("left", "center", "right")):
        label.set_ha(side)
    bar.ax.grid(False)
    bar.outline.set_linewidth(0.5)
    bar.ax.plot([mean, mean], [-0.25, 1.25], color=plots.VERMILION, linewidth=1.4, clip_on=False)
    bar.ax.set_xlim(scale.vmin, scale.vmax)
    words = (
        f"mean attention to a vision token, top-{args.hidden_top_k} layers and heads\nsmallest to"
        f" largest of {whose_scale(instance, args)}"
    )
    axes.text(
        MARGIN + 2.9,
        height - 0.56,
        words,
        fontsize=7.5,
        color="#3d4653",
        va="center",
        linespacing=1.35,
    )
    axes.text(
        MARGIN + 2.9,
        height - 0.29,
        f"mean of this text {mean:.3g}",
        fontsize=7.5,
        color="#B34D00",
        va="center",
    )
    return figure


def shorten(text, room):
    """Text on one line of small type, cut to the room."""
    text = drawable(" ".join(text.split()))
    while advance(text) * 8.5 / SIZE > room:
        text = text[:-2].rstrip(" .") + "\N{HORIZONTAL ELLIPSIS}"
    return text


def main(argv=None):
    args = parse_args(argv)
    instance = read_instance(args.input_dir, args.instance_idx)
    weights = {
        name: token_weights(token_maps(instance, name, args.hidden_top_k))
        for name in instance.stages
    }
    counts = {name: weights[name][: stage.steps] for name, stage in instance.stages.items()}
    for name, stage in instance.stages.items():
        scale = scale_of(counts[name] if args.own_scale else np.concatenate(list(counts.values())))
        rows = named_spans(stage, weights[name], args.top_spans, args.span_length)
        print_spans(instance, stage, rows, float(counts[name].mean()) if stage.steps else 0.0)
        path = Path(args.output_dir) / f"text_heatmap_{instance.index}_{PAGES[name]}_attention"
        plots.write_file(
            f"{path}.html", page_of(instance, stage, weights[name], scale, rows, args).encode()
        )
        settings = vars(args) | {
            "stage": name,
            "model": instance.model,
            "vmin": scale.vmin,
            "vmax": scale.vmax,
        }
        plots.save(draw(instance, stage, weights[name], scale, args), path, settings)
    if instance.missing():
        absent = " and ".join(page for name, page in PAGES.items() if name not in instance.stages)
        print(f"no {absent} page: {instance.missing()}", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main)

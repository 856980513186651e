"""How much of the picture does a model look at while it answers, criticises and revises? One map
over the picture per text, and one per chosen span of tokens.

    c[t, p] = mean of the k largest heads of the mean of the k largest layers of the attention to
    vision token p, in the step that predicted token t
    map of a text [p] = mean over its tokens of c[t, p], stop token not counted; map of a span =
    mean over its tokens
    --paper_compat: of initial response and feedback, the mean of the l largest over t, l = tokens
    of the shorter one, so that the longer text looks brighter
Volcano (arXiv 2311.07362), figure 4 below; our study, sections 1.3 and 2.3 to 2.8.

    python visualize/image_attention_heatmap.py --input-dir outputs/volcano \\
        --output-dir outputs/volcano/figures --instance-idx 8 \\
        --feedback-target-tokens the,red,circle a,blue,square

It reads what run_volcano_with_image_attention.py --output-visualization-tensors left in
--input-dir; text_attention_heatmap.py prints spans to choose from: chosen for their attention, they
are bright by construction. Writes image_heatmap_<idx>_<spans> as .png, .pdf and .csv. All maps
share one scale, the smallest value of all panels to their --quantile; what is above saturates.
Below each map its coverage in numbers: entropy over the log of the number of patches, 1 = even, and
the share of patches that hold 50 % and 90 % of the map's sum. The span that names a thing should
light the thing up."""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.colors import ListedColormap, Normalize

from vlmdiag import cli
from vlmdiag.cli import UsageError
from vlmdiag.figures import plots
from vlmdiag.figures.plots import drawable, visible
from vlmdiag.pictures import overlay
from vlmdiag.pictures.samples import load_image
from vlmdiag.pictures.spread import normalized_entropy
from vlmdiag.volcano.maps import coverage, top_l_mean
from vlmdiag.volcano.tensors import STAGES, find_span, numbers, read_instance, token_maps

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from vlmdiag.pictures.grid import PatchGrid
    from vlmdiag.volcano.tensors import Instance

ALPHA = 0.75  # opacity of a map over the grey picture
PANEL = 2.75  # inches
ELLIPSIS = "\N{HORIZONTAL ELLIPSIS}"


@dataclass(frozen=True)
class Panel:
    """One map. values (P,); tokens: indices that it is the mean over; text: what they say; title
    and statistic are for people."""

    title: str
    stage: str
    statistic: str
    target: str
    occurrence: int
    tokens: list
    text: str
    values: np.ndarray


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--input-dir",
        required=True,
        help="folder with the <index>_<image id> folders of run_volcano_with_image_attention.py",
    )
    parser.add_argument("--output-dir", required=True, help="where the figure goes")
    encoder = (
        "cross-check of the stored grid: patches per side = resolution // patch in the encoder's"
        " name, such as openai/clip-vit-large-patch14-336"
    )
    parser.add_argument("--vision-encoder-name", help=encoder)
    parser.add_argument(
        "--instance-idx",
        type=int,
        required=True,
        help="index of the instance in the list of questions, from 0",
    )
    targets = r"spans, each a comma list of consecutive tokens; \, is a comma"
    parser.add_argument("--feedback-target-tokens", nargs="+", default=[], help=targets)
    parser.add_argument(
        "--occurrence",
        nargs="+",
        type=int,
        default=[1],
        help="which occurrence of a span, from 1; one number for all or one for each",
    )
    parser.add_argument(
        "--stage",
        choices=list(STAGES),
        default="feedback",
        help="text that the spans are looked up in",
    )
    parser.add_argument(
        "--hidden-top-k",
        type=int,
        default=3,
        help="k largest over layers and heads; at most what the run stored",
    )
    parser.add_argument(
        "--quantile",
        type=float,
        default=0.995,
        help="of the values of all panels: the top of the colour scale",
    )
    parser.add_argument(
        "--no_overlay", action="store_true", help="plain patches without the picture"
    )
    parser.add_argument(
        "--paper_compat",
        action="store_true",
        help="the published mean of the l largest and its panels, see above",
    )
    args = parser.parse_args(argv)
    if args.instance_idx < 0 or min(args.hidden_top_k, *args.occurrence) < 1:
        parser.error("--instance-idx starts at 0, --hidden-top-k and --occurrence at 1")
    if not 0 < args.quantile <= 1:
        parser.error("--quantile is above 0 and at most 1")
    if len(args.occurrence) == 1:
        args.occurrence *= len(args.feedback_target_tokens)
    if len(args.occurrence) != len(args.feedback_target_tokens):
        parser.error(
            f"--occurrence has {len(args.occurrence)} numbers for"
            f" {len(args.feedback_target_tokens)} spans; give one, or one for each"
        )
    return args


# ---- what is shown ----


def side_of(encoder):
    """Patches per side that an encoder's name says: resolution // patch, resolution 224 where it
    names none."""
    found = re.findall(r"patch[-_]?(\d+)(?:[-_](\d+))?", encoder)
    if not found or not int(found[-1][0]):
        raise UsageError(
            f"--vision-encoder-name {encoder}: no patch size in the name, such as in"
            " openai/clip-vit-large-patch14-336; leave the flag out"
        )
    patch, resolution = found[-1]
    return int(resolution or 224) // int(patch)


def check_encoder(instance, encoder):
    side, shape = side_of(encoder), instance.grid.shape
    if shape != (side, side):
        stored = f"{shape[0]} x {shape[1]} patches" if shape else "no single regular grid"
        own = ", ".join(
            f"{name.replace('_', ' ')} {value}"
            for name, value in instance.vision_encoder.items()
            if value
        )
        said = f"{stored}{f' ({own})' if own else ''}"
        raise UsageError(
            f"--vision-encoder-name {encoder} means {side} x {side} patches, but"
            f" {instance.folder.name} has {said}; leave the flag out"
        )


def panels_of(instance, args):
    """The maps of the texts, then of the spans."""
    maps = {name: token_maps(instance, name, args.hidden_top_k) for name in instance.stages}
    texts = [
        name
        for name, stage in instance.stages.items()
        if stage.steps and not (args.paper_compat and name == "revision")
    ]
    if args.paper_compat and {"initial", "feedback"} - set(texts):
        raise UsageError(
            "--paper_compat compares initial response and feedback;"
            f" {instance.missing() or 'one of them has no token'}"
        )
    limit = min((instance.stages[name].steps for name in texts), default=0)
    panels = []
    for name in texts:
        stage, steps = instance.stages[name], instance.stages[name].steps
        kept = limit if args.paper_compat else steps
        statistic = (
            f"mean of the {kept} largest of {steps} steps"
            if args.paper_compat
            else f"mean over {steps} step{'s' * (steps > 1)}"
        )
        values = top_l_mean(maps[name][:steps], kept)
        panels.append(
            Panel(
                f"{name.capitalize()} (all tokens)",
                name,
                statistic,
                "",
                0,
                list(range(steps)),
                stage.text.strip(),
                values,
            )
        )
    if args.feedback_target_tokens and args.stage not in instance.stages:
        raise UsageError(
            f"{instance.missing()}; --stage initial takes the spans from the initial response"
        )
    for target, occurrence in zip(args.feedback_target_tokens, args.occurrence):
        stage = instance.stages[args.stage]
        tokens = find_span(stage.tokens, stage.spans, stage.text, target, occurrence)
        pieces = stage.pieces()
        text = "".join(pieces[i] for i in tokens).strip()
        said = text if len(text) <= 40 else text[:39].rstrip() + ELLIPSIS
        title = (
            f"{args.stage.capitalize()}"
            f" \N{LEFT DOUBLE QUOTATION MARK}{said}\N{RIGHT DOUBLE QUOTATION MARK}"
        )
        statistic = f"mean over token{'s' * (len(tokens) > 1)} {numbers(tokens)}"
        panels.append(
            Panel(
                title,
                args.stage,
                statistic,
                target,
                occurrence,
                tokens,
                text,
                maps[args.stage][tokens].mean(0),
            )
        )
    if not panels:
        raise UsageError(f"{instance.folder}: no text has a token that counts, so there is no map")
    return panels


def scale_of(panels, grid, quantile):
    """(vmin, vmax): the smallest value of all panels and their quantile, a value that occurs (the
    nearest rank, as published). Tokens with a box only."""
    values = np.concatenate([panel.values[grid.has_box] for panel in panels])
    return float(values.min()), float(np.quantile(values, quantile, method="nearest"))


def numbers_of(panel, grid):
    """Coverage of a map, over the vision tokens that have a box."""
    values = panel.values[grid.has_box]
    return {
        "mean": float(values.mean()),
        "min": float(values.min()),
        "max": float(values.max()),
        "normalized_entropy": normalized_entropy(values),
        "share_of_patches_with_50_percent": coverage(values, 0.5),
        "share_of_patches_with_90_percent": coverage(values, 0.9),
    }


def tag_of(args):
    """The spans as part of a file name: rather,silver,._the,red,c; 'all' without spans; what else
    changes the maps behind two underscores."""
    spans = (
        "_".join(
            target + f"~{n}" * (n > 1)
            for target, n in zip(args.feedback_target_tokens, args.occurrence)
        )
        or "all"
    )
    tag = re.sub(r"[^\w,.'()+=~-]", "-", spans)
    if len(tag.encode()) > 120:
        tag = (
            tag.encode()[:100].decode(errors="ignore")
            + "~"
            + hashlib.sha256(spans.encode()).hexdigest()[:8]
        )
    other = [args.stage] if args.feedback_target_tokens and args.stage != "feedback" else []
    other += [name for name in ("paper_compat", "no_overlay") if getattr(args, name)]
    return "".join([tag, *(f"__{name}" for name in other)])


# ---- figure ----


def read_picture(instance):
    try:
        picture = load_image(instance.image)
    except (OSError, ValueError) as error:
        raise UsageError(f"{error}; --no_overlay draws the patches without the picture") from error
    if picture.size != tuple(instance.grid.size):
        sizes = (
            f"{picture.width} x {picture.height} pixels, and {instance.grid.size[0]} x"
            f" {instance.grid.size[1]} were measured"
        )
        raise UsageError(
            f"{instance.image} has {sizes}: another picture; --no_overlay draws the patches"
            " without it"
        )
    return picture


def draw(
    instance: Instance,
    panels: Sequence[Panel],
    scale: tuple[float, float],
    args: argparse.Namespace,
) -> Figure:
    """The picture and the maps, coverage below each, one colour bar. scale: (vmin, vmax)."""
    grid, (vmin, vmax) = instance.grid, scale
    picture = None if args.no_overlay else read_picture(instance)
    normalize = Normalize(vmin, vmax if vmax > vmin else vmin + max(abs(vmin), 1e-12))
    count = len(panels) + (picture is not None)
    figure, axes = panel_axes(count, _ratio(grid, picture is None))
    colors = plots.plt.get_cmap("viridis")
    grey = None
    if picture is not None:
        picture = overlay.at_pixel_size(picture)
        grid = overlay.rescaled(grid, picture.size)
        grey = overlay.pale(picture, darkest=0.35)
        overlay.show_picture(axes[0], np.asarray(picture))
        axes[0].set_title("Picture", fontsize=10)
        # of the colour bar: the map over the picture's mean grey
        opaque = colors(np.linspace(0, 1, 256))[:, :3]
        colors = ListedColormap(ALPHA * opaque + (1 - ALPHA) * grey.mean())
    for axis, panel in zip(axes[count - len(panels) :], panels):
        draw_map(axis, panel.values, grid, normalize, grey)
        axis.set_title(textwrap.fill(drawable(panel.title), 32), fontsize=10, parse_math=False)
        axis.set_xlabel(_coverage(panel, instance.grid), fontsize=7.5)
    bar = overlay.color_bar(
        figure, normalize, colors, ax=axes, extend="max", aspect=30, pad=0.015, fraction=0.04
    )
    bar.set_label(
        f"attention to a vision token\n(top-{args.hidden_top_k} layers and heads)", fontsize=8
    )
    bar.ax.tick_params(labelsize=7.5)
    bar.ax.ticklabel_format(style="sci", scilimits=(-2, 2), useMathText=True)
    bar.ax.yaxis.get_offset_text().set_fontsize(7.5)
    title = _title(instance, args, int(11.2 * figure.get_figwidth()))
    figure.suptitle(title, fontsize=10, parse_math=False)
    return figure


def panel_axes(count: int, ratio: float) -> tuple[Figure, list[Axes]]:
    """A figure with so many panels, each `ratio` times as high as wide, without ticks and frame."""
    columns = count
    if count > 4:
        columns = 3 if count in (5, 6, 9) else 4
    rows = -(-count // columns)
    width = max(columns * PANEL + 0.9, 5.2)
    figure = plots.plt.figure(figsize=(width, rows * (PANEL * ratio + 0.78) + 0.6))
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.set(xticks=[], yticks=[])
        axis.grid(False)
        axis.spines[:].set_visible(False)
    for axis in axes[count:]:
        axis.remove()
    return figure, list(axes[:count])


def _ratio(grid: PatchGrid, cells_alone: bool) -> float:
    """Height over width of a panel: of the picture, or of the cells, which may reach past it."""
    left, top, right, bottom = (0, 0, *grid.size)
    if cells_alone:
        left, top = np.nanmin(grid.boxes[:, :2], 0)
        right, bottom = np.nanmax(grid.boxes[:, 2:], 0)
    return float(np.clip((bottom - top) / (right - left), 0.4, 1.6))


def _coverage(panel: Panel, grid: PatchGrid) -> str:
    """What is written below a map."""
    shown = numbers_of(panel, grid)
    half = 100 * shown["share_of_patches_with_50_percent"]
    most = 100 * shown["share_of_patches_with_90_percent"]
    return (
        f"{panel.statistic}: {shown['mean']:.3g}\nentropy {shown['normalized_entropy']:.3f}\n50"
        f" % in {half:.0f} %, 90 % in {most:.0f} % of patches"
    )


def _title(instance: Instance, args: argparse.Namespace, width: int) -> str:
    """What is shown, and of which question, in lines of so many characters."""
    how = "mean over the steps of each text"
    if args.paper_compat:
        how = "mean of the l largest steps (published)"
    refused = ", no revision accepted" if len(instance.stages) > 1 and not instance.accepted else ""
    question = textwrap.shorten(
        f"{Path(instance.model).name}, instance {instance.index}: {instance.question}",
        2 * width - 20,
        placeholder=ELLIPSIS,
    )
    title = textwrap.fill(f"Attention to the picture, {how}{refused}", width)
    return f"{title}\n{textwrap.fill(drawable(question), width)}"


def draw_map(
    axis: Axes,
    values: np.ndarray,
    grid: PatchGrid,
    normalize: Normalize,
    grey: np.ndarray | None = None,
) -> None:
    """One map (P,) over the pale picture, or as plain patches where there is none."""
    if grey is not None:
        overlay.show_picture(axis, grey)
        overlay.show_map(axis, grid.paint(values), "viridis", ALPHA, normalize)
    elif grid.shape is not None:
        rows, columns = grid.shape
        (left, top), (right, bottom) = grid.boxes[0, :2], grid.boxes[rows * columns - 1, 2:]
        axis.imshow(
            values[: rows * columns].reshape(rows, columns),
            cmap="viridis",
            norm=normalize,
            extent=(left, right, bottom, top),
            interpolation="nearest",
        )
    else:
        overlay.show_map(axis, grid.paint(values, smooth=False), "viridis", None, normalize)


def save_numbers(path, panels, scale, instance, args):
    rows = [
        {
            "panel": panel.title,
            "stage": panel.stage,
            "statistic": panel.statistic,
            "target": panel.target,
            "occurrence": panel.occurrence or "",
            "text": visible(panel.text),
            "tokens": numbers(panel.tokens),
            "steps": len(panel.tokens),
        }
        | numbers_of(panel, instance.grid)
        | {
            "vmin": scale[0],
            "vmax": scale[1],
            "quantile": args.quantile,
            "hidden_top_k": args.hidden_top_k,
        }
        for panel in panels
    ]
    plots.save_csv(path, {name: [row[name] for row in rows] for name in rows[0]})


def main(argv=None):
    args = parse_args(argv)
    instance = read_instance(args.input_dir, args.instance_idx)
    if not instance.grid.has_box.any():
        raise UsageError(
            f"{instance.folder}: where the vision tokens of {instance.model} lie in the picture"
            " (grid) is unknown, so no map can be drawn"
        )
    if args.vision_encoder_name:
        check_encoder(instance, args.vision_encoder_name)
    panels = panels_of(instance, args)
    scale = scale_of(panels, instance.grid, args.quantile)
    path = Path(args.output_dir) / f"image_heatmap_{instance.index}_{tag_of(args)}"
    settings = vars(args) | {
        "vmin": scale[0],
        "vmax": scale[1],
        "model": instance.model,
        "image": instance.image,
        "panels": [panel.title for panel in panels],
    }
    figure = draw(instance, panels, scale, args)
    save_numbers(f"{path}.csv", panels, scale, instance, args)
    plots.save(figure, f"{path}.png", settings)
    if instance.missing():
        print(f"no map of {instance.missing()}", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main)

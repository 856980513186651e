"""What did each word of an answer come from? Relevancy over the picture for every generated token,
and of the words of question and answer.

    python diagnostic_tools/viz_relevancy.py --run_dir runs/relevancy/tiny-llava \\
        --image_folder data/shapes/val2017
    python diagnostic_tools/viz_relevancy.py --run_dir runs/relevancy/tiny-llava \\
        --image_folder data/shapes/val2017 --image_key 000000000001 --token 4

Reads the run of relevancy_maps.py, loads no model. Writes analysis/<id>_tokens (one overlay a token
at --layer, one colour scale for all) or, with --token, analysis/<id>_token<i>: the map up to each
layer, and bars for question and earlier answer. Colours show the relevancy itself, from 0
(--ceiling sets the top). --sinks hide leaves out the vision tokens whose norm is an outlier, which
glow whatever is asked; the title says how many.
"""

from pathlib import Path

import numpy as np
import torch

from vlmdiag import cli
from vlmdiag.cli import UsageError
from vlmdiag.figures import plots
from vlmdiag.pictures.grid import PatchGrid
from vlmdiag.pictures.samples import load_image
from vlmdiag.relevancy import rules
from vlmdiag.runs import rundirs

EXPERIMENT = "relevancy"
SHOWN = 480  # pixels of the longer side of a picture


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("--run_dir", required=True, help="run of relevancy_maps.py")
    parser.add_argument("--image_folder", required=True, help="where the pictures are")
    parser.add_argument(
        "--image_key", default=None, help="part of one item's id; None: the first --num_images"
    )
    parser.add_argument("--num_images", type=int, default=4, help="how many are drawn")
    parser.add_argument(
        "--layer",
        type=int,
        default=None,
        help="layer up to which relevancy is gathered; None: the last one measured",
    )
    parser.add_argument(
        "--token", type=int, default=None, help="one token in detail, by its index in the answer"
    )
    parser.add_argument("--max_tokens", type=int, default=24, help="overlays in one figure")
    parser.add_argument(
        "--ceiling",
        type=float,
        default=None,
        help="relevancy at the top of the colours; None: the largest shown",
    )
    parser.add_argument(
        "--sinks",
        choices=["keep", "hide"],
        default="keep",
        help="hide: leave out vision tokens of outlying norm",
    )
    return parser.parse_args(argv)


class Maps:
    """What the run holds of one item."""

    def __init__(self, run, id, folder, hide):
        self.record, arrays = run.record(id), run.arrays(id)
        if self.record["grid"] is None:
            raise UsageError(
                f"{run.path}: where the vision tokens lie in the picture (grid) is unknown for this"
                " model, so nothing can be drawn on it"
            )
        self.rows, groups = arrays["rows"], self.record["groups"]
        self.vision = np.array([group == "vision" for group in groups])
        self.cells = arrays.get("cells", self.rows[..., self.vision]).copy()
        self.hidden = 0
        if hide:
            norms = torch.from_numpy(arrays["vision_norms"])
            out = rules.sinks(norms).numpy()
            if len(out) != self.cells.shape[-1]:
                raise UsageError(
                    "--sinks hide: the maps are over the tower's patches, whose norms the run does"
                    " not hold"
                )
            self.cells[..., out], self.hidden = np.nan, int(out.sum())
        picture = load_image(Path(folder) / self.record["file_name"])
        scale = SHOWN / max(picture.size)
        self.picture = picture.resize((round(picture.width * scale), round(picture.height * scale)))
        shape = self.record["grid"]["shape"]
        size = self.record["grid"]["size"]
        factors = np.array([self.picture.width / size[0], self.picture.height / size[1]] * 2)
        self.grid = PatchGrid(arrays["boxes"] * factors, shape and tuple(shape), self.picture.size)

    def overlay(self, ax, values, ceiling, title):
        """One map over the picture."""
        ax.imshow(np.asarray(self.picture.convert("L").convert("RGB"), float) / 255 * 0.5 + 0.5)
        painted = np.nan_to_num(self.grid.paint(np.nan_to_num(values), smooth=not self.hidden))
        shade = np.sqrt(np.clip(painted / ceiling, 0, 1))  # what has no relevancy shows the picture
        heat = ax.imshow(
            painted, cmap="YlOrRd", vmin=0, vmax=ceiling, alpha=0.9 * shade, interpolation="nearest"
        )
        ax.set_title(title, fontsize=8.5)
        ax.set(xticks=[], yticks=[])
        return heat

    def words(self, token):
        """[(title, labels, positions), ...]: question, and earlier answer."""
        groups, labels = self.record["groups"], self.record["labels"]
        first = len(labels) - len(self.record["tokens"])
        question = [i for i, group in enumerate(groups[:first]) if group == "user"]
        return [
            ("question", [labels[i] for i in question], question),
            ("earlier answer", labels[first : first + token], list(range(first, first + token))),
        ]


def where(layers, layer):
    if layer is not None and layer not in layers:
        raise UsageError(f"--layer {layer}: the run holds layers {', '.join(map(str, layers))}")
    return len(layers) - 1 if layer is None else layers.index(layer)


def shown(text):
    return plots.drawable(text).replace("$", r"\$").strip() or repr(text)


def _bar(fig, heat, axes):
    solid = plots.plt.cm.ScalarMappable(heat.norm, heat.cmap)
    fig.colorbar(solid, ax=axes, label="relevancy", shrink=0.7, aspect=25).ax.grid(False)


def draw_tokens(maps, id, args, path):
    """One overlay a token."""
    record, k = maps.record, where(maps.record["layers"], args.layer)
    count = min(args.max_tokens, len(record["tokens"]))
    columns = min(6, count)
    lines = -(-count // columns)
    ceiling = args.ceiling or float(np.nanmax(maps.cells[:count, k])) or 1.0
    fig, axes = plots.plt.subplots(
        lines, columns, figsize=(2.3 * columns + 0.8, 2.6 * lines + 0.6), squeeze=False
    )
    for ax in axes.flat:
        ax.set_axis_off()
    for token, ax in zip(range(count), axes.flat):
        share, probability = record["visual_share"][token][k], record["probabilities"][token]
        share = "no relevancy" if share is None or np.isnan(share) else f"visual share {share:.2f}"
        heat = maps.overlay(
            ax,
            maps.cells[token, k],
            ceiling,
            f"{token}: {shown(record['tokens'][token])}\np = {probability:.2f}, {share}",
        )
    _bar(fig, heat, axes)
    more = (
        f", first {count} of {len(record['tokens'])} tokens"
        if count < len(record["tokens"])
        else ""
    )
    hidden = f", {maps.hidden} sinks hidden" if args.sinks == "hide" else ""
    fig.suptitle(
        f"{shown(record['question'][:90])}\nlayer {record['layers'][k]}{more}{hidden}", fontsize=9.5
    )
    return plots.save(fig, path.parent / f"{id}_tokens", settings(args, record, k))


def draw_token(maps, id, args, path):
    """One token: the map up to each layer, and what question and earlier answer contribute at
    --layer."""
    record, token = maps.record, args.token
    if not 0 <= token < len(record["tokens"]):
        raise UsageError(
            f"--token {token}: the answer has {len(record['tokens'])} tokens, counted from 0"
        )
    k = where(record["layers"], args.layer)
    chosen = sorted(
        {round(i) for i in np.linspace(0, len(record["layers"]) - 1, min(6, len(record["layers"])))}
        | {k}
    )[-6:]
    ceiling = args.ceiling or float(np.nanmax(maps.cells[token, chosen])) or 1.0
    words = maps.words(token)
    fig = plots.plt.figure(figsize=(2.3 * len(chosen) + 0.8, 6.2), layout="constrained")
    top, bottom = fig.subfigures(2, 1, height_ratios=(1, 1))
    axes = top.subplots(1, len(chosen), squeeze=False)[0]
    for ax, layer in zip(axes, chosen):
        heat = maps.overlay(
            ax, maps.cells[token, layer], ceiling, f"up to layer {record['layers'][layer]}"
        )
    _bar(top, heat, axes)
    bars = bottom.subplots(
        1, 2, width_ratios=[max(3, len(labels)) for _, labels, _ in words], sharey=True
    )
    for ax, (title, labels, positions) in zip(bars, words):
        values = maps.rows[token, k, positions]
        ax.bar(
            range(len(labels)), values, color=plots.ORANGE if title == "question" else plots.GREEN
        )
        ax.set_xticks(
            range(len(labels)),
            [shown(label) for label in labels],
            rotation=60,
            ha="right",
            fontsize=8,
        )
        ax.set_title(
            f"{title}, layer {record['layers'][k]}" if labels else f"{title}: none yet", fontsize=9
        )
        ax.grid(axis="x", visible=False)
    bars[0].set_ylabel("relevancy")
    share = record["visual_share"][token][k]
    fig.suptitle(
        f"{shown(record['question'][:90])} -> token {token}: {shown(record['tokens'][token])} (p ="
        f" {record['probabilities'][token]:.2f}, visual share"
        f" {'none' if share is None else format(share, '.2f')})",
        fontsize=9.5,
    )
    return plots.save(fig, path.parent / f"{id}_token{token}", settings(args, record, k))


def settings(args, record, k):
    return {
        "run": Path(args.run_dir).name,
        "picture": record["file_name"],
        "layer": record["layers"][k],
        "token": args.token,
        "sinks": args.sinks,
    }


def main(argv=None):
    args = parse_args(argv)
    run = rundirs.read_run(args.run_dir, EXPERIMENT)
    ids = run.ids()
    ids = [plots.find_id(ids, args.image_key)] if args.image_key else ids[: args.num_images]
    if not ids:
        raise UsageError(f"{run.path} has no finished picture yet; run relevancy_maps.py first")
    for id in ids:
        maps = Maps(run, id, args.image_folder, args.sinks == "hide")
        (draw_tokens if args.token is None else draw_token)(
            maps, id, args, run.path / "analysis" / id
        )
    return 0


if __name__ == "__main__":
    cli.run(main)

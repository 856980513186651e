"""How much of the picture does a model look at while it answers, criticises and revises? One map
over the picture per text, and one per chosen span of tokens.

    c[t, p] = mean of the k largest heads of the mean of the k largest layers of the attention to
    vision token p, in the step that predicted token t
    map of a text [p] = mean over its tokens of c[t, p], stop token not counted; map of a span =
    mean over its tokens
    --paper_compat: of initial response and feedback, the mean of the l largest over t, l = tokens
    of the shorter one, so that the longer text looks brighter
Volcano (arXiv 2311.07362), figure 4 below; docs/studies/volcano.md, sections 1.3 and
2.3 to 2.8.

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
import sys
from collections.abc import Sequence
from pathlib import Path

from vlmdiag import cli
from vlmdiag.cli import UsageError
from vlmdiag.volcano.tensors import STAGES, read_instance


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--input-dir",
        required=True,
        help="folder with the <index>_<image id> folders of run_volcano_with_image_attention.py",
    )
    parser.add_argument("--out_dir", "--output-dir", required=True, help="where the figure goes")
    encoder = (
        "cross-check of the stored grid: patches per side = resolution // patch in the encoder's"
        " name, such as openai/clip-vit-large-patch14-336"
    )
    parser.add_argument("--vision-encoder-name", help=encoder)
    parser.add_argument(
        "--instance-idx",
        type=cli.count,
        required=True,
        help="index of the instance in the list of questions, from 0",
    )
    targets = r"spans, each a comma list of consecutive tokens; \, is a comma"
    parser.add_argument("--feedback-target-tokens", nargs="+", default=[], help=targets)
    parser.add_argument(
        "--occurrence",
        nargs="+",
        type=cli.positive,
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
        type=cli.positive,
        default=3,
        help="k largest over layers and heads; at most what the run stored",
    )
    parser.add_argument(
        "--quantile",
        type=cli.number(0, 1, above=True),
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
    if len(args.occurrence) == 1:
        args.occurrence *= len(args.feedback_target_tokens)
    if len(args.occurrence) != len(args.feedback_target_tokens):
        parser.error(
            f"--occurrence has {len(args.occurrence)} numbers for"
            f" {len(args.feedback_target_tokens)} spans; give one, or one for each"
        )
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    instance = read_instance(args.input_dir, args.instance_idx)
    if not instance.grid.has_box.any():
        raise UsageError(
            f"{instance.folder}: where the vision tokens of {instance.model} lie in the picture"
            " (grid) is unknown, so no map can be drawn"
        )
    from vlmdiag.figures import plots
    from vlmdiag.volcano.image_figure import draw
    from vlmdiag.volcano.panels import check_encoder, panels_of, scale_of, table_of, tag_of

    if args.vision_encoder_name:
        check_encoder(instance, args.vision_encoder_name)
    panels = panels_of(instance, args)
    scale = scale_of(panels, instance.grid, args.quantile)
    path = Path(args.out_dir) / f"image_heatmap_{instance.index}_{tag_of(args)}"
    settings = vars(args) | {
        "vmin": scale[0],
        "vmax": scale[1],
        "model": instance.model,
        "image": instance.image,
        "panels": [panel.title for panel in panels],
    }
    figure = draw(instance, panels, scale, args)
    plots.save_csv(f"{path}.csv", table_of(panels, scale, instance.grid, args))
    plots.save(figure, f"{path}.png", settings)
    if instance.missing():
        print(f"no map of {instance.missing()}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    cli.run(main)

"""Which tokens of an answer, a critique and a revision look at the picture? The texts of one
instance, each token coloured by its attention to the picture.

    w[t] = mean over the P vision tokens of c[t, p], c[t, p] = mean of the k largest heads of the
    mean of the k largest layers, k = --hidden_top_k,
    in the step that predicted token t: its query is the token before. Weights are those of the
    softmax over the whole prompt, stop token not counted.
Volcano (arXiv 2311.07362), figure 4 above; docs/studies/volcano.md, sections 1.2 and 2.6.

    python visualize/text_attention_heatmap.py --input-dir outputs/volcano \\
        --output-dir outputs/volcano/figures --instance-idx 8

It reads what run_volcano_with_image_attention.py --output-visualization-tensors left in
--input-dir. Writes text_heatmap_<idx>_q2i_attention (initial response), _f2i_ (feedback) and _r2i_
(revision), each as .html, .png and .pdf, and prints the strongest spans as comma lists for
image_attention_heatmap.py --feedback-target-tokens. One colour scale for the three, smallest to
largest weight, so that colours compare; --own_scale gives each text its own, as published. Words
that name things should be darker than those between them."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vlmdiag import cli
from vlmdiag.volcano.tensors import Instance, Stage, read_instance, token_maps, token_weights

if TYPE_CHECKING:
    from vlmdiag.volcano.text_page import NamedSpan

# letters in the names of the files
PAGES = {"initial": "q2i", "feedback": "f2i", "revision": "r2i"}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--input-dir",
        required=True,
        help="folder with the <index>_<image id> folders of run_volcano_with_image_attention.py",
    )
    parser.add_argument(
        "--out_dir", "--output-dir", required=True, help="where pages and figures go"
    )
    parser.add_argument(
        "--instance-idx",
        type=cli.count,
        required=True,
        help="index of the instance in the list of questions, from 0",
    )
    parser.add_argument(
        "--hidden-top-k",
        type=cli.positive,
        default=3,
        help="k largest over layers and heads; at most what the run stored",
    )
    parser.add_argument(
        "--own_scale",
        action="store_true",
        help="a colour scale for each text; else one for all, so that colours compare",
    )
    parser.add_argument(
        "--top_spans", type=cli.count, default=5, help="how many of the strongest spans to print"
    )
    parser.add_argument("--span_length", type=cli.positive, default=3, help="tokens of such a span")
    return parser.parse_args(argv)


def print_spans(instance: Instance, stage: Stage, spans: Sequence[NamedSpan], mean: float) -> None:
    """The strongest spans, and as flags of image_attention_heatmap.py."""
    from vlmdiag.volcano.text_page import size_of, times

    heading = f"{instance.title(stage.name)}: {size_of(stage)}, mean weight {mean:.3g}"
    if not spans:
        print(heading)
        return
    print(f"{heading}; strongest spans:")
    for span in spans:
        place = f"token {span.start}"
        if span.end - span.start > 1:
            place = f"tokens {span.start}-{span.end - 1}"
        if span.occurrence > 1:
            place += f", occurrence {span.occurrence}"
        print(
            f"  {span.weight:.3g}  {times(span.weight, mean)}  {shlex.quote(span.target)}  {place}"
        )
    flags = ["--feedback-target-tokens"]
    for span in spans:
        # a leading blank keeps argparse from seeing a flag
        target = f" {span.target}" if span.target.startswith("-") else span.target
        flags.append(shlex.quote(target))
    if any(span.occurrence > 1 for span in spans):
        flags += ["--occurrence", *(str(span.occurrence) for span in spans)]
    if stage.name != "feedback":
        flags += ["--stage", stage.name]
    print(f"  {' '.join(flags)}")


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    instance = read_instance(args.input_dir, args.instance_idx)
    weights = {
        name: token_weights(token_maps(instance, name, args.hidden_top_k))
        for name in instance.stages
    }
    from vlmdiag.figures import plots
    from vlmdiag.volcano import text_figure, text_page

    k = args.hidden_top_k
    counted = {name: weights[name][: stage.steps] for name, stage in instance.stages.items()}
    for name, stage in instance.stages.items():
        of_scale = counted[name] if args.own_scale else np.concatenate(list(counted.values()))
        scale = text_page.scale_of(of_scale)
        spans = text_page.named_spans(stage, weights[name], args.top_spans, args.span_length)
        print_spans(instance, stage, spans, text_page.mean_weight(stage, weights[name]))
        path = Path(args.out_dir) / f"text_heatmap_{instance.index}_{PAGES[name]}_attention"
        page = text_page.page_of(instance, stage, weights[name], scale, spans, k, args.own_scale)
        plots.write_file(f"{path}.html", page.encode())
        figure = text_figure.draw(instance, stage, weights[name], scale, k, args.own_scale)
        settings = vars(args) | {
            "stage": name,
            "model": instance.model,
            "vmin": scale.vmin,
            "vmax": scale.vmax,
        }
        plots.save(figure, path, settings)
    if instance.missing():
        absent = " and ".join(page for name, page in PAGES.items() if name not in instance.stages)
        print(f"no {absent} page: {instance.missing()}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    cli.run(main)

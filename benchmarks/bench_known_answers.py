"""What is saved where a measured answer is known beforehand, or nearly so?

    # the random model of the other benchmarks: answers that are given
    python benchmarks/bench_known_answers.py --threads 1
    # a trained one: also those of other vision scales, with the plain answer as the draft
    python benchmarks/bench_known_answers.py --threads 1 \\
        --model_path checkpoints/smol-llava-135m --vision_scale 0.8 0.5 0.2
    # a very small shape, only to see that it runs
    python benchmarks/bench_known_answers.py --quick

The work is run_coco_diagnostics.py's own process(), all probes on, picture by picture, after the
pictures are loaded and without files. Two variants: token by token, as without --drafts and as
--answers would be if each token had a pass of its own, and ours, several tokens in a pass
(vlmdiag/model/drafts.py). First, in float32, all is compared: ids equal, numbers within 1e-5.
Then the variants alternate in one process, in reverse order every other round; times are CPU times
of the process, on a GPU wall times. "agreed" is the share of the tokens that one pass took from the
draft. Out come a Markdown table and, with --out, all figures.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks import measuring
from benchmarks.cases import SIZES, build, make_samples
from vlmdiag import cli
from vlmdiag.types import Record

if TYPE_CHECKING:
    from vlmdiag.beyond_semantics.diagnostics import Arrays
    from vlmdiag.pictures.samples import Pictures, Sample

TOLERANCE = 1e-5
ALONE, TOGETHER = "token by token", "ours"
Results = list[tuple[Record, "Arrays"]]
Loaded = Sequence[tuple["Sample", "Pictures"]]


def works_of(
    vlm: Any, loaded: Loaded, new_tokens: int, scales: Sequence[float]
) -> dict[str, dict[str, Callable[[], Results]]]:
    """{what is measured: {variant: work}}."""
    from vlmdiag.beyond_semantics.diagnostics import Measures, make_process
    from vlmdiag.model import decoding

    def run(loaded: Loaded, scale: float, token_by_token: bool, as_drafts: bool = False) -> Results:
        measures = Measures(
            max_new_tokens=new_tokens,
            restrict_to_past=True,
            probe_hidden_norms=True,
            vision_scale=scale,
        )
        process = make_process(vlm, measures, as_drafts=as_drafts)
        several = decoding.known.can_verify
        if token_by_token:
            decoding.known.can_verify = lambda vlm, cache: False
        try:
            return [result for item in loaded for result in process([item])]
        finally:
            decoding.known.can_verify = several

    given = [
        (replace(sample, given=tuple(record["generated_ids"])), pictures)
        for (sample, pictures), (record, _) in zip(loaded, run(loaded, 1.0, True), strict=True)
    ]
    works = {
        "answers that are given": {
            ALONE: partial(run, given, 1.0, True),
            TOGETHER: partial(run, given, 1.0, False),
        }
    }
    for scale in scales:
        works[f"vision scale {scale:g}"] = {
            ALONE: partial(run, loaded, scale, True),
            TOGETHER: partial(run, given, scale, False, as_drafts=True),
        }
    return works


def check(alone: Results, together: Results) -> float:
    """The largest difference of two variants, relative where numbers exceed 1; AssertionError where
    answers differ or numbers by more than TOLERANCE."""
    worst = 0.0
    for (record, arrays), (other, others) in zip(alone, together, strict=True):
        if record["generated_ids"] != other["generated_ids"]:
            raise AssertionError(f"other captions: {record['caption']!r}, {other['caption']!r}")
        pairs = [(arrays[name], others[name]) for name in arrays]
        pairs += [(record["shares"][name], other["shares"][name]) for name in record["shares"]]
        for one, two in pairs:
            wanted = np.asarray(one)
            gap = np.abs(np.asarray(two) - wanted) / np.maximum(1, np.abs(wanted))
            worst = max(worst, float(np.nanmax(gap)))
    # a NaN is not <= either
    if not worst <= TOLERANCE:
        raise AssertionError(f"numbers differ by {worst:.2g}, more than {TOLERANCE:g}")
    return worst


def measure(
    works: dict[str, dict[str, Callable[[], Results]]], repeats: int, pictures: int
) -> list[measuring.Row]:
    """Two rows for each work."""
    from vlmdiag.model import drafts

    rows: list[measuring.Row] = []
    for what, variants in works.items():
        drafts.counted()
        busy = {name: partial(measuring.busy_seconds_of, work) for name, work in variants.items()}
        rounds = measuring.alternating(busy, repeats)
        counts = drafts.counted()
        share = counts["draft_agreed"] / counts["draft_tokens"] if counts["draft_tokens"] else 1.0
        for name in variants:
            seconds = [of_round[name] / pictures for of_round in rounds]
            faster = [of_round[ALONE] / of_round[name] for of_round in rounds]
            rows.append(
                {
                    "measured": what,
                    "variant": name,
                    "agreed": share if name == TOGETHER else None,
                    "seconds": seconds,
                    "alone_to_this": float(np.median(faster)),
                }
            )
    return rows


def table(rows: Sequence[measuring.Row]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| measured | variant | agreed | s per picture: median (min-max) | times as fast |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        seconds = row["seconds"]
        agreed = "-" if row["agreed"] is None else f"{row['agreed']:.2f}"
        spread = f"{np.median(seconds):.3f} ({min(seconds):.3f}-{max(seconds):.3f})"
        lines.append(
            f"| {row['measured']} | {row['variant']} | {agreed} | {spread}"
            f" | {row['alone_to_this']:.2f} |"
        )
    return "\n".join(lines)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument("--size", choices=list(SIZES), default="small", help="shape of the model")
    parser.add_argument(
        "--prompt", type=cli.whole(50), default=620, help="about how many prompt tokens"
    )
    parser.add_argument(
        "--model_path", default=None, help="a trained model in place of the random one of --size"
    )
    parser.add_argument(
        "--vision_scale",
        type=cli.scale,
        nargs="*",
        default=[],
        help="scales that are measured with the plain answers as drafts",
    )
    parser.add_argument("--pictures", type=cli.positive, default=4, help="one after the other")
    parser.add_argument("--new_tokens", type=cli.positive, default=64, help="tokens of an answer")
    measuring.add_arguments(parser)
    args = parser.parse_args(argv)
    if args.quick:
        args.size = "quick"
        args.prompt = 121
        args.pictures = 2
        args.repeats = 1
        args.new_tokens = 6
        args.vision_scale = [0.5]
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    from common import load_model
    from vlmdiag.pictures.samples import with_pictures
    from vlmdiag.scenes.scene import floor_scene, render

    device, dtype = measuring.prepare(args)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        samples = make_samples(folder, args.pictures)
        if args.model_path is None:
            vlm = build(args.size, args.prompt, device, folder)
        else:
            vlm = load_model(args.model_path, device)
            for seed, sample in enumerate(samples):
                render(floor_scene(Random(seed), 3, square=False)).save(sample.image)
        loaded = [with_pictures(sample) for sample in samples]
        works = works_of(vlm, loaded, args.new_tokens, args.vision_scale)
        gaps = [check(*(work() for work in variants.values())) for variants in works.values()]
        if dtype != vlm.dtype:
            vlm.model.to(dtype)
            works = works_of(vlm, loaded, args.new_tokens, args.vision_scale)
        rows = measure(works, args.repeats, args.pictures)
    report: dict[str, Any] = {
        "size": args.size,
        "model_path": args.model_path,
        "prompt": args.prompt,
        "new_tokens": args.new_tokens,
        "pictures": args.pictures,
        "repeats": args.repeats,
        "machine": measuring.machine(),
        "rows": rows,
    }
    equal = f"equal outputs: all captions, numbers within {max(gaps):.1g}\n"
    return measuring.finish(report, [equal, table(rows)], args.out)


if __name__ == "__main__":
    cli.run(main)

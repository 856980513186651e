"""Which experiments fit a card of 24 GB with LLaVA-7B, in bfloat16 and in 4 bits?

    # LLaVA-7B shapes with random weights, needs a GPU and bitsandbytes
    python benchmarks/bench_fits.py --out bench_fits.json
    # the shape of smol-llava in float32, on a CPU too
    python benchmarks/bench_fits.py --size smol --prompt 181 --threads 1
    # a very small shape, on a CPU too, only to see that it runs
    python benchmarks/bench_fits.py --quick

Our own experiments, as in bench_growth.py, on a prompt of --prompt tokens: one run that is not
counted, then one. Peak: everything that the process holds on the GPU at its most, weights included;
on a CPU the weights and what a run takes above them. No output is compared here: bfloat16 and 4
bits do not give the numbers of float32.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import measuring
from benchmarks.cases import Case, build, make_samples
from vlmdiag import cli

if TYPE_CHECKING:
    from benchmarks.variants_growth import Work
    from common import VLM

CARD = 24e9  # bytes
PRECISIONS = {"bfloat16": False, "4 bits": True}


def measure(work: Work, vlm: VLM) -> tuple[float, float | None]:
    """(seconds of the second run, peak in GB)."""
    import torch

    seconds: list[float] = []

    def timed() -> None:
        seconds.append(measuring.seconds_of(work))

    above = measuring.peak_of(timed, timed)
    if torch.cuda.is_available():
        return seconds[1], torch.cuda.max_memory_allocated() / 1e9
    tensors = (*vlm.model.parameters(), *vlm.model.buffers())
    weights = sum(tensor.nbytes for tensor in tensors)
    return seconds[1], None if above is None else (weights + above * 2**20) / 1e9


def table(rows: Sequence[measuring.Row]) -> str:
    """The rows as a Markdown table."""
    lines = ["| weights | experiment | s | peak GB | fits 24 GB |", "|---|---|---|---|---|"]
    for row in rows:
        peak = row["peak_gb"]
        fits = "not measured" if peak is None else "yes" if 1e9 * peak < CARD else "no"
        shown = "not measured" if peak is None else f"{peak:.2f}"
        cells = (row["weights"], row["experiment"], f"{row['seconds']:.2f}", shown, fits)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument("--size", choices=["smol", "7b"], default="7b", help="shape of the model")
    parser.add_argument("--prompt", type=cli.whole(50), default=620, help="about how many tokens")
    parser.add_argument("--batch", type=cli.positive, default=1, help="pictures in a batch")
    parser.add_argument("--new_tokens", type=cli.positive, default=32, help="tokens of an answer")
    parser.add_argument("--threads", type=cli.whole(1, 1024), default=None, help="of PyTorch")
    parser.add_argument(
        "--quick", action="store_true", help="a very small shape; figures without meaning"
    )
    parser.add_argument("--out", default=None, help="JSON file with everything")
    args = parser.parse_args(argv)
    if args.quick:
        args.size = "quick"
        args.prompt = 121
        args.new_tokens = 4
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    import torch

    from benchmarks.variants_growth import EXPERIMENTS

    device, _ = measuring.prepare(args)
    rows: list[measuring.Row] = []
    precisions = {"float32": False} if args.size == "smol" else PRECISIONS
    for weights, four_bit in precisions.items():
        dtype = torch.float32 if weights == "float32" else torch.bfloat16
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            vlm = build(args.size, args.prompt, device, folder, dtype, four_bit)
            case = Case(vlm, make_samples(folder, args.batch), args.new_tokens, folder)
            for experiment, (make, _) in EXPERIMENTS.items():
                seconds, peak = measure(make(case), vlm)
                row = {"weights": weights, "experiment": experiment}
                rows.append({**row, "seconds": seconds, "peak_gb": peak})
        del vlm, case
        gc.collect()  # the two do not fit a small card together
    report: dict[str, Any] = {
        "size": args.size,
        "prompt": args.prompt,
        "batch": args.batch,
        "new_tokens": args.new_tokens,
        "machine": measuring.machine(),
        "rows": rows,
    }
    return measuring.finish(report, [table(rows)], args.out)


if __name__ == "__main__":
    cli.run(main)

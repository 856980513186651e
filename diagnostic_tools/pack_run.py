"""Packs the finished items of runs: of each thousand, the records become one file and the arrays
another, so that a run of 100,000 pictures is a few hundred files in place of 200,000.

    python diagnostic_tools/pack_run.py runs/llava-v1.5-7b__sp-0
    python diagnostic_tools/pack_run.py runs/psi/llava-v1.5-7b --unpack

Every command reads a packed run as before, and the command that made it goes on with it; new items
then lie beside the packs until the next call packs them too. Nothing is removed before its pack was
written, flushed and read back. --unpack gives the same bytes again. docs/scale.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from vlmdiag import cli
from vlmdiag.runs import rundirs


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument("run", nargs="+", help="run directories, of any experiment")
    parser.add_argument("--unpack", action="store_true", help="give every item its own files again")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    from vlmdiag.runs import packing

    code = 0
    for path in args.run:
        run = rundirs.read_run(path)
        outcome = packing.unpack(run) if args.unpack else packing.pack(run)
        done = "taken out" if args.unpack else "packed"
        print(f"{run.path}: {outcome.items} items {done}, {outcome.packs} packs now")
        for id, why in list(outcome.left.items())[:5]:
            print(f"{run.path}: {id} was left as it is: {why}")
        if outcome.left:
            print(
                f"{run.path}: {len(outcome.left)} items were left; the command that made the run"
                " computes damaged ones again"
            )
            code = 3
    return code


if __name__ == "__main__":
    cli.run(main)

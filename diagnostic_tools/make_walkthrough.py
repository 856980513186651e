"""Make Diagnostic_Tools_Walkthrough.ipynb from docs/walkthrough.md: text as markdown, each block of
Python as a cell, run, with what it printed and drew.

    python diagnostic_tools/make_walkthrough.py

Writes the notebook to --out. Needs no Jupyter; the cells run one after the other in this process,
in the repository's root.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vlmdiag import CHECKOUT, cli
from vlmdiag.types import Record

PAGE = CHECKOUT / "docs" / "walkthrough.md"
CELL = re.compile(r"^```python\n(.*?)^```\n", re.MULTILINE | re.DOTALL)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--out",
        default=str(Path(__file__).with_name("Diagnostic_Tools_Walkthrough.ipynb")),
        help="notebook to write",
    )
    return parser.parse_args(argv)


def cells_of(page: str) -> Iterator[tuple[str, str]]:
    """(type, source) of each cell."""
    pieces = CELL.split(page)  # text and code in turn
    for text, code in zip(pieces[::2], [*pieces[1::2], ""], strict=True):
        # a command is bash to a notebook, whatever the page's tests call it
        text = re.sub(r"^```bash \w+$", "```bash", text, flags=re.MULTILINE).strip()
        if text:
            yield "markdown", text
        if code:
            yield "code", code.strip()


def outputs_of(source: str, names: Record) -> list[Record]:
    """Run a cell; what it printed and the figures that it left open, as nbformat has them."""
    import matplotlib.pyplot as plt

    with contextlib.redirect_stdout(io.StringIO()) as said:
        exec(source, names)
    outputs: list[Record] = []
    if said.getvalue():
        lines = said.getvalue().splitlines(keepends=True)
        outputs.append({"name": "stdout", "output_type": "stream", "text": lines})
    for number in plt.get_fignums():
        buffer = io.BytesIO()
        plt.figure(number).savefig(buffer, format="png", dpi=80, bbox_inches="tight")
        picture = base64.b64encode(buffer.getvalue()).decode()
        data = {"image/png": picture, "text/plain": ["<Figure>"]}
        outputs.append({"data": data, "metadata": {}, "output_type": "display_data"})
    plt.close("all")
    return outputs


def notebook(page: str) -> Record:
    """The notebook, nbformat 4.5."""
    names: dict[str, Any] = {"__name__": "__main__"}
    cells: list[Record] = []
    count = 0
    for number, (kind, source) in enumerate(cells_of(page)):
        cell: Record = {
            "cell_type": kind,
            "id": f"cell-{number:02d}",
            "metadata": {},
            "source": source.splitlines(keepends=True),
        }
        if kind == "code":
            count += 1
            cell |= {"execution_count": count, "outputs": outputs_of(source, names)}
        cells.append(cell)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    out = Path(args.out).absolute()
    os.chdir(CHECKOUT)
    content = notebook(PAGE.read_text(encoding="utf-8"))
    try:
        out.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise cli.UsageError(f"cannot write {args.out}: {error}") from error
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    cli.run(main)

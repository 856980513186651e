"""Make Diagnostic_Tools_Walkthrough.ipynb from README.md beside this script: each section with
commands to run, text as markdown, a command as a cell.

    python diagnostic_tools/make_walkthrough.py

Writes the notebook to --out; equal READMEs give equal bytes. A cell runs its command from the
repository's root and shows the figures that it wrote.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlmdiag import cli

HERE = Path(__file__).resolve().parent
# blocks of commands to run; "```bash real" and "```bash setup" stay text
EXECUTED = re.compile(r"^```bash\n(.*?)^```\n", re.MULTILINE | re.DOTALL)
FIRST = """\
import subprocess
import sys
from pathlib import Path

from IPython.display import Image, display

FOLDERS = (Path.cwd(), *Path.cwd().parents)
ROOT = next(folder for folder in FOLDERS if (folder / "common.py").exists())


def show(output):
    \"\"\"Print what a command said and show the figures that it wrote.\"\"\"
    print(output)
    for line in output.splitlines():
        if line.startswith("wrote ") and line.endswith(".png"):
            display(Image(filename=str(ROOT / line.removeprefix("wrote "))))"""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--out", default=str(HERE / "Diagnostic_Tools_Walkthrough.ipynb"), help="notebook to write"
    )
    return parser.parse_args(argv)


def commands(block: str) -> list[list[str]]:
    """The commands of a block as lists of words; a backslash at the end of a line goes on in the
    next."""
    lines = block.replace("\\\n", " ").splitlines()
    split = [shlex.split(line, comments=True) for line in lines]
    return [words for words in split if words]


def command_cell(words: Sequence[str]) -> str:
    """Python that runs one command, one flag with its values to a line."""
    if words[0] != "python":
        raise cli.UsageError(
            f"the README's command {shlex.join(words)} does not start with python, so it cannot be"
            " a cell; mark its block 'bash real'"
        )
    lines = [["sys.executable", json.dumps(words[1])]]
    for word in words[2:]:
        if word.startswith("--"):
            lines.append([])
        lines[-1].append(json.dumps(word))
    arguments = "".join(f"    {', '.join(line)},\n" for line in lines)
    return (
        f"done = subprocess.run([\n{arguments}], check=True, cwd=ROOT, stdout=subprocess.PIPE,"
        " text=True)\nshow(done.stdout)"
    )


def cells_of(readme: str) -> list[tuple[str, str]]:
    """[(type, source), ...]: the title, then the sections that have commands to run."""
    title, *sections = re.split(r"^(?=## )", readme, flags=re.MULTILINE)
    cells = [("markdown", title), ("code", FIRST)]
    for section in sections:
        pieces = EXECUTED.split(section)  # text and commands in turn
        if len(pieces) == 1:
            continue
        for text, block in zip(pieces[::2], [*pieces[1::2], ""], strict=True):
            cells.append(("markdown", text))
            cells += [("code", command_cell(words)) for words in commands(block)]
    return [(kind, source.strip()) for kind, source in cells if source.strip()]


def notebook(readme: str) -> str:
    """Text of the notebook, nbformat 4.5."""
    cells = []
    for number, (kind, source) in enumerate(cells_of(readme)):
        cell: dict[str, Any] = {
            "cell_type": kind,
            "id": f"cell-{number:02d}",
            "metadata": {},
            "source": source.splitlines(keepends=True),
        }
        if kind == "code":
            cell |= {"execution_count": None, "outputs": []}
        cells.append(cell)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    content = {
        "cells": cells,
        "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        text = notebook((HERE / "README.md").read_text(encoding="utf-8"))
        Path(args.out).write_text(text, encoding="utf-8")
    except OSError as error:
        raise cli.UsageError(f"cannot make {args.out}: {error}") from error
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    cli.run(main)

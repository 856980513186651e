"""Make Diagnostic_Tools_Walkthrough.ipynb from README.md beside this script: each section with
commands to run, text as markdown, a command as a cell.

    python diagnostic_tools/make_walkthrough.py

Writes the notebook to --out; equal READMEs give equal bytes. A cell runs its command from the
repository's root and shows the figures that it wrote.
"""

import json
import re
import shlex
from pathlib import Path

from vlmdiag import cli

HERE = Path(__file__).resolve().parent
EXECUTED = re.compile(
    r"^```bash\n(.*?)^```\n", re.MULTILINE | re.DOTALL
)  # "```bash real" and "```bash setup" stay text
FIRST = """\
import subprocess
import sys
from pathlib import Path

from IPython.display import Image, display

ROOT = next(folder for folder in (Path.cwd(), *Path.cwd().parents) if (folder / "common.py").exists())


def show(output):
    \"\"\"Print what a command said and show the figures that it wrote.\"\"\"
    print(output)
    for line in output.splitlines():
        if line.startswith("wrote ") and line.endswith(".png"):
            display(Image(filename=str(ROOT / line.removeprefix("wrote "))))"""


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--out", default=str(HERE / "Diagnostic_Tools_Walkthrough.ipynb"), help="notebook to write"
    )
    return parser.parse_args(argv)


def commands(block):
    """The commands of a block as lists of words; a backslash at the end of a line goes on in the
    next."""
    return [
        words
        for line in block.replace("\\\n", " ").splitlines()
        if (words := shlex.split(line, comments=True))
    ]


def command_cell(words):
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
    inside = "".join(f"    {', '.join(line)},\n" for line in lines)
    return (
        f"done = subprocess.run([\n{inside}], check=True, cwd=ROOT, stdout=subprocess.PIPE,"
        " text=True)\nshow(done.stdout)"
    )


def cells_of(readme):
    """[(type, source), ...]: the title, then the sections that have commands to run."""
    title, *sections = re.split(r"^(?=## )", readme, flags=re.MULTILINE)
    found = [("markdown", title), ("code", FIRST)]
    for section in sections:
        parts = EXECUTED.split(section)  # text and commands in turn
        if len(parts) > 1:
            for text, block in zip(parts[::2], [*parts[1::2], ""], strict=True):
                found += [("markdown", text)] + [
                    ("code", command_cell(words)) for words in commands(block)
                ]
    return [(kind, source.strip()) for kind, source in found if source.strip()]


def notebook(readme):
    """Text of the notebook, nbformat 4.5."""
    cells = []
    for number, (kind, source) in enumerate(cells_of(readme)):
        cell = {
            "cell_type": kind,
            "id": f"cell-{number:02d}",
            "metadata": {},
            "source": source.splitlines(keepends=True),
        }
        cells.append(cell | ({"execution_count": None, "outputs": []} if kind == "code" else {}))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    content = {
        "cells": cells,
        "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def main(argv=None):
    args = parse_args(argv)
    try:
        Path(args.out).write_text(
            notebook((HERE / "README.md").read_text(encoding="utf-8")), encoding="utf-8"
        )
    except OSError as error:
        raise cli.UsageError(f"cannot make {args.out}: {error}") from error
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    cli.run(main)

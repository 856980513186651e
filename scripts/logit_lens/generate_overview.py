"""Which pictures has the logit lens seen, and what did it find? An index.html over a folder of lens
pages: thumbnails, prompts, top words, search, 20 a page.

    python scripts/logit_lens/generate_overview.py outputs/logit_lens outputs/logit_lens

The second folder, made if need be, may be another one: the links are relative to it. What a page of
create_logit_lens.py shows about itself is read from its head; of any other HTML file only the name
is shown. On the tiny model the words under a picture are the shapes and colours in it.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from vlmdiag import cli
from vlmdiag.cli import UsageError
from vlmdiag.interp.lens_page import OVERVIEW, json_block, read_facts, write_html

STRINGS = ("title", "model", "picture", "prompt", "question", "thumbnail")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument("input_dir", help="folder of lens pages")
    parser.add_argument("output_dir", help="folder for index.html")
    parser.add_argument("--per_page", type=cli.positive, default=20, help="pages listed at a time")
    return parser.parse_args(argv)


def natural(name: str) -> tuple[list[str | int], str]:
    """Sort key: 2 before 10, case ignored where nothing else differs."""
    pieces = re.split("([0-9]+)", name)  # every second one is a number
    key = [int(piece) if i % 2 else piece.casefold() for i, piece in enumerate(pieces)]
    return key, name


def link(page: Path, folder: Path) -> str:
    """URL of a file relative to a folder, with quoted names."""
    return quote(os.fsencode(os.path.relpath(page, folder)))


def entry(page: Path, folder: Path) -> dict[str, Any]:
    """What the index shows of one page: strings and the list of its top words; whatever else an
    unknown file has in its head is left out."""
    facts = read_facts(page)
    text = {name: facts[name] if isinstance(facts.get(name), str) else "" for name in STRINGS}
    if not text["thumbnail"].startswith("data:image/jpeg;base64,"):
        text["thumbnail"] = ""
    pairs = facts.get("top_words")
    words = []
    for pair in pairs if isinstance(pairs, list) else []:
        if isinstance(pair, list) and pair and isinstance(pair[0], str):
            words.append(pair[0])
    return text | {"name": page.name, "link": link(page, folder), "words": words}


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    source, target = Path(args.input_dir), Path(args.output_dir)
    make = "make the pages with python scripts/logit_lens/create_logit_lens.py"
    if not source.is_dir():
        raise UsageError(f"no folder {source}; {make}")
    files = [file for file in source.glob("*.html") if file.name != "index.html" and file.is_file()]
    if not files:
        raise UsageError(f"{source} has no .html file besides index.html; {make}")
    pages = sorted(files, key=lambda file: natural(file.name))
    data = {"entries": [entry(page, target) for page in pages], "per_page": args.per_page}
    frames = "'self' file:"  # from a server, and from a disk
    template = OVERVIEW.read_text(encoding="utf-8")
    index = write_html(target / "index.html", template, {"DATA": json_block(data)}, frames)
    print(f"wrote {index}")
    return 0


if __name__ == "__main__":
    cli.run(main)

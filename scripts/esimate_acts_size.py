"""estimate_acts_size.py under the name that the document gives it."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from vlmdiag import cli


def main(argv: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    return cli.call("scripts/estimate_acts_size.py", [*arguments])


if __name__ == "__main__":
    cli.run(main)

"""ablation_experiment.py on LLaVA-Phi, unless --model_path is given."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from vlmdiag import cli

PHI = "xtuner/llava-phi-3-mini-hf"


def main(argv: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    return cli.call("scripts/ablation_experiment.py", ["--model_path", PHI, *arguments])


if __name__ == "__main__":
    cli.run(main)

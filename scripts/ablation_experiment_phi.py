"""ablation_experiment.py on LLaVA-Phi, unless --model_path is given."""

import sys

from vlmdiag.cli import replace_by

PHI = "xtuner/llava-phi-3-mini-hf"

if __name__ == "__main__":
    replace_by("scripts/ablation_experiment.py", ["--model_path", PHI, *sys.argv[1:]])

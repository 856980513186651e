#!/usr/bin/env bash
# All five diagnoses of a model, then one report of them; run again, it goes on where it was.
#
#     ./run_checkup.sh                                             # the embedded tiny models
#     MODEL=llava-hf/llava-1.5-7b-hf SIZE=paper ./run_checkup.sh
#     MODEL="my/llava my/llava-tuned" IMAGES=my/pictures ./run_checkup.sh
#
# MODEL   folders or hub ids, separated by spaces      SIZE   quick (a first look) or paper
# IMAGES  pictures, in COCO's layout or as they are    RUNS, RESULTS, OUT   runs, results, outputs/checkup
# Sets up .venv, or uses the active virtual environment. Other flags are checkup.py's.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
from=$PWD
cd "$here"
source ./setup_env.sh
cd "$from"
exec python "$here/diagnostic_tools/checkup.py" ${MODEL:+--model_path $MODEL} ${IMAGES:+--images "$IMAGES"} \
    --size "${SIZE:-quick}" --runs_dir "${RUNS:-$here/runs}" --results_dir "${RESULTS:-$here/results}" \
    --out "${OUT:-$here/outputs/checkup}" "$@"

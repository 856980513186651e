#!/usr/bin/env bash
# Swap analysis of a published model and its fine-tunes on EmbSpatial-Bench, one scale after the other, then merged: run_qwen.sh, run_molmo.sh, run_nvila.sh.
#
#     bash swap_analysis/run_scales.sh MODEL_TYPE SCALE ...
#
# SCALES  other scales     DATA  the table     BOXES  file of boxes, for quads     RUNS  run directories     OUT  results     PYTHON  the interpreter
# ALL_FIGURES=1  every figure of every condition and layer, not only the summary
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python} model=$1
shift
common=(--model_type "$model" --out_dir "${OUT:-results}" --out_root "${RUNS:-runs}" ${ALL_FIGURES:+--all_figures})
for scale in ${SCALES:-"$@"}; do
    "$python" swap_analysis/swap_analysis.py "${common[@]}" --scales "$scale" --data_path "${DATA:-data/EmbSpatial-Bench.tsv}" ${BOXES:+--bbox_file "$BOXES"}
done
"$python" swap_analysis/swap_analysis.py "${common[@]}" --merge

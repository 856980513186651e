#!/usr/bin/env bash
# Swap analysis of Qwen2.5-VL-3B and its fine-tunes on EmbSpatial-Bench, one scale after the other, then merged. Needs a GPU of about 10 GB and the table.
#
#     DATA=data/EmbSpatial-Bench.tsv BOXES=data/embspatial_bench.json bash swap_analysis/run_qwen.sh
#     SCALES="vanilla 80k" bash swap_analysis/run_qwen.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python}
common=(--model_type qwen --output_dir "${OUT:-results}" --out_root "${RUNS:-runs}")
for scale in ${SCALES:-vanilla 80k 400k 800k 2m}; do
    "$python" swap_analysis/swap_analysis.py "${common[@]}" --scales "$scale" --data_path "${DATA:-data/EmbSpatial-Bench.tsv}" ${BOXES:+--bbox_file "$BOXES"}
done
"$python" swap_analysis/swap_analysis.py "${common[@]}" --merge

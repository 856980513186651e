#!/usr/bin/env bash
# The paper's 36 attention knockouts, with table and heat map; run again, it goes on where it was. Variables as in run_ablation.sh.
#
#     bash scripts/run_knockout.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
run "$python" scripts/attention_experiment_curate.py --model_path "$model" --coco_root "$coco" --datatype "$part" --out_root "$runs" \
    --question_file "$questions" ${limit[@]+"${limit[@]}"}
run "$python" scripts/summarize_results.py --run_dir "$runs/knockout/$name" --out_dir "$out"

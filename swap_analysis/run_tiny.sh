#!/usr/bin/env bash
# Swap analysis of the tiny models: the four snapshots and the base, on floor scenes and on corridors with free depths, each merged; run again, it goes on
# where it was.
#
#     bash swap_analysis/run_tiny.sh
#
# SAMPLES  pairs of each category (200)     RUNS  run directories (runs)     OUT  results (results)     PYTHON  the interpreter (python)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python}
common=(--model_type tiny --output_dir "${OUT:-results}" --out_root "${RUNS:-runs}")
limit=(--max_samples_per_category "${SAMPLES:-200}")

run() {
    printf '\n+'
    printf ' %q' "$@"
    printf '\n'
    "$@"
}

run "$python" data/make_shapes.py --out_dir data/shapes-swap --num_images 400 --num_train 0 --seed 2 --height_depth_correlation 0.5
run "$python" swap_analysis/swap_analysis.py "${common[@]}" "${limit[@]}" --data_path data/shapes-swap/swap_pairs_ready.tsv --bbox_file data/shapes-swap/bboxes.json
run "$python" swap_analysis/swap_analysis.py "${common[@]}" --merge
run "$python" data/make_shapes.py --out_dir data/shapes-corridor --scene corridor --num_images 400 --num_train 0 --seed 2
run "$python" swap_analysis/swap_analysis.py "${common[@]}" "${limit[@]}" --run_name corridor --data_path data/shapes-corridor/swap_pairs_ready.tsv \
    --bbox_file data/shapes-corridor/bboxes.json
run "$python" swap_analysis/swap_analysis.py "${common[@]}" --run_name corridor --merge

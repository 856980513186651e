#!/usr/bin/env bash
# Swap analysis of the tiny models on drawn scenes: the four snapshots and the base, on floor scenes and on corridors with free depths, each merged; run
# again, it goes on where it was.
#
#     bash swap_analysis/run_tiny.sh
#     MODEL_TYPE=smol SAMPLES=60 bash swap_analysis/run_tiny.sh          # the parts of smol-llava
#     MODEL=checkpoints/smol-llava-135m bash swap_analysis/run_tiny.sh   # one model of your own
#
# MODEL_TYPE  whose known scales (tiny)     MODEL  a folder or hub id instead     SAMPLES  pairs of each category (200)
# RUNS  run directories (runs)     OUT  results (results)     PYTHON  the interpreter (python)
# ALL_FIGURES=1  every figure of every condition and layer, not only the summary
set -euo pipefail
model=${MODEL:-}
if [ -n "$model" ] && [ -e "$model" ]; then model=$(cd "$model" && pwd); fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python}
type=${MODEL_TYPE:-tiny}
scales=()
if [ -n "$model" ]; then
    type=$("$python" -c 'import sys; from vlmdiag.runs import rundirs; print(rundirs.slug(sys.argv[1]))' "$model")
    scales=(--scales "full=$model")
fi
common=(--model_type "$type" --out_dir "${OUT:-results}" --out_root "${RUNS:-runs}" ${ALL_FIGURES:+--all_figures})
limit=(--max_samples_per_category "${SAMPLES:-200}")

run() {
    printf '\n+'
    printf ' %q' "$@"
    printf '\n'
    "$@"
}

run "$python" data/make_shapes.py --out_dir data/shapes-swap --num_images 400 --num_train 0 --seed 2 --height_depth_correlation 0.5
run "$python" swap_analysis/swap_analysis.py "${common[@]}" ${scales[@]+"${scales[@]}"} "${limit[@]}" --data_path data/shapes-swap/swap_pairs_ready.tsv \
    --bbox_file data/shapes-swap/bboxes.json
run "$python" swap_analysis/swap_analysis.py "${common[@]}" --merge
run "$python" data/make_shapes.py --out_dir data/shapes-corridor --scene corridor --num_images 400 --num_train 0 --seed 2
run "$python" swap_analysis/swap_analysis.py "${common[@]}" ${scales[@]+"${scales[@]}"} "${limit[@]}" --run_name corridor --data_path data/shapes-corridor/swap_pairs_ready.tsv \
    --bbox_file data/shapes-corridor/bboxes.json
run "$python" swap_analysis/swap_analysis.py "${common[@]}" --run_name corridor --merge

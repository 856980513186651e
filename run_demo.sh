#!/usr/bin/env bash
# 200 generated pictures, three tiny trained models, every measurement of diagnostic_tools/ under
# runs/, its figures under runs/figures: ./run_demo.sh
# MAX_IMAGES=20 ./run_demo.sh for a first look. An interrupted demo goes on where it was.
set -euo pipefail
cd "$(dirname "$0")"
source ./setup_env.sh
python data/make_shapes.py --out_dir data/shapes --num_images 200 --seed 0
export OUT=${OUT:-runs/figures}
mkdir -p "$OUT"
exec bash diagnostic_tools/run_beyond_semantics.sh

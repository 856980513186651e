#!/usr/bin/env bash
# Logit lens pages of 20 pictures with an overview, and how often the lens reads the object's name; run again, it goes on where it was.
# Variables as in run_ablation.sh.
#
#     bash scripts/run_logit_lens.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
run "$python" scripts/logit_lens/create_logit_lens.py --model_path "$model" --image_dir "$coco/$part" --out_dir "$out/logit_lens" --max_images 20 \
    --out_root "$runs"
run "$python" scripts/logit_lens/generate_overview.py "$out/logit_lens" "$out/logit_lens"
run "$python" scripts/logit_lens/lens_accuracy.py --model_path "$model" --coco_root "$coco" --datatype "$part" --out_root "$runs" ${limit[@]+"${limit[@]}"}

#!/usr/bin/env bash
# Token ablation in all three settings, with its mean vector, table and figures; run again, it goes on where it was.
#
#     bash scripts/run_ablation.sh
#     MODEL=llava-hf/llava-1.5-7b-hf COCO_ROOT=data/COCO DATATYPE=train2017 QUESTIONS=clean_questions.json MEAN_IMAGES=imagenet/val bash scripts/run_ablation.sh
#
# MODEL       folder or hub id (checkpoints/tiny-llava)      COCO_ROOT, DATATYPE   pictures and annotations (500 drawn scenes of seed 1, val2017)
# QUESTIONS   curated question file                          MEAN_IMAGES           pictures whose vision tokens make the mean vector
# MAX_IMAGES  only so many items                             RUNS, OUT             run directories (runs), tables and figures (outputs/llava_interp)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"
mean=$runs/mean_vector/$name
run "$python" scripts/save_post_adapter_acts.py --model_path "$model" --image_dir "$mean_images" --out_dir "$mean"
run "$python" scripts/calculate_mean_vector.py "$mean"
common=(--model_path "$model" --coco_root "$coco" --datatype "$part" --out_root "$runs" --mean_tensor "$mean/mean_vector.pt" ${limit[@]+"${limit[@]}"})
run "$python" scripts/ablation_experiment.py "${common[@]}"
run "$python" scripts/ablation_experiment_curate.py "${common[@]}" --question_file "$questions"
run "$python" scripts/summarize_results.py --run_dir "$runs/ablation/$name" "$runs/ablation_vqa/$name" --out_dir "$out"

#!/usr/bin/env bash
# Attention to the picture while answering, criticising and revising: the loop on every question, statistics by stage, and pages and maps of one instance;
# run again, it goes on where it was.
#
#     bash visualize/run_volcano.sh
#     MODEL=checkpoints/llava-v1.5-7b-volcano INPUT=data/mmhal/response_template.json INDEX=88 bash visualize/run_volcano.sh
#
# MODEL   folder or hub id (checkpoints/tiny-llava)     INPUT   MMHal-style JSON (data/shapes/mmhal_shapes.json)     INDEX   instance shown (5)
# RUNS    where run directories go (runs)               OUT     figures and pages (outputs/volcano)
set -euo pipefail

place() { # a path that exists here, as an absolute one; anything else, such as a hub id, as it is
    if [ -e "$1" ]; then echo "$(cd "$(dirname "$1")" && pwd)/$(basename "$1")"; else echo "$1"; fi
}

run() { # 3: some instances failed, go on with the others
    printf '\n+'
    printf ' %q' "$@"
    printf '\n'
    "$@" || {
        local code=$?
        if [ $code -ne 3 ]; then exit $code; fi
    }
}

python=${PYTHON:-python}
model=$(place "${MODEL:-}")
input=$(place "${INPUT:-}")
mkdir -p "${RUNS:-$(dirname "${BASH_SOURCE[0]}")/../runs}" "${OUT:-$(dirname "${BASH_SOURCE[0]}")/../outputs/volcano}"
runs=${RUNS:+$(place "$RUNS")}
out=${OUT:+$(place "$OUT")}
cd "$(dirname "${BASH_SOURCE[0]}")/.."
model=${model:-checkpoints/tiny-llava}
runs=${runs:-runs}
out=${out:-outputs/volcano}
if [ -z "$input" ]; then
    input=data/shapes/mmhal_shapes.json
    [ -e data/shapes/manifest.json ] || run "$python" data/make_shapes.py --out_dir data/shapes --num_images 200 --seed 0
fi
index=${INDEX:-5}
name=$("$python" -c 'import sys; from vlmdiag.runs import rundirs; print(rundirs.slug(sys.argv[1]))' "$model")

run "$python" visualize/run_volcano_with_image_attention.py --model-path "$model" --input "$input" --output-dir "$out" --out_root "$runs" \
    --log "$runs/volcano_$name.json" --visualize-avg-attention-all
for filter in all enhanced; do
    run "$python" visualize/analyze_attention_by_stage.py --run_dir "$runs/volcano/$name" --filter $filter
done
run "$python" visualize/run_volcano_with_image_attention.py --model-path "$model" --input "$input" --output-dir "$out" --out_root "$runs" --run_name shown \
    --log "$runs/volcano_${name}_shown.json" --instance-idx "$index" --output-visualization-tensors
if [ "$input" = data/shapes/mmhal_shapes.json ]; then # what becomes of first answers of which half are wrong
    run "$python" visualize/run_volcano_with_image_attention.py --model-path "$model" --input "$input" --output-dir "$out" --out_root "$runs" \
        --run_name given --answers data/shapes/mmhal_answers.json --log "$runs/volcano_${name}_given.json"
fi
run "$python" visualize/text_attention_heatmap.py --input-dir "$out" --output-dir "$out" --instance-idx "$index"
run "$python" visualize/image_attention_heatmap.py --input-dir "$out" --output-dir "$out" --instance-idx "$index"

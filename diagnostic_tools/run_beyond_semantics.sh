#!/usr/bin/env bash
# Every measurement and figure of diagnostic_tools/, on the tiny models and drawn pictures unless told otherwise; run again, it goes on where it was.
#
#     bash diagnostic_tools/run_beyond_semantics.sh
#     MAX_IMAGES=20 bash diagnostic_tools/run_beyond_semantics.sh
#     MODEL="checkpoints/llava-v1.5-7b llava-hf/llava-1.5-7b-hf" IMAGE_DIR=data/COCO/val2017 ANN_FILE=data/COCO/annotations/captions_val2017.json \
#         MAX_IMAGES=500 BATCH_SIZE=8 WORD=teddy IMAGE=data/COCO/val2017/000000445658.jpg bash diagnostic_tools/run_beyond_semantics.sh
#
# MODEL       folders or hub ids, separated by spaces           RUNS   where run directories go (runs)
# IMAGE_DIR   pictures     ANN_FILE   their COCO captions file   OUT    where figures go (outputs)
# MAX_IMAGES  how many pictures (200)                           BATCH_SIZE (8)
# WORD, IMAGE word of the answer and picture of the attention overlay (the tiny models have both by themselves)
# QUESTIONS, MAX_QUESTIONS   of the position sensitivity index (data/shapes/questions.json, twice MAX_IMAGES)
# Paths are relative to where you are, and what is not found there to the repository. PYTHON is the interpreter (python). Ends with 3 if images failed.
set -euo pipefail

place() { # a path that exists here, as an absolute one; anything else, such as a hub id, as it is
    if [ -e "$1" ]; then echo "$(cd "$(dirname "$1")" && pwd)/$(basename "$1")"; else echo "$1"; fi
}

run() {
    printf '\n+'
    printf ' %q' "$@"
    printf '\n'
    "$@" || {
        local code=$?
        if [ $code -ne 3 ]; then exit $code; fi
        ended=3 # some images failed: go on with the others
    }
}

slug() { # the folder name of a model
    "$python" -c 'import sys; from vlmdiag.runs import rundirs; print(rundirs.slug(sys.argv[1]))' "$1"
}

ended=0
python=${PYTHON:-python}
given=${MODEL:-}
models=()
for model in ${given:-checkpoints/tiny-llava checkpoints/tiny-llava-normWmean checkpoints/tiny-llava-multilayerNorm}; do
    if [ -n "$given" ]; then model=$(place "$model"); fi
    models+=("$model")
done
images=$(place "${IMAGE_DIR:-}")
captions=$(place "${ANN_FILE:-}")
questions=$(place "${QUESTIONS:-}")
picture=$(place "${IMAGE:-}")
mkdir -p "${RUNS:-$(dirname "${BASH_SOURCE[0]}")/../runs}" "${OUT:-$(dirname "${BASH_SOURCE[0]}")/../outputs}"
runs=${RUNS:+$(place "$RUNS")}
out=${OUT:+$(place "$OUT")}
cd "$(dirname "${BASH_SOURCE[0]}")/.."

images=${images:-data/shapes/val2017}
captions=${captions:-data/shapes/annotations/captions_val2017.json}
questions=${questions:-data/shapes/questions.json}
runs=${runs:-runs}
out=${out:-outputs}
count=${MAX_IMAGES:-200}
batch=${BATCH_SIZE:-8}
tools=diagnostic_tools

if [ ! -e data/shapes/manifest.json ]; then
    run "$python" data/make_shapes.py --out_dir data/shapes --num_images 200 --seed 0
fi

names=()
paths=()
for model in "${models[@]}"; do
    name=$(slug "$model")
    names+=("$name")
    paths+=(--model_path "$model")
done
run "$python" $tools/vlm_token_norms.py "${paths[@]}" --caption_file "$captions" --image_dir "$images" --max_images "$count" \
    --save_vectors --out_dir "$out/token_norms"

measure() { # further flags
    run "$python" $tools/run_coco_diagnostics.py "${paths[@]}" --image_dir "$images" --ann_file "$captions" --out_root "$runs" --restrict_to_past \
        --max_new_tokens 32 --probe_hidden_norms --hidden_norm_kind l2 --max_images "$count" --batch_size "$batch" "$@"
}
measure
paths=() # a model without a system prompt has made sp-1 already
for i in "${!models[@]}"; do
    if [ -d "$runs/${names[$i]}__sp-0" ]; then paths+=(--model_path "${models[$i]}"); fi
done
if [ ${#paths[@]} -gt 0 ]; then measure --strip_system_prompt; fi

for sp in 0 1; do
    shown=()
    directories=()
    for name in "${names[@]}"; do
        if [ -d "$runs/${name}__sp-$sp" ]; then
            shown+=("$name")
            directories+=("$runs/${name}__sp-$sp")
        fi
    done
    if [ ${#shown[@]} -eq 0 ]; then continue; fi
    run "$python" $tools/analyze_coco_diagnostics.py --run_dir "${directories[@]}"
    run "$python" $tools/system_prompt_plot.py --run_dir "${directories[@]}"
    run "$python" $tools/viz_cmb_panel.py --runs_dir "$runs" --sp $sp --models "${shown[@]}" --out "$out/cmb_sp$sp.png"
    records=("${directories[0]}"/per_image/*.json)
    key=$(basename "${records[0]}" .json)
    if [ ! -e "${records[0]}" ]; then # a packed run
        key=$(sed -n '1{s/^{"id":"\([^"]*\)".*/\1/p;q}' "${directories[0]}"/packed/*.jsonl)
    fi
    run "$python" $tools/viz_cmb_panel.py --runs_dir "$runs" --sp $sp --models "${shown[@]}" --image_key "$key" --coco_root "$images" \
        --out "$out/cmb_panel_sp${sp}_$key.png"
    run "$python" $tools/viz_hidden_norms.py --runs_dir "$runs" --sp $sp --models "${shown[@]}" --mode avg --logy --early_k 6 \
        --out "$out/hidden_norms_avg_sp$sp.png"
done

paths=()
for model in "${models[@]}"; do paths+=(--model_path "$model"); done
if [ -z "$given" ] || [ -n "${WORD:-}" ]; then
    run "$python" $tools/viz_attention_image.py "${paths[@]}" ${picture:+--image "$picture"} ${WORD:+--target_word "$WORD"} --out_dir "$out/attention"
else
    printf '\nno attention overlay: it needs a word of the answer, such as WORD=teddy IMAGE=picture.jpg\n'
fi
run "$python" $tools/psi.py "${paths[@]}" --question_file "$questions" --num_permutations 2 --max_questions "${MAX_QUESTIONS:-$((2 * count))}" \
    --batch_size "$batch" --out_root "$runs"
printf '\ndone: run directories and their analyses in %s, figures in %s\n' "$runs" "$out"
exit $ended

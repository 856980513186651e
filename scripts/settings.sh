# Sourced by the run_*.sh of this folder: their variables, made absolute, with the tiny model and drawn scenes as default. Ends up in the repository's root.

place() { # a path that exists here, as an absolute one; anything else, such as a hub id, as it is
    if [ -e "$1" ]; then echo "$(cd "$(dirname "$1")" && pwd)/$(basename "$1")"; else echo "$1"; fi
}

run() { # 3: some items failed, go on with the others
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
coco=$(place "${COCO_ROOT:-}")
questions=$(place "${QUESTIONS:-}")
mean_images=$(place "${MEAN_IMAGES:-}")
mkdir -p "${RUNS:-$(dirname "${BASH_SOURCE[0]}")/../runs}" "${OUT:-$(dirname "${BASH_SOURCE[0]}")/../outputs/llava_interp}"
runs=${RUNS:+$(place "$RUNS")}
out=${OUT:+$(place "$OUT")}
cd "$(dirname "${BASH_SOURCE[0]}")/.."
model=${model:-checkpoints/tiny-llava}
part=${DATATYPE:-val2017}
if [ -z "$coco" ]; then
    coco=data/shapes-interp
    run "$python" data/make_shapes.py --out_dir $coco --num_images 500 --num_train 400 --seed 1
fi
questions=${questions:-$coco/clean_questions.json}
mean_images=${mean_images:-$coco/train2017}
runs=${runs:-runs}
out=${out:-outputs/llava_interp}
limit=() # used as ${limit[@]+...}: an empty array is an error in the bash of macOS, 3.2
if [ -n "${MAX_IMAGES:-}" ]; then limit=(--max_images "$MAX_IMAGES"); fi
name=$("$python" -c 'import sys; from vlmdiag.runs import rundirs; print(rundirs.slug(sys.argv[1]))' "$model")

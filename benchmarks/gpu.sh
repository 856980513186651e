#!/usr/bin/env bash
# Every benchmark at LLaVA-7B shapes on this machine's GPU, in under five minutes and without a
# download: weights are random, which does not matter for time.
#
#     bash benchmarks/gpu.sh
#     QUICK=1 bash benchmarks/gpu.sh    # very small shapes, on a CPU too: only to see that it runs
#
# OUT      folder of tables (NAME.txt), reports (NAME.json) and errors (NAME.err) (outputs/gpu)
# PYTHON   interpreter (python)
#
# It needs bitsandbytes for the 4 bits, and 40 GB of memory where outputs are compared first, because
# that is done in float32; bench_fits.py, the first part, does without and says what fits a card of
# 24 GB. A part that does not end in its time is stopped, and the others go on. The last line is a
# row for the table in docs/benchmarks.md, "On a GPU". Exit code 2: there is no GPU; 3: some part
# failed or was stopped.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
python=${PYTHON:-python}
out=${OUT:-outputs/gpu}
mkdir -p "$out" || exit 2

if [ -z "${QUICK:-}" ] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "error: no GPU is visible here; QUICK=1 shows on a CPU that the parts run" >&2
    exit 2
fi

failed=0
part() { # seconds, name, flags of bench_NAME.py
    local limit=$1 name=$2 code=0
    shift 2
    local flags=("$@")
    if [ -n "${QUICK:-}" ]; then flags=(--quick --threads 1) limit=600; fi
    rm -f "$out/$name.json"
    printf '\n## %s (at most %s s)\n\n' "$name" "$limit"
    timeout "$limit" "$python" "benchmarks/bench_$name.py" "${flags[@]}" --out "$out/$name.json" >"$out/$name.txt" 2>"$out/$name.err" || code=$?
    cat "$out/$name.txt"
    if [ $code -ne 0 ]; then
        failed=3
        echo "$name: exit code $code (124: stopped after $limit s); $(tail -n 1 "$out/$name.err")"
    fi
}

part 48 fits --new_tokens 8
part 40 diagnostics --size 7b --prompt 620 --batch 1 --new_tokens 16 --repeats 2
part 25 known_answers --size 7b --pictures 1 --new_tokens 32 --repeats 2
part 80 interventions --size 7b --new_tokens 8 --repeats 1
part 35 volcano --size 7b --batch 1 --new_tokens 16 --repeats 1
part 45 swap --size 7b --batch 1 --repeats 1
part 25 relevancy --size 7b --new_tokens 16 --repeats 1
"$python" benchmarks/gpu_row.py "$out"
exit $failed

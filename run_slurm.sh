#!/usr/bin/env bash
#SBATCH --job-name=vlmdiag
#SBATCH --output=slurm-%x-%A_%a.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
# Any experiment as a SLURM array, one process a GPU, all into one run directory. From the
# repository's root, on the machine that submits:
#
#     SBATCH="--gpus=1 --cpus-per-task=4 --mem=64G --time=12:00:00" \
#         ./run_slurm.sh 16 diagnostic_tools/run_coco_diagnostics.py --model_path llava-hf/llava-1.5-7b-hf
#
# 16 tasks share the work by --shard auto. A task that is preempted, or has five minutes left, goes
# into the queue again and on from where it was. When all tasks have ended, the same command runs
# once more without --shard: it computes what a lost task left, tries failed items again, and writes
# what is about all items (pages, sums, analyses). Then, with THEN, one more command:
#
#     THEN="scripts/calculate_mean_vector.py sums" SBATCH=... \
#         ./run_slurm.sh 4 scripts/save_post_adapter_acts.py --image_dir DIR --out_dir sums
#
# swap_analysis.py computes with --stage states, THEN="swap_analysis/swap_analysis.py ... --stage
# metrics plots" reads. TASKS=4: that many tasks in each job of the array (SBATCH="--ntasks=4
# --gpus-per-task=1 ..."). DRY=1 prints what would be submitted. docs/scale.md has more.
set -euo pipefail

python=${PYTHON:-python}
# srun no longer takes it from sbatch
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi

run() { # 3: done with failures, which lie in failures/
    printf '+ %s\n' "$(printf '%q ' "$@")"
    local code=0
    "$@" || code=$?
    if [ "$code" -eq 3 ]; then
        echo "some items failed, see failures/ in the run directory"
        code=0
    fi
    return "$code"
}

if [ "${1:-}" = --task ]; then # in a job of the array
    shift
    # the time is nearly over: into the queue again, then end
    trap 'echo "out of time: queued again"; scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"; exit 0' USR1
    # in each task by itself: srun's code is the greatest of all, and 3 would hide a 2
    task="$(declare -f run); run \"\$@\""
    srun --ntasks="${TASKS:-1}" --kill-on-bad-exit=0 bash -c "$task" run "$python" "$@" --shard auto &
    code=0
    wait $! || code=$?
    exit "$code"
fi

if [ "${1:-}" = --merge ]; then # after all of them
    shift
    trap 'echo "out of time: queued again"; scontrol requeue "$SLURM_JOB_ID"; exit 0' USR1
    merge() {
        run srun --ntasks=1 "$python" "$@"
        if [ -n "${THEN:-}" ]; then
            local then
            read -ra then <<< "$THEN"
            run srun --ntasks=1 "$python" "${then[@]}"
        fi
    }
    merge "$@" &
    code=0
    wait $! || code=$?
    exit "$code"
fi

usage() {
    echo "error: $1 (./run_slurm.sh TASKS SCRIPT [FLAGS]; the head of run_slurm.sh has examples)" >&2
    exit 2
}
[[ "${1:-}" =~ ^[1-9][0-9]{0,4}$ ]] || usage "the first argument is how many jobs the array has"
jobs=$1
shift
[ -f "${1:-}" ] || usage "${1:-no script} is no script in $(pwd)"
for word in "$@"; do
    case $word in --shard | --shard=*) usage "--shard is given by this script" ;; esac
done
read -ra options <<< "${SBATCH:-}"
submit() {
    if [ -n "${DRY:-}" ]; then
        printf '%q ' sbatch "$@" >&2
        printf '\n' >&2
        echo DRY
    else
        sbatch --parsable "$@"
    fi
}
name=$(basename "$1" .py)
script=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/run_slurm.sh
array=$(submit "${options[@]}" --job-name="$name" --array="0-$((jobs - 1))" "$script" --task "$@")
array=${array%%;*} # a cluster's name may follow
merge=$(submit "${options[@]}" --job-name="$name-merge" --output="slurm-%x-%j.log" --dependency="afterany:$array" "$script" --merge "$@")
if [ -z "${DRY:-}" ]; then
    echo "array $array of $jobs jobs, then ${merge%%;*}; logs: slurm-$name-${array}_*.log; squeue -j $array, scancel $array ${merge%%;*}"
fi

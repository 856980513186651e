#!/usr/bin/env bash
# Set everything up in .venv (or the active virtual environment) and run all tests: ./run_tests.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")"
source ./setup_env.sh
export OMP_NUM_THREADS=1 MPLBACKEND=Agg HF_HUB_OFFLINE=1
exec python -W error::SyntaxWarning -m pytest -q -n 2 --dist loadfile "$@"

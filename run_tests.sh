#!/usr/bin/env bash
# Set everything up in .venv (or the active virtual environment) and run all tests.
#
#     ./run_tests.sh                       # all
#     ./run_tests.sh fast                  # arithmetic, files, structure: under a minute, no model
#     ./run_tests.sh core                  # all but what is marked slow, types, smol, ray
#     ./run_tests.sh tests/test_grid.py    # pytest's arguments
set -euo pipefail
cd "$(dirname "$0")"
source ./setup_env.sh tests
export OMP_NUM_THREADS=1 MPLBACKEND=Agg HF_HUB_OFFLINE=1
run=(python -W error::SyntaxWarning -m pytest -q)
if [ "${1:-}" = fast ]; then
    shift
    exec "${run[@]}" -m "not campaign and not slow" $(grep -l '^pytestmark = pytest.mark.fast' tests/test_*.py) "$@"
fi
marks=()
if [ "${1:-}" = core ]; then
    shift
    marks=(-m "not campaign and not slow and not types and not smol and not ray")
fi
source tests/browser.sh
code=0
"${run[@]}" -n 2 --dist loadfile --no-loadscope-reorder ${marks[@]+"${marks[@]}"} "$@" || code=$?
if [ -z "${BROWSER:-}" ]; then
    echo "the tests of pages in a browser were skipped: no Chrome, Chromium or Edge is here; install one (Debian: apt-get install chromium chromium-driver)"
fi
exit $code

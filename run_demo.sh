#!/usr/bin/env bash
# The checkup of the small models that come with the repository: all five diagnoses and one report.
#
#     ./run_demo.sh                # about six minutes on two cores, set-up included
#     SIZE=paper ./run_demo.sh     # hours: as many pictures as a paper would take
#
# An interrupted demo goes on where it was. Variables and flags: run_checkup.sh.
set -euo pipefail
unset MODEL IMAGES
exec "$(dirname "${BASH_SOURCE[0]}")/run_checkup.sh" "$@"

#!/usr/bin/env bash
# Swap analysis of Molmo-7B-O on EmbSpatial-Bench, then merged. Its fine-tunes were not published: name your own as NAME=PATH. Needs a GPU of about 20 GB
# and the table; settings as in run_scales.sh.
#
#     DATA=data/EmbSpatial-Bench.tsv BOXES=data/embspatial_bench.json bash swap_analysis/run_molmo.sh
#     SCALES="vanilla 80k=checkpoints/molmo-80k" bash swap_analysis/run_molmo.sh
exec bash "$(dirname "${BASH_SOURCE[0]}")/run_scales.sh" molmo vanilla

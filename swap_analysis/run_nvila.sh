#!/usr/bin/env bash
# Swap analysis of NVILA-Lite-2B and its fine-tunes on EmbSpatial-Bench, then merged. Needs a GPU of about 8 GB and the table; settings as in run_scales.sh.
#
#     DATA=data/EmbSpatial-Bench.tsv BOXES=data/embspatial_bench.json bash swap_analysis/run_nvila.sh
#     SCALES="vanilla 80k" bash swap_analysis/run_nvila.sh
exec bash "$(dirname "${BASH_SOURCE[0]}")/run_scales.sh" nvila vanilla 80k 400k 800k 2m

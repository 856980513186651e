#!/usr/bin/env bash
# The document's first step. No model file is changed here, so none needs a copy.
echo "nothing to do: attention to the picture is measured without changing model files; go on with run_volcano_with_image_attention.py"

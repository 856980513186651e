# Sourced by run_demo.sh and run_tests.sh: a virtual environment with requirements.txt, made once, again when those change.
# TORCH_INDEX=<index url> takes torch from another package index, such as PyTorch's own for builds without CUDA.
if [ -z "${VIRTUAL_ENV:-}" ]; then
    [ -x .venv/bin/python ] || python3 -m venv .venv
    source .venv/bin/activate
fi
wanted=$(cat requirements.txt requirements-test.txt pyproject.toml; pwd)
if [ "$wanted" != "$(cat "$VIRTUAL_ENV/.installed-requirements" 2>/dev/null)" ]; then
    # torch by itself and first: a range in another package would bring the newest one
    python -c 'import torch' 2>/dev/null || pip install -q "$(grep '^torch==' requirements.txt)" ${TORCH_INDEX:+--index-url "$TORCH_INDEX"}
    pip install -q -r requirements.txt -r requirements-test.txt
    printf '%s\n' "$wanted" > "$VIRTUAL_ENV/.installed-requirements"
fi

# Sourced by run_demo.sh and run_tests.sh: a virtual environment with requirements.txt, made once.
if [ -z "${VIRTUAL_ENV:-}" ]; then
    [ -x .venv/bin/python ] || python3 -m venv .venv
    source .venv/bin/activate
fi
stamp="$VIRTUAL_ENV/.vlm-requirements"
if ! cmp -s <(cat requirements.txt pyproject.toml; pwd) "$stamp"; then
    if ! python -c 'import torch' 2>/dev/null; then
        # the plain name would bring gigabytes of CUDA libraries to a machine that has no use for them
        if command -v nvidia-smi >/dev/null || [ "$(uname)" = Darwin ]; then
            pip install -q "$(grep '^torch==' requirements.txt)"
        else
            pip install -q "$(grep '^torch==' requirements.txt)" --extra-index-url https://download.pytorch.org/whl/cpu
        fi
    fi
    pip install -q -r requirements.txt
    pip install -q pytest hypothesis scipy
    (cat requirements.txt pyproject.toml; pwd) > "$stamp"
fi

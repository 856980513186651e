# Sourced by run_demo.sh and run_tests.sh ("source setup_env.sh tests" for the tests' packages too):
# the active virtual environment, else .venv, with this repository installed in it. Made once, and
# again when the requirements change. uv is used where it is or can be had, for it picks PyTorch's
# build by what the machine has: without a GPU the one without CUDA.
if [ -z "${VIRTUAL_ENV:-}" ]; then
    if [ ! -x .venv/bin/python ]; then
        rm -rf .venv
        if command -v uv >/dev/null; then
            uv venv --quiet --seed .venv
        elif ! python3 -m venv .venv 2>/dev/null; then
            rm -rf .venv
            echo "error: no virtual environment can be made here: install uv (pip install uv), or Python's venv module (Debian: apt-get install python3-venv)" >&2
            exit 2
        fi
    fi
    source .venv/bin/activate
fi
requirements=(requirements.txt)
if [ "${1:-}" = tests ]; then requirements+=(requirements-test.txt); fi
wanted=$(cat "${requirements[@]}" pyproject.toml; pwd)
installed=$VIRTUAL_ENV/.installed-${1:-base}
if [ "$wanted" != "$(cat "$installed" 2>/dev/null)" ]; then
    echo "installing the packages of ${requirements[*]} into $VIRTUAL_ENV"
    command -v uv >/dev/null || python -m pip install --quiet uv 2>/dev/null || true
    # compiled now, as pip does: where Python may write no bytecode (PYTHONDONTWRITEBYTECODE, as in
    # many images) each start would compile torch and transformers again
    add() { # packages or -r files
        uv pip install --quiet --compile-bytecode "$@" 2>/dev/null || python -m pip install --quiet "$@"
    }
    # torch by itself and first: a range in another package would bring the newest one
    torch=$(grep '^torch==' requirements.txt)
    python -c 'import torch' 2>/dev/null || uv pip install --quiet --compile-bytecode --torch-backend auto "$torch" 2>/dev/null || add "$torch"
    add $(printf -- '-r %s ' "${requirements[@]}")
    printf '%s\n' "$wanted" > "$installed"
fi

# Sourced by the scripts that set up what they need: examples/quickstart.sh and tests/run.sh.

# Makes the package importable with the extras that $1 names ('.' or '.[test]'), in the active virtual environment or,
# without one, in .venv. What was installed before for the same files is not installed again.
ensure_environment() {
    local target="$1" python stamp wanted pins
    if [ -z "${VIRTUAL_ENV:-}" ]; then
        if [ ! -x .venv/bin/python ]; then
            python="$(command -v python3 || command -v python)" || { echo "error: no python3 found" >&2; return 1; }
            "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
                echo "error: $("$python" --version 2>&1) is too old; Python 3.10 or newer is needed" >&2
                return 1
            }
            "$python" -m venv .venv
        fi
        # shellcheck disable=SC1091
        . .venv/bin/activate
    fi
    stamp="$VIRTUAL_ENV/.megatron_flashi2v-$(printf '%s' "$target" | tr -c 'a-z' '_')"
    wanted="$PWD $(cat setup.py constraints.txt constraints-torch.txt | cksum)"
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        echo "Installing $target into $VIRTUAL_ENV (a few minutes the first time) ..."
        pins=(-c constraints.txt)
        # There is none yet, or the one installed here before. Another one stays: on Ascend it is torch_npu's.
        if [ "$(torch_version)" = "$(cat "$VIRTUAL_ENV/.our-torch" 2>/dev/null)" ]; then
            pins+=(-c constraints-torch.txt)
            python -m pip install --quiet --disable-pip-version-check "${pins[@]}" torch
            torch_version >"$VIRTUAL_ENV/.our-torch"
        fi
        python -m pip install --quiet --disable-pip-version-check "${pins[@]}" -e "$target"
        printf '%s' "$wanted" >"$stamp"
    fi
}

# The version of torch in the active environment; nothing without one.
torch_version() {
    python -c 'import importlib.metadata as m; print(m.version("torch"))' 2>/dev/null || true
}

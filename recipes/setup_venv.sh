# Sourced by tests/run.sh and recipes/quickstart.sh; defines `setup_venv EXTRAS [WITHOUT_DEPENDENCIES ...]`.
# It moves to the repository root, makes .venv there if there is none, installs this package with the versions of
# constraints.txt, and sets VENV_PYTHON. With nothing changed since the last time, it installs nothing.

fail() {
    echo "error: $*" >&2
    exit 1
}

make_venv() {
    local python="${PYTHON:-python3}"
    command -v "$python" > /dev/null || fail "no Python at '$python'; set PYTHON to an interpreter >= 3.11"
    # The package runs on 3.10 too, but the numpy and scipy versions in constraints.txt do not.
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "'$python' is $("$python" -V 2>&1), the pinned versions need Python >= 3.11; set PYTHON to a newer one"
    echo "making .venv with $("$python" -V)"
    "$python" -m venv .venv || {
        rm -rf .venv
        fail "'$python -m venv' failed, see above; on Debian or Ubuntu, install the package python3-venv"
    }
}

pip_install() {
    "$VENV_PYTHON" -m pip install --quiet --disable-pip-version-check --constraint constraints.txt "$@"
}

setup_venv() {
    local extras="$1" stamp checksum
    shift
    cd "$(dirname "${BASH_SOURCE[0]}")/.."
    [ -e .venv ] || make_venv
    VENV_PYTHON="$PWD/.venv/bin/python"
    "$VENV_PYTHON" -m pip --version > /dev/null 2>&1 ||
        fail "$PWD/.venv has no working Python with pip; delete that folder and run this again"

    stamp=".venv/installed-${extras//,/-}"
    # The folder is part of the checksum: an editable install breaks when the repository moves.
    checksum="$( (pwd && cat pyproject.toml setup.py constraints.txt recipes/setup_venv.sh) | cksum)"
    if [ "$(cat "$stamp" 2> /dev/null)" = "$checksum" ]; then
        return
    fi
    echo "installing into .venv (first time: about 2 minutes)"
    # torch goes first and pinned, so that no other distribution can bring a larger build of it.
    pip_install torch
    pip_install --editable ".[$extras]"
    if [ $# -gt 0 ]; then
        pip_install --no-deps "$@"
    fi
    echo "$checksum" > "$stamp"
}

#!/usr/bin/env bash
# Creates the virtual environment $1 with a Python >= 3.12 that really runs, and installs the pinned packages of extra $2.
set -euo pipefail
venv=$1 extra=$2

runs() { "$1" -c 'import sys, ssl, sqlite3, ctypes, venv; sys.exit(not (3, 12) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1; }

find_python() {
  local candidate
  for candidate in "${MMX_PYTHON:-}" python3.12 python3.13 python3 \
    "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.13*/bin/python; do
    [ -n "$candidate" ] && runs "$candidate" && { command -v "$candidate"; return 0; }
  done
  if command -v uv >/dev/null && uv python install 3.12 >/dev/null 2>&1; then
    candidate=$(uv python find 3.12) && runs "$candidate" && { echo "$candidate"; return 0; }
  fi
  return 1
}

if ! [ -x "$venv/bin/python" ] || ! runs "$venv/bin/python"; then
  python=$(find_python) || {
    echo "mmx-jax needs Python 3.12 or 3.13 (with ssl, sqlite3 and venv), and none was found: looked at MMX_PYTHON, python3.12," >&2
    echo "python3.13, python3, pyenv's versions and uv. Install one, or name it: make MMX_PYTHON=/path/to/python3.12 ..." >&2
    exit 1
  }
  echo "Creating $venv with $("$python" --version) ($python)"
  rm -rf "$venv"
  "$python" -m venv "$venv"
fi

echo "Installing the pinned packages of extra '$extra' ..."
PIP_DISABLE_PIP_VERSION_CHECK=1 "$venv/bin/python" -m pip install --quiet --constraint constraints.txt --editable ".[$extra]"
touch "$venv/.installed-$extra"
# The developers' packages contain the default ones.
if [ "$extra" = dev ]; then touch "$venv/.installed-cpu"; fi

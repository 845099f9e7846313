#!/usr/bin/env bash
# Run the tests with exactly the lowest versions that requirements*.txt allow, in .venv-lowest, which is made if it does
# not exist. Further arguments go to pytest. PYTHON names an interpreter for which those versions have wheels.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=.venv-lowest
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
pins=$(mktemp)
trap 'rm -f "$pins"' EXIT
sed -E '/^-r /d; s/>=/==/; s/ *#.*//' requirements.txt requirements-extras.txt requirements-test.txt >"$pins"
echo "installing the lowest versions (the first time takes some minutes: PyTorch is large)"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --requirement "$pins"
PATH="$PWD/$venv/bin:$PATH" python -m pytest -n auto --dist worksteal "$@"

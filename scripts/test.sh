#!/usr/bin/env bash
# Checks the style and runs the tests in .venv, which is made if need be. Further arguments go to pytest.
# The slow tests are left out: `scripts/test.sh -m slow` runs them alone, `-m ""` all.
set -euo pipefail
source "$(dirname "$0")/venv.sh" requirements-test.txt
ruff check .
ruff format --check .
mypy
python -m pytest -n auto --dist worksteal --durations=10 "$@"

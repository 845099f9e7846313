#!/usr/bin/env bash
# Checks the style and runs the tests in .venv, which is made if need be. Further arguments go to pytest.
# The slow tests are left out: `scripts/test.sh -m slow` runs them alone, `-m ""` all.
set -euo pipefail
source "$(dirname "$0")/venv.sh" requirements-test.txt
ruff check .
ruff format --check .
mypy
# In memory, if there is enough of it: on a disk, the tests' checkpoints take most of the time.
room=$(df --output=avail -k /dev/shm 2>/dev/null | tail -1)
[ "${room:-0}" -lt $((12 * 1024 * 1024)) ] || export PYTEST_DEBUG_TEMPROOT=${PYTEST_DEBUG_TEMPROOT:-/dev/shm}
# One process more than cores, since many tests wait for processes of their own.
python -m pytest -n "$(($(nproc) + 1))" --dist worksteal --durations=10 "$@"

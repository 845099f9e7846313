# Sourced by demo.sh and test.sh: goes to the project's folder and makes `python` that of .venv, with the requirement
# file "$1" installed.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ ! -x .venv/bin/python ]; then
  base=${PYTHON:-python3}
  "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || {
    echo "error: Python 3.10 or newer is needed; set PYTHON to one (tried: $base)" >&2
    exit 1
  }
  echo "making .venv"
  "$base" -m venv .venv
fi
export PATH="$PWD/.venv/bin:$PATH"
echo "installing $1 (the first time takes some minutes: PyTorch is large)"
python -m pip install --quiet --disable-pip-version-check --requirement "$1"

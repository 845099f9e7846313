#!/usr/bin/env bash
# Run the tests that need a GPU and measure the GPU tables of docs/benchmarks.md, in at most 9 minutes and without a
# network:
#   PYTHON=python3 bash scripts/gpu_check.sh [FOLDER]     # results go to FOLDER, output/gpu_check by default
# PYTHON needs the packages of requirements.txt and pytest; rows of transformers appear where that is installed.
# A part that does not fit into the time is cut off and named. The exit code is 1 unless every part succeeded.
set -uo pipefail
out=$(realpath -m "${1:-$(dirname "$0")/../output/gpu_check}")
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3}
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
deadline=$((SECONDS + 530)) # the rest of 9 minutes is for ending what is cut off
failed=0

fail() {
  echo "error: $1" >&2
  exit 1
}

# part NAME SECONDS COMMAND ..: run COMMAND for at most SECONDS and keep what it prints in NAME.txt.
part() {
  local name=$1 limit=$2 start=$SECONDS outcome=ok
  shift 2
  ((limit > deadline - SECONDS)) && limit=$((deadline - SECONDS))
  echo "== $name: $*"
  if ((limit <= 0)); then
    outcome="not run, no time was left"
  else
    timeout --kill-after=5 "$limit" "$@" 2>&1 | tee "$out/$name.txt"
    case ${PIPESTATUS[0]} in
      0) ;;
      124 | 137) outcome="cut off after $limit s" ;;
      *) outcome="failed" ;;
    esac
  fi
  [ "$outcome" = ok ] || failed=1
  echo "$name: $outcome, $((SECONDS - start)) s" >>"$out/summary.txt"
}

missing=$("$python" - <<'END'
from importlib.util import find_spec
needed = "torch torchvision pycocotools hotcoco scipy termcolor tqdm matplotlib pytest"
print(*(name for name in needed.split() if find_spec(name) is None))
END
) || fail "$python cannot be run: set PYTHON to an interpreter"
[ -z "$missing" ] || fail "$python lacks $missing: pip install -r requirements-test.txt, or set PYTHON to another one"
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || fail "$python: torch sees no GPU"

mkdir -p "$out" || fail "$out cannot be made"
: >"$out/summary.txt"
mapfile -t tests < <(grep -l 'mark\.gpu' tests/test_*.py)
speed=("$python" -m scripts.benchmark --device cuda --repeats 15)
part tests 200 "$python" -m pytest -p no:cacheprovider -m gpu --durations=5 "${tests[@]}"
part inference 90 "${speed[@]}" --parts inference --variants r50 r50dc5 --json "$out/inference.json"
part training 120 "${speed[@]}" --parts training --batch_sizes 2 8 32 --json "$out/training.json"
part groups 40 "${speed[@]}" --parts training --batch_sizes 2 --group_detr 1 3 11 --no_peer --json "$out/groups.json"
part training_dc5 90 "${speed[@]}" --parts training --variants r50dc5 --batch_sizes 2 8 32 --json "$out/training_dc5.json"
part compiled 150 "${speed[@]}" --parts inference training --batch_sizes 2 8 --compile --no_peer \
  --json "$out/compiled.json"
echo "== summary"
cat "$out/summary.txt"
exit "$failed"

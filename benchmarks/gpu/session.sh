#!/usr/bin/env bash
# Half an hour on a GPU machine, in commands of at most ten minutes each; run them in this order, from anywhere:
#
#   benchmarks/gpu/session.sh 1 [OUT]    is it right? the tests marked gpu, the generated code against the described device's;
#                                        then the battery's first cases: ceilings, 5b ours and eager
#   benchmarks/gpu/session.sh 2 [OUT]    goes on with 5b: compiled peers, recipes, attention kernels
#   benchmarks/gpu/session.sh 3 [OUT]    goes on with what is left: 2b, 1.5-5b
#
# Wheels from `make gpu-wheels`, if they lie in .wheels, are installed beside the machine's own packages, for this run
# only. OUT (default: out/gpu) must outlast the command: each goes on from OUT/results.json. The tests that need no GPU
# are not run here. Nothing here changes a setting of the GPU.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
part=${1:?say which part: 1, 2 or 3}
out=${2:-out/gpu}
python=${PYTHON:-python3}
mkdir -p "$out"
if compgen -G ".wheels/piece-*/*.whl" >/dev/null; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target "$site" .wheels/piece-*/*.whl || exit 1
  export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
resume=()
[ -f "$out/results.json" ] && resume=(--resume "$out/results.json")

case $part in
  1)
    timeout 200 "$python" -m pytest -q -m gpu -p no:cacheprovider tests 2>&1 | tee "$out/tests.log" | tail -n 15
    timeout 100 "$python" -m benchmarks.codegen --real --only 5b/ --json "$out/codegen-real.json" --plot "$out/codegen-real.svg" 2>&1 | tee "$out/codegen.log" | tail -n 20
    "$python" -m benchmarks.gpu --budget 250 --models 5b --out "$out" "${resume[@]}" ;;
  2) "$python" -m benchmarks.gpu --budget 560 --models 5b --out "$out" "${resume[@]}" ;;
  3) "$python" -m benchmarks.gpu --budget 560 --models 5b,2b,1.5-5b --out "$out" "${resume[@]}" ;;
  *) echo "error: part is '$part', expected 1, 2 or 3" >&2; exit 2 ;;
esac

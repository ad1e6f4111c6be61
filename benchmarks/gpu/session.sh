#!/usr/bin/env bash
# A quarter of an hour on a GPU machine, in commands of at most ten minutes each; run them in this order, from anywhere:
#
#   benchmarks/gpu/session.sh 1 [OUT]    the gate's first cases: 5b's attention, then its block in every recipe; where there
#                                        are several GPUs, every mesh of them before that, in half of the time
#   benchmarks/gpu/session.sh 2 [OUT]    is the rest right? the tests marked gpu, the most telling first; the generated code
#                                        against the described device's
#   benchmarks/gpu/session.sh 3 [OUT]    goes on with what is left of both
#
# Each part ends within its time (SECONDS_A_PART, 570), names what it did not run, and goes on from OUT (default:
# out/gpu), which must outlast the command; a part may be repeated. Compiling takes most of it: on an H200 with 16 cores
# the first block took 200 s (diffusers' max-autotune 150 of them), another recipe 150, all tests at once by eight
# processes 130. Where OUT/cache is kept, or carried to the next machine of the kind, that is not paid again.
#
# What a first run measures is recorded in benchmarks/expected/gpu/<device>.csv and in README's table, and copied to
# OUT/commit: commit that, whatever it says. Wheels from `make gpu-wheels`, if they lie in .wheels, are installed beside
# the machine's own packages, for this run only. Nothing here changes a setting of the GPU. GATE, TESTS, CODEGEN (more
# arguments of each) are for trying this without a GPU.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
part=${1:?say which part: 1, 2 or 3}
out=${2:-out/gpu}
python=${PYTHON:-python3}
seconds=${SECONDS_A_PART:-570}
mkdir -p "$out/commit"
if compgen -G ".wheels/piece-*/*.whl" >/dev/null; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target "$site" .wheels/piece-*/*.whl || exit 1
  export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
read -ra gate_arguments <<<"${GATE:-}"
read -ra test_arguments <<<"${TESTS:-}"
read -ra codegen_arguments <<<"${CODEGEN:---real}"

left() { echo $((seconds - SECONDS)); } # bash counts SECONDS since it began

# What a GPU alone can say comes first: products and their GELU, attention, graphs, then what the gate measures as well.
tests() {
  "$python" -W ignore -m benchmarks.gpu.budget --seconds "$1" --limit 150 --ledger "$out/tests.jsonl" -- -m gpu \
    --disable-warnings --first tests/model/test_products.py --first tests/model --first tests/runtime/test_cuda_graphs.py \
    --first tests/runtime --first tests/quant tests "${test_arguments[@]}"
}
codegen() {
  [ -s "$out/codegen-real.json" ] && return
  timeout "$1" "$python" -m benchmarks.codegen --only 5b/ "${codegen_arguments[@]}" --json "$out/codegen-real.json" \
    --plot "$out/codegen-real.svg" 2>&1 | tee "$out/codegen.log" | tail -n 20
}
gate() {
  "$python" -W ignore -m benchmarks.gpu --budget "$1" --limit 300 --out "$out" --resume "${gate_arguments[@]}"
}
commit() {
  "$python" -m benchmarks.gpu.table
  cp -r README.md docs/measurements.md benchmarks/expected/gpu "$out/commit/" 2>/dev/null
  echo "to commit: $(cd "$out/commit" && find . -type f | tr '\n' ' ')"
}

case $part in
  1) gate "$(left)" ;;
  2) tests "$((seconds * 3 / 4))"; codegen "$(left)" ;;
  3) gate "$((seconds * 3 / 4))"; tests "$(left)" ;;
  *) echo "error: part is '$part', expected 1, 2 or 3" >&2; exit 2 ;;
esac
commit

#!/usr/bin/env bash
# Proves and measures fastattn on a GPU machine, without network.
#
#   benchmarks/gpu.sh [--dry-run] OUT_DIR [PART ...]
#
# Parts, all by default, each within 9 minutes; one that fails does not keep the next from running:
#   install        this checkout, in place
#   tests          the GPU tests
#   linear_verify  the linear family's feature grid; what it compiles need not be compiled by the next
#   verify         all feature grids on every backend, recorded in OUT_DIR as the hardware ledger does
#   bench          the GPU preset of `fastattn bench`, and what a call costs the host
#   linear_bench   linear attention beside flash-linear-attention, where that is installed
#   sparse_bench   attention over block masks, by density and pattern, beside flex_attention and the dense kernel
#   mechanisms     softmax attention and what stands in for it, by length: time, and memory of a layer
#   memory         memory by length, to 128k tokens, and a whole model before and after
#   sanitize       some of the feature grid under compute-sanitizer: no kernel reads or writes out of bounds
#
# OUT_DIR then holds summary.txt, logs.txt (the output of every part) and what the parts wrote; exit code 1 where a part
# failed. PYTHON names the interpreter. --dry-run goes the same way on a CPU in a minute, with tiny shapes, Triton's
# interpreter and nothing installed: it tries this script, not the kernels.
set -u -o pipefail

readonly LIMIT_S=540
readonly ALL=(install tests linear_verify verify bench linear_bench sparse_bench mechanisms memory sanitize)

usage() {
    sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"
    exit 2
}

DRY=
if [ "${1-}" = --dry-run ]; then
    DRY=1
    shift
fi
[ $# -ge 1 ] && [ "${1#-}" = "$1" ] || usage
mkdir -p "$1"
OUT=$(cd "$1" && pwd)
shift
PARTS=("${@:-${ALL[@]}}")
for part in "${PARTS[@]}"; do
    case " ${ALL[*]} " in
        *" $part "*) ;;
        *) echo "gpu.sh: no part '$part'; there are ${ALL[*]}" >&2; exit 2 ;;
    esac
done

PYTHON=$(command -v "${PYTHON:-python3}") || { echo "gpu.sh: no interpreter ${PYTHON:-python3}" >&2; exit 2; }
# Before the checkout is entered: the interpreter may be named by a path from here.
PYTHON=$(cd "$(dirname "$PYTHON")" && pwd)/$(basename "$PYTHON")
# Build tools that were installed as packages stand beside the interpreter.
export PATH="$(dirname "$PYTHON"):$PATH" PYTHONUNBUFFERED=1 NO_COLOR=1
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
SCRATCH=$(mktemp -d)
trap 'rm -rf "$SCRATCH"' EXIT
[ -z "$DRY" ] || export TRITON_INTERPRET=1

run() {
    echo "+ $*"
    timeout "$LIMIT_S" "$@"
}

fastattn() {
    run "$PYTHON" -m fastattn.cli "$@"
}

part_install() {
    if ! { command -v cmake && command -v ninja && "$PYTHON" -c 'import pybind11'; } >/dev/null 2>&1; then
        echo "warning: cmake, ninja or pybind11 is missing: installing without the C++ kernels (FASTATTN_NATIVE=off)"
        export FASTATTN_NATIVE=off
    fi
    run "$PYTHON" -m pip install ${DRY:+--dry-run} --no-build-isolation --no-deps --editable .
}

part_tests() {
    local select=(tests/dense tests/linear tests/sparse tests/integrations/test_sdpa.py -k "triton or cuda" -p no:cacheprovider)
    if [ -n "$DRY" ]; then
        # The interpreter's tests are part of the ordinary ones; here it counts that they can be found.
        run "$PYTHON" -m pytest --collect-only -q "${select[@]}" || [ $? -eq 5 ]
        return
    fi
    if "$PYTHON" -c 'import xdist' 2>/dev/null; then
        # Few processes: they share the GPU's memory, and each compiles kernels.
        select+=(-n 8)
    fi
    run "$PYTHON" -m pytest -q "${select[@]}"
}

part_linear_verify() {
    if [ -n "$DRY" ]; then
        fastattn verify --family linear --backend triton --dtype float32 --device cpu --case delta_1 --case state
        return
    fi
    fastattn verify --family linear --device cuda
}

part_verify() {
    if [ -n "$DRY" ]; then
        # Not recorded: a record times the machine's best backend, at lengths that take the interpreter hours.
        fastattn verify --backend triton --dtype float32,float16 --device cpu --case lengths_63x65 --case paged_decode \
            --case blocks_gqa
        return
    fi
    fastattn verify --record --ledger "$OUT"
}

part_sanitize() {
    local command=("$PYTHON" -m fastattn.cli verify --dtype float16)
    if [ -n "$DRY" ]; then
        run "${command[@]}" --backend triton --device cpu --case gqa_bias
        return
    fi
    # torch's allocator would keep what lies past a tensor within the same allocation, where no access is wrong.
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin
    run compute-sanitizer --error-exitcode 1 "${command[@]}" --device cuda --case lengths --case key_lengths \
        --case packed --case paged --case gqa_bias --case everything --case blocks_everything
}

part_bench() {
    local files=(--json "$OUT/bench.json" --csv "$OUT/bench.csv")
    rm -f "$OUT/bench.csv" # or this run's rows would follow an earlier one's
    run "$PYTHON" -m pytest -q -p no:cacheprovider --benchmark-disable benchmarks/bench_overhead.py || return
    if [ -n "$DRY" ]; then
        fastattn bench --preset gpu-dry --device cpu "${files[@]}"
        return
    fi
    fastattn bench --preset gpu --device cuda "${files[@]}"
}

part_linear_bench() { bench_family linear; }

part_sparse_bench() { bench_family sparse; }

bench_family() {
    local files=(--json "$OUT/$1_bench.json" --csv "$OUT/$1_bench.csv")
    rm -f "$OUT/$1_bench.csv"
    if [ -n "$DRY" ]; then
        fastattn bench --preset "$1-gpu-dry" --device cpu "${files[@]}"
        return
    fi
    fastattn bench --preset "$1-gpu" --device cuda "${files[@]}"
}

part_mechanisms() {
    local names=performer,linear,retention,gla,delta
    local files=(--json "$OUT/mechanisms.json" --csv "$OUT/mechanisms.csv")
    rm -f "$OUT/mechanisms.csv"
    if [ -n "$DRY" ]; then
        fastattn bench --impl "sdpa,fastattn,$names" --seqlen 32,64 --heads 2 --head-dim 16 --device cpu "${files[@]}" &&
            fastattn profile --mechanism "$names" --seqlen 32,64 --heads 2 --head-dim 16 --device cpu --out "$OUT"
        return
    fi
    fastattn bench --preset mechanisms-gpu --device cuda "${files[@]}" &&
        fastattn profile --impl sdpa,fastattn --mechanism "$names" --seqlen 1k..64k --heads 16 --device cuda \
            --dtype bfloat16 --time-limit 30 --out "$OUT"
}

part_memory() {
    if [ -n "$DRY" ]; then
        fastattn profile --model op --seqlen 64..512 --heads 2 --head-dim 16 --device cpu --dtype bfloat16 --out "$OUT"
        fastattn profile --model benchmarks/models.py:encoder --seqlen 32,64 --device cpu --out "$OUT"
        return
    fi
    fastattn profile --model op --seqlen 1k..128k --heads 16 --head-dim 128 --device cuda --dtype bfloat16 --out "$OUT" &&
        fastattn profile --model benchmarks/models.py:encoder --impl original,replaced,activated,overridden \
            --seqlen 1k..16k --device cuda --out "$OUT"
}

: >"$OUT/logs.txt"
: >"$SCRATCH/table"
failed=0
for part in "${PARTS[@]}"; do
    echo "== $part" | tee -a "$OUT/logs.txt"
    began=$SECONDS
    "part_$part" 2>&1 | tee -a "$OUT/logs.txt" "$SCRATCH/$part.log"
    code=${PIPESTATUS[0]}
    result=ok
    if [ "$code" -ne 0 ]; then
        failed=1
        result="failed, exit code $code"
        [ "$code" -ne 124 ] || result="stopped after $LIMIT_S s"
    fi
    printf '%-14s %5d s   %s\n' "$part" $((SECONDS - began)) "$result" >>"$SCRATCH/table"
done

{
    # What each part found, in its own words.
    [ ! -f "$SCRATCH/tests.log" ] || tail -n 1 "$SCRATCH/tests.log"
    for part in linear_verify verify sanitize; do
        [ ! -f "$SCRATCH/$part.log" ] || grep -E '^(FAILED|.* cases pass|.*ERROR SUMMARY)' "$SCRATCH/$part.log"
    done
    for part in bench linear_bench mechanisms; do
        [ ! -f "$SCRATCH/$part.log" ] || sed -n '/^Geometric means/,/^written/{/^written/d;p}' "$SCRATCH/$part.log"
    done
    for part in mechanisms memory; do
        [ ! -f "$SCRATCH/$part.log" ] || sed -n '/^Total memory/,/^written/{/^written/d;p}' "$SCRATCH/$part.log"
    done
    echo
    cat "$SCRATCH/table"
} >"$OUT/summary.txt"
echo "== summary"
cat "$OUT/summary.txt"
exit "$failed"

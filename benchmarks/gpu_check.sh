#!/usr/bin/env bash
# Everything that needs a GPU, on a machine with no network: builds in place, tests both backends, measures.
#
#   benchmarks/gpu_check.sh                      all steps, within ten minutes on an H200
#   benchmarks/gpu_check.sh build pipeline       some of: build correctness graphs sanitizer bench pipeline;
#                                                pipeline, which fills ten minutes alone, only when it is named
#   benchmarks/gpu_check.sh --dry-run            as far as a machine without a GPU goes: builds and tests are
#                                                named, every benchmark case runs at a tiny size on the CPU
#
# Results go to $OUT (default runs/gpu_check). A step that fails does not stop the next; the exit status is the
# number of failed commands. No setting of the GPU is touched. Also read from the environment: PYTHON,
# BACKENDS ("cuda triton"), PAIRS (of the pipeline), SECONDS_IN_ALL (580), SGL_COMMIT (where git is missing).
# Wheels in .whl/ are used.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

USUAL=(build correctness graphs sanitizer bench)
STEPS=("${USUAL[@]}" pipeline)
OUT=${OUT:-runs/gpu_check}
PYTHON=${PYTHON:-python3}
BACKENDS=${BACKENDS:-cuda triton}
PAIRS=${PAIRS:-internvl3-1b-14b internvl2-2b-26b qwen2.5-vl-3b-32b}
SECONDS_IN_ALL=${SECONDS_IN_ALL:-580}
DRY=false
CHOSEN=()
FAILED=0
START=$SECONDS
SUMMARY='^=+ .*(passed|failed|error)|^[0-9]+ (passed|failed)|SUMMARY: |^[0-9]+ calls on '
OPS=(tests/kernels/test_{decode_attention,prefill_mass,selection,vocabulary,op_contract}.py)

for word in "$@"; do
    if [[ $word == --dry-run ]]; then
        DRY=true
    elif [[ " ${STEPS[*]} " == *" $word "* ]]; then
        CHOSEN+=("$word")
    else
        echo "gpu_check: unknown word '$word', expected --dry-run or some of: ${STEPS[*]}" >&2
        exit 2
    fi
done
if [[ ${#CHOSEN[@]} -eq 0 ]]; then
    CHOSEN=("${USUAL[@]}")
    if $DRY; then CHOSEN=("${STEPS[@]}"); fi
fi
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
: >"$OUT/summary.txt"
export PYTHONUNBUFFERED=1 CI=true # CI: a missing kernel fails its tests instead of skipping them

# run LOG SECONDS COMMAND...: append the output to LOG, kill after SECONDS or when all time is used, and note
# the outcome with the command's own summary line, looked for behind the last "$ command" of the log.
run() {
    local log=$OUT/$1 limit=$2 began=$SECONDS outcome status left=$((SECONDS_IN_ALL - SECONDS + START))
    shift 2
    if ! $DRY && ((left < limit)); then limit=$((left > 1 ? left : 1)); fi
    echo "\$ $*" >>"$log"
    timeout --kill-after=10 "$limit" "$@" >>"$log" 2>&1
    status=$?
    outcome=ok
    if [[ $status -ne 0 ]]; then
        outcome="FAILED ($status)"
        [[ $status -eq 124 || $status -eq 137 ]] && outcome="OUT OF TIME (${limit} s)"
        FAILED=$((FAILED + 1))
    fi
    printf '%-22s %4d s  %s\n' "$outcome" $((SECONDS - began)) "$*" | tee -a "$OUT/summary.txt"
    tac "$log" | sed '/^\$ /q' | grep -m 1 -E "$SUMMARY" | sed 's/^/    /' | tee -a "$OUT/summary.txt"
    return $status
}

# What only a machine with a GPU can do; with --dry-run its files must at least be there.
run_on_gpu() { # LOG SECONDS COMMAND...
    local word
    if ! $DRY; then
        run "$@"
        return
    fi
    for word in "${@:3}"; do
        if [[ $word == tests/* && ! -f $word ]]; then run "$1" "$2" ls "$word"; fi
    done
    echo "would run: ${*:3}"
}

pytest_on_gpu() { # SECONDS BACKEND FILE...
    local limit=$1 backend=$2 parallel=()
    shift 2
    if ! $DRY && "$PYTHON" -c 'import xdist' 2>/dev/null; then parallel=(-n 6); fi
    run_on_gpu tests.log "$limit" env SGL_KERNELS_BACKEND="$backend" SGL_TEST_DEVICE=cuda \
        "$PYTHON" -m pytest -q -p no:cacheprovider -m "not slow" "${parallel[@]}" "$@"
}

build() {
    local capability=9.0
    $DRY || capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader --id=0)
    run_on_gpu build.log 60 nvidia-smi
    run_on_gpu build.log 240 env SGL_KERNELS_FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST="$capability" \
        "$PYTHON" -m pip install --no-build-isolation --no-deps -e .
    run_on_gpu build.log 60 "$PYTHON" -m sgl_runtime.cli env
}

correctness() {
    local backend
    for backend in $BACKENDS; do
        pytest_on_gpu 150 "$backend" "${OPS[@]}"
    done
    pytest_on_gpu 90 "" tests/runtime/test_{attention,clock,golden,steps}.py
    pytest_on_gpu 90 "" tests/families/test_on_gpu.py
}

graphs() {
    local backend
    for backend in $BACKENDS; do
        pytest_on_gpu 90 "$backend" tests/kernels/test_on_gpu.py
    done
}

sanitizer() {
    local tool
    if $DRY; then run sanitizer.log 120 env SGL_TEST_SMALL=1 "$PYTHON" tests/kernels/run_once.py; fi
    for tool in memcheck racecheck; do
        run_on_gpu sanitizer.log 90 env SGL_KERNELS_BACKEND=cuda SGL_TEST_DEVICE=cuda SGL_TEST_SMALL=1 \
            compute-sanitizer --tool "$tool" --error-exitcode 9 "$PYTHON" tests/kernels/run_once.py
    done
}

bench() {
    local backend documents=()
    for backend in $BACKENDS; do
        rm -f "$OUT/gpu_ops.$backend.json"
        if $DRY; then
            run bench.log 120 "$PYTHON" -m benchmarks.gpu_ops measure --tiny --out "$OUT/gpu_ops.$backend.json"
        else
            run bench.log 120 env SGL_KERNELS_BACKEND="$backend" \
                "$PYTHON" -m benchmarks.gpu_ops measure --out "$OUT/gpu_ops.$backend.json"
        fi
        [[ -f $OUT/gpu_ops.$backend.json ]] && documents+=("$OUT/gpu_ops.$backend.json")
        $DRY && break
    done
    [[ ${#documents[@]} -gt 0 ]] || return 1
    "$PYTHON" -m benchmarks.gpu_ops report "${documents[@]}" --out "$OUT/gpu_ops.md" || FAILED=$((FAILED + 1))
}

# The pairs in turn, within what is left of the time; what was measured when it ends is in $OUT.
pipeline() {
    local pair words=()
    if $DRY; then
        run pipeline.log 300 "$PYTHON" -m benchmarks.pipeline --pair tiny --batch 1 --device cpu \
            --turns 1 --out "$OUT"
        return
    fi
    for pair in $PAIRS; do words+=(--pair "$pair"); done
    run pipeline.log "$SECONDS_IN_ALL" "$PYTHON" -m benchmarks.pipeline "${words[@]}" --device cuda \
        --limit $((SECONDS_IN_ALL - SECONDS + START - 15)) --out "$OUT"
}

if compgen -G ".whl/*.whl" >/dev/null && ! $DRY; then
    site=$(mktemp -d)
    "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --target "$site" .whl/*.whl &&
        export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
for step in "${CHOSEN[@]}"; do
    echo "== $step"
    "$step"
done
echo "== $FAILED failed, $((SECONDS - START)) s; logs in $OUT" | tee -a "$OUT/summary.txt"
exit $((FAILED > 125 ? 125 : FAILED))

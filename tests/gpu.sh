#!/usr/bin/env bash
# Usage: gpu.sh [tests|benchmarks]   Tests and sanitizer, or benchmarks, of the GPU kernels, on a machine that may have
# no internet: uses the packages of $PYTHON, and wheels of tyro in $WHEELS (wheels/) where it has none. Results go to $OUT, or to benchmarks/results/<device>/. Each stage has its
# share of nine minutes.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
VENV=.venv-gpu
RESULTS=${OUT:-benchmarks/results}
export SSLFAST_CACHE=$PWD/build/gpu-cache PYTHONUNBUFFERED=1
failed=0

set -e
"$PYTHON" -m venv --without-pip --clear --system-site-packages $VENV
BIN=$PWD/$VENV/bin
# Made from a virtual environment, a new one sees the base interpreter's packages only: add those of $PYTHON.
"$PYTHON" -c 'import site; print("\n".join(site.getsitepackages()))' \
    > "$("$BIN/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/parent.pth"
PATH="$BIN:$("$PYTHON" -c 'import os, sys; print(os.path.dirname(sys.executable))'):$PATH"
"$BIN/python" -m pip install -q --no-build-isolation --no-deps -e .
"$BIN/python" -c 'import tyro' 2> /dev/null || "$BIN/python" -m pip install -q --no-index --find-links "${WHEELS:-wheels}" tyro
"$BIN/python" -c 'import torch, triton, sslfast; assert torch.cuda.is_available(), "no GPU that torch can use"
print(sslfast.__file__, torch.__version__, triton.__version__, torch.cuda.get_device_name())'
set +e

stage() { # name, seconds, command
    local name=$1 limit=$2 began=$SECONDS
    shift 2
    timeout "$limit" "$@"
    local code=$?
    [ $code -eq 0 ] || failed=1
    echo "== $name: exit $code after $((SECONDS - began)) s"
}

if [ "${1:-tests}" = benchmarks ]; then
    # What needs longer, most of it torch.compile's time, is left out and said so.
    bench=("$BIN/sslfast" bench --device cuda --json "$RESULTS" --plots "$RESULTS/plots")
    stage "ops and losses" 300 "${bench[@]}" --seconds 0.5 --minutes 4
    stage "training steps" 100 "$BIN/python" benchmarks/steps.py --device cuda --rounds 10 --json-out "$RESULTS"
    stage "augmentation" 40 "$BIN/python" benchmarks/augment.py --device cuda --seconds 24 --json-out "$RESULTS"
    # Beside those originals that $PYTHON has; torch's own AveragedModel is always there.
    stage "drop-ins" 30 "$BIN/python" benchmarks/interop.py --device cuda --seconds 15 --json-out "$RESULTS"
    stage "blocks of a ring" 30 "$BIN/python" benchmarks/distributed.py --only blocks --device cuda --json-out "$RESULTS"
    exit $failed
fi
# One process compiles each kernel for all of them. 300 rows, so that masks are at work.
every=("$BIN/sslfast" bench --device cuda --sizes 300 --seconds 0.01 --no-compile --no-memory --peers none)
stage "every kernel once" 120 "${every[@]}"
if command -v compute-sanitizer > /dev/null; then
    log=$(mktemp)
    began=$SECONDS
    # Without torch's cache of memory, every buffer is an allocation of its own and its ends are seen.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 50 compute-sanitizer --tool memcheck --error-exitcode 9 \
        "${every[@]}" > "$log" 2>&1
    code=$?
    tail -n 3 "$log"
    if grep -q "Device not supported\|Failed to initialize" "$log"; then
        echo "== compute-sanitizer does not work on this machine"
    elif [ $code -eq 124 ]; then
        echo "== compute-sanitizer: cut off after 50 s, no error until then"
    else
        [ $code -eq 0 ] || failed=1
        echo "== compute-sanitizer: exit $code after $((SECONDS - began)) s"
    fi
else
    echo "== compute-sanitizer: not installed"
fi
workers=""
"$BIN/python" -c 'import xdist' 2> /dev/null && workers="-n 8"
stage "tests" 170 "$BIN/python" -m pytest $workers -k "cuda or gpu" tests/test_backends.py tests/test_gpu.py \
    tests/test_ema_kernels.py tests/test_patch_mask_kernels.py tests/test_patch_kernels.py \
    tests/test_prototypes_gpu.py tests/test_losses_gpu.py tests/test_interop_gpu.py tests/test_clip.py tests/test_supcon.py \
    tests/test_negative_losses.py tests/test_triplet.py tests/test_linear_cross_entropy.py \
    tests/test_distributed_blocks.py tests/test_augment_views_gpu.py tests/test_budget.py
exit $failed

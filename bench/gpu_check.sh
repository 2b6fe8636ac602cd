#!/usr/bin/env bash
# Everything that only a machine with an NVIDIA GPU can tell, in under 8 minutes: builds the library, runs the tests of
# kernels and engine on the device, then times the kernels and the engine against PyTorch (bench/gpu/__main__.py says
# what). Lines for `rlsd bench --report` go to bench/results. What is exported and compiled on the way stays in
# build/gpu, so that a second run has time for what the first had to leave out; torch.compile's max-autotune alone takes
# longer than that: python -m rlsd.bench.gpu --minutes 30 has time for it, or several runs with --compile-seconds 0, of
# which each goes on from what the one before compiled.
#
#     bench/gpu_check.sh [arguments of rlsd.bench.gpu, say --networks sd15]
#     bench/gpu_check.sh --rehearse [...]    the same road on a CPU at toy sizes; no figure is kept
#
# Needs Python 3.10+ with this project's extras cuda, export and test, and a C++ compiler. PYTHON names the
# interpreter, default python3. Exit status: 1 when a test failed or a result was wrong, 2 without a GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
rehearse=
if [ "${1:-}" = --rehearse ]; then rehearse=1; shift; fi
if [ -z "$rehearse" ] && ! nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null; then
    echo "bench/gpu_check.sh: no NVIDIA GPU here; bench/gpu_check.sh --rehearse runs the same road on the CPU" >&2
    exit 2
fi

work=$(mktemp -d)
exporting=
trap '[ -z "$exporting" ] || kill "$exporting" 2>/dev/null || true; rm -rf "$work"' EXIT

# A view of the checkout as the installed package, with a library of its own beside the engine's Python half: others
# may be using the one that lies there. LIBRARY names one that is built already.
mkdir -p "$work/rlsd/engine" "$work/objects"
for room in export kernels pipeline models bench; do ln -s "$PWD/$room" "$work/rlsd/$room"; done
for file in engine/*; do ln -s "$PWD/$file" "$work/rlsd/engine/"; done
rm -f "$work/rlsd/engine/librlsd.so"
if [ -n "${LIBRARY:-}" ]; then
    ln -s "$LIBRARY" "$work/rlsd/engine/librlsd.so"
else
    printf '%s\n' "$PWD"/engine/src/*.cpp | (cd "$work/objects" &&
        xargs -P "$(nproc)" -n 1 "${CXX:-c++}" -std=c++20 -O3 -fPIC -fvisibility=hidden -c)
    "${CXX:-c++}" -shared "$work"/objects/*.o -Wl,--version-script=engine/rlsd.map \
        -o "$work/rlsd/engine/librlsd.so" -ldl -lpthread
fi
export PYTHONPATH=$work${PYTHONPATH:+:$PYTHONPATH}
echo "built after $SECONDS s"

if [ -n "$rehearse" ]; then
    export TRITON_INTERPRET=1
    "$python" -m pytest tests/test_kernels_repulsion.py -p no:cacheprovider -q -k "median or bad_input"
    "$python" -m rlsd.bench.kernels --device cpu --out "$work/results/kernels.jsonl" --without-compiled \
        --only "repulsion N=4 D=384"
    "$python" -m rlsd.bench.gpu --device cpu --toy --out "$work/results/gpu.jsonl" --minutes 2 --rounds 3 "$@"
    "$python" -m rlsd.bench.report --results "$work/results" --out "$work/report"
    cat "$work/report/report.md"
    exit
fi

unset TRITON_INTERPRET  # with it the kernels would run in the interpreter, and pass
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
    echo "bench/gpu_check.sh: this PyTorch has no CUDA" >&2
    exit 2
}
# A team of OpenMP threads in each of the processes that run beside each other would get in the others' way.
OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} "$python" -m rlsd.bench.gpu.prepare fashion sd15 sd21-base & exporting=$!
# Most of the tests' time is Triton's compiler: on several processors where pytest-xdist is there, and not for ever.
workers=()
! "$python" -c 'import xdist' 2>/dev/null || workers=(-n "$(($(nproc) < 8 ? $(nproc) : 8))")
status=0
OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} timeout -s INT -k 10 180 "$python" -m pytest tests/test_cuda_device.py tests/test_kernels_*.py "${workers[@]}" -p no:cacheprovider -q ||
    status=1
beside=()
! kill -0 "$exporting" 2>/dev/null || beside=(--beside export)
"$python" -m rlsd.bench.kernels --minutes 1 --without-compiled "${beside[@]}" || status=1
# the last case may run over by some seconds; the whole shall stay below 8 minutes
"$python" -m rlsd.bench.gpu --minutes "$(awk "BEGIN { print (450 - $SECONDS) / 60 }")" "$@" || status=1
exit $status

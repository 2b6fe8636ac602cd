#!/usr/bin/env bash
# Everything that only a machine with an NVIDIA GPU can tell: the kernels' tests on the device, then their times.
# Results: bench/results/kernels-cuda.jsonl. Needs Python 3.10+, torch with CUDA, triton, pytest and a C++ compiler.
# PYTHON names the interpreter to use, default python3.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# A view of the checkout as the installed package, with the native library beside its Python half.
mkdir "$work/rlsd"
for room in engine export kernels pipeline models bench; do ln -s "$PWD/$room" "$work/rlsd/$room"; done
${CXX:-c++} -std=c++20 -O3 -fPIC -fvisibility=hidden -shared engine/src/*.cpp -Wl,--version-script=engine/rlsd.map \
    -o engine/librlsd.so -ldl -lpthread
export PYTHONPATH=$work
"$python" -m pytest tests/test_kernels_*.py -p no:cacheprovider -q
"$python" -m rlsd.bench.kernels "$@"

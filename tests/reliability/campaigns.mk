# The figures of RELIABILITY.md, each from one command.
#
#     make corrupted      2,000 corrupted bundles, path attacks, NaN at every step
#     make memory         every allocation of the core failing once, on a CPU and over tests/fake_cuda
#     make tsan           16 engines, 1,000 jobs and random cancels under ThreadSanitizer
#     make valgrind       the C example of docs/embedding.md
#     make aarch64        the C programs on 64-bit ARM, emulated; needs g++-aarch64-linux-gnu and qemu-user-static
#     make oldest         all Python tests with the oldest versions that pyproject.toml allows (gigabytes: PyTorch's CUDA)
#     make coverage       branches of the core that the tests take; needs clang and llvm-cov
#     make fuzz-short     each fuzzer for FUZZ_SECONDS; needs clang with libFuzzer (CC_CLANG, CXX_CLANG)
#     make fuzz-long      the loader's fuzzers, FUZZ_RUNS inputs each
CLANG := $(firstword $(foreach name,clang clang-19 clang-18 clang-17 clang-16 clang-15 clang-14,$(shell command -v $(name))))
CC_CLANG ?= $(CLANG)
CXX_CLANG ?= $(subst clang,clang++,$(CLANG))
FUZZ_SECONDS ?= 60
FUZZ_RUNS ?= 10000000
CONFIGURE = $(DEV)/bin/cmake -S . -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(DEV)/bin/ninja) \
    -DRLSD_PYTHON=$(abspath $(DEV)/bin/python)
ONNXRUNTIME = $$($(DEV)/bin/python -c "from rlsd.engine import find_onnxruntime as find; print(find())")
PROFILED = LLVM_PROFILE_FILE=$(CURDIR)/build/coverage/profiles/%4m
COVERED = tests/test_engine_*.py tests/test_device*.py tests/test_custom_ops.py tests/test_reliability_*.py
FUZZERS = build/fuzz/tests/fuzz
COMPILERS = CC=$(CC_CLANG) CXX=$(CXX_CLANG)

.PHONY: corrupted memory tsan valgrind aarch64 oldest coverage fuzzers fuzz-short fuzz-long

corrupted: $(DEV)/.ready
	$(DEV)/bin/python tests/corrupted_bundles.py
	$(DEV)/bin/python tests/path_attacks.py
	$(DEV)/bin/python tests/nan_steps.py

build/tiny/manifest.txt: tests/bundle_factory.py tests/tiny.py $(DEV)/.ready
	rm -rf build/tiny
	$(DEV)/bin/python tests/bundle_factory.py build/tiny

build/tiny-cuda/manifest.txt: tests/hosted.py build/tiny/manifest.txt
	rm -rf build/tiny-cuda
	$(DEV)/bin/python tests/hosted.py build/tiny build/tiny-cuda

memory: native build/tiny/manifest.txt build/tiny-cuda/manifest.txt
	$(BUILD)/tests/reliability/failing_memory build/tiny $(ONNXRUNTIME)
	RLSD_LIBCUDA=$(BUILD)/tests/reliability/libfake_cuda.so \
	    $(BUILD)/tests/reliability/failing_memory build/tiny-cuda $(ONNXRUNTIME)

tsan: build/tiny/manifest.txt
	$(CONFIGURE) -B build/tsan -DCMAKE_BUILD_TYPE=RelWithDebInfo -DRLSD_TESTS=ON -DRLSD_TSAN=ON
	$(DEV)/bin/cmake --build build/tsan --target many_engines
	TSAN_OPTIONS="suppressions=tests/reliability/tsan.supp halt_on_error=1" \
	    build/tsan/tests/reliability/many_engines build/tiny $(ONNXRUNTIME) 16 1000

valgrind: $(DEV)/.ready
	$(CONFIGURE) -B build/plain -DCMAKE_BUILD_TYPE=RelWithDebInfo -DRLSD_TESTS=ON
	$(DEV)/bin/cmake --build build/plain --target rlsd_pgm
	RLSD_ONNXRUNTIME=$(ONNXRUNTIME) valgrind --error-exitcode=1 --leak-check=full \
	    --errors-for-leak-kinds=definite,possible --suppressions=tests/reliability/valgrind.supp \
	    build/plain/tests/c/rlsd_pgm models/fashion/bundle examples/data/bag.pgm build/plain/bag \
	    --mask examples/data/right-half.pgm --steps 4

# ONNX Runtime asks /proc/cpuinfo what processor it is on and ends on the answer of an x86: QEMU looks below its root
# first. All C programs but `reconstruct`, which takes 7 minutes there; and the example's images are this
# machine's.
ARM = build/aarch64
ARM_ONNXRUNTIME = $(ARM)/onnxruntime/capi/libonnxruntime.so
EXAMPLE = models/fashion/bundle examples/data/bag.pgm $(ARM)/here --mask examples/data/right-half.pgm --steps 10
aarch64: native
	mkdir -p $(ARM)/root/proc
	ln -sfn /usr/aarch64-linux-gnu/lib $(ARM)/root/lib
	for cpu in 0 1; do printf 'processor\t: %d\nFeatures\t: %s\nCPU implementer\t: %s\nCPU architecture: %d\nCPU variant\t: %s\nCPU part\t: %s\nCPU revision\t: %d\n\n' \
	    $$cpu 'fp asimd aes pmull sha1 sha2 crc32 atomics fphp asimdhp asimdrdm lrcpc asimddp' 0x41 8 0x3 0xd0c 1; \
	    done > $(ARM)/root/proc/cpuinfo
	$(DEV)/bin/python $(PIP) download --no-deps --only-binary=:all: --platform manylinux_2_28_aarch64 --dest $(ARM) \
	    onnxruntime==$$($(DEV)/bin/python -c "import onnxruntime; print(onnxruntime.__version__)")
	$(DEV)/bin/python -m zipfile -e $(ARM)/*.whl $(ARM)
	mv $(ARM_ONNXRUNTIME).* $(ARM_ONNXRUNTIME)
	$(CONFIGURE) -B $(ARM) -DCMAKE_TOOLCHAIN_FILE=$(CURDIR)/tests/reliability/aarch64.cmake -DRLSD_TESTS=ON \
	    -DRLSD_ONNXRUNTIME=$(CURDIR)/$(ARM_ONNXRUNTIME)
	$(DEV)/bin/cmake --build $(ARM)
	$(DEV)/bin/ctest --test-dir $(ARM) --output-on-failure --exclude-regex reconstruct
	RLSD_ONNXRUNTIME=$(ONNXRUNTIME) $(BUILD)/tests/c/rlsd_pgm $(EXAMPLE)
	for name in 0 1 2 3 mean; do cmp $(ARM)/here-$$name.pgm $(ARM)/tests/c/bag-$$name.pgm || exit 1; done

oldest: $(DEV)/.ready
	$(DEV)/bin/python tests/oldest.py cpu export train batch dicom test > build/oldest.txt
	$(PYTHON) -m venv build/oldest
	build/oldest/bin/python $(PIP) install -r build/oldest.txt scikit-build-core ninja cmake
	build/oldest/bin/python $(PIP) install --no-build-isolation --no-deps .
	OMP_NUM_THREADS=1 build/oldest/bin/python -m pytest tests -n auto --maxprocesses 8 --dist loadfile

coverage: $(DEV)/.ready
	rm -rf build/coverage/profiles
	$(COMPILERS) $(CONFIGURE) -B build/coverage -DCMAKE_BUILD_TYPE=Debug -DRLSD_TESTS=ON -DRLSD_COVERAGE=ON
	$(DEV)/bin/cmake --build build/coverage
	$(PROFILED) $(DEV)/bin/ctest --test-dir build/coverage
	$(PROFILED) OMP_NUM_THREADS=1 PYTHONPATH=tests $(DEV)/bin/pytest -p with_library \
	    --library build/coverage/librlsd.so $(COVERED) -n auto --maxprocesses 4 --dist loadfile
	$(subst clang,llvm-profdata,$(CC_CLANG)) merge -o build/coverage/merged build/coverage/profiles/*
	$(subst clang,llvm-cov,$(CC_CLANG)) export -summary-only -instr-profile build/coverage/merged \
	    build/coverage/librlsd.so -object build/coverage/tests/reliability/failing_memory \
	    -object build/coverage/tests/reliability/many_engines engine/src > build/coverage/summary.json
	$(DEV)/bin/python tests/reliability/branches.py 90 < build/coverage/summary.json

fuzzers: $(DEV)/.ready
	$(COMPILERS) $(CONFIGURE) -B build/fuzz -DCMAKE_BUILD_TYPE=RelWithDebInfo -DRLSD_FUZZ=ON
	$(DEV)/bin/cmake --build build/fuzz --target fuzz

# What is found stays in build/fuzzed; the committed inputs are only read.
fuzz-short: fuzzers
	$(DEV)/bin/python $(PIP) install atheris
	set -e; for target in manifest weights loader calls images rows; do \
	    mkdir -p build/fuzzed/$$target; \
	    case $$target in images|rows) fuzzer="$(DEV)/bin/python tests/fuzz/fuzz_files.py $$target";; \
	    *) fuzzer=$(FUZZERS)/fuzz_$$target;; esac; \
	    $$fuzzer build/fuzzed/$$target tests/fuzz/corpus/$$target -max_total_time=$(FUZZ_SECONDS) -max_len=4096 \
	        -timeout=20 -rss_limit_mb=4096 -artifact_prefix=build/fuzzed/ -print_final_stats=1 -verbosity=0; done

# Side by side with make -j2. A freed block is watched for 16 MiB more, which one input does not need, instead of 256.
fuzz-long: fuzz-long-manifest fuzz-long-weights

fuzz-long-%: fuzzers
	mkdir -p build/fuzzed/$*
	ASAN_OPTIONS=quarantine_size_mb=16 $(FUZZERS)/fuzz_$* build/fuzzed/$* tests/fuzz/corpus/$* -runs=$(FUZZ_RUNS) \
	    -max_len=1024 -artifact_prefix=build/fuzzed/ -print_final_stats=1 -verbosity=0

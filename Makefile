# make demo    set up without torch, reconstruct the shipped test images
# make test    set up with torch, lint, types, Python tests, C tests under sanitizers
# make provider  fetch ONNX Runtime for GPUs (250 MB), for tests over stand-ins for NVIDIA's libraries
# make bench   particle-steps per second against PyTorch, on this machine
# make bundle  export models/fashion/checkpoint to models/fashion/bundle again
# make reference   docs/api from docstrings and rlsd.h again
# make corrupted, memory, tsan, valgrind, coverage, fuzz-short   the figures of RELIABILITY.md
PYTHON ?= python3
RUN := .venv
DEV := .venv-dev
BUILD := build/native
PIP := -m pip --disable-pip-version-check --quiet
ROOMS := engine kernels export pipeline models bench
NATIVE := pyproject.toml CMakeLists.txt $(wildcard engine/include/*.h engine/src/* engine/rlsd.*)
PYTHONS := $(foreach room,$(ROOMS),$(wildcard $(room)/*.py $(room)/*/*.py)) models/fashion/bundle/manifest.txt
# pip would choose gigabytes of CUDA packages where no NVIDIA GPU is: there, one CPU version is named first.
TORCH := $(if $(shell command -v nvidia-smi),torch>=2.11,torch==2.13.0)
# Where no GPU is, the index's torchvision cannot load its compiled part, which would break what imports it: there deepinv,
# which needs only the rest of it, gets a folder that only its own tests look into (tests/with_deepinv.py).
APART := --no-deps --target $(DEV)/deepinv torchvision==0.28.0 torchmetrics lightning-utilities einops h5py natsort
DEEPINV := $(if $(shell command -v nvidia-smi),,$(APART)) deepinv==0.5.0

# Of this wheel only the C libraries are looked at: the version of Python is none of theirs.
PROVIDER := build/onnxruntime-gpu
WHEEL := --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux_2_28_x86_64 onnxruntime-gpu==1.31.1

.PHONY: demo test bench bundle reference lint native provider clean

demo: $(RUN)/.ready
	$(RUN)/bin/rlsd demo --out out/demo --overwrite

# Tests in the files' order: by the number of tests, files with few but long ones would come last, on one processor.
# Where ONNX Runtime for GPUs cannot be had, its tests say that they skip.
test: $(DEV)/.ready native
	-$(if $(filter Linux-x86_64,$(shell uname -s)-$(shell uname -m)),$(MAKE) provider)
	$(MAKE) lint
	$(DEV)/bin/ctest --test-dir $(BUILD) --output-on-failure
	OMP_NUM_THREADS=1 $(DEV)/bin/pytest tests -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

lint: $(DEV)/.ready
	$(DEV)/bin/ruff check .
	$(DEV)/bin/ruff format --check .
	mkdir -p build/typed/rlsd
	for room in $(ROOMS); do ln -sfn $(CURDIR)/$$room build/typed/rlsd/$$room; done
	MYPYPATH=build/typed $(DEV)/bin/mypy $(addprefix -p rlsd.,$(ROOMS))

# The library and the C programs once more, with AddressSanitizer and UndefinedBehaviorSanitizer.
native: $(DEV)/.ready
	$(DEV)/bin/cmake -S . -B $(BUILD) -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(DEV)/bin/ninja) \
	    -DCMAKE_BUILD_TYPE=RelWithDebInfo -DRLSD_TESTS=ON -DRLSD_SANITIZE=ON -DRLSD_PYTHON=$(abspath $(DEV)/bin/python)
	$(DEV)/bin/cmake --build $(BUILD)

provider: $(PROVIDER)/.ready

$(PROVIDER)/.ready: | $(DEV)/.ready
	$(DEV)/bin/python $(PIP) download $(WHEEL) --dest $(PROVIDER)
	$(DEV)/bin/python -m zipfile -e $(PROVIDER)/*.whl $(PROVIDER)
	rm $(PROVIDER)/*.whl
	touch $@

bench: $(DEV)/.ready
	$(DEV)/bin/python -m rlsd.bench.engine
	$(DEV)/bin/pytest bench/test_kernels.py --benchmark-enable --benchmark-only \
	    --benchmark-columns=min,median,iqr,rounds --benchmark-json=build/kernels.json

bundle: $(DEV)/.ready
	$(DEV)/bin/rlsd export --checkpoint models/fashion/checkpoint --out models/fashion/bundle --name fashion --overwrite

reference: $(DEV)/.ready
	$(DEV)/bin/python docs/reference.py

$(RUN)/.ready: $(NATIVE) $(PYTHONS)
	$(PYTHON) -m venv $(RUN)
	$(RUN)/bin/python $(PIP) install --upgrade pip
	$(RUN)/bin/python $(PIP) install '.[cpu,report]'
	touch $@

$(DEV)/.ready: $(NATIVE)
	$(PYTHON) -m venv $(DEV)
	$(DEV)/bin/python $(PIP) install --upgrade pip
	$(DEV)/bin/python $(PIP) install '$(TORCH)'
	$(DEV)/bin/python $(PIP) install scikit-build-core ninja cmake
	$(DEV)/bin/python $(PIP) install $(DEEPINV)
	$(DEV)/bin/python $(PIP) install --no-build-isolation -e '.[cpu,export,train,batch,dicom,ray,test]'
	touch $@

include tests/reliability/campaigns.mk

clean:
	rm -rf $(RUN) $(DEV) build out

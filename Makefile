# make demo | test | test-matrix | test-plugins | bench | lint | cuda-check | tiny | clean.
# Each sets up $(VENV) by itself; the second time is quick.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv

BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)

.PHONY: demo test test-matrix test-plugins bench lint cuda-check tiny clean

demo: $(VENV)/.installed
	$(BIN)/sgl-vlm demo

# One file on one core: tests of a file share what is dear to make, and threads of several would only wait.
test: $(VENV)/.dev lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

# For every night: the runtime's tests with the oldest and the newest transformers. Gigabytes of torch the first time.
test-matrix: $(VENV)/.dev
	PYTHON=$(PYTHON) TORCH="$(TORCH)" .ci/matrix

# The plugins beside the real lmms-eval and the real VLMEvalKit. Gigabytes the first time.
test-plugins: $(VENV)/.dev
	PYTHON=$(PYTHON) TORCH="$(TORCH)" .ci/plugins

bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks.cpu_ops --out benchmarks/results

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Every CUDA kernel for every architecture, minutes; needs nvcc but no GPU.
cuda-check: $(VENV)/.dev
	$(BIN)/python csrc/cuda/nvcc.py --table docs/cuda_resources.md

# Trains and measures the tiny pair anew: hours on two cores, and it goes on where it was stopped.
TRAIN := $(BIN)/python -m sgl_runtime.tiny.train
tiny: $(VENV)/.installed
	$(TRAIN) small vision --steps 9000 --lr 2e-3
	$(TRAIN) small language --steps 8900 --batch 8 --lr 1.5e-3 --compile --visual-tokens 40
	$(TRAIN) small language --steps 9200 --batch 8 --lr 3e-3 --compile
	$(TRAIN) large vision --steps 5000 --lr 1.2e-3
	$(TRAIN) large language --steps 17500 --batch 8 --lr 1.2e-3 --compile --visual-tokens 40
	$(TRAIN) large language --steps 17900 --batch 8 --lr 2.5e-3 --compile
	$(BIN)/python -m benchmarks.tiny_quality --small runs/tiny/small --large runs/tiny/large

clean:
	rm -rf $(VENV) build *.egg-info sgl_kernels/*.so

# torch goes first and pinned: a newer one would pull gigabytes of CUDA packages onto a CPU-only machine.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check "$(TORCH)" "setuptools>=77" wheel ninja "pybind11>=2.13"
	touch $@

$(VENV)/.installed: $(VENV)/.torch $(SOURCES)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation -e .
	touch $@

$(VENV)/.dev: $(VENV)/.torch $(SOURCES)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation -e ".[dev]"
	touch $(VENV)/.installed $@

# make train   train TinyCNN on the bundled digits, beside backpropagation and the unfused step
# make test    the whole test suite
# make test-isa      what must hold on every instruction set, under each that this machine has
# make test-aarch64  the C++ kernels built for aarch64, the ops' tests on them under qemu
# make lint    ruff and mypy
# make triton-oldest    every Triton kernel compiled, launched and tested under the oldest Triton
# make rehearsal        bench/gpu.sh without a GPU, and what it makes of tests and calls that fail
# make bench   the pytest-benchmark suites; fair tables: python -m bench.fair MODEL
# make bench-gate       counters against the committed baseline, time against the commit before;
#                       STRICT=1: what could not be compared is red too
# make bench-baseline   that baseline anew, for a change that was meant to move a counter
# make page             bench/RESULTS.md and README.md's marked blocks from the result files
# Each sets up .venv first, and again only when what it was made from has changed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OLDEST := .venv-oldest
# No path of the packages that pip builds on the way may bring in another torch.
export PIP_CONSTRAINT := $(CURDIR)/.ci/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# cmake and ninja of the environment, where the machine has none of its own
export PATH := $(CURDIR)/$(BIN):$(PATH)

SOURCES := $(shell find csrc -type f) CMakeLists.txt

.PHONY: train test test-isa test-aarch64 triton-oldest bench bench-gate bench-baseline page lint \
	rehearsal setup clean

train: setup
	$(BIN)/ffengine train deeperforward/tinycnn --data digits --baselines

test: setup
	$(BIN)/python -m pytest -n auto --dist loadfile

triton-oldest: setup $(OLDEST)/.packages
	$(OLDEST)/bin/python -m bench.aot 90 > build/aot-oldest.json
	$(OLDEST)/bin/python -m pytest tests/kernels

test-isa: setup
	.ci/isa

rehearsal: setup
	$(BIN)/python -m pytest -m rehearsal tests/bench/test_gpu_rehearsal.py

test-aarch64:
	.ci/aarch64

bench: setup
	$(BIN)/python -m pytest bench --benchmark-only

bench-gate: setup
	$(BIN)/python -m bench.compare --gate $(if $(STRICT),--strict)

# with the CUDA kernels, where there is a compiler for them: their registers are in the baseline
bench-baseline: setup
	$(BIN)/python setup.py -q build_ext --inplace
	$(BIN)/python -m bench.compare --renew
	$(BIN)/python -m bench.page

page: setup
	$(BIN)/python -m bench.page --readme

lint: setup
	$(BIN)/ruff check .
	$(BIN)/mypy

setup: $(VENV)/.built

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch first and pinned, so that nothing after it chooses a version
$(VENV)/.packages: pyproject.toml .ci/constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -q -r .ci/constraints.txt
	$(BIN)/python -m pip install -q "setuptools>=65" wheel "pybind11>=2.12" "cmake>=3.24" ninja
	touch $@

$(VENV)/.built: $(VENV)/.packages setup.py $(SOURCES)
	$(BIN)/python -m pip install -q --no-build-isolation -e ".[test]"
	touch $@

# the oldest Triton in front of everything that $(VENV) has
$(OLDEST)/.packages: $(VENV)/.packages .ci/oldest_triton.txt
	$(BIN)/python -m venv --clear $(OLDEST)
	$(OLDEST)/bin/python -m pip install -q --no-deps -r .ci/oldest_triton.txt
	$(BIN)/python -c "import sysconfig; print('import site; site.addsitedir(%r)' \
		% sysconfig.get_path('purelib'))" \
		> $$($(OLDEST)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/venv.pth
	touch $@

clean:
	rm -rf build $(VENV)/.built $(VENV)/.packages ffengine/_C.*.so

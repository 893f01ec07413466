# Sets up .venv at first use, then runs. `make bench` and `make test` are all that a newcomer needs.
#
#   TORCH_INDEX=<address>   package index to take torch from (a CPU-only build is much smaller)
#   PYTHON=python3.12       interpreter for the environment

PYTHON ?= python3
TORCH ?= torch==2.13.0
TORCH_INDEX ?=

VENV := .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py $(shell find csrc -type f)
OLDEST_TRITON := build/triton-3.6
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet

.PHONY: bench test check sanitize clean

bench: $(VENV)/installed
	$(BIN)/fastattn bench --preset quickstart --out benchmarks/results/latest

test: $(VENV)/installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto tests

# Lint, types, the C++ core under sanitizers and for aarch64, the bfloat16 dot-product kernels by emulation, a wheel
# installed on its own, what the Triton kernels compile to for GPUs, and a dry run of the GPU harness.
check: $(VENV)/installed-check $(OLDEST_TRITON) sanitize
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tests/check_core.py aarch64
	$(BIN)/python tests/check_emulated_bf16.py
	$(BIN)/python tests/check_wheel.py
	$(BIN)/python tests/check_triton.py
	PYTHONPATH=$(OLDEST_TRITON) $(BIN)/python tests/check_triton.py sm_90
	PYTHON=$(BIN)/python benchmarks/gpu.sh --dry-run build/gpu-dry

# The C++ core's own tests under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer.
sanitize: $(VENV)/installed-check
	$(BIN)/python tests/check_core.py address thread

$(VENV)/torch:
	@echo "== creating $(VENV) and installing $(TORCH) (the download can take minutes)"
	$(PYTHON) -m venv $(VENV)
	$(PIP) --progress-bar on '$(TORCH)' $(if $(TORCH_INDEX),--index-url '$(TORCH_INDEX)')
	@touch $@

$(VENV)/installed: $(VENV)/torch $(SOURCES)
	@echo "== building and installing fastattn with its C++ kernels (about a minute)"
	$(PIP) --editable '.[cli]'
	@touch $@

# torch is named again so that what depends on it (timm's torchvision) is taken in the version that fits.
$(VENV)/installed-test: $(VENV)/installed
	@echo "== installing what the tests need"
	$(PIP) --editable '.[test]' '$(TORCH)'
	@touch $@

$(VENV)/installed-check: $(VENV)/installed-test
	$(PIP) --editable '.[test,check]' '$(TORCH)'
	@touch $@

$(OLDEST_TRITON): $(VENV)/installed-test
	$(PIP) --target $@ --no-deps triton==3.6.0

clean:
	rm -rf $(VENV) build dist *.egg-info fastattn/_native*.so

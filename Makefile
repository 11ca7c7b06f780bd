# `make quickstart` and `make test` each do all the set-up from a fresh clone; a second call starts in seconds.
SHELL := /bin/bash
VENV ?= .venv
PY := $(VENV)/bin/python
export JAX_PLATFORMS ?= cpu
export TPU_SKIP_MDS_QUERY ?= 1
export TPU_WORKER_HOSTNAMES ?= localhost
export TPU_ACCELERATOR_TYPE ?= v5p-8

.PHONY: setup quickstart test test-full lint format clean

setup: $(VENV)/.installed-cpu

$(VENV)/.installed-%: pyproject.toml constraints.txt tools/setup.sh
	@bash tools/setup.sh $(VENV) $*

# Each step takes and returns hundreds of megabytes: glibc keeps them, in huge pages, instead of asking the kernel for
# zeroed small ones every time (a fifth of the step).
QUICKSTART_MALLOC := glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=8589934592

quickstart: $(VENV)/.installed-cpu
	@GLIBC_TUNABLES=$(QUICKSTART_MALLOC) $(PY) train.py --config configs/quickstart.py

lint: $(VENV)/.installed-dev
	@$(VENV)/bin/ruff format --check --quiet . && $(VENV)/bin/ruff check --quiet .
	@$(VENV)/bin/mypy mmx_jax pallas_kernels parallel configs train.py eval.py
	@$(VENV)/bin/lint-imports --no-cache

format: $(VENV)/.installed-dev
	@$(VENV)/bin/ruff check --fix --quiet . ; $(VENV)/bin/ruff format .

PYTEST := $(PY) -m pytest -n 2 --dist loadgroup --jaxtyping-packages=mmx_jax,pallas_kernels,parallel,beartype.beartype

test: lint
	@$(PYTEST) -q -m "not full and not gpu" --durations=15

test-full: lint
	@$(PYTEST) -q -m "not gpu and not short" --durations=25

clean:
	@rm -rf build .pytest_cache .hypothesis .ruff_cache .mypy_cache *.egg-info

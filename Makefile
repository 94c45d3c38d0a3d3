# Two commands matter: `make figures` and `make test`. `make` alone lists the rest.
# A bare Python 3.11 or newer is enough: the first call creates .venv with pip, or with uv where it is installed.
#   make test TESTS=tests/core          a part of the tests
#   make test ARGS="-k landing -x"      options for pytest
#   make PYTHON=python3.12 VENV=.venv-3.12 test

.DEFAULT_GOAL := help
SHELL := /bin/sh
.SUFFIXES:
.PHONY: help figures test docs claims bench lint types notebooks pins clean
.SECONDARY:

VENV ?= .venv
BIN := $(VENV)/bin
# python3 unless it is too old and a newer one stands beside it
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; exit; }; done; echo python3)
UV ?= $(shell command -v uv 2>/dev/null)
TESTS ?= tests
WORKERS ?= 2
ARGS ?=

# Compiled programs are kept inside the working copy. They must not meet another jaxlib or another kind of processor, so the folder carries both;
# on macOS the cache stays off.
ONE_THREAD := XLA_FLAGS="$$XLA_FLAGS --xla_cpu_multi_thread_eigen=false" OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1
ifeq ($(shell uname -s),Darwin)
WITH_CACHE :=
else
PROCESSOR := $(shell (uname -m; grep -m1 -i -E '^(flags|features)' /proc/cpuinfo) 2>/dev/null | cksum | cut -d' ' -f1)
JAXLIB = $(shell $(BIN)/python -c 'from importlib.metadata import version; print(version("jaxlib"))' 2>/dev/null)
WITH_CACHE = JAX_COMPILATION_CACHE_DIR="$${JAX_COMPILATION_CACHE_DIR:-$(CURDIR)/.jax-cache-$(JAXLIB)-$(PROCESSOR)}" \
	JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.1
endif

help:  ## this list
	@echo "usage: make TARGET"
	@sed -n -E 's/^([a-z]+):.*## (.*)/  \1|\2/p' Makefile | awk -F'|' '{ printf "%-12s %s\n", $$1, $$2 }'

figures: $(VENV)/.figures  ## compute, draw and check every figure with the settings of the papers (minutes the first time, then cached)
	@$(WITH_CACHE) $(BIN)/theorylab figures $(ARGS)

# What tests cost is compiling many small programs once, so they are compiled without the passes that make large ones fast. The last flag
# exists in some versions of XLA only, which end the process on a flag that they do not know.
QUICK_COMPILE := --xla_cpu_multi_thread_eigen=false --xla_backend_optimization_level=0
WITHOUT_FUSION := --xla_cpu_use_fusion_emitters=false

test: $(VENV)/.test  ## every test, example, fast claim and small figure (some minutes on two cores)
	@flags="$(QUICK_COMPILE)"; \
	if JAX_PLATFORMS=cpu XLA_FLAGS="$(WITHOUT_FUSION)" $(BIN)/python -c "import jax; jax.devices()" >/dev/null 2>&1; then flags="$$flags $(WITHOUT_FUSION)"; fi; \
	$(WITH_CACHE) $(ONE_THREAD) XLA_FLAGS="$$XLA_FLAGS $$flags" $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(TESTS) $(ARGS)

docs: $(VENV)/.docs  ## build the documentation into site/
	@$(WITH_CACHE) $(BIN)/python docs/pages.py $(ARGS)
	@$(BIN)/python -m mkdocs build --strict --quiet
	@$(BIN)/python docs/check_site.py site
	@echo "open site/index.html"

claims: $(VENV)/.figures  ## measure every claim with full settings (minutes) and record the report for the documentation
	@$(WITH_CACHE) $(BIN)/theorylab claims --full --out docs/claims.json $(ARGS)

bench: $(VENV)/.bench  ## time the named workloads beside other packages
	@$(WITH_CACHE) $(BIN)/theorylab bench $(ARGS)

notebooks: $(VENV)/.docs  ## write every example as a notebook into docs/generated/examples/
	@$(WITH_CACHE) $(BIN)/python docs/pages.py --only examples $(ARGS)

lint: $(VENV)/.lint  ## style and likely mistakes (ruff)
	@$(BIN)/ruff check .

types: $(VENV)/.lint  ## types of the package (pyright)
	@$(BIN)/pyright --pythonpath $(BIN)/python

pins:  ## resolve constraints.txt again (needs uv)
	@uv pip compile pyproject.toml -q --universal --python-version 3.11 --all-extras --no-annotate --custom-compile-command "make pins" -o constraints.txt --upgrade

clean:  ## remove everything that was generated, the environment included
	rm -rf .venv* .jax-cache-* site docs/generated paper_figures/out .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp for each extra; `%` is its name.
$(VENV)/.%: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "theorylab needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -c 'import platform; print(platform.python_version())' 2>/dev/null || echo missing)."; \
		echo "Name another one: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)"; exit 1; } >&2
ifneq ($(UV),)
	@test -x $(BIN)/python || $(UV) venv -q --seed --python "$$($(PYTHON) -c 'import sys; print(sys.executable)')" $(VENV)
	@echo "installing theorylab[$*] with uv into $(VENV)"
	@$(UV) pip install -q --python $(BIN)/python -c constraints.txt -e '.[$*]'
else
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { \
		rm -rf $(VENV); echo "$(PYTHON) cannot create an environment: install its venv module (Debian, Ubuntu: apt install python3-venv) or uv." >&2; exit 1; }
	@echo "installing theorylab[$*] with pip into $(VENV); the first time takes a minute or two"
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[$*]'
endif
	@touch $@

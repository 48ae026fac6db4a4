# Each target sets up what it needs in .venv: Python 3.11 or later, pip and venv must be there.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
ARGS ?=
BIN := .venv/bin
PINS := -c constraints.txt --build-constraint constraints.txt
# Python compiles what is imported. Compiling all files of all packages takes half a minute.
INSTALL := $(BIN)/python -m pip install --no-compile
TESTED := '.[diffusers,video,train,ray]' --group test
NOTEBOOKS := $(patsubst notebooks/%.py,build/notebooks/%.ipynb,$(wildcard notebooks/*.py))

.PHONY: help demo test test-full coverage mutants matrix lint hooks format docs docs-serve notebooks site clean

help:
	@echo 'make demo       reconstruct a clip, offline'
	@echo 'make test       the tests, but for the long ones'
	@echo 'make test-full  the long tests: full sizes, whole grids, many random cases'
	@echo 'make coverage   the tests, and the lines and branches that they leave out'
	@echo 'make mutants    small wrong edits, one at a time: which do the tests miss?'
	@echo 'make matrix     some tests, on the lowest and highest versions supported'
	@echo 'make lint       ruff and pyright'
	@echo 'make hooks      lint before every commit, by prek'
	@echo 'make format     mend what ruff can mend'
	@echo 'make docs       the site, into site/; make docs-serve shows it while you write'
	@echo 'make site       the site, looked at in Chromium'
	@echo 'make notebooks  .ipynb files beside the notebooks, for Jupyter'
	@echo 'ARGS="..." is handed on; PYTHON=... names another interpreter'

demo: .venv/.demo
	$(BIN)/python -m eqx_cogvae reconstruct $(ARGS)

# Compiling is most of the suite's time. These flags leave out LLVM's optimisations, and XLA's
# slower way to emit fused loops; `make test-full` runs with both. The tests of a file share
# programs, so that each file stays in one process.
FAST_COMPILE := --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false
FAST_RUN := --xla_backend_optimization_level=1 --xla_cpu_use_fusion_emitters=false
test coverage mutants: export XLA_FLAGS ?= $(FAST_COMPILE)
test: .venv/.test
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations 20 $(ARGS)

test-full: .venv/.test
	$(BIN)/python -m pytest -m full --timeout 7200 $(ARGS)

coverage: .venv/.test
	rm -rf build/coverage
	mkdir -p build/coverage
	$(BIN)/python -m coverage run -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)
	$(BIN)/python -m coverage combine
	$(BIN)/python -m coverage report

mutants: .venv/.test
	$(BIN)/python scripts/mutants.py $(ARGS)

matrix: .venv/.pip
	$(BIN)/python scripts/matrix.py $(ARGS)

lint: .venv/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/pyright -p tests

hooks: .venv/.lint
	$(BIN)/prek install

format: .venv/.lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: .venv/.docs $(NOTEBOOKS)
	$(BIN)/python -m mkdocs build --strict $(ARGS)

docs-serve: .venv/.docs $(NOTEBOOKS)
	$(BIN)/python -m mkdocs serve $(ARGS)

site: docs
	$(BIN)/python tests/site/look.py site

notebooks: .venv/.docs
	$(BIN)/python -m jupytext --sync notebooks/*.py

# As in tests/test_notebooks.py: most notebooks compile for longer than they run, but not these.
LONG_RUNS := $(foreach number,05 06 07 09 11,build/notebooks/$(number)_%.ipynb)
build/notebooks/%.ipynb: OWN = XLA_FLAGS="$(FAST_COMPILE)" OMP_NUM_THREADS=1
$(LONG_RUNS): OWN = XLA_FLAGS="$(FAST_RUN)" OMP_WAIT_POLICY=PASSIVE

# The tests leave them here too: what they have executed is not executed again.
build/notebooks/%.ipynb: notebooks/%.py $(shell find eqx_cogvae -type f -not -name "*.pyc") | .venv/.docs
	mkdir -p build/notebooks
	JAX_PLATFORMS=cpu JAX_COMPILATION_CACHE_DIR=$(CURDIR)/.jax_cache \
	JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 $(OWN) \
		$(BIN)/python -m jupytext --to notebook --execute --output $@ $<

clean:
	rm -rf build site .venv .jax_cache .hypothesis .pytest_cache .ruff_cache

.venv/.demo: .venv/.pip
	$(INSTALL) $(PINS) -e '.[video]'
	touch $@

.venv/.test: .venv/.pip
	$(INSTALL) $(PINS) -e $(TESTED)
	touch $@

# What pyright reads the types of is installed too: the check of the site imports Playwright.
.venv/.lint: .venv/.pip
	$(INSTALL) $(PINS) -e $(TESTED) --group docs --group dev
	touch $@

.venv/.docs: .venv/.pip
	$(INSTALL) $(PINS) -e $(TESTED) --group docs
	touch $@

# An older pip knows neither --group nor --build-constraint.
.venv/.pip: pyproject.toml constraints.txt
	$(BIN)/python -m pip --version || $(PYTHON) -m venv .venv
	$(INSTALL) --upgrade -c constraints.txt pip
	touch $@

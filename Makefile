# Needs: Python 3.12 or 3.11 with venv, git, make. Everything else is installed into .venv by the first target that needs it.
#   make quickstart   the four SteerLM steps on the embedded corpus, ending in a report (≤ 5 minutes on 2 cores)
#   make test         the test suite             make check   ruff, mypy and codespell    make install   .venv only
#   make docs         the documentation as a site, in site/                              make format    ruff's layout of all code
#   make smollm2 OASST=FILE   the four steps on OASST from SmolLM2-135M, ending in a report and two Hugging Face folders
#   RANKS=1 make quickstart: on so many data-parallel ranks; the results do not depend on it, the time does
#   PYTHON=python3.11 (or a path) chooses the interpreter, and with it constraints-3.11.txt or constraints-3.12.txt;
#   VENV=.venv311 another place for the environment. Both together keep two environments side by side.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV ?= .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
PYTHON ?=
TESTS ?= tests

.PHONY: help install quickstart smollm2 test clients test-model check lint types format docs clean FORCE

help:
	@sed -n '2,9p' Makefile | sed 's/^#//'

install: $(STAMP)
	@true

# The stamp is written last, so an install that was cut short is done again.
$(STAMP): setup.py pyproject.toml scripts/install.sh $(wildcard constraints-*.txt)
	@bash scripts/install.sh $(VENV) $(PYTHON)
	@touch $@

# An environment of another version than PYTHON's is made anew, however new its stamp is.
ifneq ($(PYTHON),)
ASKED := $(shell python="$$(bash scripts/find_python.sh $(PYTHON) 2>/dev/null)" && "$$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
FOUND := $(shell sed -n 's/^version = \([0-9]*\.[0-9]*\).*/\1/p' $(VENV)/pyvenv.cfg 2>/dev/null)
ifneq ($(ASKED),$(FOUND))
$(STAMP): FORCE
endif
endif
FORCE:

# Without a GPU, one data-parallel rank per core up to four: small matrices gain more from ranks than from threads.
RANKS ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && echo 1 || { n=$$(nproc 2>/dev/null || echo 1); echo $$((n > 4 ? 4 : n)); })

quickstart: $(STAMP)
	@$(VENV)/bin/steerlm run experiment=quickstart parallel.data=$(RANKS)

# OASST=FILE is the corpus; SMOLLM2='train.steps=200 ...' has keys of steerlm run.
OASST ?=
SMOLLM2 ?=

smollm2: $(STAMP)
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} bash scripts/smollm2.sh $(PY) "$(OASST)" $(RANKS) $(SMOLLM2)

# One thread per process, two workers; tests/conftest.py says which tests of several ranks run alone.
# worksteal: each worker starts at its own end of the suite, so the two rarely wait for each other.
test: $(STAMP)
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist worksteal $(TESTS)

# Clients of other projects that tests ask the server with; too large for everyone, so that their tests are skipped without them.
clients: $(STAMP)
	@$(PY) -m pip --disable-pip-version-check --no-input install -qq -c constraints-$$($(PY) -c 'import sys; print("%d.%d" % sys.version_info[:2])').txt -e '.[clients]'

# What Megatron-Core's version may change: CI runs it with the older one as well, and the whole suite with the newer.
MODEL_TESTS = tests/parity tests/distributed $(shell grep -lE '$(USES_MEGATRON)' tests/unit/test_*.py)
USES_MEGATRON := megatron\.core|steerlm_megatron\.(runtime|model|train|generate|serve)|helpers\.(dist|engines|reference|paged_cases)

test-model: $(STAMP)
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist worksteal $(MODEL_TESTS)

check: lint types

lint: $(STAMP)
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@git ls-files -z | xargs -0 $(PY) -m codespell_lib

types: $(STAMP)
	@$(PY) -m mypy

format: $(STAMP)
	@$(PY) -m ruff format .
	@$(PY) -m ruff check --fix .

# NO_MKDOCS_2_WARNING: the theme announces its successor at every build, in the midst of what this build has to say.
docs: $(STAMP)
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict
	@echo "documentation: site/index.html"

# What commands and tools leave behind; environments and run folders stay.
clean:
	rm -rf build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv*' -not -path './$(VENV)/*' -prune -exec rm -rf {} +

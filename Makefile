# Needs: Python 3.11 or 3.12 with venv, git, make. Everything else is installed into .venv by the first target that needs it.
#   make quickstart   the four SteerLM steps on the embedded corpus, ending in a report (≤ 5 minutes on 2 cores)
#   make test         the test suite             make check   ruff + mypy             make install   .venv only
#   RANKS=1 make quickstart: on so many data-parallel ranks; the results do not depend on it, the time does
#   PYTHON=/path/to/python3.12 chooses the interpreter; VENV=dir another place for the environment.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV ?= .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
PYTHON ?=
TESTS ?= tests
TORCH := $(shell sed -n 's/^\(torch==[0-9.]*\)$$/\1/p' constraints.txt)
PIP := $(PY) -m pip --disable-pip-version-check --no-input

.PHONY: help install quickstart test check clean

help:
	@sed -n '2,5p' Makefile | sed 's/^#//'

install: $(STAMP)
	@true

# The stamp is written last, so an install that was cut short is done again.
# Torch goes first and by its exact version: with it in place, no other package can pull in a different build of it.
# DS_BUILD_OPS=0: DeepSpeed compiles nothing now; what it needs, it compiles when it is used.
$(STAMP): setup.py pyproject.toml constraints.txt
	@python="$$(bash scripts/find_python.sh $(PYTHON))"; \
	if [ ! -x $(PY) ] || ! $(PY) -c 'import pip' >/dev/null 2>&1; then \
	  echo "creating $(VENV) with $$python"; "$$python" -m venv --clear $(VENV); fi
	@echo "installing into $(VENV) (a few minutes the first time)"
	@$(PIP) install -qq -c constraints.txt "$(TORCH)" setuptools
	@DS_BUILD_OPS=0 $(PIP) install -qq -c constraints.txt -e '.[dev]'
	@touch $@

# Without a GPU, one data-parallel rank per core up to four: small matrices gain more from ranks than from threads.
RANKS ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && echo 1 || { n=$$(nproc 2>/dev/null || echo 1); echo $$((n > 4 ? 4 : n)); })

quickstart: $(STAMP)
	@$(VENV)/bin/steerlm run experiment=quickstart parallel.data=$(RANKS)

# One thread per process, two workers; tests/conftest.py lets tests that start processes of their own run one at a time.
# worksteal: each worker starts at its own end of the suite, so the two rarely wait for each other.
test: $(STAMP)
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist worksteal $(TESTS)

check: $(STAMP)
	@$(PY) -m ruff check .
	@$(PY) -m mypy

# What commands and tools leave behind; .venv and run folders stay.
clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

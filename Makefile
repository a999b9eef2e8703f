# Two commands are all a reader needs: `make notebooks` and `make test`. Both set up .venv first.
VENV    := .venv
READY   := $(VENV)/.ready
BIN     := $(VENV)/bin
PROFILE ?= params/smoke.yaml
# The first Python that is new enough; override with `make PYTHON=/path/to/python ...`.
PYTHON  ?= $(shell for p in python3.11 python3.12 python3.13 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

.PHONY: help setup notebooks site test test-all browser-test lint budget lab bench commit-notebooks clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */\1\t/' | expand -t 20

setup: $(READY)  ## make .venv with the pinned packages

$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "gcalib needs Python 3.11 or newer on the PATH; or name one: make PYTHON=/path/to/python"; exit 1; }
	@echo "Setting up $(VENV) with $(PYTHON) (some minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@# torch first and by its pin, so that nothing else gets to choose a build of it
	@$(BIN)/python -m pip install -q --disable-pip-version-check "$$(grep '^torch==' constraints.txt)" -c constraints.txt
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(READY)

notebooks: $(READY)  ## execute the notebooks (PROFILE=params/<name>.yaml) into build/notebooks/index.html
	@$(BIN)/python -m gcalib grid --profile $(PROFILE)
	@$(BIN)/python -m gcalib notebooks --profile $(PROFILE)

site: $(READY)  ## the executed notebooks as web pages that work offline, into build/site/index.html
	@$(BIN)/python -m gcalib site

test: $(READY)  ## run the tests that take minutes
	@$(BIN)/python -m pytest -q -m "not slow and not browser"

test-all: $(READY)  ## run all tests but those in a browser
	@$(BIN)/python -m pytest -q -m "not browser"

browser-test: $(READY)  ## look at the site and at JupyterLab in headless Chromium, which must be installed
	@$(BIN)/python -m pytest -q -m browser

lint: $(READY)  ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/mypy

budget: $(READY)  ## lines and files of the package and of results/, against the budget
	@$(BIN)/python -m pytest -q tests/test_house.py -k budget

lab: $(READY)  ## open JupyterLab on the notebooks
	@$(BIN)/jupyter lab notebooks/00_start_here.ipynb

bench: $(READY)  ## measure speed and memory on Food-Kitchen (docs/speed.md)
	@$(BIN)/python benchmarks/step.py

commit-notebooks: $(READY)  ## execute the notebooks in place, each on the profile it names, ready to commit
	@$(BIN)/python -m gcalib notebooks --in-place

clean:  ## remove what the commands made, except results
	@rm -rf build $(VENV)

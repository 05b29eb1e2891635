# Two commands that need nothing but Python 3.11 or newer: make demo, make test.
VENV ?= .venv
BIN := $(VENV)/bin
# the CPU build where pip can find it; any torch >= 2.9 will do
TORCH ?= torch==2.13.0
# what is imported is compiled then, and kept: all that pip installs takes it a minute
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-all lint conform docs clean

$(VENV)/.ready: pyproject.toml
	python3 -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile --disable-pip-version-check $(TORCH)
	$(BIN)/pip install --quiet --no-compile --disable-pip-version-check --editable '.[dev]'
	touch $@

demo: $(VENV)/.ready
	rm -rf demo-out
	$(BIN)/moecule compress embedded -o demo-out --bits 2.5
	$(BIN)/moecule generate demo-out "The president said that" --tokens 40
	$(BIN)/moecule report demo-out -o demo-out/report.html

lint: $(VENV)/.ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test test-all: export OMP_NUM_THREADS = 1

test: lint
	$(BIN)/pytest -m "not slow" -n 2

test-all: lint
	$(BIN)/pytest -n 2

# all laws over all families, and README's tables of families and methods
conform: $(VENV)/.ready
	$(BIN)/python tests/conform.py -n 2
	$(BIN)/python tests/conform.py --readme

# build/site/index.html; a broken link fails
docs: $(VENV)/.ready
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[docs]'
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) demo-out build dist

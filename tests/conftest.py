"""Eight CPU devices; rank promotion raises; warnings are errors.

JAX_PLATFORMS=cuda leaves the CPU to others: only tests marked `native` run.
"""

import gc
import os

# Before JAX starts; processes that tests start have them too.
os.environ.setdefault('NPROC', '32')  # room for collectives of many devices
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', os.path.join(
    os.path.dirname(os.path.dirname(os.path.abspath(__file__))), '.cache',
    'jax'))
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
# Else the folder's path is part of each key, and a copied one is empty.
os.environ.setdefault('JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES', 'none')

import pathlib
import shutil
import signal
import subprocess
import sys
import warnings

import hypothesis
import jax
import pytest
from jax._src.array import ArrayImpl

from tests.common.transfers import guard_reads

# Modules and tests live to the end: half a million objects, through which the
# garbage collector looked for a sixth of the suite's time.
gc.disable()
NATIVE = os.environ.get('JAX_PLATFORMS') in ('cuda', 'gpu')
if NATIVE:
  # Many processes share the device.
  os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')
  jax.config.update('jax_default_matmul_precision', 'highest')
else:
  # Compiling is most of the time of a clean clone: two fifths less of it, and
  # no token of a golden is another.
  os.environ.setdefault('XLA_FLAGS', '--xla_backend_optimization_level=0 '
                        '--xla_llvm_disable_expensive_passes=true')
  os.environ['JAX_PLATFORMS'] = 'cpu'  # of children
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_num_cpu_devices', 8)
  guard_reads()
jax.config.update('jax_numpy_rank_promotion', 'raise')
jax.devices()  # starts them, before a runner asks for another number

# The background job of a shell ignores Ctrl-C, which some tests send.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
  signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish(session):
  del session
  gc.freeze()
  gc.set_threshold(10_000, 20, 20)
  gc.enable()


def pytest_sessionfinish(session):
  del session
  gc.freeze()  # pytest collects twice more, for seconds, before it ends


# No example is too slow: a loaded machine is no failure.
hypothesis.settings.register_profile('dsjax', deadline=None)
hypothesis.settings.load_profile('dsjax')


# Files that compile the same steps: one process runs all of them, and begins
# with them, so that the other has the rest meanwhile.
TOGETHER = 'tests/runtime/'


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
  if config.getvalue('dist') != 'loadfile':
    return None
  from xdist.scheduler import LoadFileScheduling

  class Together(LoadFileScheduling):

    def _split_scope(self, nodeid):
      return (TOGETHER if nodeid.startswith(TOGETHER) else
              super()._split_scope(nodeid))

  return Together(config, log)


def pytest_collection_modifyitems(config, items):
  if NATIVE:
    kept = [item for item in items if 'native' in item.keywords]
    config.hook.pytest_deselected(
        items=[item for item in items if item not in kept])
    items[:] = kept
  items.sort(key=lambda item: not item.nodeid.startswith(TOGETHER))


# Linux gives a process 65,530 maps, every program takes some, and the one for
# which there is none left ends the process.
MOST_MAPS = 36_000


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item, nextitem):
  yield
  maps = pathlib.Path('/proc/self/maps')
  if (nextitem is None or nextitem.path != item.path) and maps.exists():
    with maps.open() as file:
      count = sum(1 for _ in file)
    if count > MOST_MAPS:
      jax.clear_caches()
      if 'dsjax.runtime.steps' in sys.modules:  # what it says has run is gone
        sys.modules['dsjax.runtime.steps'].RAN.clear()
      gc.collect()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
  report = yield
  if NATIVE and report.failed:
    try:
      jax.block_until_ready(jax.device_put(0) + 1)
    except jax.errors.JaxRuntimeError:  # it poisoned this process's context
      os._exit(70)  # the others run in another one
  return report


@pytest.fixture(autouse=True)
def _warnings_are_errors():
  with warnings.catch_warnings():
    if not NATIVE:  # there, numbers are judged
      warnings.simplefilter('error')
    yield


@pytest.fixture
def host_reads(monkeypatch):
  """Sizes of arrays whose values the host has read."""
  sizes, value = [], ArrayImpl._value.fget

  def spy(self):
    sizes.append(self.size)
    return value(self)

  monkeypatch.setattr(ArrayImpl, '_value', property(spy))
  return sizes


BUILD = ('import sys; from setuptools import build_meta; '
         'build_meta.build_wheel(sys.argv[1])')


@pytest.fixture(scope='session')
def wheel(tmp_path_factory):
  """A wheel of this tree."""
  root, folder = pathlib.Path(__file__).parent.parent, (
      tmp_path_factory.mktemp('wheel'))
  tree = folder / 'tree'
  for name in ('dsjax', 'kernels'):
    shutil.copytree(root / name, tree / name,
                    ignore=shutil.ignore_patterns('__pycache__'))
  for name in ('pyproject.toml', 'README.md', 'LICENSE'):
    shutil.copy(root / name, tree)
  subprocess.run([sys.executable, '-c', BUILD, folder], cwd=tree, check=True,
                 stdout=subprocess.DEVNULL)
  built, = folder.glob('*.whl')
  return built


LIMIT_S = 400  # of one test, compilation on a loaded machine included


@pytest.fixture
def no_hang():
  """A hang is a failure."""
  def stop(*_):
    raise TimeoutError(f'no end after {LIMIT_S} s')

  before = signal.signal(signal.SIGALRM, stop)
  # Again and again, since leaving a `with serve(...)` may hang too.
  signal.setitimer(signal.ITIMER_REAL, LIMIT_S, 5)
  yield
  signal.setitimer(signal.ITIMER_REAL, 0)
  signal.signal(signal.SIGALRM, before)

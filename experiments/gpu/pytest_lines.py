"""A pytest plugin: outcomes as Lines, and no test begins when time is up.

python -m pytest -p experiments.gpu.pytest_lines, with DSJAX_GPU_LINES (a
file), DSJAX_GPU_TASK and DSJAX_GPU_SECONDS in the environment. A test that
hangs, in a kernel say, ends its worker, and pytest-xdist starts another.
Sweeps come last, a seed of each in turn.
"""

import collections
import os
import pathlib
import threading
import time
from collections.abc import Generator

import pytest

from experiments.gpu.lines import Lines

BEGAN = 'DSJAX_GPU_BEGAN'  # seconds of the wall clock, same for all workers
EVERY = 25  # tests a line tells how many there were so far
LAST = 0.85  # of the time, after which no test begins
MOST = 0.95  # after which none goes on, nor one that took a third of it


def pytest_configure(config: pytest.Config) -> None:
  os.environ.setdefault(BEGAN, str(time.time()))
  if not hasattr(config, 'workerinput'):  # pytest-xdist's workers only test
    config.pluginmanager.register(Outcomes())


def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
  def seed(item: pytest.Function) -> int:
    return (int(str(item.callspec.params.get('seed', 0)))
            if item.get_closest_marker('sweep') else -1)

  items.sort(key=seed)


def _lines():
  return Lines(pathlib.Path(os.environ['DSJAX_GPU_LINES']),
               os.environ['DSJAX_GPU_TASK'])


def _hang(name, seconds):
  _lines().write(name, False, says=f'no end after {seconds:.0f} s')
  os._exit(71)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item
                            ) -> Generator[None, object, object]:
  seconds = float(os.environ['DSJAX_GPU_SECONDS'])
  left_s = MOST * seconds - (time.time() - float(os.environ[BEGAN]))
  limit_s = max(min(left_s, seconds / 3), 1)
  timer = threading.Timer(limit_s, _hang, (item.nodeid, limit_s))
  timer.daemon = True
  timer.start()
  try:
    return (yield)
  finally:
    timer.cancel()


def pytest_runtest_setup() -> None:
  gone_s = time.time() - float(os.environ[BEGAN])
  if gone_s > LAST * float(os.environ['DSJAX_GPU_SECONDS']):
    pytest.skip('out of time')


class Outcomes:
  """Counts tests; writes a line for each that fails, and one for all."""

  def __init__(self) -> None:
    self.lines = _lines()
    self.counts = collections.Counter()

  def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
    """A test has ended, or its set-up has failed."""
    late = report.skipped and 'out of time' in str(report.longrepr)
    if report.when == 'call' or report.outcome != 'passed':
      self.counts['out of time' if late else report.outcome] += 1
      if not sum(self.counts.values()) % EVERY:
        self.lines.write('so far', figure=self.shown())
    if report.failed:
      self.lines.write(report.nodeid, False, seconds=report.duration,
                       says=str(report.longrepr)[-1500:])

  def shown(self) -> str:
    """The counts in words."""
    return ', '.join(f'{n} {what}' for what, n in self.counts.items())

  def pytest_sessionfinish(self, exitstatus: int | pytest.ExitCode) -> None:
    """All tests have ended."""
    self.lines.write('all', self.counts['passed'] > 0 and exitstatus == 0,
                     figure=self.shown() or 'no tests',
                     exit_code=int(exitstatus),
                     **{k.replace(' ', '_'): n
                        for k, n in self.counts.items()})

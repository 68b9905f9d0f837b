"""Nothing compiles while serving, whatever another test has compiled.

These tests empty the caches of compiled programs, so they have a file of their
own: tests after them in a file would compile all of it again.
"""

import dataclasses

import jax
import pytest

from dsjax.runtime.steps import make_step
from experiments.verify.faults import KINDS, Injector
from tests.common.serving import (
  LONG,
  MIXED,
  PAGES_4,
  check_tokens,
  compilations,
  disturb,
  play,
  server_of,
  want,
)

pytestmark = pytest.mark.usefixtures('no_hang')


@pytest.fixture(autouse=True)
def _nothing_is_compiled():
  jax.clear_caches()  # else what another test compiled would not be missed
  make_step.cache_clear()


@pytest.mark.parametrize('mode', (
    'chunked_pp2', *(pytest.param(mode, marks=pytest.mark.deep)
                     for mode in ('colocated', 'tp1_tp2', 'pp2_tp3'))))
def test_nothing_compiles_while_serving(mode):
  with server_of(mode) as server, compilations() as names:
    disturb(server)
    assert not names
    jax.jit(lambda x: x + 1)(1)
    assert names, 'the listener hears nothing'


def test_nothing_compiles_and_nothing_moves_implicitly_through_faults():
  config = dataclasses.replace(PAGES_4, checksum=True, tries=50, restarts=50,
                               restart_s=0.0)
  work = MIXED[:6] + LONG[:2]
  assert all(map(want, work))  # the oracle compiles and moves what it likes
  with server_of('1p1d', config) as server:
    with compilations() as names, jax.transfer_guard('disallow'):
      disturb(server)
      with Injector(server) as injector:
        for method, every in KINDS.items():
          for side in (0, 1):
            for kind in set(every) - {'stall'}:
              injector.arm(side, method, kind, 2)
        check_tokens(work, play(server, work, between=2, faulty=True))
        server.kill(0, back_s=0.0)
        check_tokens(work, play(server, work, faulty=True))
        assert len(injector.fired) > 10
      assert not names
      # The guard raises inside an engine's call: a fault like any other.
      assert not any('isallowed' in text for _, text in server.faults)
      with jax.transfer_guard('allow'):
        jax.jit(lambda x: x + 1)(1)
      assert names, 'the listener hears nothing'

"""Pages that come back from host memory: tokens as without, within a budget."""

import collections
import dataclasses
import functools
import os
import types

import jax
import numpy as np
import pytest

from dsjax.config.checks import InputError
from dsjax.config.engine import EngineConfig
from dsjax.runtime import host_memory
from dsjax.scheduling import prefix_cache
from dsjax.scheduling.events import Load, LoadFailed, Offload
from tests.common import tiny
from tests.common.samples import deep
from tests.common.serving import (
  LONG,
  MIXED,
  PAGES_4,
  PAGES_16,
  check_tokens,
  compilations,
  drain,
  expected_of_fakes,
  fake_server_of,
  play,
  server_of,
)

pytestmark = pytest.mark.usefixtures('no_hang')
MANY = 2**22  # bytes: more than any test fills


def tiered(config=PAGES_4, host_bytes=MANY, **changes):
  return dataclasses.replace(config, prefix_cache=True, host_bytes=host_bytes,
                             **changes)


def by_turns(server, sessions=5, turns=3, first=17, more=3, count=4,
             faulty=False):
  """[(prompt, output)] of sessions that take turns: what one has kept is
  evicted by the others."""
  said, prompts = [], [tiny.prompt(first, n) for n in range(sessions)]
  for turn in range(turns):
    for n, prompt in enumerate(prompts):
      output, = play(server, [(prompt, {'max_tokens': count})], faulty=faulty)
      said.append((prompt, output))
      prompts[n] = (*prompt, *output.tokens, *tiny.prompt(more, turn + 7 * n))
  return said


def commands(server, kind):
  return [c for _, commands in server.log for c in commands
          if isinstance(c, kind)]


@pytest.mark.parametrize('mode, config', [
    ('chunked', PAGES_16), ('colocated_pp2', PAGES_4),
    ('1p1d', dataclasses.replace(PAGES_4, page_size=2, num_pages=40,
                                 decode_page_size=4)),
    ('tp1_tp2', dataclasses.replace(PAGES_4, kv_dtype='int8')),
    *deep(*((mode, PAGES_4) for mode in (
        'colocated', '1p1d', 'tp2_tp1', '2flexible')))])
def test_tokens_are_equal_and_nothing_compiles(mode, config):
  plain = dataclasses.replace(config, prefix_cache=False)
  with server_of(mode, plain) as server:
    wanted = by_turns(server)
  with server_of(mode, tiered(config, checksum=True)) as server:
    with compilations() as names:
      got = by_turns(server)
    loads = commands(server, Load)
    moved = server.host_bytes
  assert not names
  assert [(p, o.tokens) for p, o in got] == [(p, o.tokens) for p, o in wanted]
  loaded = sum(o.record.loaded_tokens for _, o in got)
  assert loaded == sum(c.num_tokens for c in loads) > 0
  pages = sum(len(c.pages) for c in loads + commands(server, Offload))
  host = next(iter(server.fleet.hosts.values()))
  assert moved == pages * host.page_bytes


def test_a_budget_bounds_it():
  with server_of('colocated', tiered(PAGES_4)) as server:
    page_bytes = server.fleet.hosts[0].page_bytes
  with server_of('colocated', tiered(PAGES_4, 7 * page_bytes + 5)) as server:
    by_turns(server)
    host, index = server.fleet.hosts[0], server.state.instances[0].host
    held = sum(x.nbytes for x in jax.tree.leaves(host.slots))
    assert held == 7 * page_bytes and index.slots.num_pages == 7
    assert len(index.slots.kept) == 7 and not host.sums
  with fake_server_of('1p1d', tiered(PAGES_4, page_bytes)) as server:
    assert [i.host.slots.num_pages for i in server.state.instances] == [1, 1]
  for size in (1, page_bytes - 1, 2**62, 2**63):
    with pytest.raises(InputError, match=f'^EngineConfig.host_bytes={size}: '
                       f'must be 0, or {page_bytes} to'):
      fake_server_of('1p1d', tiered(PAGES_4, size))


@pytest.mark.parametrize('mode, instances', [('1p1d', 2), ('2p2d', 4)])
def test_no_more_than_the_machine_has(mode, instances, monkeypatch):
  pages = {'SC_PAGE_SIZE': 2**12, 'SC_PHYS_PAGES': 2**10}
  monkeypatch.setattr(os, 'sysconf', pages.get)
  most = 2**22 // instances
  with fake_server_of(mode, tiered(host_bytes=most)):
    pass
  with pytest.raises(InputError, match=f'^EngineConfig.host_bytes={most + 1}: '
                     f'must be at most {most} bytes, as this machine has'):
    fake_server_of(mode, tiered(host_bytes=most + 1))


@functools.cache
def page_bytes():
  """Bytes of a slot."""
  with server_of('colocated', tiered()) as server:
    return server.fleet.hosts[0].page_bytes


@pytest.mark.parametrize('mode', ['1p1d', '2p2d', 'colocated', 'chunked',
                                  '2flexible'])
@pytest.mark.parametrize('host_pages', [3, 1000])
def test_any_load_of_fakes(mode, host_pages):
  stem = tiny.prompt(14, 3)
  work = [((*stem[:n], *prompt[:20]), params) for n, (prompt, params) in zip(
      (14, 9, 12, 14, 3, 14, 8, 14, 12, 4, 14, 8), MIXED, strict=True)]
  work += LONG
  with fake_server_of(mode, tiered(host_bytes=host_pages * page_bytes())
                      ) as server:
    for order in (None, list(range(len(work)))[::-1]) * 2:
      outputs = play(server, work, order, between=3)
      check_tokens(work, outputs, expected_of_fakes)
    assert server.host_bytes > 0
    for inst in server.state.instances:
      if inst.host:
        assert inst.host.slots.num_pages == host_pages
        prefix_cache.check(inst.host.slots, ())
        assert not inst.loading and not inst.host.offloads
    if host_pages > 3:
      assert sum(o.record.loaded_tokens for o in outputs) > 0


def test_what_is_damaged_in_host_memory_is_computed():
  with server_of('colocated', tiered(PAGES_4, checksum=True)) as server:
    first = by_turns(server, turns=1)
    for x in jax.tree.leaves(server.fleet.hosts[0].slots):
      x[:] = np.ones((), x.dtype)
    slots = server.state.instances[0].host.slots
    prompt = (*first[0][0], *first[0][1].tokens, 5, 6, 7)
    output, = play(server, [(prompt, {'max_tokens': 4})], faulty=True)
    failed = [e for e, _ in server.log if isinstance(e, LoadFailed)]
    load, = commands(server, Load)
    kept = server.state.instances[0].host.slots.kept
    gone = [hash for hash, entry in slots.kept.items()
            if entry.page in load.slots]
    assert len(failed) == 1 and 'KV checksum' in failed[0].reason
    assert len(gone) == len(load.slots) and not any(h in kept for h in gone)
    assert output.record.loaded_tokens == output.record.retries == 0
    again = play(server, [(prompt, {'max_tokens': 4})], faulty=True)
  with server_of('colocated', PAGES_4) as server:
    wanted, = play(server, [(prompt, {'max_tokens': 4})])
  assert output.tokens == wanted.tokens == again[0].tokens


def loading(server, prompt):
  """Submits what loads, until it does."""
  id = server.submit(prompt, max_tokens=4)
  assert server.state.seqs[id].stage == 'loading'
  return id


@pytest.mark.parametrize('what', ['fails', 'cancelled', 'lost', 'late'])
def test_a_load_that_ends_otherwise(what):
  config = tiered(PAGES_4, restart_s=0.0)
  with fake_server_of('colocated', config) as server:
    prompt, _ = by_turns(server, turns=1)[0]
    id = loading(server, (*prompt, 5, 6, 7, 8))
    if what == 'fails':
      server.fleet.hosts[0].fails = Load
    elif what == 'cancelled':
      server.cancel(id)
    elif what == 'lost':
      server.kill(0, 0.0)
      assert not server.state.instances[0].host.slots.kept
    drain(server, faulty=True)
    output = server.output(id)
    assert output.reason == ('cancelled' if what == 'cancelled' else 'length')
    if what != 'late':
      assert output.record.loaded_tokens == 0
    assert output.record.retries == (what == 'lost')


def test_a_load_that_takes_too_long_is_given_up(monkeypatch):
  monkeypatch.setattr(host_memory, 'is_ready', lambda array: False)
  with server_of('colocated', tiered(PAGES_4, lease_s=1e-9)) as server:
    by_turns(server, turns=1, faulty=True)
    assert commands(server, Offload)
    assert not server.state.instances[0].host.slots.kept
    assert 'no end after' in server.faults[0][1]


def test_time_in_which_nobody_looked_makes_no_copy_late(monkeypatch):
  now_s = [100.0]
  monkeypatch.setattr(host_memory, 'time', types.SimpleNamespace(
      perf_counter=lambda: now_s[0]))
  monkeypatch.setattr(host_memory.HostMemory, '_advance', lambda *_: False)
  host = object.__new__(host_memory.HostMemory)
  host._looks = host_memory.Looks(now_s[0])
  host.copies = [host_memory._Copy('copy', now_s[0], collections.deque())]
  for later_s in (3600.0, *[1.0] * 29):
    now_s[0] += later_s
    assert not list(host.poll(30.0))
  now_s[0] += 1.0
  (command, error), = host.poll(30.0)
  assert command == 'copy' and 'no end after 31.0 s' in str(error)


def test_what_did_not_reach_the_host_is_not_there():
  with fake_server_of('colocated', tiered(PAGES_4)) as server:
    server.fleet.hosts[0].fails = Offload
    outputs = by_turns(server, faulty=True)
    assert server.faults and not commands(server, Load)
    assert not server.state.instances[0].host.slots.kept
    assert all(o.reason == 'length' for _, o in outputs)


def test_others_are_served_while_one_loads():
  with fake_server_of('colocated', tiered(PAGES_4)) as server:
    prompt, _ = by_turns(server, turns=1)[0]
    server.fleet.hosts[0].poll = lambda lease_s: ()
    id = loading(server, (*prompt, 5, 6, 7, 8))
    other = server.submit(tiny.prompt(5, 77), max_tokens=4)
    while other in server.unfinished:
      server.poll()
    assert server.state.seqs[id].stage == 'loading'
    del server.fleet.hosts[0].poll
    drain(server)
    assert server.output(id).record.loaded_tokens > 0


@pytest.mark.parametrize('options, words', [
    ({'host_bytes': -1, 'prefix_cache': True}, 'host_bytes=-1'),
    ({'host_bytes': 1.5, 'prefix_cache': True}, 'host_bytes=1.5'),
    ({'host_bytes': True, 'prefix_cache': True}, 'host_bytes=True')])
def test_a_bad_budget_is_named(options, words):
  with pytest.raises(InputError, match=words):
    EngineConfig(**options)

"""A prefix cache in virtual time, against an LRU of blocks written apart."""

import collections
import dataclasses
import json
import random

import numpy as np
import pytest

from dsjax.config.checks import InputError
from dsjax.config.engine import InstanceConfig
from dsjax.config.request import Request, Sampling
from dsjax.scheduling import blocks, event_log, prefix_cache, scheduler
from dsjax.scheduling.events import Load, Migrate, Preempt
from dsjax.scheduling.policy import DISTSERVE, Fetch
from dsjax.simulation import latency, simulator
from dsjax.workload import sessions
from tests.common.samples import thinned

STEP = latency.Affine((0.005, 1e-4, 1e-9), (0.008, 1e-6, 1e-5))
LINK = latency.Link(1e-4, 1e9, 1e3)
HOST_LINK = latency.Link(1e-4, 1e15, 1e3)  # all ends at once


def config(*roles, num_pages=4000, page_size=16, max_len=4096, host_pages=0,
           **changes):
  return scheduler.Config(tuple(
      InstanceConfig(role, num_pages, page_size, 64, 2048, 16,
                     host_pages=host_pages)
      for role in roles), max_len=max_len, prefix_cache=True,
                          host_link=HOST_LINK, **changes)


def conversations(count=40, seed=0, **changes):
  kind = dataclasses.replace(sessions.CHAT, system_len=64, think_s=1.0,
                             **changes)
  starts_s = np.cumsum(np.random.default_rng(seed).exponential(0.5, count))
  return sessions.requests(kind, starts_s.tolist(), seed)


def one_at_a_time(count=300, seed=0, tree=3):
  """Requests so far apart that none meets another, of random prefixes."""
  draw = random.Random(seed)
  made = []
  for id in range(count):
    blocks, node = [], 0
    for _ in range(draw.randint(1, 8)):
      node = node * tree + draw.randrange(tree) + 1
      blocks.append(node)
    tokens = 16 * len(blocks) + draw.randint(1, 20)
    made.append(Request(id, 100.0 * id, range(tokens),
                        Sampling(max_tokens=1 + draw.randint(0, 30)),
                        tuple(blocks), 16))
  return made


class Lru:
  """Blocks of a cache of so many pages, one request at a time."""

  def __init__(self, num_pages):
    self.num_pages, self.blocks = num_pages, collections.OrderedDict()

  def serve(self, request, answered=True):
    """Tokens found of a request that comes, is served and goes."""
    known = request.blocks[:(len(request.prompt) - 1) // 16]
    hits = 0
    while hits < len(known) and known[hits] in self.blocks:
      hits += 1
    # The last token has no KV.
    tokens = len(request.prompt) + (request.sampling.max_tokens - 1
                                    if answered else 0)
    for block in request.blocks[:hits]:
      self.blocks.move_to_end(block)
    # A row has a page more from the time on that its next token needs one.
    while len(self.blocks) + -(-tokens // 16) - hits > self.num_pages:
      self.blocks.popitem(last=False)
    for block in reversed(request.blocks[:tokens // 16]):
      self.blocks[block] = True
      self.blocks.move_to_end(block)
    return 16 * hits


@pytest.mark.parametrize('num_pages', [10_000, 60, 25])
@pytest.mark.parametrize('seed', range(3))
def test_hits_are_those_of_an_lru(num_pages, seed):
  work = one_at_a_time(seed=seed)
  oracle = Lru(num_pages)
  result = simulator.simulate(
      config('colocated', num_pages=num_pages, max_len=320, depth=1), work,
      STEP)
  got = [record.cached_tokens for record in result.records]
  assert got == [oracle.serve(request) for request in work]
  assert sum(got) > 0


def test_hits_of_both_sides_of_a_hand_off():
  work = one_at_a_time(seed=5)
  prefill, decode = Lru(80), Lru(80)
  result = simulator.simulate(
      config('prefill', 'decode', num_pages=80, max_len=320, depth=1), work,
      STEP, LINK, log=True)
  moves = {c.id: c for _, commands in result.log for c in commands
           if type(c) is Migrate}
  for request, record in zip(work, result.records, strict=True):
    assert record.cached_tokens == prefill.serve(request, answered=False)
    if request.sampling.max_tokens > 1:
      assert moves[request.id].hit == decode.serve(request)
      assert (moves[request.id].num_tokens
              == len(request.prompt) - moves[request.id].hit)


def shared_tokens(work):
  """Tokens of prompts that an earlier request had, in whole blocks: what a
  cache without bounds would find, each request answered before the next."""
  seen = set()
  count = 0
  for request in work:
    hits = 0
    most = (len(request.prompt) - 1) // max(1, request.block_tokens)
    for hash in request.blocks[:most]:
      if hash not in seen:
        break
      hits += 1
    count += hits * request.block_tokens
    seen.update(request.blocks)
  return count


def test_unbounded_it_finds_all_that_is_shared():
  work = one_at_a_time(seed=1)
  result = simulator.simulate(config('colocated', max_len=320), work, STEP)
  assert (sum(record.cached_tokens for record in result.records)
          == shared_tokens(work))


@thinned('roles, pages', 2, [
    ('colocated',), ('chunked',) * 2, ('prefill', 'decode'),
    ('prefill',) * 2 + ('decode',) * 2], [(600, 0), (4000, 0), (600, 500)])
def test_leaping_finds_the_same(roles, pages):
  num_pages, host_pages = pages
  work = conversations(20 if host_pages else 12)
  asked = config(*roles, num_pages=num_pages, host_pages=host_pages)
  leapt = simulator.simulate(asked, work, STEP, LINK)
  stepped = simulator.simulate(asked, work, STEP, LINK, leap=False)
  logged = simulator.simulate(asked, work, STEP, LINK, log=True)
  assert leapt.leapt and not logged.leapt
  for other in (stepped, logged):
    assert [(r.cached_tokens, r.loaded_tokens) for r in other.records] == [
        (r.cached_tokens, r.loaded_tokens) for r in leapt.records]
    assert np.allclose([r.finish_s for r in other.records],
                       [r.finish_s for r in leapt.records])
  written = json.loads(json.dumps(event_log.encode(tuple(logged.log))))
  assert event_log.replay(asked, event_log.decode(written)) is None
  for inst in logged.state.instances:
    prefix_cache.check(inst.pool, ())
    assert prefix_cache.num_free(inst.pool) == num_pages
    if inst.host:
      prefix_cache.check(inst.host.slots, ())
  assert bool(host_pages) == any(r.loaded_tokens for r in leapt.records)


def test_later_turns_come_sooner_and_move_less():
  work = conversations()
  runs = [simulator.simulate(dataclasses.replace(
      config('prefill', 'decode'), prefix_cache=on), work, STEP, LINK)
          for on in (False, True)]
  without, with_it = (run.records for run in runs)
  assert {r.id for r in without} == {r.id for r in with_it}
  assert sum(r.cached_tokens for r in without) == 0
  later = {q.id for q in work if q.after is not None}

  def mean(records, field):
    picked = [getattr(r, field) for r in records if r.id in later]
    return sum(picked) / len(picked)
  assert mean(with_it, 'ttft_s') < 0.6 * mean(without, 'ttft_s')
  assert mean(with_it, 'migrated_tokens') < 0.5 * mean(
      without, 'migrated_tokens')


def test_a_turn_waits_for_the_answer_of_the_last():
  work = conversations(10)
  result = simulator.simulate(config('colocated'), work, STEP)
  record = {r.id: r for r in result.records}
  assert len(record) == len(work)
  for request in work:
    if request.after is not None:
      assert record[request.id].arrival_s == pytest.approx(
          record[request.after].finish_s + request.arrival_s)


def test_a_turn_after_one_that_was_not_answered_does_not_come():
  first = Request(0, 0.0, range(5000), Sampling(max_tokens=5))
  second = Request(1, 1.0, range(10), Sampling(max_tokens=5), after=0)
  result = simulator.simulate(config('colocated'), [first, second], STEP)
  assert [r.status for r in result.records] == ['rejected']
  with pytest.raises(InputError, match='Request.after=.*7'):
    simulator.simulate(config('colocated'), [
        dataclasses.replace(second, after=7)], STEP)


def test_blocks_of_another_size():
  work = [Request(n, 10.0 * n, range(1100), Sampling(max_tokens=5), (7, 8),
                  512) for n in range(2)]
  for page_size, hit in ((16, 1024), (512, 1024), (1024, 1024), (2048, 0)):
    run = simulator.simulate(config('colocated', page_size=page_size), work,
                             STEP)
    assert [r.cached_tokens for r in run.records] == [0, hit]
  with pytest.raises(InputError, match='block_tokens=512'):
    simulator.simulate(config('colocated', page_size=48), work, STEP)


def turn(id, after=None, blocks=(), block_tokens=0):
  return Request(id, 0.0, range(100), Sampling(max_tokens=2), blocks,
                 block_tokens, after)


@pytest.mark.parametrize('work, words', [
    ([turn(0), turn(1, 1)], r'Request.after=\[1\]: .* circle'),
    ([turn(0), turn(1, 3), turn(2, 1), turn(3, 2)],
     r'Request.after=\[1, 2, 3\]: .* circle'),
    ([turn(0, blocks=(1,))], 'Request.block_tokens=0: .* 1 or more'),
    ([turn(0, blocks=(1,), block_tokens='16')], "block_tokens='16'"),
    ([turn(0, blocks=(1,), block_tokens=24)], 'Request.block_tokens=24'),
    ([turn(0, blocks=(None,), block_tokens=16)], 'Request.blocks=.*integers'),
    ([turn(0, blocks=5, block_tokens=16)], 'Request.blocks=5: .*integers'),
    ([turn(0, blocks=(0,), block_tokens=32),
      turn(1, blocks=(0,), block_tokens=16)],
     r'block_tokens=\[16, 32\]: must be the same')])
def test_requests_that_cannot_come_or_be_compared_are_named(work, words):
  with pytest.raises(InputError, match=words):
    simulator.simulate(config('colocated'), work, STEP)


# --- the second tier --------------------------------------------------------


class TwoTiers(Lru):
  """The same over an LRU of host memory, which what it evicts goes to."""

  def __init__(self, num_pages, num_slots):
    super().__init__(num_pages)
    self.num_slots, self.host = num_slots, collections.OrderedDict()

  def evict(self, room, pinned=()):
    """Makes room for so many blocks; what this evicts is written to the host,
    behind those that were read there meanwhile."""
    evicted = []
    while len(self.blocks) + room > self.num_pages:
      evicted.append(self.blocks.popitem(last=False)[0])
    for block in evicted:
      if block in self.host:
        self.host.move_to_end(block)
    fresh = [b for b in evicted if b not in self.host]
    fresh = fresh[max(0, len(fresh) + len(pinned) - self.num_slots):]
    while len(self.host) + len(pinned) + len(fresh) > self.num_slots:
      self.host.popitem(last=False)
    self.host.update(dict.fromkeys((*reversed(pinned), *fresh)))

  def serve(self, request):
    """(Tokens found, of these those in host memory)."""
    known = request.blocks[:(len(request.prompt) - 1) // 16]
    hits = 0
    while hits < len(known) and known[hits] in self.blocks:
      hits += 1
    stop = hits
    while stop < len(known) and known[stop] in self.host:
      stop += 1
    pinned = known[hits:stop]
    for block in pinned:
      del self.host[block]
    tokens = len(request.prompt) + request.sampling.max_tokens - 1
    for block in request.blocks[:hits]:
      del self.blocks[block]
    first = -(-(len(request.prompt) + (request.sampling.max_tokens > 1)) // 16)
    self.evict(first, pinned)
    for more in range(first + 1, -(-tokens // 16) + 1):
      self.evict(more)
    for block in reversed(request.blocks[:tokens // 16]):
      self.blocks[block] = True
    return 16 * stop, 16 * len(pinned)


@pytest.mark.parametrize('num_pages, num_slots', [
    (60, 10_000), (60, 40), (25, 30), (25, 7)])
def test_hits_are_those_of_two_lrus(num_pages, num_slots):
  work = one_at_a_time(seed=num_pages + num_slots)
  oracle = TwoTiers(num_pages, num_slots)
  asked = config('colocated', num_pages=num_pages, max_len=320, depth=1,
                 host_pages=num_slots)
  result = simulator.simulate(asked, work, STEP)
  got = [(r.cached_tokens, r.loaded_tokens) for r in result.records]
  assert got == [oracle.serve(request) for request in work]
  assert sum(loaded for _, loaded in got) > 0
  host = result.state.instances[0].host
  prefix_cache.check(host.slots, ())
  assert not result.state.instances[0].loading and not host.offloads


def test_hits_of_a_trace_of_mooncakes_form_are_those_of_two_lrus(tmp_path):
  draw, lines, chains = random.Random(4), [], [[n] for n in range(5)]
  for n in range(60):
    chain = draw.choice(chains)
    chain.append(100 + n)
    lines.append(dict(timestamp=100_000 * n, output_length=draw.randint(1, 40),
                      input_length=512 * len(chain) - draw.randint(1, 500),
                      hash_ids=chain[:]))
    if len(chain) == 5:
      del chain[1:]
  path = tmp_path / 'trace.jsonl'
  path.write_text('\n'.join(map(json.dumps, lines)))
  work = sessions.read_trace(path)
  oracle = TwoTiers(210, 330)
  result = simulator.simulate(
      config('colocated', num_pages=210, max_len=2600, depth=1,
             host_pages=330), work, STEP)
  got = [(r.cached_tokens, r.loaded_tokens) for r in result.records]
  assert got == [oracle.serve(dataclasses.replace(
      request, blocks=blocks.resized(request.blocks, 512, 16)))
                 for request in work]
  hits, loaded = map(sum, zip(*got, strict=True))
  assert 0 < loaded < hits < shared_tokens(work)


@pytest.mark.parametrize('load_s', [1e-4, 10.0])
def test_what_is_predicted_to_take_longer_is_computed(load_s):
  work = one_at_a_time(seed=2)
  asked = config('colocated', num_pages=60, max_len=320, host_pages=200)
  asked = dataclasses.replace(asked, host_link=latency.Link(load_s, 1e15, 1e3))
  result = simulator.simulate(asked, work, STEP)
  loaded = sum(record.loaded_tokens for record in result.records)
  assert bool(loaded) == (load_s < 1)


def swapped(load_s, roles=('prefill', 'decode'), **changes):
  """(Result, causes of preemptions) of rows that outgrow their pages."""
  work = [Request(n, 0.01 * n, range(100), Sampling(max_tokens=150))
          for n in range(12)]
  asked = dataclasses.replace(
      config(*roles, num_pages=60, max_len=320, host_pages=200, **changes),
      host_link=latency.Link(load_s, 1e15, 1e3))
  result = simulator.simulate(asked, work, STEP, LINK, log=True)
  return result, [c.cause for _, commands in result.log for c in commands
                  if type(c) is Preempt]


@pytest.mark.parametrize('roles', [('prefill', 'decode'), ('colocated',),
                                   ('chunked',)], ids=str)
def test_preempted_rows_are_swapped_where_that_is_predicted_sooner(roles):
  soon, causes = swapped(1e-5, roles)
  late, others = swapped(10.0, roles)
  assert set(causes) == {'swap'} and set(others) == {'pages'}
  assert all(len(r.token_s) == 150 for r in soon.records + late.records)
  assert sum(r.preemptions for r in soon.records) == len(causes)
  done = [c for _, commands in soon.log for c in commands
          if type(c) is Load]
  assert len(done) == len(causes) and all(c.row for c in done)
  prefilled = [sum(chunk.stop - chunk.start for _, commands in run.log
                   for c in commands for chunk in getattr(c, 'chunks', ()))
               for run in (soon, late)]
  assert prefilled[0] == 12 * 100 < prefilled[1]
  for inst in soon.state.instances:
    prefix_cache.check(inst.host.slots, ())
    assert not inst.host.swapped and not inst.loading


def test_a_host_without_room_lets_rows_be_computed():
  _, causes = swapped(1e-5)
  work = [Request(n, 0.01 * n, range(100), Sampling(max_tokens=150))
          for n in range(12)]
  tight = config('prefill', 'decode', num_pages=60, max_len=320, host_pages=9)
  result = simulator.simulate(tight, work, STEP, LINK, log=True)
  some = [c.cause for _, commands in result.log for c in commands
          if type(c) is Preempt]
  assert set(some) == {'swap', 'pages'} and set(causes) == {'swap'}


def test_leaping_swaps_the_same():
  asked = config('prefill', 'decode', num_pages=60, max_len=320, host_pages=200)
  work = [Request(n, 0.01 * n, range(100), Sampling(max_tokens=150))
          for n in range(12)]
  leapt, stepped = (simulator.simulate(asked, work, STEP, LINK, leap=leap)
                    for leap in (True, False))
  assert leapt.leapt and sum(r.preemptions for r in leapt.records) > 0
  for a, b in zip(leapt.records, stepped.records, strict=True):
    assert a.preemptions == b.preemptions
    assert np.allclose(a.token_s, b.token_s)


# --- what other instances have kept -------------------------------------------


def test_what_another_has_kept_is_fetched():
  """Turns that never come back to where they were, fetched and not."""
  def route(view, request):
    index = request.id % 2
    return Fetch(index, 1 - index)

  fetching = dataclasses.replace(DISTSERVE, name='in turns', route=route,
                                 fetches=True)
  plain = dataclasses.replace(fetching, name='without',
                              route=lambda view, request: request.id % 2)
  work = conversations(8)
  runs = [simulator.simulate(config('prefill', 'prefill', 'decode',
                                    policy=policy), work, STEP, LINK,
                             share=share, log=True)
          for policy, share in ((plain, 'pair'), (fetching, 'pair'),
                                (fetching, 'nic'))]
  without, pair, nic = (run.records for run in runs)
  assert sum(r.fetched_tokens for r in without) == 0
  for records in (pair, nic):
    fetched = sum(r.fetched_tokens for r in records)
    assert fetched > 0
    assert sum(r.cached_tokens for r in records) > fetched
    assert sum(r.cached_tokens for r in records) > sum(
        r.cached_tokens for r in without)
  moves = [c for _, commands in runs[1].log for c in commands
           if type(c) is Migrate and c.kept]
  assert sum(c.num_tokens for c in moves) == sum(
      r.fetched_tokens for r in pair)
  written = json.loads(json.dumps(event_log.encode(tuple(runs[1].log))))
  asked = config('prefill', 'prefill', 'decode', policy=fetching)
  assert event_log.replay(asked, event_log.decode(written)) is None

"""One instance, driven by commands written by hand.

Tokens are compared with the dense float64 pass of tests/tiny.py.
"""

import dataclasses
import itertools
import threading
import types

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from dsjax.checkpoints import checkpoint
from dsjax.config import zoo
from dsjax.config.checks import InputError
from dsjax.config.engine import EngineConfig
from dsjax.config.placement import Placement, Plan
from dsjax.config.request import Sampling
from dsjax.model import sharding
from dsjax.runtime import memory, steps
from dsjax.runtime.engine import Engine
from dsjax.scheduling.events import Chunk, Row, RunDecode, RunPrefill
from tests.common import tiny

# Untied: greedy answers of the tied one repeat a token and would hide errors.
CONFIG = tiny.UNTIED
TINY = checkpoint.Model(CONFIG, tiny.params(CONFIG))
LIMITS = EngineConfig(
    max_len=64, page_size=4, num_pages=20, max_seqs=3, prefill_tokens=48,
    prefill_seqs=2, chunk_tokens=32, transfer_pages=4)
GREEDY = Sampling()


def engine(role='colocated', limits=LIMITS, stages=1):
  return Engine(TINY, [Mesh(np.array([device]), (sharding.AXIS,))
                       for device in jax.devices()[:stages]], role, limits)


class Host:
  """Issues numbered commands to an Engine; knows where everyone stands.

  Request i decodes from pages 6 i to 6 i + 5 (24 tokens), unless told.
  """

  def __init__(self, role='colocated', stages=1):
    self.engine = engine(role, stages=stages)
    self.number = itertools.count()
    self.pages = {i: tuple(range(6 * i, 6 * i + 6)) for i in range(3)}
    self.length = {}

  def admit(self, id, tokens, params=GREEDY, prompt_len=None):
    self.engine.admit(id, tokens, len(tokens) if prompt_len is None
                      else prompt_len, params)
    self.length[id] = len(tokens)

  def chunk(self, id, start=0, stop=None):
    end = self.length[id]
    stop = end if stop is None else stop
    return Chunk(id, start, stop, self.pages[id], stop == end)

  def prefill(self, *chunks, rows=()):
    """The Sampled of one batch; requests sampled from grow by a token."""
    command = RunPrefill(0, next(self.number), chunks, 0,
                         tuple(map(self.row, rows)))
    (out,), _ = self.engine.prefill(command)
    for id in [c.id for c in chunks if c.last] + list(rows):
      self.length[id] += 1
    return out, out.token_R.shape[0] - self.engine.sequences(command)

  def start(self, *ids):
    """Prefills whole prompts; the first token of each."""
    out, first = self.prefill(*map(self.chunk, ids))
    return np.asarray(out.token_R)[first:first + len(ids)].tolist()

  def row(self, id, tick=0):
    base_ = self.length[id] - 1 - tick
    return Row(id, base_, 24 - base_, self.pages[id])

  def decode(self, *ids, steps=1, tick=7):
    """Dispatches; the Sampled of each step, row r being ids[r]."""
    rows = tuple(self.row(id, tick) for id in ids)
    outs, _ = self.engine.decode(RunDecode(0, next(self.number), tick, steps,
                                           rows))
    for id in ids:
      self.length[id] += steps
    return outs

  def __getattr__(self, name):
    return getattr(self.engine, name)


def column(outs, r):
  return [int(out.token_R[r]) for out in outs]


PROMPTS = [tiny.prompt(n) for n in (5, 9, 12)]
WANT = [tiny.greedy(p, 10, CONFIG) for p in PROMPTS]


# --- tokens ------------------------------------------------------------------


def test_a_prompt_then_decode_steps():
  host = Host()
  host.admit(0, PROMPTS[0])
  assert host.start(0) == WANT[0][:1]
  assert column(host.decode(0, steps=9), 0) == WANT[0][1:]


def test_two_prompts_packed_in_one_batch():
  host = Host()
  for i in (0, 1):
    host.admit(i, PROMPTS[i])
  assert host.start(0, 1) == [WANT[0][0], WANT[1][0]]


@pytest.mark.parametrize('cuts', ((0, 1, 12), (0, 4, 8, 12), (0, 5, 11, 12)))
def test_a_prompt_in_chunks(cuts):
  host = Host()
  host.admit(2, PROMPTS[2])
  for start, stop in itertools.pairwise(cuts):
    out, first = host.prefill(host.chunk(2, start, stop))
  assert int(out.token_R[first]) == WANT[2][0]
  assert column(host.decode(2, steps=4), 0) == WANT[2][1:5]


def test_a_token_of_one_that_has_left_comes_to_no_other():
  """What the last stage samples reaches the first one late: when the slot may
  be another's, and with a token of one that is still there."""
  host = Host(stages=2)
  for i in (0, 1):
    host.admit(i, PROMPTS[i])
  assert host.start(0, 1) == [WANT[0][0], WANT[1][0]]
  slot = host.engine.slot_of[0]
  host.engine.forget(0)
  host.admit(2, PROMPTS[2])
  assert host.engine.slot_of[2] == slot
  assert column(host.decode(1, steps=2), 0) == WANT[1][1:3]
  assert host.start(2) == WANT[2][:1]
  assert column(host.decode(2, steps=4), 0) == WANT[2][1:5]


def test_admitted_with_tokens_so_far():
  """After a preemption, prompt and output are prefilled together."""
  host = Host()
  host.admit(1, PROMPTS[1] + tuple(WANT[1][:4]), prompt_len=9)
  assert host.start(1) == WANT[1][4:5]
  assert column(host.decode(1, steps=3), 0) == WANT[1][5:8]


def test_penalties_after_a_preemption_count_the_output_alone():
  params = Sampling(frequency_penalty=2.0, logprobs=0)
  outs = []
  for done in (0, 4):
    host = Host()
    host.admit(0, PROMPTS[0] + tuple(outs[0][:done] if done else ()), params,
               prompt_len=5)
    outs.append(host.start(0) + column(host.decode(0, steps=7 - done), 0))
  assert outs[0][4:] == outs[1]


def test_rows_in_any_order_and_number():
  host = Host()
  for i in range(3):
    host.admit(i, PROMPTS[i])
    host.start(i)
  want = [w[1:] for w in WANT]
  for ids in ((2, 0, 1), (1,), (1, 2), (0, 2, 1)):
    outs = host.decode(*ids, steps=2)
    for r, id in enumerate(ids):
      assert column(outs, r) == want[id][:2]
      want[id] = want[id][2:]


def test_chunks_and_rows_together():
  host = Host('chunked')
  for i in (0, 1):
    host.admit(i, PROMPTS[i])
  host.start(0)
  out, first = host.prefill(host.chunk(1, 0, 6), rows=(0,))
  assert int(out.token_R[0]) == WANT[0][1]
  out, first = host.prefill(host.chunk(1, 6, 9), rows=(0,))
  assert first == 1  # the bucket of one row
  assert [int(out.token_R[0]), int(out.token_R[first])] == [WANT[0][2],
                                                            WANT[1][0]]


def test_a_command_of_several_steps_equals_several_commands():
  host = Host()
  host.admit(0, PROMPTS[0])
  host.start(0)
  got = [column(host.decode(0, tick=t), 0)[0] for t in range(4)]
  assert got == WANT[0][1:5]


# --- slots -------------------------------------------------------------------


def test_slots_come_back():
  host = Host()
  for i in range(3):
    host.admit(i, PROMPTS[i])
  assert not host.spare and set(host.slot_of) == {0, 1, 2}
  for i in (1, 0, 2):
    host.forget(i)
  assert sorted(host.spare) == [0, 1, 2]
  assert not host.slot_of and not host.mode_of


def test_forgetting_no_one_changes_nothing():
  host = Host()
  host.admit(0, PROMPTS[0])
  host.forget(1)
  host.forget(0)
  host.forget(0)
  assert sorted(host.spare) == [0, 1, 2]


def test_a_slot_is_reused_while_steps_that_write_it_are_in_flight():
  host = Host()
  for i in (0, 1):
    host.admit(i, PROMPTS[i])
  host.start(0, 1)
  flying = host.decode(0, 1, steps=4)
  slot = host.slot_of[0]
  host.forget(0)
  host.admit(2, PROMPTS[2])
  assert host.slot_of[2] == slot
  host.pages[2] = host.pages[0]
  first, at = host.prefill(host.chunk(2))
  after = host.decode(2, 1, steps=5)
  assert column(flying, 1) == WANT[1][1:5]
  assert int(first.token_R[at]) == WANT[2][0]
  assert column(after, 0) == WANT[2][1:6]
  assert column(after, 1) == WANT[1][5:10]


def test_a_new_tenant_takes_none_of_the_parameters_of_the_last():
  host = Host()
  bias = Sampling(logit_bias=((7, 100.0),), temperature=2.0, seed=3)
  host.admit(0, PROMPTS[0], bias)
  assert host.start(0) == [7]
  host.forget(0)
  host.admit(1, PROMPTS[1])
  # With a neighbour that needs the full branch, so that all are applied.
  host.admit(2, PROMPTS[2], Sampling(logprobs=1))
  assert host.start(1, 2) == [WANT[1][0], WANT[2][0]]


# --- padding -----------------------------------------------------------------


def snapshot(host):
  return jax.tree.map(np.array, (host.last.cache, host.last.slots.tokens_ET))


def changed_pages(before, after):
  """Ids of pages of any layer that differ."""
  pages = set()
  for x, y in zip(*map(jax.tree.leaves, (before, after)), strict=True):
    pages.update(np.nonzero((x != y).any((0, 2, 3)))[0].tolist())
  return pages


def written(host, act):
  """(pages, (slot, position) pairs) that differ after act()."""
  cache, tokens = snapshot(host)
  act()
  cache_after, tokens_after = snapshot(host)
  return (changed_pages(cache, cache_after),
          set(zip(*map(np.ndarray.tolist,
                       np.nonzero(tokens != tokens_after)), strict=True)))


def full_host(role='colocated'):
  """Three residents, their prompts prefilled; page 18 and 19 are no one's."""
  host = Host(role)
  for i in range(3):
    host.admit(i, PROMPTS[i])
    host.start(i)
  return host


def test_padding_rows_write_nothing():
  host = full_host()
  # Bucket 3 for two rows would need no padding in bucket 2: ask for three
  # rows of which one has been forgotten.
  slots = dict(host.slot_of)
  host.forget(1)
  pages, cells = written(host, lambda: host.decode(0, 1, 2))
  assert pages == {host.pages[0][1], host.pages[2][3]}
  assert cells <= {(slots[0], 6), (slots[2], 13)}


def test_padding_tokens_and_sequences_of_a_prefill_write_nothing():
  host = full_host()
  slot = host.slot_of[2]
  host.forget(2)
  host.admit(2, tiny.prompt(17))  # a bucket of 32 tokens, 2 sequences
  assert host.slot_of[2] == slot
  pages, cells = written(host, lambda: host.start(2))
  assert pages == set(host.pages[2][:5])
  assert cells <= {(slot, 17)}


def test_a_chunk_that_is_not_the_last_samples_nothing():
  host = full_host()
  slot = host.slot_of[2]
  host.forget(2)
  host.admit(2, tiny.prompt(17))
  pages, cells = written(host, lambda: host.prefill(host.chunk(2, 0, 6)))
  assert pages == set(host.pages[2][:2]) and not cells
  assert host.slot_of[2] == slot


def test_padding_rows_of_a_chunked_step_write_nothing():
  host = full_host('chunked')
  slots = dict(host.slot_of)
  host.forget(2)
  host.admit(2, tiny.prompt(6))
  pages, cells = written(
      host, lambda: host.prefill(host.chunk(2), rows=(0, 1)))  # bucket of 3
  assert pages == {host.pages[0][1], host.pages[1][2], *host.pages[2][:2]}
  assert cells <= {(slots[0], 6), (slots[1], 10), (slots[2], 6)}


def test_warming_up_writes_nothing_but_a_spare_slot():
  host = full_host()
  slot = host.slot_of[2]
  host.forget(2)
  steps.RAN.clear()  # else nothing runs
  pages, cells = written(host, lambda: list(host.warm()))
  assert not pages and host.spare == [slot]
  assert {e for e, _ in cells} <= {slot}


def test_what_an_equal_engine_has_run_is_not_run_again(monkeypatch):
  names = list(engine().warm())
  second, ran = engine(), []
  monkeypatch.setattr(second, '_run', lambda *args: ran.append(args))
  assert sorted(second.warm()) == sorted(names) and names
  assert not ran


# --- pages -------------------------------------------------------------------


def test_scatter_writes_what_gather_read_and_its_padding_is_dropped():
  host = full_host()
  moved = host.gather((6, 7, 0))

  def act():
    jax.block_until_ready(host.scatter((18, 19, 20), moved))

  pages, cells = written(host, act)
  assert pages == {18, 19} and not cells
  for x in jax.tree.leaves(host.last.cache):
    np.testing.assert_array_equal(x[:, 18:], x[:, 6:8])


def test_decoding_goes_on_from_copied_pages():
  host = Host()
  host.admit(0, PROMPTS[1])
  host.start(0)
  host.scatter((19, 11, 13), host.gather(host.pages[0][:3]))
  host.pages[0] = (19, 11, 13, 2, 17, 18)
  assert column(host.decode(0, steps=8), 0) == WANT[1][1:9]


# --- shapes ------------------------------------------------------------------


def commands_of(c, role):
  """(tokens of each chunk, rows) that a scheduler may put in one command."""
  most = c.instance(role).prefill_tokens
  rows = range(c.max_seqs + 1) if role == 'chunked' else (0,)
  for count in range(1, c.prefill_seqs + 1):
    for n in rows:
      for total in range(count, most - n + 1):
        yield (total - count + 1,) + (1,) * (count - 1), n


@pytest.mark.parametrize('role', ('prefill', 'colocated', 'chunked'))
@pytest.mark.parametrize('limits', (
    LIMITS, EngineConfig(max_len=64, prefill_tokens=16, prefill_seqs=4,
                         chunk_tokens=24, max_seqs=6),
    EngineConfig(max_len=64, prefill_tokens=70, prefill_seqs=8,
                 max_seqs=2, chunk_tokens=20),
    EngineConfig(max_len=64, prefill_tokens=16, prefill_seqs=4,
                 chunk_tokens=24, max_seqs=6, least_rows=4)),
    ids=('tests', 'small', 'odd', 'rows'))
def test_every_possible_batch_has_a_warm_shape(limits, role):
  inst = engine(role, limits)
  warm = set(inst.shapes_needed())
  for counts, rows in commands_of(limits, role):
    chunks = [Chunk(i, 0, n, (), True) for i, n in enumerate(counts)]
    size = inst._size(chunks)
    assert size >= sum(counts) and inst._seqs_bucket(size) >= len(counts)
    count = next(n for n in inst._mixed_rows() if n >= rows) if rows else 0
    assert (size, count) in warm


@pytest.mark.parametrize('role, want', (
    ('prefill', {(32, 0), (48, 0)}), ('decode', {(0, 1), (0, 2), (0, 3)}),
    ('colocated', {(32, 0), (48, 0), (0, 1), (0, 2), (0, 3)}),
    ('chunked', {(32, 0), (0, 1), (0, 2), (0, 3), (32, 1), (32, 3)})))
def test_shapes_needed(role, want):
  shapes = engine(role).shapes_needed()
  assert set(shapes) == want and len(shapes) == len(want)


def test_no_decode_batch_below_least_rows_is_compiled():
  shapes = engine('chunked', dataclasses.replace(LIMITS, least_rows=2))
  assert {n for _, n in shapes.shapes_needed()} == {0, 2, 3}


# --- memory ------------------------------------------------------------------


def meshes_of(tp, pp):
  made, = sharding.make_meshes(CONFIG, Placement(
      colocated=[Plan(tp, pp)]), jax.devices())
  return made


def held_bytes(inst):
  """Bytes of weights, slots and a page on the fullest device."""
  def each(tree):
    return sum(x.addressable_shards[0].data.nbytes
               for x in jax.tree.leaves(tree))

  return max((each((s.params, s.slots)), each(s.cache) // s.shapes.num_pages)
             for s in inst.stages)


@pytest.mark.parametrize('role, plan', (
    ('decode', (3, 1)), ('chunked', (1, 1)), ('chunked', (2, 2)),
    pytest.param('decode', (1, 1), marks=pytest.mark.deep),
    pytest.param('decode', (2, 2), marks=pytest.mark.deep),
    pytest.param('chunked', (3, 1), marks=pytest.mark.deep)), ids=str)
def test_pages_are_what_memory_leaves(plan, role):
  limits = dataclasses.replace(LIMITS, num_pages=None,
                               kv_dtype='float8_e4m3fn')
  meshes = meshes_of(*plan)
  all_of_them = limits.max_seqs * limits.max_len // limits.page_size
  inst = Engine(TINY, meshes, role, limits)
  assert inst.capacity.num_pages == all_of_them  # a CPU does not say
  fixed, page = held_bytes(inst)
  rich, poor = (memory.size_pages(CONFIG, meshes, role, dataclasses.replace(
      limits, memory_bytes=fixed + n)).num_pages
      for n in (10**7, 200_000))
  assert rich == all_of_them
  assert 16 <= poor <= 200_000 // page  # less temporaries
  fitted = Engine(TINY, meshes, role, dataclasses.replace(
      limits, memory_bytes=fixed + 200_000))
  assert fitted.stages[0].cache.k_KPCH[0].shape[1] == poor


@pytest.mark.parametrize('role, copied', (
    ('prefill', 16), ('decode', 16), ('flexible', 16), ('colocated', 0)))
def test_a_hand_off_has_room_beside_the_pages(role, copied, monkeypatch):
  limits, meshes = dataclasses.replace(LIMITS, num_pages=None), meshes_of(1, 1)
  one = Engine(TINY, meshes, role, limits)
  fixed, page = held_bytes(one)
  fixed += max(step.lower(*args).compile().memory_analysis().temp_size_in_bytes
               for step, args in steps.abstract_steps(one.shapes, one.capacity))

  def pages(n, less=0):
    return memory.size_pages(CONFIG, meshes, role, dataclasses.replace(
        limits, memory_bytes=fixed + n * page - less)).num_pages

  assert pages(21 + copied) == 21
  with pytest.raises(InputError, match=(
      r'=\d+: .* 1 bytes more for the weights, temporaries and '
      f'{16 + copied} pages')):  # max_len takes 16
    pages(16 + copied, 1)
  monkeypatch.setattr(memory, 'KEPT', 0)
  assert pages(21 + copied) == 21 + copied


def says(*stats):
  """A mesh of devices that report these memory_stats."""
  return types.SimpleNamespace(devices=np.array([
      types.SimpleNamespace(memory_stats=lambda s=s: s) for s in stats]))


def test_an_accelerator_says_what_is_free(monkeypatch):
  """None was at hand; this is what jax documents of one."""
  roomy, tight = (dict(bytes_limit=80_000, bytes_in_use=n)
                  for n in (5_000, 30_000))
  free = memory._free_bytes
  assert free([says(roomy), says(roomy, tight)]) == 50_000  # the least
  assert free([says(roomy, None)]) is None  # a CPU
  assert free([says({'bytes_in_use': 1})]) is None
  limits, meshes = dataclasses.replace(LIMITS, num_pages=None), meshes_of(1, 1)
  budget = sum(held_bytes(Engine(TINY, meshes, 'decode', limits))) + 70_000
  stats = says(dict(bytes_limit=budget + 7, bytes_in_use=7))
  monkeypatch.setattr(memory, '_free_bytes', lambda _: free([stats]))
  want = dataclasses.replace(limits, memory_bytes=budget)
  sized = memory.size_pages(CONFIG, meshes, 'decode', limits)
  assert sized == memory.size_pages(CONFIG, meshes, 'decode', want)
  assert sized.num_pages < limits.instance('decode', 1).num_pages


@pytest.mark.parametrize('plan', ((1, 1), (2, 2)), ids=str)
def test_what_does_not_fit_says_by_how_much_before_it_loads(plan):
  meshes = meshes_of(*plan)
  inst = Engine(TINY, meshes, 'decode', LIMITS)
  weights = held_bytes(inst)[0]
  unread = checkpoint.Model(CONFIG, None)  # loading would fail
  with pytest.raises(InputError, match=(
      r'EngineConfig.memory_bytes=.* bytes more for the weights of stage')):
    Engine(unread, meshes, 'decode', dataclasses.replace(
        LIMITS, memory_bytes=weights - 100))
  with pytest.raises(InputError, match=(
      'bytes more for the weights and 20 pages')):
    Engine(unread, meshes, 'decode', dataclasses.replace(
        LIMITS, memory_bytes=weights + 100))


@pytest.mark.parametrize('name, plans', (
    pytest.param('opt-13b', ((2, 1), (1, 1)), marks=pytest.mark.deep),
    pytest.param('opt-66b', ((4, 1), (2, 2)), marks=pytest.mark.deep),
    ('opt-175b', ((3, 3), (4, 3))), ('llama-3-70b', ((4, 1), (8, 1)))))
def test_the_papers_placements_of_published_shapes(name, plans):
  """DistServe table 3, in float16-sized numbers, without allocating."""
  config = zoo.config(name)
  limits = EngineConfig(
      max_len=2048, num_pages=512, max_seqs=8, prefill_tokens=512,
      prefill_seqs=4, dtype='bfloat16')
  for plan, role in zip(plans, ('prefill', 'decode'), strict=True):
    tp, pp = plan
    mesh = Mesh(np.array(jax.devices()[:tp]), (sharding.AXIS,))
    stages = [mesh] * pp  # of other devices, where they run
    asked = limits.instance(role, pp)
    total = 0
    for s in steps.stage_shapes(config, stages, role, limits, asked):
      (step, args), = steps.abstract_steps(s, asked)
      out = jax.eval_shape(step, *args)
      assert jax.tree.map(lambda x: (x.shape, x.dtype), out[0]) == (
          jax.tree.map(lambda x: (x.shape, x.dtype), args[1]))
      total += memory._device_bytes(args[0]) * tp
    weights = sum(
        int(np.prod(config.leaf_shape(leaf))) * times * 2
        for leaves, times in ((config.top_leaves, 1),
                              (config.layer_leaves, config.num_layers))
        for leaf in leaves)
    assert weights <= total < 1.06 * weights  # replicas of what is not split
    assert total / (tp * pp) < 80e9


def test_weights_of_another_dtype_are_an_error():
  with pytest.raises(InputError, match='EngineConfig.dtype.*float32'):
    engine(limits=dataclasses.replace(LIMITS, dtype='bfloat16'))


def test_a_compilation_that_runs_is_not_waited_for(monkeypatch):
  go, compiled = threading.Event(), []

  class Step:
    def __init__(self, tokens):
      self.tokens = tokens

    def lower(self):
      return self

    def compile(self):
      if self.tokens > 1:
        go.wait(20)
      compiled.append(self.tokens)

  monkeypatch.setattr('dsjax.runtime.engine.abstract_step',
                      lambda shapes, tokens, *_: (Step(tokens), ()))
  fake = types.SimpleNamespace(stages=[types.SimpleNamespace(shapes=None)],
                               _seqs_bucket=lambda tokens: 1)
  steps = Engine.compile(fake, [(1, 0), (2, 0), (3, 0)])
  assert next(steps) == (1, 0)
  steps.close()
  assert compiled == [1]
  go.set()

"""The whole server on a tiny model: its tokens, and what they cost.

Every token is compared with `expected`: one dense float64 pass a token
(tests/common/tiny.py), no pages, no batch, then one row of sampling. Few
distinct shapes appear, since steps are compiled once a process for equal
shapes.
"""

import dataclasses
import json
import random
import sys

import jax
import numpy as np
import pytest

from dsjax.checkpoints import checkpoint
from dsjax.config.checks import InputError
from dsjax.config.engine import EngineConfig
from dsjax.config.placement import Placement, Plan
from dsjax.config.request import MAX_LOGPROBS
from dsjax.model import sharding
from dsjax.runtime import migration
from dsjax.runtime.orchestrator import serve
from dsjax.scheduling.events import Migrate
from tests.common import tiny
from tests.common.samples import deep, one_in, thinned
from tests.common.serving import (
  CONFIG,
  EACH_MODE,
  HOT,
  LONG,
  MIXED,
  MODEL,
  MODES,
  PAGES_4,
  PAGES_16,
  check_survivors,
  check_tokens,
  disturb,
  drain,
  job,
  play,
  preemptions,
  server_of,
)

pytestmark = pytest.mark.usefixtures('no_hang')


# --- token equality ----------------------------------------------------------

MATRIX = (('1p1d', PAGES_4), ('1p1d', PAGES_16), ('2p2d', PAGES_4),
          ('colocated', PAGES_4), ('colocated', PAGES_16),
          ('chunked', PAGES_4), ('chunked', PAGES_16))
MANY = (*MATRIX[:3], *MATRIX[4::2], *deep(*MATRIX[3::2]))
MANY_MODES, SOME_MODES = (pytest.mark.parametrize(
    'mode, config', rows, ids=lambda v: v if isinstance(v, str) else
    f'pages of {v.page_size}') for rows in (MANY, one_in(2, MATRIX)))


@MANY_MODES
def test_tokens_are_equal_in_every_order(mode, config):
  with server_of(mode, config) as server:
    backwards = list(range(len(MIXED)))[::-1]
    check_tokens(MIXED, play(server, MIXED))
    check_tokens(MIXED, play(server, MIXED, backwards, between=2))
    check_tokens(MIXED, play(server, MIXED, between=40))


@SOME_MODES
def test_tokens_are_equal_through_preemption(mode, config):
  with server_of(mode, config) as server:
    work = LONG + MIXED[2:6] + LONG
    outputs = play(server, work)
    check_tokens(work, outputs)
    assert preemptions(outputs) > 0


@thinned('mode, ahead', 2, ('1p1d', 'colocated', 'chunked'),
         ((1, 1), (1, 6), (3, 2)))
def test_tokens_are_equal_at_every_depth(mode, ahead):
  depth, run_ahead = ahead
  config = dataclasses.replace(PAGES_4, depth=depth, run_ahead=run_ahead)
  with server_of(mode, config) as server:
    work = MIXED[:9] + LONG
    check_tokens(work, play(server, work, between=depth))


@SOME_MODES
def test_cancelled_neighbours_change_no_token(mode, config):
  rng = random.Random(1)
  with server_of(mode, config) as server:
    ids = []
    for prompt, params in MIXED + LONG + MIXED:
      ids.append(server.submit(prompt, **params))
      for _ in range(rng.randrange(3)):
        server.poll()
      if rng.random() < .5:
        server.cancel(rng.choice(ids[-4:]))
    drain(server)
    cancelled = check_survivors(server, ids, MIXED + LONG + MIXED)
  assert 3 < cancelled < len(ids) - 3


def test_every_instance_takes_part():
  with server_of('2p2d') as server:
    used = {i for o in play(server, MIXED) for i in o.record.instances}
  assert used == {0, 1, 2, 3}


def test_a_seed_draws_the_same_and_another_draws_otherwise():
  work = [job(9, 10, temperature=1.5, seed=s) for s in (4, 4, 5)]
  with server_of('colocated') as server:
    first, again, other = (o.tokens for o in play(server, work))
  assert first == again != other


# --- SmolLM2 -----------------------------------------------------------------


def goldens(*names):
  with open('tests/goldens/smollm2.json') as file:
    return [g for g in json.load(file) if g['name'] in names]


@pytest.mark.slow
def test_smollm2_gives_the_goldens_over_two_meshes():
  model = checkpoint.load('smollm2-135m-instruct')
  config = EngineConfig(max_len=64, max_seqs=1, prefill_tokens=16,
                        prefill_seqs=1, transfer_pages=1)
  chosen = goldens('one_token', 'english')
  work = [(g['ids'], {'max_tokens': len(g['tokens']), 'ignore_eos': True})
          for g in chosen]
  with serve(model, MODES['1p1d'][0], config) as server:
    for output, g in zip(play(server, work), chosen, strict=True):
      assert output.tokens == tuple(g['tokens'])
      assert output.text == model.tokenizer.decode(g['tokens'])


# --- no implicit transfer ----------------------------------

# What others of EVERY have too, each in another mode.
REPEATED = ('flexible_pp2', 'tp2_tp2', 'colocated_pp2', '2p2d', 'tp2_tp1',
            'tp1_tp2', 'chunked_pp2', '2flexible')
EVERY = pytest.mark.parametrize('mode', [
    pytest.param(m, marks=[pytest.mark.deep] * (m in REPEATED))
    for m in MODES if m not in ('2colocated', '2chunked')])
KV_SIZE = 2 * 4 * 4 * 8 // 2  # elements of the smallest shard that moves


@pytest.fixture
def puts(monkeypatch):
  """Files that called jax.device_put with arrays that are on a device."""
  files, put = [], jax.device_put

  def spy(x, *args, **kwargs):
    if any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(x)):
      files.append(sys._getframe(1).f_code.co_filename.rsplit('/', 1)[1])
    return put(x, *args, **kwargs)

  monkeypatch.setattr(jax, 'device_put', spy)
  return files


@EVERY
def test_plans_change_no_token(mode, host_reads, puts):
  """And nothing moves implicitly, or KV through the host."""
  with server_of(mode) as server:
    host_reads.clear()
    puts.clear()
    with jax.transfer_guard('disallow'):
      served = disturb(server)
    # Tokens of a batch; log-probabilities: MAX_LOGPROBS a row.
    assert host_reads and max(host_reads) <= 5 * MAX_LOGPROBS < KV_SIZE
    small = {n for n in host_reads if n % MAX_LOGPROBS}
    assert max(small) <= 5
    stages = max(len(e.stages) for e in server.engines)
    copies = any(not route.shares for route in server.routes.values())
    assert set(puts) == ({'migration.py'} if copies else set()) | (
        {'engine.py'} if stages > 1 else set())  # activations, tokens
    assert bool(server.copied_bytes) == bool(server.placement.prefill)
  check_tokens(*zip(*served, strict=True))


# --- the rest of what needs a device -----------------------------------------


@EACH_MODE
def test_logprobs_are_those_of_the_raw_logits(mode):
  work = [job(9, 6, logprobs=4, **HOT, top_k=3, seed=2, ignore_eos=True),
          job(11, 6, ignore_eos=True),
          job(5, 6, logprobs=0, repetition_penalty=2.0, ignore_eos=True),
          job(7, 6, logprobs=20, ignore_eos=True)]
  with server_of(mode) as server:
    outputs = play(server, work)
  for (prompt, params), output in zip(work, outputs, strict=True):
    if 'logprobs' in params:
      check_logprobs(prompt, params['logprobs'], output)
    else:
      assert output.logprobs == ()


def check_logprobs(prompt, count, output):
  logits_SV = tiny.dense_logits(prompt + output.tokens[:-1], CONFIG)
  want_RV = tiny.log_softmax(logits_SV[len(prompt) - 1:])
  for token, (chosen, top), want_V in zip(
      output.tokens, output.logprobs, want_RV, strict=True):
    assert chosen == pytest.approx(want_V[token], abs=1e-4)
    best = np.argsort(-want_V)[:count]
    assert [id for id, _ in top] == best.tolist()
    np.testing.assert_allclose([p for _, p in top], want_V[best], atol=1e-4)


def test_more_devices_than_exist_are_refused():
  with pytest.raises(InputError, match="'9 devices'.* 8"):
    serve(MODEL, Placement(colocated=[Plan()] * 9), PAGES_4)


def test_a_plan_that_the_model_cannot_run_is_refused():
  with pytest.raises(InputError, match='Plan.tp=5.* 4 heads'):
    serve(MODEL, Placement(colocated=[Plan(5)]), PAGES_4)


@pytest.mark.parametrize('mode', ('1p1d', '2p2d', 'tp2_tp1'))
def test_copied_bytes_are_those_of_whole_batches(mode):
  with server_of(mode) as server:
    play(server, MIXED + LONG)
    moves = [c for _, commands in server.log for c in commands
             if isinstance(c, Migrate)]
    token = CONFIG.kv_bytes_per_token()
    need = sum(r.migrated_tokens for r in server.records) * token
    shares = any(route.shares for route in server.routes.values())
    pages = sum(len(m.source_pages) if shares else
                sum(migration.batches(len(m.source_pages), (1, 4)))
                for m in moves)
    assert need == sum(m.num_tokens for m in moves) * token
    assert server.copied_bytes == pages * 4 * token >= need > 0
    assert server.copy_s > 0


def test_warm_up_reports_every_step():
  seen = []
  with server_of('1p1d', report=lambda *a: seen.append(a)) as server:
    total = sum(len(e.shapes_needed()) for e in server.engines)
  assert [s[:2] for s in seen] == [(i + 1, total) for i in range(total)]
  assert len({name for _, _, name in seen}) == total
  assert seen[0][2] == 'prefill 0: prefill 48'
  assert seen[-1][2] == 'decode 1: decode 3'


def test_the_meshes_are_those_asked_for():
  with server_of('tp2_tp1') as server:
    found = [[d.id for d in e.shapes.mesh.devices.flat]
             for e in server.engines]
    assert found == [[4, 5], [1]]
    for engine in server.engines:
      for x in jax.tree.leaves(engine.last.cache):
        assert x.sharding == sharding.kv(engine.shapes.mesh)

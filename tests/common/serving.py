"""What tests of a served tiny model share: servers, an oracle, workloads.

Every token is compared with `expected`: one dense float64 pass a token
(tests/tiny.py), no pages, no batch, then one row of sampling. Few distinct
shapes appear, since steps are compiled once a process for equal shapes.
"""

import contextlib
import dataclasses
import functools
import time

import jax
import numpy as np
import pytest

from dsjax.checkpoints import checkpoint
from dsjax.config.engine import EngineConfig
from dsjax.config.placement import Placement, Plan
from dsjax.config.request import Sampling
from dsjax.model import sampling
from dsjax.runtime.cluster import messages
from dsjax.runtime.orchestrator import serve
from dsjax.scheduling import prefix_cache, scheduler
from tests.common import fake_engine, tiny


class Letters:
  """The least tokenizer: a token is a character, or a byte of the euro."""

  vocab_size = 96
  table = ([b''] * 3 + [bytes([29 + i]) for i in range(3, 90)]
           + [b'\xe2', b'\x82', b'\xac'] * 2)

  def token_bytes(self, token):
    return self.table[token]

  def decode(self, tokens):
    return b''.join(map(self.token_bytes, tokens)).decode(errors='replace')

  def chat(self, messages, add_generation_prompt=True):
    text = ''.join(m['content'] for m in messages)
    return [1, *(3 + byte % 90 for byte in text.encode())]


# Untied: greedy answers of the tied one repeat a token and would hide errors.
CONFIG = tiny.UNTIED
EOS, = CONFIG.eos_ids
MUTE = checkpoint.Model(CONFIG, tiny.params(CONFIG))
MODEL = dataclasses.replace(MUTE, tokenizer=Letters())
# 20 pages of 4 hold one long request and a half: three must preempt.
PAGES_4 = EngineConfig(
    max_len=64, page_size=4, num_pages=20, max_seqs=3, prefill_tokens=48,
    prefill_seqs=2, chunk_tokens=32, transfer_pages=4, least_tokens=48)
# And two sizes of prefills.
PAGES_16 = dataclasses.replace(PAGES_4, page_size=16, num_pages=5,
                               least_tokens=32)

# (placement, devices): chosen so that instances share compiled steps.
MODES = {
    '1p1d': (Placement(prefill=[Plan()], decode=[Plan()]), (0, 1)),
    '2p2d': (Placement(prefill=[Plan()] * 2, decode=[Plan()] * 2),
             (0, 2, 1, 3)),
    '2colocated': (Placement(colocated=[Plan()] * 2), (0, 2)),
    '2chunked': (Placement(chunked=[Plan()] * 2), (0, 2)),
    'colocated': (Placement(colocated=[Plan()]), (0,)),
    'chunked': (Placement(chunked=[Plan()]), (0,)),
    'tp2_tp2': (Placement(prefill=[Plan(2)], decode=[Plan(2)]),
                (4, 5, 6, 7)),
    'tp2_tp1': (Placement(prefill=[Plan(2)], decode=[Plan(1)]), (4, 5, 1)),
    'tp1_tp2': (Placement(prefill=[Plan(1)], decode=[Plan(2)]), (0, 6, 7)),
    'pp2_tp3': (Placement(prefill=[Plan(1, 2)], decode=[Plan(3)]),
                (0, 1, 2, 3, 4)),
    'tp2_pp2': (Placement(prefill=[Plan(2)], decode=[Plan(1, 2)]),
                (4, 5, 2, 3)),
    'colocated_pp2': (Placement(colocated=[Plan(1, 2)]), (2, 3)),
    'chunked_pp2': (Placement(chunked=[Plan(1, 2)]), (2, 3)),
    '2flexible': (Placement(flexible=[Plan()] * 2), (0, 2)),
    'flexible_pp2': (Placement(flexible=[Plan(1, 2), Plan()]), (2, 3, 0)),
    'mixed': (Placement(prefill=[Plan()], chunked=[Plan()]), (0, 2)),
}
EACH_MODE = pytest.mark.parametrize(
    'mode', ('1p1d', 'colocated', 'chunked'))


def server_of(mode, config=PAGES_4, model=MODEL, **options):
  placement, devices = MODES[mode]
  return serve(model, placement, config,
               devices=[jax.devices()[i] for i in devices], **options)


def fake_server_of(mode='1p1d', config=PAGES_4, **options):
  """As server_of, on engines that compile nothing."""
  return server_of(mode, config, make_engine=fake_engine.FakeEngine, **options)


def expected_of_fakes(prompt, params):
  """The tokens a request must give on fake engines."""
  return fake_engine.expected(prompt, params, (EOS,), Letters.vocab_size)


# --- the oracle --------------------------------------------------------------


@functools.cache
def _sample():
  return jax.jit(sampling.sample)


def draw(logits_V, tokens, prompt_len, params):
  """The token after `tokens`, by one row of sampling and no engine."""
  row = sampling.slot_row(tokens, prompt_len, params, 64, 96)
  _, out = _sample()(np.float32(logits_V)[None], row, np.zeros(1, np.int32),
                     np.full(1, len(tokens), np.int32), sampling.FULL)
  return int(out.token_R[0])


@functools.cache
def expected(prompt, params):
  """The tokens a request must give, whatever serves it."""
  ends = set(params.stop_token_ids) | (
      set() if params.ignore_eos else {EOS})
  tokens, out = list(prompt), []
  while len(out) < params.max_tokens and not ends & set(out):
    logits_V = tiny.dense_logits(tokens, CONFIG)[-1]
    if sampling.mode(params) == sampling.GREEDY:
      out.append(int(np.argmax(logits_V)))
    else:
      out.append(draw(logits_V, tokens, len(prompt), params))
    tokens.append(out[-1])
  return tuple(out)


def greedy(prompt, count):
  return tuple(tiny.greedy(prompt, count, CONFIG))


# --- workloads and how they are played ---------------------------------------


def job(length, count=12, variant=0, **params):
  """(prompt, parameters)."""
  return tiny.prompt(length, variant), {'max_tokens': count, **params}


HOT = {'temperature': 1.0}
MIXED = (
    job(5, 20), job(20, 16, ignore_eos=True), job(1, 9, **HOT, seed=7),
    job(33, 14, **HOT, top_k=8, seed=1), job(40, 10, **HOT, top_p=.8, seed=2),
    job(9, 20, temperature=2.0, min_p=.05, seed=3),
    job(12, 18, repetition_penalty=1.5), job(30, 1),
    job(17, 15, presence_penalty=1.0, frequency_penalty=.7, **HOT, seed=2**31),
    job(8, 12, logit_bias={5: 3.0, 40: -100.0}, **HOT, seed=5),
    job(16, 16, logprobs=3), job(5, 20, **HOT, seed=8))
LONG = tuple(job(n, 40, s, ignore_eos=True) for n, s in (
    (20, 1), (24, 2), (16, 3), (21, 4)))


def want(work, oracle=expected):
  prompt, params = work
  return oracle(prompt, Sampling(**params))


def drain(server, faulty=False):
  """Polls to the end, then checks that everything has come back.

  faulty: faults were asked for; else there must be none.
  """
  give_up = time.monotonic() + 300  # processes that start on a loaded machine
  while server.busy:
    server.poll()
    assert time.monotonic() < give_up, 'the server hangs'
  check_tidy(server, faulty)


def check_tidy(server, faulty=False):
  assert faulty or not server.faults
  scheduler.check(server.state)
  assert scheduler.idle(server.state) and not server.state.seqs
  for i, (one, instance) in enumerate(zip(
      server.engines, server.state.instances, strict=True)):
    empty = i in server.fleet.down and i not in server.fleet.starting
    slots = 0 if empty else one.config.max_seqs
    assert len(one.spare) == len(set(one.spare)) == slots
    assert not one.slot_of
    pool = instance.pool
    assert prefix_cache.num_free(pool) == pool.num_pages
    prefix_cache.check(pool, ())
    assert instance.residents == instance.backlog == 0
  assert not server.fleet.busy and not server.unfinished


def until(true, server=None):
  """The value of `true` once it is; a server goes on meanwhile."""
  while not (value := true()):
    if server:
      server.poll()
    time.sleep(1e-3)
  return value


def check_held(server):
  """No process of a server holds anything, nor has it compiled since it was
  ready."""
  answers = [engine.count() for engine in server.engines]
  until(lambda: all(answer() for answer in answers), server)
  assert [answer() for answer in answers] == [messages.Counted(0, 0, 0, 0)] * (
      len(answers))


def play(server, work, order=None, between=0, faulty=False):
  """Outputs of `work`, submitted in `order`, `between` polls apart."""
  ids = {}
  for i in order or range(len(work)):
    ids[i] = server.submit(work[i][0], **work[i][1])
    for _ in range(between):
      server.poll()
  drain(server, faulty)
  return [server.output(ids[i]) for i in range(len(work))]


def check_tokens(work, outputs, oracle=expected):
  for i, (one, output) in enumerate(zip(work, outputs, strict=True)):
    assert output.tokens == want(one, oracle), f'request {i}: {one[1]}'


def disturb(server):
  """Serves all that a server can meet: modes, sizes, preemption, cancel.

  Requests that were not cancelled, each with its output.
  """
  work = MIXED + LONG + MIXED[::-1]
  ids = [server.submit(p, **params) for p, params in work]
  for id in ids[1::5]:
    server.poll()
    server.cancel(id)
  drain(server)
  again = []
  for i in range(len(work)):
    again.append(server.submit(work[i][0], **work[i][1]))
    for _ in range(i % 7):
      server.poll()
  drain(server)
  assert sum(r.preemptions for r in server.records) > 0
  return [(one, server.output(id)) for one, id in zip(
      work, again, strict=True)]


def preemptions(outputs):
  return sum(o.record.preemptions for o in outputs)


def check_survivors(server, ids, work, oracle=expected):
  """Cancelled requests have a beginning of their tokens, others all."""
  cancelled = 0
  for id, one in zip(ids, work, strict=True):
    output = server.output(id)
    if output.reason == 'cancelled':
      cancelled += 1
      assert output.tokens == want(one, oracle)[:len(output.tokens)]
    else:
      assert output.tokens == want(one, oracle)
  return cancelled


@contextlib.contextmanager
def compilations():
  """Names of what JAX traces, lowers or compiles meanwhile."""
  found, on = [], [True]

  def listen(name, *_, **__):
    if on[0] and name.startswith('/jax/core/compile/'):
      found.append(name)

  jax.monitoring.register_event_duration_secs_listener(listen)
  yield found
  on[0] = False

"""The orchestrator over fake engines: text, ends, cancels, records.

Nothing is compiled. Tokens are compared with fake_engine.expected, which knows
of no instance; tests that need a device are in tokens_test.py.
"""

import contextlib
import dataclasses
import functools
import json
import random

import pytest

from dsjax.config.checks import InputError
from dsjax.config.request import Request, Sampling
from dsjax.runtime.fleet import StepDone
from dsjax.runtime.output import RequestOutputState
from dsjax.scheduling import event_log
from dsjax.scheduling.events import Finish, Preempt, Reject
from experiments.common import report
from tests.common import fake_engine, serving, tiny
from tests.common.serving import (
  EACH_MODE,
  EOS,
  HOT,
  LONG,
  MIXED,
  PAGES_4,
  Letters,
  check_tidy,
  drain,
  job,
  play,
)

pytestmark = pytest.mark.usefixtures('no_hang')
expected = serving.expected_of_fakes
server_of = serving.fake_server_of


def greedy(prompt, count):
  return expected(prompt, Sampling(max_tokens=count, ignore_eos=True))


want, check_tokens, check_survivors = (
    functools.partial(f, oracle=expected) for f in (
        serving.want, serving.check_tokens, serving.check_survivors))


# --- how a request ends ------------------------------------------------------


@EACH_MODE
@pytest.mark.parametrize('count', (1, 2, 5))
def test_max_tokens(mode, count):
  with server_of(mode) as server:
    output = server.generate(tiny.prompt(6), max_tokens=count,
                             ignore_eos=True)
    drain(server)
  assert output.tokens == greedy(tiny.prompt(6), count)
  assert (output.reason, output.record.status) == ('length', 'length')


def test_without_max_tokens_the_context_is_filled(server):
  output = server.generate(tiny.prompt(50), ignore_eos=True)
  assert len(output.tokens) == 14 and output.reason == 'length'
  assert output.tokens == greedy(tiny.prompt(50), 14)


@EACH_MODE
def test_a_request_may_fill_the_context_to_the_last_token(mode):
  work = job(63, 1, ignore_eos=True), job(1, 63, ignore_eos=True)
  with server_of(mode) as server:
    check_tokens(work, play(server, work))


@EACH_MODE
@pytest.mark.parametrize('at', (0, 1, 4))
def test_eos_ends_unless_ignored(mode, at):
  """At the first token (a prefill's) and at a later one (a decode's)."""
  work = eos_at(at)
  with server_of(mode) as server:
    output, ignored = play(server, [work, (
        work[0], {**work[1], 'ignore_eos': True})])
  assert output.tokens == want(work) and output.tokens.index(EOS) == at
  assert output.reason == 'stop' and len(output.tokens) == at + 1
  assert output.text == Letters().decode(output.tokens)
  assert len(ignored.tokens) == 12 and ignored.reason == 'length'
  assert ignored.tokens[:at + 1] == output.tokens


@functools.cache
def eos_at(at):
  """A job whose token number `at` is EOS."""
  for seed in range(2000):
    work = job(7, 12, logit_bias=((EOS, 2.5),), temperature=1.5, seed=seed)
    out = expected(work[0], Sampling(**{**work[1], 'max_tokens': at + 1}))
    if EOS in out and out.index(EOS) == at:
      return work
  raise AssertionError('no such seed')


def greedy_text(length=6, count=20):
  """(job, tokens, text) of a greedy answer."""
  work = job(length, count, ignore_eos=True)
  return work, want(work), Letters().decode(want(work))


@EACH_MODE
@pytest.mark.parametrize('at', (0, 3))
def test_stop_token_ids(mode, at):
  (prompt, params), tokens, _ = greedy_text()
  stop = tokens[at]
  end = tokens.index(stop)
  with server_of(mode) as server:
    output = server.generate(prompt, **params, stop_token_ids=(95, stop))
    drain(server)
  assert output.tokens == tokens[:end + 1] and output.reason == 'stop'
  assert output.text == Letters().decode(tokens[:end])


@EACH_MODE
@pytest.mark.parametrize('low, high', ((0, 1), (4, 5), (5, 8), (18, 20)))
def test_stop_strings_end_the_text_before_them(mode, low, high):
  (prompt, params), _, text = greedy_text()
  stop = text[low:high]
  with server_of(mode) as server:
    output = server.generate(prompt, **params, stop=stop)
    drain(server)
  assert output.text == text[:text.index(stop)] and output.reason == 'stop'
  assert len(output.record.token_s) == len(output.tokens)


def test_a_stop_string_that_only_begins_is_shown_in_the_end(server):
  (prompt, params), _, text = greedy_text()
  output = server.generate(prompt, **params, stop=[text[-3:] + '!', '#####'])
  assert output.text == text and output.reason == 'length'


# --- streams -----------------------------------------------------------------


@EACH_MODE
def test_a_stream_gives_the_text_of_generate_in_pieces(mode):
  work = [job(6, 20, ignore_eos=True), job(6, 20, **HOT, seed=3,
                                           ignore_eos=True),
          job(8, 30, temperature=1.5, seed=4, ignore_eos=True,
              logit_bias={90: 3.0, 91: 3.0, 92: 3.0})]
  with server_of(mode) as server:
    for prompt, params in work:
      text = server.generate(prompt, **params).text
      pieces = list(server.stream(prompt, **params))
      assert ''.join(pieces) == text and len(pieces) > 3 and all(pieces)
      assert text == Letters().decode(want((prompt, params)))
    drain(server)
    assert not server.requests


def test_a_stream_with_a_stop_string(server):
  (prompt, params), _, text = greedy_text()
  stop = text[7:10]
  pieces = list(server.stream(prompt, **params, stop=stop))
  assert ''.join(pieces) == text[:text.index(stop)]


def test_half_a_character_is_never_shown():
  """Tokens 90, 91, 92 are the bytes of one euro."""
  texts = Letters()
  state = RequestOutputState(Request(0, 0.0, (3,), Sampling(
      max_tokens=5, ignore_eos=True)), set(), texts)
  shown = []
  for token in (90, 91, 92, 94, 95):
    state.push(token)
    shown.append(state.text)
  assert shown == ['', '', '€', '€�', '€��']


@EACH_MODE
def test_leaving_a_stream_early_cancels_it(mode):
  with server_of(mode) as server:
    other = server.submit(tiny.prompt(9), max_tokens=20, ignore_eos=True)
    stream = server.stream(tiny.prompt(6), max_tokens=50, ignore_eos=True)
    next(stream)
    stream.close()
    assert server.records[1].status == 'cancelled'
    drain(server)
    assert server.output(other).tokens == greedy(tiny.prompt(9), 20)
    assert not server.requests and len(server.records[1].token_s) < 50


def test_a_poll_tells_of_a_step_whose_command_goes_on(server, monkeypatch):
  for steps in ((), (StepDone(0, 0, ()),)):
    monkeypatch.setattr(server.fleet, 'poll', lambda steps=steps: steps)
    assert server.poll() == bool(steps)


def test_text_held_back_is_shown_when_a_request_is_cancelled(server):
  (prompt, params), _, text = greedy_text(count=40)
  id = server.submit(prompt, **params, stop=text[:30] + '!')
  while len(server.requests[id].tokens) < 3:
    server.poll()
  assert not server.requests[id].text
  server.cancel(id)
  drain(server)
  output = server.output(id)
  assert output.reason == 'cancelled'
  assert output.text == Letters().decode(output.tokens) != ''


def test_two_streams_at_once(server):
  work = [job(6, 15, ignore_eos=True), job(9, 15, ignore_eos=True)]
  streams = [server.stream(p, **params) for p, params in work]
  texts = ['', '']
  left = [0, 1]
  while left:
    for i in list(left):
      piece = next(streams[i], None)
      if piece is None:
        left.remove(i)
      else:
        texts[i] += piece
  assert texts == [Letters().decode(want(w)) for w in work]


def test_a_question_and_messages_go_through_the_chat_template(server):
  as_text = server.generate('Hi', max_tokens=4, ignore_eos=True)
  messages = [{'role': 'user', 'content': 'Hi'}]
  as_messages = server.generate(messages, max_tokens=4, ignore_eos=True)
  assert as_text.tokens == as_messages.tokens
  assert as_text.tokens == greedy((1, *(3 + b % 90 for b in b'Hi')), 4)


# --- cancelling --------------------------------------------------------------

STAGES = [(mode, stage) for mode in ('1p1d', 'colocated', 'chunked')
          for stage in ('queued', 'prefilling', 'decoding', 'finishing')]
STAGES += [('1p1d', 'prefilled'), ('1p1d', 'migrating')]


@pytest.mark.parametrize('mode, stage', STAGES)
def test_cancel_in_each_stage(mode, stage):
  work = LONG + (job(50, 10, ignore_eos=True), job(28, 9, ignore_eos=True))
  config = dataclasses.replace(PAGES_4, depth=1)  # else a stage goes unseen
  with server_of(mode, config) as server:
    ids, victims = [server.submit(p, **q) for p, q in work], set()
    while server.busy:
      for seq in list(server.state.seqs.values()):
        if seq.stage == stage and not victims:
          victims.add(seq.id)
          server.cancel(seq.id)
          assert server.requests[seq.id].reason == 'cancelled'
      server.poll()
    check_tidy(server)
    assert len(victims) == 1
    assert check_survivors(server, ids, work) == 1


def test_cancelling_what_has_ended_does_nothing(server):
  id = server.submit(tiny.prompt(5), max_tokens=2, ignore_eos=True)
  drain(server)
  server.cancel(id)
  assert server.output(id).reason == 'length'
  server.cancel(id)


def test_what_is_not_there_or_not_done_is_a_clear_error(server):
  id = server.submit(tiny.prompt(5), max_tokens=9, ignore_eos=True)
  for ask in (server.output, server.forget):
    with pytest.raises(InputError, match=f'id={id}: .* ended: this one is run'):
      ask(id)
  drain(server)
  assert server.output(id).tokens == greedy(tiny.prompt(5), 9)
  unknown = (10**6, -1, None, 'a', [1], 1.5)
  for ask in (server.output, server.forget, lambda id: server.take([id])):
    for bad in (id, *unknown):  # id: a second time
      with pytest.raises(InputError, match='id=.*has not been taken'):
        ask(bad)
  for bad in unknown:
    with pytest.raises(InputError, match='id=.*request of this server'):
      server.cancel(bad)


def test_cancelling_twice(server):
  id = server.submit(tiny.prompt(5), max_tokens=30, ignore_eos=True)
  server.cancel(id)
  server.cancel(id)
  drain(server)
  assert server.output(id).reason == 'cancelled'


@pytest.mark.parametrize('mode', ('1p1d', '2p2d', 'colocated', 'chunked'))
@pytest.mark.parametrize('seed', range(3))
def test_any_order_of_submitting_cancelling_and_polling(mode, seed):
  rng = random.Random(seed)
  config = dataclasses.replace(PAGES_4, depth=rng.randint(1, 3),
                               run_ahead=rng.randint(1, 5))
  work = [rng.choice(MIXED + LONG) for _ in range(24)]
  with server_of(mode, config) as server:
    ids, left = [], list(work)
    while left or server.busy:
      if left and rng.random() < .3:
        prompt, params = left.pop(0)
        ids.append(server.submit(prompt, **params))
      if ids and rng.random() < .02:
        server.cancel(rng.choice(ids))
      server.poll()
    check_tidy(server)
    check_survivors(server, ids, work)
    assert event_log.replay(server.scheduler_config, server.log) is None


@EACH_MODE
def test_a_poll_takes_in_no_more_than_was_in_flight(mode, monkeypatch):
  """However fast the device: streams, arrivals and cancels must get a turn."""
  monkeypatch.setattr(fake_engine.Late, 'is_ready', lambda _: True)
  with server_of(mode) as server:
    server.submit(tiny.prompt(6), max_tokens=40, ignore_eos=True)
    while server.busy:
      flying = sum(map(len, server.fleet.running)) + len(server.fleet.transfers)
      seen = len(server.log)
      server.poll()
      # And at most what the transfers that ended have started: two deep.
      assert len(server.log) - seen <= flying + 2 * len(server.engines)


# --- closing -----------------------------------------------------------------


@EACH_MODE
def test_closing_cancels_what_is_left(mode):
  with server_of(mode) as server:
    ids = [server.submit(p, **q) for p, q in LONG + MIXED]
    for _ in range(5):
      server.poll()
  check_tidy(server)
  assert 'cancelled' in {r.status for r in server.records}
  assert all(server.output(id).reason for id in ids)
  server.close()
  with pytest.raises(InputError, match='closed'):
    server.submit([3])


def test_an_error_in_the_callers_block_closes_too():
  with pytest.raises(KeyError), server_of('1p1d') as server:
    server.submit(*LONG[0][:1], **LONG[0][1])
    raise KeyError
  check_tidy(server)
  assert server.records[0].status == 'cancelled'


# --- records and the log -----------------------------------------------------


@pytest.mark.parametrize('mode', ('1p1d', '2p2d', 'colocated', 'chunked'))
def test_records_are_complete(mode):
  with server_of(mode) as server:
    outputs = play(server, MIXED + LONG, between=1)
    assert [o.record for o in outputs] == server.records
  for (prompt, params), o in zip(MIXED + LONG, outputs, strict=True):
    r = o.record
    assert (r.status, r.prompt_len) == (o.reason, len(prompt))
    assert r.max_tokens == params['max_tokens']
    assert len(r.token_s) == len(o.tokens)
    assert sum(r.stage_s.values()) == pytest.approx(r.finish_s - r.arrival_s)
    assert all(s >= 0 for s in r.stage_s.values())
    times = [r.arrival_s, *r.token_s]
    assert times == sorted(times) and r.finish_s >= times[-1] - 1e-9
  moved = sum(o.record.migrated_tokens for o in outputs)
  assert bool(moved) == (mode in ('1p1d', '2p2d'))


@pytest.mark.parametrize('mode', ('1p1d', '2p2d', 'colocated', 'chunked'))
def test_the_saved_log_replays(mode, tmp_path):
  with server_of(mode) as server:
    ids = [server.submit(p, **q) for p, q in MIXED + LONG]
    for _ in range(10):
      server.poll()
    server.cancel(ids[3])
    with contextlib.suppress(InputError):
      server.submit([3] * 70)
    drain(server)
    report.save_log(tmp_path / 'log.jsonl', server.log)
    with open(tmp_path / 'log.jsonl') as file:
      log = [event_log.decode(json.loads(line)) for line in file]
    assert log == server.log
    assert event_log.replay(server.scheduler_config, log) is None
    kinds = {type(c) for _, commands in log for c in commands}
    assert {Preempt, Finish, Reject} < kinds


def test_replay_says_where_a_log_differs():
  with server_of('colocated') as fresh:
    play(fresh, MIXED[:3])
    for at in (0, len(fresh.log) // 2):
      log = list(fresh.log)
      log[at] = (log[at][0], log[at][1] + (Finish(0, 'stop'),))
      assert event_log.replay(fresh.scheduler_config, log) == at


def test_device_steps_and_host_time_are_counted(server):
  steps, host_s = server.steps, server.host_s
  server.generate(tiny.prompt(6), max_tokens=9, ignore_eos=True)
  assert server.steps >= steps + 9 and server.host_s > host_s

"""The orchestrator over fake engines: loops, text, ends, errors, cancels.

Nothing is compiled. Tokens are compared with fake_engine.expected, which knows
of no instance; tests that need a device are in tokens_test.py.
"""

import contextlib
import dataclasses
import functools
import json
import random
import types

import numpy as np
import pytest

from dsjax.config.checks import InputError
from dsjax.config.request import Request, Sampling
from dsjax.runtime import loop
from dsjax.runtime.fleet import StepDone
from dsjax.runtime.output import RequestOutputState
from dsjax.scheduling import event_log, scheduler
from dsjax.scheduling.events import (
  Finish,
  Migrated,
  Preempt,
  Reject,
  RunPrefill,
)
from experiments.common import report
from tests.common import fake_engine, serving, tiny
from tests.common.serving import (
  EACH_MODE,
  EOS,
  HOT,
  LONG,
  MIXED,
  MUTE,
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


@pytest.fixture(scope='module')
def shared():
  """One colocated server for tests that leave it as they found it."""
  with server_of('colocated') as server:
    yield server


@pytest.fixture
def server(shared):
  yield shared
  drain(shared)
  left = sorted(shared.requests)
  shared.requests.clear()  # so that one failure does not bring on others
  assert not left


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


# --- bad input ---------------------------------------------------------------

BAD = (
    ([], {}, r'prompt=\[\].*\[0, 96\)'), ([96], {}, r'prompt=.*\[0, 96\)'),
    ([3, -1], {}, r'prompt=.*\[0, 96\)'), ([1.5], {}, r'prompt=.*\[0, 96\)'),
    (['a'], {}, 'prompt='), (7, {}, 'prompt='), (None, {}, 'prompt='),
    ([3], {'max_token': 3}, "parameter='max_token': must be .*'max_tokens'"),
    ([3], {'max_tokens': 0}, 'Sampling.max_tokens=0: must be an integer of 1'),
    ([3], {'max_tokens': 2.0}, 'Sampling.max_tokens=2.0'),
    ([3], {'temperature': -1}, 'Sampling.temperature=-1: .* .0, 100.'),
    ([3], {'temperature': float('nan')}, 'Sampling.temperature=nan'),
    ([3], {'top_p': 0}, 'Sampling.top_p=0'),
    ([3], {'top_p': 'x'}, "Sampling.top_p='x'"),
    ([3], {'logit_bias': {96: 1.0}}, 'Sampling.logit_bias.*below 96'),
    ([3], {'logprobs': 21}, 'Sampling.logprobs=21.* 20'),
    ([3], {'stop': ['']}, 'Sampling.stop='),
    (range(3, 70), {}, '67 tokens.* 64'),
    ([3] * 64, {}, '64 tokens and max_tokens=1 .* context of 64'),
    ([3] * 60, {'max_tokens': 5}, '60 tokens and max_tokens=5 .* 64'),
)


@pytest.mark.parametrize('prompt, params, message', BAD)
def test_bad_input_is_one_clear_error_and_the_others_go_on(
    server, prompt, params, message):
  id = server.submit(tiny.prompt(6), max_tokens=8, ignore_eos=True)
  server.poll()
  with pytest.raises(InputError, match=message):
    server.submit(prompt, **params)
  with pytest.raises(InputError, match=message):
    list(server.stream(prompt, **params))
  drain(server)
  assert server.output(id).tokens == greedy(tiny.prompt(6), 8)


@pytest.mark.parametrize('prompt, params, message', (
    ('Hi', {}, 'no tokenizer'),
    ([{'role': 'user', 'content': 'Hi'}], {}, 'no tokenizer'),
    ([3], {'stop': 'x'}, 'Sampling.stop.*without a tokenizer')))
def test_a_model_without_tokenizer_takes_ids_alone(prompt, params, message):
  with server_of('colocated', model=MUTE) as server:
    with pytest.raises(InputError, match=message):
      server.submit(prompt, **params)
    output = server.generate([5, 6], max_tokens=3, ignore_eos=True)
  assert output.text == '' and len(output.tokens) == 3


def test_a_request_larger_than_the_pool_is_refused():
  config = dataclasses.replace(PAGES_4, num_pages=8)
  plan = scheduler.Config((config.instance('colocated'),), 64)
  reason = scheduler.never_fits(plan, 20, 20)
  assert '10 pages' in reason and 'has 8' in reason


def test_a_context_longer_than_the_models_is_refused():
  with pytest.raises(InputError, match='EngineConfig.max_len=129.* 128'):
    server_of('colocated', dataclasses.replace(PAGES_4, max_len=129))


# --- workloads ---------------------------------------------------------------


class Clock:
  """Time that passes a millisecond a look, so that arrivals are exact."""

  def __init__(self):
    self.now = 0.0

  def perf_counter(self):
    self.now += 1e-3
    return self.now

  def sleep(self, seconds):
    self.now += seconds


def requests(arrivals, **params):
  return [Request(100 + i, at, tiny.prompt(5 + i), Sampling(
      max_tokens=20, ignore_eos=True, **params))
          for i, at in enumerate(arrivals)]


def test_run_replays_arrivals_in_order_and_in_an_open_loop(monkeypatch):
  clock = Clock()
  monkeypatch.setattr(loop, 'time', types.SimpleNamespace(
      perf_counter=clock.perf_counter, sleep=clock.sleep))
  arrivals = (.030, .0, .010, .500)
  with server_of('1p1d') as server:
    polls = []
    start = server.now
    records = server.run(requests(arrivals), on_poll=lambda: polls.append(1))
    check_tidy(server)
    assert [r.id for r in records] == [101, 102, 100, 103] and polls
    at = [r.arrival_s - start for r in records]
    np.testing.assert_allclose(at, sorted(arrivals), atol=5e-3)
    np.testing.assert_allclose(np.diff(at), np.diff(sorted(arrivals)))
    kinds = [(type(e).__name__, getattr(e, 'id', None))
             for e, _ in server.log]
    first_end = next(i for i, (_, commands) in enumerate(server.log)
                     if any(isinstance(c, Finish) for c in commands))
    assert kinds.index(('Arrived', 102)) < first_end
    for id in (100, 101, 102, 103):
      assert server.output(id).tokens == greedy(tiny.prompt(id - 95), 20)


def test_a_request_is_not_served_before_it_arrives(monkeypatch):
  clock = Clock()
  monkeypatch.setattr(loop, 'time', types.SimpleNamespace(
      perf_counter=clock.perf_counter, sleep=clock.sleep))
  with server_of('colocated') as server:
    for record in server.run(requests((0.0, .2, .4))):
      assert record.token_s[0] > record.arrival_s


def test_requests_of_one_moment_are_prefilled_together(monkeypatch):
  clock = Clock()
  monkeypatch.setattr(loop, 'time', types.SimpleNamespace(
      perf_counter=clock.perf_counter, sleep=clock.sleep))
  with server_of('1p1d') as server:
    server.run(requests((0.0, 0.0, 0.0, .5)))
    chunks = [[chunk.id for chunk in c.chunks] for _, commands in server.log
              for c in commands if isinstance(c, RunPrefill)]
    assert chunks == [[100, 101], [102], [103]]  # prefill_seqs is 2


def test_hand_offs_of_one_poll_begin_in_one_step():
  with server_of('1p1d') as server:
    server.generate_all([[5, 6, 7]] * 2, max_tokens=4)
    handed = [(event, commands) for event, commands in server.log
              if isinstance(event, Migrated)]
  (first, nothing), (second, commands) = handed
  assert (first.more, second.more, nothing) == (True, False, ())
  assert len(commands[0].rows) == 2


NO_NUMBER = (None, True, float('nan'), float('inf'), 'x', [1], 1j)


@pytest.mark.parametrize('field, value, message', [
    *(('arrival_s', value, 'request 102: Request.arrival_s=.*seconds') for value
      in (*NO_NUMBER, -1, -1e-9, 1.7e9, 10**400, np.float32('nan'))),
    ('id', 100, 'Request.id=100: must be different'),
    *(('id', value, 'Request.id=') for value in (*NO_NUMBER, -1, 1.5)),
    *(('prompt', value, 'request 102: Request.prompt=') for value in (
        (5, -1), (), (5, 96), (5.0,), 'text', None, 7, {5}, np.array(5))),
    *(('sampling', value, 'request 102: .*[sS]ampling') for value in (
        Sampling(), None, {'max_tokens': 4}, 'x',
        Sampling(max_tokens=1, logit_bias={96: 1})))])
def test_a_bad_workload_is_refused_before_any_of_it_runs(field, value, message):
  with server_of('1p1d') as server:
    work = requests((0.0, 0.0, 0.5))
    work[2] = dataclasses.replace(work[2], **{field: value})
    with pytest.raises(InputError, match=message):
      server.run(work)
    assert not server.log and not server.unfinished and not server.requests
    for other in (None, 5, 'x', [None], [work[0], {'id': 5}]):
      with pytest.raises(InputError, match='requests'):
        server.run(other)
    assert not server.log


@pytest.mark.parametrize('field', [f.name for f in dataclasses.fields(
    Sampling)])
def test_a_parameter_of_any_other_kind_is_named(server, field):
  for value in (float('nan'), 1j, object(), [[1, 2, 3]], np.array([[5]])):
    with pytest.raises(InputError, match=f'Sampling.{field}='):
      server.submit([5], **{field: value})


@pytest.mark.parametrize('value', [*NO_NUMBER[1:], object()])
def test_an_arrival_is_a_time(server, value):
  with pytest.raises(InputError, match='arrival_s='):
    server.submit([5], arrival_s=value)
  assert not server.requests


def test_numpys_numbers_are_served(server):
  params = {'max_tokens': 5, 'ignore_eos': True, 'seed': 3, 'top_k': 4,
            'temperature': 0.5, 'stop_token_ids': [7], 'logprobs': 1}
  kinds = {int: np.int64, float: np.float32, bool: np.bool_}
  numpys = {name: np.array(value) if name == 'stop_token_ids' else
            kinds[type(value)](value) for name, value in params.items()}
  output = server.generate(np.array([5, 6]), **numpys)
  assert output.tokens == server.generate([5, 6], **params).tokens
  json.dumps([output.record.row(), output.tokens])
  id = server.submit([5, 6], arrival_s=np.float32(0), **numpys)
  drain(server)
  assert server.output(np.int64(id)).tokens == output.tokens
  request = Request(np.int64(90), np.float32(0.0), np.array([5, 6]),
                    Sampling(**numpys))
  record, = server.run([request])
  json.dumps(record.row())
  server.cancel(np.int32(90))
  assert server.output(90).tokens == output.tokens
  server.drain(np.int8(0))
  server.restore(np.int64(0))
  with server_of('1p1d') as other:
    other.kill(np.int64(0), back_s=np.float32(0.0))
  with pytest.raises(InputError, match='instance='):
    server.drain(True)
  with pytest.raises(InputError, match='id='):
    server.output(True)


@pytest.mark.parametrize('pages', (1, 8, 15, 16))
def test_without_max_tokens_an_answer_fits_the_smallest_pool(pages):
  config = dataclasses.replace(PAGES_4, num_pages=pages)
  with server_of('1p1d', config) as server:
    output = server.generate([5, 6], ignore_eos=True)
    most = min(64, 4 * pages + 1) - 2
    assert len(output.tokens) == most and output.reason == 'length'
    with pytest.raises(InputError, match=f'max_tokens={most + 1}'):
      server.generate([5, 6], max_tokens=most + 1)


@EACH_MODE
def test_a_rejected_request_is_recorded_and_forgotten(mode):
  work = requests((0.0, 0.0, 0.0))
  work[1] = dataclasses.replace(work[1], prompt=tiny.prompt(60))
  with server_of(mode) as server:
    records = server.run(work)
    check_tidy(server)
    assert [r.status for r in records] == ['length', 'rejected', 'length']
    assert '60 tokens' in records[1].reason and '64' in records[1].reason
    assert not records[1].token_s
    for i in (0, 2):
      assert server.output(100 + i).tokens == greedy(work[i].prompt, 20)
    server.output(101) if 101 in server.requests else None
    assert not server.unfinished and not server.requests


def test_refused_submissions_leave_nothing_behind():
  with server_of('colocated') as server:
    for _ in range(3):
      with pytest.raises(InputError, match='context'):
        server.submit([3] * 70)
    assert not server.unfinished and not server.requests
    assert [r.status for r in server.records] == ['rejected'] * 3


def test_an_id_is_served_once():
  # Not as a context: what a refused request leaves behind could hang close().
  server = server_of('colocated')
  request = Request(7, 0.0, (5, 6), Sampling(max_tokens=1))
  server.enqueue(request)
  with pytest.raises(InputError, match='id=7'):
    server.enqueue(request)
  drain(server)
  server.output(7)
  with pytest.raises(InputError, match='id=7'):
    server.enqueue(request)
  assert not server.busy and not server.unfinished and not server.requests
  server.close()


def test_a_workload_must_say_max_tokens(server):
  with pytest.raises(InputError, match='Sampling.max_tokens'):
    server.run([Request(10**8, 0.0, (5, 6))])


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

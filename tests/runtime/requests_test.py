"""What is asked of the orchestrator over fake engines: bad input, workloads.

Nothing is compiled. Tokens are compared with fake_engine.expected, which knows
of no instance.
"""

import dataclasses
import json
import types

import numpy as np
import pytest

from dsjax.config.checks import InputError
from dsjax.config.request import Request, Sampling
from dsjax.runtime import loop
from dsjax.scheduling import scheduler
from dsjax.scheduling.events import Finish, Migrated, RunPrefill
from tests.common import serving, tiny
from tests.common.serving import EACH_MODE, MUTE, PAGES_4, check_tidy, drain

pytestmark = pytest.mark.usefixtures('no_hang')
expected = serving.expected_of_fakes
server_of = serving.fake_server_of


def greedy(prompt, count):
  return expected(prompt, Sampling(max_tokens=count, ignore_eos=True))


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

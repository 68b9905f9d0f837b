"""Prompts that begin alike: tokens as without a cache, work only once."""

import dataclasses

import pytest

from dsjax.config.checks import InputError
from dsjax.config.engine import EngineConfig
from dsjax.config.request import Request, Sampling
from dsjax.scheduling.events import Migrate, RunPrefill
from dsjax.scheduling.prefix_cache import num_idle
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
  expected,
  expected_of_fakes,
  fake_server_of,
  job,
  play,
  preemptions,
  server_of,
)

pytestmark = pytest.mark.usefixtures('no_hang')


def cached(config=PAGES_4, **changes):
  return dataclasses.replace(config, **{'prefix_cache': True} | changes)


def session(server, turns=4, first=9, more=4, count=9):
  """[(prompt, output)] of turns, each of which repeats all before it."""
  said, prompt = [], tiny.prompt(first, 5)
  for turn in range(turns):
    output, = play(server, [(prompt, {'max_tokens': count})])
    said.append((prompt, output))
    prompt = (*prompt, *output.tokens, *tiny.prompt(more, turn))
  return said


def commands(server, kind):
  return [c for _, commands in server.log for c in commands
          if isinstance(c, kind)]


def full(tokens, size):
  """How many of these are on full pages."""
  return tokens // size * size


@pytest.mark.parametrize('mode, config', [
    ('chunked', PAGES_16), ('colocated_pp2', PAGES_4),
    ('1p1d', dataclasses.replace(PAGES_4, decode_page_size=2, num_pages=40)),
    *deep(('1p1d', PAGES_4),
          ('tp1_tp2', dataclasses.replace(PAGES_4, kv_dtype='int8')),
          ('1p1d', dataclasses.replace(PAGES_4, page_size=2, num_pages=40,
                                       decode_page_size=4)))])
def test_a_turn_computes_and_moves_what_is_new(mode, config):
  config = cached(config, checksum=True)
  sizes = [config.page_size, config.decode_page_size or config.page_size]
  with server_of(mode, config) as server:
    warm = session(server)
    with compilations() as names:
      again = session(server)
    moves = commands(server, Migrate)
  assert not names
  assert [o.tokens for _, o in again] == [o.tokens for _, o in warm]
  kept = at_decode = 0  # tokens
  if config.kv_dtype is None:
    for prompt, output in warm:
      assert output.tokens == expected(prompt, tiny_params(9))
  for turn, (prompt, output) in enumerate(warm):
    assert output.record.cached_tokens == full(kept, sizes[0])
    kept = at_decode = len(prompt) + len(output.tokens) - 1
    if moves:
      kept = len(prompt)  # the answer is where it was generated
      unit = max(sizes)
      before = warm[turn - 1] if turn else None
      there = full(len(before[0]) + 8, sizes[1]) if before else 0
      assert moves[turn].hit == full(there, unit)
      assert moves[turn].num_tokens == len(prompt) - moves[turn].hit
      assert output.record.migrated_tokens == moves[turn].num_tokens
  assert at_decode


def tiny_params(count):
  return Sampling(max_tokens=count)


@pytest.mark.parametrize('mode', ['2p2d', '2flexible', *deep('chunked')])
def test_tokens_are_equal_with_what_is_kept_evicted_and_preempted(mode):
  stem = tiny.prompt(14, 3)
  work = [((*stem[:n], *prompt[:20]), params) for n, (prompt, params) in zip(
      (14, 9, 12, 14, 3, 14, 8, 14, 12, 4, 14, 8), MIXED, strict=True)]
  work = [(prompt, params | {'max_tokens': min(24, params['max_tokens'])})
          for prompt, params in work] + list(LONG)
  with server_of(mode, cached()) as server:
    outputs = play(server, work)
    check_tokens(work, outputs)
    assert preemptions(outputs) > 0
    outputs = play(server, work, between=5)
    check_tokens(work, outputs)
    outputs = play(server, work, list(range(len(work)))[::-1], between=40)
    check_tokens(work, outputs)
    assert sum(o.record.cached_tokens for o in outputs) > 0
    assert num_idle(server.state.instances[0].pool) > 0


def test_a_whole_prompt_again_samples_its_first_token_anew():
  """Of a prompt that is kept to its last page the last token is computed."""
  prompt = tiny.prompt(16, 2)
  with fake_server_of('colocated', cached()) as server:
    first, second = (play(server, [(prompt, {'max_tokens': 5})])[0]
                     for _ in range(2))
    assert first.tokens == second.tokens
    assert second.record.cached_tokens == 12
    assert [chunk[1:3] for command in commands(server, RunPrefill)
            for chunk in command.chunks] == [(0, 16), (12, 16)]


def test_what_a_lost_instance_kept_is_gone():
  prompt = tiny.prompt(20, 2)
  with fake_server_of('1p1d', cached(restart_s=0.0)) as server:
    play(server, [(prompt, {'max_tokens': 5})])
    for instance in (0, 1):
      assert num_idle(server.state.instances[instance].pool) == 5 + instance
      server.kill(instance, 0.0)
      assert num_idle(server.state.instances[instance].pool) == 0
    drain(server, faulty=True)
    output, = play(server, [(prompt, {'max_tokens': 5})], faulty=True)
    assert output.record.cached_tokens == 0


def test_an_answer_is_kept_however_it_ends():
  """By max_tokens, a stop token, or the end of the context; not one that is
  cancelled."""
  prompt = tiny.prompt(6, 2)
  tokens = expected_of_fakes(prompt, tiny_params(14))
  for params, known in (({'max_tokens': 11}, 16),
                        ({'max_tokens': 30, 'stop_token_ids': [tokens[10]]},
                         16)):
    with fake_server_of('colocated', cached(run_ahead=1)) as server:
      play(server, [(prompt, params)])
      again = (*prompt, *tokens[:11], *tiny.prompt(3, 9))
      output, = play(server, [(again, {'max_tokens': 1})])
      assert output.record.cached_tokens == known
      id = server.submit(tiny.prompt(6, 4), max_tokens=40)
      while not server.unfinished[id].tokens:
        server.poll()
      server.cancel(id)
      drain(server)
      output, = play(server, [((*tiny.prompt(6, 4), 3, 4, 5),
                               {'max_tokens': 1})])
      assert output.record.cached_tokens == 4


def test_many_at_once_share_one_system_prompt():
  stem = tiny.prompt(24, 1)
  work = [((*stem, *tiny.prompt(5, n)), {'max_tokens': 6}) for n in range(12)]
  config = cached(num_pages=48, max_seqs=8)
  with fake_server_of('2p2d', config) as server:
    play(server, work[:2])
    outputs = play(server, work[2:])
    check_tokens(work[2:], outputs, expected_of_fakes)
    assert all(o.record.cached_tokens == 24 for o in outputs)
    moved = sum(o.record.migrated_tokens for o in outputs)
    assert moved == len(outputs) * 5


def test_without_it_nothing_is_kept():
  work = [job(20, 5)] * 3
  with fake_server_of('1p1d', cached(prefix_cache=False)) as server:
    for output in play(server, work):
      assert output.record.cached_tokens == 0
    assert not any(event.blocks for event, _ in server.log
                   if hasattr(event, 'blocks'))


@pytest.mark.parametrize('value', ['yes', 1, None])
def test_it_is_on_or_off(value):
  with pytest.raises(InputError, match='EngineConfig.prefix_cache.*True'):
    EngineConfig(prefix_cache=value)


def test_a_server_refuses_requests_that_follow_others():
  work = [Request(n, 0.0, tiny.prompt(8, n), Sampling(max_tokens=2),
                  after=n - 1 if n else None) for n in range(2)]
  with fake_server_of('colocated', cached()) as server:
    with pytest.raises(InputError, match=r'requests\[1\].*Request.after=0'):
      server.run(work)
    assert not server.records


@pytest.mark.parametrize('mode', ['1p1d', 'colocated'])
def test_a_request_that_is_preempted_has_no_more_cached_than_its_prompt(mode):
  """What it finds again of its own is not what others had computed."""
  with fake_server_of(mode, cached()) as server:
    first = [o.record for o in play(server, LONG)]
    assert sum(r.preemptions for r in first) > 0
    assert not any(r.cached_tokens for r in first)
    again = [o.record for o in play(server, LONG * 3)]
  assert sum(r.preemptions for r in again) > 0
  assert all(r.cached_tokens <= full(r.prompt_len - 1, 4) for r in again)


def test_what_a_lost_prefill_had_found_does_not_count():
  prompt = tiny.prompt(20, 2)
  with fake_server_of('colocated', cached(restart_s=0.0)) as server:
    play(server, [(prompt, {'max_tokens': 5})])
    id = server.submit(prompt, max_tokens=5)
    assert commands(server, RunPrefill)[-1].chunks[0].hit == 16
    server.kill(0, 0.0)
    drain(server, faulty=True)
    record = server.output(id).record
    assert (record.retries, record.cached_tokens) == (1, 0)

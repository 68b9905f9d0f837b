"""Sessions and traces whose requests begin as others did."""

import dataclasses
import json

import pytest

from dsjax.config.checks import InputError
from dsjax.workload import sessions
from dsjax.workload.sessions import AGENT, CHAT, Sessions


def test_each_turn_repeats_what_was_said_before_it():
  kind = Sessions(turns=3, system_len=32, prompt_len=20, output_len=10)
  made = sessions.requests(kind, [0.0, 5.0], seed=1)
  assert len(made) == 6 and [r.id for r in made] == list(range(6))
  for first in (0, 3):
    turns = made[first:first + 3]
    assert [r.after for r in turns] == [None, first, first + 1]
    for before, now in zip(turns, turns[1:], strict=False):
      said = len(before.prompt) + before.sampling.max_tokens
      assert len(now.prompt) > said
      assert len(before.blocks) == said // 16
      assert now.blocks[:len(before.blocks)] == before.blocks
  assert made[0].blocks[:2] == made[3].blocks[:2] == (0, 1)
  assert not set(made[2].blocks[2:]) & set(made[5].blocks[2:])
  assert made[0].arrival_s == 0.0 and made[3].arrival_s == 5.0


def test_a_session_ends_before_it_is_too_long():
  kind = Sessions(turns=50, prompt_len=100, output_len=100, max_len=1000)
  made = sessions.requests(kind, [0.0] * 20, seed=2)
  assert all(len(r.prompt) + r.sampling.max_tokens <= 1000 for r in made)
  assert 20 < len(made) < 200
  long = dataclasses.replace(kind, prompt_len=90_000.0)
  assert all(len(r.prompt) == 999 for r in sessions.requests(long, [0.0]))


@pytest.mark.parametrize('kind', [CHAT, AGENT])
def test_lengths_are_those_asked_for(kind):
  made = sessions.requests(dataclasses.replace(kind, max_len=10**6),
                           [0.0] * 400, seed=3)
  answers = [r.sampling.max_tokens for r in made]
  assert sum(answers) / len(answers) == pytest.approx(kind.output_len, rel=.1)
  thinks = [r.arrival_s for r in made if r.after is not None]
  assert sum(thinks) / len(thinks) == pytest.approx(kind.think_s, rel=.1)
  firsts = [len(r.prompt) - kind.system_len for r in made if r.after is None]
  assert sum(firsts) / len(firsts) == pytest.approx(kind.prompt_len, rel=.15)


@pytest.mark.parametrize('change', [
    {'turns': 0}, {'think_s': -1}, {'prompt_len': float('nan')},
    {'block_tokens': 1.5}, {'system_len': 8191}, {'sigma': True}])
def test_what_is_no_session_is_named(change):
  with pytest.raises(InputError, match=f'Sessions.{next(iter(change))}='):
    Sessions(**change)


def write(tmp_path, *rows):
  path = tmp_path / 'trace.jsonl'
  path.write_text('\n'.join(json.dumps(dict(zip(
      ('timestamp', 'input_length', 'output_length', 'hash_ids'), row,
      strict=True))) for row in rows))
  return path


def test_a_trace_has_its_full_blocks(tmp_path):
  path = write(tmp_path, (3000, 1500, 9, [0, 5, 6]), (0, 1024, 4, [0, 1]),
               (1000, 100, 4, [7]))
  made = sessions.read_trace(path, speed=2.0)
  assert [r.arrival_s for r in made] == [0.0, 0.5, 1.5]
  assert [r.blocks for r in made] == [(0, 1), (), (0, 5)]
  assert {r.block_tokens for r in made} == {512}
  assert [len(r.prompt) for r in sessions.read_trace(path, most=2)
          ] == [1024, 100]
  assert [r.id for r in sessions.read_trace(path, context=1100)] == [0, 1]


@pytest.mark.parametrize('row, words', [
    ((0, 600, 4, None), 'line 1: hash_ids=None'),
    ((0, 600, 4, [1, 2, 3]), 'at most 2')])
def test_a_trace_without_blocks_is_named(tmp_path, row, words):
  with pytest.raises(InputError, match=words):
    sessions.read_trace(write(tmp_path, row))


def test_a_trace_of_other_columns_is_named(tmp_path):
  path = tmp_path / 'trace.jsonl'
  path.write_text('{"arrival_s": 0, "prompt_len": 5, "output_len": 1, '
                  '"hash_ids": []}')
  with pytest.raises(InputError, match='line 1: timestamp=None'):
    sessions.read_trace(path)
  with pytest.raises(InputError, match='speed=0'):
    sessions.read_trace(path, speed=0)
  path.write_text('{"timestamp": 0, "prompt_len": 5, "output_len": 1, '
                  '"hash_ids": []}')
  with pytest.raises(InputError, match='line 1: input_length=None'):
    sessions.read_trace(path)


def test_bad_values_are_named(tmp_path):
  path = write(tmp_path, (0, 600, 4, [1]))
  for options in ({'most': 0}, {'most': -1}, {'context': 5}):
    (name, value), = options.items()
    with pytest.raises(InputError, match=f'{name}={value}: must be'):
      sessions.read_trace(path, **options)
  with pytest.raises(InputError, match='max_len=1: must be .* 2 or more'):
    sessions.Sessions(max_len=1)
  with pytest.raises(InputError, match='seed=-1: must be'):
    sessions.requests(sessions.CHAT, [0.0], seed=-1)

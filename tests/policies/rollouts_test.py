"""Rollouts: what one tells, when it ends, and which roles win."""

import dataclasses
import types

import pytest

from dsjax.policies import rollouts
from dsjax.policies.rollouts import rounded
from dsjax.scheduling.pace import Paced
from dsjax.scheduling.policy import DISTSERVE, Load
from dsjax.simulation import simulator
from tests.common.policy_runs import INSTANCE, LINK, SLO, STEP


def choice(monkeypatch, known):
  """What two that mix become where rollouts tell {roles: (share, scale)}, and
  what was played."""
  played = []
  monkeypatch.setattr(rollouts, 'played', lambda *args: (
      played.append(args[-2]), rollouts.Played(*known[args[-2]]))[1])
  instances = [types.SimpleNamespace(
      index=index, role='chunked', config=INSTANCE, latency=Paced(STEP))
      for index in (0, 1)]
  view = types.SimpleNamespace(load=Load(9.0, 100.0, 300.0, 50.0), link=LINK)
  return rollouts.better(DISTSERVE, SLO, view, instances, list(known)), played


@pytest.mark.parametrize('now, other, flips', [
    (.8, .75, False), (.8, .84, False), (.8, .86, True), (.94, .98, False),
    (.96, 1.0, False), (0.0, .1, True)])
def test_roles_change_for_what_attains_clearly_more(now, other, flips,
                                                    monkeypatch):
  """By more than the noise of a rollout; and none is played in vain."""
  answer, played = choice(monkeypatch, {
      ('chunked',) * 2: (now, .9), ('prefill', 'decode'): (other, .9)})
  assert answer == ({0: 'prefill', 1: 'decode'} if flips else {})
  assert (len(played) == 1) == (now > 1 - rollouts.NOISE)


@pytest.mark.parametrize('reverse', [False, True])
@pytest.mark.parametrize('split, mixing, chosen', [
    ((.9, .8), (.9, .9), 'decode'), ((.9, .9), (.9, .8), 'chunked'),
    ((.895, .8), (.9, .9), 'decode'), ((.88, .8), (.9, .9), 'chunked'),
    ((.9, .8), (.905, .9), 'decode')])
def test_of_equal_choices_the_one_furthest_from_missing_is_taken(
    split, mixing, chosen, reverse, monkeypatch):
  """Wherever it is in the list."""
  known = [(('prefill', 'decode'), split), (('prefill', 'chunked'), mixing)]
  answer, _ = choice(monkeypatch, {
      ('chunked',) * 2: (.5, 2.0),
      **dict(known[::-1] if reverse else known)})
  assert answer == {0: 'prefill'} | (
      {1: 'decode'} if chosen == 'decode' else {})


LENGTHS = Load(8.0, 300.0, 900.0, 100.0)


def played(roles, least, load=LENGTHS):
  """A rollout of the static split on two instances."""
  config = dataclasses.replace(INSTANCE, role='flexible', num_pages=4000,
                               max_seqs=64)
  return rollouts.played(DISTSERVE, SLO, (config,) * 2, (STEP,) * 2, LINK,
                         load, roles, least)


def test_a_rollout_ends_once_it_cannot_win(monkeypatch):
  """And tells the same as one that is played to its end, where it can."""
  seen = []

  def stream(*args):
    for record in simulator.stream(*args):
      seen.append(record)
      yield record

  monkeypatch.setattr(rollouts, 'simulator', types.SimpleNamespace(
      stream=stream))
  roles = ('prefill', 'decode')
  rollouts.played.cache_clear()
  whole, count = played(roles, 0.0), len(seen)
  assert 0.1 < whole.share < 0.9
  assert played(roles, whole.share - 0.01) == whole and len(seen) == 2 * count
  assert played(roles, whole.share + 0.05).share < whole.share + 0.05
  assert len(seen) < 3 * count - 10


def test_a_rollout_tells_how_near_its_requests_came():
  """At twice the load the same roles come nearer to missing."""
  light, heavy = (played(('prefill', 'decode'), 0.0, LENGTHS._replace(
      rate_per_s=rate)) for rate in (1.0, 4.0))
  assert light.share == 1 and light.scale < min(1.0, heavy.scale)


def test_a_rollout_begins_with_the_rows_of_a_full_system(monkeypatch):
  """So it tells what comes of a load in the long run, not of its start."""
  load = Load(7.0, 300.0, 900.0, 300.0)
  sent, rows = rollouts.requests_like(load, SLO, SLO.tpot_s)
  assert rows == int(7.0 * 300 * SLO.tpot_s) == 46
  assert {(r.arrival_s, len(r.prompt)) for r in sent[:rows]} == {(0.0, 1)}
  left, whole = (sum(r.sampling.max_tokens for r in part) / len(part)
                 for part in (sent[:rows], sent[rows:]))
  assert 0.6 * whole < left < 1.3 * whole
  full = played(('chunked',) * 2, 0.0, load)
  rollouts.played.cache_clear()
  monkeypatch.setattr(rollouts, 'requests_like',
                      lambda *args: (sent[rows:], 0))
  assert played(('chunked',) * 2, 0.0, load).share > full.share + 0.03


def test_requests_that_run_for_too_long_have_missed_in_a_rollout(monkeypatch):
  """So one of slow rows ends before they do."""
  seen = []

  def stream(*args):
    for record in simulator.stream(*args):
      seen.append(record.id)
      yield record

  monkeypatch.setattr(rollouts, 'simulator', types.SimpleNamespace(
      stream=stream))
  load = Load(20.0, 300.0, 900.0, 300.0)
  sent, rows = rollouts.requests_like(load, SLO, SLO.tpot_s)
  counted = (len(sent) - rows) * 4 // 5
  first = len(sent) - counted
  assert played(('prefill', 'decode'), 0.5, load).share < 0.5
  assert sum(id >= first for id in seen) < 0.5 * counted


def test_a_change_is_played_with_the_load_as_it_is(monkeypatch):
  """What is better under the rounded load only is not taken."""
  now, other = ('chunked',) * 2, ('prefill', 'decode')
  shares = {(True, now): .8, (True, other): .9, (False, now): .85}
  for exact, flips in ((.89, False), (.91, True)):
    known = {**shares, (False, other): exact}
    monkeypatch.setattr(rollouts, 'played', lambda *args, known=known: (
        rollouts.Played(known[args[-3] == rounded(args[-3]), args[-2]], .9)))
    instances = [types.SimpleNamespace(
        index=index, role='chunked', config=INSTANCE, latency=Paced(STEP))
        for index in (0, 1)]
    view = types.SimpleNamespace(load=Load(9.0, 100.0, 300.0, 50.0), link=LINK)
    answer = rollouts.better(DISTSERVE, SLO, view, instances, [now, other])
    assert answer == ({0: 'prefill', 1: 'decode'} if flips else {})


def test_a_load_is_rounded_so_that_little_changes_ask_nothing_new():
  load = Load(100.0, 300.0, 900.0, 200.0)
  near = Load(101.0, 305.0, 890.0, 199.0)
  assert rounded(load) == rounded(near)
  assert rounded(load) != rounded(load._replace(rate_per_s=150.0))

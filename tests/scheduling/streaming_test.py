"""Streamed KV: which commands, where nothing of it is to be seen."""

import dataclasses
import random

import pytest

from dsjax.config.engine import InstanceConfig
from dsjax.config.request import Request, Sampling
from dsjax.scheduling import event_log, scheduler
from dsjax.scheduling.events import (
  Abort,
  Arrived,
  Cancelled,
  Migrate,
  Migrated,
  MigrateFailed,
  PrefillDone,
  RunPrefill,
  Timer,
)
from dsjax.simulation import contention, latency, simulator

STEP = latency.Affine((0.01, 1e-4, 0.0), (0.01, 1e-6, 1e-4), host_s=0.001)
LINK = latency.Link(1e-3, 1e6, 1000)


def config_of(num_pages=48, sizes=(4, 4), chunk=8, roles=('prefill', 'decode'),
              **changes):
  instances = [InstanceConfig(role, num_pages, sizes[role == 'decode'], 8,
                              chunk, 4) for role in roles]
  return scheduler.Config(tuple(instances), 160, stream_kv=True, **changes)


def play(config, *events):
  """The commands that answer each of these events."""
  state, answers = scheduler.init(config), []
  for event in events:
    state, commands = scheduler.step(config, state, event)
    scheduler.check(state)
    answers.append(commands)
  return state, answers


def done(number):
  return PrefillDone(0.0, 0, number)


def test_each_chunk_is_followed_by_its_pages():
  _, answers = play(config_of(), Arrived(0, 0, 20, 4), done(0), done(1),
                    done(2), Migrated(0, 0, 1))
  chunks = [c for commands in answers for c in commands
            if isinstance(c, RunPrefill)]
  assert [(c.chunks[0].start, c.chunks[0].stop) for c in chunks] == [
      (0, 8), (8, 16), (16, 20)]
  assert answers[0][1:] == (
      Migrate(0, 1, 0, (0, 1), 1, (0, 1), 8, 0, 0, True),)
  assert answers[1][1:] == (
      Migrate(0, 1, 0, (2, 3), 1, (2, 3), 8, 8, 8, True),)
  assert answers[2] == (chunks[2],)
  assert answers[3] == (Migrate(0, 1, 0, (4,), 1, (4,), 4, 16, 16),)
  assert answers[4][0].rows[0].id == 0


@pytest.mark.parametrize('sizes, want', [
    ((2, 8), [(0, 8, (0, 1, 2, 3), (0,)), (8, 8, (4, 5, 6, 7), (1,)),
              (16, 4, (8, 9), (2,))]),
    ((4, 6), [(0, 12, (0, 1, 2), (0, 1)), (12, 8, (3, 4), (2, 3))]),
    ((16, 4), [(0, 16, (0,), (0, 1, 2, 3)), (16, 4, (1,), (4,))])])
def test_a_part_is_of_whole_pages_of_both_sides(sizes, want):
  _, answers = play(config_of(sizes=sizes), Arrived(0, 0, 20, 4), done(0),
                    done(1), done(2))
  assert [(c.hit, c.num_tokens, c.source_pages, c.target_pages)
          for commands in answers for c in commands
          if isinstance(c, Migrate)] == want


@pytest.mark.parametrize('event, told', [
    (Cancelled(0, 0), True), (Timer(0, 0, 1), True),
    (MigrateFailed(0, 0, 1), False)])
def test_a_stream_that_ends_early_gives_its_pages_back_once(event, told):
  config = config_of()
  state, (*_, commands) = play(config, Arrived(0, 0, 20, 4), event)
  target = state.instances[1]
  assert not (target.streams or target.residents)
  assert target.pool == scheduler.init(config).instances[1].pool
  assert (Abort(0, 1, 1) in commands) == told
  again, inert = scheduler.step(config, state, MigrateFailed(0, 0, 1))
  assert (again, inert) == (state, ())
  if not isinstance(event, Cancelled):
    _, answers = play(config, Arrived(0, 0, 20, 4), event, done(0), done(1),
                      done(2))
    moves = [c for commands in answers[2:] for c in commands
             if isinstance(c, Migrate)]
    assert moves == [Migrate(0, 2, 0, (0, 1, 2, 3, 4), 1, (0, 1, 2, 3, 4), 20)]


def test_a_stream_to_a_target_with_work_that_waits_does_not_begin():
  # 24 tokens and one to come take 7 of 12 pages; 30 wait for theirs.
  config = config_of(num_pages=12, roles=('prefill',) * 3 + ('decode',),
                     chunk=32)
  arrivals = [Arrived(0, id, n, 9) for id, n in enumerate((24, 30))]
  config = dataclasses.replace(config, instances=(
      *config.instances[:2], dataclasses.replace(
          config.instances[2], prefill_tokens=8), config.instances[3]))
  state, answers = play(config, *arrivals, PrefillDone(0, 0, 0),
                        PrefillDone(0, 1, 0), Arrived(0, 2, 9, 2))
  assert state.instances[3].pulls == (1,)
  assert state.seqs[2].instance == 2
  assert not any(isinstance(c, Migrate) for c in answers[-1])


def workload(least, most, count=150):
  draw = random.Random(1)
  return [Request(id, 0.02 * id, range(draw.randint(least, most)), Sampling(
      max_tokens=draw.randint(1, 40))) for id in range(count)]


def logs(config, requests, **options):
  """The logs with streams and without."""
  return [simulator.simulate(dataclasses.replace(config, stream_kv=stream),
                             requests, STEP, LINK, log=True, **options).log
          for stream in (True, False)]


def test_prompts_of_one_chunk_are_served_as_without():
  streamed, whole = logs(config_of(chunk=64), workload(1, 64))
  assert streamed == whole


@pytest.mark.parametrize('share', ('pair', 'nic'))
@pytest.mark.parametrize('roles, num_pages', [
    (('prefill', 'decode'), 48), (('prefill', 'prefill', 'decode'), 60),
    (('prefill', 'decode', 'decode'), 200)])
def test_a_simulation_is_the_same_with_and_without_a_log(
    roles, num_pages, share):
  config, work = config_of(num_pages, chunk=16, roles=roles), workload(1, 90)
  logged, leapt = (simulator.simulate(config, work, STEP, LINK, log=log,
                                      share=share) for log in (True, False))
  assert leapt.leapt > 0
  assert logged.records == leapt.records
  moves = [c for _, commands in logged.log for c in commands
           if isinstance(c, Migrate)]
  assert sum(c.more for c in moves) > 5
  for record in logged.records:
    assert record.status == 'length'
  assert event_log.replay(config, logged.log) is None


@pytest.mark.parametrize('contended', (False, True))
def test_a_part_takes_the_link_when_its_chunk_is_done(contended):
  """One prompt of three chunks; their copies take longer than the chunks."""
  link = latency.Link(1e-3, 1e6, 2000, beside=True)
  request = Request(0, 0.0, range(20), Sampling(max_tokens=3))
  options = ({'contention': contention.Contention({})} if contended else {})
  streamed, whole = (simulator.simulate(
      dataclasses.replace(config_of(), stream_kv=stream), [request], STEP,
      link, **options) for stream in (True, False))
  chunk_s = 0.001 + 0.01 + 8e-4
  first_s = 2 * chunk_s + chunk_s - 4e-4
  part_s, rest_s = link.migrate_s(8), link.migrate_s(4)
  ends_s = (chunk_s + 2 * part_s + rest_s,  # one after another from then on
            first_s + 0.001 + link.migrate_s(20))
  for result, end_s in zip((streamed, whole), ends_s, strict=True):
    record, = result.records
    assert record.token_s[0] == pytest.approx(first_s)
    assert record.stage_s['migrate'] == pytest.approx(end_s - first_s)
    assert record.migrated_tokens == 20
  assert streamed.link_s == pytest.approx(2 * part_s + rest_s)

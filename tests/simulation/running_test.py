"""Rows that run already where a simulation begins."""

import dataclasses

import pytest

from dsjax.config.checks import InputError
from dsjax.scheduling import scheduler
from dsjax.scheduling.policy import DISTSERVE
from dsjax.simulation import simulator
from dsjax.simulation.running import Running, begin
from tests.common.simulated import PD, Affine, Link, plan, requests

ROW = Running(100, 1, prompt_len=10, so_far=3, more=2, first_s=-1.0)


def test_rows_that_run_already_by_hand():
  # 12 tokens are in its KV: its steps take 1.63 s and 1.64 s, and both are in
  # flight when A, prefilled in [0, 1], is there at 1.5.
  row, a = simulator.stream(
      plan(PD, run_ahead=1), requests((0, 10, 3)), Affine(), Link(),
      rows=[ROW])
  assert row.id == 100 and row.status == 'length'
  assert row.token_s == pytest.approx([1.63, 3.27])
  assert a.token_s == pytest.approx([1, 3.27 + 1.61, 4.88 + 1.62])


def test_what_runs_already_is_sound_and_leaves_nothing():
  config = plan(('flexible',) * 2, num_pages=40)
  run = scheduler.Run(config, scheduler.init(config))
  told = begin(run, [ROW._replace(id=n, instance=n % 2, more=40)
                     for n in range(6)])
  scheduler.check(run.freeze())
  assert {e.id for e, _ in told} == set(range(6)) and run.commands
  assert [i.residents for i in run.instances] == [3, 3]
  assert {(seq.stage, seq.first_s, seq.input_len, seq.prompt_len,
           len(seq.pages)) for seq in run.seqs.values()
          } == {('decoding', -1.0, 10, 12, 4)}


def test_what_runs_already_may_be_leapt_over():
  """Not so where there are ticks."""
  rows = [ROW._replace(id=100 + n, more=9 * n + 2) for n in range(5)]
  both = [list(simulator.stream(
      plan(PD, policy=policy), requests((3, 10, 20)), Affine(), Link(),
      rows=rows)) for policy in (
          DISTSERVE, dataclasses.replace(DISTSERVE, tick_s=1000.0))]
  assert len(both[0]) == 6
  for leapt, told in zip(*both, strict=True):
    assert leapt.id == told.id
    assert leapt.token_s == pytest.approx(told.token_s)


@pytest.mark.parametrize('changes', [{'num_pages': 16}, {'max_seqs': 3}])
def test_rows_for_which_there_is_no_room_are_left_out(changes):
  """Each of four pages has one more to grow into."""
  rows = [ROW._replace(id=100 + n) for n in range(6)]
  ended = list(simulator.stream(plan(PD, **changes), requests((0, 10, 3)),
                                Affine(), Link(), rows=rows))
  assert sorted(r.id for r in ended) == [0, 100, 101, 102]


@pytest.mark.parametrize('changes, named', [
    ({'instance': 0}, 'Running.instance'), ({'instance': 2}, 'Running.inst'),
    ({'first_s': 0.5}, r'first_s=0\.5: must be'),
    ({'first_s': float('nan')}, 'first_s=nan: must'),
    ({'more': 2.5}, r'more=2\.5'), ({'so_far': 0}, 'so_far=0'),
    ({'more': 0}, 'more=0'), ({'more': 88}, '100 at most')])
def test_rows_that_cannot_be_are_refused(changes, named):
  with pytest.raises(InputError, match=named):
    list(simulator.stream(plan(PD), requests((0, 10, 3)), Affine(), Link(),
                          rows=[ROW._replace(**changes)]))
  with pytest.raises(InputError, match=r'Running\.id'):
    list(simulator.stream(plan(PD), requests((0, 10, 3)), Affine(), Link(),
                          rows=[ROW, ROW]))


def test_no_request_has_the_id_of_a_row():
  with pytest.raises(InputError, match=r'Request\.id=0: must be of no row'):
    list(simulator.stream(plan(PD), requests((9, 10, 3)), Affine(), Link(),
                          rows=[ROW._replace(id=0)]))


def test_no_row_begins_where_an_instance_is_away():
  config = plan(('prefill', 'decode', 'decode'), away=(1,))
  with pytest.raises(InputError, match=r'Running\.instance=1: .* \[2\]'):
    list(simulator.stream(config, requests((0, 10, 3)), Affine(), Link(),
                          rows=[ROW]))


@pytest.mark.parametrize('roles', [PD, ('flexible',) * 2])
def test_a_row_that_would_outgrow_its_instance_is_left_out(roles):
  """16 pages of 4 tokens; its last token needs no place. Once preempted it
  would have to wait for ever, and those behind it too."""
  for more, ids in ((52, [0, 1, 100]), (53, [0, 1])):
    ended = list(simulator.stream(
        plan(roles, num_pages=16), requests((0, 10, 3), (1000, 10, 3)),
        Affine(), Link(), rows=[ROW._replace(more=more)]))
    assert sorted(r.id for r in ended) == ids

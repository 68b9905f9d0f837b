"""Rows that run already where a simulation begins."""

import pytest

from dsjax.config.checks import InputError
from dsjax.scheduling import scheduler
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
  assert {(seq.stage, seq.first_s, seq.prompt_len, len(seq.pages))
          for seq in run.seqs.values()} == {('decoding', -1.0, 12, 4)}


@pytest.mark.parametrize('changes', [{'num_pages': 16}, {'max_seqs': 3}])
def test_rows_for_which_there_is_no_room_are_left_out(changes):
  """Each of four pages has one more to grow into."""
  rows = [ROW._replace(id=100 + n) for n in range(6)]
  ended = list(simulator.stream(plan(PD, **changes), requests((0, 10, 3)),
                                Affine(), Link(), rows=rows))
  assert sorted(r.id for r in ended) == [0, 100, 101, 102]


@pytest.mark.parametrize('changes, named', [
    ({'instance': 0}, 'Running.instance'), ({'instance': 2}, 'Running.inst'),
    ({'so_far': 0}, 'so_far=0'), ({'more': 0}, 'more=0'),
    ({'more': 88}, '100 at most')])
def test_rows_that_cannot_be_are_refused(changes, named):
  with pytest.raises(InputError, match=named):
    list(simulator.stream(plan(PD), requests((0, 10, 3)), Affine(), Link(),
                          rows=[ROW._replace(**changes)]))
  with pytest.raises(InputError, match=r'Running\.id'):
    list(simulator.stream(plan(PD), requests((0, 10, 3)), Affine(), Link(),
                          rows=[ROW, ROW]))

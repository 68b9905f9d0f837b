"""Every interleaving of small worlds; mutations of the scheduler are seen."""

import inspect
import textwrap

import pytest

from dsjax import recovery, scheduler
from experiments import explore

WORLDS = explore.worlds()
RUN = scheduler.Run
MUTATIONS = {
    'no epoch check': (RUN, 'handed', 'seq.epoch > e.epoch or ', ''),
    'a cancel frees what is copied': (
        RUN, 'leave', 'return  # both', 'return self.drop(seq)  # both'),
    'a cancel keeps the pages': (
        RUN, 'leave', 'self.unpull(seq)\n    self.drop(seq)',
        'self.unpull(seq)\n    self.forget(seq.id)'),
    'a lease without Abort': (
        recovery, 'timer', 'run.commands.append', 'str'),
    'a lost source without Abort': (
        recovery, '_source_lost', 'run.commands.append(base.Abort',
        'str(base.Abort'),
    'tries without bound': (
        recovery, '_spared', 'seq.tries <= run.config.tries', 'True'),
    'tokens in flight count as out': (
        recovery, '_known', ' - lost[id]', ''),
    'tokens that are out are forgotten': (
        recovery, '_known', '(0 if n else told)', '0'),
    'a late completion is taken for the next': (
        RUN, 'complete', '0 <= e.number <', 'e.number != e.number <'),
    'a lost target loses the request': (
        recovery, '_target_lost', '_retry(run, seq, reason)',
        'run.forget(seq.id)'),
    'who waits is not placed': (
        recovery, 'instance_up', 'place(run)', 'pass'),
    'a failure keeps the pages': (
        recovery, 'fail', 'run.drop(seq)', 'run.forget(seq.id)'),
}


@pytest.mark.parametrize('name', WORLDS)
def test_small_worlds(name):
  one = explore.Explorer(*WORLDS[name])
  assert one.run() and one.transitions > 10_000


@pytest.mark.parametrize('name', MUTATIONS)
def test_a_mutation_is_caught(name, monkeypatch):
  owner, function, old, new = MUTATIONS[name]
  before = getattr(owner, function)
  source = textwrap.dedent(inspect.getsource(before))
  assert source.count(old) == 1, source
  module = recovery if owner is recovery else scheduler
  made = {}
  exec(source.replace(old, new), module.__dict__, made)
  monkeypatch.setattr(owner, function, made[function])
  for kind, apply in scheduler._APPLY.items():
    if apply is before:
      monkeypatch.setitem(scheduler._APPLY, kind, made[function])
  with pytest.raises(explore.Violation):
    for world in WORLDS.values():
      explore.Explorer(*world).run()

"""Messages between a server and its instances: what the explorer can see."""

import pytest

from dsjax.runtime.cluster import channel
from experiments import explore
from experiments.verify import links, schedules, world
from experiments.verify.links import Link, LinkedMoving

SEND, CRASH = LinkedMoving.send, LinkedMoving.crash


def any_number(count, data):
  """A channel that does not look at numbers."""
  del count
  return data[4:]


def unsent(which):
  """A server that does not send messages of a kind."""
  def send(self, i, kind, c):
    if kind != which:
      SEND(self, i, kind, c)
  return send


def crash(self, i, steps=0, back=True):
  """What an instance that is lost has said still comes in."""
  before = self.links[i]
  CRASH(self, i, steps, back)
  self.links[i] = links.DEAD._replace(up=before.up, said=before.said,
                                      told=before.told)


def up(self, i):
  """And mixes with what the next process says."""
  super(LinkedMoving, self).up(i)
  if self.w.state.instances[i].status in ('down', 'gone'):
    before = self.links[i]
    self.links[i] = Link(up=before.up, said=before.said, told=before.told)


def moved(self, half, which):
  """A hand-off ends when its source has offered it."""
  for p in [p for p in self.copies if links.hand_off(p[0]) == which]:
    self.send(p[0].source, 'withdraw', p[0])
    self.copies.remove(p)
    self.events.append(links.Migrated(self.time_s, *which))



MUTATIONS = {
    'numbers are not looked at': ((channel, 'unnumbered', any_number),),
    'a target is not told to stop': (
        (LinkedMoving, 'send', unsent('drop')),),
    'an offer is not taken back': (
        (LinkedMoving, 'send', unsent('withdraw')),),
    'a hand-off ends with its offer': ((LinkedMoving, 'moved', moved),),
    'what a lost process said comes in': (
        (LinkedMoving, 'crash', crash), (LinkedMoving, 'up', up)),
}


def search():
  """Every world of messages, to its end."""
  for name, (rules, faults) in explore.small_worlds().items():
    if 'messages' in name:
      assert schedules.search(rules, faults)[2], name


@pytest.mark.parametrize('name', MUTATIONS)
def test_a_mutation_of_messages_is_caught(name, monkeypatch):
  for owner, function, wrong in MUTATIONS[name]:
    monkeypatch.setattr(owner, function, wrong)
  with pytest.raises(world.Violation) as caught:
    search()
  assert 'Error' not in str(caught.value)  # of the mutation itself


def test_a_schedule_of_messages_is_kept_and_replays(monkeypatch, tmp_path):
  rules, _ = explore.small_worlds()['1P1D, messages']
  with monkeypatch.context() as patched:
    patched.setattr(LinkedMoving, 'send', unsent('withdraw'))
    with pytest.raises(world.Violation) as caught:
      schedules.search(rules, 0)
    schedules.write_log(tmp_path / 'log', rules, caught.value.moves)
    again, moves = schedules.read_log(tmp_path / 'log')
    assert 'holds' in schedules.replay(again, moves)[1]
  assert schedules.story(again, moves)[-1] == schedules.NOTHING

"""Hand-offs as their server sees them, in every order in which messages come.

The server's side is the real one. Its two instances are models: what they are
told, and what they say, waits in queues, each of which keeps its order as a
socket does, while what waits in different ones may come in any. Meanwhile the
server may give up any hand-off, as at the end of its lease.
"""

import collections
import dataclasses
import functools
import random
import threading
import types

import pytest

from dsjax.config.checks import InputError
from dsjax.config.engine import EngineConfig
from dsjax.runtime.cluster import messages, watch
from dsjax.runtime.cluster.remote import RemoteEngine
from dsjax.scheduling.events import Migrate

CONFIG = EngineConfig(max_len=64, page_size=4, num_pages=20)
MOVE = Migrate(3, 1, 0, (1,), 1, (2,), 4)


class Queues:
  """Both directions of a socket: a Channel, and its Process."""

  def __init__(self):
    self.down, self.up, self.said = (collections.deque() for _ in range(3))
    self.ended, self.heard_s, self.failed, self.pid = '', 0.0, '', 1
    self.missing = ''
    self.channel = self

  def send(self, message):
    self.down.append(message)

  def take(self):
    taken = list(self.said)
    self.said.clear()
    return taken

  def exit_code(self):
    return None

  def kill(self, wait_s=0.0):
    self.ended = 'killed'

  def close(self):
    self.ended = 'closed'


class Launcher:
  """Starts a model of an instance."""

  def __init__(self):
    self.queues = Queues()

  def start(self, index, incarnation):
    return self.queues

  def close(self):
    pass


class Models:
  """A server's two engines, and the instances that they stand for.

  maps: both have the same memory. offers: {uuid: the address it is at}. pulls:
  {uuid: the address it is pulled from}, until it has come or is dropped.
  """

  def __init__(self, maps=False):
    self.maps = maps
    self.launchers = [Launcher(), Launcher()]
    self.engines, self.servers = [], 0
    self.offers, self.pulls, self.pulled, self.dropped = {}, {}, set(), set()
    for index, role in enumerate(('prefill', 'decode')):
      self.engines.append(RemoteEngine(index, CONFIG, {'role': role},
                                       self.launchers[index], [],
                                       threading.Event()))
      self.engines[index]._begin()
      self.come(index)

  def come(self, index):
    """A process is there, and built."""
    engine, queues = self.engines[index], self.queues(index)
    engine.hear()
    queues.said.append(messages.Built(dataclasses.asdict(
        CONFIG.instance(engine.role)), 1, f'at {self.servers}', {},
        by_kernel=self.maps, memory='of both' * self.maps))
    engine.hear()
    queues.down.clear()

  def lose_source(self):
    """Its process ends, and another begins, which has no offers; gives what
    is to be called when that one is there."""
    self.engines[0].stop()
    self.launchers[0].queues = Queues()
    self.offers.clear()
    self.servers += 1
    self.engines[0].start()
    return functools.partial(self.come, 0)

  def queues(self, index):
    return self.launchers[index].queues

  def steps(self):
    """What may happen next, by itself."""
    steps = [(self._told, index) for index in (0, 1) if self.queues(index).down]
    steps += [(self._said, index) for index in (0, 1) if self.queues(index).up]
    return steps + [(self._come, uuid) for uuid in self.pulls
                    if uuid in self.offers and uuid not in self.pulled]

  def _told(self, index):
    """An instance does the oldest of what it was told."""
    message = self.queues(index).down.popleft()
    up = self.queues(index).up
    if isinstance(message, messages.Offer):
      self.offers[message.uuid] = f'at {self.servers}'
      up.append(messages.Offered(message.uuid, 8, 1, 0,
                                 where=(1, message.uuid) * self.maps))
    elif isinstance(message, messages.Withdraw):
      self.offers.pop(message.uuid, None)
      if not message.pulled:
        self.servers += 1
        up.append(messages.Moved(f'at {self.servers}'))
    elif isinstance(message, messages.Pull):
      assert message.uuid not in self.dropped, 'pulled after it was given up'
      assert message.where == (1, message.uuid) * self.maps
      self.pulls[message.uuid] = self.offers.get(
          message.uuid) if self.maps else message.address
    else:
      self.dropped.add(message.uuid)
      self.pulls.pop(message.uuid, None)

  def _said(self, index):
    """The server hears the oldest of what an instance said."""
    queues = self.queues(index)
    queues.said.append(queues.up.popleft())
    self.engines[index].hear()

  def _come(self, uuid):
    """What was pulled has come."""
    assert self.pulls[uuid] == self.offers[uuid], 'pulled where it is not'
    self.pulled.add(uuid)
    self.queues(1).up.append(messages.Landed(uuid, 1, 0))


def lose_source(rng, models, flying):
  """The server gives up what came from there: before the next process has
  begun to speak, or after it."""
  lost, come = list(flying), models.lose_source()
  flying.clear()
  rng.shuffle(lost)
  for transfer in lost[::2]:
    transfer.drop()
  come()
  for transfer in lost[1::2]:
    transfer.drop()


def play(rng, give_up, count=6):
  """Hand-offs, some of which are given up, until nothing is left to do."""
  models, flying, landed = Models(maps=rng.random() < 0.5), [], 0
  source, target = models.engines
  while True:
    for transfer in [t for t in flying if t.has_arrived()]:
      transfer.land()
      flying.remove(transfer)
      landed += 1
    steps = models.steps()
    if count and (not steps or rng.random() < 0.3):
      count -= 1
      flying.append(source.route_to(target).start(MOVE))
    elif rng.random() < give_up / 10:
      lose_source(rng, models, flying)
    elif flying and rng.random() < give_up:
      flying.pop(rng.randrange(len(flying))).drop()
    elif steps:
      step, which = rng.choice(steps)
      step(which)
    elif not count:
      break
  return models, flying, landed


@pytest.mark.parametrize('seed', range(300))
def test_no_order_of_messages_hangs_or_misleads_a_hand_off(seed):
  rng = random.Random(seed)
  give_up = rng.choice((0, 0.1, 0.3))
  models, flying, landed = play(rng, give_up)
  assert not flying, 'a hand-off waits for what never comes'
  assert not models.offers and not models.pulls.keys() - models.pulled
  assert landed == 6 or give_up
  assert not any(engine.transfers for engine in models.engines)
  assert models.engines[0].address == f'at {models.servers}'


def test_something_is_given_up_and_something_lands():
  played = [play(random.Random(seed), 0.1) for seed in range(20)]
  assert any(models.servers for models, *_ in played)
  assert 0 < sum(landed for *_, landed in played) < 6 * 20


# --- signs of life ------------------------------------------------------------


def test_time_in_which_nobody_looked_is_no_silence(monkeypatch):
  """A server that was stopped loses no instance when it goes on; one that is
  silent while it looks is lost."""
  now_s = [100.0]
  monkeypatch.setattr(watch, 'time', types.SimpleNamespace(
      monotonic=lambda: now_s[0], perf_counter=lambda: now_s[0]))
  engine = Models().engines[1]
  engine.check()  # asks
  for later_s in (0.5, 3600.0, *[1.0] * 28):
    now_s[0] += later_s
    engine.check()
  assert CONFIG.silent_s == 30
  now_s[0] += 1.0
  with pytest.raises(RuntimeError, match='silent for 30.5 s'):
    engine.check()


def test_an_answer_that_came_while_nobody_looked_is_one(monkeypatch):
  now_s = [100.0]
  monkeypatch.setattr(watch, 'time', types.SimpleNamespace(
      monotonic=lambda: now_s[0], perf_counter=lambda: now_s[0]))
  models = Models()
  engine, queues = models.engines[1], models.queues(1)
  engine.check()
  assert list(queues.down) == [messages.Ping()]
  queues.heard_s, now_s[0] = 103.0, 3700.0
  engine.check()
  assert list(queues.down) == [messages.Ping()] * 2  # asks again


def test_a_process_that_does_not_come_is_late_for_as_long_as_one_looked(
    monkeypatch):
  now_s = [100.0]
  monkeypatch.setattr(watch, 'time', types.SimpleNamespace(
      monotonic=lambda: now_s[0], perf_counter=lambda: now_s[0]))
  launcher = Launcher()
  launcher.queues.channel = launcher.queues.heard_s = None
  launcher.queues.missing = ': b is not there'
  engine = RemoteEngine(0, CONFIG, {'role': 'prefill'}, launcher, [],
                        threading.Event())
  engine._begin()
  for later_s in (3600.0, *[1.0] * int(watch.COMES_S - 1)):
    now_s[0] += later_s
    engine.check()
  now_s[0] += 1.0
  with pytest.raises(RuntimeError, match='not come in 300 s: b is not there'):
    engine.check()


def test_a_process_that_has_begun_and_says_nothing_is_silent(monkeypatch):
  """While it loads it says so; after `silent_s` without a word it is lost."""
  now_s = [100.0]
  monkeypatch.setattr(watch, 'time', types.SimpleNamespace(
      monotonic=lambda: now_s[0], perf_counter=lambda: now_s[0]))
  launcher = Launcher()
  launcher.queues.channel, launcher.queues.heard_s = None, 100.0
  engine = RemoteEngine(0, CONFIG, {'role': 'prefill'}, launcher, [],
                        threading.Event())
  engine._begin()
  for later_s in (3600.0, *[1.0] * 29):  # away, then looking
    now_s[0] += later_s
    engine.check()
  launcher.queues.heard_s = now_s[0]
  for _ in range(30):
    now_s[0] += 1.0
    engine.check()
  now_s[0] += 1.0
  with pytest.raises(RuntimeError, match='silent for 31.0 s'):
    engine.check()


def test_one_that_ends_while_it_compiles_is_named():
  models = Models()
  engine = models.engines[1]
  engine.peers = messages.Warm({}, {})
  warming = engine.warm()
  models.queues(1).said.append(messages.Warmed('decode 1'))
  assert next(warming) == 'decode 1'
  models.queues(1).ended = 'its process ended'
  with pytest.raises(RuntimeError, match=r'instance 1 \(decode\) did not start'
                     ': its process ended'):
    next(warming)


def test_instances_with_other_weights_are_refused():
  """Under one name there may be another model elsewhere, or later."""
  models = Models()
  first, second = models.engines
  second._siblings = [first]
  for engine in (first, second):
    engine._fields = engine._fields | {'capacity': None}
  built = messages.Built(dataclasses.asdict(CONFIG.instance('decode')), 1, '',
                         {}, weights=0)
  first._on_built(built)
  first.check()
  second._on_built(built._replace(weights=8))
  with pytest.raises(InputError, match='other weights'):
    second.check()
  first._on_built(built._replace(weights=8))  # another process of it
  with pytest.raises(InputError, match='other weights'):
    first.check()

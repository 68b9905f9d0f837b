"""The soak, for some hundred steps: what it checks, it sees."""

import functools
import io
import itertools
import json
import types

import pytest
from rich.console import Console

from dsjax.config.checks import InputError
from dsjax.config.engine import EngineConfig
from dsjax.runtime import loop
from dsjax.runtime.migration import Route
from dsjax.runtime.orchestrator import Orchestrator
from experiments import soak
from experiments.common import cli
from experiments.verify import flips, held, soak_report
from tests.common import serving
from tests.common.results import check_written, made_by

pytestmark = pytest.mark.usefixtures('no_hang')


def options(out, **changes):
  return cli.options(soak.FLAGS, **{
      'minutes': 0.05, 'quick': True, 'rate': 30.0, 'faults': 600.0,
      'placement': 'prefill=1x1,decode=1x1', 'cancel': 0.2, 'back_s': 0.1,
      'out': str(out), 'set': ['max_seqs=2', 'prefill_tokens=32',
                               'transfer_pages=4']} | changes)


@pytest.fixture
def _by_work(monkeypatch):
  """Time goes by with the steps that are done, on any machine alike."""
  looks = itertools.count()

  def now(self):
    steps = self.server.fleet.steps
    before = vars(self).setdefault('steps_before', steps)
    return 0.02 * (steps - before) + 1e-4 * next(looks)
  monkeypatch.setattr(soak.Soak, 'now', property(now))


@pytest.mark.usefixtures('_by_work')
def test_nothing_is_lost_in_three_seconds_of_faults(tmp_path):
  console = Console(record=True, width=120)
  assert soak.run(options(tmp_path), console) == 0
  shown = console.export_text()
  check_written(shown, tmp_path)
  assert 'Nothing was lost, repeated, leaked or wrong.' in shown
  result = json.loads((tmp_path / 'soak.json').read_text())
  assert made_by(tmp_path)['options']['faults'] == 600.0
  assert sum(result['faults'].values()) > 5 and result['retries'] > 0
  assert result['requests']['length'] > 5
  for name in ('soak.png', 'requests.jsonl', 'faults.jsonl',
               'events.jsonl.gz'):
    assert (tmp_path / name).stat().st_size > 0


@pytest.mark.slow
@pytest.mark.usefixtures('_by_work')
def test_nothing_is_lost_with_cache_streams_host_memory_and_fetches(tmp_path):
  console = Console(record=True, width=120)
  assert soak.run(options(
      tmp_path, all=True, minutes=0.15,  # or there may be no fetch
      placement='prefill=1x1,1x1,decode=1x1', set=[
          'max_seqs=4', 'num_pages=16', 'transfer_pages=4',
          'stall_s=6.0']), console) == 0
  result = json.loads((tmp_path / 'soak.json').read_text())
  assert result['retries'] > 0 and result['requests']['length'] > 5
  assert all(result['copies'].values()), result['copies']


@pytest.mark.slow
@pytest.mark.usefixtures('_by_work')
def test_nothing_is_lost_where_processes_die(tmp_path):
  console = Console(record=True, width=120)
  assert soak.run(options(tmp_path, cluster='local', faults=100.0, seed=1),
                  console) == 0
  result = json.loads((tmp_path / 'soak.json').read_text())
  assert sum(result['faults'].values()) > 1
  assert not {what for what in result['faults'] if ':' in what}


def test_one_that_does_not_start_is_tried_again(tmp_path, monkeypatch):
  """As where a fault hits it while it starts; the run goes on, and ends."""
  server, real, refused = serving.fake_server_of(), Orchestrator.restore, []

  def restore(self, instance):
    if len(refused) < 2:
      refused.append(instance)
      raise RuntimeError('it did not come')
    real(self, instance)
  monkeypatch.setattr(Orchestrator, 'restore', restore)
  with server:
    run = soak.Soak(server, [([5], {'max_tokens': 2})],
                    options(tmp_path, back_s=0.0), 1.0, io.StringIO())
    run.reference()
    run.origin, run.away = server.now, {1: 0.0}
    server.drain(1)
    run.turn()
    assert run.away and server.state.instances[1].status == 'draining'
    run.settle()
    assert [inst.status for inst in server.state.instances] == ['up', 'up']
  assert refused == [1, 0] and not run.away
  assert [fault['what'] for fault in run.faults] == [
      'not started: it did not come'] * 2


def test_processes_of_other_hosts_are_not_killed_here(tmp_path, monkeypatch):
  """By their numbers, which are those of others on this host."""
  monkeypatch.setattr(soak.cli, 'cluster_of', lambda options: options.cluster)
  with pytest.raises(InputError, match='--cluster=.*local'):
    soak.run(options(tmp_path, cluster='ray'), None)


@pytest.mark.usefixtures('_by_work')
def test_wrong_tokens_are_seen(tmp_path, monkeypatch):
  """A request that goes on elsewhere forgets what it had said."""
  def prefix_of(self, id, real=loop.Loop._prefix_of):
    prefix = real(self, id)
    return prefix and prefix._replace(
        tokens=prefix.tokens[:prefix.prompt_len])
  monkeypatch.setattr(loop.Loop, '_prefix_of', prefix_of)
  assert soak.run(options(tmp_path, cancel=0.0), Console(quiet=True)) == 1
  failed = json.loads((tmp_path / 'soak.json').read_text())['failed checks']
  assert 'tokens' in failed


def row(job, latency_s, retries=0, status='stop'):
  return {'id': 0, 'job': job, 'latency_s': latency_s, 'retries': retries,
          'status': status}


def test_added_latency_is_over_the_median_of_the_same_job():
  config = EngineConfig(lease_s=1.0, stall_s=2.0, restart_s=0.5)
  done = [row(0, 1.0), row(0, 3.0), row(0, 2.0), row(1, 9.0),
          row(0, 5.0, 1), row(1, 8.0, 2), row(2, 7.0, 1),
          row(0, 99.0, status='cancelled')]
  added, over = soak_report.added_latency(done, config, 1.0)
  assert added == [3.0, -1.0] and not over
  _, over = soak_report.added_latency([*done, row(0, 21.6, 1)], config, 1.0)
  assert len(over) == 1  # above 9 + 1 * (2 + 1 + 0.5 + 9)


def test_growth_is_that_of_the_later_part():
  memory = [(0.0, 0.0), (30.0, 100.0)] + [
      (60.0 + s, 200.0 + s / 6) for s in range(0, 240, 30)]
  assert soak_report.growth_mb_per_min(memory) == pytest.approx(10.0)


FEW = ['max_seqs=3', 'prefill_tokens=32', 'least_tokens=32',
       'transfer_pages=4']


def flip(out, **changes):
  return options(out, **{'flips': 60, 'requests': 300, 'placement': None,
                         'set': FEW} | changes)


@pytest.mark.deep
def test_tokens_are_equal_through_sixty_flips(tmp_path):
  console = Console(record=True, width=120)
  assert soak.run(flip(tmp_path), console) == 0
  shown = console.export_text()
  check_written(shown, tmp_path)
  assert 'Nothing was lost, leaked or wrong.' in shown
  live = json.loads((tmp_path / 'soak.json').read_text())['with flips']
  assert live['flips'] >= 60 and live['requests'] == 300
  assert live['hand_offs'] > 5 and live['longest_pause_s'] > 0


def test_roles_flip_as_often_as_asked_whatever_is_sent_at_once(tmp_path):
  """Here all places are taken, and left, within a few flips."""
  assert soak.run(flip(tmp_path, flips=60, requests=60),
                  Console(quiet=True)) == 0


@pytest.mark.slow
def test_roles_of_processes_flip_too(tmp_path, monkeypatch):
  """And what they hold, or compile, counts: here it is as if they did."""
  def more(server, real=flips.counted):
    assert all(engine.pid for engine in server.engines)
    first, *others = real(server)
    return [first._replace(requests=first.requests + 1,
                           compiled=first.compiled + 1), *others]

  monkeypatch.setattr(flips, 'counted', more)
  assert soak.run(flip(tmp_path, flips=4, requests=60, cluster='local'),
                  Console(quiet=True)) == 1
  result = json.loads((tmp_path / 'soak.json').read_text())
  live = result['with flips']
  assert result['failed checks'] == ['leaked', 'compiled']
  assert live['flips'] >= 4 and live['leaked'] == live['compiled'] == 1


@pytest.mark.slow
def test_wrong_tokens_under_flips_are_seen(tmp_path, monkeypatch):
  """What is handed off are other pages than the row's."""
  def start(self, command, checksum=False, real=Route.start):
    most = self.source.capacity.num_pages
    return real(self, command._replace(source_pages=tuple(
        (page + 1) % most for page in command.source_pages)), checksum)
  monkeypatch.setattr(Route, 'start', start)
  changes = {'flips': 4, 'requests': 60, 'set': [*FEW, 'checksum=false']}
  assert soak.run(flip(tmp_path, **changes), Console(quiet=True)) == 1
  result = json.loads((tmp_path / 'soak.json').read_text())
  assert result['failed checks'] == ['wrong']


@pytest.mark.parametrize('changes, message', (
    ({'out': ''}, '--out'), ({'flips': 1, 'placement': 'colocated=1x1,1x1'},
                             'two flexible'),
    ({'flips': 1, 'placement': 'flexible=1x1'}, 'two flexible'),
    ({'flips': 101, 'requests': 100, 'placement': None}, 'flips=101'),
    ({'set': ['lease=3']}, 'lease_s'),
    ({'rate': -1.0}, '--rate'), ({'placement': 'x'}, 'placement')))
def test_bad_input_is_refused(tmp_path, changes, message):
  with pytest.raises(InputError, match=message):
    soak.run(options(**{'out': tmp_path} | changes), Console(quiet=True))


def test_what_processes_hold_is_asked_once_all_are_there():
  """The end of one may be seen late, also between question and answer."""
  fleet = types.SimpleNamespace(down={1: 0.0})
  events = iter([lambda: None, fleet.down.clear,  # it comes, and is lost again
                 lambda: fleet.down.update({0: 0.0}), fleet.down.clear])
  asked = []

  def count():
    assert not fleet.down
    asked.append(len(asked))
    if len(asked) == 2:
      raise RuntimeError('it is not there')  # nobody knows yet
    return {1: lambda: None}.get(len(asked), lambda: (1, 2))

  server = types.SimpleNamespace(
      fleet=fleet, poll=lambda: next(events, lambda: None)(),
      engines=[types.SimpleNamespace(count=count)])
  run = types.SimpleNamespace(server=server, held=0)
  soak.Soak.ask(run)
  assert run.held == 3 and len(asked) == 3


def test_what_is_lost_for_good_is_not_waited_for():
  """Before it is asked, and between question and answer."""
  fleet, asked = types.SimpleNamespace(down={0: None}), []
  polls = iter(range(5))

  def poll():
    if next(polls) == 2:
      fleet.down[1] = None

  def count(index, answer):
    asked.append(index)
    return lambda: answer

  server = types.SimpleNamespace(fleet=fleet, poll=poll, engines=[
      types.SimpleNamespace(count=functools.partial(count, *told))
      for told in enumerate([None, None, (1, 2)])])
  assert held.counted(server) == [(1, 2)]
  assert set(asked) == {1, 2}

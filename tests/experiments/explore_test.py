"""Every interleaving of small worlds, random large ones; what they can see."""

import pathlib
import types

import pytest
from rich.console import Console

from dsjax.scheduling import lifecycle, scheduler
from dsjax.scheduling.events import Arrived
from experiments import explore
from experiments.common import cli
from experiments.verify import schedules, world
from tests.common.mutations import (
  FETCHED,
  HOST,
  KEPT,
  MUTATIONS,
  STREAMED,
  SWAPPED,
  UNNOTICED,
  mutate,
)
from tests.common.results import check_written, made_by

# Thousands of transitions of each small world; fewer would be another world.
LEAST = {
    '1P1D': 45, '1P1D, 3 requests': 150, '1P1D, pieces': 22,
    '1P1D, preemption': 49, '1P1D, preemption, depth 1': 43,
    '1P1D, preemption of rows ahead': 104, '1P1D, pp = 2': 32, '1P2D': 124,
    '2P1D': 142, '2P2D': 75, '1 colocated, preemption, depth 3': 11,
    '2 colocated': 244, '1 chunked, preemption': 13,
    '1 chunked, preemption of pieces': 42, '2 chunked': 38,
    '2 chunked, pp = 2': 37, '2 flexible': 300,
    '2 flexible, preemption': 380, '1P, 2 flexible': 34,
    '1P2D, one joins': 28, '2P1D, two join': 34, '1P1C, splits': 27,
    '2 flexible, splits': 220, '2 flexible, splits, preemption': 27,
    '1P, 2 flexible, splits': 126,
    '1P1D, prefixes': 25, '1P1D, prefixes, smaller pages': 26,
    '1P2D, prefixes': 23, '1 colocated, prefixes, preemption': 6,
    '1 chunked, prefixes': 2, '2 flexible, prefixes': 25,
    '2 flexible, splits, prefixes': 41,
    '1P1D, host': 9, '1 colocated, host, preemption': 8,
    '1P1D, host, streams': 2,
    '1 chunked, host of one page': 2, '2 colocated, host': 13,
    '1P1D, swaps': 13, '1P1D, swaps, rows ahead': 26,
    '1P1D, swaps, prefixes': 11, '1 chunked, swaps': 2,
    '1P1D, swaps, streams': 49, '2 flexible, swaps': 20,
    '2P1D, fetches': 39, '1P1D, fetches, smaller pages': 20,
    '1P1D, fetches, larger pages': 5, '2 colocated, fetches, host': 33,
    '2 flexible, all': 12, '1P, 2 flexible, all': 11,
    '1P1D, streams': 31, '1P1D, streams, smaller pages': 8,
    '1P1D, streams, larger pages': 5, '1P1D, streams give way': 47,
    '1P1D, streams, pp = 2': 9, '2P1D, streams': 84, '1P2D, streams': 25,
    '2 flexible, streams': 34, '1P1D, streams, prefixes': 9,
    '1P1D, messages': 166, '1P1D, messages, 2 requests': 57,
    '1P1D, messages, preemption': 22, '1P1D, messages, pp = 2': 27,
    '1P2D, messages': 65, '1 colocated, messages': 12}


@pytest.mark.parametrize('name', [
    pytest.param(name, marks=pytest.mark.sweep if thousands > 200
                 else pytest.mark.deep) for name, thousands in LEAST.items()])
def test_small_worlds(name):
  rules, faults = explore.small_worlds()[name]
  transitions, _, whole = schedules.search(rules, faults)
  assert whole and transitions >= 1000 * LEAST[name], transitions


def test_the_runner_says_how_its_files_were_made(tmp_path):
  options = cli.options(explore.FLAGS, out=str(tmp_path), seconds=0.5, large=0,
                        small='1 chunked', processes=1)
  console = Console(record=True)
  assert explore.run(options, console) == 0
  told = console.export_text()
  assert ' 0 violations' in ' '.join(told.split())
  check_written(told, tmp_path)
  assert made_by(tmp_path)['options']['small'] == '1 chunked'


def test_a_million_transitions():
  assert LEAST.keys() == explore.small_worlds().keys()
  assert sum(LEAST.values()) >= 3050


def searched(fewer):
  """(hops, what was probed, transitions) of all small worlds, each with
  fewer(name) faults less than explore has, in all orders."""
  hops, probed, total = set(), set(), 0
  for name, (rules, faults) in explore.small_worlds().items():
    transitions, _, whole = schedules.search(
        rules, max(0, faults - fewer(name)))
    assert whole
    total += transitions
    hops |= rules.hops
    probed |= rules.probed
  return hops, probed, total


@pytest.mark.slow
def test_every_hop_is_taken():
  hops, _, _ = searched(lambda name: (
      0 if ', host' in name and '1 ' in name or name in (
          '1P1D, swaps, prefixes', '1 chunked, swaps', '2 flexible, swaps',
          '1P1D, fetches, larger pages') else
      1 if 'flexible' in name else 2))
  assert hops == {(stage, cause, after) for (stage, cause), following
                  in lifecycle.HOPS.items() for after in following}


@pytest.mark.slow
def test_every_stage_is_doubted():
  _, probed, total = searched(lambda name: (
      0 if ', host' in name and '1 ' in name else
      1 if name == '1P, 2 flexible' else 2))
  assert total >= 27_000
  hand_off = [kind.__name__ for kind in world.HAND_OFF]
  stages = [stage for stage in lifecycle.STAGES if stage != 'absent']
  for kind in (*hand_off, 'Arrived'):
    assert {(s, kind, 'impossible') for s in stages} <= probed
  for kind in hand_off:
    assert {(s, kind, 'stale') for s in lifecycle.STAGES} <= probed
  for stage in ('absent', 'over', 'abandoned'):
    assert (stage, 'Cancelled', 'stale') in probed
  for kind in ('PrefillDone', 'DecodeDone'):
    assert {(s, kind, 'stale') for s in ('up', 'draining', 'down', 'gone')} | {
        (s, kind, 'impossible') for s in ('up', 'draining', 'down', 'gone')
    } <= probed
  assert ('up', 'InstanceDown', 'impossible') in probed


def test_the_tables_are_total():
  for stage in lifecycle.STAGES:
    for cause in lifecycle.CAUSES:
      following = lifecycle.cell(stage, cause)
      assert following is None or set(following) <= set(lifecycle.STAGES)
  assert {s for s, _ in lifecycle.HOPS} == set(lifecycle.STAGES)
  assert {c for _, c in lifecycle.HOPS} <= set(lifecycle.CAUSES)
  kinds = {kind.__name__ for kind in scheduler._APPLY}
  assert kinds == set(lifecycle.CAUSES) - {'plan', 'TargetDown', 'SourceDown'}
  statuses, events = ({pair[n] for pair in lifecycle.STATUS} for n in (0, 1))
  assert len(lifecycle.STATUS) == len(statuses) * len(events)
  assert set(lifecycle.STATUS.values()) == statuses


def test_the_page_on_faults_shows_the_tables_of_the_code():
  page = pathlib.Path(__file__).parents[2] / 'docs' / 'faults.md'
  text = page.read_text()
  for part in lifecycle.drawing().split('\n\n'):
    assert part in text


def test_a_hop_that_the_table_does_not_have_is_named():
  rules, _ = explore.small_worlds()['1P1D']
  run = scheduler.Run(rules.config, scheduler.init(rules.config))
  run.apply(Arrived(0.0, 0, 2, 2))
  with pytest.raises(scheduler.ImpossibleEvent,
                     match='no hop from prefilling to migrating by plan'):
    run.move(run.own(0), 'migrating')


@pytest.mark.parametrize('seed', [
    0, *(pytest.param(seed, marks=pytest.mark.deep)
         for seed in range(4, 40, 4))])
def test_random_large_worlds(seed):
  for n in range(seed, seed + 4):
    result = explore.explore(('large', str(n), 0, ''))
    assert not result.violation, (n, result)
    assert result.transitions > 100


# Only many faults show these, and in few worlds.
RARE = ('a fetch that failed counts as whole',
        'a row that moves leaves steps in flight behind',
        'a part counts a token that is not out',
        'a part that waits elsewhere counts as a whole prompt',
        'what stays keeps its place elsewhere')
# Where a mutation is soonest seen, if not in the first world of its kind.
WORLD = {name: world for world, names in {
    '1P1D, 3 requests': (
        'the latest is first', 'a pull passes the first by',
        'another request is handed off'),
    '1P1D, preemption': ('a preempted row loses a token',),
    '1P1D, preemption, depth 1': (
        'a lease reaper stops at its first live entry',),
    '2P1D, two join': ('who waits is not placed',),
    '1P1C, splits': ('a hand-off of a request that stays',),
    '2 flexible, splits': (
        'a drain forgets its queue', 'a part hands off the whole prompt',
        'a part is taken for a whole prompt', 'the end of a part is sampled',
        'a part waits for ever', 'a part that stays is forgotten',
        'a failure keeps the pages'),
    '2 flexible, splits, preemption': ('a row that moves loses a token',),
    '2 flexible, streams': (
        'two instances wait for each other',
        'a prompt that is split is streamed'),
    '2 flexible, splits, prefixes': ('a page that is not full is kept',),
    '1P1D, prefixes, smaller pages': (
        'a hit that the source has no page for',
        'an answer is kept as another'),
    '1 colocated, prefixes, preemption': (
        'the whole of a prompt is a hit',
        'what a lost instance kept is remembered'),
    '1P1D, streams, prefixes': (
        'a page whose writer failed is kept',
        'what the target has kept is copied over'),
    '1P1D, streams, larger pages': (
        'half of a page is sent', "pages of the source's size are cut"),
    '1P2D, streams': ('pages are reserved with every chunk',),
    '1 chunked, host of one page': (
        'a copy to the host that failed is kept',
        'the host of a lost instance is remembered',
        'a load that failed keeps its slots',
        'what could not be loaded stays a hit',
        'a load that failed counts as whole',
        'a load that is cancelled keeps its pages',
        'a cancel frees what is being loaded'),
    '1 colocated, host, preemption': ('the whole of a prompt is loaded',),
    '1P1D, swaps, rows ahead': ('a row that ends keeps its slots',),
    '1P1D, fetches, smaller pages': ('half of a page is fetched',),
    '2P1D, fetches': ('what comes from a lost lender is taken for whole',),
}.items() for name in names}


@pytest.mark.parametrize('first, name', [
    pytest.param(first, name, marks=[pytest.mark.deep] * (name in RARE))
    for first, mutations in (
        ('1P1D', MUTATIONS), ('1P1D, prefixes', KEPT),
        ('1P1D, streams', STREAMED), ('1P1D, host', HOST),
        ('1P1D, swaps', SWAPPED),
        ('1P1D, fetches, larger pages', FETCHED))
    for name in mutations])
def test_a_mutation_is_caught(first, name, monkeypatch):
  mutate(name, monkeypatch)
  worlds = explore.small_worlds()
  tried = list(worlds.values())
  if name not in RARE:
    tried = [worlds[WORLD.get(name, first)]]
  with pytest.raises(world.Violation) as caught:
    for faults in range(4):
      for rules, most in tried:
        if faults <= most:
          schedules.search(rules, faults)
  assert 'NameError' not in str(caught.value)  # of the mutation itself


@pytest.mark.parametrize('name', UNNOTICED)
def test_a_mutation_that_no_client_would_notice_is_caught(name, monkeypatch):
  mutate(name, monkeypatch)
  with pytest.raises(world.Violation):
    for seed in range(60):
      schedules.walk(schedules.random_rules(seed, 1 + seed // 3), 0, seed)


def test_a_schedule_is_shrunk_and_replays(monkeypatch, tmp_path, capsys):
  path = tmp_path / 'violation.jsonl'
  with monkeypatch.context() as patched:
    mutate('a lease without Abort', patched)
    patched.setattr(explore, 'large_world', lambda seed: (
        schedules.random_rules(seed, 60), 10))
    result = explore.explore(('large', '67', 0, ''))
    rules, _ = explore.large_world(67)
    assert explore.report(cli.wide_console(), [result], tmp_path) == 1
    told = capsys.readouterr().out
    assert 'Timer(' in told and 'two copies' in told
    again, moves = schedules.read_log(path)
    assert len(moves) <= 8 < 50 < len(result.moves), moves
    assert again.config == rules.config and again.requests == rules.requests
    assert 'two copies' in schedules.replay(again, moves)[1]
    for n in range(len(moves)):  # each of them is needed
      assert not schedules.replay(again, moves[:n] + moves[n + 1:])[1]
  assert schedules.story(again, moves)[-1] == schedules.NOTHING


@pytest.mark.parametrize('text', ['', '{}', '[1]', '{"config": {}}\nx'])
def test_a_log_that_is_none_is_one_clear_error(text, tmp_path):
  (tmp_path / 'log').write_text(text)
  with pytest.raises(schedules.InputError, match='--replay'):
    schedules.read_log(tmp_path / 'log')


def written(tmp_path, body):
  """--policy of a file of one's own, whose hook `order` this is."""
  path = tmp_path / 'mine.py'
  path.write_text(
      'import dataclasses\nimport dsjax\nkept = []\n'
      f'def order(view, instance, waiting):\n  {body}\n'
      "policy = dataclasses.replace(dsjax.DISTSERVE, name='m', order=order)\n")
  return f'{path}:policy'


def test_a_policy_may_look_at_the_time(tmp_path):
  """Also at that of a stale event, where it may find that more may start."""
  policy = written(tmp_path, 'return sorted(waiting, key=lambda r: (view.time_s'
                   ' - r.arrival_s <= 9.0, r.prompt_len))')
  for job in (('small', '1 chunked, preemption'), ('large', '12')):
    result = explore.explore((*job, 0, policy))
    assert not result.violation and result.transitions > 100


def test_what_breaks_after_a_time_is_shrunk_and_replays(tmp_path):
  policy = written(tmp_path, 'return waiting * (1 + (view.time_s > 9))')
  result = explore.explore(('large', '1', 0, policy))
  assert 'hook order: answered' in result.violation
  assert explore.report(cli.wide_console(), [result], tmp_path, policy) == 1
  again, moves = schedules.read_log(tmp_path / 'violation.jsonl',
                                    explore.policies.load(policy))
  assert 0 < len(moves) < len(result.moves)
  assert 'hook order: answered' in schedules.replay(again, moves)[1]


def test_a_policy_that_keeps_something_is_told_so(tmp_path):
  policy = written(tmp_path, 'kept.append(0); return waiting[::-1] '
                   'if len(kept) % 2 else waiting')
  broken = [explore.explore(('large', str(seed), 0, policy)).violation
            for seed in (1, 2)]
  assert any('keep nothing from one call' in text for text in broken)
  result = explore.explore(('small', '1 chunked, preemption', 0, policy))
  assert 'keep nothing from one call' in result.violation


def test_what_a_policy_keeps_is_told_of_its_schedule_too(tmp_path, capsys):
  """Or the schedule that it is told by breaks nothing when it is run again."""
  policy = written(tmp_path, 'kept.append(0); return waiting[::-1] '
                   'if len(kept) % 2 else waiting')
  result = explore.explore(('small', '1 chunked, preemption', 0, policy))
  assert explore.report(cli.wide_console(), [result], tmp_path, policy) == 1
  assert f'violation: {schedules.ANOTHER}' in capsys.readouterr().out


def test_an_error_of_a_policy_is_shown_as_it_is(tmp_path, capsys):
  """Its brackets are no markup."""
  policy = written(tmp_path, "raise ValueError('[bold] [/x]')")
  result = explore.explore(('small', '1 chunked, preemption', 0, policy))
  assert explore.report(cli.wide_console(), [result], tmp_path, policy) == 1
  assert 'raised ValueError: [bold] [/x]; shrinking' in capsys.readouterr().out


def test_shipped_policies_are_explored_in_the_worlds_that_they_can_serve(
    tmp_path, capsys):
  """They predict; chunked needs instances that mix."""
  for policy in ('static+deadlines', 'adaptive'):
    rules, faults = explore.rules_of('large', '3', policy)
    assert schedules.walk(rules, faults, 3) > 100
  for roles in ('1P1D', '1P2D'):  # also where the last that decodes is lost
    assert not explore.explore(('small', roles, 0, 'adaptive'), lambda _: True
                               ).violation
  jobs = explore._jobs(cli.wide_console(), types.SimpleNamespace(
      policy='chunked:chunk=64', small='1P1D', large=4, first_seed=0, more=0,
      deep=False))
  told = capsys.readouterr().out
  assert 'worlds are left out: ' in told and 'flexible or chunked' in told
  assert jobs and {kind for kind, *_ in jobs} == {'large'}


@pytest.mark.parametrize('page', ['docs/policies.md', 'docs/extending.md',
                                  'examples/policy_of_ones_own.py'])
def test_policies_of_the_pages_are_explored(page, tmp_path):
  """They say so: also where one instance is left, and where none flips."""
  text, name = pathlib.Path(page).read_text(), 'patient'
  path = tmp_path / 'mine.py'
  if page.endswith('.md'):
    block = next(block for block in text.split('```python\n')[1:]
                 if '\npolicy = dataclasses' in block)
    text, name = block.split('\nprint(')[0].split('\nfor ')[0], 'policy'
  path.write_text(text)
  jobs = [('large', str(seed)) for seed in range(4)] + [
      ('small', '2 flexible, swaps')]
  for job in jobs:
    result = explore.explore((*job, 0, f'{path}:{name}'), lambda n: n > 4000)
    assert not result.violation, (job, result.violation)
    assert result.transitions > 100

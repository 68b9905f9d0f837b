"""Every interleaving of small worlds, random large ones; what they can see."""

import inspect
import pathlib
import sys
import textwrap

import pytest
from rich.console import Console

from dsjax.scheduling import (
  batches,
  copied,
  flexible,
  host_tier,
  lifecycle,
  loading,
  prefix_cache,
  recovery,
  residents,
  scheduler,
  streaming,
  swapping,
)
from dsjax.scheduling.events import Arrived
from experiments import explore
from experiments.common import cli
from experiments.verify import schedules, world
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
RUN = scheduler.Run
MUTATIONS = {
    'the source is freed early': (
        batches, '_pull', 'seq.epoch += 1',
        'seq.epoch += 1; residents.free(run, seq)'),
    'no epoch check': (RUN, 'handed', 'e.epoch < seq.epoch', 'False'),
    'a later epoch is passed over': (
        RUN, 'handed', 'e.epoch < seq.epoch', 'e.epoch != seq.epoch'),
    'a cancel frees what is copied': (
        RUN, 'leave', "self.move(seq, 'abandoned')", 'self.drop(seq)'),
    'a cancel keeps the pages': (
        RUN, 'leave', 'self.drop(seq)', 'self.forget(seq)'),
    'pages of a preempted row are free at once': (
        RUN, 'leave', 'if inst.inflight:', 'if False:'),
    'a preempted row loses a token': (
        batches, '_preempt', 'batch.tick + 1', 'batch.tick'),
    'a request ends before its last token': (
        batches, 'part', "run.move(seq, 'finishing')",
        "run.move(seq, 'finishing'); "
        'from dsjax.scheduling.events import Finish; '
        "run.commands.append(Finish(id, 'length'))"),
    'the latest is first': (
        RUN, 'enqueue',
        'bisect.insort(queue, seq.id, key=lambda id: seqs[id].order)',
        'queue.insert(0, seq.id)'),
    'a pull passes the first by': (
        batches, '_pull', 'pulls[0]', 'pulls[-1]'),
    'room is not noticed': (RUN, 'touch', 'inst.fresh, ', ''),
    'a late completion is taken for the next': (
        RUN, 'complete', '0 <= e.number <', 'e.number != e.number <'),
    'a lease without Abort': (
        recovery, 'timer', 'run.commands.append', 'str'),
    'a lease by the clock': (
        recovery, 'timer', 'seq is not None', 'seq and e.time_s > 0'),
    'a damaged copy is taken for whole': (
        recovery, 'migrate_failed',
        "_again(run, seq, f'its hand-off failed: {e.reason}')",
        'run.migrated(e)'),
    'a lost source without Abort': (
        recovery, '_source_lost', 'streaming.end(run, seq)',
        'residents.free_target(run, seq)'),
    'tries without bound': (
        recovery, '_spared', 'seq.tries <= run.config.tries', 'True'),
    'given up too early': (
        recovery, '_spared', 'seq.tries <= run.config.tries',
        'seq.tries < run.config.tries'),
    'tokens in flight count as out': (
        recovery, '_known', '-= lost[id]', '-= 0'),
    'tokens that are out are forgotten': (
        recovery, '_known', '(0 if n else told)', '0'),
    'a lost target loses the request': (
        recovery, '_target_lost', '_retry(run, seq, reason)',
        'run.forget(seq)'),
    'who waits is not placed': (
        recovery, 'instance_up', 'place(run)', 'pass'),
    'a drain forgets its queue': (
        flexible, 'send_off', 'run.enqueue(seq)', 'run.forget(seq)'),
    'a row that moves loses a token': (
        flexible, 'depart', '+ batch.tick', '+ batch.tick - 1'),
    'a row that moves leaves steps in flight behind': (
        recovery, '_known', "'migrating', 'leaving',", "'migrating',"),
    'two instances wait for each other': (
        batches, '_is_stuck', 'not (', 'False and ('),
    'a hand-off of a request that stays': (
        RUN, 'offer', 'target.index == seq.instance', 'False'),
    'another request is handed off': (
        streaming, 'copy', '(seq.pages, run',
        '(next(iter(run.seqs.values())).pages, run'),
    'a lease reaper stops at its first live entry': (
        recovery, 'timer', 'seq is not None',
        'seq and seq is next(s for s in run.seqs.values() if s.target_pages)'),
    'a part hands off the whole prompt': (
        batches, '_pull', '0, seq.done', '0, seq.prompt_len'),
    'a part is taken for a whole prompt': (
        batches, 'join', 'seq.done < seq.prompt_len', 'False'),
    'a part counts a token that is not out': (
        recovery, '_known', 'seq.done == seq.prompt_len', 'True'),
    'the end of a part is sampled': (
        batches, '_prefill', 'stop == seq.prompt_len,', 'stop == seq.stop,'),
    'a part waits for ever': (
        RUN, 'prefill_done', 'chunk.stop == seq.stop', 'False'),
    'a part that stays is forgotten': (
        batches, 'join', 'inst.prefilling.append(seq.id)', 'pass'),
    'a part that waits elsewhere counts as a whole prompt': (
        flexible, 'send_off', 'seq.stop', 'seq.prompt_len'),
    'what stays keeps its place elsewhere': (
        batches, '_pull', 'inst.pulls.remove(id)\n', 'pass\n'),
    'a full target drops the request': (
        batches, '_pull', 'taken is None:',
        'taken is None:\n      run.drop(seq)'),
    'a failure keeps the pages': (
        recovery, 'fail', 'run.drop(seq)', 'run.forget(seq)'),
}
# Of pages that are kept; caught in the worlds where they are.
KEPT = {
    'a page is evicted while it is read': (
        prefix_cache, 'hold', 'if not owners:', 'if False:'),
    'an owner too few': (
        prefix_cache, 'release', 'entry.owners - 1', '0'),
    'a page that is not full is kept': (
        residents, 'keep', 'stop // size', '-(-stop // size)'),
    'a page is kept before it is written': (
        batches, '_prefill', 'seq.done = stop',
        'seq.done = stop; residents.keep(inst, seq, start, stop)'),
    'a page whose writer failed is kept': (
        residents, 'free_target', ', 0)', ', 9)'),
    'what is kept is computed again': (
        residents, 'take', 'ids + more, hit', 'ids + more, 0'),
    'the whole of a prompt is a hit': (
        residents, 'take', '(stop - 1)', 'stop'),
    'a hit that the source has no page for': (
        residents, 'take_over', 'math.lcm(*sizes)', 'sizes[1]'),
    'other pages than those that are missing': (
        streaming, 'copy', 'pages[start // size:', 'pages[0:'),
    'an answer is kept as another': (
        residents, 'learn', 'blocks += more', 'blocks += more[1:]'),
    'what a lost instance kept is remembered': (
        recovery, '_empty', 'prefix_cache.emptied(inst.pool)', 'inst.pool'),
}
# Of KV that is streamed; caught in the worlds where it is.
STREAMED = {
    'a part is read before its chunk has run': (
        streaming, 'follow', 'chunk.stop // unit', 'seq.stop // unit'),
    'half of a page is sent': (
        streaming, 'follow', 'chunk.stop // unit * unit', 'chunk.stop'),
    "pages of the source's size are cut": (
        streaming, 'follow', 'math.lcm(*sizes)', 'sizes[0]'),
    'a part is sent twice': (
        streaming, 'follow', 'seq.sent = stop - seq.hit', 'pass'),
    'a part is left out': (
        streaming, 'follow', 'copy(run, seq, seq.hit, sent, stop, more=True)',
        'sent or copy(run, seq, seq.hit, sent, stop, more=True)'),
    'what the target has kept is copied over': (
        streaming, 'follow', 'seq.hit, sent, stop', '0, sent, stop'),
    'the rest is the last part alone': (
        streaming, 'rest', 'seq.hit, seq.sent', 'seq.hit, seq.sent + 1'),
    'pages are reserved with every chunk': (
        streaming, 'follow', 'seq.target_pages or ', ''),
    'a stream that ends goes on writing': (
        streaming, 'end', 'run.commands.append', 'str'),
    'a cancel keeps what a stream has reserved': (
        RUN, 'leave', 'if seq.target_pages:', 'if False:'),
    'a failed stream counts as a hand-off': (
        recovery, '_again', "seq.stage != 'prefilling'", 'True'),
    'a stream to a lost target goes on': (
        recovery, '_target_lost', "seq.stage == 'prefilling'", 'False'),
    'a prompt that is split is streamed': (
        streaming, 'follow', 'seq.stop < seq.prompt_len', 'False'),
}
# Of the second tier; caught in the worlds where there is one.
HOST = {
    'a slot is evicted while it is read': (
        loading, 'pin', 'prefix_cache.hold(inst.host.slots, hashes)',
        'inst.host.slots, tuple([inst.host.slots.kept[h].page '
        'for h in hashes])'),
    'a slot is a hit before its copy has ended': (
        host_tier, 'offload', 'len(pages))\n',
        'len(pages)); slots = prefix_cache.keep(slots, ids, hashes)\n'),
    'pages are offloaded after they are written anew': (
        RUN, 'apply', 'batches.plan(self)',
        "batches.plan(self); "
        "commands.sort(key=lambda c: 'Offload' in repr(c))"),
    'a copy to the host that failed is kept': (
        copied, 'offloaded', 'not e.failed)', 'True)'),
    'the host of a lost instance is remembered': (
        recovery, '_empty', 'prefix_cache.emptied(inst.host.slots)',
        'inst.host.slots'),
    'a load that failed keeps its slots': (
        loading, 'let_go', 'prefix_cache.forget(',
        '(lambda slots, *_: slots)('),
    'what could not be loaded stays a hit': (
        loading, 'let_go', 'elif whole:', 'else:\n    whole = True\n  if whole '
        'and not entry.lender >= 0 and seq.done < seq.prompt_len:'),
    'a load that failed counts as whole': (
        copied, 'go_on', '    if whole:', '    if True:'),
    'a load that is cancelled keeps its pages': (
        copied, 'go_on', 'run.drop(seq)', 'run.forget(seq)'),
    'a cancel frees what is being loaded': (
        RUN, 'leave', "was in ('migrating', 'loading')", "was == 'migrating'"),
    'a load into other pages': (
        loading, 'begin', 'seq.pages[seq.done // size:',
        'seq.pages[seq.done // size + 1:1 + '),
    'the whole of a prompt is loaded': (
        loading, '_slots', '(stop - 1)', 'stop'),
    'a load is not counted': (
        copied, 'go_on', 'inst.backlog -= tokens', 'pass'),
    'a load that is over is told again': (
        copied, 'loaded', 'e.epoch < seq.epoch', 'False'),
}
# Of preempted rows in host memory; caught in the worlds where they are.
SWAPPED = {
    'a row goes without its last page': (
        swapping, 'swap', 'pages_for(seq.done,', 'pages_for(seq.done - 1,'),
    'a row comes back before it has gone': (
        swapping, 'come_back', 'number >= 0', 'False'),
    'a row that did not get there comes back': (
        swapping, 'went', 'if failed:', 'if False:'),
    'a row that is computed after all loses a token': (
        swapping, 'again', 'seq.prompt_len + 1', 'seq.prompt_len'),
    'a row that ends keeps its slots': (
        swapping, 'give_up', 'host_tier.release(inst, slots)', 'pass'),
    'slots are free while a row goes there': (
        swapping, 'give_up', 'number < 0', 'True'),
    'a row in host memory is passed by': (
        batches, '_pull', 'None if host_tier.waits(inst) else ', ''),
    'a row that did not come back goes on': (
        copied, 'go_on', 'elif was_row and whole:', 'elif was_row:'),
    'a row that comes back gives up its slots too early': (
        swapping, 'come_back', '(*inst.loading, Loading(id, -1, slots))',
        '(*inst.loading, Loading(id, -1, slots[1:]))'),
    'rows of a lost host are remembered': (
        recovery, '_empty', ',\n          swapped=()', ''),
    'a lost row loses a token': (
        recovery, '_known', "'swapped', 'loading'", "'swapped'"),
}
# Of what others have kept; caught in the worlds where it is fetched.
FETCHED = {
    'what is lent may be evicted': (
        loading, 'pin', """prefix_cache.hold(
        lender.pool, _hashes(lender, seq, start, stop))""",
        """(lender.pool, tuple([lender.pool.kept[h].page for h in
        _hashes(lender, seq, start, stop)]))"""),
    'what is lent is never free again': (
        loading, 'let_go', 'lender.pool = ', 'other = '),
    'half of a page is fetched': (
        loading, 'borrows', ' // unit * unit', ''),
    'hits of half a page': (
        loading, 'unit_of', 'if not borrows(run, inst, seq):', 'if True:'),
    'a fetch into other pages': (
        loading, 'begin', 'seq.pages[seq.done // size:',
        'seq.pages[seq.done // size + 1:1 + '),
    'a fetch that failed counts as whole': (
        recovery, '_again', 'whole=False', 'whole=True'),
    'a lost instance goes on lending': (
        recovery, '_end_loans', 'entry.lender == lost.index', 'False'),
    'what is lent to a lost instance stays lent': (
        recovery, '_end_loans', 'entry.lender >= 0', 'False'),
    'a lost lender without Abort': (
        recovery, '_end_loans', 'run.commands.append', 'str'),
    'a lease of a fetch without Abort': (
        recovery, 'timer', 'run.commands.append', 'str'),
    'what comes from a lost lender is taken for whole': (
        recovery, '_end_loans', 'copied.go_on(run, seq, whole=False)',
        'copied.go_on(run, seq, whole=True)'),
}
# What no client would notice; random worlds are wide enough to show it.
UNNOTICED = {
    'a command too many in flight': (
        batches, '_issue', 'inst.inflight) < inst.depth',
        'inst.inflight) <= inst.depth'),
    'a row too far ahead': (
        batches, '_ready', 'batch.flying < run.config.depth',
        'batch.flying <= run.config.depth'),
    'a prompt too many in a batch': (
        batches, '_prefill', 'len(chunks) < inst.config.prefill_seqs',
        'len(chunks) <= inst.config.prefill_seqs'),
    'a piece over the budget': (
        batches, '_prefill', 'seq.done + budget)', 'seq.done + budget + 1)'),
    'a resident too many': (
        residents, 'room', 'inst.residents >= config.max_seqs',
        'inst.residents > config.max_seqs'),
    'steps beyond the run-ahead': (batches, '_decode', 'inst.run_ahead)', '9)'),
    'a micro-batch is passed by': (
        batches, '_advance', 'inst.turn = (g + 1) % len(inst.batches)',
        'inst.turn = g'),
    'a copy to a page too many': (
        streaming, 'copy', 'pages_for(stop, size)',
        'pages_for(stop + 1, size)'),
    'a stop is told as a length': (RUN, 'ended', "'stop'", "'length'"),
    'a stop at the first token is told as a length': (
        RUN, 'prefill_done', "'stop' if chunk.id in e.ended else 'length'",
        "'length'"),
    'a row with a page too few': (
        batches, 'row_of', 'len(seq.pages) * inst',
        '(len(seq.pages) + 1) * inst'),
    'a chunk skips a token': (
        batches, '_prefill', 'start, stop = seq.done,',
        'start, stop = seq.done + bool(seq.done),'),
    'the given state is changed': (
        RUN, 'own_seqs', 'dict(self.seqs)', 'self.seqs'),
}


def mutate(name, monkeypatch):
  """Changes a line of the scheduler."""
  owner, function, old, new = (
      MUTATIONS | KEPT | STREAMED | HOST | SWAPPED | FETCHED
      | UNNOTICED)[name]
  before = getattr(owner, function)
  source = textwrap.dedent(inspect.getsource(before))
  assert old in source, source
  made, module = {}, sys.modules[before.__module__]
  # Annotations are not read: some name what only a type checker imports.
  exec('from __future__ import annotations\n' + source.replace(old, new),
       module.__dict__, made)
  monkeypatch.setattr(owner, function, made[function])
  for kind, apply in scheduler._APPLY.items():
    if apply is before:
      monkeypatch.setitem(scheduler._APPLY, kind, made[function])


@pytest.mark.parametrize('name', [
    pytest.param(name, marks=pytest.mark.sweep if thousands > 200
                 else pytest.mark.deep) for name, thousands in LEAST.items()])
def test_small_worlds(name):
  rules, faults = explore.small_worlds()[name]
  transitions, _, whole = schedules.search(rules, faults)
  assert whole and transitions >= 1000 * LEAST[name], transitions


def test_the_runner_says_how_its_files_were_made(tmp_path):
  options = cli.options(explore.FLAGS, out=str(tmp_path), seconds=0.5, seeds=0,
                        only='1 chunked', processes=1)
  console = Console(record=True)
  assert explore.run(options, console) == 0
  told = console.export_text()
  assert ' 0 violations' in ' '.join(told.split())
  check_written(told, tmp_path)
  assert made_by(tmp_path)['options']['only'] == '1 chunked'


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

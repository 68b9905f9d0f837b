"""Mistakes of a scheduler, a line each, that an explorer must see."""

import inspect
import sys
import textwrap

from dsjax.scheduling import (
  batches,
  copied,
  flexible,
  host_tier,
  loading,
  prefix_cache,
  recovery,
  residents,
  scheduler,
  streaming,
  swapping,
)

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
        RUN, 'enqueue', 'queue.append(seq.id)', 'queue.insert(0, seq.id)'),
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
        streaming, '_pages', 'pages[start // size:', 'pages[0:'),
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
        streaming, '_pages', 'pages_for(stop, size)',
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

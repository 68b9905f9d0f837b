"""What the best placements mean: what binds them, whether to disaggregate."""

import math

from dsjax.placement.candidates import Candidate, full_length, run, setup
from dsjax.scheduling.page_pool import num_free
from dsjax.scheduling.state import room


def limit(problem, row):
  """What binds a placement at 1.1 times its goodput, in words.

  The objective that more requests miss, and what they would have met it
  without: waiting for pages, the copy of KV, or neither.
  """
  candidate = Candidate(row.placement, row.prefill_tokens, row.aligned,
                        math.inf)
  made, rate = setup(problem, candidate), 1.1 * row.goodput.rate_per_s
  if not rate:
    return 'nothing is served'
  config, since, short_s, all_s = made[0], [0.0], 0.0, 0.0
  short = False

  def on_event(state, event, commands):
    nonlocal short, short_s, all_s
    del commands
    short_s += (event.time_s - since[0]) * short
    all_s = since[0] = event.time_s
    short = any(_refused(state, one, c) for one, c in zip(
        state.instances, config.instances, strict=True))

  n = min(full_length(problem)(rate), 4 * problem.most_requests)
  records = run(problem, made, rate, n, on_event)[n // 5:]
  slo = problem.slo
  late = [r for r in records if r.token_s and r.ttft_s > slo.ttft_s]
  slow = [r for r in records if r.token_s and r.tpot_s > slo.tpot_s]
  waits = short_s > 0.2 * all_s
  if not late and not slow:
    return 'nothing up to 1.1 times its goodput'
  if len(late) >= len(slow):
    return 'KV memory (prompts wait for pages)' if waits else 'prefill compute'

  def without(stage):
    return sum(r.tpot_s - r.stage_s[stage] / (len(r.token_s) - 1)
               <= slo.tpot_s for r in slow) > len(slow) / 2
  if row.placement.mode == 'disaggregated':
    # Copies queue at their link: it is to blame where its own time is long, or
    # it has little time to spare.
    moves = sum(made[2].migrate_s(r.prompt_len) for r in slow)
    waits_s = sum(r.stage_s['migrate'] for r in slow)
    links = len(row.placement.prefill) * len(row.placement.decode)
    span_s = records[-1].arrival_s - records[0].arrival_s
    busy_s = sum(made[2].migrate_s(r.prompt_len) for r in records) / links
    if without('migrate') and (moves > waits_s / 3 or busy_s > 0.8 * span_s):
      return 'link'
    if without('decode_queue'):
      return ('KV memory (finished prefills wait for pages)' if waits
              else 'decode batch')
    return 'decode steps (TPOT)'
  return ('KV memory (preemptions)' if sum(r.preemptions for r in slow)
          > len(slow) / 2 else 'decode steps and the prefills between them '
          '(TPOT)')


def _refused(state, one, config):
  """Whether something waits for pages or a place on an instance."""
  waiting = one.queue if config.prefills else one.pulls
  if not waiting:
    return False
  # As policy.leave_room_to_grow.
  need = room(one, config, state.seqs[waiting[0]].prompt_len + 1)
  spare = one.residents if config.decodes else 0
  return not need or num_free(one.pool) < need + spare


def name(row):
  """A placement's mode, with its budget where it has one."""
  return row.placement.mode + (f' ({row.prefill_tokens} tokens)'
                               if row.placement.chunked else '')


def verdict(rows, problem=None):
  """Disaggregate or not, by how much, and how sure that is.

  The ratio's interval is from one's low over the other's high, and the other
  way round: at least as wide as 95 %.
  """
  def best(disaggregated):
    return next((r for r in rows if (r.placement.mode == 'disaggregated')
                 == disaggregated and r.goodput.rate_per_s > 0), None)

  split, together = best(True), best(False)
  if split is None and together is None:
    return 'No placement meets the objectives at any rate.'
  if split is None or together is None:
    only = split or together
    if len({r.placement.mode == 'disaggregated' for r in rows}) == 1:
      return (f'Only {name(only)} placements were judged: '
              f'{only.per_device:.3g} requests/s per device.'
              + _copies(only, problem))
    return f'Only {name(only)} placements meet the objectives.' + _copies(
        only, problem)
  first, second = ((split, together) if split.per_device > together.per_device
                   else (together, split))
  ratio = first.per_device / second.per_device
  (low, high), (other_low, other_high) = (first.interval_per_device,
                                          second.interval_per_device)
  between = (low / other_high if other_high else 0.0,
             high / other_low if other_low else math.inf)
  spread = f'[{between[0]:.2f}, {between[1]:.2f}]'
  if between[0] <= 1:
    text = (f'No clear winner: {name(first)} serves {ratio:.2f} {spread} '
            f'times what {name(second)} does per device, within the '
            'intervals.')
  else:
    what = 'Disaggregate' if first is split else 'Do not disaggregate'
    text = (f'{what}: {name(first)} serves {ratio:.2f} {spread} times what '
            f'{name(second)} does per device ({first.per_device:.3g} against '
            f'{second.per_device:.3g} requests/s).')
  return text + _copies(first, problem)


def _copies(row, problem):
  """How many copies serve the rate that is asked for, if one is."""
  if problem is None or not problem.rate_per_s:
    return ''
  copies = math.ceil(problem.rate_per_s / row.goodput.rate_per_s)
  need, have = copies * row.placement.num_devices, problem.cluster.num_devices
  return (f' {problem.rate_per_s:.4g} requests/s take {copies} of it: {need} '
          f'devices of {have}' + ('.' if need <= have else ', too many.'))

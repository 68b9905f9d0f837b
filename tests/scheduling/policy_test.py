"""Policies: what each hook decides, what it may not answer, and safety."""

import collections
import dataclasses
import hashlib
import itertools
import json
import random
import types

import numpy as np
import pytest

from dsjax.config.checks import InputError
from dsjax.config.engine import InstanceConfig
from dsjax.config.placement import ROLES, Placement, Plan, Role
from dsjax.config.request import Request, Sampling
from dsjax.scheduling import event_log, scheduler
from dsjax.scheduling.events import (
  Arrived,
  Decided,
  DecodeDone,
  InstanceDown,
  InstanceUp,
  Migrate,
  Migrated,
  Preempt,
  PrefillDone,
  RunDecode,
  RunPrefill,
  Tick,
)
from dsjax.scheduling.policy import (
  DISTSERVE,
  Because,
  Fetch,
  Move,
  Policy,
  PolicyError,
  PrefillBudget,
  Refuse,
  Split,
  may_go_on,
)
from dsjax.simulation import latency, simulator
from experiments import explore
from experiments.verify import schedules
from experiments.verify.anything import anything
from experiments.verify.worlds import Rules

STEP = latency.Affine((0.01, 1e-4, 0.0), (0.01, 1e-6, 1e-4), host_s=0.001,
                      mixed=(0.01, 1e-4, 0.0, 1e-6))
LINK = latency.Link(1e-3, 1e6, 100)


def _config(roles, num_pages=16, max_seqs=4, prefill_tokens=16, **hooks):
  instances = tuple(InstanceConfig(role, num_pages, 4, max_seqs,
                                   prefill_tokens, 4) for role in roles)
  return scheduler.Config(instances, 32, run_ahead=1, tries=3,
                          policy=Policy('mine', **hooks))


def _after(config, *events):
  """(state, commands of the last event) after events."""
  state, commands = scheduler.init(config), ()
  for event in events:
    state, commands = scheduler.step(config, state, event)
    scheduler.check(state)
  return state, commands


def _arrive(id, prompt_len=6, max_tokens=4):
  return Arrived(float(id), id, prompt_len, max_tokens)


# --- what each hook decides --------------------------------------------------


@pytest.mark.parametrize('order', [None, lambda view, instance, waiting: [
    *waiting][::-1]])
def test_what_a_lender_has_kept_just_now_is_fetched_at_once(order):
  def route(view, request):
    return Fetch(1, 0) if request.id > 1 else request.id

  config = dataclasses.replace(
      _config(['prefill', 'prefill', 'decode'], route=route, fetches=True,
              order=order), prefix_cache=True)
  # Both are at work; who waits at the second begins as the first one's prompt.
  events = [Arrived(0.0, 0, 9, 4, blocks=(7, 8)), Arrived(0.0, 1, 9, 4)]
  events += [Arrived(0.0, 3, 14, 4)] * bool(order) + [
      Arrived(0.0, 2, 14, 4, blocks=(7, 8, 9))]
  _, commands = _after(config, *events, PrefillDone(1.0, 0, 0))
  fetch, = [c for c in commands if isinstance(c, Migrate) and c.kept]
  assert (fetch.id, fetch.source, fetch.target) == (2, 0, 1)
  assert fetch.num_tokens == 8


def test_route_chooses_the_queue():
  config = _config(('colocated',) * 3, route=lambda view, request: 2)
  _, (command, *_) = _after(config, _arrive(0))
  assert command.instance == 2


def test_why_a_hook_chose_is_told_and_kept_in_the_record():
  def explained(config):
    return dataclasses.replace(config, policy=Policy(
        'mine', route=lambda view, request: Because(0, 'it is free'),
        hand_off=lambda view, request, avoid: Because(1, f'not {avoid}')))

  config = explained(_config(('prefill', 'decode')))
  state, commands = _after(config, _arrive(0))
  assert commands[0] == Decided(0, 'route', 0, 'it is free')
  state, commands = _after(config, *DONE)
  assert commands[0] == Decided(0, 'hand_off', 1, 'not -1')
  assert event_log.decode(json.loads(json.dumps(event_log.encode(
      commands)))) == commands
  flexible = explained(_config(('flexible',) * 2))
  for kind in (config, flexible):
    run = simulator.simulate(kind, [
        Request(0, 0.0, [1] * 6, Sampling(max_tokens=4))], STEP, LINK)
    record, = run.records
    assert record.reasons == ('route 0: it is free', 'hand_off 1: not -1')
    assert record.row()['reasons'] == list(record.reasons)


def shortest_first(view, instance, waiting):
  del view, instance
  return sorted(waiting, key=lambda request: request.prompt_len)


def test_order_of_a_prefill_queue():
  config = _config(('prefill', 'decode'), order=shortest_first)
  events = [_arrive(0), *(_arrive(id, n) for id, n in ((1, 9), (2, 3), (3, 5)))]
  _, commands = _after(config, *events, PrefillDone(9.0, 0, 0))
  prefill, = (c for c in commands if isinstance(c, RunPrefill))
  assert [chunk.id for chunk in prefill.chunks] == [2, 3]  # 9 more do not fit


def test_order_of_finished_prefills():
  config = _config(('prefill', 'decode'), max_seqs=1, order=shortest_first)
  config = dataclasses.replace(config, instances=(
      dataclasses.replace(config.instances[0], max_seqs=4),
      config.instances[1]))
  arrivals = [_arrive(0, 3)._replace(more=True),
              _arrive(1, 9)._replace(more=True), _arrive(2, 2)]
  state, (prefill,) = _after(config, *arrivals)
  assert [chunk.id for chunk in prefill.chunks] == [2, 0, 1]
  state, (pull,) = scheduler.step(config, state, PrefillDone(3.0, 0, 0))
  assert isinstance(pull, Migrate) and pull.id == 2
  assert state.instances[1].pulls == (0, 1)


def decode_first(view, instance):
  if instance.turn_rows:
    return PrefillBudget(0)
  return DISTSERVE.batch(view, instance)


def test_batch_lets_rows_go_before_prompts():
  config = _config(('colocated',), batch=decode_first)
  events = _arrive(0), _arrive(1)
  _, (command,) = _after(dataclasses.replace(config, depth=1), *events,
                         PrefillDone(2.0, 0, 0))
  assert isinstance(command, RunDecode)
  _, (command,) = _after(dataclasses.replace(config, depth=1,
                                             policy=DISTSERVE), *events,
                         PrefillDone(2.0, 0, 0))
  assert isinstance(command, RunPrefill)


def test_batch_bounds_the_prompt_tokens_beside_rows():
  config = _config(('chunked',), batch=lambda view, instance: PrefillBudget(
      3, whole=False, rows=True))
  _, (first,) = _after(dataclasses.replace(config, depth=1), _arrive(0, 7))
  assert [(c.start, c.stop) for c in first.chunks] == [(0, 3)]


def in_two(view, request):
  """The first 5 tokens at 0, the rest at 1."""
  if request.done:
    assert [i.index for i in may_go_on(view, request)] == [0, 1]
    return 1
  return Split(0, 5)


@pytest.mark.parametrize('roles', (('flexible',) * 2, ('prefill', 'chunked')))
def test_route_splits_a_prompt_within_a_page(roles):
  config = _config(roles, route=in_two)
  state, (first,) = _after(config, _arrive(0, 11))
  assert [tuple(c)[1:3] for c in first.chunks] == [(0, 5)]
  assert not first.chunks[0].last and state.instances[0].backlog == 0
  state, (copy,) = scheduler.step(config, state, PrefillDone(1.0, 0, 0))
  assert copy == Migrate(0, 1, 0, (0, 1), 1, (0, 1), 5)
  state, (rest, decode) = scheduler.step(config, state, Migrated(2.0, 0, 1))
  assert rest.instance == 1 and rest.chunks[0][1:5] == (
      5, 11, (0, 1, 2), True)
  assert state.instances[0].residents == 0
  assert isinstance(decode, RunDecode) and decode.rows[0].base == 11


def test_the_rest_of_a_prompt_whose_first_part_is_lost_starts_anew():
  config = _config(('flexible',) * 3, route=lambda view, request: (
      1 if request.done else Split(0, 5) if view.instances[0].status == 'up'
      else 2))
  state, answer = _after(config, _arrive(0, 11), PrefillDone(1.0, 0, 0),
                         InstanceDown(2.0, 0))
  prefill, = (c for c in answer if isinstance(c, RunPrefill))
  assert prefill.instance == 2 and prefill.chunks[0][1:3] == (0, 11)
  assert state.seqs[0].tries == 1


@pytest.mark.parametrize('answer', (
    Split(0, 0), Split(0, 11), Split(0, 2.5), Split(2, 3), Split(None, 3)))
def test_a_split_that_cannot_be_is_refused(answer):
  config = _config(('flexible',) * 2, route=lambda view, request: answer)
  with pytest.raises(PolicyError, match='hook route: answered'):
    _after(config, _arrive(0, 11))


def test_a_split_where_no_copy_leaves_is_refused():
  config = _config(('chunked',) * 2, route=lambda view, request: Split(0, 3))
  with pytest.raises(PolicyError, match='flexible or only prefills'):
    _after(config, _arrive(0, 11))


def test_flexible_instances_that_wait_for_each_other_behind_others():
  """What would pull first comes from one that only prefills, and cannot stay
  there; what is behind it can."""
  route, target = (1, 2, 0, 0), (2, 1, 1, 2)
  config = _config(
      ('prefill', 'flexible', 'flexible'), num_pages=4,
      route=lambda view, request: route[request.id],
      hand_off=lambda view, request, avoid: target[request.id])
  roomy = dataclasses.replace(config.instances[0], num_pages=16)
  config = dataclasses.replace(config, instances=(
      roomy, *config.instances[1:]))
  state, _ = _after(config, *(_arrive(id, 12, 4)._replace(more=id != 3)
                              for id in (2, 0, 1, 3)))
  for index, number in ((0, 0), (0, 1), (1, 0), (2, 0)):
    state, answer = scheduler.step(config, state,
                                   PrefillDone(9.0, index, number))
  assert any(isinstance(c, RunDecode) for c in answer)


def test_hand_off_chooses_who_pulls_and_knows_who_failed():
  asked = []

  def last(view, request, avoid):
    asked.append((request.id, avoid))
    return view.decodes[-1].index

  config = _config(('prefill', 'decode', 'decode'), hand_off=last)
  _, commands = _after(config, _arrive(0), PrefillDone(1.0, 0, 0))
  assert commands[0].target == 2 and asked == [(0, -1)]


def test_admit_can_make_a_queue_wait():
  config = _config(('prefill', 'decode'), admit=lambda view, instance, request,
                   pages: instance.prefills or not instance.residents)
  state, commands = _after(
      config, _arrive(0)._replace(more=True), _arrive(1), PrefillDone(1., 0, 0))
  assert [c.id for c in commands] == [0]
  assert state.instances[1].pulls == (1,)


def test_victim_is_the_policys():
  def first(view, instance, residents):
    return min(residents, key=lambda request: request.arrival_s)

  lost = {}
  for name, victim in (('first', first), ('last', DISTSERVE.victim)):
    config = _config(('colocated',), num_pages=4, victim=victim)
    state, events = scheduler.init(config), [
        _arrive(0, 3, 9)._replace(more=True), _arrive(1, 3, 9)]
    for _ in range(9):
      event = events.pop(0)
      state, commands = scheduler.step(config, state, event)
      gone = [c.id for c in commands if isinstance(c, Preempt)]
      if gone:
        lost[name], = gone
        break
      events += [DecodeDone(9., 0, c.number) if isinstance(c, RunDecode)
                 else PrefillDone(9., 0, c.number) for c in commands]
  assert lost == {'first': 0, 'last': 1}


# --- what a policy may not do ------------------------------------------------

PAIR, BOTH = ('prefill', 'decode'), ('colocated',)
FREE = ('flexible',) * 2
DONE = (_arrive(0), PrefillDone(1.0, 0, 0))


class Unreadable:
  """Whatever is asked of it raises."""

  @property
  def id(self):
    raise RuntimeError('no id')

  def __repr__(self):
    raise RuntimeError('no text')

  def __index__(self):
    raise RuntimeError('no integer')


UNREADABLE = Unreadable()
TICKED = (Tick(2.0),)


class _Broken(collections.UserDict):

  def __getitem__(self, key):
    raise RuntimeError('broken')


@pytest.mark.parametrize('hook, answer, roles, events, text', [
    ('route', 1, PAIR, DONE[:1], r'answered 1: must be .*\[0\]'),
    ('route', None, PAIR, DONE[:1], 'answered None'),
    ('hand_off', 0, PAIR, DONE, r'answered 0: must be .*\[1\]'),
    ('batch', 16, BOTH, DONE[:1], 'a PrefillBudget of 0 to 16 tokens'),
    ('batch', PrefillBudget(17), BOTH, DONE[:1], '0 to 16 tokens'),
    ('batch', PrefillBudget(-1), BOTH, DONE[:1], '0 to 16 tokens'),
    ('batch', PrefillBudget(1.5), BOTH, DONE[:1], '0 to 16 tokens'),
    ('batch', PrefillBudget(4, rows=True), BOTH, DONE[:1], 'without rows'),
    ('order', (), PAIR, (_arrive(0), _arrive(1), _arrive(2), DONE[1]),
     r'the requests that wait, each once: \[1, 2\]'),
    ('order', (UNREADABLE,) * 2, PAIR, (
        _arrive(0), _arrive(1), _arrive(2), DONE[1]), 'each once'),
    ('order', (types.SimpleNamespace(id=1.0), types.SimpleNamespace(id=2)),
     PAIR, (_arrive(0), _arrive(1), _arrive(2), DONE[1]), 'each once'),
    ('order', 7, PAIR, (_arrive(0), _arrive(1), _arrive(2), DONE[1]),
     'not iterable'),
    ('order', (n for n in [1 / 1, 2]), PAIR, (
        _arrive(0), _arrive(1), _arrive(2), DONE[1]), 'each once'),
    ('route', np.array([0, 1]), PAIR, DONE[:1], 'answered array'),
    ('route', True, BOTH, DONE[:1], 'answered True'),
    ('route', UNREADABLE, PAIR, DONE[:1], 'answered a Unreadable: must be'),
    ('admit', np.array([1, 2]), PAIR, DONE[:1], 'answered array.*True or F'),
    ('admit', None, PAIR, DONE[:1], 'answered None: must be True or False'),
    ('admit', 'no', PAIR, DONE[:1], "answered 'no': must be True or False"),
    ('batch', PrefillBudget(9, 'x'), BOTH, DONE[:1], '0 to 16 tokens'),
    ('batch', PrefillBudget(9, False, np.ones(2)), BOTH, DONE[:1],
     'without rows'),
    ('route', Refuse(3), BOTH, DONE[:1], 'a Refuse with a text'),
    ('route', Because(0, 3), BOTH, DONE[:1], 'a Because of an answer and a'),
    ('route', Because(Because(0, 'x'), 'y'), BOTH, DONE[:1], 'of an answer'),
    ('route', Because(1, 'so'), PAIR, DONE[:1], r'answered 1: must be .*\[0\]'),
    ('hand_off', Because(0, 'so'), PAIR, DONE, r'answered 0: must be .*\[1\]'),
    ('resize', {0: 'decode'}, BOTH, TICKED, r'indices of \[\]'),
    ('resize', {1: 'flexible'}, FREE, TICKED, "roles of .'prefill', 'decode'"),
    ('resize', {0: np.ones(2)}, FREE, TICKED, 'must be {index: role}'),
    ('resize', 5, FREE, TICKED, 'answered 5: must be {index: role}'),
    ('resize', itertools.cycle([(0, 'decode')]), FREE, TICKED, 'must be {inde'),
    ('resize', _Broken(a=1), FREE, TICKED, 'must be {index: role}'),
    ('rebalance', [Move(0, 1)], FREE, TICKED, 'a Move of a row'),
    ('rebalance', [Move(0, 0)], FREE, (*DONE, *TICKED), 'a Move of a row'),
    ('rebalance', [(0, 1)], FREE, (*DONE, *TICKED), 'a Move of a row'),
    ('rebalance', {Move(0, 1)}, FREE, TICKED, 'a set has no order'),
    ('order', {1, 2}, PAIR, (_arrive(0), _arrive(1), _arrive(2), DONE[1]),
     'a set has no order'),
    ('rebalance', 5, FREE, TICKED, 'not iterable')])
def test_an_answer_that_cannot_be_carried_out(hook, answer, roles, events,
                                              text):
  config = _config(roles, **{hook: lambda *_: answer, 'tick_s': 1.0})
  with pytest.raises(PolicyError, match=f"policy 'mine', hook {hook}: ") as e:
    _after(config, *events)
  assert e.match(text)


def test_rows_go_on_where_an_instance_becomes_one_that_prefills():
  """However many prompts come."""
  config = _config(('flexible',) * 2, tick_s=0.05, resize=lambda view: {
      0: 'prefill', 1: 'decode'} if view.time_s else {},
      route=lambda view, request: 0,
      hand_off=lambda view, request, avoid: 1 if request.id else 0)
  sent = [Request(0, 0.0, [1] * 6, Sampling(max_tokens=20))]
  sent += [Request(id, 0.04 + id / 200, [1] * 12, Sampling(max_tokens=2))
           for id in range(1, 200)]
  row, *others = simulator.simulate(config, sent, STEP, LINK).records
  assert row.instances == (0,)
  assert row.finish_s < others[50].finish_s


def test_a_victim_must_be_there():
  def outsider(view, instance, residents):
    return view.instances[0].waiting()[0]

  config = _config(('colocated',), num_pages=4, max_seqs=2, victim=outsider)
  state, commands = _after(config, *(
      _arrive(id, 3, 9)._replace(more=id < 2) for id in range(3)))
  with pytest.raises(PolicyError, match='hook victim.* one of the requests'):
    for _ in range(9):
      for c in commands[:1]:
        state, commands = scheduler.step(config, state, (
            DecodeDone if isinstance(c, RunDecode) else PrefillDone)(
                9., 0, state.instances[0].inflight[0][0].number))


def test_scalars_of_numpy_are_as_good():
  config = _config(BOTH, route=lambda *_: np.int64(0), batch=lambda *_:
                   PrefillBudget(np.int64(16), np.True_, np.False_))
  _, (command, *_) = _after(config, _arrive(0))
  assert type(command.chunks[0].stop) is int


@pytest.mark.parametrize('field, value, allowed', [
    ('name', 3, 'a text'), ('fetches', 1, 'True or False'),
    ('needs', ['link'], 'a tuple'), ('tick_s', True, 'None or seconds'),
    ('order', 'short', 'a function'), ('resize', 5, 'a function'),
    *[(hook, None, 'a function')
      for hook in ('route', 'batch', 'hand_off', 'admit', 'victim')]])
def test_a_field_of_a_policy_is_checked_at_once(field, value, allowed):
  with pytest.raises(InputError, match=f'^Policy.{field}=.*be {allowed}'):
    dataclasses.replace(DISTSERVE, **{field: value})


@pytest.mark.parametrize('error, text', [
    (KeyError('cost'), "KeyError: 'cost'"), (StopIteration(), 'StopIteration'),
    (RecursionError('deep'), 'RecursionError: deep')])
def test_a_hook_that_raises_is_named(error, text):
  def fails(view, request):
    raise error

  with pytest.raises(PolicyError, match=f'hook route: raised {text}'):
    _after(_config(PAIR, route=fails), _arrive(0))


def test_the_state_is_as_before_after_an_error():
  config = _config(PAIR, hand_off=lambda *_: 7)
  state, _ = _after(config, _arrive(0))
  for _ in range(2):
    with pytest.raises(PolicyError):
      scheduler.step(config, state, PrefillDone(1.0, 0, 0))
  good = dataclasses.replace(config, policy=DISTSERVE)
  assert scheduler.step(good, state, PrefillDone(1.0, 0, 0))[1]


def test_a_view_cannot_be_changed():
  seen = []

  def route(view, request):
    for value in (view, view.instances[0], request):
      names = {name for name in dir(value) if not name.startswith('_')}
      for name in names:
        with pytest.raises(AttributeError):
          setattr(value, name, 0)
        seen.append(name)
    assert view.time_s == request.arrival_s == 3.0
    assert view.instances[0].waiting() == () == view.instances[0].pulls()
    return 0

  _after(_config(PAIR, route=route), _arrive(3))
  assert {'time_s', 'backlog', 'prompt_len', 'free_pages'} <= set(seen)


def test_a_view_shows_those_that_wait_from_either_end():
  seen = []

  def route(view, request):
    instance = view.instances[0]
    seen.append([[r.id for r in requests] for requests in (
        instance.waiting(), instance.waiting(2), instance.newest(2))])
    return 0

  _after(_config(('chunked',), route=route, batch=lambda *_: PrefillBudget(0)),
         *(_arrive(id) for id in range(4)))
  assert seen[3] == [[0, 1, 2], [0, 1], [1, 2]]


@pytest.mark.parametrize('roles, tokens, last, begun', [
    (('prefill', 'decode'), 16, 1, 0), (('prefill', 'decode'), 2, 0, 1),
    (('chunked',), 8, 0, 0)])
def test_a_view_shows_prompts_whose_last_tokens_are_in_flight(
    roles, tokens, last, begun):
  """A row where it decodes is one that is there."""
  seen = []

  def route(view, request):
    instance = view.instances[0]
    seen.append((instance.num_last, len(instance.prefilling()),
                 instance.num_rows))
    return 0

  _after(_config(roles, prefill_tokens=tokens, route=route),
         _arrive(0), _arrive(1))
  assert seen == [(0, 0, 0), (last, begun, int(roles == ('chunked',)))]


# --- a policy is asked what is true, and again -------------------------------


def aged(view, instance, waiting):
  return sorted(waiting, key=lambda r: (view.time_s - r.arrival_s < 0.2,
                                        r.prompt_len, r.id))


def most_free(view, request, avoid):
  return max(view.decodes, key=lambda i: (i.free_pages, -i.index)).index


@pytest.mark.parametrize('hooks', [
    dict(order=aged), dict(hand_off=most_free),
    dict(admit=lambda view, instance, request, pages:
         instance.decodes or view.decodes[0].num_rows < 3)],
    ids=lambda hooks: next(iter(hooks)))
def test_a_simulation_is_the_same_with_and_without_a_log(hooks):
  config = dataclasses.replace(
      _config(('prefill', 'decode', 'decode'), num_pages=24, **hooks),
      max_len=80)
  draw = random.Random(0)
  requests = [Request(id, 0.015 * id, range(draw.randint(1, 30)), Sampling(
      max_tokens=draw.randint(1, 40))) for id in range(80)]
  logged, leapt = (simulator.simulate(config, requests, STEP, LINK, log=log)
                   for log in (True, False))
  assert [r.finish_s for r in logged.records] == [
      r.finish_s for r in leapt.records]
  assert all(r.finish_s for r in logged.records)  # back-pressure ends too


# --- the mechanism is safe under any policy ----------------------------------


@pytest.mark.parametrize('seed', range(12))
def test_any_policy_keeps_pages_and_requests(seed):
  """Large worlds with every fault, in random order."""
  rules, faults = explore.large_world(seed)
  config = dataclasses.replace(rules.config, policy=anything(seed))
  assert schedules.walk(Rules(config, rules.requests), faults, seed) > 100


@pytest.mark.parametrize('policy', [
    anything(1), Policy('short', order=shortest_first)],
    ids=lambda policy: policy.name)
@pytest.mark.parametrize('name', ['1P1D', '1 chunked, preemption'])
def test_small_worlds_to_their_ends(name, policy):
  rules, faults = explore.small_worlds()[name]
  config = dataclasses.replace(rules.config, policy=policy)
  transitions, _, whole = schedules.search(Rules(config, rules.requests),
                                           min(faults, 1))
  assert whole and transitions > 500


# --- what an instance may do -------------------------------------------------


def test_a_lost_instance_keeps_its_role():
  config = _config(FREE, tick_s=1.0, resize=lambda view: {0: 'decode'})
  state, commands = _after(config, *TICKED, InstanceDown(3.0, 0),
                           InstanceUp(4.0, 0))
  assert [i.role for i in state.instances] == ['decode', 'chunked']
  assert not commands


def short_prompts_stay(view, request):
  """Short prompts are prefilled where they decode."""
  mixers = [i for i in view.prefills if i.decodes]
  if request.prompt_len <= 4 and mixers:
    return mixers[0].index
  return view.prefills[0].index


MIXED = ('prefill', 'chunked')


def test_a_mixed_placement_hands_long_prompts_to_what_prefills_short_ones():
  config = _config(MIXED, route=short_prompts_stay)
  state, (short, *_) = _after(config, _arrive(0, 3))
  assert short.instance == 1
  state, (long,) = scheduler.step(config, state, _arrive(1, 9))
  assert long.instance == 0
  state, (pull,) = scheduler.step(config, state, PrefillDone(2.0, 0, 0))
  assert (pull.source, pull.target) == (0, 1)
  state, _ = scheduler.step(config, state, PrefillDone(3.0, 1, 0))
  state, _ = scheduler.step(config, state, Migrated(4.0, 1, 1))
  assert {row.id for row in state.instances[1].rows} == {0, 1}
  assert Placement(prefill=[Plan()], chunked=[Plan()]).mode == 'mixed'


def test_a_mixed_world_with_faults():
  config = _config(MIXED, num_pages=4, max_seqs=2, prefill_tokens=4,
                   route=short_prompts_stay)
  config = dataclasses.replace(config, max_len=9, tries=1)
  transitions, _, whole = schedules.search(
      Rules(config, ((2, 4, 2), (5, 3, 0))), 1)
  assert whole and transitions > 500


def test_a_role_is_one_entry_of_a_table(monkeypatch):
  """Nothing asks for a role by its name: what it may do is all there is."""
  def played(role):
    config = _config(('prefill', role), route=short_prompts_stay)
    requests = [Request(id, 0.01 * id, range(3 + 3 * (id % 3)), Sampling(
        max_tokens=6)) for id in range(12)]
    return simulator.simulate(config, requests, STEP, LINK, log=True).log

  monkeypatch.setitem(ROLES, 'flexible', Role(True, True, mixes=True))
  assert played('flexible') == played('chunked')
  monkeypatch.setitem(ROLES, 'flexible', Role(True, True))
  assert played('flexible') == played('colocated') != played('chunked')


@pytest.mark.parametrize('placement, ok', [
    (dict(prefill=1), False), (dict(decode=1), False), ({}, False),
    (dict(colocated=1, decode=1), False), (dict(prefill=1, decode=2), True),
    (dict(prefill=1, chunked=1), True), (dict(colocated=1, chunked=1), True)])
def test_placements_that_can_serve(placement, ok):
  plans = {role: [Plan()] * n for role, n in placement.items()}
  if ok:
    Placement(**plans)
    return
  with pytest.raises(ValueError, match='instances that prefill and'):
    Placement(**plans)


# --- the default -------------------------------------------------------------


def _as_then(entry):
  """An event and its commands without the fields that came later."""
  event, commands = entry
  return _cut(event), tuple(map(_cut, commands))


def _cut(value):
  """`more` of hand-offs, `blocks`, `hit`, `sent`, `kept`, at their defaults."""
  fields = value._asdict()
  if hasattr(value, 'chunks') and value.chunks:
    fields['chunks'] = tuple(map(_cut, value.chunks))
  later = ('blocks', 'hit', 'sent', 'kept',
           *(('more',) * isinstance(value, Migrate | Migrated)))
  kept = [name for name in fields if name not in later]
  assert all(not fields[name] for name in later if name in fields)
  return collections.namedtuple(type(value).__name__, kept)(
      *[fields[name] for name in kept])


def _digest(roles, num_pages):
  instances = tuple(InstanceConfig(role, num_pages, 4, 8, 64, 4)
                    for role in roles)
  draw = random.Random(1)
  requests = [Request(id, 0.02 * id, range(draw.randint(1, 90)), Sampling(
      max_tokens=draw.randint(1, 40))) for id in range(150)]
  log = simulator.simulate(scheduler.Config(instances, 160), requests, STEP,
                           LINK, log=True).log
  text = json.dumps([event_log.encode(_as_then(entry)) for entry in log])
  return hashlib.sha256(text.encode()).hexdigest()[:12]


@pytest.mark.parametrize('roles, want', [
    (('prefill', 'decode'), '7af3cf933630'),
    (('prefill',) * 2 + ('decode',) * 2, 'db915341d86c'),
    (('colocated',) * 2, '885171d2039b'),
    (('chunked',), 'f990dcc096cd')], ids=str)
def test_the_default_decides_as_before_there_were_policies(roles, want):
  """Digests of the logs of the scheduler that had its choices built in."""
  assert _digest(roles, 48) == want
  assert set(roles) <= set(ROLES)

"""One call to simulate, one to search; what they take."""

import dataclasses
import math
import re

import numpy as np
import pytest

import dsjax
from dsjax import workload
from dsjax.config import zoo
from dsjax.config.checks import InputError
from dsjax.config.placement import Placement, Plan, Slo
from dsjax.config.request import Request, Sampling
from dsjax.placement import api, candidates, judging
from dsjax.placement.clusters import Cluster, MixedCluster
from dsjax.simulation import latency, profiles, roofline, simulator
from dsjax.simulation.hardware import HARDWARE
from dsjax.simulation.roofline import Roofline
from tests.common.samples import deep

FAST = latency.Affine((0.01, 1e-5, 0.0), (0.01, 1e-7, 1e-5))
SPLIT = 'prefill=1x1,decode=1x1'


def simulate(placement=SPLIT, **options):
  return api.simulate(placement, **{
      'rate_per_s': 2.0, 'requests': 50, 'lengths': 'humaneval'} | options)


def test_a_placement_is_text_or_a_value():
  text = simulate()
  assert text.records == simulate(Placement.parse(SPLIT)).records
  assert len(text.records) == 50 and len(text.kept) == 40
  share, low, high = text.summary.attainment
  assert low <= share <= high
  assert str(text).startswith(f'{SPLIT}: {share:.0%} of 40 requests met both')


def test_every_form_of_a_latency_gives_the_same_run(tmp_path):
  profile = profiles.Profile('OPT 13B', 'd', {Plan(): FAST})
  path = tmp_path / 'latency.json'
  profiles.save(path, profile)
  runs = [simulate(latency=form).records for form in (
      FAST, profile, str(path), {Plan(): FAST}.get)]
  assert all(run == runs[0] for run in runs)
  assert runs[0] != simulate(latency='published').records


def test_model_is_a_name_or_a_config():
  assert simulate(model=zoo.config('opt-13b')).records == simulate().records
  assert simulate(model='llama-3-8b', latency='roofline:h100-80g'
                  ).summary.attainment[0] > 0.9


def test_requests_of_one_s_own_come_at_their_times():
  own = [Request(i, 0.5 * i, range(20 + i), Sampling(
      max_tokens=4, ignore_eos=True)) for i in range(30)]
  records = simulate(lengths=own, rate_per_s=None).records
  assert [r.arrival_s for r in records] == [r.arrival_s for r in own]
  assert [r.prompt_len for r in records] == [len(r.prompt) for r in own]


@pytest.mark.parametrize('field, value, message', [
    *(('arrival_s', value, 'Request.arrival_s=.*seconds')
      for value in (math.nan, math.inf, -1.0, None, True, '1')),
    *(('id', value, 'Request.id=') for value in (0, -1, None, 1.5, 'x')),
    *(('prompt', value, 'Request.prompt=') for value in ((), None, 7, 'text')),
    *(('sampling', value, '[sS]ampling') for value in (
        None, Sampling(), {'max_tokens': 4}))])
def test_a_bad_request_of_one_s_own_is_named(field, value, message):
  good = Request(0, 0.0, range(20), Sampling(max_tokens=4))
  bad = dataclasses.replace(good, **{'id': 1, field: value})
  with pytest.raises(InputError, match=rf'lengths\[1\], .*{message}'):
    simulate(lengths=[good, bad], rate_per_s=None)


@pytest.mark.parametrize('call', [simulate, api.search, api.make_problem])
def test_lengths_of_two_kinds_are_refused_by_index(call):
  own = Request(0, 0.0, range(20), Sampling(max_tokens=4))
  for mixed in ([own, (3, 4)], [(3, 4), own]):
    with pytest.raises(InputError, match=r'lengths\[[01]\]=.*must be'):
      call(lengths=mixed)
  with pytest.raises(InputError, match=r'lengths\[0\]\.prompt_len=nan'):
    call(lengths=[(math.nan, 4)])


def test_explain_needs_the_log():
  with pytest.raises(InputError, match='log=True'):
    simulate().explain()
  busy = {'rate_per_s': 30.0, 'slo': Slo(0.1, 0.1), 'requests': 200}
  run = simulate('chunked=1x1', log=True, **busy)
  assert run.log and run.records == simulate('chunked=1x1', **busy).records
  causes = run.explain().causes
  assert sum(causes.values()) == len(run.explain().misses) > 0
  assert run.unsteady


def test_what_can_be_changed_changes_the_run():
  base = simulate().records
  for change in ({'seed': 1}, {'process': 'uniform'}, {'host_ms': 9.0},
                 {'rate_per_s': 3.0}, {'aligned': False, 'cluster':
                                       api.Cluster(inter_bytes_per_s=1e8)},
                 {'process': 'gamma', 'cv': 3.0}, {'max_seqs': 1},
                 {'depth': 1, 'run_ahead': 1}):
    assert simulate(**change).records != base, change
  chunked = [simulate('chunked=1x1', lengths='longbench', chunk=size).records
             for size in (512, 1024)]
  assert chunked[0] != chunked[1]


@pytest.mark.parametrize('options, message', [
    ({'placement': 'both=1x1'}, 'placement='), ({'model': 'opt-14b'}, 'model='),
    ({'latency': 'fast'}, "latency='fast'"), ({'latency': 3}, 'latency=3'),
    ({'lengths': 'chats'}, "lengths='chats'"), ({'host_ms': -1}, 'host_ms'),
    ({'rate_per_s': None}, 'rate_per_s'), ({'process': 'daily'}, 'process'),
    ({'placement': 'colocated=8x1'}, 'a plan with latencies'),
    ({'latency': FAST, 'placement': 'colocated=1x2'}, 'a plan with lat')])
def test_bad_input_names_its_field(options, message):
  with pytest.raises(InputError, match=message):
    simulate(**options)


def test_search():
  seen = []
  answer = api.search(devices=2, lengths='fixed:300x5', latency=FAST,
                      slo=Slo(0.1, 0.03), requests=20, tolerance=0.5,
                      effort=1.0, chunks=(512,), report=seen.append)
  assert answer.rows and 'device' in answer.verdict
  # A line for people: report=print.
  assert re.fullmatch(r'\d+ of \d+ candidates, \d+ by bounds, \d+ '
                      r'simulations; best .*=1x1: [0-9.]+ requests/s a device',
                      str(seen[-1]))
  # What takes long says so as it begins: every mode once, before its line.
  begun = [n for n, now in enumerate(seen) if now.doing]
  assert 'the intervals of' in str(seen[begun[0]])
  assert begun[-1] < len(seen) - 1
  for mode in ('disaggregated', 'colocated', 'chunked'):
    assert any(mode in seen[n].doing for n in begun)
  modes = {row.placement.mode for row in answer.rows}
  assert modes == {'disaggregated', 'colocated', 'chunked'}
  with pytest.raises(InputError, match="algorithms='best'"):
    api.search(algorithms=('best',))


@pytest.mark.parametrize('change, text', [
    (dict(policy='distserve'), 'policy='), (dict(slo=(0.1, 0.1)), 'slo='),
    (dict(placement=5), 'placement=5'), (dict(depth=0), 'depth=0'),
    (dict(run_ahead=1.5), 'run_ahead=1.5'), (dict(cluster=5), 'cluster=5'),
    (dict(contention='x'), "contention='x': must be a Contention, such as"),
    (dict(max_len='x'), 'max_len='), (dict(aligned='x'), "aligned='x'"),
    (dict(log=1), 'log=1'), (dict(cut=None), 'cut=None: must be True or'),
    (dict(max_seqs=0), 'max_seqs=0'), (dict(requests=0), 'requests=0'),
    (dict(chunk=True), 'chunk=True'),
    (dict(latency='nowhere.json'),
     "=nowhere.json: cannot be read.*published")])
def test_what_simulate_is_given_is_named(change, text):
  with pytest.raises(InputError, match=text):
    dsjax.simulate(**dict(placement='colocated=1x1', rate_per_s=1.0,
                          requests=20) | change)


@pytest.mark.parametrize('change, text', [
    (dict(algorithms=()), r'algorithms=\(\)'), (dict(chunks=(0,)), 'chunks='),
    (dict(algorithms='low'), "algorithms='low'"), (dict(slo=1), 'slo=1'),
    (dict(policy=None), 'policy=None'), (dict(cut='no'), "cut='no'")])
def test_what_search_is_given_is_named(change, text):
  with pytest.raises(InputError, match=text):
    dsjax.search(**change)


def test_requests_that_never_end_are_told():
  stuck = dataclasses.replace(dsjax.DISTSERVE, admit=lambda *_: False)
  result = dsjax.simulate('colocated=1x1', rate_per_s=1.0, requests=20,
                          policy=stuck)
  assert '20 requests never ended' in str(result)


def test_what_a_trace_without_a_span_takes():
  for entries in ([workload.Entry(0.0, 50, 4)],
                  [workload.Entry(3.0, 50, 4)] * 40):
    run = simulate(lengths=entries, process='trace', rate_per_s=None,
                   requests=40)
    assert len(run.records) == len(entries)
    assert len({r.arrival_s for r in run.records}) == 1
    assert str(run).startswith(f'{SPLIT}: ')
    with pytest.raises(InputError, match="kind='trace'.*at one time"):
      simulate(lengths=entries, process='trace', rate_per_s=2.0)


@pytest.mark.parametrize('algorithms', [
    ('low',), *deep((('colocated',),), (('high',),))])
def test_outputs_of_one_token_leave_decode_without_work(algorithms):
  answer = api.search(devices=2, lengths=[(100, 1), (200, 1)], latency=FAST,
                      slo=Slo(0.25, 1e-9), requests=20, tolerance=0.5,
                      effort=1.0, chunks=(512,), algorithms=algorithms)
  # A prompt of 150 tokens on average takes 11.5 ms alone, batches save most.
  for row in answer.rows:
    prefills = len(row.placement.prefill) or 1
    assert row.goodput.rate_per_s <= prefills * 32 / 0.01
  assert answer.rows[0].per_device > 5


@pytest.mark.parametrize('slo', [
    Slo(math.inf, math.inf), *deep(Slo(math.inf, 0.05), Slo(1.0, math.inf))])
def test_loose_objectives_are_bounded_work(monkeypatch, slo):
  sizes = []

  def counted(run):
    def start(config, requests, *args, **options):
      place = len(sizes)
      sizes.append(0)

      def counting():
        for request in requests:
          sizes[place] += 1
          yield request
      return run(config, counting(), *args, **options)
    return start
  for name in ('simulate', 'stream'):
    monkeypatch.setattr(simulator, name, counted(getattr(simulator, name)))
  monkeypatch.setattr(judging, 'MOST_REQUESTS', 100)
  answer = api.search(devices=2, lengths='fixed:300x5', latency=FAST,
                      slo=slo, requests=25, tolerance=0.5, effort=4.0,
                      chunks=(512,))
  # Four times 100, and four times more for the best of each mode.
  assert max(sizes) <= 1600 and sum(sizes) < 60_000
  assert answer.rows[0].per_device > 10
  # It says what it judged by: a tenth of what 100 requests take, and no less
  # than what a busy instance does.
  met = re.search(r'was to meet a TTFT of (\S+) s and a TPOT of (\S+) s',
                  answer.verdict)
  assert met and all(map(math.isfinite, map(float, met.groups())))


@pytest.mark.slow
def test_a_queue_that_grows_misses_objectives_that_are_loose():
  # One prompt at a time, a second each; two a second is a queue that grows.
  single = latency.Affine((1.0, 0.0, 0.0), (1e-3, 0.0, 0.0))
  problem = api.make_problem(
      slo=Slo(math.inf, math.inf), lengths='fixed:100x2', latency=single,
      prefill_seqs=1, requests=60, most_requests=60)
  task = judging.Task(judging.Candidate(
      Placement(colocated=[Plan()]), None, False, 4.0), 0.9)
  assert judging.measure(problem, task).rate_per_s == pytest.approx(
      1.0, rel=0.2)


def test_a_tight_objective_is_judged_as_it_is():
  problem = api.make_problem(lengths='fixed:300x20', latency=FAST)
  candidate = judging.Candidate(
      Placement(colocated=[Plan()]), None, False, 500.0)
  system = judging.setup(problem, candidate)
  # 20 tokens of 0.1 s, ten times.
  judge = judging.Judge(problem, system, 500.0)
  for rate_per_s in (5.0, 50.0, 500.0):
    assert judge.objectives(rate_per_s) == problem.slo
    assert not judging.loosened(problem, candidate, rate_per_s)
    assert judge.length(rate_per_s) == max(
        problem.requests, rate_per_s * 10 * 2)
  assert judge.length(0.1) == problem.requests
  # More than LONGEST times the most requests: loose at such rates.
  loose = judging.Judge(problem, system, 3000.0)
  assert loose.length(3000.0) == loose.most
  assert loose.objectives(3000.0).tpot_s < problem.slo.tpot_s


def test_a_prefix_cache_is_simulated_where_requests_may_hit():
  problem = api.make_problem(lengths='fixed:300x20', latency=FAST, requests=40,
                             most_requests=80, tolerance=0.5)
  own = dataclasses.replace(
      problem, workload=lambda rate_per_s, n: problem.workload(rate_per_s, n))
  candidate = judging.Candidate(Placement(colocated=[Plan()]), None, False,
                                20.0, guess_per_s=10.0)
  caches, answers = zip(*[
      (judging.setup(p, candidate).config.prefix_cache,
       judging.measure(p, judging.Task(candidate, 0.9)))
      for p in (problem, own)], strict=True)
  assert caches == (False, True)
  assert answers[0] == answers[1] and answers[0].rate_per_s > 0


def test_a_profile_of_another_model_is_refused(tmp_path):
  path = tmp_path / 'latency.json'
  profile = profiles.Profile('llama-3-8b', 'd', {Plan(): FAST})
  profiles.save(path, profile)
  for form in (profile, str(path)):
    for call in (lambda form: simulate(latency=form),
                 lambda form: api.search(latency=form)):
      with pytest.raises(InputError, match='llama-3-8b.*opt-13b') as error:
        call(form)
      assert form is profile or str(path) in str(error.value)
  assert simulate(latency=profile, model='llama-3-8b').records


@pytest.mark.parametrize('weight, kv', [(2, 2), (1, 2), (2, 1), (4, 4)])
def test_memory_and_hand_offs_go_by_the_bytes_of_a_profile(
    tmp_path, weight, kv):
  profile = profiles.Profile('opt-13b', 'd', {Plan(): FAST},
                             bytes_per_weight=weight, bytes_per_kv=kv)
  profiles.save(tmp_path / 'a.json', profile)
  own = zoo.config('opt-13b')
  for form in (profile, str(tmp_path / 'a.json'), Roofline(
      own, HARDWARE['a100-80g'], itemsize=weight, kv_itemsize=kv)):
    problem = api.make_problem(latency=form, lengths='fixed:300x5')
    room = (candidates.USABLE * problem.cluster.memory_bytes
            - candidates.RESERVE_BYTES - roofline.num_params(own) * weight)
    token = 2 * own.num_layers * own.d_model * kv
    assert candidates.kv_tokens(problem, Plan()) == room // token
    placement = Placement.parse('prefill=1x1,decode=1x1')
    assert candidates.link_of(problem, True, placement).kv_bytes == token


def test_kv_of_one_cluster_is_stored_alike():
  of = {kind: dataclasses.replace(Cluster(), latency=profiles.Profile(
      'opt-13b', 'd', {Plan(): FAST}, bytes_per_kv=size))
        for kind, size in (('a', 2), ('b', 1))}
  with pytest.raises(InputError, match='MixedCluster.kinds.*same bytes'):
    api.make_problem(cluster=MixedCluster(of))


def test_measured_links_are_used_inside_a_node():
  slow = latency.Link(0.5, 1e9, 1e3)
  profile = profiles.Profile('opt-13b', 'd', {Plan(): FAST},
                             {(Plan(), Plan()): slow})
  near, far = (simulate(latency=profile, aligned=aligned)
               for aligned in (True, False))
  bare = simulate(latency=FAST)
  assert near.summary.stage_s['migrate'] > 0.5
  assert far.summary.stage_s['migrate'] < 0.5
  assert bare.summary.stage_s['migrate'] < 0.1
  answers = [api.search(devices=2, lengths='fixed:300x5', latency=form,
                        slo=Slo(0.4, 0.03), requests=20, tolerance=0.5,
                        effort=1.0, chunks=(512,), algorithms=('low',)).rows
             for form in (profile, profile.latencies.get)]
  assert not any(r.goodput.rate_per_s for r in answers[0])
  assert answers[1][0].goodput.rate_per_s


@pytest.mark.parametrize('lengths', ['file', 'fixed:2000x100',
                                     [(2000, 100), (10, 10)]])
def test_requests_beyond_the_context_are_refused_or_cut(tmp_path, lengths):
  if lengths == 'file':
    lengths = str(tmp_path / 'azure.csv')
    (tmp_path / 'azure.csv').write_text(
        'TIMESTAMP,ContextTokens,GeneratedTokens\n'
        '2023-11-16 18:15:46,2000,100\n2023-11-16 18:15:47,9,3\n')
  for call in (simulate, lambda **options: api.search(**options)):
    with pytest.raises(InputError, match='lengths=2100.*2048.*opt-13b.*cut='):
      call(lengths=lengths)
  run = simulate(lengths=lengths, cut=True)
  assert run.cut == 1 and '1 lengths cut' in str(run)
  assert max(r.prompt_len + r.max_tokens for r in run.records) == 2048
  assert all(r.status == 'length' for r in run.records)
  short = simulate(lengths=[(10, 10)], max_len=12, cut=True)
  assert {(r.prompt_len, r.max_tokens) for r in short.records} == {(2, 10)}
  with pytest.raises(InputError, match='asked for'):
    simulate(lengths=[(10, 10)], max_len=12)


def test_a_mixture_beyond_the_context_is_told():
  problem = api.make_problem(lengths='longbench')
  assert re.match(r'\d+ of 4096 lengths are beyond.*2048.*--cut',
                  api.note(problem))
  assert 'are cut' in api.note(api.make_problem(lengths='longbench', cut=True))
  assert api.note(api.make_problem(lengths='humaneval')) == ''


@pytest.mark.parametrize('options, message', [
    (dict(model='llama-3-8b'), 'opt-13b, opt-66b; roofline:.*h100-80g'),
    (dict(model='opt-66b', devices=1), r'\(1x1\); there are latencies of 2x1'),
    (dict(devices=1, algorithms=('low',)), 'disaggregation takes 2 devices'),
    (dict(devices=1, algorithms=('high',)), 'disaggregation takes 2 devices'),
    (dict(devices=1, nodes=2, algorithms=('low',)), 'in a node of 1 devices'),
    (dict(chunks=(256,)), r'chunks=\(256,\).*above max_seqs=256'),
    (dict(chunks=()), r'chunks=\(\)'), (dict(host_ms=-5), 'host_ms=-5'),
    (dict(host_ms=math.nan), 'host_ms=nan'), (dict(cv=math.nan), 'cv=nan'),
    (dict(tolerance=math.nan), 'tolerance=nan'),
    (dict(target=math.nan), 'target=nan'),
    (dict(rate_per_s=math.nan), 'rate_per_s=nan')])
def test_the_reason_of_a_refused_search_is_the_true_one(options, message):
  with pytest.raises(InputError, match=message):
    api.search(**options)


def test_the_floor_of_an_empty_system_is_not_blamed_on_queues():
  why = simulate('colocated=1x1,1x1,1x1', lengths='sharegpt', requests=200,
                 log=True).explain()
  assert why.causes['alone'] > len(why.misses) / 2
  assert why.advice.startswith('a faster prefill (larger tp) or a looser TTFT')


def test_numpys_numbers_are_taken():
  slo = dsjax.Slo(0.25, 0.125)
  given = {'rate_per_s': 2, 'requests': 30, 'seed': 3, 'host_ms': 0.3,
           'max_seqs': 64}
  numpys = {name: np.array(value)[()] for name, value in given.items()}
  want, got = (dsjax.simulate('prefill=1x1,decode=1x1', slo=slo, **options)
               for options in (given, numpys))
  assert want.records == got.records
  numpys['host_ms'] = np.float32(0.5)  # has fewer digits than their sum
  want, got = (dsjax.simulate('prefill=1x1,decode=1x1', slo=slo, **options)
               for options in (given | {'host_ms': 0.5}, numpys))
  assert want.records == got.records
  for name in given:
    for wrong in (True, np.bool_(True), np.array(5), '5'):
      with pytest.raises(dsjax.InputError, match=f'{name}='):
        dsjax.simulate('prefill=1x1,decode=1x1', **given | {name: wrong})


@dataclasses.dataclass(frozen=True)
class Constant:
  """A latency of one's own; what its steps take may be no seconds."""

  step_s: object
  host_s: object = 0.0
  pp: int = 1

  def prefill_s(self, pieces):
    return self.step_s

  def decode_line(self, batch):
    return self.step_s, 0.0

  def decode_s(self, batch, context):
    return self.step_s

  def mixed_s(self, pieces, batch, context):
    return self.step_s


@pytest.mark.parametrize('own', [
    *map(Constant, (math.nan, math.inf, -1.0, 'fast', None, (1.0,))),
    Constant(0.01, math.nan), lambda plan: Constant(-1.0),
    lambda plan: 'fast', Constant])
def test_seconds_that_are_none_are_named(own):
  for ask in (lambda: dsjax.simulate(SPLIT, rate_per_s=1.0, requests=20,
                                     latency=own),
              lambda: dsjax.search(devices=2, latency=own)):
    with pytest.raises(InputError, match=r'^latency.*=.*must be '):
      ask()


def test_a_latency_of_ones_own_is_simulated():
  result = dsjax.simulate(SPLIT, rate_per_s=1.0, requests=20,
                          latency=Constant(np.float64(0.01)))
  assert result.summary.attainment[0] == 1.0

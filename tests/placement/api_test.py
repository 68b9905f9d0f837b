"""One call to simulate, one to search; what they take."""

import dataclasses

import pytest

import dsjax
from dsjax.config import zoo
from dsjax.config.checks import InputError
from dsjax.config.placement import Placement, Plan, Slo
from dsjax.config.request import Request, Sampling
from dsjax.placement import api
from dsjax.simulation import latency, profiles

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
  answer = api.search(devices=2, lengths='fixed:300x20', latency=FAST,
                      slo=Slo(1.0, 0.1), requests=20, tolerance=0.5,
                      chunks=(512,), report=seen.append)
  assert answer.rows and seen and 'requests/s' in answer.verdict
  modes = {row.placement.mode for row in answer.rows}
  assert modes == {'disaggregated', 'colocated', 'chunked'}
  with pytest.raises(InputError, match="algorithms='best'"):
    api.search(algorithms=('best',))


@pytest.mark.parametrize('change, text', [
    (dict(policy='distserve'), 'policy='), (dict(slo=(0.1, 0.1)), 'slo='),
    (dict(placement=5), 'placement=5'), (dict(depth=0), 'depth=0'),
    (dict(run_ahead=1.5), 'run_ahead=1.5'), (dict(cluster=5), 'cluster=5'),
    (dict(contention='x'), "contention='x'"), (dict(max_len='x'), 'max_len='),
    (dict(max_seqs=0), 'max_seqs=0'), (dict(requests=0), 'requests=0'),
    (dict(chunk=True), 'chunk=True')])
def test_what_simulate_is_given_is_named(change, text):
  with pytest.raises(InputError, match=text):
    dsjax.simulate(**dict(placement='colocated=1x1', rate_per_s=1.0,
                          requests=20) | change)


@pytest.mark.parametrize('change, text', [
    (dict(algorithms=()), r'algorithms=\(\)'), (dict(chunks=(0,)), 'chunks='),
    (dict(algorithms='low'), "algorithms='low'"), (dict(slo=1), 'slo=1'),
    (dict(policy=None), 'policy=None')])
def test_what_search_is_given_is_named(change, text):
  with pytest.raises(InputError, match=text):
    dsjax.search(**change)


def test_requests_that_never_end_are_told():
  stuck = dataclasses.replace(dsjax.DISTSERVE, admit=lambda *_: False)
  result = dsjax.simulate('colocated=1x1', rate_per_s=1.0, requests=20,
                          policy=stuck)
  assert '20 requests never ended' in str(result)

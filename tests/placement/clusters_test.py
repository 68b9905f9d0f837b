"""Clusters of several kinds: what is read, what KV crosses, what wins."""

import dataclasses
import json
import pickle

import jax
import pytest

import dsjax
from dsjax.config.checks import InputError
from dsjax.config.placement import Placement, Plan, Slo
from dsjax.model import sharding
from dsjax.placement import algorithms, api, candidates, clusters, search
from dsjax.placement.clusters import Border, Cluster, MixedCluster
from dsjax.simulation import latency, roofline
from dsjax.simulation.hardware import HARDWARE, Hardware, Shares
from tests.common import tiny
from tests.common.samples import deep

GPU = Hardware('own', 1e14, 1e12, 40e9, 3e10, 1e10, shares=Shares(0.5, 0.5))
# One prefills fast and decodes slowly, the other the reverse.
STRONG = latency.Affine((0.002, 5e-5, 0.0), (0.05, 0.0, 1e-4))
WIDE = latency.Affine((0.05, 5e-4, 0.0), (0.008, 0.0, 1e-5))
MODEL = dataclasses.replace(tiny.CONFIG, max_len=512)


def only(own):
  return lambda plan: own if plan == Plan() else None


def mixed(bytes_per_s=1e9, **changes):
  return MixedCluster(
      {'strong': Cluster(1, 2, latency=only(STRONG), **changes),
       'wide': Cluster(2, 1, memory_bytes=40e9, latency=only(WIDE))},
      {('strong', 'wide'): Border(bytes_per_s, 0.001)})


def ask(cluster, algorithm=('low', 'colocated'), **changes):
  return api.search(MODEL, cluster=cluster, slo=Slo(0.1, 0.02),
                    lengths='fixed:200x20', requests=40, tolerance=0.3,
                    effort=1.0, chunks=(64,), max_seqs=16, replicas=1,
                    algorithms=algorithm, **changes)


@pytest.mark.parametrize('algorithm', ('low', *deep('high')))
def test_each_phase_goes_to_the_devices_that_suit_it(algorithm):
  answer = ask(mixed(), (algorithm, 'colocated'))
  best = answer.rows[0].placement
  assert set(best.instances) == {('prefill', Plan(kind='strong')),
                                 ('decode', Plan(kind='wide'))}
  assert answer.verdict.startswith('Only disaggregated placements')
  for row in answer.rows:
    assert clusters.fits(mixed(), row.placement)


def test_kv_crosses_the_border_that_is_between_the_kinds():
  """Of 200 tokens, at a byte rate where they take a second."""
  kv_bytes = 200 * MODEL.kv_bytes_per_token(2)
  slow = mixed(kv_bytes)
  took = dsjax.simulate(
      'prefill=1x1@strong,decode=1x1@wide', MODEL, cluster=slow,
      lengths='fixed:200x20', rate_per_s=0.01, requests=20, max_seqs=16)
  assert min(record.stage_s['migrate'] for record in took.records) == (
      pytest.approx(1.001, rel=1e-6))
  assert not any(r.goodput.rate_per_s for r in ask(slow, ('low',)).rows)


@pytest.mark.parametrize('source, target, aligned, rate', (
    ('a', 'a', True, 5.0), ('a', 'a', False, 3.0), ('b', 'b', False, 2.0),
    ('a', 'b', True, 7.0), ('b', 'a', False, 7.0), ('a', 'c', True, 1.0),
    ('c', 'b', False, 9.0), ('b', 'c', True, 8.0)))
def test_borders(source, target, aligned, rate):
  cluster = MixedCluster(
      {'a': Cluster(2, 2, 1e9, 5.0, 3.0), 'b': Cluster(2, 2, 1e9, 6.0, 2.0),
       'c': Cluster(1, 1, 1e9, 4.0, 1.0, hand_off_s=0.5)},
      {('a', 'b'): Border(7.0), ('b', 'c'): Border(8.0),
       ('c', 'b'): Border(9.0)})
  crossed = clusters.border(cluster, Plan(kind=source), Plan(kind=target),
                            aligned)
  assert crossed.bytes_per_s == rate
  assert crossed.hand_off_s == (0.5 if rate == 1.0 else 1e-3)


def test_an_instance_has_the_memory_and_latency_of_its_kind():
  problem = api.make_problem(
      'llama-3-8b', lengths='fixed:200x20', cluster=MixedCluster({
          'big': Cluster.of(latency='tables:h200-141g'),
          'own': Cluster.of(latency=GPU), 'asked': Cluster.of(GPU)}),
      latency='roofline:l40s-48g')
  pages, late = [], []
  for kind in ('big', 'own', 'asked'):
    config, (seconds,), _ = candidates.build(
        problem, Placement(colocated=[Plan(1, 1, kind)]))
    pages.append(candidates.kv_tokens(problem, Plan(1, 1, kind)))
    late.append(seconds)
    assert config.instances[0].prefill_tokens
  assert pages[0] > 4 * pages[1] > 0 and pages[1] == pages[2]
  assert isinstance(late[0], latency.Affine)
  assert isinstance(late[1], roofline.Roofline)
  assert isinstance(late[2], roofline.Roofline)
  assert late[1].hardware == GPU and late[1].shares == GPU.shares
  assert late[2].hardware == HARDWARE['l40s-48g']
  assert pickle.loads(pickle.dumps(problem)).cluster == problem.cluster
  with pytest.raises(InputError, match="Plan.kind='tpu': must be one of"):
    candidates.build(problem, Placement(colocated=[Plan(1, 1, 'tpu')]))
  with pytest.raises(InputError, match='1x1@own.* 40 GB a device'):
    candidates.build(dataclasses.replace(problem, itemsize=16), Placement(
        colocated=[Plan(1, 1, 'own')]))


def test_plans_stay_on_devices_of_their_kind():
  problem = api.make_problem('opt-13b', cluster=MixedCluster(
      {'a': Cluster(1, 4), 'b': Cluster(3, 2)}))
  plans = candidates.plans(problem, 99)
  assert max(p.num_devices for p in plans if p.kind == 'a') == 4
  assert {p.tp for p in plans if p.kind == 'b'} == {1, 2}
  assert Plan(1, 5, 'b') in plans and Plan(1, 5, 'a') not in plans
  state = search._Search(problem, None, map)
  tried = []
  state.race = lambda some, *_: tried.extend(some)
  algorithms.low_affinity(state)
  assert all(clusters.fits(problem.cluster, c.placement) for c in tried)
  assert len({(c.placement.prefill[0].kind, c.placement.decode[0].kind)
              for c in tried}) == 4


@pytest.mark.parametrize('price, winner', ((1.0, 'a'), (4.0, 'b')))
def test_goodput_counts_by_price(price, winner):
  cluster = MixedCluster({
      'a': Cluster(1, 4, latency=only(WIDE), price=price),
      'b': Cluster(1, 1, latency=only(dataclasses.replace(
          WIDE, prefill=(0.1, 1e-3, 0.0))))})
  problem = api.make_problem(
      MODEL, Slo(2.0, 0.5), 'fixed:200x20', cluster=cluster, requests=60,
      tolerance=0.3, max_seqs=16)
  told: list[search.Progress] = []
  state = search._Search(problem, told.append, map)
  tried = [state.candidate(Placement(colocated=[Plan(kind=kind)]))
           for kind in 'ab']
  assert [c.devices for c in tried] == [price, 1.0]
  best, _ = state.race(tried)
  assert best.placement == Placement(colocated=[Plan(kind=winner)])
  unit = 'device' if price == 1 else 'unit of price'
  assert clusters.unit(cluster) == unit
  assert str(told[-1]).endswith(f' requests/s a {unit}')
  assert clusters.price(cluster, Plan(1, 3, 'a'), Plan(2, 1, 'b')) == (
      3 * price + 2)


# --- text and files -----------------------------------------------------------


def test_the_text_of_a_placement_names_kinds():
  text = 'prefill=2x1@fast,1x1@fast,decode=1x2@a100-80g.b'
  kinds = ('fast', 'a100-80g.b')
  placement = Placement.parse(text, kinds=kinds)
  assert str(placement) == text
  assert placement.decode == (Plan(1, 2, 'a100-80g.b'),)
  for wrong in ('colocated=1x1', 'colocated=1x1@', 'colocated=1x1@slow'):
    with pytest.raises(InputError, match="@KIND with KIND of .'fast', 'a100"):
      Placement.parse(wrong, kinds=kinds)
  with pytest.raises(InputError, match='must be role=TPxPP, '):
    Placement.parse(text)
  with pytest.raises(InputError, match="--plans='1x1@fast'"):
    Plan.parse('1x1@fast', '--plans')
  for kind in ('a b', '@', 3, 'a,b'):
    with pytest.raises(InputError, match='Plan.kind='):
      Plan(1, 1, kind)


def test_what_serves_has_devices_of_one_kind():
  with pytest.raises(InputError, match="Plan.kind=.*must be ''"):
    sharding.make_meshes(tiny.CONFIG, Placement(
        colocated=[Plan(kind='fast')]), jax.devices())


WHOLE = {
    'kinds': {
        'fast': {'devices_per_node': 4, 'latency': 'tables:h100-80g',
                 'price': 2.5},
        'slow': {'nodes': 2, 'memory_bytes': 3e10, 'latency': {
            'name': 'own', 'flop_per_s': 1e14, 'bytes_per_s': 1e12,
            'memory_bytes': 40e9, 'link_bytes_per_s': 3e10,
            'node_bytes_per_s': 1e10,
            'shares': {'compute': 0.5, 'memory': 0.5}}},
        'plain': {}},
    'links': {'fast>slow': {'bytes_per_s': 1e9, 'hand_off_s': 0.0}}}


def test_a_file_of_kinds(tmp_path):
  path = tmp_path / 'my.json'
  path.write_text(json.dumps(WHOLE))
  assert clusters.load(str(path), 'roofline:l40s-48g') == MixedCluster(
      {'fast': Cluster(1, 4, 85e9, 450e9, 50e9, host_bytes_per_s=64e9,
                       latency='tables:h100-80g', price=2.5),
       'slow': Cluster(2, 8, 3e10, 3e10, 1e10, latency=GPU),
       'plain': Cluster.of('roofline:l40s-48g')},
      {('fast', 'slow'): Border(1e9, 0.0)})


def without(*at, **put):
  """The file with a field less, or others put."""
  whole = json.loads(json.dumps(WHOLE))
  inner = whole
  for name in at[:-1]:
    inner = inner[name]
  if put:
    inner[at[-1]] = {**inner[at[-1]], **put} if put != {'_': 0} else 0
  else:
    del inner[at[-1]]
  return whole


@pytest.mark.parametrize('data, message', (
    (without('kinds'), "MixedCluster.kinds={}: must be names"),
    (without('kinds', 'slow'), r"MixedCluster.links=\('fast', 'slow'\)"),
    (without('kinds', _=0), 'kinds=0: must be an object'),
    (without('links', _=0), 'links=0: must be an object'),
    (without('kinds', 'fast', _=0), r"kinds.fast=0: must be an object with"),
    (without('kinds', 'fast', nodes=0), 'kinds.fast: Cluster.nodes=0'),
    (without('kinds', 'fast', price=0), 'kinds.fast: Cluster.price=0'),
    (without('kinds', 'fast', gpus=1), "kinds.fast: field='gpus'.*'nodes'"),
    (without('kinds', 'fast', latency=3), 'kinds.fast: latency=3'),
    (without('kinds', 'slow', 'latency', 'name'), 'kinds.slow: latency: Har'),
    (without('kinds', 'slow', 'latency', flop_per_s='x'),
     "Hardware.flop_per_s='x': must be a number above 0"),
    (without('kinds', 'slow', 'latency', shares=2), 'Hardware.shares=2'),
    (without('kinds', 'slow', 'latency', shares={'compute': 0}),
     'Hardware.shares.compute=0: must be above 0'),
    (without('kinds', 'slow', 'latency', cores=2), "Hardware: field='cores'"),
    (without('links', **{'fast-slow': {'bytes_per_s': 1}}),
     "links='fast-slow': must be 'KIND>KIND'"),
    (without('links', **{'fast>fast': {'bytes_per_s': 1}}),
     r"MixedCluster.links=\('fast', 'fast'\)"),
    (without('links', 'fast>slow', 'bytes_per_s'), 'bytes_per_s: must be pre'),
    (without('links', 'fast>slow', bytes_per_s=-1), 'Border.bytes_per_s=-1'),
    (without('links', 'fast>slow', hand_off_s=None), 'Border.hand_off_s=None'),
    (without('links', 'fast>slow', lanes=2), "field='lanes'.*'bytes_per_s'"),
    (dict(WHOLE, nodes=2), "field='nodes': must be one of .'kinds', 'links'"),
    (dict(WHOLE, kinds={'a b': {}}), "MixedCluster.kinds='a b'")))
def test_bad_files_of_kinds(tmp_path, data, message):
  path = tmp_path / 'my.json'
  path.write_text(json.dumps(data))
  with pytest.raises(InputError, match=message) as error:
    clusters.load(str(path), 'published')
  assert str(error.value).startswith(str(path))


def test_a_latency_that_a_kind_does_not_have_names_the_kind():
  for named in ('tables:tpu', 'nowhere.json', 'published'):
    cluster = MixedCluster({'odd': Cluster(latency=named)})
    with pytest.raises(InputError, match='MixedCluster.kinds.odd: latency='):
      api.make_problem('llama-3-8b', cluster=cluster)

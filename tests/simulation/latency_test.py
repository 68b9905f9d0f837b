"""Seconds of steps: forms, counts, what they imply, files."""

import dataclasses
import json
import math
import pathlib

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.checkpoints import checkpoint
from dsjax.config import zoo
from dsjax.config.checks import InputError
from dsjax.config.model import ModelConfig
from dsjax.config.placement import Plan
from dsjax.simulation import hardware, latency, profiles, roofline
from dsjax.simulation.contention import Contention
from dsjax.simulation.hardware import Shares
from dsjax.simulation.latency import Affine, Buckets, Costs, Link
from dsjax.simulation.profiles import Profile
from dsjax.simulation.roofline import Roofline
from tests.common import tiny

SIMPLE = Affine((1.0, 0.1, 0.01), (2.0, 0.001, 0.05))
A100 = hardware.HARDWARE['a100-80g']
PIECES = st.lists(st.tuples(st.integers(0, 300), st.integers(1, 300)).map(
    lambda x: (x[0], x[0] + x[1])), max_size=4).map(tuple)
CONSTANT = st.floats(0, 1)
AFFINES = st.builds(
    Affine, st.tuples(CONSTANT, CONSTANT, CONSTANT),
    st.tuples(CONSTANT, CONSTANT, CONSTANT),
    buckets=st.sampled_from([Buckets(), Buckets((32, 64, 2048), (1, 8, 16),
                                                (4, 16))]))
MOE = zoo.config('mixtral-8x7b')
CONFIGS = [zoo.config(n) for n in ('opt-13b', 'llama-3-8b', 'mixtral-8x7b',
                                   'gemma-2-9b', 'qwen3-30b-a3b')]


def test_affine_by_hand():
  assert SIMPLE.prefill_s(((0, 10), (20, 25))) == pytest.approx(
      1 + 1.5 + 0.01 * (100 + 625 - 400))
  assert SIMPLE.decode_s(4, 1000) == pytest.approx(2 + 1 + 0.2)
  assert SIMPLE.decode_line(4) == (pytest.approx(2.2), 0.001)
  # 14 tokens: the decode's weights bind, then the prefill's products.
  assert SIMPLE.mixed_s(((0, 10),), 4, 1000) == pytest.approx(
      max(1 + 1.4, 2 + 0.7) + 1 + 1)
  assert SIMPLE.mixed_s(((0, 100),), 4, 0) == pytest.approx(
      1 + 10.4 + 100)


def test_chunks_add_up_to_the_prompt_but_for_their_overhead():
  whole = SIMPLE.prefill_s(((0, 300),))
  chunks = sum(SIMPLE.prefill_s(((s, s + 100),)) for s in (0, 100, 200))
  assert chunks == pytest.approx(whole + 2 * SIMPLE.prefill[0])


def test_further_pieces():
  model = dataclasses.replace(SIMPLE, piece_s=0.25)
  pieces = ((0, 10), (0, 5), (3, 4))
  assert model.prefill_s(pieces) == SIMPLE.prefill_s(pieces) + 0.5
  assert model.prefill_s(pieces[:1]) == SIMPLE.prefill_s(pieces[:1])
  assert model.mixed_s(pieces, 2, 30) == pytest.approx(
      SIMPLE.mixed_s(pieces, 2, 30) + 0.5)


def test_two_pieces_of_batches():
  two = Affine((0, 0, 0), (1, 0, 0), (2, 0, 0.5), 3)
  assert [two.decode_s(b, 9) for b in (1, 3, 4)] == [1, 1, 4]
  assert two.decode_line(4) == (4, 0)


def test_sizes_round_up_to_what_is_compiled():
  model = dataclasses.replace(SIMPLE, buckets=Buckets((32, 64), (1, 4), (8,)))
  assert model.prefill_s(((0, 33),)) == pytest.approx(1 + 6.4 + 0.01 * 33**2)
  assert model.prefill_s(((0, 65),)) == SIMPLE.prefill_s(((0, 65),))
  assert model.decode_s(2, 10) == SIMPLE.decode_s(4, 10)
  fitted = dataclasses.replace(model, mixed=(1.0, 0.1, 0.0, 0.0))
  assert fitted.mixed_s(((0, 10),), 2, 5) == pytest.approx(1 + 0.1 * (32 + 8))
  known = dataclasses.replace(fitted, costs=Costs((40, 60), (35, 65), (5,)))
  assert known.prefill_s(((0, 33),)) == pytest.approx(1 + 6.0 + 0.01 * 33**2)
  # The largest, 64, costs 60: so beyond it 4 less too.
  for stop in (65, 1000):
    assert known.prefill_s(((0, stop),)) == pytest.approx(
        SIMPLE.prefill_s(((0, stop),)) - 0.1 * 4)
  assert known.mixed_s(((0, 10),), 2, 5) == pytest.approx(1 + 0.1 * (35 + 5))


@given(AFFINES, PIECES, st.integers(0, 20), st.integers(0, 5000))
def test_a_mixed_step_lies_between_either_and_both(model, pieces, batch, each):
  context = batch * each
  prefill_s, decode_s = model.prefill_s(pieces), model.decode_s(batch, context)
  mixed_s = model.mixed_s(pieces, batch, context)
  assert mixed_s <= prefill_s + decode_s + 1e-9
  if not pieces or not batch:
    assert mixed_s == prefill_s + decode_s
  elif model.buckets == Buckets():
    assert mixed_s >= max(prefill_s, decode_s) - 1e-9


@given(st.sampled_from(CONFIGS), PIECES, st.integers(0, 64),
       st.integers(0, 2000), st.sampled_from([1, 2, 4]),
       st.sampled_from([1, 2]))
def test_roofline_is_monotone_and_shares_the_weights(
    config, pieces, batch, each, tp, pp):
  model, context = Roofline(config, A100, tp, pp), batch * each
  parts = model.prefill_s(pieces), model.decode_s(batch, context)
  mixed_s = model.mixed_s(pieces, batch, context)
  assert max(parts) - 1e-12 <= mixed_s <= sum(parts) * (1 + 1e-9)
  assert mixed_s <= model.mixed_s((*pieces, (0, 9)), batch, context)
  if batch:
    a, b = model.decode_line(batch)
    assert parts[1] == pytest.approx(a + b * context, rel=1e-12)


@settings(deadline=None)
@given(st.integers(0, 12), st.integers(1, 12), st.integers(0, 9),
       st.integers(0, 9))
def test_pairs_and_keys_by_counting(start, length, window_a, window_b):
  config = dataclasses.replace(tiny.CONFIG, windows=(window_a, window_b))
  pairs = keys = 0
  for window in (window_a, window_b):
    seen = set()
    for q in range(start, start + length):
      low = max(0, q - window + 1) if window else 0
      pairs += q + 1 - low
      seen |= set(range(low, q + 1))
    keys += len(seen)
  assert roofline.attended(config, ((start, start + length),)) == (pairs, keys)


@pytest.mark.parametrize('config', [
    tiny.CONFIG, tiny.UNTIED,
    dataclasses.replace(tiny.CONFIG, num_experts=4, experts_per_token=2),
    dataclasses.replace(tiny.CONFIG, norm='layer', positions='learned',
                        gated=False, activation='relu', qkv_bias=True,
                        out_bias=True, mlp_bias=True),
    dataclasses.replace(tiny.CONFIG, qk_norm=True, post_norms=True)])
def test_weights_are_those_of_the_parameters(config):
  params = checkpoint.random_params(config, 0)
  sizes = sum(x.size for x in jax.tree.leaves(params))
  assert roofline.num_params(config) == sizes
  layers = sum(x.size for x in jax.tree.leaves(params['layers']))
  assert roofline.layer_weights(config, 10**6) == pytest.approx(layers)
  matrices = sum(
      x.size * (0.5 if name in ('gate_EFD', 'up_EFD', 'down_EDF') else 1)
      for layer in params['layers'] for name, x in layer.items()
      if x.ndim > 1 and 'bias' not in name and '_norm' not in name)
  assert roofline.layer_flops(config) == 2 * matrices


def test_flops_of_a_token_by_hand():
  c = zoo.config('llama-3-8b')
  assert roofline.layer_flops(c) == 2 * 32 * (
      4096 * 4096 * 2 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
  assert roofline.layer_flops(MOE) == 2 * 32 * (
      4096 * 4096 * 2 + 2 * 4096 * 1024 + 2 * 3 * 4096 * 14336 + 8 * 4096)


def test_experts_touched():
  assert roofline.experts_touched(MOE, 1) == pytest.approx(2)
  assert roofline.experts_touched(MOE, 2) == pytest.approx(3.5)
  assert roofline.experts_touched(MOE, 10**4) == pytest.approx(8)
  rng = np.random.default_rng(0)
  seen = [len({e for _ in range(5) for e in rng.choice(8, 2, False)})
          for _ in range(4000)]
  assert roofline.experts_touched(MOE, 5) == pytest.approx(
      np.mean(seen), abs=4 * np.std(seen) / 4000**0.5)


def test_a_lone_token_of_13b_reads_its_weights():
  model = Roofline(zoo.config('opt-13b'), A100)
  floor_s = model.decode_s(1, 1)
  # All weights but the embedding of positions, at the memory's rate.
  assert floor_s == pytest.approx(2 * 12.85e9 / 2.039e12, rel=0.02)
  assert floor_s < hardware.published('opt-13b', Plan()).decode_s(1, 1)
  assert model.prefill_s(((0, 512),)) < hardware.published(
      'opt-13b', Plan(), realigned=False).prefill_s(((0, 512),))


def test_grouped_heads_read_less_and_replicas_do_not_shrink():
  c = zoo.config('llama-3-8b')
  line = Roofline(c, A100).decode_line(1)[1]
  assert line == pytest.approx(
      c.kv_bytes_per_token(2) / A100.bytes_per_s)
  assert Roofline(c, A100, tp=8).decode_line(1)[1] == pytest.approx(line / 8)
  assert Roofline(c, A100, tp=16).decode_line(1)[1] == pytest.approx(line / 8)


def test_shares_of_the_peaks_and_messages():
  c, pieces = zoo.config('opt-13b'), ((0, 512),)
  base_s = Roofline(c, A100).prefill_s(pieces)
  half = Roofline(c, A100, shares=Shares(0.5, 0.5, 0.5, 0.25))
  assert half.prefill_s(pieces) == pytest.approx(2 * base_s + 40 * 0.25)
  half = dataclasses.replace(half, pp=3)
  assert half.prefill_s(pieces) == pytest.approx(
      2 * base_s + 40 * 0.25 + 2 * 512 * 5120 * 2 / 150e9)
  apart = Shares(message_s=0.5)
  piped = Roofline(c, A100, pp=3, shares=apart, pipe_bytes_per_s=1e9)
  assert piped.prefill_s(pieces) - base_s == pytest.approx(
      2 * (0.5 + 512 * 5120 * 2 / 1e9))
  two = Roofline(c, A100, tp=2, shares=Shares(message_s=1e-3))
  assert two.prefill_s(pieces) == pytest.approx(
      base_s / 2 + 80 * (512 * 5120 * 2 / 300e9 + 1e-3), rel=1e-6)


def test_appendix_a():
  config = ModelConfig('x', 2, 8, 2, 2, 4, 16, 32, 64)
  model = latency.appendix_a(config, (1e-3, 2e-3, 0.5, 3e-3, 4e-3), block=4)
  h, m, t, t2 = 8, 16, 5 + 7, 25 + 49
  assert model.prefill_s(((0, 5), (0, 7))) == pytest.approx(
      1e-3 * (4 * t * h * h + 2 * t * h * m) + 2e-3 * 3 * h * t2 / 4 + 0.5)
  assert model.decode_s(3, 100) == pytest.approx(
      3e-3 * (4 * h * h + 2 * h * m) + 4e-3 * 3 * h * 100)
  two = latency.appendix_a(config, (1e-3, 2e-3, 0.5, 3e-3, 4e-3), 4, tp=2)
  assert two.decode_s(1, 9) == pytest.approx(model.decode_s(1, 9) / 2)


def test_scale_follows_its_rules():
  c, pieces = zoo.config('opt-13b'), ((0, 100),)
  assert latency.scale(SIMPLE, c, Plan()) == SIMPLE
  ideal = latency.scale(SIMPLE, c, Plan(4, 1))
  assert ideal.prefill_s(pieces) == pytest.approx(
      SIMPLE.prefill_s(pieces) / 4)
  assert latency.speedup(SIMPLE, ideal, pieces) == pytest.approx(4)
  k = latency.scale(SIMPLE, c, Plan(2, 1), speedup=1.5,
                    tensor_bytes_per_s=1e9, hop_s=1e-4)
  moved = 100 * 5120 * 2 * (2 * 40) * (2 * 1 / 2)  # 2 (tp - 1) / tp
  assert k.prefill_s(pieces) == pytest.approx(
      SIMPLE.prefill_s(pieces) / 1.5 + moved / 1e9 + 80e-4)
  piped = latency.scale(SIMPLE, c, Plan(1, 3), pipe_bytes_per_s=1e9,
                        hop_s=0.5)
  assert piped.pp == 3
  assert piped.decode_s(6, 100) - SIMPLE.decode_s(6, 100) == pytest.approx(
      2 * (0.5 + 6 * 5120 * 2 / 1e9))
  with pytest.raises(InputError, match='from 1 to tp=2'):
    latency.scale(SIMPLE, c, Plan(2, 1), speedup=3)
  with pytest.raises(InputError, match='latency.pp'):
    latency.scale(piped, c, Plan(2, 1))


RELEASED = pathlib.Path(hardware.__file__).parent / 'distserve'


@pytest.mark.parametrize('engine, factors', (
    ('distserve', (1.1, 1.0)), ('vllm', (1.4, 1.2))))
def test_published_is_what_the_files_say(engine, factors):
  data = json.loads(
      (RELEASED / f'profiler-a100-80g.{engine}.json').read_text())
  seen = 0
  for name, fits in data.items():
    for tp, fit in fits.items():
      model, plan = name.removeprefix('facebook/'), Plan(int(tp), 1)
      ms = [fit[k] for k in ('prefill', 'decoding_smallbs',
                             'decoding_largebs')]
      if min(map(min, ms)) < 0:
        # The one fit that falls with the square of a prompt's length.
        assert (engine, model, plan) == ('vllm', 'opt-66b', Plan(2, 1))
        with pytest.raises(InputError, match='each 0 or more'):
          hardware.published(model, plan, engine=engine)
        continue
      for realigned in (True, False):
        timed = hardware.published(model, plan, realigned, engine=engine)
        for got, x, factor in zip(
            (timed.prefill, timed.decode, timed.decode_large), ms,
            (factors[0], factors[1], factors[1]), strict=True):
          assert got == pytest.approx([
              v * 1e-3 / (1.0 if realigned else factor) for v in x], rel=1e-12)
      seen += 1
  assert seen == {'distserve': 7, 'vllm': 6}[engine]


def test_published_by_hand():
  # Numbers of the release, ms: vLLM's own differ from DistServe's times any
  # factor. 94 rows are few, 95 are many.
  for engine, prefill, few, many in (
      ('distserve', 18.10254647486372 + .1019122572698738 * 512
       + 7.122264314252114e-06 * 512**2, 19.934702624895458
       + .0006269356524350583 * 47000 + .03850697740828398 * 94,
       7.1661889468253595 + .0005798000403396046 * 47500
       + .15831096191764046 * 95),
      ('vllm', 22.052204789310185 + .14050923870128956 * 512
       + 8.076584822611088e-06 * 512**2, 23.475041008414784
       + .000592934466077393 * 47000 + .060726861260369455 * 94,
       20.206356173691958 + .0004907727036234946 * 47500
       + .1200031385587413 * 95)):
    model = hardware.published('opt-13b', Plan(), engine=engine, host_s=2e-3)
    assert model.prefill_s(((0, 512),)) == pytest.approx(prefill * 1e-3)
    assert model.decode_s(94, 47000) == pytest.approx(few * 1e-3)
    assert model.decode_s(95, 47500) == pytest.approx(many * 1e-3)
    assert model.host_s == 2e-3
  piped = hardware.published('opt-66b', Plan(4, 2), engine='vllm')
  assert piped.pp == 2 and piped.decode_s(1, 1) == pytest.approx(
      hardware.published('opt-66b', Plan(4, 1), engine='vllm').decode_s(1, 1)
      + 1e-3)
  for bad in (('opt-13b', Plan(3, 1)), ('opt-175b', Plan())):
    with pytest.raises(InputError, match='one of'):
      hardware.published(*bad)
  with pytest.raises(InputError, match="engine='orca'.*distserve.*vllm"):
    hardware.published('opt-13b', Plan(), engine='orca')
  tokens = hardware.released_tokens()
  assert len(tokens) == 76 and tokens['opt-175b', 3, 3] == 76192


@pytest.mark.parametrize('engine', hardware.REALIGNED)
def test_published_is_no_faster_than_the_peaks(engine):
  for model, tp in hardware.released(engine):
    if (engine, model, tp) == ('vllm', 'opt-66b', 2):
      continue
    floor = Roofline(zoo.config(model), A100, tp)
    raw = hardware.published(model, Plan(tp, 1), realigned=False,
                             engine=engine)
    assert raw.prefill_s(((0, 1024),)) > floor.prefill_s(((0, 1024),))
    assert raw.decode_s(32, 32 * 500) > floor.decode_s(32, 32 * 500)


@settings(deadline=None, max_examples=20)
@given(st.floats(0.1, 10), st.floats(1e-3, 1), st.floats(1e-7, 1e-3))
def test_saturation_is_the_first_length_of_enough_throughput(a, b, c):
  model = Affine((a, b, c), (1, 0, 0))
  tokens = latency.saturation_tokens(model, limit=4000)
  rates = [n / model.prefill_s(((0, n),)) for n in range(1, 4001)]
  exact = next(n for n, r in enumerate(rates, 1) if r >= 0.95 * max(rates))
  # The best rate is looked for on a grid of 2 %.
  assert tokens == pytest.approx(exact, rel=0.02, abs=1)


def test_saturation_in_closed_form():
  model = Affine((9.0, 1.0, 0.0), (1, 0, 0))  # rate n / (9 + n)
  best = 10**6 / (9 + 10**6)
  assert latency.saturation_tokens(model, 0.9, 10**6) == math.ceil(
      9 * 0.9 * best / (1 - 0.9 * best))
  bucketed = dataclasses.replace(model, buckets=Buckets((32, 64, 128)))
  assert latency.saturation_tokens(bucketed, 0.95, 128) == 122  # of 128
  many = Affine((9.0, 1.0, 0.1), (1, 0, 0))
  assert (latency.saturation_tokens(many, prompt_len=8)
          > latency.saturation_tokens(many))


def test_what_costs_nothing_is_saturated():
  assert latency.saturation_tokens(Affine((0, 0, 0), (0, 0, 0))) == 1


def test_largest_batch():
  assert latency.largest_batch(SIMPLE, 2.5, 50) == 5
  slow = dataclasses.replace(SIMPLE, host_s=0.2)
  assert latency.largest_batch(slow, 2.5, 50) == 3
  assert latency.largest_batch(SIMPLE, 1.0, 50) == 0
  assert latency.largest_batch(SIMPLE, 1e9, 50, limit=100) == 100


def test_link():
  assert Link(0.5, 100.0, 2.0).migrate_s(25) == 1.0


@pytest.mark.parametrize('make, part', [
    (lambda: Affine((1, 2), (1, 2, 3)), 'Affine.prefill'),
    (lambda: Affine((1, 2, -3), (1, 2, 3)), 'Affine.prefill'),
    (lambda: Affine((1, 2, 3), (1, 2, math.nan)), 'Affine.decode'),
    (lambda: Affine((1, 2, 3), (1, 2, 3), split=5), 'Affine.split'),
    (lambda: Affine((1, 2, 3), (1, 2, 3), (1, 2, 3)), 'Affine.split'),
    (lambda: Affine((1, 2, 3), (1, 2, 3), pp=0), 'Affine.pp'),
    (lambda: Affine((1, 2, 3), (1, 2, 3), host_s=-1), 'Affine.host_s'),
    (lambda: Affine((1, 2, 3), (1, 2, 3), buckets=Buckets((4, 2))),
     'buckets.tokens'),
    (lambda: Affine((1, 2, 3), (1, 2, 3), buckets=Buckets((2, 4)),
                    costs=Costs((2,))), r'Affine.costs.tokens.*\(2, 4\)'),
    (lambda: Affine((1, 2, 3), (1, 2, 3), buckets=Buckets((2,)),
                    costs=Costs((), (-1,))), 'Affine.costs.mixed_tokens'),
    (lambda: Roofline(MOE, A100, shares=Shares(link=0)), 'shares.link'),
    (lambda: Roofline(MOE, A100, shares=Shares(layer_s=-1)), 'shares.layer_s'),
    (lambda: Link(0, 0, 1), 'Link.bytes_per_s')])
def test_bad_constants_are_named(make, part):
  with pytest.raises(InputError, match=part):
    make()


PROFILE = Profile(
    'tiny', 'cpu', {
        Plan(): dataclasses.replace(
            SIMPLE, decode_large=(1, 2, 3), split=7, mixed=(1, 2, 3, 4),
            host_s=0.25, buckets=Buckets((32,), (1, 2), (2,)),
            piece_s=0.125, costs=Costs((40.5,), mixed_rows=(3,))),
        Plan(1, 2): dataclasses.replace(SIMPLE, pp=2)},
    {(Plan(), Plan(1, 2)): Link(0.5, 1e9, 64)}, 'a test',
    Contention({('prefill', 'decode'): 1.5}),
    {Plan(): {'prefill': (0.02, 0.1), 'mixed': (0.03, 0.2)}},
    {'prefill': 0.5, 'single': 0.25}, 1, 1.03125)


def test_files_keep_everything(tmp_path):
  profiles.save(tmp_path / 'a.json', PROFILE)
  assert profiles.load(tmp_path / 'a.json') == PROFILE


@pytest.mark.parametrize('change, parts', [
    (lambda d: d.pop('model'), ['model', 'present']),
    (lambda d: d.update(extra=1), ['extra', 'not known']),
    (lambda d: d.update(bytes_per_kv='fp8'), ['bytes_per_kv', '0.25 to 8']),
    (lambda d: d.update(device=3), ['device', 'text']),
    (lambda d: d.update(latencies=[]), ['latencies', 'object']),
    (lambda d: d['latencies'].update({'1by1': {}}), ['1by1', 'TPxPP']),
    (lambda d: d['latencies']['1x1'].pop('prefill'),
     ['latencies.1x1.prefill', 'present']),
    (lambda d: d['latencies']['1x1'].update(prefill=[1, 2, -1]),
     ['latencies.1x1', 'Affine.prefill', '-1']),
    (lambda d: d['latencies']['1x1'].update(prefil=[1]),
     ['latencies.1x1.prefil', 'not known']),
    (lambda d: d['latencies']['1x1']['buckets'].update(rows=3),
     ['latencies.1x1.buckets.rows', 'list']),
    (lambda d: d['latencies']['1x1']['costs'].update(tokens=3),
     ['latencies.1x1.costs.tokens', 'list']),
    (lambda d: d['latencies']['1x1']['buckets'].update(rows=['a']),
     ['latencies.1x1', 'buckets.rows']),
    (lambda d: d['latencies']['1x2'].update(pp=1), ['latencies.1x2.pp']),
    (lambda d: d['links'].update({'1x1': {}}), ['PLAN>PLAN']),
    (lambda d: d['links']['1x1>1x2'].update(bytes_per_s='fast'),
     ['links.1x1>1x2', 'Link.bytes_per_s']),
    (lambda d: d.update(contention=[1.5]), ['contention', 'object']),
    (lambda d: d['contention'].update({'prefill>swap': 2.0}),
     ['contention', 'swap']),
    (lambda d: d.update(errors=[]), ['errors', 'object']),
    (lambda d: d.update(typical_s={'step': 1.0}), ['typical_s', 'mixed']),
    (lambda d: d.update(typical_s={'mixed': 0}), ['typical_s.mixed=0']),
    (lambda d: d['errors'].update({'x': {}}), ['errors', 'TPxPP']),
    (lambda d: d['errors']['1x1'].update(swap=[0, 0]),
     ['errors.1x1.swap', 'not known']),
    (lambda d: d['errors']['1x1'].update(mixed=[0.1]),
     ['errors.1x1.mixed', '[mean, worst]']),
    (lambda d: d['errors']['1x1'].update(mixed=[0.1, 'far']),
     ['errors.1x1.mixed', '[mean, worst]'])])
def test_files_name_what_is_wrong(tmp_path, change, parts):
  path = tmp_path / 'b.json'
  profiles.save(path, PROFILE)
  data = json.loads(path.read_text())
  change(data)
  path.write_text(json.dumps(data))
  with pytest.raises(InputError) as error:
    profiles.load(path)
  for part in [str(path), *parts]:
    assert part in str(error.value)


@pytest.mark.parametrize('text', ['', '[1]', '{"a"', '[' * 10000])
def test_files_that_are_no_profiles(tmp_path, text):
  path = tmp_path / 'c.json'
  with pytest.raises(InputError, match='c.json: cannot be read'):
    profiles.load(path)
  path.write_text(text)
  with pytest.raises(InputError, match='c.json'):
    profiles.load(path)

"""The tables that come with dsjax: what they name, whose they are, how near."""

import dataclasses
import pickle

import pytest

import dsjax
from dsjax.config import zoo
from dsjax.config.checks import InputError
from dsjax.config.placement import Plan
from dsjax.simulation import fitting, hardware, profiles
from dsjax.simulation.hardware import Shares
from dsjax.simulation.roofline import Roofline
from dsjax.simulation.roofline_fit import fit_shares

EVERY = [(gpu, model) for gpu, models in profiles.tables().items()
         for model in models]


DENSE, EXPERTS = ('llama-3-70b', 'llama-3-8b', 'qwen3-32b'), 'qwen3-30b-a3b'


def test_six_gpus_and_four_models():
  assert list(profiles.tables()) == [
      'a100-80g', 'b200-180g', 'gb200-186g', 'h100-80g', 'h200-141g',
      'l40s-48g']
  for gpu, models in profiles.tables().items():
    assert set(models) == {*DENSE, EXPERTS} - (
        {EXPERTS} if gpu == 'gb200-186g' else set())


@pytest.mark.parametrize('gpu, model', EVERY)
def test_each_says_what_it_is_and_how_near(gpu, model):
  table = profiles.table(gpu, model)
  assert (table.device, table.model) == (gpu, model)
  for words in ('vLLM 0.', 'aiconfigurator-core 0.12.0', 'Apache-2.0',
                '32 to 16,384 prefill tokens', '128 to 32,768 tokens'):
    assert words in table.source
  alone = {plan for plan in table.latencies if plan.pp == 1}
  assert Plan(4, 1) in alone and table.errors.keys() == alone
  most = 0.08 if model in DENSE else 0.12  # experts are not linear in rows
  for kinds in table.errors.values():
    assert kinds.keys() == {'prefill', 'decode'}
    assert all(0 < mean < most and mean < worst < 0.5
               for mean, worst in kinds.values())


@pytest.mark.parametrize('name, of', [
    ('llama-3-8b', 'llama-3-8b'), ('llama-3.1-8b', 'llama-3-8b'),
    ('llama-3-70b', 'llama-3-70b'), ('llama-3.1-70b', 'llama-3-70b'),
    ('qwen3-32b', 'qwen3-32b'), (EXPERTS, EXPERTS)])
def test_a_model_finds_its_table_by_shape(name, of):
  config = zoo.config(name)
  table = profiles.table('h100-80g', of).latencies
  for own in (config, dataclasses.replace(
      config, name='a fine-tune', max_len=4096, rope_base=1e7, eos_ids=(7,))):
    latency_of = pickle.loads(pickle.dumps(
        profiles.named('tables:h100-80g', own, 3e-3)))
    for plan in (Plan(2, 1), Plan(4, 1), Plan(8, 1), Plan(2, 2)):
      assert latency_of(plan) == dataclasses.replace(table[plan], host_s=3e-3)
    assert latency_of(Plan(16, 1)) is None


@pytest.mark.parametrize('change', [
    dict(num_layers=79), dict(num_kv_heads=16), dict(d_ff=28000),
    dict(vocab_size=32000), dict(tied=True), dict(windows=(4096,) * 80),
    dict(num_experts=8, experts_per_token=2)])
def test_another_shape_has_none(change):
  config = dataclasses.replace(zoo.config('llama-3-70b'), **change)
  with pytest.raises(InputError, match='models of their shapes'):
    profiles.named('tables:h100-80g', config)


@pytest.mark.parametrize('kind, model, parts', [
    ('tables:h100', 'llama-3-8b', ('h100-80g', 'l40s-48g', 'qwen3-32b')),
    ('tables:', 'llama-3-8b', ('h100-80g', 'llama-3-70b')),
    ('tables:../h100-80g', 'llama-3-8b', ('h100-80g', 'llama-3-70b')),
    ('tables:l40s-48g', 'opt-13b', ('llama-3-70b, llama-3-8b, '
                                    'qwen3-30b-a3b, qwen3-32b',
                                    'roofline:l40s-48g')),
    ('tables', 'opt-13b', ("'tables:'", 'published', 'roofline:'))])
def test_an_unknown_pair_lists_what_there_is(kind, model, parts):
  with pytest.raises(InputError) as error:
    profiles.named(kind, zoo.config(model))
  for part in (repr(kind), *parts):
    assert part in str(error.value)
  assert '\n' not in str(error.value)


def test_a_placement_without_a_table_says_which_have_one():
  with pytest.raises(InputError, match='latencies: 2x1, 1x2, 4x1, 2x2'):
    dsjax.simulate('colocated=1x1', 'llama-3-70b', rate_per_s=1.0,
                   latency='tables:h100-80g')


# --- the roofline against the tables ------------------------------------------

SHAPES = [(((0, n),) * many, 0, 0) for many in (1, 4, 16)
          for n in (32, 128, 512, 2048, 8192) if many * n <= 16384]
SHAPES += [(((start, start + n),), 0, 0) for start in (1024, 8192)
           for n in (256, 1024, 4096)]
SHAPES += [((), rows, rows * n) for rows in (1, 4, 16, 64, 256)
           for n in (128, 1024, 8192, 32768) if rows * n <= 2**19]


def compared(gpu):
  """[(Roofline at the peaks, its model's cells in the table)] of a GPU."""
  return [(Roofline(zoo.config(model), hardware.HARDWARE[gpu], plan.tp),
           [fitting.Cell(*shape, seconds.mixed_s(*shape)) for shape in SHAPES])
          for model in DENSE
          for plan, seconds in profiles.table(gpu, model).latencies.items()
          if plan.pp == 1 and plan.tp <= (2 if gpu == 'l40s-48g' else 8)]


def errors(pairs, shares):
  """{kind: (mean over plans of the mean relative errors, the worst)}."""
  each = [fitting.residuals(dataclasses.replace(model, shares=shares), cells)
          for model, cells in pairs]
  return {kind: (sum(r[kind].mape for r in each) / len(each),
                 max(r[kind].worst for r in each))
          for kind in ('prefill', 'decode')}


@pytest.mark.parametrize('gpu, prefill, decode, bare', [
    ('a100-80g', 0.09, 0.05, 0.35), ('h100-80g', 0.08, 0.05, 0.35),
    ('h200-141g', 0.07, 0.05, 0.35), ('b200-180g', 0.11, 0.08, 0.45),
    ('gb200-186g', 0.10, 0.06, 0.45), ('l40s-48g', 0.07, 0.05, 0.25)])
def test_the_roofline_with_its_shares_is_near_the_tables(
    gpu, prefill, decode, bare):
  """And at the peaks it is far off, always too fast."""
  pairs = compared(gpu)
  fitted = errors(pairs, hardware.HARDWARE[gpu].shares)
  assert fitted['prefill'][0] < prefill and fitted['decode'][0] < decode
  assert max(worst for _, worst in fitted.values()) < 0.55
  assert min(mean for mean, _ in errors(pairs, Shares()).values()) > bare
  assert all(fitting.predict_s(model, cell) < cell.seconds
             for model, cells in pairs for cell in cells)


@pytest.mark.parametrize('gpu', ['a100-80g', 'h100-80g', 'b200-180g'])
def test_the_shares_are_what_the_tables_give(gpu):
  given = hardware.HARDWARE[gpu].shares
  fitted = fit_shares([(dataclasses.replace(model, shares=Shares(
      message_s=given.message_s)), cells) for model, cells in compared(gpu)])
  assert fitted == pytest.approx(given, rel=0.1)


@pytest.mark.parametrize('gpu', profiles.tables())
def test_a_roofline_by_name_takes_the_shares_or_the_peaks(gpu):
  config, plan = zoo.config('opt-13b'), Plan(2, 2)
  reached = profiles.named(f'roofline:{gpu}', config, 1e-3)(plan)
  peaks = profiles.named(f'roofline-peaks:{gpu}', config)(plan)
  device = hardware.HARDWARE[gpu]
  assert reached == Roofline(config, device, 2, 2, shares=device.shares,
                             host_s=1e-3)
  assert peaks == Roofline(config, device, 2, 2)
  assert str(device.shares) in profiles.caveat(f'roofline:{gpu}')
  assert 'fitted' in profiles.caveat(f'roofline:{gpu}')
  assert 'a bound' in profiles.caveat(f'roofline-peaks:{gpu}')
  for start in ('roofline', 'roofline-peaks'):
    with pytest.raises(InputError, match=f"'{start}:' and one of .*{gpu}"):
      profiles.named(f'{start}:x', config)

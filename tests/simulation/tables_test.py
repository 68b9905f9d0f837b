"""The tables that come with dsjax: what they name, whose they are, how near."""

import dataclasses
import pickle

import pytest

import dsjax
from dsjax.config import zoo
from dsjax.config.checks import InputError
from dsjax.config.placement import Plan
from dsjax.simulation import profiles

EVERY = [(gpu, model) for gpu, models in profiles.tables().items()
         for model in models]


def test_six_gpus_and_three_models():
  assert list(profiles.tables()) == [
      'a100-80g', 'b200-180g', 'gb200-186g', 'h100-80g', 'h200-141g',
      'l40s-48g']
  assert set(map(tuple, profiles.tables().values())) == {
      ('llama-3-70b', 'llama-3-8b', 'qwen3-32b')}


@pytest.mark.parametrize('gpu, model', EVERY)
def test_each_says_what_it_is_and_how_near(gpu, model):
  table = profiles.table(gpu, model)
  assert (table.device, table.model) == (gpu, model)
  for words in ('vLLM 0.', 'aiconfigurator-core 0.12.0', 'Apache-2.0',
                '32 to 16,384 prefill tokens', '128 to 32,768 tokens'):
    assert words in table.source
  alone = {plan for plan in table.latencies if plan.pp == 1}
  assert Plan(4, 1) in alone and table.errors.keys() == alone
  for kinds in table.errors.values():
    assert kinds.keys() == {'prefill', 'decode'}
    assert all(0 < mean < 0.08 and mean < worst < 0.5
               for mean, worst in kinds.values())


@pytest.mark.parametrize('name, of', [
    ('llama-3-8b', 'llama-3-8b'), ('llama-3.1-8b', 'llama-3-8b'),
    ('llama-3-70b', 'llama-3-70b'), ('llama-3.1-70b', 'llama-3-70b'),
    ('qwen3-32b', 'qwen3-32b')])
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
    ('tables:l40s-48g', 'opt-13b', ('llama-3-70b, llama-3-8b, qwen3-32b',
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

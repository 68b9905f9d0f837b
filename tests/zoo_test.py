import math

import pytest

from dsjax import zoo
from dsjax.base import InputError

# Parameters as published: the safetensors headers of the Hub, tied heads
# counted once; OPT 66B and 175B by their papers' tables.
PUBLISHED = {
    'opt-125m': 125_239_296, 'opt-1.3b': 1_315_758_080,
    'opt-2.7b': 2_651_596_800, 'opt-6.7b': 6_658_473_984,
    'opt-13b': 12_853_473_280, 'opt-30b': 29_974_540_288,
    'opt-66b': 66e9, 'opt-175b': 175e9,
    'gpt2': 124_439_808, 'gpt2-medium': 354_823_168,
    'gpt2-large': 774_030_080, 'gpt2-xl': 1_557_611_200,
    'llama-2-7b': 6_738_415_616, 'llama-2-13b': 13_015_864_320,
    'llama-2-70b': 68_976_648_192, 'llama-3-8b': 8_030_261_248,
    'llama-3-70b': 70_553_706_496, 'llama-3.1-8b': 8_030_261_248,
    'llama-3.1-70b': 70_553_706_496, 'mistral-7b': 7_241_732_096,
    'mixtral-8x7b': 46_702_792_704, 'qwen2.5-0.5b': 494_032_768,
    'qwen2.5-7b': 7_615_616_512, 'qwen2.5-72b': 72_706_203_648,
    'qwen3-0.6b': 596_049_920, 'qwen3-8b': 8_190_735_360,
    'qwen3-32b': 32_762_123_264, 'qwen3-30b-a3b': 30_532_122_624,
    'gemma-2-2b': 2_614_341_888, 'gemma-2-9b': 9_241_705_984,
    'gemma-2-27b': 27_227_128_320, 'gemma-3-1b': 999_885_952,
    'gemma-3-4b': 3_880_263_168}


def count(config):
  def size(leaves):
    return sum(math.prod(config.leaf_shape(leaf)) for leaf in leaves)
  return (size(config.top_leaves)
          + config.num_layers * size(config.layer_leaves))


@pytest.mark.parametrize('name', zoo.NAMES)
def test_parameters_are_as_many_as_published(name):
  found = count(zoo.config(name))
  published = PUBLISHED[name]
  if name.startswith('opt'):  # published tables have two rows more
    assert found == pytest.approx(published, rel=0.01)
  else:
    assert found == published


def test_every_model_is_checked():
  assert PUBLISHED.keys() == set(zoo.NAMES)


def test_gemma_alternates():
  two, three = zoo.config('gemma-2-2b'), zoo.config('gemma-3-1b')
  assert two.windows[:4] == (4096, 0, 4096, 0)
  assert three.windows[:7] == (512,) * 5 + (0, 512)


def test_an_unknown_name_lists_the_known():
  with pytest.raises(InputError, match='opt-125m'):
    zoo.config('opt-350m')

import math

import numpy as np
import pytest

from dsjax.checkpoints.gguf_model import load_gguf
from dsjax.checkpoints.hf_weights import load_hf
from dsjax.checkpoints.weights import random_params, stored_shape
from dsjax.config.checks import InputError
from tests.checkpoints import gguf_model_test
from tests.checkpoints import hf_weights_test as hf_test
from tests.checkpoints.gguf_model_test import CONFIG, D, F, H, N, leaves


@pytest.fixture
def path(tmp_path):
  return tmp_path / 'model.gguf'


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_random_params_have_the_tree_of_a_loaded_model(path, dtype):
  loaded = load_gguf(gguf_model_test.save(path), dtype)[1]
  made = random_params(CONFIG, 0, dtype)
  assert [(name, a.shape, a.dtype) for name, a in leaves(loaded)] == [
      (name, a.shape, a.dtype) for name, a in leaves(made)]


def test_random_params_follow_the_seed():
  first, again, other = (leaves(random_params(CONFIG, seed))
                         for seed in (1, 1, 2))
  for (name, a), (_, b), (_, c) in zip(first, again, other, strict=True):
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, c), name


def test_random_params_keep_the_scale():
  params = random_params(CONFIG, 0)
  layer = params['layers'][0]
  for leaf, inputs in (('q_NHD', D), ('o_DNH', N * H), ('down_DF', F)):
    assert layer[leaf].std() * inputs**0.5 == pytest.approx(1, rel=0.1)
  assert params['norm_D'].mean() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize('name', hf_test.NAMES)
def test_random_params_of_every_family(name):
  config, loaded = load_hf(hf_test.FAMILIES / name)
  made = random_params(config, 0)
  assert [(name, a.shape) for name, a in leaves(loaded)] == [
      (name, a.shape) for name, a in leaves(made)]
  for name, array in leaves(made):
    inputs = stored_shape(config, name)[-1]
    gain = 'norm' in name and 'bias' not in name
    want = 0.1 if stored_shape(config, name) == (inputs,) else (
        1 / math.sqrt(inputs))
    assert array.mean() == pytest.approx(float(gain), abs=2 * want)
    assert array.std() == pytest.approx(want, rel=0.9 if array.size < 50
                                        else 0.4)


def test_an_unknown_dtype_is_refused():
  with pytest.raises(InputError, match='float16'):
    random_params(CONFIG, 0, 'float16')

"""kernels/tuned.json: configs that the kernels take before their own."""

import contextlib
import json

import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.kernels import compiled, decode_attention, kv_write, paged, tuned

KIND, SHAPE = compiled.GPUS['H100'][1], 'float32 into float32, H 8, K 2, S 8'


@contextlib.contextmanager
def written(text, monkeypatch, tmp_path):
  path = tmp_path / 'tuned.json'
  path.write_text(text if isinstance(text, str) else json.dumps(text))
  monkeypatch.setattr(tuned, 'PATH', path)
  with compiled.described():
    yield
  tuned.load.cache_clear()


FIELDS = dict(block_heads=2, num_warps=4, num_stages=1)


def lookup():
  return kv_write.default(jnp.zeros((5, 2, 8)), 'float32')


def test_a_tuned_config_is_the_default_on_its_device(monkeypatch, tmp_path):
  config = kv_write.TuningConfig(**FIELDS)
  with written({KIND: {'kv_write': {SHAPE: FIELDS}}}, monkeypatch, tmp_path):
    assert lookup() == config != kv_write.heuristic(jnp.zeros((5, 2, 8)))
    with compiled.described(compiled.GPUS['A100'][1]):
      assert lookup() == kv_write.heuristic(jnp.zeros((5, 2, 8)))


def test_the_kernels_take_it(monkeypatch, tmp_path):
  q, k = jnp.ones((2, 4, 8)), jnp.ones((2, 3, 16, 8))
  shape = decode_attention.shape_class(q, k, 32)
  fields = dict(block_heads=16, block_tokens=16, splits=5, num_warps=4,
                num_stages=2)
  seen = []
  monkeypatch.setattr(decode_attention, '_program',
                      lambda config, *_: seen.append(config))
  with written({KIND: {'decode_attention': {shape: fields}}}, monkeypatch,
               tmp_path):
    decode_attention.decode_attention(
        q, k, k, np.zeros((2, 2), np.int32), np.ones(2, np.int32),
        'pallas_interpret')
  assert seen[0] == decode_attention.TuningConfig(**fields)


@pytest.mark.parametrize('text, says', [
    ('{', 'not JSON'), ([], 'the file: .*must be a JSON object'),
    ({KIND: {'sort': {}}}, "'sort': must be one of"),
    ({KIND: 3}, 'H100.*3: must be a JSON object'),
    ({KIND: {'kv_write': {SHAPE: FIELDS | {'num_warps': 'four'}}}},
     "num_warps: 'four': must be an integer"),
    ({KIND: {'kv_write': {SHAPE: FIELDS | {'num_warps': True}}}},
     'True: must be an integer'),
    ({KIND: {'kv_write': {SHAPE: {'block_heads': 2}}}},
     r"must be of the fields \['block_heads', 'num_stages', 'num_warps'\]"),
    ({KIND: {'kv_write': {SHAPE: FIELDS | {'block_heads': 3}}}},
     'block_heads=3: must be a power')])
def test_a_malformed_file_is_one_clear_error(text, says, monkeypatch,
                                             tmp_path):
  with written(text, monkeypatch, tmp_path), pytest.raises(
      ValueError, match=f'^tuned.json: .*{says}'):
    lookup()


def test_what_is_saved_is_found_and_the_rest_kept(monkeypatch, tmp_path):
  held = {'other': {'kv_write': {SHAPE: FIELDS}}}
  with written(held, monkeypatch, tmp_path):
    config = kv_write.TuningConfig(1, 2, 3)
    tuned.save('kv_write', SHAPE, config)
    assert lookup() == config
    assert json.loads(tuned.PATH.read_text())['other'] == held['other']


def test_no_file_is_shipped_that_no_device_wrote():
  for kind in tuned.load(tuned.PATH):
    assert paged.device(kind).name in kind

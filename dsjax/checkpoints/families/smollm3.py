"""SmolLM3: a Llama of which some layers do not rotate."""

from dsjax.checkpoints import hf_keys
from dsjax.checkpoints.families import llama
from dsjax.checkpoints.family import Family
from dsjax.checkpoints.hf_keys import Fields, Keys
from dsjax.config.checks import require


def _fields(keys: Keys) -> Fields:
  shared = llama.fields(keys)
  num_layers = shared['num_layers']
  every = hf_keys.above_zero('no_rope_layer_interval', keys.read(
      'no_rope_layer_interval'))
  rotated = keys.read('no_rope_layers', list, [
      int((layer + 1) % every > 0) for layer in range(num_layers)])
  require(len(rotated) >= num_layers and set(rotated) <= {0, 1},
          'no_rope_layers', rotated, f'{num_layers} of 0 (no rotation) and 1')
  keys.ignore('max_window_layers')  # unused by transformers
  if not keys.read('use_sliding_window', bool, False):
    keys.ignore('sliding_window', 'layer_types')
  return shared | dict(rotated=tuple(map(bool, rotated[:num_layers]))) | (
      hf_keys.windows(keys, num_layers, lambda layer: not rotated[layer]))


FAMILY = Family(
    'smollm3', 'SmolLM3ForCausalLM', _fields, llama.TENSORS,
    defaults=dict(num_key_value_heads=4, rope_theta=2e6,
                  no_rope_layer_interval=4, tie_word_embeddings=True,
                  bos_token_id=128000, eos_token_id=128001))

"""A model of random weights that serves in seconds.

It has a real tokenizer, a byte a token, and a chat template, so whatever
serves a real model serves it too. What it says is noise.
"""

from dsjax.checkpoints import gguf_tokenizer
from dsjax.checkpoints.tokenizer import Tokenizer
from dsjax.config.model import ModelConfig

_CONTROL = ('<|start|>', '<|end|>', '<|pad0|>', '<|pad1|>')
_CHAT = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] + ': ' + m['content']"
    " + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant: ' }}{% endif %}")

CONFIG = ModelConfig(
    name='tiny', num_layers=2, d_model=32, num_heads=4, num_kv_heads=2,
    head_dim=8, d_ff=48, vocab_size=256 + len(_CONTROL), max_len=2048,
    eos_ids=(257,))


def make_tokenizer() -> Tokenizer:
  """A vocabulary of bytes and four control tokens."""
  from tokenizers import pre_tokenizers  # here: a simulation needs none

  letters = sorted(pre_tokenizers.ByteLevel.alphabet())
  return gguf_tokenizer.of_gguf({
      'tokenizer.ggml.model': 'gpt2',
      'tokenizer.ggml.pre': 'gpt-2',
      'tokenizer.ggml.tokens': [*letters, *_CONTROL],
      'tokenizer.ggml.token_type': [1] * len(letters) + [3] * len(_CONTROL),
      'tokenizer.ggml.merges': [],
      'tokenizer.ggml.eos_token_id': CONFIG.eos_ids[0],
      'tokenizer.chat_template': _CHAT,
  })

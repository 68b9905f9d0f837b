"""The tokenizer of SmolLM2, read once."""

import pytest

from dsjax.checkpoints import checkpoint, gguf_tokenizer


@pytest.fixture(scope='session')
def meta():
  return checkpoint.read_gguf(checkpoint.find('smollm2-135m-instruct'))[0]


@pytest.fixture(scope='session')
def smollm(meta):
  return gguf_tokenizer.of_gguf(meta)

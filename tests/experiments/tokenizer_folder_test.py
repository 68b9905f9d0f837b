"""The tokenizer folder that load generators take, against dsjax's own."""

import json

import pytest
import tokenizers

from dsjax.checkpoints import checkpoint, gguf_tokenizer
from dsjax.config.checks import InputError
from experiments import tokenizer_folder

MODEL = 'smollm2-135m-instruct'


def test_the_folder_has_the_ids_of_the_model(tmp_path):
  tokenizer_folder.run(MODEL, tmp_path)
  theirs = tokenizers.Tokenizer.from_file(str(tmp_path / 'tokenizer.json'))
  ours = gguf_tokenizer.load(checkpoint.find(MODEL))
  for text in ('Hello, world', ' 1234 \n\n\tx', 'Ολα 語 \U0001f41d', ''):
    ids = theirs.encode(text, add_special_tokens=False).ids
    assert ids == list(ours.encode(text))
    assert theirs.decode(ids) == text
  config = json.loads((tmp_path / 'tokenizer_config.json').read_text())
  messages = [{'role': 'user', 'content': 'Hi'}]
  # The template's control tokens are one id each, as the model has them.
  ids = ours.chat(messages)
  text = theirs.decode(ids, skip_special_tokens=False)
  assert '<|im_start|>' in text
  assert theirs.encode(text, add_special_tokens=False).ids == list(ids)
  assert config['eos_token'] == '<|im_end|>' and config['chat_template']


def test_what_it_cannot_write_is_one_clear_error(tmp_path):
  with pytest.raises(InputError, match='byte-level BPE'):
    tokenizer_folder.write({'tokenizer.ggml.model': 'llama'}, tmp_path)

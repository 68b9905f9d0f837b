"""tokenizer.json of a Hugging Face folder, run by the `tokenizers` package.

Two kinds of BPE are known: byte-level (GPT-2, Llama 3, Qwen) and that of
sentencepiece, with bytes for what it does not know (Llama 2, Mistral, Gemma).
Special tokens are taken out of what is run, so that text from outside can
never become one (see tokenizer).
"""

import json
import os
import pathlib
import re

from dsjax.checkpoints.files import naming, read_json
from dsjax.checkpoints.tokenizer import Tokenizer, Vocabulary, byte_level_bytes
from dsjax.config.checks import InputError, require

_FILE, _CONFIG = 'tokenizer.json', 'tokenizer_config.json'
_BYTE = re.compile('<0x([0-9A-F]{2})>$')


def _run(keys):
  """A tokenizers.Tokenizer of tokenizer.json's keys."""
  import tokenizers

  try:
    return tokenizers.Tokenizer.from_str(json.dumps(keys))
  except Exception as error:  # of any class, from Rust
    raise InputError(f'not a tokenizer: {error}') from error


def _later(keys):
  """The same keys for a text that does not come first.

  A space is put before the first word of a text, not of every piece of it.
  """
  pre = keys.get('pre_tokenizer') or {}
  if pre.get('prepend_scheme') != 'first':
    return keys
  return keys | {'pre_tokenizer': pre | {'prepend_scheme': 'never'}}


def _sentence_bytes(token):
  byte = _BYTE.match(token)
  return (bytes([int(byte[1], 16)]) if byte else
          token.replace('\N{LOWER ONE EIGHTH BLOCK}', ' ').encode())


def _token_bytes(vocab, added, byte_level, vocab_size):
  """The bytes of each id; none for special tokens and unused ids."""
  by_id = [b''] * vocab_size
  for token, i in vocab.items():
    try:
      by_id[i] = (byte_level_bytes(token) if byte_level else
                  _sentence_bytes(token))
    except KeyError as error:
      raise InputError(f'model.vocab: token {token!r} has {error}: must be '
                       'byte-level') from None
  for token in added:  # Gemma adds runs of spaces
    text = token['content']
    by_id[token['id']] = (b'' if token['special'] else text.encode()
                          if byte_level else _sentence_bytes(text))
  return tuple(by_id)


def _vocab(keys, vocab_size):
  """(token -> id without special ones, added tokens), both checked."""
  model, added = keys.get('model'), keys.get('added_tokens') or []
  require(isinstance(model, dict) and model.get('type', 'BPE') == 'BPE'
          and isinstance(model.get('vocab'), dict), 'model',
          model.get('type') if isinstance(model, dict) else model, "'BPE'")
  require(isinstance(added, list) and all(
      isinstance(t, dict) and isinstance(t.get('content'), str)
      and t['content'] and type(t.get('id')) is int
      and isinstance(t.get('special'), bool) for t in added), 'added_tokens',
      added, 'a list of objects with content, id and special')
  ids = [*model['vocab'].values(), *(t['id'] for t in added)]
  for i in ids:
    require(type(i) is int and 0 <= i < vocab_size, 'token id', i,
            f'below the model\'s V={vocab_size}')
  special = {t['content'] for t in added if t['special']}
  special.discard(model.get('unk_token'))
  return ({token: i for token, i in model['vocab'].items()
           if token not in special}, added)


def _merges(model, vocab):
  """The merges whose three tokens are left in the vocabulary."""
  merges = model.get('merges') or []
  require(isinstance(merges, list), 'model.merges', merges, 'a list')
  pairs = [m.split(' ') if isinstance(m, str) else m for m in merges]
  for pair in pairs:
    require(isinstance(pair, list) and len(pair) == 2
            and all(isinstance(t, str) for t in pair), 'model.merges', pair,
            'two tokens')
  return [pair for pair in pairs
          if all(t in vocab for t in (*pair, ''.join(pair)))]


def _text(config, name):
  """A special token's text in tokenizer_config.json, or None."""
  token = config.get(f'{name}_token')
  token = token.get('content') if isinstance(token, dict) else token
  require(token is None or isinstance(token, str), f'{name}_token', token,
          'a string')
  return token


def _template(path, config):
  """The Jinja source of a folder, or None."""
  file = path / 'chat_template.jinja'
  if file.is_file():
    try:
      return file.read_text('utf-8')
    except (OSError, UnicodeDecodeError) as error:
      raise InputError(f'{file}: {error}') from error
  source = config.get('chat_template')
  if isinstance(source, list):
    source = {t.get('name'): t.get('template') for t in source
              if isinstance(t, dict)}.get('default')
  require(source is None or isinstance(source, str), 'chat_template', source,
          "a string, or a list that names a 'default'")
  return source


def _prefix(keys, config, bos_id):
  """The ids that tokenizer.json, or else add_bos_token, puts before a text."""
  add_bos = config.get('add_bos_token')
  if isinstance(add_bos, bool):
    require(not add_bos or bos_id is not None, 'add_bos_token', add_bos,
            'false without a bos_token')
    return (bos_id,) * add_bos
  bpe = _run(keys)
  plain_ids = bpe.encode('a', add_special_tokens=False).ids
  ids = bpe.encode('a').ids
  count = len(ids) - len(plain_ids)
  require(ids[count:] == plain_ids, 'post_processor', ids,
          'one that adds nothing after a text')
  return tuple(ids[:count])


def _vocabulary(path, keys, config, vocab_size):
  vocab, added = _vocab(keys, vocab_size)
  control = {t['content']: t['id'] for t in added if t['special']}
  byte_level = '"ByteLevel"' in json.dumps(
      [keys.get('pre_tokenizer'), keys.get('decoder')])
  model = keys['model']
  require(byte_level or model.get('byte_fallback') is True,
          'model.byte_fallback', model.get('byte_fallback'),
          'true unless the tokens are byte-level')
  texts = {name: _text(config, name) for name in ('bos', 'eos')}
  ids = {name: control.get(text, vocab.get(text))
         for name, text in texts.items()}
  plain = keys | {
      'added_tokens': [t for t in added if not t['special']],
      'post_processor': None, 'truncation': None, 'padding': None,
      # The package numbers added tokens anew unless the model has them.
      'model': model | {'merges': _merges(model, vocab), 'vocab': vocab | {
          t['content']: t['id'] for t in added if not t['special']}}}
  first, later = _run(plain), _run(_later(plain))

  def encode(text, is_first):
    return (first if is_first else later).encode(
        text, add_special_tokens=False).ids

  return Vocabulary(
      encode, _token_bytes(vocab, added, byte_level, vocab_size), control,
      frozenset(control.values()), ids['bos'], ids['eos'],
      _prefix(keys, config, ids['bos']),
      {f'{name}_token': text or '' for name, text in texts.items()},
      _template(path, config))


def load_tokenizer(path: str | os.PathLike[str],
                   vocab_size: int) -> Tokenizer | None:
  """The Tokenizer of a folder, or None without tokenizer.json.

  Ids that the model has and the tokenizer lacks (padding of the embedding)
  stand for no text.

  Raises:
    InputError: names the file: not JSON, not BPE, more tokens than the
      model, or a chat template that does not parse.
  """
  path = pathlib.Path(path)
  if not (path / _FILE).is_file():
    return None
  keys = read_json(path / _FILE)
  config = read_json(path / _CONFIG) if (path / _CONFIG).is_file() else {}
  with naming(path / _FILE):
    return Tokenizer(_vocabulary(path, keys, config, vocab_size))

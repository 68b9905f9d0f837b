"""tokenizer.json of a Hugging Face folder, run by the `tokenizers` package.

Two kinds of BPE are known: byte-level (GPT-2, Llama 3, Qwen) and that of
sentencepiece, with bytes for what it does not know (Llama 2, Mistral, Gemma).
Special tokens are taken out of what is run, so that text from outside can
never become one (see tokenizer).
"""

import json
import os
import pathlib
from typing import Any

from dsjax.checkpoints.chat_template import ChatTemplate
from dsjax.checkpoints.files import is_there, read_json
from dsjax.checkpoints.tokenizer import (
  Tokenizer,
  Vocabulary,
  byte_level_bytes,
  sentence_bytes,
)
from dsjax.config.checks import InputError, check_fetched, naming, require

Keys = dict[str, Any]  # of a JSON object
Ids = dict[str, int]  # by the text of the token
_FILE = 'tokenizer.json'
_CONFIGS = ('special_tokens_map.json', 'tokenizer_config.json')  # the last wins
_TEXTS = ('bos', 'eos', 'unk', 'sep', 'pad', 'cls', 'mask')


def _run(keys: Keys) -> Any:
  """A tokenizers.Tokenizer of tokenizer.json's keys."""
  import tokenizers

  try:
    return tokenizers.Tokenizer.from_str(json.dumps(keys))
  except Exception as error:  # of any class, from Rust
    raise InputError(f'not a tokenizer: {error}') from error


def _later(keys: Keys) -> Keys:
  """The same keys for a text that does not come first.

  A space is put before the first word of a text, not of every piece of it.
  """
  pre = keys.get('pre_tokenizer') or {}
  if pre.get('prepend_scheme') != 'first':
    return keys
  return keys | {'pre_tokenizer': pre | {'prepend_scheme': 'never'}}


def _token_bytes(vocab: Ids, added: list[Keys], control: Ids, byte_level: bool,
                 vocab_size: int) -> tuple[bytes, ...]:
  """The bytes of each id; none for control tokens and unused ids."""
  by_id = [b''] * vocab_size
  for token, i in vocab.items():
    try:
      by_id[i] = (byte_level_bytes(token) if byte_level else
                  sentence_bytes(token))
    except KeyError as error:
      raise InputError(f'model.vocab: token {token!r} has {error}: must be '
                       'byte-level') from None
  for token in added:  # Gemma adds runs of spaces
    text = token['content']
    by_id[token['id']] = (b'' if text in control else text.encode()
                          if byte_level else sentence_bytes(text))
  return tuple(by_id)


def _vocab(keys: Keys, vocab_size: int) -> tuple[Ids, list[Keys]]:
  """(token -> id, added tokens), both checked, of those that the model has."""
  model: Any = keys.get('model')
  added = keys.get('added_tokens') or []
  require(isinstance(model, dict) and model.get('type', 'BPE') == 'BPE'
          and isinstance(model.get('vocab'), dict), 'model',
          model.get('type') if isinstance(model, dict) else model, "'BPE'")
  require(isinstance(added, list) and all(
      isinstance(t, dict) and isinstance(t.get('content'), str)
      and t['content'] and type(t.get('id')) is int
      and isinstance(t.get('special'), bool) for t in added), 'added_tokens',
      added, 'a list of objects with content, id and special')
  # The model has no such token (Gemma 3's of images): its text is any text.
  beyond = {t['content'] for t in added if t['id'] >= vocab_size}
  added = [t for t in added if t['content'] not in beyond]
  vocab = {token: i for token, i in model['vocab'].items()
           if token not in beyond}
  for i in (*vocab.values(), *(t['id'] for t in added)):
    require(type(i) is int and 0 <= i < vocab_size, 'token id', i,
            f'below the model\'s V={vocab_size}')
  return vocab, added


def _merges(model: Keys, vocab: Ids) -> list[list[str]]:
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


def _text(config: Keys, name: str) -> str | None:
  """A special token's text in tokenizer_config.json, or None."""
  token = config.get(f'{name}_token')
  token = token.get('content') if isinstance(token, dict) else token
  require(token is None or isinstance(token, str), f'{name}_token', token,
          'a string')
  return token


def _template(path: pathlib.Path, config: Keys) -> str | None:
  """The Jinja source of a folder, or None."""
  file = path / 'chat_template.jinja'
  if is_there(file):
    try:
      text = file.read_bytes()
      check_fetched(file, text[:24])
      return text.decode()
    except (OSError, UnicodeDecodeError) as error:
      raise InputError(f'{file}: {error}') from error
  source = config.get('chat_template')
  if isinstance(source, list):
    source = {t.get('name'): t.get('template') for t in source
              if isinstance(t, dict)}.get('default')
  require(source is None or isinstance(source, str), 'chat_template', source,
          "a string, or a list that names a 'default'")
  return source


def _prefix(keys: Keys, config: Keys, bos_id: int | None) -> tuple[int, ...]:
  """The ids that tokenizer.json, or else add_bos_token, puts before a text."""
  add_bos = config.get('add_bos_token')
  if isinstance(add_bos, bool):
    require(not add_bos or bos_id is not None, 'add_bos_token', add_bos,
            'false without a bos_token')
    return (bos_id,) if add_bos and bos_id is not None else ()
  bpe = _run(keys)
  plain_ids = bpe.encode('a', add_special_tokens=False).ids
  ids = bpe.encode('a').ids
  count = len(ids) - len(plain_ids)
  require(ids[count:] == plain_ids, 'post_processor', ids,
          'one that adds nothing after a text')
  return tuple(ids[:count])


def _vocabulary(path: pathlib.Path, keys: Keys, config: Keys,
                vocab_size: int) -> Vocabulary:
  vocab, added = _vocab(keys, vocab_size)
  byte_level = '"ByteLevel"' in json.dumps(
      [keys.get('pre_tokenizer'), keys.get('decoder')])
  model = keys['model']
  require(byte_level or model.get('byte_fallback') is True,
          'model.byte_fallback', model.get('byte_fallback'),
          'true unless the tokens are byte-level')
  texts = {name: text for name in _TEXTS
           if (text := _text(config, name)) is not None}
  source = _template(path, config)
  template = None if source is None else ChatTemplate(
      source, {f'{name}_token': text for name, text in texts.items()})
  turns = template.turn_tokens(t['content'] for t in added) if template else ()
  control = {t['content']: t['id'] for t in added
             if t['special'] or t['content'] in turns}
  ids = {name: control.get(texts[name], vocab.get(texts[name]))
         for name in ('bos', 'eos') if name in texts}
  vocab = {token: i for token, i in vocab.items()
           if token not in control or token == model.get('unk_token')}
  text_tokens = [t for t in added if t['content'] not in control]
  plain = keys | {
      'added_tokens': text_tokens,
      'post_processor': None, 'truncation': None, 'padding': None,
      # The package numbers added tokens anew unless the model has them.
      'model': model | {'merges': _merges(model, vocab), 'vocab': vocab | {
          t['content']: t['id'] for t in text_tokens}}}
  first, later = _run(plain), _run(_later(plain))

  def encode(text: str, is_first: bool) -> list[int]:
    return (first if is_first else later).encode(
        text, add_special_tokens=False).ids

  return Vocabulary(
      encode=encode,
      token_bytes=_token_bytes(vocab, added, control, byte_level, vocab_size),
      control=control, control_ids=frozenset(control.values()),
      bos_id=ids.get('bos'), eos_id=ids.get('eos'),
      prefix=_prefix(keys, config, ids.get('bos')), template=template,
      strips_left=frozenset(t['content'] for t in added if t.get('lstrip')),
      strips_right=frozenset(t['content'] for t in added if t.get('rstrip')))


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
  if not is_there(path / _FILE):
    return None
  keys = read_json(path / _FILE)
  config: Keys = {}
  for name in _CONFIGS:
    if is_there(path / name):
      config |= read_json(path / name)
  with naming(path / _FILE):
    return Tokenizer(_vocabulary(path, keys, config, vocab_size))

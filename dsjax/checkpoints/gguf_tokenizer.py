"""Tokenizers of GGUF files: byte-level BPE, and that of sentencepiece.

A file of the second kind ('llama': Llama 2, Gemma) has scores in place of
merges: of all neighbours that make a token, those of the highest score are
merged first. The merges follow from that, as transformers derives them.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from dsjax.checkpoints import gguf_file
from dsjax.checkpoints.chat_template import (
  ChatTemplate,
  split,
  splitter,
)
from dsjax.checkpoints.tokenizer import (
  SPACE,
  Tokenizer,
  Vocabulary,
  byte_level_bytes,
  sentence_bytes,
)
from dsjax.config.checks import InputError, naming, require

# tokenizer.ggml.token_type
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_MODELS = ('gpt2', 'llama')
_TEXTS = {'bos': 'bos', 'eos': 'eos', 'unknown': 'unk', 'padding': 'pad'}

_LLAMA_3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
            r'\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+')
_QWEN_2 = _LLAMA_3.replace(r'\p{N}{1,3}', r'\p{N}')


def _byte_level(use_regex: bool = True) -> Any:
  from tokenizers import pre_tokenizers

  return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def _pieces(pattern: str) -> Any:
  from tokenizers import Regex, pre_tokenizers

  return pre_tokenizers.Sequence([
      pre_tokenizers.Split(Regex(pattern), 'isolated'),
      _byte_level(use_regex=False)])


def _digits() -> Any:
  from tokenizers import pre_tokenizers

  return pre_tokenizers.Sequence([
      pre_tokenizers.Digits(individual_digits=True), _byte_level()])


# tokenizer.ggml.pre -> (how text is cut before merging, whether a piece that
# is a token as it stands skips the merges).
_PRE = {
    'gpt-2': lambda: (_byte_level(), False),
    'llama-bpe': lambda: (_pieces(_LLAMA_3), True),
    'llama3': lambda: (_pieces(_LLAMA_3), True),
    'qwen2': lambda: (_pieces(_QWEN_2), False),
    'deepseek-r1-qwen': lambda: (_pieces(_QWEN_2), False),
    'smollm': lambda: (_digits(), False),
}


def _list(meta: Mapping[str, Any], name: str, kind: type) -> list[Any]:
  key = f'tokenizer.ggml.{name}'
  values = meta.get(key, [])
  require(isinstance(values, list)
          and all(isinstance(v, kind) for v in values), key,
          type(values).__name__, f'a list of {kind.__name__}')
  return values


def _vocabulary(meta: Mapping[str, Any]) -> Vocabulary:
  """The Vocabulary of GGUF metadata. Raises InputError naming the key."""
  model = str(meta.get('tokenizer.ggml.model'))
  require(model in _MODELS, 'tokenizer.ggml.model', model,
          "'gpt2' (byte-level BPE) or 'llama' (sentencepiece's BPE)")
  tokens = _list(meta, 'tokens', str)
  types = _list(meta, 'token_type', int) or [_NORMAL] * len(tokens)
  require(tokens and len(types) == len(tokens), 'tokenizer.ggml.token_type',
          len(types), f'one for each of {len(tokens)} tokens')
  named = {name: gguf_file.token_id(meta, name, len(tokens))
           for name in _TEXTS}
  texts = {f'{short}_token': tokens[i] for name, short in _TEXTS.items()
           if (i := named[name]) is not None}
  source = meta.get('tokenizer.chat_template')
  template = None if source is None else ChatTemplate(source, texts)
  if template:  # tokens of turns that are not marked as control tokens
    turns = template.turn_tokens(
        token for token, kind in zip(tokens, types, strict=True)
        if kind == _USER_DEFINED)
    types = [_CONTROL if token in turns else kind
             for token, kind in zip(tokens, types, strict=True)]
  by_kind = {kind: {token: i for i, token in enumerate(tokens)
                    if types[i] == kind and token} for kind in set(types)}
  if model == 'gpt2':
    # Only normal tokens: merging can never end in a control token.
    pre = meta.get('tokenizer.ggml.pre')
    require(pre in _PRE, 'tokenizer.ggml.pre', pre, f'one of {sorted(_PRE)}')
    bpe = gguf_bpe(str(pre), by_kind.get(_NORMAL, {}),
                   _list(meta, 'merges', str))
  else:
    bpe = _sentence_bpe(meta, by_kind.get(_NORMAL, {}) | by_kind.get(_BYTE, {}))
  user_defined = by_kind.get(_USER_DEFINED, {})
  if model == 'llama':
    user_defined = {token.replace(SPACE, ' '): i
                    for token, i in user_defined.items()}
  pattern = splitter(user_defined)

  def encode(text: str, first: bool) -> list[int]:
    del first
    ids = []
    for piece, is_token in split(pattern, text):
      ids += ([user_defined[piece]] if is_token else
              bpe.encode(piece, add_special_tokens=False).ids)
    return ids

  add_bos = bool(meta.get('tokenizer.ggml.add_bos_token', model == 'llama'
                          and named['bos'] is not None))
  require(not add_bos or named['bos'] is not None,
          'tokenizer.ggml.add_bos_token', add_bos,
          'false without tokenizer.ggml.bos_token_id')
  return Vocabulary(
      encode=encode, token_bytes=_token_bytes(model, tokens, types),
      control=by_kind.get(_CONTROL, {}),
      control_ids=frozenset(i for i, kind in enumerate(types)
                            if kind in (_UNKNOWN, _CONTROL)),
      bos_id=named['bos'], eos_id=named['eos'],
      prefix=(named['bos'],) if add_bos and named['bos'] is not None else (),
      template=template)


def gguf_bpe(pre: str, vocab: dict[str, int], merges: Sequence[str]) -> Any:
  """A tokenizers.Tokenizer of {token: id} and "a b" merges. pre: the name of
  how text is cut first."""
  import tokenizers

  pre_tokenizer, ignore_merges = _PRE[pre]()
  pairs: list[Any] = [tuple(merge.split(' ')) for merge in merges]
  for merge, pair in zip(merges, pairs, strict=True):
    require(len(pair) == 2 and all(t in vocab for t in (*pair,
                                                        ''.join(pair))),
            'tokenizer.ggml.merges', merge, 'two tokens that make a third')
  bpe = tokenizers.Tokenizer(tokenizers.models.BPE(
      vocab=vocab, merges=pairs, ignore_merges=ignore_merges))
  bpe.pre_tokenizer = pre_tokenizer
  return bpe


def _sentence_bpe(meta: Mapping[str, Any], vocab: dict[str, int]) -> Any:
  """A tokenizers.Tokenizer of {token: id} and the file's scores."""
  import tokenizers
  from tokenizers import normalizers

  scores = _list(meta, 'scores', float)
  require(len(scores) == len(meta['tokenizer.ggml.tokens']),
          'tokenizer.ggml.scores', len(scores), 'one for each token')
  merges = [
      (scores[i], len(left), len(right), left, right)
      for token, i in vocab.items() for cut in range(1, len(token))
      if (left := token[:cut]) in vocab and (right := token[cut:]) in vocab]
  merges.sort(reverse=True)
  bpe = tokenizers.Tokenizer(tokenizers.models.BPE(
      vocab=vocab, merges=[(left, right) for *_, left, right in merges],
      byte_fallback=True))
  steps: list[Any] = [normalizers.Replace(' ', SPACE)]
  if meta.get('tokenizer.ggml.add_space_prefix', True):
    steps.insert(0, normalizers.Prepend(SPACE))
  normalizer: Any = normalizers.Sequence(steps)
  bpe.normalizer = normalizer
  return bpe


def _token_bytes(model: str, tokens: Sequence[str],
                 types: Sequence[int]) -> tuple[bytes, ...]:
  """The bytes that each token stands for; none for control tokens."""
  normal = byte_level_bytes if model == 'gpt2' else sentence_bytes
  other = str.encode if model == 'gpt2' else sentence_bytes
  try:
    return tuple(
        normal(token) if kind == _NORMAL else
        b'' if kind in (_UNKNOWN, _CONTROL) else other(token)
        for token, kind in zip(tokens, types, strict=True))
  except KeyError as error:
    raise InputError('tokenizer.ggml.tokens: a normal token has '
                     f'{error}: must be byte-level') from None


def of_gguf(meta: Mapping[str, Any]) -> Tokenizer:
  """The tokenizer of GGUF metadata (`gguf_file.read_gguf`).

  Raises:
    InputError: names the key: neither byte-level nor sentencepiece's BPE, or
      inconsistent.
  """
  return Tokenizer(_vocabulary(meta))


def load(path: str | os.PathLike[str]) -> Tokenizer:
  """The tokenizer of a GGUF file. Raises InputError naming the file."""
  meta, _ = gguf_file.read_gguf(path)
  with naming(path):
    return of_gguf(meta)

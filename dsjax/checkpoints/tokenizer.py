"""Text to token ids and back: BPE and chat template of a model file.

Control tokens (<|im_end|> and the like) mark turns, so text from outside must
never become one: `encode` reads them only when asked to, and `chat` only in
the template's own text.
"""

import codecs
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from dsjax.checkpoints import gguf_file
from dsjax.checkpoints.files import naming
from dsjax.config.checks import InputError, require

ROLES = ('assistant', 'developer', 'system', 'tool', 'user')

# tokenizer.ggml.token_type
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4

_LLAMA_3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
            r'\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+')
_QWEN_2 = _LLAMA_3.replace(r'\p{N}{1,3}', r'\p{N}')


def _byte_level(use_regex=True):
  from tokenizers import pre_tokenizers

  return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def _pieces(pattern):
  from tokenizers import Regex, pre_tokenizers

  return pre_tokenizers.Sequence([
      pre_tokenizers.Split(Regex(pattern), 'isolated'),
      _byte_level(use_regex=False)])


def _digits():
  from tokenizers import pre_tokenizers

  return pre_tokenizers.Sequence([
      pre_tokenizers.Digits(individual_digits=True), _byte_level()])


# tokenizer.ggml.pre -> (how text is cut before merging, whether a piece that
# is a token as it stands skips the merges).
_PRE = {
    'gpt-2': lambda: (_byte_level(), False),
    'llama-bpe': lambda: (_pieces(_LLAMA_3), True),
    'qwen2': lambda: (_pieces(_QWEN_2), False),
    'smollm': lambda: (_digits(), False),
}


def _byte_alphabet():
  """GPT-2's {character: byte}: printable bytes stand for themselves."""
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  other = [byte for byte in range(256) if byte not in printable]
  return ({chr(byte): byte for byte in printable}
          | {chr(256 + i): byte for i, byte in enumerate(other)})


_BYTES = _byte_alphabet()


def byte_level_bytes(token: str) -> bytes:
  """The bytes of a byte-level token. Raises KeyError: another character."""
  return bytes([_BYTES[c] for c in token])


def _splitter(tokens: Iterable[str]) -> re.Pattern[str] | None:
  """A pattern whose split() keeps the tokens, longest first; None if none."""
  longest_first = sorted(tokens, key=len, reverse=True)
  return (re.compile(f'({"|".join(map(re.escape, longest_first))})')
          if longest_first else None)


def _split(pattern: re.Pattern[str] | None,
           text: str) -> list[tuple[str, bool]]:
  """(part, is token) pairs of the text, without empty parts."""
  parts = pattern.split(text) if pattern else [text]
  return [(part, i % 2 == 1) for i, part in enumerate(parts) if part]


def _template(source: str) -> Any:
  """Compiles a chat template as its authors expect, in a sandbox."""
  import jinja2.ext
  import jinja2.sandbox

  def raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)

  def tojson(value: object, **options: Any) -> str:
    defaults: dict[str, Any] = {'ensure_ascii': False}
    return json.dumps(value, **(defaults | options))

  env: Any = jinja2.sandbox.ImmutableSandboxedEnvironment(
      trim_blocks=True, lstrip_blocks=True,
      extensions=[jinja2.ext.loopcontrols])
  env.filters['tojson'] = tojson
  env.globals['raise_exception'] = raise_exception
  try:
    return env.from_string(source)
  except jinja2.TemplateError as error:
    raise InputError(f'tokenizer.chat_template: {error}') from error


def _list(meta, name, kind):
  key = f'tokenizer.ggml.{name}'
  values = meta.get(key, [])
  require(isinstance(values, list)
          and all(isinstance(v, kind) for v in values), key,
          type(values).__name__, f'a list of {kind.__name__}')
  return values


def _check_messages(messages):
  require(isinstance(messages, (list, tuple)) and messages, 'messages',
          messages, 'a non-empty list')
  for i, message in enumerate(messages):
    field = f'messages[{i}]'
    require(isinstance(message, dict)
            and message.keys() == {'role', 'content'}, field, message,
            "a dict of 'role' and 'content'")
    require(message['role'] in ROLES, f"{field}['role']", message['role'],
            f'one of {ROLES}')
    _check_text(f"{field}['content']", message['content'])


def _check_text(field, text):
  require(isinstance(text, str), field, text, 'a string')
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise InputError(f'{field}: character {error.start} is half of a '
                     'surrogate pair: must be valid Unicode') from None


class Vocabulary(NamedTuple):
  """What a file says about its tokens; Tokenizer makes it safe to use.

  encode: (text, whether nothing was before it) -> ids, never a control one.
  token_bytes: the bytes of each token. control: {text: id}. control_ids:
  those that stand for no text. prefix: ids before a text. texts: of BOS and
  EOS, for the template. template: Jinja source or None.
  """
  encode: Callable[[str, bool], list[int]]
  token_bytes: tuple[bytes, ...]
  control: dict[str, int]
  control_ids: frozenset[int]
  bos_id: int | None
  eos_id: int | None
  prefix: tuple[int, ...]
  texts: dict[str, str]
  template: str | None


def gguf_vocabulary(meta: Mapping[str, Any]) -> Vocabulary:
  """The Vocabulary of GGUF metadata (`gguf_file.read_gguf`).

  Raises:
    InputError: names the key: not byte-level BPE, or inconsistent.
  """
  model = meta.get('tokenizer.ggml.model')
  require(model == 'gpt2', 'tokenizer.ggml.model', model,
          "'gpt2' (byte-level BPE)")
  pre = meta.get('tokenizer.ggml.pre')
  require(pre in _PRE, 'tokenizer.ggml.pre', pre, f'one of {sorted(_PRE)}')
  tokens = _list(meta, 'tokens', str)
  types = _list(meta, 'token_type', int) or [_NORMAL] * len(tokens)
  require(tokens and len(types) == len(tokens), 'tokenizer.ggml.token_type',
          len(types), f'one for each of {len(tokens)} tokens')
  by_kind = {kind: {token: i for i, token in enumerate(tokens)
                    if types[i] == kind and token} for kind in set(types)}
  # Only normal tokens: merging can never end in a control token.
  bpe = gguf_bpe(str(pre), by_kind.get(_NORMAL, {}),
                 _list(meta, 'merges', str))
  user_defined = by_kind.get(_USER_DEFINED, {})
  pattern = _splitter(user_defined)

  def encode(text: str, first: bool) -> list[int]:
    del first
    ids = []
    for piece, is_token in _split(pattern, text):
      ids += ([user_defined[piece]] if is_token else
              bpe.encode(piece, add_special_tokens=False).ids)
    return ids

  ends: dict[str, Any] = {}
  for name in ('bos', 'eos'):
    key = f'tokenizer.ggml.{name}_token_id'
    ends[name] = meta.get(key)
    require(ends[name] is None or ends[name] in range(len(tokens)), key,
            ends[name], f'below {len(tokens)}')
  add_bos = bool(meta.get('tokenizer.ggml.add_bos_token', False))
  require(not add_bos or ends['bos'] is not None,
          'tokenizer.ggml.add_bos_token', add_bos,
          'false without tokenizer.ggml.bos_token_id')
  return Vocabulary(
      encode, _gguf_bytes(tokens, types), by_kind.get(_CONTROL, {}),
      frozenset(i for i, kind in enumerate(types)
                if kind in (_UNKNOWN, _CONTROL)),
      ends['bos'], ends['eos'], (ends['bos'],) * add_bos,
      {f'{name}_token': '' if i is None else tokens[i]
       for name, i in ends.items()}, meta.get('tokenizer.chat_template'))


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


def _gguf_bytes(tokens, types):
  """The bytes that each token stands for; none for control tokens."""
  try:
    return tuple(
        byte_level_bytes(token) if kind == _NORMAL else
        b'' if kind in (_UNKNOWN, _CONTROL) else token.encode()
        for token, kind in zip(tokens, types, strict=True))
  except KeyError as error:
    raise InputError('tokenizer.ggml.tokens: a normal token has '
                     f'{error}: must be byte-level') from None


class Tokenizer:
  """Text to ids and back. Immutable; safe to share.

  Attributes:
    vocab_size: number of tokens.
    control_ids: frozenset of ids that stand for no text.
    bos_id, eos_id: ids or None.
  """

  def __init__(self, vocabulary: Vocabulary) -> None:
    """From a Vocabulary; see `load`, `of_gguf` and hf_tokenizer."""
    self.vocab_size = len(vocabulary.token_bytes)
    self.control_ids = vocabulary.control_ids
    self.bos_id, self.eos_id = vocabulary.bos_id, vocabulary.eos_id
    self._vocabulary = vocabulary
    self._control_pattern = _splitter(vocabulary.control)
    self._set_guard()
    self._chat = (None if vocabulary.template is None else
                  _template(vocabulary.template))

  @classmethod
  def of_gguf(cls, meta: Mapping[str, Any]) -> 'Tokenizer':
    """The tokenizer of GGUF metadata (`gguf_file.read_gguf`)."""
    return cls(gguf_vocabulary(meta))

  @classmethod
  def load(cls, path: str | os.PathLike[str]) -> 'Tokenizer':
    """The tokenizer of a GGUF file. Raises InputError naming the file."""
    meta, _ = gguf_file.read_gguf(path)
    with naming(path):
      return cls.of_gguf(meta)

  def _set_guard(self):
    """Stand-ins for characters that begin or end a control token.

    Lone surrogates: no valid text holds one, so none can be forged.
    """
    edges = sorted({token[i] for token in self._vocabulary.control
                    for i in (0, -1)})
    require(len(edges) <= 0x800, 'tokenizer.ggml.tokens', len(edges),
            'control tokens with 2048 first and last characters or fewer')
    self._guard = {ord(c): 0xD800 + i for i, c in enumerate(edges)}
    self._unguard = {code: c for c, code in self._guard.items()}

  def encode(self, text: str, special: bool = False) -> list[int]:
    """Token ids of a text, after BOS if the file says so.

    With special=False, '<|im_end|>' in the text is ten characters like any
    others; with special=True it is the control token: only for text that is
    trusted. A byte without a token (SmolLM2 has none for six C0 control
    characters) leaves no trace, as in the reference implementations.

    Raises:
      InputError: not a string, or not valid Unicode.
    """
    _check_text('text', text)
    parts = (_split(self._control_pattern, text) if special else
             [(text, False)])
    return [*self._vocabulary.prefix, *self._encode_parts(parts)]

  def _encode_parts(self, parts):
    ids = []
    for i, (text, is_control) in enumerate(parts):
      ids += ([self._vocabulary.control[text]] if is_control else
              self._vocabulary.encode(text, i == 0))
    return ids

  def chat(self, messages: Sequence[Mapping[str, str]],
           add_generation_prompt: bool = True) -> list[int]:
    """Token ids of a conversation, by the file's chat template.

    Control tokens come from the template alone. In the contents, characters
    that begin or end one are replaced before rendering and restored after the
    control tokens were found, so none can begin or end inside a content. (A
    template that looks for such a character in a content does not see it.)
    The clock is not offered to templates.

    Args:
      messages: [{'role': one of ROLES, 'content': str}, ...], at least one.
      add_generation_prompt: end with the head of the assistant's turn.
    Raises:
      InputError: messages of another form, no chat template in the file, or
        the template refuses them.
    """
    _check_messages(messages)
    if self._chat is None:
      raise InputError('the model file has no tokenizer.chat_template: '
                       'chat is not possible')
    guarded = [{'role': m['role'],
                'content': m['content'].translate(self._guard)}
               for m in messages]
    try:
      text = self._chat.render(
          messages=guarded, add_generation_prompt=add_generation_prompt,
          **self._vocabulary.texts)
    except Exception as error:  # the template is a foreign program
      raise InputError(f'messages: the chat template says: {error}') from error
    return self._encode_parts(
        [(part.translate(self._unguard), is_control)
         for part, is_control in _split(self._control_pattern, text)])

  def token_bytes(self, token_id: int) -> bytes:
    """The bytes a token stands for: none if control, maybe part of UTF-8."""
    require(0 <= token_id < self.vocab_size, 'token id', token_id,
            f'in [0, {self.vocab_size})')
    return self._vocabulary.token_bytes[token_id]

  def decode(self, ids: Iterable[int]) -> str:
    """Text of token ids, without control tokens; bad UTF-8 becomes U+FFFD."""
    return b''.join(map(self.token_bytes, ids)).decode(errors='replace')


class Stream:
  """Text of one token sequence as it grows; never half a character.

  The pushes and finish() together give exactly tokenizer.decode(ids). Each
  push costs the token's bytes, whatever came before.
  """

  def __init__(self, tokenizer: Tokenizer) -> None:
    self._tokenizer = tokenizer
    self._utf8 = codecs.getincrementaldecoder('utf-8')(errors='replace')

  def push(self, token_id: int) -> str:
    """The text that this token completes; '' inside a character."""
    return self._utf8.decode(self._tokenizer.token_bytes(token_id))

  def finish(self) -> str:
    """What an unfinished character leaves: '' or U+FFFD."""
    return self._utf8.decode(b'', final=True)


class StopMatcher:
  """Ends a growing text before the first stop string that it completes.

  The stop string that is complete first wins, the longest of those that end
  together, however the text was cut into pushes. Text that may be the start
  of a stop string is held back. Each character costs O(1) per stop string,
  amortised (Knuth, Morris, Pratt).

  Attributes:
    hit: whether a stop string was found.
  """

  def __init__(self, stops: str | Sequence[str]) -> None:
    stops = (stops,) if isinstance(stops, str) else tuple(stops)
    require(all(isinstance(s, str) and s for s in stops), 'stop', stops,
            'non-empty strings')
    self.hit = False
    self._stops = stops
    self._borders = [_borders(stop) for stop in stops]
    self._matched = [0] * len(stops)  # characters of each stop matched
    self._held = ''

  def push(self, text: str) -> tuple[str, bool]:
    """(text that may be shown, whether a stop string is complete)."""
    if self.hit:
      return '', True
    for i, char in enumerate(text):
      matched = self._advance(char)
      if matched:
        self.hit = True
        seen = self._held + text[:i + 1]
        self._held = ''
        return seen[:len(seen) - matched], True
    text = self._held + text
    cut = len(text) - max(self._matched, default=0)
    self._held = text[cut:]
    return text[:cut], False

  def _advance(self, char):
    """Matches one character; the length of the longest stop it completes."""
    longest = 0
    for k, (stop, borders) in enumerate(
        zip(self._stops, self._borders, strict=True)):
      count = self._matched[k]
      while count and stop[count] != char:
        count = borders[count - 1]
      self._matched[k] = count = count + (stop[count] == char)
      if count == len(stop):
        longest = max(longest, count)
    return longest

  def finish(self) -> str:
    """The text still held back; '' after a hit."""
    held, self._held = self._held, ''
    return held


def _borders(text):
  """For each prefix, its longest proper prefix that is also its suffix."""
  borders = [0]
  for char in text[1:]:
    count = borders[-1]
    while count and text[count] != char:
      count = borders[count - 1]
    borders.append(count + (text[count] == char))
  return borders

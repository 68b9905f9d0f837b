"""Text to token ids and back, and chats by the model file's template.

Control tokens (<|im_end|> and the like) mark turns, so text from outside must
never become one: `encode` reads them only when asked to, and `chat` only in
the template's own text.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from dsjax.checkpoints.chat_template import (
  ROLES,
  ChatTemplate,
  Guard,
  split,
  splitter,
)
from dsjax.config.checks import InputError, require

SPACE = '\N{LOWER ONE EIGHTH BLOCK}'  # what sentencepiece writes for one
# Of a message, beside role and content; a template reads what it knows.
_OPTIONAL = ('name', 'reasoning_content', 'tool_call_id', 'tool_calls')
_OWN = ('messages', 'tools', 'documents', 'add_generation_prompt')
_END = '\udfff '  # behind a content that is to be continued
_BYTE = re.compile('<0x([0-9A-F]{2})>$')


def _byte_alphabet() -> dict[str, int]:
  """GPT-2's {character: byte}: printable bytes stand for themselves."""
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  other = [byte for byte in range(256) if byte not in printable]
  return ({chr(byte): byte for byte in printable}
          | {chr(256 + i): byte for i, byte in enumerate(other)})


_BYTES = _byte_alphabet()


def byte_level_bytes(token: str) -> bytes:
  """The bytes of a byte-level token. Raises KeyError: another character."""
  return bytes([_BYTES[c] for c in token])


def sentence_bytes(token: str) -> bytes:
  """The bytes of a token of sentencepiece."""
  byte = _BYTE.match(token)
  return (bytes([int(byte[1], 16)]) if byte else
          token.replace(SPACE, ' ').encode())


class Vocabulary(NamedTuple):
  """What a file says about its tokens; Tokenizer makes it safe to use.

  encode: (text, whether nothing was before it) -> ids, never a control one.
  token_bytes: the bytes of each token. control: {text: id}; those in
  strips_left and strips_right take the white space beside them. control_ids:
  those that stand for no text. prefix: ids before a text.
  """
  encode: Callable[[str, bool], list[int]]
  token_bytes: tuple[bytes, ...]
  control: dict[str, int]
  control_ids: frozenset[int]
  bos_id: int | None
  eos_id: int | None
  prefix: tuple[int, ...]
  template: ChatTemplate | None
  strips_left: frozenset[str] = frozenset()
  strips_right: frozenset[str] = frozenset()


def _check_text(field: str, text: object) -> None:
  """Raises InputError unless it is a string of valid Unicode."""
  require(isinstance(text, str), field, text, 'a string')
  try:
    str(text).encode()
  except UnicodeEncodeError as error:
    raise InputError(f'{field}: character {error.start} is half of a '
                     'surrogate pair: must be valid Unicode') from None


def _check_messages(messages: object) -> None:
  require(isinstance(messages, list | tuple) and messages, 'messages',
          messages, 'a non-empty list')
  assert isinstance(messages, list | tuple)
  for i, message in enumerate(messages):
    field = f'messages[{i}]'
    require(isinstance(message, dict) and {'role', 'content'} <= message.keys()
            <= {'role', 'content', *_OPTIONAL}, field, message,
            f"a dict of 'role' and 'content', and maybe {_OPTIONAL}")
    require(message['role'] in ROLES, f"{field}['role']", message['role'],
            f'one of {ROLES}')
    for key in message.keys() - {'role', 'tool_calls'}:
      _check_text(f'{field}[{key!r}]', message[key])
    calls = message.get('tool_calls', [])
    require(isinstance(calls, list), f"{field}['tool_calls']", calls, 'a list')
    _check_texts(f"{field}['tool_calls']", calls)


def _check_texts(field: str, value: object) -> None:
  """Raises InputError unless all strings of a JSON value are Unicode."""
  if isinstance(value, str):
    _check_text(field, value)
  elif isinstance(value, Mapping):
    _check_texts(field, [*value, *value.values()])
  elif isinstance(value, list | tuple):
    for item in value:
      _check_texts(field, item)


class Tokenizer:
  """Text to ids and back. Immutable; safe to share.

  Attributes:
    vocab_size: number of tokens.
    control_ids: frozenset of ids that stand for no text.
    bos_id, eos_id: ids or None.
    max_token_chars: characters of a text that one token may stand for.
  """

  def __init__(self, vocabulary: Vocabulary) -> None:
    """From a Vocabulary; gguf_tokenizer and hf_tokenizer make them."""
    self.vocab_size = len(vocabulary.token_bytes)
    self.control_ids = vocabulary.control_ids
    self.bos_id, self.eos_id = vocabulary.bos_id, vocabulary.eos_id
    self.max_token_chars = max(
        map(len, (*vocabulary.token_bytes, *vocabulary.control)), default=0)
    self._vocabulary = vocabulary
    self._control_pattern = splitter(vocabulary.control)
    self._guard = Guard(vocabulary.control, vocabulary.template.literals
                        if vocabulary.template else ())
    self._developer = ('developer' if vocabulary.template and any(
        'developer' in text for text in vocabulary.template.literals)
                       else 'system')

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
    parts = (split(self._control_pattern, text) if special else
             [(text, False)])
    return [*self._vocabulary.prefix, *self._encode_parts(parts)]

  def _encode_parts(self, parts: Sequence[tuple[str, bool]]) -> list[int]:
    known, ids = self._vocabulary, []
    beside = ['', *(text if is_control else '' for text, is_control in parts),
              '']
    for i, (text, is_control) in enumerate(parts):
      if is_control:
        ids.append(known.control[text])
        continue
      if beside[i] in known.strips_right:
        text = text.lstrip()
      if beside[i + 2] in known.strips_left:
        text = text.rstrip()
      ids += known.encode(text, i == 0)
    return ids

  def chat(self, messages: Sequence[Mapping[str, Any]],
           add_generation_prompt: bool = True,
           continue_final_message: bool = False,
           chat_template_kwargs: Mapping[str, Any] | None = None) -> list[int]:
    """Token ids of a conversation, by the file's chat template.

    Control tokens come from the template alone (see chat_template). A
    template may ask for the date, as in transformers.

    Args:
      messages: [{'role': one of ROLES, 'content': str}, ...], at least one;
        name, reasoning_content, tool_calls and tool_call_id may stand beside
        the content. A developer is the system to a template that knows none.
      add_generation_prompt: end with the head of the assistant's turn.
      continue_final_message: end inside the last message, for the model to go
        on with it; without add_generation_prompt.
      chat_template_kwargs: further variables of the template
        (enable_thinking).
    Raises:
      InputError: messages of another form, no chat template in the file, or
        the template refuses them.
    """
    _check_messages(messages)
    variables, template = chat_template_kwargs or {}, self._vocabulary.template
    require(not (add_generation_prompt and continue_final_message),
            'add_generation_prompt', add_generation_prompt,
            'false with continue_final_message')
    require(isinstance(variables, Mapping)
            and not variables.keys() & set(_OWN), 'chat_template_kwargs',
            variables, f'an object without {_OWN}')
    if template is None:
      raise InputError('the model file has no tokenizer.chat_template: '
                       'chat is not possible')
    hidden = [{key: self._guard.hide(value) for key, value in message.items()}
              | {'role': self._developer if message['role'] == 'developer'
                 else message['role']} for message in messages]
    content = hidden[-1]['content'].strip()
    if continue_final_message:
      hidden[-1]['content'] += _END
    text = template.render(hidden, add_generation_prompt, {
        key: self._guard.hide(value) for key, value in variables.items()})
    if continue_final_message:
      head, end, tail = text.rpartition(_END.strip())
      require(end and content in head, 'continue_final_message', True,
              'false: the chat template changes the last message')
      text = head if tail.startswith(' ') else head.rstrip()
    return self._encode_parts(
        [(self._guard.show(part), is_control)
         for part, is_control in split(self._control_pattern, text)])

  def token_bytes(self, token_id: int) -> bytes:
    """The bytes a token stands for: none if control, maybe part of UTF-8."""
    require(0 <= token_id < self.vocab_size, 'token id', token_id,
            f'in [0, {self.vocab_size})')
    return self._vocabulary.token_bytes[token_id]

  def decode(self, ids: Iterable[int]) -> str:
    """Text of token ids, without control tokens; bad UTF-8 becomes U+FFFD."""
    return b''.join(map(self.token_bytes, ids)).decode(errors='replace')

"""From what a client asks to token ids: the one place that reads prompts."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from dsjax.checkpoints.checkpoint import Model
from dsjax.checkpoints.tokenizer import Tokenizer
from dsjax.config.checks import InputError, require

# {'role': one of tokenizer.ROLES, 'content': text} each; see Tokenizer.chat.
Messages: TypeAlias = Sequence[Mapping[str, Any]]
Prompt: TypeAlias = str | Messages | Sequence[int]


def vocabulary(model: Model) -> Tokenizer:
  """The model's tokenizer.

  Raises:
    InputError: it has none.
  """
  if model.tokenizer is None:
    raise InputError('prompt: must be token ids: this model has no tokenizer')
  return model.tokenizer


def text_ids(model: Model, text: str) -> tuple[int, ...]:
  """Token ids of a text as it stands, to be completed; a control token's text
  in it is that token.

  Raises:
    InputError: no tokenizer, or not valid Unicode.
  """
  return tuple(vocabulary(model).encode(text, special=True))


def chat_ids(model: Model, messages: Messages, **options: Any
             ) -> tuple[int, ...]:
  """Token ids of a conversation, by the model's chat template.

  options: of Tokenizer.chat.

  Raises:
    InputError: no tokenizer, or messages of another form.
  """
  return tuple(vocabulary(model).chat(list(messages), **options))


def prompt_ids(model: Model, prompt: Prompt) -> tuple[int, ...]:
  """Checked token ids of a question, of messages, or of ids.

  A question is one user turn of a chat; text_ids gives the ids of a text that
  is to be completed as it stands.

  Raises:
    InputError: it is none of these, empty, or has ids out of range.
  """
  if isinstance(prompt, str):
    prompt = [{'role': 'user', 'content': prompt}]
  ids: Any = prompt
  if isinstance(prompt, list | tuple) and prompt and isinstance(
      prompt[0], dict):
    ids = chat_ids(model, prompt)
  check_ids(model, ids, 'prompt', 'text, messages or ')
  return tuple(int(i) for i in ids)


def check_ids(model: Model, ids: Sequence[int], field: str = 'Request.prompt',
              others: str = '') -> None:
  """Raises InputError unless these are token ids of the model, and some.

  others: what else the field may be.
  """
  size = model.config.vocab_size
  require(isinstance(ids, list | tuple | range | np.ndarray)
          and getattr(ids, 'ndim', 1) == 1 and len(ids) > 0
          and all(type(i) is int or isinstance(i, np.integer) for i in ids)
          and min(ids) >= 0 and max(ids) < size, field, ids,
          f'{others}token ids in [0, {size}), not empty')

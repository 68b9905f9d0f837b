"""A request, and how its tokens are chosen."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import TypedDict

import numpy as np

from dsjax.config.checks import (
  is_integer,
  is_number,
  make_plain,
  plain,
  require,
)

MAX_LOGIT_BIAS = 300
MAX_LOGPROBS = 20
MAX_STOP_TOKENS = 64
# What these fields may be, ends included but the lower ones of ABOVE.
RANGES = {'temperature': (0, 100), 'top_p': (0, 1), 'min_p': (0, 1),
          'repetition_penalty': (0, 100), 'presence_penalty': (-100, 100),
          'frequency_penalty': (-100, 100), 'logit_bias': (-100, 100)}
ABOVE = ('top_p', 'repetition_penalty')


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How one request's tokens are chosen and when it stops.

  Attributes:
    max_tokens: of the output; None for the rest of the context.
    temperature: 0 is greedy.
    top_k, top_p, min_p: which tokens may be drawn; 0, 1 and 0 for all.
    repetition_penalty: multiplicative, over prompt and output.
    presence_penalty, frequency_penalty: subtractive, over the output.
    logit_bias: (token id, what is added to its logit) pairs.
    seed: the random draw at a position depends only on (seed, position),
      never on batch, instance or mesh.
    logprobs: the log-probability of the chosen token and of so many most
      likely ones, taken from the raw logits; None for none.
    stop: strings that end the text before their first occurrence.
    stop_token_ids: end it, like the model's EOS, at that token, which is not
      part of the text.
    ignore_eos: the model's EOS does not end it.
    min_tokens: none of the first so many tokens ends it: those that would
      cannot be drawn, and stop strings are passed over.
  """

  max_tokens: int | None = None
  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.0
  repetition_penalty: float = 1.0
  presence_penalty: float = 0.0
  frequency_penalty: float = 0.0
  logit_bias: tuple[tuple[int, float], ...] = ()
  seed: int = 0
  logprobs: int | None = None
  stop: tuple[str, ...] = ()
  stop_token_ids: tuple[int, ...] = ()
  ignore_eos: bool = False
  min_tokens: int = 0

  def __post_init__(self):
    make_plain(self)
    for field, items, allowed in (
        ('logit_bias', _pairs, '(token id, number) pairs'),
        ('stop', _strings, 'strings'), ('stop_token_ids', _ids, 'token ids')):
      value = getattr(self, field)
      try:
        object.__setattr__(self, field, items(value))
      except TypeError:  # it is no sequence
        require(False, f'Sampling.{field}', value, allowed)
    inf = float('inf')
    tests = (
        ('max_tokens', lambda v: v is None or is_integer(1, inf)(v),
         'an integer of 1 or more, or None for the rest of the context'),
        ('top_k', is_integer(0, 2**31 - 1), '0 (off) or more'),
        *((field, is_number(low, high, low_open=field in ABOVE),
           f'a number in {"(" if field in ABOVE else "["}{low}, {high}]')
          for field, (low, high) in RANGES.items() if field != 'logit_bias'),
        ('logit_bias', lambda v: len(v) <= MAX_LOGIT_BIAS and all(
            len(b) == 2 and is_integer(0, 2**31 - 1)(b[0])
            and is_number(*RANGES['logit_bias'])(b[1]) for b in v)
         and len({b[0] for b in v}) == len(v),
         f'at most {MAX_LOGIT_BIAS} distinct (token id, number in '
         '[-100, 100])'),
        ('seed', is_integer(0, 2**32 - 1), 'an integer in [0, 2**32)'),
        ('logprobs', lambda v: v is None or is_integer(0, MAX_LOGPROBS)(v),
         f'None or 0 to {MAX_LOGPROBS}'),
        ('stop', lambda v: len(v) <= 16 and all(
            isinstance(s, str) and s for s in v),
         'at most 16 non-empty strings'),
        ('stop_token_ids', lambda v: len(v) <= MAX_STOP_TOKENS and all(
            is_integer(0, 2**31 - 1)(t) for t in v),
         f'at most {MAX_STOP_TOKENS} token ids'),
        ('ignore_eos', lambda v: isinstance(v, bool), 'True or False'),
        ('min_tokens', lambda v: is_integer(0, self.max_tokens or inf)(v),
         'an integer from 0 to max_tokens'),
    )
    for field, test, allowed in tests:
      value = getattr(self, field)
      require(test(value), f'Sampling.{field}', value, allowed)


class SamplingFields(TypedDict, total=False):
  """Fields of a Sampling by name, as `generate` and the like take them."""

  max_tokens: int | None
  temperature: float
  top_k: int
  top_p: float
  min_p: float
  repetition_penalty: float
  presence_penalty: float
  frequency_penalty: float
  logit_bias: Mapping[int, float] | Iterable[tuple[int, float]]
  seed: int
  logprobs: int | None
  stop: str | Iterable[str]
  stop_token_ids: Iterable[int]
  ignore_eos: bool
  min_tokens: int


def _pairs(bias):
  return tuple(tuple(map(plain, b)) for b in (
      bias.items() if isinstance(bias, dict) else bias))


def _ids(values):
  return tuple(map(plain, values))


def _strings(stop):
  return (stop,) if isinstance(stop, str) else tuple(stop)


@dataclasses.dataclass(frozen=True)
class Request:
  """One request of a workload: prompt token ids, when it arrives, how it ends.

  A workload made from lengths alone has ids without meaning and ignore_eos.
  A simulation reads only len(prompt) and blocks: hashes of full blocks of
  block_tokens tokens, of prompt and output, equal where all tokens until there
  are. A server hashes the prompt itself.

  after: id of the request of the same workload whose answer is waited for;
  arrival_s is then counted from its end. It does not come where that one was
  not answered. In simulations.
  """

  id: int
  arrival_s: float
  prompt: Sequence[int]
  sampling: Sampling = Sampling()
  blocks: tuple[int, ...] = ()
  block_tokens: int = 0
  after: int | None = None

  def __post_init__(self) -> None:
    numbers = self.id, self.arrival_s, self.block_tokens, self.after
    if any([isinstance(number, np.generic) for number in numbers]):
      make_plain(self)

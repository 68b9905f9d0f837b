"""Requests that begin as others did: conversations, agents, traces of them.

In these each turn repeats all that was said before it. What a request shares
is told by the hashes of its blocks (Request.blocks), from which a simulation
knows what a prefix cache would hold.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from dsjax.config.checks import is_integer, is_number, require
from dsjax.config.request import Request
from dsjax.workload.files import Path, read_lengths
from dsjax.workload.requests import exactly
from dsjax.workload.traffic import BLOCK, read_hash_ids

_SPAN = 2**32  # hashes of a session


@dataclasses.dataclass(frozen=True)
class Sessions:
  """Conversations of several turns.

  Attributes:
    turns: of each. think_s: mean seconds from an answer to the next turn.
    system_len: tokens that every session begins with.
    prompt_len, output_len: mean tokens of what is new in a turn, and of its
      answer; lognormal with `sigma`.
    max_len: a session ends before a turn that would be longer.
    block_tokens: of a block.
  """

  turns: int = 4
  think_s: float = 10.0
  system_len: int = 0
  prompt_len: float = 200.0
  output_len: float = 200.0
  sigma: float = 0.5
  max_len: int = 8192
  block_tokens: int = 16

  def __post_init__(self):
    for field, low in (('turns', 1), ('max_len', 2), ('block_tokens', 1)):
      require(is_integer(low, 2**31 - 1)(getattr(self, field)),
              f'Sessions.{field}', getattr(self, field),
              f'an integer of {low} or more')
    require(is_integer(0, self.max_len - 2)(self.system_len),
            'Sessions.system_len', self.system_len,
            f'an integer from 0 to max_len - 2, {self.max_len - 2}')
    for field, low in (('think_s', 0), ('sigma', 0), ('prompt_len', 1),
                       ('output_len', 1)):
      require(is_number(low, 1e6)(getattr(self, field)), f'Sessions.{field}',
              getattr(self, field), f'a number from {low} to 1e6')


# A chat, and an agent: a long system prompt, short answers, many calls.
CHAT = Sessions()
AGENT = Sessions(turns=12, think_s=2.0, system_len=4096, prompt_len=400,
                 output_len=80, max_len=32_768)


def requests(kind: Sessions, starts_s: Sequence[float], seed: int = 0
             ) -> list[Request]:
  """The turns of sessions that begin at these times.

  Each turn but the first comes after the answer of the one before and the time
  that its user thinks, see Request.after.

  Returns:
    Requests, ids counting turns; prompts without meaning (a `range`).
  """
  require(is_integer(0, math.inf)(seed), 'seed', seed,
          'an integer of 0 or more')
  rng = np.random.default_rng([seed, 7])
  made: list[Request] = []
  for session, start_s in enumerate(starts_s):
    lengths = rng.lognormal(-kind.sigma**2 / 2, kind.sigma, (kind.turns, 2))
    thinks_s = rng.exponential(kind.think_s, kind.turns).tolist()
    context, before = kind.system_len, None
    for turn in range(kind.turns):
      prompt = context + max(1, round(kind.prompt_len * lengths[turn, 0]))
      output = max(1, round(kind.output_len * lengths[turn, 1]))
      if prompt + output > kind.max_len:
        if turn:
          break
        prompt, output = kind.max_len - 1, 1
      context = prompt + output
      id = len(made)
      made.append(Request(
          id, start_s if before is None else thinks_s[turn], range(prompt),
          exactly(output),
          _blocks(kind, session, context), kind.block_tokens, before))
      before = id
  return made


def _blocks(kind, session, tokens):
  """The hashes of a session's first tokens; all share the system prompt."""
  size = kind.block_tokens
  shared = min(kind.system_len, tokens) // size
  return (*range(shared), *(
      _SPAN * (session + 1) + n for n in range(shared, tokens // size)))


def read_trace(path: Path, speed: float = 1.0, most: int | None = None,
               context: int | None = None) -> list[Request]:
  """The requests of a trace in Mooncake's format, with their blocks.

  JSON lines as workload.read_lengths takes them, with hash_ids: a number for
  each 512-token block of the prompt (the last may be shorter), equal where the
  whole prompt up to its end is equal.

  Args:
    speed: arrivals come so many times as fast.
    most: only so many, the first ones.
    context: longer requests are left out.

  Raises:
    InputError naming the file, the line and the field.
  """
  require(is_number(0, 1e6, low_open=True)(speed), 'speed', speed,
          'a number above 0')
  require(most is None or is_integer(1, math.inf)(most), 'most', most,
          'None or an integer of 1 or more')
  entries = read_lengths(path)
  require(entries[0].arrival_s is not None, 'trace', str(path),
          'one with the times of arrivals')
  made = []
  for entry, ids in zip(entries, read_hash_ids(path), strict=True):
    if context and entry.prompt_len + entry.output_len > context:
      continue
    made.append(Request(
        len(made), (entry.arrival_s or 0.0) / speed, range(entry.prompt_len),
        exactly(entry.output_len),
        tuple(ids[:entry.prompt_len // BLOCK]), BLOCK))
    if len(made) == most:
      break
  require(made, 'context', context,
          f'enough for a request of {path}: all are longer')
  return made

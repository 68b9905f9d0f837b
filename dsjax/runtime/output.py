"""What a client gets of a request: its tokens, its text, how it ended."""

import collections
import dataclasses
from typing import Any

from dsjax.analysis.record import Record
from dsjax.checkpoints import tokenizer


class RequestFailed(RuntimeError):
  """Faults ended a request: more than it survives, or nobody is left."""


@dataclasses.dataclass(frozen=True)
class Output:
  """A finished request.

  text ends before a stop string or an ending token; tokens has every sampled
  id, the ending one included. reason: stop | length | cancelled | failed |
  rejected (record.reason has the words for the last two). logprobs: a token
  each (log-probability, ((id, log-probability), ...)) when asked for.
  """

  id: int
  text: str
  tokens: tuple[int, ...]
  reason: str
  record: Record
  logprobs: tuple = ()

  def row(self) -> dict[str, Any]:
    """The row of its record, with text and tokens; see Record.row."""
    return self.record.row() | {'text': self.text,
                                'tokens': list(self.tokens)}


class Live:
  """The host's view of a request: its tokens and its text so far.

  Attributes:
    ended: its last token has come. reason: of its Finish. error: why it was
      rejected or, where `failed`, given up.
  """

  def __init__(self, request, ends, vocabulary):
    self.request, self.ends = request, ends
    self.tokens, self.logprobs = [], []
    self.ended, self.failed, self.reason, self.error = False, False, None, None
    self.stream = tokenizer.Stream(vocabulary) if vocabulary else None
    self.stops = tokenizer.StopMatcher(request.sampling.stop)
    self.pieces = collections.deque()

  @property
  def finished(self):
    return self.reason is not None or self.error is not None

  @property
  def wants_logprobs(self):
    return self.request.sampling.logprobs is not None

  def push(self, token):
    """Takes the next token; True when the request ends with it."""
    self.tokens.append(token)
    may_end = len(self.tokens) >= self.request.sampling.min_tokens
    self.ended = token in self.ends and may_end
    if not self.ended and self.stream:
      text, hit = self.stream.push(token), False
      if may_end:
        text, hit = self.stops.push(text)
      self.pieces.append(text)
      self.ended = hit
    if self.ended or len(self.tokens) == self.request.sampling.max_tokens:
      self.flush()
    return self.ended

  def flush(self):
    """Lets out what a stop string or half a character held back."""
    if self.stream and not self.stops.hit:
      text, hit = self.stops.push(self.stream.finish())
      self.pieces.append(text if hit else text + self.stops.finish())
    self.stream = None

  def push_logprobs(self, r, logprob_R, top_id_RA, top_logprob_RA):
    """Takes row r of a step's log-probabilities."""
    count = self.request.sampling.logprobs
    top = zip(top_id_RA[r, :count].tolist(),
              top_logprob_RA[r, :count].tolist(), strict=True)
    self.logprobs.append((float(logprob_R[r]), tuple(top)))

  def fail(self, reason):
    """Faults ended it."""
    self.flush()
    self.failed, self.error = True, reason

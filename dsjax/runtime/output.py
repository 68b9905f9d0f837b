"""What a client gets of a request: its tokens, its text, how it ended."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

from dsjax.analysis.record import Record
from dsjax.checkpoints import stops, tokenizer
from dsjax.config.request import Request

# Of a token: its log-probability, and the (id, log-probability) of the most
# likely ones.
Logprobs: TypeAlias = tuple[float, tuple[tuple[int, float], ...]]


@dataclasses.dataclass(frozen=True)
class Output:
  """A finished request.

  text ends before a stop string or an ending token; tokens has every sampled
  id, the ending one included. reason: stop | length | cancelled | failed |
  rejected | refused (record.reason has the words). logprobs: a token
  each (log-probability, ((id, log-probability), ...)) when asked for.
  """

  id: int
  text: str
  tokens: tuple[int, ...]
  reason: str
  record: Record
  logprobs: tuple[Logprobs, ...] = ()

  def row(self) -> dict[str, Any]:
    """The row of its record, with text and tokens; see Record.row."""
    return self.record.row() | {'text': self.text,
                                'tokens': list(self.tokens)}


class RequestFailed(RuntimeError):
  """A request was given up: more faults than it survives, no instance is left,
  or the policy refused it.

  outputs: of generate_all, every request's Output in order.
  """

  def __init__(self, message: str, outputs: Sequence[Output] = ()) -> None:
    super().__init__(message)
    self.outputs = tuple(outputs)


def raise_unless_served(output: Output, is_open: bool,
                        outputs: Sequence[Output] = (), whole: bool = False
                        ) -> None:
  """Raises RequestFailed for a request that ended before its time, unless
  its client can see that.

  Args:
    is_open: the server is; a closed one has cancelled it.
    outputs: of the error, if not this one. whole: where the client sees no
      reason.
  """
  if output.reason in ('failed', 'refused'):
    raise RequestFailed(output.record.reason, outputs or [output])
  if output.reason == 'cancelled' and (whole or not is_open):
    raise RequestFailed(
        f'request {output.id} was cancelled' if is_open else
        f'request {output.id}: the server was closed', outputs or [output])


class Interrupted(KeyboardInterrupt):
  """Ctrl-C in generate_all.

  outputs: every request's Output in order, those that it cancelled included.
  """

  def __init__(self, outputs: Sequence[Output]) -> None:
    super().__init__()
    self.outputs = tuple(outputs)


class Update(NamedTuple):
  """What one request got since the last look.

  reason: why it ended (stop | length | cancelled | error), or None; error says
  it in words. record: its Record, from the thread that serves it.
  """

  text: str = ''
  tokens: tuple[int, ...] = ()
  logprobs: tuple[Logprobs, ...] = ()
  reason: str | None = None
  error: str | None = None
  record: Record | None = None


def joined(updates: Iterable[Update]) -> Update:
  """Successive updates of one request as one."""
  updates = tuple(updates)
  return Update(''.join(u.text for u in updates),
                tuple(t for u in updates for t in u.tokens),
                tuple(p for u in updates for p in u.logprobs),
                *updates[-1][3:])


class RequestOutputState:
  """A request's output so far: sampled tokens folded into text.

  Attributes:
    ended: its last token has come. reason: of its Finish. error: why it was
      rejected or, where `failed`, given up, or where `refused` not let in.
      pieces: text, a token each.
  """

  def __init__(self, request: Request, ends: set[int],
               vocabulary: tokenizer.Tokenizer | None) -> None:
    self.request, self.ends = request, ends
    self.tokens: list[int] = []
    self.logprobs: list[Logprobs] = []
    self.pieces: list[str] = []
    self.ended, self.failed, self.refused = False, False, False
    self.reason: str | None = None
    self.error: str | None = None
    self._stream = stops.Stream(vocabulary) if vocabulary else None
    self._stops = stops.StopMatcher(request.sampling.stop)
    self._pieces_taken = self._tokens_taken = 0

  @property
  def finished(self) -> bool:
    return self.reason is not None or self.error is not None

  @property
  def full(self) -> bool:
    """Whether it has its last token."""
    return self.ended or len(self.tokens) == self.request.sampling.max_tokens

  @property
  def failure(self) -> RequestFailed | None:
    """What to raise if faults ended it."""
    return RequestFailed(self.error or '') if self.failed else None

  @property
  def has_news(self) -> bool:
    """Whether `take` would give tokens or an end."""
    return len(self.tokens) > self._tokens_taken or self.finished

  @property
  def text(self) -> str:
    """The text so far, taken or not."""
    return ''.join(self.pieces)

  def push(self, token: int, logprobs: Logprobs | None = None) -> bool:
    """Takes the next token; True when the request ends with it."""
    self.tokens.append(token)
    if logprobs is not None:
      self.logprobs.append(logprobs)
    may_end = len(self.tokens) > self.request.sampling.min_tokens
    self.ended = token in self.ends and may_end
    if not self.ended and self._stream:
      text, self.ended = self._stops.push(self._stream.push(token), may_end)
      self.pieces.append(text)
    if self.full:
      self.flush()
    return self.ended

  def flush(self) -> None:
    """Lets out what a stop string or half a character held back."""
    if self._stream and not self._stops.hit:
      text, hit = self._stops.push(self._stream.finish())
      self.pieces.append(text if hit else text + self._stops.finish())
    self._stream = None

  def finish(self, reason: str) -> None:
    """The scheduler ended it: stop, length or cancelled."""
    self.flush()
    self.reason = reason

  def fail(self, reason: str) -> None:
    """Faults ended it."""
    self.flush()
    self.failed, self.error = True, reason

  def refuse(self, reason: str) -> None:
    """The policy does not let it in."""
    self.fail(reason)
    self.refused = True

  def take_pieces(self) -> list[str]:
    """The pieces of text since the last call."""
    start, self._pieces_taken = self._pieces_taken, len(self.pieces)
    return self.pieces[start:]

  def take(self) -> Update:
    """What has come since the last call."""
    start, self._tokens_taken = self._tokens_taken, len(self.tokens)
    return Update(''.join(self.take_pieces()), tuple(self.tokens[start:]),
                  tuple(self.logprobs[start:]),
                  self.reason or (self.error and (
                      'refused' if self.refused else 'error')), self.error)

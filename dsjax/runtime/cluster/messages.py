"""What a server and the process of an instance say to each other: plain data.

As JSON on the wire, by the codec of the event log; nothing is unpickled. Each
message goes with the incarnation that it is for, or from.
"""

import json
from typing import Any, NamedTuple, TypeAlias

from dsjax.config.checks import require
from dsjax.scheduling import event_log
from dsjax.scheduling.events import Migrate, RunDecode, RunPrefill

VERSION = 1  # of the messages: both sides must have the same

# --- from the server ---------------------------------------------------------


class Build(NamedTuple):
  """What the instance is, to be made: recipe, engine, role, plan, config, and
  the capacity that it had before, or None."""
  fields: dict[str, Any]


class Warm(NamedTuple):
  """Compile. peers: {index: capacity and plan} of those that KV comes from,
  and goes to."""
  sources: dict[str, Any]
  targets: dict[str, Any]


class Admit(NamedTuple):
  """A request gets a slot; sampling: fields of a Sampling."""
  id: int
  tokens: tuple[int, ...]
  prompt_len: int
  sampling: dict[str, Any]


class Forget(NamedTuple):
  """A request has left."""
  id: int


class Run(NamedTuple):
  """Run a command. Its pages are as PageTables.shrink gives them."""
  command: RunPrefill | RunDecode


class Offer(NamedTuple):
  """Have the KV of a Migrate ready for the instance `target` to pull."""
  uuid: int
  target: int
  command: Migrate
  checksum: bool


class Withdraw(NamedTuple):
  """An offer has ended; pulled: it has been taken."""
  uuid: int
  pulled: bool


class Pull(NamedTuple):
  """Pull what the instance `source` offers, and write it to its pages."""
  uuid: int
  source: int
  address: str
  command: Migrate
  checksum: bool


class Drop(NamedTuple):
  """What is pulled must not be written any more."""
  uuid: int


class Count(NamedTuple):
  """Say what is held, when all before this is done."""


class Ping(NamedTuple):
  """Answer by a Pong."""


# --- from an instance --------------------------------------------------------


class Hello(NamedTuple):
  """The first message of a process."""
  version: int
  index: int


class Failed(NamedTuple):
  """It cannot be built; bad_input: as an InputError says."""
  bad_input: bool
  why: str


class Built(NamedTuple):
  """It is built: capacity has the fields of its InstanceConfig; shapes: how
  many steps are to be compiled; address: of its offers, or ''."""
  capacity: dict[str, Any]
  shapes: int
  address: str
  devices: dict[str, str]


class Warmed(NamedTuple):
  """A step is compiled."""
  name: str


class Ready(NamedTuple):
  """It takes commands."""


class StageDone(NamedTuple):
  """A stage but the last has done its part of a step."""


class Stepped(NamedTuple):
  """A step is done.

  token_R: of its rows, then of its chunks. logprobs: (r, log-probability, ids
  and log-probabilities of the most likely) of those that ask. wall_s, cpu_s:
  time.perf_counter and CPU seconds of the process.
  """
  number: int
  token_R: tuple[int, ...]
  logprobs: tuple[tuple[int, float, tuple[int, ...], tuple[float, ...]], ...]
  wall_s: float
  cpu_s: float


class Offered(NamedTuple):
  """An offer is there. kind: a hash of shapes and dtypes."""
  uuid: int
  bytes: int
  kind: int
  checksum: int


class Landed(NamedTuple):
  """What was pulled is in its pages."""
  uuid: int
  kind: int
  checksum: int


class Broken(NamedTuple):
  """A hand-off has failed; the instance goes on."""
  uuid: int
  why: str


class Lost(NamedTuple):
  """The instance has failed."""
  why: str


class Counted(NamedTuple):
  """The requests, offers and pulls that it holds, and how many programs it
  has compiled since it was ready."""
  requests: int
  offers: int
  pulls: int
  compiled: int


class Pong(NamedTuple):
  """A sign of life."""


FromServer: TypeAlias = (Build | Warm | Admit | Forget | Run | Offer | Withdraw
                         | Pull | Drop | Count | Ping)
FromInstance: TypeAlias = (Hello | Failed | Built | Warmed | Ready | StageDone
                           | Stepped | Offered | Landed | Broken | Lost
                           | Counted | Pong)
Message: TypeAlias = FromServer | FromInstance

_KINDS = event_log.LOGGED | {kind.__name__: kind for kind in (
    Build, Warm, Admit, Forget, Run, Offer, Withdraw, Pull, Drop, Count, Ping,
    Hello, Failed, Built, Warmed, Ready, StageDone, Stepped, Offered, Landed,
    Broken, Lost, Counted, Pong)}


def dump(incarnation: int, message: Message) -> bytes:
  """A message as it goes over the wire."""
  return json.dumps([incarnation, event_log.encode(message)],
                    separators=(',', ':')).encode()


def load(data: bytes) -> tuple[int, Any]:
  """(incarnation, message): the inverse of dump.

  Raises:
    ValueError, TypeError: it is none (an InputError is a ValueError).
  """
  parts = json.loads(data)
  require(isinstance(parts, list) and len(parts) == 2
          and isinstance(parts[0], int), 'message', parts,
          '[incarnation, message]')
  message = event_log.decode(parts[1], _KINDS)
  require(isinstance(message, Message), 'message', message,
          f'of version {VERSION}')
  return parts[0], message


class PageTables:
  """The pages of each request as of the last command of an instance.

  Both sides keep them: a command has a row's pages whole, which is most of
  it, and the wire has how many of them are as before, and the others.
  """

  def __init__(self) -> None:
    self._pages: dict[int, tuple[int, ...]] = {}

  def shrink(self, command: RunPrefill | RunDecode) -> RunPrefill | RunDecode:
    """A command as it is sent: pages are (how many as before, *others)."""
    return _with_pages(command, self._others)

  def grow(self, command: RunPrefill | RunDecode) -> RunPrefill | RunDecode:
    """The inverse of shrink, at the other side."""
    return _with_pages(command, self._whole)

  def forget(self, id: int) -> None:
    """The request has left."""
    self._pages.pop(id, None)

  def _others(self, id: int, pages: tuple[int, ...]) -> tuple[int, ...]:
    before = self._pages.get(id, ())
    self._pages[id] = pages
    if pages[:len(before)] == before:
      return (len(before), *pages[len(before):])
    kept = next((i for i, (a, b) in enumerate(zip(before, pages, strict=False))
                 if a != b), min(len(before), len(pages)))
    return (kept, *pages[kept:])

  def _whole(self, id: int, others: tuple[int, ...]) -> tuple[int, ...]:
    kept, *new = others
    self._pages[id] = pages = (*self._pages.get(id, ())[:kept], *new)
    return pages


def _with_pages(command: Any, change: Any) -> Any:
  """A command whose pages are changed: change(id, pages)."""
  def changed(items):
    return tuple([item._replace(pages=change(item.id, item.pages))
                  for item in items])

  command = command._replace(rows=changed(command.rows))
  if command.chunks:
    command = command._replace(chunks=changed(command.chunks))
  return command

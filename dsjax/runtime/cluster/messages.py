"""What a server and the process of an instance say to each other: plain data.

As JSON on the wire, by the codec of the event log, and of a command the numbers
behind it; nothing is unpickled. Each message goes with the incarnation that it
is for, or from.
"""

import json
from typing import Any, NamedTuple, TypeAlias

import jax
import jaxlib

from dsjax.config.checks import require
from dsjax.config.version import __version__
from dsjax.scheduling import event_log
from dsjax.scheduling.events import (
  Load,
  Migrate,
  Offload,
)

VERSION = 7  # of the messages
# Both sides must have the same: hand-offs are jax's, and have no version.
VERSIONS = (f'dsjax {__version__}, messages {VERSION}, jax {jax.__version__}, '
            f'jaxlib {jaxlib.__version__}')

# --- from the server ---------------------------------------------------------


class Build(NamedTuple):
  """What the instance is, to be made: recipe, model (its config, as repr),
  engine, role, plan, config, and the capacity that it had before, or None."""
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
  """Run a command, as page_tables.PageTables.pack gives it.

  prefills: it is a RunPrefill. chunks, rows: how many it has. numbers: int64,
  least byte first: of each row id, base, until, pages that are as before and
  pages that are new; of each chunk id, start, stop, last, hit and the same two;
  then the new pages of all of them.
  """
  prefills: bool
  instance: int
  number: int
  tick: int
  steps: int
  chunks: int
  rows: int
  numbers: bytes = b''


class Offer(NamedTuple):
  """Have the KV of a Migrate ready for the instance `target` to pull."""
  uuid: int
  target: int
  command: Migrate
  checksum: bool


class Withdraw(NamedTuple):
  """An offer has ended; pulled: it has been taken. If not, a Moved answers."""
  uuid: int
  pulled: bool


class Pull(NamedTuple):
  """Pull what the instance `source` offers, and write it to its pages; where:
  as of Offered, then nothing is pulled."""
  uuid: int
  source: int
  address: str
  command: Migrate
  checksum: bool
  where: tuple[int, ...] = ()


class Drop(NamedTuple):
  """What is pulled must not be written any more."""
  uuid: int


class Copy(NamedTuple):
  """Copy pages to host memory, or from there: a Copied of this number answers.
  """
  number: int
  command: Offload | Load


class Count(NamedTuple):
  """Say what is held, when all before this is done."""


class Ping(NamedTuple):
  """Answer by a Pong."""


class Refused(NamedTuple):
  """Who said hello is not let in, and why: there is no other message."""
  why: str


# --- to the command of a host, and from there --------------------------------


class Start(NamedTuple):
  """Start the process of an instance, which is to come to `address`, with
  `count` devices of this host from `first` on. nonce: makes its key.
  settings: environment variables."""
  index: int
  incarnation: int
  address: str
  nonce: str
  first: int
  count: int
  settings: dict[str, str]


class End(NamedTuple):
  """Kill it."""
  index: int
  incarnation: int


class Ended(NamedTuple):
  """It has ended, or could not start."""
  index: int
  incarnation: int
  code: int


# --- from an instance --------------------------------------------------------


class Hello(NamedTuple):
  """The first message of a process; pid: its number at its host."""
  versions: str
  index: int
  pid: int


class Failed(NamedTuple):
  """It cannot be built; bad_input: as an InputError says."""
  bad_input: bool
  why: str


class Built(NamedTuple):
  """It is built: capacity has the fields of its InstanceConfig; shapes: how
  many steps are to be compiled; address: of its offers, or ''; weights: a hash
  of some of them; by_kernel: see Engine; memory: the same for those that can
  open each other's (shared_memory.of_host), or ''."""
  capacity: dict[str, Any]
  shapes: int
  address: str
  devices: dict[str, str]
  weights: int = 0
  by_kernel: bool = False
  memory: str = ''


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
  and log-probabilities of the most likely) of those that ask. began_s, wall_s:
  when its command came and it was done, on time.perf_counter; cpu_s: CPU
  seconds of the process.
  """
  number: int
  token_R: tuple[int, ...]
  logprobs: tuple[tuple[int, float, tuple[int, ...], tuple[float, ...]], ...]
  began_s: float
  wall_s: float
  cpu_s: float


class Offered(NamedTuple):
  """An offer is there, since wall_s. kind: a hash of shapes and dtypes. cpu_s:
  CPU seconds of the process. where: in memory that the target has too
  (shared_memory.Own.where), or ()."""
  uuid: int
  bytes: int
  kind: int
  checksum: int
  wall_s: float = 0.0
  cpu_s: float = 0.0
  where: tuple[int, ...] = ()


class Moved(NamedTuple):
  """What is offered from now on is at another address."""
  address: str


class Landed(NamedTuple):
  """What was pulled is in its pages. began_s, wall_s: when it was asked for,
  and when it was there. cpu_s: as of Offered."""
  uuid: int
  kind: int
  checksum: int
  began_s: float = 0.0
  wall_s: float = 0.0
  cpu_s: float = 0.0


class Copied(NamedTuple):
  """A copy is over. bytes: that were moved; why: what went wrong, or ''."""
  number: int
  bytes: int
  why: str


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
  """A sign of life. wall_s: when it was sent, on time.perf_counter there."""
  wall_s: float = 0.0


FromServer: TypeAlias = (Build | Warm | Admit | Forget | Run | Offer | Withdraw
                         | Pull | Drop | Copy | Count | Ping | Refused | Start
                         | End)
FromInstance: TypeAlias = (Hello | Failed | Built | Warmed | Ready | StageDone
                           | Stepped | Offered | Moved | Landed | Copied
                           | Broken | Lost | Counted | Pong | Ended)
Message: TypeAlias = FromServer | FromInstance

_KINDS = event_log.LOGGED | {kind.__name__: kind for kind in (
    Build, Warm, Admit, Forget, Run, Offer, Withdraw, Pull, Drop, Copy, Count,
    Ping, Refused, Copied,
    Hello, Failed, Built, Warmed, Ready, StageDone, Stepped, Offered, Moved,
    Landed, Broken, Lost, Counted, Pong, Start, End, Ended)}


def dump(incarnation: int, message: Message) -> bytes:
  """A message as it goes over the wire."""
  encoded = event_log.encode(message)
  numbers = b'\n' + encoded.pop() if isinstance(message, Run) else b''
  return json.dumps([incarnation, encoded],
                    separators=(',', ':')).encode() + numbers


def load(data: bytes) -> tuple[int, Any]:
  """(incarnation, message): the inverse of dump.

  Raises:
    ValueError, TypeError: it is none (an InputError is a ValueError).
  """
  text, _, numbers = data.partition(b'\n')
  parts = json.loads(text)
  require(isinstance(parts, list) and len(parts) == 2
          and isinstance(parts[0], int), 'message', parts,
          '[incarnation, message]')
  message = event_log.decode(parts[1], _KINDS)
  require(isinstance(message, Message) and (
      isinstance(message, Run) or not numbers), 'message', message,
          f'of version {VERSION}')
  if isinstance(message, Run):
    message = message._replace(numbers=numbers)
  return parts[0], message

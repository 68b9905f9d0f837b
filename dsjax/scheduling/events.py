"""What the scheduler is told (events) and what it decides (commands).

Plain data. Commands are complete: they carry every page id.
"""

from typing import NamedTuple


class Arrived(NamedTuple):
  """A request: prompt tokens, most tokens to generate.

  more: another arrival of the same moment follows at once, so nothing starts
  yet (or the first of a burst would be prefilled alone). blocks: with a prefix
  cache, the hashes of its full blocks (blocks.py), of the output too where
  that is known.
  """
  time_s: float
  id: int
  prompt_len: int
  max_tokens: int
  more: bool = False
  blocks: tuple[int, ...] = ()


class Cancelled(NamedTuple):
  """The client is gone, or asked for the end."""
  time_s: float
  id: int


class PrefillDone(NamedTuple):
  """RunPrefill `number` of `instance` completed; `ended` met EOS or a stop.

  stages_s: when each pipeline stage but the last had done its part. blocks:
  as of DecodeDone.
  """
  time_s: float
  instance: int
  number: int
  ended: tuple[int, ...] = ()
  stages_s: tuple[float, ...] = ()
  blocks: tuple[tuple[int, tuple[int, ...]], ...] = ()


class DecodeDone(NamedTuple):
  """RunDecode `number` of `instance` completed.

  steps_s: completion time of each of its steps, all of them. ended: (id,
  step) pairs: the request met EOS or a stop with the token of that step
  (0-based). stages_s: when each pipeline stage but the last had done its
  part of each step. blocks: with a prefix cache, (id, hashes) of requests that
  end with it: their full blocks after those that are known.
  """
  time_s: float
  instance: int
  number: int
  steps_s: tuple[float, ...] = ()
  ended: tuple[tuple[int, int], ...] = ()
  stages_s: tuple[float, ...] = ()
  blocks: tuple[tuple[int, tuple[int, ...]], ...] = ()


class Migrated(NamedTuple):
  """The target holds the whole KV of request `id` (hand-off `epoch`).

  more: another hand-off that ended at the same moment follows at once, so
  nothing starts yet (or the first row would be decoded alone).
  """
  time_s: float
  id: int
  epoch: int
  more: bool = False


class MigrateFailed(NamedTuple):
  """Hand-off `epoch` is over and no good; the target writes no more."""
  time_s: float
  id: int
  epoch: int
  reason: str = 'the copy failed'


class Offloaded(NamedTuple):
  """Offload `number` of `instance` is over: its slots hold the pages; or,
  where it failed, nothing."""
  time_s: float
  instance: int
  number: int
  failed: bool = False


class Loaded(NamedTuple):
  """The pages of request `id` (copy `epoch`) hold what its slots held."""
  time_s: float
  id: int
  epoch: int


class LoadFailed(NamedTuple):
  """Copy `epoch` from host memory is over and no good; it writes no more."""
  time_s: float
  id: int
  epoch: int
  reason: str = 'the copy failed'


class Timer(NamedTuple):
  """The lease of hand-off `epoch` ran out: it took too long."""
  time_s: float
  id: int
  epoch: int


class InstanceDown(NamedTuple):
  """An instance is lost with all it held.

  steps_s, ended: of the oldest command in flight, as in DecodeDone: the steps
  whose tokens are out already, fewer than all. back: it may come up again.
  """
  time_s: float
  instance: int
  steps_s: tuple[float, ...] = ()
  ended: tuple[tuple[int, int], ...] = ()
  back: bool = True


class InstanceUp(NamedTuple):
  """An instance is there again, empty; or is to be drained no longer."""
  time_s: float
  instance: int


class Drain(NamedTuple):
  """An instance is to take no more work that another could do."""
  time_s: float
  instance: int


class Tick(NamedTuple):
  """Another Policy.tick_s has passed: roles and rows may move.

  roles: (instance, role) pairs that the policy's resize has answered beside
  the loop, to an earlier state (planning.py). None: it is asked now.
  """
  time_s: float
  roles: tuple[tuple[int, str], ...] | None = None


class Chunk(NamedTuple):
  """Prompt tokens [start, stop) of a request; `last`: sample its next token.

  hit: tokens before start whose KV was kept of another request.
  """
  id: int
  start: int
  stop: int
  pages: tuple[int, ...]
  last: bool
  hit: int = 0


class Row(NamedTuple):
  """A request in a decode batch; at tick t its input token is at base + t.

  The row's pages cover positions up to and including base + until - 1; the
  row takes part in ticks below `until`.
  """
  id: int
  base: int
  until: int
  pages: tuple[int, ...]


class RunPrefill(NamedTuple):
  """Run packed chunks, and, where the instance mixes, a tick of decode
  rows."""
  instance: int
  number: int
  chunks: tuple[Chunk, ...]
  tick: int = 0
  rows: tuple[Row, ...] = ()

  @property
  def steps(self) -> int:
    """No field: of every RunPrefill."""
    return 1


class RunDecode(NamedTuple):
  """Run `steps` decode steps of these rows, the first at tick `tick`."""
  instance: int
  number: int
  tick: int
  steps: int
  rows: tuple[Row, ...]

  @property
  def chunks(self) -> tuple[Chunk, ...]:
    """No field: of every RunDecode."""
    return ()


class Migrate(NamedTuple):
  """Copy the KV of `num_tokens` tokens from source pages to target pages.

  hit: tokens before these, which the target has kept of another request, but
  for the `sent` that earlier parts of this hand-off bring. more: a part, read
  behind the commands issued so far; the rest follows once it is made, and only
  its end is told. kept: no hand-off: the source has kept these pages of
  another request, and the target goes on with the prompt behind them.
  """
  id: int
  epoch: int
  source: int
  source_pages: tuple[int, ...]
  target: int
  target_pages: tuple[int, ...]
  num_tokens: int
  hit: int = 0
  sent: int = 0
  more: bool = False
  kept: bool = False


class Offload(NamedTuple):
  """Copy pages, which were kept, or a preempted row's, to slots of host memory.

  They are read before any later command to the instance writes them.
  num_tokens: of these pages.
  """
  instance: int
  number: int
  pages: tuple[int, ...]
  slots: tuple[int, ...]
  num_tokens: int


class Load(NamedTuple):
  """Copy slots of host memory to pages of a request.

  hit: tokens before these whose KV is kept in the instance's memory.
  num_tokens: of these pages. row: it is a row again then, that was swapped.
  """
  id: int
  epoch: int
  instance: int
  slots: tuple[int, ...]
  pages: tuple[int, ...]
  num_tokens: int
  hit: int = 0
  row: bool = False


class Preempt(NamedTuple):
  """Request lost its pages on `instance`; it will be prefilled again.

  cause: pages (they ran short), swap (the same, and they go to host memory,
  from where it comes back as a row) or fault (the instance was lost).
  """
  id: int
  instance: int
  cause: str = 'pages'


class Decided(NamedTuple):
  """Why the policy's `hook` chose `instance` for a request, in its words."""
  id: int
  hook: str
  instance: int
  reason: str


class Flip(NamedTuple):
  """From now on `instance`, a flexible one, has this role."""
  instance: int
  role: str


class Abort(NamedTuple):
  """Hand-off `epoch` is over: `target` must not write its pages any more.

  It must take effect before any later command to the target.
  """
  id: int
  epoch: int
  target: int


class Finish(NamedTuple):
  """Request ended: stop (EOS or a stop condition), length or cancelled."""
  id: int
  reason: str


class Fail(NamedTuple):
  """Request ended by faults; `reason` says which in plain words.

  refused: by the policy, which was to find it a place again.
  """
  id: int
  reason: str
  refused: bool = False


class Reject(NamedTuple):
  """Request is not served; `reason` says why in plain words.

  refused: by the policy, for the load of now; else it can never be served.
  """
  id: int
  reason: str
  refused: bool = False


Event = (Arrived | Cancelled | PrefillDone | DecodeDone | Migrated
         | MigrateFailed | Offloaded | Loaded | LoadFailed | Timer
         | InstanceDown | InstanceUp | Drain | Tick)
Command = (RunPrefill | RunDecode | Migrate | Offload | Load | Preempt | Flip
           | Abort | Finish | Fail | Reject | Decided)

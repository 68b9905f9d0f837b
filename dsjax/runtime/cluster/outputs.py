"""What a step of another process samples, ready when its message has come."""

import collections
import dataclasses
from typing import Any, Protocol

import numpy as np

from dsjax.config.request import MAX_LOGPROBS
from dsjax.runtime.cluster.messages import Stepped
from dsjax.runtime.cluster.watch import PING_S
from dsjax.runtime.protocols import Dispatched
from dsjax.scheduling.events import RunDecode, RunPrefill


class Hears(Protocol):
  """Takes in what another process says, see RemoteEngine."""

  def hear(self) -> None: ...

  def check(self) -> None: ...

  def wait(self, seconds: float) -> None: ...


class Arriving:
  """An array that is ready when its message has come."""

  def __init__(self, engine: Hears, size: int) -> None:
    self.size, self._engine = size, engine
    self._values: np.ndarray | None = None

  def put(self, values: np.ndarray) -> None:
    """Its message has come."""
    self._values = values

  def is_ready(self) -> bool:
    if self._values is None:
      self._engine.hear()
    return self._values is not None

  def is_deleted(self) -> bool:
    return False

  def block_until_ready(self) -> 'Arriving':
    """Waits for it, where no fleet looks at it.

    Raises:
      RuntimeError: its process ended.
    """
    while not self.is_ready():
      self._engine.check()
      self._engine.wait(PING_S)
    return self

  def __array__(self, *_: Any, **__: Any) -> np.ndarray:
    if self._values is None:
      raise RuntimeError('its message has not come')
    return self._values


@dataclasses.dataclass
class Output:
  """What a step samples: a StepOutput. The others are there with token_R."""

  token_R: Arriving
  logprob_R: Any = None
  top_id_RA: Any = None
  top_logprob_RA: Any = None

  def put(self, message: Stepped) -> None:
    """Its message has come."""
    size = len(message.token_R)
    self.logprob_R = np.zeros(size, np.float32)
    self.top_id_RA = np.zeros((size, MAX_LOGPROBS), np.int32)
    self.top_logprob_RA = np.zeros((size, MAX_LOGPROBS), np.float32)
    for r, logprob, ids, logprobs in message.logprobs:
      self.logprob_R[r] = logprob
      self.top_id_RA[r, :len(ids)] = ids
      self.top_logprob_RA[r, :len(ids)] = logprobs
    self.token_R.put(np.array(message.token_R, np.int32))


class Due:
  """What the commands of an instance are yet to give, in order."""

  def __init__(self, engine: Hears) -> None:
    self._engine = engine
    self._steps: collections.deque[tuple[int, Output]] = collections.deque()
    self._stages: collections.deque[Arriving] = collections.deque()

  def add(self, command: RunPrefill | RunDecode, size: int, pp: int
          ) -> Dispatched:
    """What a command gives: tokens of a size a step, of pp stages."""
    outputs = [Output(Arriving(self._engine, size))
               for _ in range(command.steps)]
    marks = [Arriving(self._engine, 1)
             for _ in range(command.steps * (pp - 1))]
    self._steps.extend((command.number, output) for output in outputs)
    self._stages.extend(marks)
    return outputs, marks

  def put_stage(self) -> None:
    """A stage but the last is done."""
    self._stages.popleft().put(np.zeros(1, np.int32))

  def put_step(self, message: Stepped) -> None:
    """A step is done.

    Raises:
      RuntimeError: another is due.
    """
    number, output = self._steps.popleft()
    if message.number != number:
      raise RuntimeError(f'a step of command {message.number} came, one of '
                         f'{number} was due')
    output.put(message)

"""A server for asyncio: any number of tasks, one thread that serves them."""

import time
from collections.abc import AsyncIterator, Sequence
from typing import Unpack

from dsjax.checkpoints.checkpoint import Model
from dsjax.config.checks import InputError, require
from dsjax.config.engine import EngineConfig
from dsjax.config.placement import Placement
from dsjax.config.request import SamplingFields
from dsjax.runtime.orchestrator import (
  Orchestrator,
  ServeOptions,
  check_served,
  serve,
)
from dsjax.runtime.orchestrator_thread import (
  Call,
  MakeOrchestrator,
  OrchestratorThread,
)
from dsjax.runtime.output import Output, Update, joined, raise_unless_served
from dsjax.runtime.prompts import Prompt
from dsjax.runtime.protocols import Report


class AsyncServer:
  """Serves the tasks of one event loop; use it as `async with`.

  Entering compiles, in the thread; leaving cancels what is left. A task that
  is cancelled, or closes a stream early, cancels its request.
  """

  def __init__(self, make: MakeOrchestrator) -> None:
    self._thread = OrchestratorThread(make)

  async def __aenter__(self) -> 'AsyncServer':
    self._thread.start()
    try:
      await self._thread.started()
    except BaseException:
      await self._thread.close()
      raise
    return self

  async def __aexit__(self, *_: object) -> None:
    await self._thread.close()

  @property
  def orchestrator(self) -> Orchestrator:
    """Its thread's: to be read, not to be driven."""
    if self._thread.orchestrator is None or self._thread.status != 'ready':
      raise RuntimeError(f'the server is {self._thread.status}'
                         ) from self._thread.failure
    return self._thread.orchestrator

  async def generate(self, prompt: Prompt, **params: Unpack[SamplingFields]
                     ) -> Output:
    """Serves one request to its end; see Orchestrator.generate.

    Raises:
      InputError: bad prompt or parameters, or a request that can never fit.
      RequestFailed: faults ended it, or closing.
      RuntimeError: the server is not open, or has failed.
    """
    updates, call = [], self._submit(prompt, params)
    try:
      while news := await call.take():
        updates += [update for _, update in news]
    finally:
      call.close()
    output = self._output(updates)
    raise_unless_served(output, self._thread.is_open)
    return output

  async def stream(self, prompt: Prompt, **params: Unpack[SamplingFields]
                   ) -> AsyncIterator[str]:
    """Yields pieces of text as they come; errors as those of generate, also
    where the request was cancelled elsewhere."""
    updates, call = [], self._submit(prompt, params)
    try:
      while news := await call.take():
        for _, update in news:
          updates.append(update)
          if update.text:
            yield update.text
    finally:
      call.close()
    raise_unless_served(self._output(updates), self._thread.is_open,
                        whole=True)

  def _submit(self, prompt: Prompt, params: SamplingFields) -> Call:
    return self._thread.submit(
        [self.orchestrator.prepare(prompt, **params)], time.perf_counter())

  def _output(self, updates: Sequence[Update]) -> Output:
    """What all updates of a request make; raises where it was not served."""
    whole = joined(updates)
    record = whole.record
    if record is None:
      raise RuntimeError('the server has failed') from self._thread.failure
    if record.status == 'rejected':
      raise InputError(whole.error)
    return Output(record.id, whole.text, whole.tokens, record.status, record,
                  whole.logprobs)


def serve_async(model: Model, placement: Placement | str,
                config: EngineConfig | None = None,
                **options: Unpack[ServeOptions]) -> AsyncServer:
  """An AsyncServer of a model over a placement; arguments as of `serve`.

  `async with dsjax.serve_async(model, placement) as server:
  await server.generate('Hi')`.
  """
  placement = check_served(model, placement, config)
  for name in options:
    require(name in ServeOptions.__annotations__, 'option', name,
            f'one of {tuple(ServeOptions.__annotations__)}')
  def start(report: Report) -> Orchestrator:
    given: ServeOptions = {'report': report, **options}
    return serve(model, placement, config, **given)
  return AsyncServer(start)

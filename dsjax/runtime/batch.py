"""Many prompts at once: generate_all of an Orchestrator."""

import contextlib
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dsjax.config.checks import InputError, require
from dsjax.config.request import Request, Sampling
from dsjax.runtime.output import Interrupted, Output, RequestFailed
from dsjax.runtime.prompts import Prompt

if TYPE_CHECKING:
  from dsjax.runtime.orchestrator import Orchestrator


def generate_all(server: 'Orchestrator', prompts: Iterable[Prompt],
                 sampling: Sequence[Mapping[str, Any]] | None, errors: str,
                 params: Mapping[str, Any]) -> list[Output]:
  """See Orchestrator.generate_all."""
  require(errors in ('raise', 'return'), 'errors', errors,
          "'raise' or 'return'")
  require(not isinstance(prompts, str), 'prompts', prompts, 'a list of prompts')
  prompts = list(prompts)
  each = [{}] * len(prompts) if sampling is None else list(sampling)
  require(len(each) == len(prompts), 'sampling', sampling,
          f'as many as the prompts, {len(prompts)}')
  ready = [server.prepare(prompt, **{**params, **own})
           for prompt, own in zip(prompts, each, strict=True)]
  ids: list[int] = []
  try:
    with _interrupt_held() as let_through:
      _enqueue_all(server, ready, ids, errors)
      for id in ids:
        while not server.requests[id].finished:
          server.wait()
          let_through()
  except KeyboardInterrupt:
    raise Interrupted(_end_all(server, ids)) from None
  except BaseException:
    _end_all(server, ids)
    raise
  failures = [server.requests[id].failure for id in ids]
  outputs = [server.output(id) for id in ids]
  if errors == 'raise' and any(failures):
    raise RequestFailed(str(next(filter(None, failures))), outputs)
  return outputs


def _enqueue_all(server: 'Orchestrator',
                 ready: Sequence[tuple[tuple[int, ...], Sampling]],
                 ids: list[int], errors: str) -> None:
  """Queues requests that arrive together, now; adds to ids as it does."""
  now = server.now
  for prompt, sampling in ready:
    ids.append(server.next_id)
    server.enqueue(Request(ids[-1], now, prompt, sampling),
                   more=len(ids) < len(ready))
    state = server.requests[ids[-1]]
    if state.error and not state.failed and errors == 'raise':
      raise InputError(f'prompts[{len(ids) - 1}]: {state.error}')


def _end_all(server: 'Orchestrator', ids: Sequence[int]) -> list[Output]:
  """Cancels the requests that have not ended; the outputs of all."""
  for id in ids:
    if id in server.unfinished:
      server.cancel(id)
  return [server.output(id) for id in ids if id in server.requests]


@contextlib.contextmanager
def _interrupt_held() -> Generator[Callable[[], None], None, None]:
  """Ctrl-C waits for a call of the function that this gives.

  So that none comes between a decision of the scheduler and what performs it.
  """
  handler, came = signal.getsignal(signal.SIGINT), []
  if (threading.current_thread() is not threading.main_thread()
      or not callable(handler)):
    yield lambda: None
    return

  def let_through() -> None:
    while came:
      handler(*came.pop())

  signal.signal(signal.SIGINT, lambda *args: came.append(args))
  try:
    yield let_through
    let_through()
  finally:
    signal.signal(signal.SIGINT, handler)

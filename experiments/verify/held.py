"""What the processes of a server hold, as they say themselves."""

import contextlib
from typing import Any

from dsjax.runtime.cluster.messages import Counted
from dsjax.runtime.orchestrator import Orchestrator


def counted(server: Orchestrator) -> list[Counted]:
  """What each process holds, and how often it has compiled: once all are
  there, as the end of one may be seen late."""
  engines: list[Any] = server.engines  # RemoteEngines
  answers: list[Any] = []
  while not answers or not all(answer() for answer in answers):
    server.poll()
    if server.fleet.down:
      answers = []
    elif not answers:
      with contextlib.suppress(RuntimeError):  # one has just ended
        answers = [engine.count() for engine in engines]
  return [answer() for answer in answers]

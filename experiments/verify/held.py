"""What the processes of a server hold, as they say themselves."""

import contextlib
from typing import Any

from dsjax.runtime.cluster.messages import Counted
from dsjax.runtime.orchestrator import Orchestrator


def counted(server: Orchestrator) -> list[Counted]:
  """What each process holds, and how often it has compiled: once all are
  there that come back, as the end of one may be seen late."""
  engines: list[Any] = server.engines  # RemoteEngines
  down, answers = server.fleet.down, {}
  while True:
    server.poll()
    there = [i for i in range(len(engines)) if i not in down]
    if any(back_s is not None for back_s in down.values()):
      answers = {}  # it comes back, and is asked then
    elif list(answers) != there:
      answers = {}
      with contextlib.suppress(RuntimeError):  # one has just ended
        answers = {i: engines[i].count() for i in there}
    elif all(answer() for answer in answers.values()):
      return [answer() for answer in answers.values()]

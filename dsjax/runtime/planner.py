"""Where a policy's resize is asked beside the serving loop."""

import multiprocessing
import pickle
import signal
from concurrent.futures import Executor, ProcessPoolExecutor

from dsjax.config.checks import InputError, require
from dsjax.runtime.orphans import end_with_parent
from dsjax.scheduling.policy import Policy


def planner_process() -> ProcessPoolExecutor:
  """A process of its own, for serve(planner=); it leaves Ctrl-C to this one,
  and ends where this one is killed.

  As with all of multiprocessing, the program that calls this must be safe to
  import: `if __name__ == '__main__':`.
  """
  return ProcessPoolExecutor(1, multiprocessing.get_context('spawn'), _begin)


def check_planner(planner: Executor | None, policy: Policy,
                  latencies: object, link: object) -> None:
  """Before a server starts: whether the policy can be asked there, with these
  latencies and this link.

  Raises:
    InputError: it names the field.
  """
  if planner is None:
    return
  require(isinstance(planner, Executor), 'planner', planner,
          'an Executor, such as planner_process(), or None')
  require(policy.resize, 'planner', planner,
          f'None with policy {policy.name!r}, which changes no roles')
  if isinstance(planner, ProcessPoolExecutor):
    for field, value, told, allowed in (
        ('policy', policy, policy.name, 'a shipped one, as '
         'dsjax.policies.named.named makes it, or one of functions of a '
         'module'),
        ('latency', (latencies, link), type(latencies).__name__,
         'values of classes of a module')):
      try:
        pickle.dumps(value)
      except Exception as error:  # of its own objects
        raise InputError(
            f'{field}={told!r} cannot be sent to the planner, which is another '
            f'process ({error}): must be {allowed}') from error


def _begin() -> None:
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  end_with_parent()

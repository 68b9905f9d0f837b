"""Runners, one a claim; what they share and what they draw lies in folders."""

import os
import signal
import sys


def stop_importing(*_: object) -> None:
  """Ctrl-C before cli.main takes over: modules that are half imported would
  tell it as errors of their own."""
  os.write(2, b'stopped\n')
  os._exit(130)


# So argv begins while `python -m experiments.NAME` finds its module.
if sys.argv[0] == '-m' and (
    signal.getsignal(signal.SIGINT) is signal.default_int_handler):
  signal.signal(signal.SIGINT, stop_importing)

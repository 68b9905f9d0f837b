"""The first file of the process of an instance, before jax is imported.

On Linux the kernel kills the process with the thread that has started it: one
that is stopped, or hangs, would not see the end of its socket.
"""

import os
import sys

PDEATHSIG, SIGKILL = 1, 9  # of prctl


def main() -> None:
  """sys.argv: as instance.main, and the process that has started it."""
  *argv, parent = sys.argv[1:]
  if sys.platform == 'linux':
    import ctypes
    ctypes.CDLL(None).prctl(PDEATHSIG, SIGKILL)
    if os.getppid() != int(parent):
      sys.exit('who started this instance is gone')
  from dsjax.runtime.cluster import instance
  instance.main(argv)


if __name__ == '__main__':
  main()

"""The first file of the process of an instance, before jax is imported.

It comes to its server at once, and says that it is there while it loads: one
that says nothing was stopped, or hangs. On Linux the kernel kills the process
with the thread that has started it: one that is stopped, or hangs, would not
see the end of its socket.
"""

import contextlib
import os
import socket
import sys
import threading
from multiprocessing import AuthenticationError
from multiprocessing import connection as mp

KEY = 'DSJAX_INSTANCE_KEY'
GREETS_S = 60.0  # until a server that can be reached has greeted a process
LOADING_S = 0.2  # between two signs of life
LOADING = b''  # a sign of life: a message of nothing, before the first
PDEATHSIG, SIGKILL = 1, 9  # of prctl


def shut(end: socket.socket) -> None:
  """Ends a socket that another thread may read."""
  with contextlib.suppress(OSError):  # it has ended by itself
    end.shutdown(socket.SHUT_RDWR)


def enter(address: str, key: bytes) -> mp.Connection:
  """The connection of a process to its server: both have shown their key.

  Raises:
    OSError, EOFError: no process is there, or none greets it in GREETS_S.
    AuthenticationError: the server has another key, or is no server.
  """
  host, port = address.rsplit(':', 1)
  server = socket.create_connection((host, int(port)), GREETS_S)
  server.settimeout(None)
  late = threading.Timer(GREETS_S, shut, (server,))
  late.daemon = True
  connection = mp.Connection(os.dup(server.fileno()))
  try:
    late.start()
    mp.answer_challenge(connection, key)
    mp.deliver_challenge(connection, key)
  except AssertionError as error:  # so Python 3.11 says what 3.12 does
    connection.close()
    raise AuthenticationError(str(error)) from error
  except BaseException:
    connection.close()
    raise
  finally:
    late.cancel()
    server.close()
  return connection


class Loading:
  """Says on a connection that its process is there, until `end`."""

  def __init__(self, connection: mp.Connection) -> None:
    self.connection, self._over = connection, threading.Event()
    self._thread = threading.Thread(target=self._say, daemon=True)
    self._thread.start()

  def _say(self) -> None:
    try:
      while not self._over.wait(LOADING_S):
        self.connection.send_bytes(LOADING)
    except OSError:
      os._exit(0)  # the server is gone

  def end(self) -> mp.Connection:
    """The connection, on which it says nothing more."""
    self._over.set()
    self._thread.join()
    return self.connection


def main() -> None:
  """sys.argv: address of the server, index, incarnation, host, and the process
  that has started this one."""
  address, index, incarnation, host, parent = sys.argv[1:]
  if sys.platform == 'linux':
    import ctypes
    ctypes.CDLL(None).prctl(PDEATHSIG, SIGKILL)
    if os.getppid() != int(parent):
      sys.exit('who started this instance is gone')
  try:
    connection = enter(address, bytes.fromhex(os.environ.pop(KEY)))
  except (OSError, EOFError, AuthenticationError) as error:
    sys.exit(f'instance {index} cannot come to {address}: {error}')
  loading = Loading(connection)
  from dsjax.runtime.cluster import instance
  instance.run(loading.end(), int(index), int(incarnation), host)


if __name__ == '__main__':
  main()

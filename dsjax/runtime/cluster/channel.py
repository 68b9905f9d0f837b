"""A socket between a server and the process of an instance.

It begins with a proof, both ways, that the other side has the key (HMAC, of
multiprocessing.connection); nothing is encrypted. Two threads read and write,
so that neither side ever waits for the other: not in the middle of a message,
nor where the other's buffers are full.
"""

import collections
import contextlib
import os
import queue
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable
from multiprocessing import AuthenticationError
from multiprocessing import connection as mp
from typing import Any, TypeAlias

from dsjax.runtime.cluster import messages
from dsjax.runtime.cluster.messages import Hello, Message

LOOPBACK = '127.0.0.1'
MOST_BYTES = 2**28  # of a message
GREET_S = 10.0  # that a stranger may take to prove itself
MOST_GREETED = 8  # strangers at a time
CLOSED = 'its process ended, or its socket was cut'
# What a message is answered by at once; None: it is kept, for `take`.
Answer: TypeAlias = Callable[[Any], Message | None]


class Channel:
  """Sends and receives the messages of one incarnation.

  Attributes:
    heard_s: when it last heard something, on time.monotonic.
    ended: why it carries nothing any more, or ''.
  """

  def __init__(self, connection: mp.Connection, incarnation: int,
               answer: Answer = lambda message: None,
               end: Callable[[str], object] = lambda why: None) -> None:
    """answer: called in the reading thread. end: called there when the other
    side is gone, with the reason."""
    self.incarnation, self.heard_s = incarnation, time.monotonic()
    self.ended = ''
    self._connection, self._answer, self._end = connection, answer, end
    self._socket = socket.socket(fileno=os.dup(connection.fileno()))
    self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    self._in: collections.deque[Any] = collections.deque()
    self._news = threading.Event()
    self._out: queue.SimpleQueue[bytes | threading.Event | None] = (
        queue.SimpleQueue())
    self._reader = threading.Thread(target=self._read, daemon=True,
                                    name='dsjax reader')
    self._reader.start()
    threading.Thread(target=self._write, daemon=True,
                     name='dsjax writer').start()

  def send(self, message: Message) -> None:
    """Sends a message, later, in order.

    Raises:
      RuntimeError: the other side is gone.
    """
    if self.ended:
      raise RuntimeError(self.ended)
    self._out.put(messages.dump(self.incarnation, message))

  def flush(self, seconds: float) -> None:
    """Waits until all is sent, so long at most."""
    sent = threading.Event()
    self._out.put(sent)
    sent.wait(seconds)

  def take(self) -> list[Any]:
    """The messages that have come since the last call."""
    taken = []
    while self._in:
      taken.append(self._in.popleft())
    return taken

  def wait(self) -> None:
    """Waits until something has come, or it has ended."""
    self._news.wait()
    self._news.clear()

  def close(self) -> None:
    """Ends it; both threads end too."""
    self.ended = self.ended or 'it was closed'
    self._out.put(None)
    self.cut()

  def cut(self) -> None:
    """Cuts the connection, as a fault would."""
    with contextlib.suppress(OSError):  # it has ended by itself
      self._socket.shutdown(socket.SHUT_RDWR)

  def _read(self) -> None:
    why = CLOSED
    try:
      while True:
        data = self._connection.recv_bytes(MOST_BYTES)
        self.heard_s = time.monotonic()
        incarnation, message = messages.load(data)
        if incarnation != self.incarnation:
          continue
        answer = self._answer(message)
        if answer is not None:
          self._out.put(messages.dump(self.incarnation, answer))
        else:
          self._in.append(message)
          self._news.set()
    except (EOFError, OSError):
      pass
    except Exception as error:  # of whatever kind: it is not trusted
      why = f'it sent what is no message: {error}'
    self.ended = self.ended or why
    self._news.set()
    self._out.put(None)
    self._end(why)

  def _write(self) -> None:
    with contextlib.suppress(OSError):  # the reader tells
      while (data := self._out.get()) is not None:
        if isinstance(data, threading.Event):
          data.set()
        else:
          self._connection.send_bytes(data)
    self.cut()  # wakes the reader
    self._reader.join()
    self._socket.close()
    self._connection.close()


class Door:
  """Awaits one process, which has the key, on a port of its own.

  The port is open until it has come, or `close`.

  Attributes:
    address: 'HOST:PORT'. key: for that process only. channel: None until it
      has come. failed: why it cannot come, or ''.
  """

  def __init__(self, index: int, incarnation: int) -> None:
    self.key, self.failed = secrets.token_bytes(32), ''
    self.channel: Channel | None = None
    self._index, self._incarnation = index, incarnation
    self._lock, self._closed = threading.Lock(), False
    self._listens = socket.create_server((LOOPBACK, 0))
    self.address = '{}:{}'.format(*self._listens.getsockname())
    self._strangers = threading.Semaphore(MOST_GREETED)
    threading.Thread(target=self._accept, daemon=True,
                     name='dsjax door').start()

  def close(self) -> None:
    """Lets nobody in any more."""
    with self._lock:
      self._closed = True
    with contextlib.suppress(OSError):
      self._listens.shutdown(socket.SHUT_RDWR)  # wakes accept

  def _accept(self) -> None:
    with self._listens, contextlib.suppress(OSError):  # it was shut down
      while True:
        stranger, _ = self._listens.accept()
        self._strangers.acquire()  # the others wait for their turn
        threading.Thread(target=self._greet, args=(stranger,),
                         daemon=True, name='dsjax greeting').start()

  def _greet(self, stranger: socket.socket) -> None:
    connection = mp.Connection(stranger.detach())
    try:
      _limit(connection, GREET_S)
      mp.deliver_challenge(connection, self.key)
      mp.answer_challenge(connection, self.key)
      incarnation, hello = messages.load(connection.recv_bytes(4096))
      _limit(connection, 0.0)
    except (AuthenticationError, EOFError, OSError, ValueError, TypeError):
      connection.close()
      return
    finally:
      self._strangers.release()
    self._admit(connection, incarnation, hello)

  def _admit(self, connection: mp.Connection, incarnation: int,
             hello: Any) -> None:
    """Lets in who has the key, once."""
    expected = Hello(messages.VERSION, self._index), self._incarnation
    with self._lock:
      if (hello, incarnation) != expected:
        self.failed = f'{hello} came, {expected[0]} was awaited'
      if self._closed or self.failed:
        connection.close()
        return
      self._closed = True
      self.channel = Channel(connection, incarnation)
    self.close()


def _limit(connection: mp.Connection, seconds: float) -> None:
  """Its reads and writes fail after so long; 0.0: never."""
  with socket.socket(fileno=os.dup(connection.fileno())) as known:
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
      known.setsockopt(socket.SOL_SOCKET, option,
                       struct.pack('ll', int(seconds), 0))


def connect(address: str, key: bytes, index: int, incarnation: int,
            answer: Answer, end: Callable[[str], object]) -> Channel:
  """The channel of a process to its server.

  Raises:
    OSError, EOFError, AuthenticationError: it is not let in.
  """
  host, port = address.rsplit(':', 1)
  connection = mp.Client((host, int(port)), authkey=key)
  connection.send_bytes(messages.dump(incarnation, Hello(
      messages.VERSION, index)))
  return Channel(connection, incarnation, answer, end)

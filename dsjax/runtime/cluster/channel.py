"""A socket between a server and the process of an instance.

It begins with a proof, both ways, that the other side has the key (HMAC, of
multiprocessing.connection); nothing is encrypted. Neither side ever waits for
the other: one thread reads, and what the socket does not take at once another
one writes: a thread that wakes takes time from the steps of its core. Each
message has a number, the Hello 0: one that is lost, comes twice or out of order
ends the channel.
"""

import collections
import contextlib
import os
import queue
import secrets
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing import connection as mp
from typing import Any, TypeAlias

from dsjax.runtime.cluster import begin, messages
from dsjax.runtime.cluster.messages import Hello, Message

LOOPBACK = '127.0.0.1'
MOST_BYTES = 2**28  # of a message
MOST_GREETED = 64  # strangers at a time: one more, and the oldest must go
FULL_S = 0.05  # until the next try where this process has no file left
# A peer whose host is gone is noticed by the kernel after about 30 s: idle
# seconds until it asks, between two questions, how many of these.
KEEPALIVE = {'TCP_KEEPIDLE': 10, 'TCP_KEEPINTVL': 5, 'TCP_KEEPCNT': 4,
             'TCP_USER_TIMEOUT': 30_000}  # of Linux; others have some
CLOSED = 'its process ended, or its socket was cut'
# What a message is answered by at once; None: it is kept, for `take`.
Answer: TypeAlias = Callable[[Any], Message | None]


def numbered(count: int, data: bytes) -> bytes:
  """A message with its number before it."""
  return (count % 2**32).to_bytes(4, 'little') + data


def unnumbered(count: int, data: bytes) -> bytes:
  """The inverse.

  Raises:
    ValueError: it has another number.
  """
  came = int.from_bytes(data[:4], 'little')
  if came != count % 2**32:
    raise ValueError(f'message {came} came, {count} was due')
  return data[4:]


def framed(data: bytes) -> bytes:
  """As a multiprocessing.connection sends it, and reads it."""
  return struct.pack('!i', len(data)) + data


class Channel:
  """Sends and receives the messages of one incarnation.

  Attributes:
    heard_s: when it last heard something, on time.monotonic.
    news: set when something has come, or it has ended.
    ended: why it carries nothing any more, or ''.
  """

  def __init__(self, connection: mp.Connection, incarnation: int,
               answer: Answer = lambda message: None,
               end: Callable[[str], object] = lambda why: None,
               sent: int = 0, heard: int = 0) -> None:
    """answer: called in the reading thread. end: called there when the other
    side is gone, with the reason. sent, heard: messages so far."""
    self._sent, self._heard = sent, heard
    self._sending, self._left = threading.Lock(), 0  # for the thread to write
    self.incarnation, self.heard_s = incarnation, time.monotonic()
    self.ended = ''
    self._connection, self._answer, self._end = connection, answer, end
    self._socket = socket.socket(fileno=os.dup(connection.fileno()))
    self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
      if hasattr(socket, name):
        self._socket.setsockopt(socket.IPPROTO_TCP, getattr(socket, name),
                                value)
    self._in: collections.deque[Any] = collections.deque()
    self.news = threading.Event()
    self._out: queue.SimpleQueue[bytes | threading.Event | None] = (
        queue.SimpleQueue())
    self._reader = threading.Thread(target=self._read, daemon=True,
                                    name='dsjax reader')
    self._reader.start()
    threading.Thread(target=self._write, daemon=True,
                     name='dsjax writer').start()

  def send(self, message: Message) -> None:
    """Sends a message, now or later, in order.

    Raises:
      RuntimeError: the other side is gone.
    """
    if self.ended:
      raise RuntimeError(self.ended)
    self.put(messages.dump(self.incarnation, message))

  def put(self, data: bytes) -> None:
    """Sends the bytes of a message; lost where the other side is gone."""
    with self._sending:
      frame = framed(numbered(self._sent, data))
      self._sent += 1
      done = 0
      if not self._left and hasattr(socket, 'MSG_DONTWAIT'):
        with contextlib.suppress(OSError):  # it is full, or the reader tells
          done = self._socket.send(frame, socket.MSG_DONTWAIT)
      if done < len(frame):
        self._left += 1
        self._out.put(frame[done:])

  def flush(self, seconds: float) -> None:
    """Waits until all is sent, so long at most."""
    sent = threading.Event()
    self._out.put(sent)
    if not self.ended:
      sent.wait(seconds)

  def take(self) -> list[Any]:
    """The messages that have come since the last call."""
    taken = []
    while self._in:
      taken.append(self._in.popleft())
    return taken

  def wait(self, seconds: float | None = None) -> None:
    """Waits for news, so long at most."""
    self.news.wait(seconds)
    self.news.clear()

  def close(self) -> None:
    """Ends it; both threads end too."""
    self.ended = self.ended or 'it was closed'
    self._out.put(None)
    self.cut()

  def cut(self) -> None:
    """Cuts the connection, as a fault would."""
    begin.shut(self._socket)

  def _read(self) -> None:
    why = CLOSED
    try:
      while True:
        data = self._connection.recv_bytes(MOST_BYTES)
        self.heard_s = time.monotonic()
        incarnation, message = messages.load(unnumbered(self._heard, data))
        self._heard += 1
        if incarnation != self.incarnation:
          continue
        answer = self._answer(message)
        if answer is not None:
          self.put(messages.dump(self.incarnation, answer))
        else:
          self._in.append(message)
          self.news.set()
    except (EOFError, OSError):
      pass
    except Exception as error:  # of whatever kind: it is not trusted
      why = f'it sent what is no message: {error}'
    self.ended = self.ended or why
    self.news.set()
    self._out.put(None)
    self._end(why)

  def _write(self) -> None:
    with contextlib.suppress(OSError):  # the reader tells
      while (data := self._out.get()) is not None:
        if isinstance(data, threading.Event):
          data.set()
        else:
          self._socket.sendall(data)
          with self._sending:
            self._left -= 1
    self.cut()  # wakes the reader
    self._reader.join()
    self._socket.close()
    self._connection.close()


def bracketed(host: str) -> str:
  """An address as it is written before a port: IPv6 in brackets."""
  return f'[{host}]' if ':' in host else host


def listen(host: str, port: int = 0) -> socket.socket:
  """Listens on an address of this host; port 0: any.

  Raises:
    OSError: it is none, or its port is taken.
    UnicodeError: it is no name.
  """
  family = socket.AF_INET6 if ':' in host else socket.AF_INET
  *_, address = socket.getaddrinfo(host, port, family, socket.SOCK_STREAM)[0]
  return socket.create_server(address[:2], family=family)


def claim(host: str, port: int) -> socket.socket | None:
  """A port's name, for what is returned: on Linux no other process of this
  host has it meanwhile, whether somebody listens there or not.

  Raises:
    OSError: another has it.
  """
  if sys.platform != 'linux':
    return None
  name = socket.socket(socket.AF_UNIX)
  try:
    name.bind(f'\0dsjax {host} {port}')
  except BaseException:
    name.close()
    raise
  return name


class Door:
  """Awaits one process, which has the key, on a port of its own.

  The port is open until it has come, or `close`. Strangers may take as long as
  they like to prove themselves, but the oldest makes room for the newest. Who
  has the key may load for a while before it says Hello.

  Attributes:
    address: 'HOST:PORT'. key: for that process only. channel: None until it
      has come. pid: of the process, then. failed: why it cannot come, or ''.
    heard_s: when one that has the key last said something, on time.monotonic,
      or None.
  """

  def __init__(self, index: int, incarnation: int, host: str = LOOPBACK,
               port: int = 0, key: bytes = b'') -> None:
    """host, port: where it listens; 0: any port. key: b'': a new one."""
    self.key, self.failed = key or secrets.token_bytes(32), ''
    self.channel: Channel | None = None
    self.pid: int | None = None
    self.heard_s: float | None = None
    self._index, self._incarnation = index, incarnation
    self._lock, self._closed = threading.Lock(), False
    self._listens = listen(host, port)
    self.address = '{}:{}'.format(*self._listens.getsockname())
    self._strangers: collections.deque[socket.socket] = collections.deque()
    self._known: list[socket.socket] = []  # strangers no more, but not in yet
    threading.Thread(target=self._accept, daemon=True,
                     name='dsjax door').start()

  def close(self) -> None:
    """Takes no more connections."""
    with self._lock:
      self._closed = True
      ends = self._listens, *self._strangers, *self._known
    for end in ends:  # wakes accept and greetings
      begin.shut(end)

  def _accept(self) -> None:
    with self._listens:
      while not self._closed:
        try:
          stranger, _ = self._listens.accept()
        except ConnectionError:  # it has gone already
          continue
        except OSError:  # it was shut down, or there are no files left
          if not self._closed:
            time.sleep(FULL_S)
          continue
        with self._lock:
          self._strangers.append(stranger)
          several = list(self._strangers)
          too_many = several if self._closed else several[:-MOST_GREETED]
        for oldest in too_many:
          begin.shut(oldest)
        threading.Thread(target=self._greet, args=(stranger,),
                         daemon=True, name='dsjax greeting').start()

  def _greet(self, stranger: socket.socket) -> None:
    try:
      connection = mp.Connection(os.dup(stranger.fileno()))
    except OSError:  # there are no files left: it may come again
      self._let_go(stranger)
      return
    try:
      mp.deliver_challenge(connection, self.key)
      mp.answer_challenge(connection, self.key)
      with self._lock:
        self._strangers.remove(stranger)
        self._known.append(stranger)
        if self._closed:
          begin.shut(stranger)
      incarnation, hello = messages.load(unnumbered(
          0, self._hear_hello(connection)))
    except Exception:  # of whatever kind: it is not trusted
      connection.close()
      return
    finally:
      self._let_go(stranger)
    self._admit(connection, incarnation, hello)

  def _let_go(self, stranger: socket.socket) -> None:
    with self._lock:
      (self._known if stranger in self._known else self._strangers).remove(
          stranger)
    stranger.close()

  def _hear_hello(self, connection: mp.Connection) -> bytes:
    """The first message that is more than a sign of life."""
    data = begin.LOADING
    while data == begin.LOADING:
      self.heard_s = time.monotonic()
      data = connection.recv_bytes(4096)
    return data

  def _admit(self, connection: mp.Connection, incarnation: int,
             hello: Any) -> None:
    """Lets in who has the key, once."""
    expected = Hello(messages.VERSIONS, self._index, getattr(hello, 'pid', 0))
    with self._lock:
      if (hello, incarnation) != (expected, self._incarnation):
        self.failed = f'{hello} came, {expected} was awaited'
      if isinstance(hello, Hello) and hello.versions != messages.VERSIONS:
        self.failed = (f'its versions are {hello.versions}, those of the '
                       f'server {messages.VERSIONS}')
      if self._closed or self.failed:
        with contextlib.suppress(OSError), connection:  # it may have gone
          connection.send_bytes(numbered(0, messages.dump(
              self._incarnation, messages.Refused(
                  self.failed or 'another has come'))))
        return
      self._closed, self.pid = True, expected.pid
      self.channel = Channel(connection, incarnation, heard=1)
    self.close()


def connect(connection: mp.Connection, index: int, incarnation: int,
            answer: Answer, end: Callable[[str], object]) -> Channel:
  """The channel of a process to the server that it has entered (begin.py).

  Raises:
    OSError: the server has gone.
  """
  try:
    connection.send_bytes(numbered(0, messages.dump(incarnation, Hello(
        messages.VERSIONS, index, os.getpid()))))
  except BaseException:
    connection.close()
    raise
  return Channel(connection, incarnation, answer, end, sent=1)

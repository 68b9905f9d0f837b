"""The door and the channel: who is let in, and what of it comes."""

import concurrent.futures
import contextlib
import errno
import os
import socket
import threading
import time
from multiprocessing import AuthenticationError
from multiprocessing import connection as mp

import pytest

from dsjax.runtime.cluster import begin, channel, messages

pytestmark = pytest.mark.usefixtures('no_hang')
IGNORE = (lambda message: None, lambda why: None)


def until(true):
  """The value of `true` once it is."""
  while not (value := true()):
    time.sleep(1e-3)
  return value


@pytest.fixture
def door():
  made = channel.Door(1, 3)
  yield made
  made.close()
  if made.channel:
    made.channel.close()


def enter(door, index=1, incarnation=3, hear=IGNORE):
  return channel.connect(begin.enter(door.address, door.key), index,
                         incarnation, *hear)


def greet(connection, versions=messages.VERSIONS):
  """The Hello of a process that speaks for itself."""
  connection.send_bytes(channel.numbered(0, messages.dump(
      3, messages.Hello(versions, 1, 9))))


def refused(address):
  host, port = address.rsplit(':', 1)
  try:
    with socket.create_connection((host, int(port))):
      return False
  except ConnectionRefusedError:
    return True


def test_it_listens_on_loopback_until_it_is_entered(door):
  assert door.address.startswith('127.0.0.1:') and not refused(door.address)
  inside = enter(door)
  until(lambda: door.channel)
  until(lambda: refused(door.address))
  inside.close()
  until(lambda: door.channel.ended)


def test_who_has_another_key_is_refused(door):
  with pytest.raises(AuthenticationError):
    begin.enter(door.address, b'x' * 32)
  inside = enter(door)  # the right one still comes in
  until(lambda: door.channel)
  inside.close()


def test_strangers_hold_no_process_up(door):
  """Silent ones, and more than are greeted at a time: the oldest are let go,
  and the others once the process has come."""
  host, port = door.address.rsplit(':', 1)
  silent = [socket.create_connection((host, int(port)))
            for _ in range(3 * channel.MOST_GREETED)]
  for stranger in silent[:2 * channel.MOST_GREETED]:
    while stranger.recv(4096):
      pass
    stranger.close()
  noise = socket.create_connection((host, int(port)))
  noise.sendall(b'GET / HTTP/1.1\r\n\r\n' * 100)
  noise.close()
  slow = socket.create_connection((host, int(port)))
  slow.sendall(b'\0\0')  # of the length of its answer, and nothing follows
  inside = enter(door)
  until(lambda: door.channel)
  for stranger in (*silent[2 * channel.MOST_GREETED:], slow):
    with contextlib.suppress(ConnectionResetError):
      while stranger.recv(4096):
        pass
    stranger.close()
  until(lambda: not door._strangers)
  inside.close()


def test_one_that_loads_says_so_and_strangers_do_not_crowd_it_out(
    door, monkeypatch):
  """It has the key: the door waits for it, however many come meanwhile."""
  monkeypatch.setattr(begin.os, '_exit', lambda code: None)  # of this process
  host, port = door.address.rsplit(':', 1)
  loading = begin.Loading(begin.enter(door.address, door.key))
  before = until(lambda: door.heard_s)
  strangers = [socket.create_connection((host, int(port)))
               for _ in range(2 * channel.MOST_GREETED)]
  for stranger in strangers[:channel.MOST_GREETED]:  # the oldest must go
    while stranger.recv(4096):
      pass
  until(lambda: door.heard_s > before)
  inside = channel.connect(loading.end(), 1, 3, *IGNORE)
  here = until(lambda: door.channel)
  inside.send(messages.Ready())
  assert until(here.take) == [messages.Ready()]
  for stranger in strangers:
    stranger.close()
  inside.close()


def test_one_that_loads_ends_with_its_server(door, monkeypatch):
  ended = []
  monkeypatch.setattr(begin.os, '_exit', ended.append)
  loading = begin.Loading(begin.enter(door.address, door.key))
  until(lambda: door.heard_s)
  door.close()
  until(lambda: ended)
  loading.end().close()


def test_a_peer_whose_host_is_gone_is_noticed_by_the_kernel(pair):
  """No packet says so: both ends ask, and give up what is not answered."""
  for end in pair:
    assert end._socket.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    for name, value in channel.KEEPALIVE.items():
      if hasattr(socket, name):
        assert end._socket.getsockopt(
            socket.IPPROTO_TCP, getattr(socket, name)) == value


@pytest.mark.parametrize('index, incarnation', [(0, 3), (1, 2)])
def test_who_is_not_awaited_is_told_of(door, index, incarnation):
  inside = enter(door, index, incarnation)
  assert 'was awaited' in until(lambda: door.failed)
  assert door.channel is None
  until(lambda: inside.ended)


def test_another_version_is_told_of_on_both_sides(door):
  host, port = door.address.rsplit(':', 1)
  with mp.Client((host, int(port)), authkey=door.key) as other:
    greet(other, 'dsjax 9')
    why = until(lambda: door.failed)
    assert why.startswith('its versions are dsjax 9, those of the server dsjax')
    assert messages.load(channel.unnumbered(0, other.recv_bytes())) == (
        3, messages.Refused(why))
  assert f'messages {messages.VERSION}, jax 0.' in messages.VERSIONS


# What listens on the port of a server, and is none.


def silent(stranger):
  """Says nothing."""


def other_words(stranger):
  mp.Connection(os.dup(stranger.fileno())).send_bytes(b'hello')


def one_that_leaves(stranger):
  stranger.close()


def long_words(stranger):
  stranger.sendall(b'SSH-2.0-OpenSSH_9.2\r\n')


@pytest.mark.parametrize('says, error', [
    (silent, EOFError), (one_that_leaves, (ConnectionError, EOFError)),
    (long_words, OSError), (other_words, AuthenticationError)])
def test_a_process_is_not_held_up_by_who_is_no_server(monkeypatch, says,
                                                      error):
  if says is silent:
    monkeypatch.setattr(begin, 'GREETS_S', 0.2)
  with socket.create_server(('127.0.0.1', 0)) as listens:
    entering = concurrent.futures.ThreadPoolExecutor(1).submit(
        begin.enter, '{}:{}'.format(*listens.getsockname()), b'x' * 32)
    stranger, _ = listens.accept()
    with stranger:
      says(stranger)
      with pytest.raises(error):
        entering.result()


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason='no IPv6 here')
def test_it_may_listen_on_an_address_of_ipv6():
  door = channel.Door(1, 3, '::1')
  inside = enter(door)
  here = until(lambda: door.channel)
  here.send(messages.Ready())
  assert until(inside.take) == [messages.Ready()]
  inside.close()


@pytest.mark.parametrize('error', [
    ConnectionAbortedError(), OSError(errno.EMFILE, 'too many open files')])
def test_a_connection_that_is_not_accepted_closes_no_door(monkeypatch, error):
  listens, gone = socket.create_server(('127.0.0.1', 0)), [True]

  class Refuses:
    """The kernel tells of the first one that it has gone, or of this process
    that it has too many files."""

    def __init__(self, *_, **__):
      self.getsockname, self.shutdown = listens.getsockname, listens.shutdown

    def __enter__(self):
      return listens.__enter__()

    def __exit__(self, *error):
      return listens.__exit__(*error)

    def accept(self):
      if gone and gone.pop():
        raise error
      return listens.accept()

  monkeypatch.setattr(channel.socket, 'create_server', Refuses)
  door = channel.Door(1, 3)
  inside = enter(door)
  until(lambda: door.channel)
  inside.close()


def test_one_for_which_no_file_is_left_is_let_go(door, monkeypatch):
  real, full = os.dup, [True]

  def dup(file):
    if threading.current_thread().name == 'dsjax greeting' and full:
      full.pop()
      raise OSError(errno.EMFILE, 'too many open files')
    return real(file)

  monkeypatch.setattr(os, 'dup', dup)
  with pytest.raises((OSError, EOFError)):
    begin.enter(door.address, door.key)
  assert not door._strangers
  inside = enter(door)
  until(lambda: door.channel)
  inside.close()


def test_a_second_process_with_the_same_key_is_not_let_in(door):
  """Of two that prove it at a time one comes in."""
  host, port = door.address.rsplit(':', 1)
  ends = [mp.Client((host, int(port)), authkey=door.key) for _ in range(2)]
  for end in ends:
    with contextlib.suppress(OSError):  # the other has come in
      greet(end)
  here = until(lambda: door.channel)
  here.send(messages.Ready())
  said = []
  for end in ends:
    with contextlib.suppress(ConnectionError, EOFError):
      _, message = messages.load(end.recv_bytes()[4:])
      said.append(message)
    end.close()
  assert said.count(messages.Ready()) == 1


def test_a_door_that_was_closed_lets_nobody_in(door):
  door.close()
  until(lambda: refused(door.address))


@pytest.fixture
def pair(door):
  inside = enter(door)
  yield until(lambda: door.channel), inside
  inside.close()


def test_messages_come_in_order(pair):
  here, there = pair
  sent = [messages.Admit(i, tuple(range(i * 100)), 1, {}) for i in range(50)]
  for message in sent:
    here.send(message)
  got = []
  while len(got) < len(sent):
    got += there.take()
  assert got == sent


def test_what_another_incarnation_says_is_passed_over(pair):
  here, there = pair
  there.incarnation = 2
  there.send(messages.Ready())
  there.incarnation = 3
  there.send(messages.Warmed('x'))
  until(lambda: here._in)
  assert here.take() == [messages.Warmed('x')]


def test_neither_side_waits_for_one_that_does_not_read(door):
  """Much more than the buffers of a socket hold; the rest comes later."""
  host, port = door.address.rsplit(':', 1)
  with mp.Client((host, int(port)), authkey=door.key) as slow:
    greet(slow)
    here = until(lambda: door.channel)
    large = messages.Warmed('x' * 2**20)
    for _ in range(64):
      here.send(large)
    for count in range(64):
      assert messages.load(channel.unnumbered(
          count, slow.recv_bytes())) == (3, large)


@pytest.mark.parametrize('said', [b'\x00' * 9, b'[3, ["Nothing"]]',
                                  b'[3, ["Counted", 1, 2, 3]]'])
def test_what_is_no_message_ends_it(door, said):
  host, port = door.address.rsplit(':', 1)
  with mp.Client((host, int(port)), authkey=door.key) as other:
    greet(other)
    here = until(lambda: door.channel)
    other.send_bytes(channel.numbered(1, said))
    assert 'no message' in until(lambda: here.ended)
    with pytest.raises(RuntimeError, match='no message'):
      here.send(messages.Ping())


@pytest.mark.parametrize('length', [channel.MOST_BYTES + 1, -5])
def test_a_message_of_no_possible_length_ends_it(door, length):
  """Before any of it is read, or memory is taken for it."""
  host, port = door.address.rsplit(':', 1)
  with mp.Client((host, int(port)), authkey=door.key) as other:
    greet(other)
    here = until(lambda: door.channel)
    os.write(other.fileno(), length.to_bytes(4, 'big', signed=True))
    until(lambda: here.ended)


def test_the_end_of_one_side_is_the_end_of_the_other(door):
  ends = []
  inside = enter(door, hear=(lambda message: None, ends.append))
  here = until(lambda: door.channel)
  here.close()
  until(lambda: ends)
  assert inside.ended and here.ended
  inside.wait()  # returns


@pytest.mark.parametrize('order', [(2, 1, 3), (1, 1, 2), (1, 3), (0, 1), ()])
def test_what_is_lost_doubled_or_out_of_order_ends_it(door, order):
  """Whatever the messages are: a step told twice would be another token."""
  host, port = door.address.rsplit(':', 1)
  with mp.Client((host, int(port)), authkey=door.key) as other:
    greet(other)
    here = until(lambda: door.channel)
    for number in order:
      with contextlib.suppress(ConnectionError):  # it has ended already
        other.send_bytes(channel.numbered(number, messages.dump(
            3, messages.Warmed(str(number)))))
    if not order:
      other.send_bytes(b'ab')  # not even a number
    assert 'was due' in until(lambda: here.ended)
    before = order[:1] if order[:1] == (1,) else ()
    assert here.take() == [messages.Warmed(str(number)) for number in before]

"""What runs on each host for a server elsewhere (experiments.host).

It connects to the server that the hosts file names (hosts.py), starts the
processes of instances that it is told to, and ends them with its connection.
Then it waits for the next server.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from dsjax.config.checks import InputError
from dsjax.runtime.cluster import begin, channel, hosts, local, messages

RETRY_S = 0.5  # from one try to reach the server to the next
LOOK_S = 0.1  # between two looks at what has ended


class Agent:
  """Starts and ends the processes of one server on this host."""

  def __init__(self, group: hosts.Group, number: int) -> None:
    """Connects.

    Raises:
      OSError, EOFError, AuthenticationError: it is not let in.
    """
    self.group, self.host = group, group.hosts[number]
    self.running: dict[tuple[int, int], subprocess.Popen[bytes]] = {}
    self.channel = channel.connect(
        begin.enter(f'{group.address}:{group.port + number}', group.key),
        number, 0, lambda message: None, lambda why: None)

  def serve(self) -> None:
    """Does what it is told, until the server has gone."""
    try:
      ended = ''
      while not ended:
        ended = self.channel.ended  # all that came before it is heard
        for message in self.channel.take():
          self._do(message)
        for key, process in list(self.running.items()):
          code = process.poll()
          if code is not None:
            del self.running[key]
            self._say(messages.Ended(*key, code))
        self.channel.wait(LOOK_S)
    finally:
      self.channel.close()
      for process in self.running.values():
        process.kill()
      for process in self.running.values():
        process.wait()

  def _do(self, message: Any) -> None:
    if isinstance(message, messages.Refused):
      raise InputError(f'{self.group.address} does not let this host in: '
                       f'{message.why}')
    if isinstance(message, messages.Ping):  # here: one that hangs is silent
      self._say(messages.Pong(time.perf_counter()))
    elif isinstance(message, messages.End):
      process = self.running.get((message.index, message.incarnation))
      if process:
        process.kill()
    elif isinstance(message, messages.Start):
      try:
        self._start(message)
      except (OSError, InputError) as error:
        print(f'instance {message.index} cannot start: {error}',
              file=sys.stderr)
        self._say(messages.Ended(message.index, message.incarnation, 1))

  def _start(self, message: messages.Start) -> None:
    key = hosts.instance_key(self.group.key, message.nonce)
    env = (dict(os.environ) | local.settings() | message.settings
           | local.device_settings(message.first, message.count)
           | {begin.KEY: key.hex()})
    self.running[message.index, message.incarnation] = local.popen(
        message.address, message.index, message.incarnation,
        self.host.address, env)

  def _say(self, message: messages.FromInstance) -> None:
    if not self.channel.ended:
      self.channel.send(message)


def serve(group: hosts.Group, number: int, say: Callable[[str], object]
          ) -> None:
  """Serves one server after another, for ever.

  Raises:
    AuthenticationError: the server has another key or file.
    InputError: it has other versions, or this host another address.
  """
  host, said = group.hosts[number], ''
  try:
    channel.listen(host.address).close()
  except OSError as error:
    raise InputError(
        f'{group.file}: hosts: {host.name}: address={host.address!r}: must be '
        f'an address of this host: {error}') from error
  while True:
    try:
      agent = Agent(group, number)
    except (OSError, EOFError) as error:  # there is no server yet
      why = f'waiting for {group.address}, port {group.port + number}: ' + (
          str(error) or 'it takes no connection')
      if why != said:
        say(why)
      said = why
      time.sleep(RETRY_S)
      continue
    said = ''
    say(f'serving {group.address}')
    agent.serve()
    say(f'{group.address} has gone: {agent.channel.ended}')
    time.sleep(RETRY_S)

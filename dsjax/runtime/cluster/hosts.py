"""Instances on several hosts, without Ray: what each host is, and who is where.

A file names the hosts; one command (experiments.host), typed on each, connects
to the server and starts the instances that it is told to. The file is JSON, the
same on every host, beside a key that only its owner may read:

  {"server": "10.0.0.1:7000", "key": "key",
   "hosts": {"a": {"address": "10.0.0.1", "devices": 2},
             "b": {"address": "10.0.0.2", "devices": 2}}}

With n hosts the server listens on ports 7000 to 7000 + n - 1, one for each
until it has come, and on one port more for each instance that starts.
"""

import contextlib
import hmac
import ipaddress
import logging
import pathlib
import re
import secrets
import shlex
import stat
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from dsjax.config.checks import (
  InputError,
  is_positive_int,
  parse_json,
  require,
)
from dsjax.config.placement import Placement
from dsjax.runtime.cluster import messages
from dsjax.runtime.cluster.channel import Channel, Door, claim
from dsjax.runtime.cluster.handoff import LOOK_S
from dsjax.runtime.cluster.local import jax_settings
from dsjax.runtime.cluster.watch import Watch

LOG = logging.getLogger(__name__)
LEAST_KEY = 32  # characters of a key
# Settings of the server's jax that change numbers; a host has its own others.
NUMERIC = ('default_matmul_precision', 'numpy_rank_promotion')


class Host(NamedTuple):
  """address: where others reach it. devices: how many it has."""

  name: str
  address: str
  devices: int


class Group(NamedTuple):
  """What a hosts file says. address, port: of the server."""

  file: str
  address: str
  port: int
  key: bytes
  hosts: tuple[Host, ...]

  def number(self, name: str) -> int:
    """Which host has a name.

    Raises:
      InputError: none.
    """
    names = [host.name for host in self.hosts]
    require(name in names, 'host', name, f'one of {names}, of {self.file}')
    return names.index(name)


def read(file: str) -> Group:
  """The hosts of a file.

  Raises:
    InputError: it cannot be read, says something else, or its key may be read
      by others.
  """
  path = pathlib.Path(file)
  try:
    text = path.read_bytes()
  except OSError as error:
    raise InputError(f'{file}: cannot be read: '
                     f'{error.strerror}') from None
  fields: Any = parse_json(file, text, unique=True)
  require(isinstance(fields, dict)
          and set(fields) == {'server', 'key', 'hosts'},
          file, fields,
          "an object of 'server', 'key' and 'hosts'")
  server, hosts = fields['server'], fields['hosts']
  address, _, port = str(server).rpartition(':')
  address = re.sub(r'^\[(.*)]$', r'\1', address)
  require(_is_address(address) and re.fullmatch('[0-9]{1,5}', port)
          and 0 < int(port) < 2**16, f'{file}: server', server,
          'ADDRESS:PORT of the server, an IP address that each host reaches')
  require(isinstance(hosts, dict) and hosts and all(
      isinstance(host, dict) and set(host) == {'address', 'devices'}
      and _is_address(host['address']) and is_positive_int(host['devices'])
      for host in hosts.values()),
          f'{file}: hosts', hosts, 'an object of {"address": the IP address '
          'where others reach it, "devices": how many it has} by name')
  most = 2**16 - 1 - len(hosts)
  require(int(port) <= most, f'{file}: server', server,
          f'a port of {most} at most: one for each host follows')
  made = tuple([Host(name, **host) for name, host in hosts.items()])
  addresses = [ipaddress.ip_address(host.address) for host in made]
  require(len(set(addresses)) == len(made)
          and len({address.version for address in addresses}) == 1,
          f'{file}: hosts', [host.address for host in made],
          'of another address each, all of IPv4 or all of IPv6')
  # Of the file too: hosts that read another one would not agree on who is who.
  key = hmac.digest(_read_key(path, fields['key']), repr(
      (address, int(port), made)).encode(), 'sha256')
  return Group(file, address, int(port), key, made)


def _is_address(text: Any) -> bool:
  """Whether this is an IP address by which others can reach a host. A name may
  be another address elsewhere, often a loopback one on the host itself."""
  try:
    return isinstance(text, str) and not ipaddress.ip_address(
        text).is_unspecified
  except ValueError:
    return False


def _read_key(path: pathlib.Path, name: Any) -> bytes:
  """A key, of a file beside the hosts file."""
  require(isinstance(name, str) and name, f'{path}: key', name,
          'the name of a file beside it')
  file = path.parent / name
  try:
    key, mode = file.read_bytes().strip(), file.stat().st_mode
  except (OSError, ValueError) as error:
    raise InputError(f'{path}: key={name!r}: must be a file that can be read: '
                     f'{error}') from None
  require(not mode & (stat.S_IRWXG | stat.S_IRWXO), f'{path}: key', name,
          'a file that only its owner may read: chmod 600')
  require(len(key) >= LEAST_KEY, f'{path}: key', f'{len(key)} characters',
          f'{LEAST_KEY} at least, such as `openssl rand -hex 32` gives')
  return key


def assign(placement: Placement, devices: Sequence[int]
           ) -> list[tuple[int, int]]:
  """(host, first device there) of each instance; those of a group of
  Placement.groups share a host.

  Args:
    devices: of each host.

  Raises:
    InputError: they do not fit.
  """
  plans = [plan for _, plan in placement.instances]
  taken, given = [0] * len(devices), {}
  for plan in plans:
    require(plan.num_devices <= max(devices), 'Plan', plan,
            f'of at most the {max(devices)} devices of one host: an instance '
            'over several hosts is not there yet')
  for group in placement.groups:
    size = sum(plans[index].num_devices for index in group)
    host = next((host for host, most in enumerate(devices)
                 if taken[host] + size <= most), None)
    require(host is not None, 'Placement', placement, 'instances that fit into '
            f'hosts of {tuple(devices)} devices'
            + ', those that are aligned into one' * (len(group) > 1))
    assert host is not None
    for index in group:
      given[index] = host, taken[host]
      taken[host] += plans[index].num_devices
  return [given[index] for index in range(len(plans))]


def instance_key(key: bytes, nonce: str) -> bytes:
  """The key of one process: both sides make it, it is never sent."""
  return hmac.digest(key, nonce.encode(), 'sha256')


def typed(group: Group, host: Host) -> str:
  """What is to be typed on a host."""
  return (f'python -m experiments.host --hosts={shlex.quote(group.file)} '
          f'--name={shlex.quote(host.name)}')


class RemoteHost:
  """A host, as the server sees it: it comes, may go, and come again. One whose
  command answers no ping, as where it is stopped, is gone.

  Attributes:
    codes: {(index, incarnation): exit code} of processes that have ended.
  """

  def __init__(self, group: Group, number: int, silent_s: float) -> None:
    """silent_s: as of EngineConfig."""
    self.group, self.number, self.silent_s = group, number, silent_s
    self.host, self._watch = group.hosts[number], Watch()
    self.codes: dict[tuple[int, int], int] = {}
    self.closed = False
    self._door = self._new_door()

  def _new_door(self) -> Door:
    group = self.group
    return Door(self.number, 0, group.address, group.port + self.number,
                group.key)

  def channel(self) -> Channel | None:
    """To its command; None: it is not there. Hears what it says."""
    channel = self._door.channel
    if channel is not None:
      for message in channel.take():
        if isinstance(message, messages.Ended):
          self.codes[message.index, message.incarnation] = message.code
      self._check(channel)
    if (channel is not None and channel.ended or self._door.failed) and (
        not self.closed):
      if self._door.failed:
        LOG.warning('host %s: %s', self.host.name, self._door.failed)
      self._door.close()
      self._door, self._watch = self._new_door(), Watch()
      return None
    return channel

  def _check(self, channel: Channel) -> None:
    """Ends the channel of one that says nothing."""
    self._watch.look()
    try:
      self._watch.ping(channel, self.silent_s)
    except RuntimeError as error:
      if not channel.ended:
        LOG.warning('host %s: %s', self.host.name, error)
        channel.close()

  def close(self) -> None:
    """Lets it go: it ends what it has started."""
    self.closed = True
    self._door.close()
    if self._door.channel:
      self._door.channel.flush(1.0)
      self._door.channel.close()


class HostProcess:
  """A process of another host: a processes.Process. It starts when the host is
  there."""

  def __init__(self, remote: RemoteHost, port: int, start: messages.Start
               ) -> None:
    self._remote, self._start = remote, start
    self._door = Door(start.index, start.incarnation, remote.group.address,
                      port, instance_key(remote.group.key, start.nonce))
    self._agent: Channel | None = None  # that was told to start it
    self._told_s: float | None = None  # when

  @property
  def _key(self) -> tuple[int, int]:
    return self._start.index, self._start.incarnation

  @property
  def channel(self) -> Channel | None:
    agent = self._remote.channel()
    if self._agent is None and agent is not None:
      self._agent, self._told_s = agent, time.monotonic()
      agent.send(self._start._replace(address=self._door.address))
    return self._door.channel

  @property
  def failed(self) -> str:
    return self._door.failed

  @property
  def missing(self) -> str:
    group, host = self._remote.group, self._remote.host
    return '' if self._agent else (
        f': nothing has come from {host.address}: {typed(group, host)}')

  @property
  def pid(self) -> int | None:
    return self._door.pid

  @property
  def heard_s(self) -> float | None:
    return self._door.heard_s or self._told_s

  def exit_code(self) -> int | None:
    """None: it runs, or waits for its host; -1: its host is gone."""
    self._remote.channel()
    if self._agent is not None and self._agent.ended:
      return self._remote.codes.get(self._key, -1)
    return self._remote.codes.get(self._key)

  def kill(self, wait_s: float = 0.0) -> None:
    """Ends it; wait_s: how long to wait for that, at most."""
    self._door.close()
    if self._agent is None:
      return
    with contextlib.suppress(RuntimeError):  # it has gone: so has the process
      self._agent.send(messages.End(*self._key))
    until_s = time.monotonic() + wait_s
    while self.exit_code() is None and time.monotonic() < until_s:
      time.sleep(LOOK_S)


class HostsLauncher:
  """Starts instances on the hosts of a file."""

  def __init__(self, placement: Placement, file: str, silent_s: float
               ) -> None:
    """Listens for the hosts, and prints what to type on each.

    silent_s: see RemoteHost.

    Raises:
      InputError: the file says nothing of use, instances do not fit, or this
        is not the server that it names.
    """
    group = self.group = read(file)
    self._places = assign(placement, [h.devices for h in group.hosts])
    self._plans = [plan for _, plan in placement.instances]
    ports = len(group.hosts) + len(self._plans)
    require(group.port + ports <= 2**16, f'{file}: server', group.port,
            f'a port of {2**16 - ports} at most: one for each host and each '
            'instance follows')
    self.hosts: list[RemoteHost] = []
    self._claims: list[Any] = []
    try:
      # Ports are not listened on all the time: another server on them would
      # leave an instance of this one none to come to when it starts again.
      for port in range(group.port, group.port + ports):
        self._claims.append(claim(group.address, port))
      for number in range(len(self.group.hosts)):
        self.hosts.append(RemoteHost(group, number, silent_s))
    except OSError as error:
      self.close()
      raise InputError(
          f'{file}: server={group.address!r}: must be an address of this host '
          f'with ports from {group.port} on that are free: {error}') from error
    except BaseException:
      self.close()
      raise
    for number in sorted({host for host, _ in self._places}):
      host = group.hosts[number]
      print(f'on {host.address}: {typed(group, host)}', file=sys.stderr)

  def start(self, index: int, incarnation: int) -> HostProcess:
    """The process of an incarnation of an instance."""
    host, first = self._places[index]
    return HostProcess(
        self.hosts[host], self.group.port + len(self.hosts) + index,
        messages.Start(index, incarnation, '', secrets.token_hex(32), first,
                       self._plans[index].num_devices, jax_settings(NUMERIC)))

  def close(self) -> None:
    """Lets the hosts go."""
    for host in self.hosts:
      host.close()
    while self._claims:
      name = self._claims.pop()
      if name:
        name.close()

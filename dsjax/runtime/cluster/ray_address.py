"""Where a Ray cluster is, as far as that is known without Ray."""

import socket

from dsjax.config.checks import InputError

REACH_S = 10.0  # until a connection is there


def check(address: str) -> None:
  """Raises InputError if this is HOST:PORT and no program listens there: Ray
  would look for minutes, and then end this process."""
  host, colon, port = address.rpartition(':')
  if colon and port.isdecimal() and '/' not in host:
    try:
      socket.create_connection((host.strip('[]'), int(port)), REACH_S).close()
    except (OSError, OverflowError) as error:
      raise absent(address, error) from error


def absent(address: str, why: BaseException) -> InputError:
  """What to raise where no cluster is there."""
  return InputError(f'cluster={f"ray:{address}"!r}: must be the address of a '
                    f'Ray cluster that is there: {why}')

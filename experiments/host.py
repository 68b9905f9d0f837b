"""Offers this host to a server elsewhere: its instances run here.

  python -m experiments.host --hosts=hosts.json --name=b

`hosts.json`, the same on every host, names the server, a key, and the hosts
(docs/cluster.md). It connects as soon as a server is there, starts and ends
the processes of instances as that one says, and ends them when it is gone. Then
it waits for the next one, until Ctrl-C.
"""

import types
from multiprocessing import AuthenticationError

from rich.console import Console

from dsjax.config.checks import require
from dsjax.runtime.cluster import host, hosts
from experiments.common import cli

FLAGS = {
    'hosts': cli.Flag('', 'The file of the hosts.'),
    'name': cli.Flag('', 'Which of them this is.'),
}


def run(options: types.SimpleNamespace, console: Console) -> int:
  """Serves until it is interrupted; 1: the server has another key or file."""
  for flag in ('hosts', 'name'):
    require(getattr(options, flag), f'--{flag}', '', 'given')
  group = hosts.read(options.hosts)
  number = group.number(options.name)
  try:
    host.serve(group, number, lambda said: console.print(
        said, highlight=False))
  except AuthenticationError:
    console.print(f'{group.address} has another key or another file of hosts, '
                  'or is no server', style='red')
  return 1


if __name__ == '__main__':
  cli.main(run, FLAGS)

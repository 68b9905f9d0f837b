r"""An OpenAI-compatible server over one placement (extra `serve`).

  python -m experiments.api --config=demo
  curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \
    -d '{"model": "smollm2-135m-instruct",
         "messages": [{"role": "user", "content": "Hi!"}]}'

Model, engine and the first of the placements come from the config, which --set
changes as in experiments.serve; --set=limits.max_waiting=64 and the like bound
the service (dsjax.http.service.Limits); --help lists all fields. Prefixes are
kept, though the comparisons of the configs have no cache;
--set=engine.prefix_cache=false turns it off. A key, if
any, is read from the environment variable DSJAX_API_KEY. A live page is at
http://localhost:8000/.
With --out, server.log there has the lines of the log too: how far compiling
has come, and "ready" when requests are taken. --cors=* lets the pages of any
site ask from a browser.
SIGTERM and Ctrl-C let running requests finish, for limits.drain_s at most; a
second one cancels them, a third ends the program whatever it does.

Exit codes: 0; 2 for bad input, and where an instance does not start.
"""

import contextlib
import dataclasses
import ipaddress
import logging
import os
import pathlib
import socket
import sys
import types
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor

from rich.console import Console

import dsjax
from configs.serve import Serve
from dsjax.config.checks import InputError, StartError, require
from dsjax.http.service import Limits, Service
from dsjax.placement.api import Named
from dsjax.runtime.cluster import channel
from dsjax.scheduling.policy import DISTSERVE, Policy
from dsjax.simulation import profiles
from experiments.common import cli, policies
from experiments.common import overrides as configs
from experiments.common.extras import needs

with needs('serve'):
  from dsjax.http import routes, socket_server, telemetry
  from dsjax.http.middleware import Gate

FLAGS = {
    'config': 'demo', 'set': (), 'policy': 'distserve',
    'latency': cli.PREDICTS, 'cluster': cli.CLUSTER_FLAG,
    'planner': cli.Flag(False, 'A process beside the server asks --policy for '
                        'roles, so that a long search holds up no step.'),
    'compilation_cache': cli.CACHE,
    'name': cli.Flag(None, 'What clients call the model; the default is what '
                     'the config calls it.', str),
    'host': cli.Flag('127.0.0.1', 'Address to bind.'),
    'port': cli.Flag(8000, 'Port to bind; 0: any.', low=0, high=65535),
    'log_text': cli.Flag(False, 'Log the prompts, not only ids.'),
    'cors': cli.Flag([], 'Origins whose pages may ask from a browser '
                     '(https://example.org), with commas between; *: all.'),
    'out': None,
}


@dataclasses.dataclass(frozen=True)
class Api(Serve):
  """A Serve whose first placement is served, and the service's limits."""
  limits: Limits = Limits()


def load(name: str, settings: Iterable[str]) -> Api:
  """The Api of a config and its changes.

  Raises:
    InputError.
  """
  base = configs.load(name)
  require(isinstance(base, Serve), '--config', name,
          'a file whose `config` is a configs.serve.Serve')
  fields = {f.name: getattr(base, f.name) for f in dataclasses.fields(base)}
  fields['engine'] = dataclasses.replace(base.engine, prefix_cache=True)
  return configs.override(Api(**fields), settings)


def make_service(config: Api, name: str | None = None, key: str | None = None,
                 log_text: bool = False, policy: Policy = DISTSERVE,
                 origins: Sequence[str] = (), latency: Named | None = None,
                 planner: Executor | None = None, cluster: str | None = None
                 ) -> tuple[Gate, Service]:
  """(application, Service) of an Api; nothing is loaded yet."""

  def make(report):
    model = dsjax.load(config.model, config.engine.dtype,
                       weights=cluster is None)
    return dsjax.serve(model, config.placements[0], config.engine,
                       report=report, keep_events=1, policy=policy,
                       latency=latency, planner=planner, cluster=cluster)

  name = name or pathlib.Path(config.model).name
  metrics = telemetry.Gauges(name)
  service = Service(make, config.limits, metrics)
  return routes.make_app(service, metrics, name, key, config.slo,
                         log_text, origins), service


def run(options: types.SimpleNamespace, console: Console) -> int:
  """Serves until a signal; returns the exit code."""
  del console
  _log_lines(options.out)
  config = load(options.config, options.set)
  cluster = cli.cluster_of(options)
  latency = profiles.load(options.latency) if options.latency else None
  cli.prepare(config.num_devices, options.compilation_cache, config.tp)
  key = os.environ.get('DSJAX_API_KEY') or None
  from dsjax.runtime.planner import planner_process
  planner = planner_process() if options.planner else contextlib.nullcontext()
  with planner as beside, _bound(options.host, options.port) as bound:
    served, service = make_service(
        config, options.name, key, options.log_text,
        policies.load(options.policy, config.slo), options.cors,
        latency, beside, cluster)
    host, port = bound.getsockname()[:2]
    print(f'http://{channel.bracketed(host)}:{port}/ answers once '
          f'{config.model} is loaded', flush=True)
    if not key and not ipaddress.ip_address(host).is_loopback:
      print('warning: anyone who reaches this address may use it: set '
            'DSJAX_API_KEY', file=sys.stderr)
    error = socket_server.run(served, service, bound)
  if isinstance(service.runner.failure, InputError | StartError):
    raise service.runner.failure
  if error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  return 0


def _bound(host: str, port: int) -> socket.socket:
  """A socket that listens for clients."""
  require(host, '--host', host, 'an address of this host, or 0.0.0.0 for all')
  try:
    return channel.listen(host, port)
  except (OSError, UnicodeError) as error:
    raise InputError(
        f'--host={host} --port={port}: must be an address of this host and a '
        f'port of it that is free: {error}') from error


class _LogFile(logging.FileHandler):
  """A log that ends, with one line on stderr, where it cannot be written."""

  def handleError(self, record):
    error = sys.exception()
    if not isinstance(error, OSError):
      super().handleError(record)
      return
    logging.getLogger('dsjax').removeHandler(self)
    with contextlib.suppress(OSError):  # it tries to write what is left
      self.close()
    print(f'warning: {self.baseFilename} ends here: {error.strerror}',
          file=sys.stderr)


def _log_lines(out):
  """Our own log goes to stderr and a file in `out`, a line with the time
  each."""
  ours = logging.getLogger('dsjax')
  handlers: list[logging.Handler] = [logging.StreamHandler()]
  if out:
    folder = pathlib.Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    handlers.append(_LogFile(folder / 'server.log', 'w'))
  for handler in handlers:
    handler.setFormatter(logging.Formatter('%(asctime)s %(message)s'))
    ours.addHandler(handler)
  ours.setLevel(logging.INFO)
  ours.propagate = False  # absl's own handler


if __name__ == '__main__':
  cli.main(run, FLAGS, Api())

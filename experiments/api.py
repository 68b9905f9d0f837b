"""An OpenAI-compatible server over one placement (extra `serve`).

  python -m experiments.api --config=demo
  curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \
    -d '{"model": "smollm2-135m-instruct",
         "messages": [{"role": "user", "content": "Hi!"}]}'

Model, engine and the first of the placements come from the config, which --set
changes as in experiments.serve; --set=limits.max_waiting=64 and the like bound
the service (dsjax.http.service.Limits). A key, if any, is read from the
environment variable DSJAX_API_KEY. A live page is at http://localhost:8000/.
SIGTERM and Ctrl-C let running requests finish, for limits.drain_s at most; a
second one does not.

Exit codes: 0; 2 for bad input.
"""

import dataclasses
import logging
import os
import pathlib
import socket
import sys

os.environ.setdefault('NPROC', '32')  # room for collectives of many devices

import jax
from absl import app, flags
from absl import logging as absl_logging

import dsjax
from configs.serve import Serve
from dsjax.config.checks import InputError, require
from dsjax.http import telemetry
from dsjax.http.service import Limits, Service
from experiments.common import overrides as configs
from experiments.common import terminal, tiny

ROOT = pathlib.Path(__file__).resolve().parent.parent
FLAGS = None  # once run as a program


@dataclasses.dataclass(frozen=True)
class Api(Serve):
  """A Serve whose first placement is served, and the service's limits."""
  limits: Limits = Limits()


def define_flags():
  """This program's flags."""
  return {
      'config': flags.DEFINE_string(
          'config', 'demo', 'Name of a file in configs/, or a .py file.'),
      'set': flags.DEFINE_multi_string(
          'set', [], 'A field to change: a.b=value. May be repeated.'),
      'name': flags.DEFINE_string(
          'name', None, 'What clients call the model; the default is what the '
          'config calls it.'),
      'host': flags.DEFINE_string('host', '127.0.0.1', 'Address to bind.'),
      'port': flags.DEFINE_integer('port', 8000, 'Port to bind; 0: any.',
                                   lower_bound=0, upper_bound=65535),
      'log_text': flags.DEFINE_bool('log_text', False,
                                    'Log the prompts, not only ids.'),
      'cache': flags.DEFINE_string(
          'compilation_cache', str(ROOT / '.cache' / 'jax'),
          'Folder of compiled programs; empty for none.')}


def load(name, settings):
  """The Api of a config and its changes.

  Raises:
    InputError.
  """
  found = configs.load(name)
  require(isinstance(found, Serve), '--config', name,
          'a file whose `config` is a configs.serve.Serve')
  return configs.override(Api(**{f.name: getattr(found, f.name) for f in
                                 dataclasses.fields(found)}), settings)


def make_service(config, name=None, key=None, log_text=False):
  """(application, Service) of an Api; nothing is loaded yet.

  Raises:
    InputError: the extra `serve` is not installed.
  """
  try:
    from dsjax.http import routes
  except ImportError as error:
    raise InputError(f'{error}: the server needs the extra `serve`: pip '
                     "install 'dsjax[serve]'") from error

  def make(report):
    model = (tiny.load(config.engine.dtype) if config.model == 'tiny' else
             dsjax.load(config.model, config.engine.dtype))
    return dsjax.serve(model, config.placements[0], config.engine,
                       report=report, keep_events=1)

  metrics = telemetry.Gauges()
  service = Service(make, config.limits, metrics)
  name = name or pathlib.Path(config.model).name
  return routes.make_app(service, metrics, name, key, config.slo,
                         log_text), service


def run(name, settings, served_name, host, port, log_text, cache):
  """Serves until a signal; returns the exit code."""
  config = load(name, settings)
  if jax.config.jax_platforms in (None, '', 'cpu'):
    jax.config.update('jax_num_cpu_devices', config.num_devices)
  if cache:
    jax.config.update('jax_compilation_cache_dir', cache)
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.2)
  key = os.environ.get('DSJAX_API_KEY') or None
  served, service = make_service(config, served_name, key, log_text)
  from dsjax.http import socket_server
  with socket.create_server((host, port)) as bound:
    host, port = bound.getsockname()[:2]
    print(f'http://{host}:{port}/ answers once {config.model} is ready',
          flush=True)
    if not key and not host.startswith('127.'):
      print('warning: whoever reaches this address may use it: set '
            'DSJAX_API_KEY', file=sys.stderr)
    error = socket_server.run(served, service, bound)
  if error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  return 0


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f'unexpected: {" ".join(argv[1:])}')
  ours, lines = logging.getLogger('dsjax'), logging.StreamHandler()
  lines.setFormatter(logging.Formatter('%(asctime)s %(message)s'))
  ours.addHandler(lines)
  ours.setLevel(logging.INFO)
  ours.propagate = False  # absl's own handler
  if flags.FLAGS.verbosity <= 0:
    absl_logging.set_verbosity(absl_logging.WARNING)
  with terminal.one_error(OSError):
    f = {name: flag.value for name, flag in FLAGS.items()}
    sys.exit(run(f['config'], f['set'], f['name'], f['host'], f['port'],
                 f['log_text'], f['cache']))


if __name__ == '__main__':
  FLAGS = define_flags()
  app.run(main)

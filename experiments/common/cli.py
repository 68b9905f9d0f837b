"""How every runner starts and ends: flags, devices, errors, exit code.

A runner names its flags as data; the same thing has the same flag, and the
same words in --help, in all of them. Exit codes are 0 for done (--help too),
1 where a check of the runner found a fault, 2 for bad input, bad flags too,
and 130 when interrupted. SIGTERM, and SIGHUP (the terminal is gone) unless it
is ignored (nohup), are as Ctrl-C. Where the reader of what a runner prints has
left (`| head`), it goes on, and writes its files.
"""

import contextlib
import functools
import gc
import io
import math
import os
import pathlib
import re
import select
import signal
import sys
import threading
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from absl import app, flags, logging
from rich.console import Console

import experiments
from dsjax import workload
from dsjax.config.checks import InputError, StartError, require
from dsjax.placement import clusters
from dsjax.scheduling.policy import PolicyError
from dsjax.simulation import profiles
from dsjax.workload import traffic
from experiments.common import overrides
from experiments.fast import finder

ROOT = pathlib.Path(__file__).resolve().parents[2]


MOST = 1e9  # of a number with a least one: nothing runs for ever


class Flag(NamedTuple):
  """A flag: its default, its words in --help, its type (by default that of
  the default; list: items with commas between; tuple: it may be repeated),
  the least and the largest number, what else it may be."""

  default: Any
  help: str
  kind: type | None = None
  low: float | None = None
  high: float | None = None
  choices: tuple[str, ...] = ()

  def define(self, name: str, values: flags.FlagValues) -> None:
    """Makes it a flag of absl."""
    kind, bounds = self.kind or type(self.default), {}
    make: dict[type, Callable[..., Any]] = {
        bool: flags.DEFINE_bool, int: flags.DEFINE_integer,
        float: flags.DEFINE_float, str: flags.DEFINE_string,
        list: flags.DEFINE_list, tuple: flags.DEFINE_multi_string}
    if kind in (int, float):
      high = self.high
      if kind is float and self.low is not None and high is None:
        high = MOST
      bounds = {'lower_bound': self.low, 'upper_bound': high}
    if self.choices:
      flags.DEFINE_enum(name, self.default, self.choices, self.help, values)
    else:
      default = list(self.default) if kind is tuple else self.default
      make[kind](name, default, self.help, flag_values=values, **bounds)
    if kind is list:
      flags.register_validator(
          name, lambda items: len(set(items)) == len(items),
          'must have each item once', flag_values=values)
      if self.default:
        flags.register_validator(name, bool, 'must have an item',
                                 flag_values=values)
    if kind is float and self.low is not None:
      flags.register_validator(name, lambda x: x is None or not math.isnan(x),
                               'must be a number', flag_values=values)


OF_DEVICE = (' Default: of the GPU that --latency names, else '
             'of the cluster of the paper.')
# What several runners have, but for the default: Flag(None, ...).
SHARED = {
    'config': Flag(None, 'Name of a file in configs/, or path of a .py file.',
                   str),
    'set': Flag(None, 'A field of the config to change: name=value; the '
                'fields are listed above. May be repeated.', tuple),
    'compilation_cache': Flag(None, 'Folder of compiled programs, kept '
                              'between runs; empty for none.', str),
    'out': Flag(None, 'Folder for the files.', str),
    'placement': Flag(None, 'role=TPxPP, ..., such as '
                      'prefill=2x1,decode=1x1.', str),
    'ttft_s': Flag(None, 'Objective, seconds.', float),
    'tpot_s': Flag(None, 'Objective, seconds.', float),
    'policy': Flag(None, 'Scheduling policy: a shipped one, such as arrow or '
                   'static:prefills=2+deadlines (docs/policies.md), or '
                   'path.py:name, a dsjax.Policy of your own.', str),
    'target': Flag(None, 'Share that must meet both objectives.', float),
    'lengths': Flag(None, f'One of {sorted(traffic.MIXTURES)}, '
                    'fixed:PROMPTxOUTPUT (tokens), a file, mix:NAME+NAME, or '
                    'shift:SECONDS:NAME+NAME, so long of each in turn.', str),
    'traces': Flag(None, 'Folder of the traces that docs/reproduction.md '
                   'names. What is not there is left out.', str),
    'process': Flag(None, f'Of arrivals, one of {workload.PROCESSES}, or '
                    'sine:low=5:high=45:period_s=60, or step:... (requests a '
                    'second).', str),
    'cv': Flag(None, 'Of the gaps, --process=gamma only.', float),
    'rate': Flag(None, 'Requests a second.', float),
    'rates': Flag(None, 'Requests a second, with commas between.', str),
    'requests': Flag(None, 'How many.', int, low=1),
    'seed': Flag(None, 'Of all that is random.', int, low=0),
    'latency': Flag(None, "Seconds of a step: 'published', "
                    f"'tables:GPU' (of {', '.join(profiles.tables())}), "
                    "'roofline:GPU', or a file that experiments.measure "
                    'wrote.', str),
    'host_ms': Flag(None, "Host's time between two steps, where --latency "
                    'does not say.', float),
    'memory_gb': Flag(None, 'Of a device, 1e9 bytes.' + OF_DEVICE, float),
    'intra_gb_per_s': Flag(None, 'Of KV inside a node.' + OF_DEVICE, float),
    'inter_gb_per_s': Flag(None, 'Of KV between nodes.' + OF_DEVICE, float),
    'chunks': Flag(None, 'Token budgets tried for chunked placements; rows of '
                   'decode share them.', list),
    'rounds': Flag(None, 'Timed rounds of each thing.', int, low=1),
}
PREDICTS = Flag('', 'For a policy that predicts: a file that '
                'experiments.measure wrote of this machine.')
CLUSTER_FLAG = Flag('', 'Each instance is a process of its own. local: on this '
                    'host; ray, or ray:ADDRESS: where Ray has room; '
                    'hosts:FILE: on the hosts of a file.')
CACHE = str(ROOT / '.cache' / 'jax')
# Flags of a Cluster: the field that each gives, and the unit.
CLUSTER = {'memory_gb': ('memory_bytes', 1e9),
           'intra_gb_per_s': ('intra_bytes_per_s', 1e9),
           'inter_gb_per_s': ('inter_bytes_per_s', 1e9)}


def _flag(name, value):
  """The Flag of an item of a runner's flags: a Flag, or a default."""
  if isinstance(value, Flag):
    return value
  return SHARED[name]._replace(default=value)


def parse(defined: dict[str, Any], argv: list[str]) -> flags.FlagValues:
  """The options of a command line.

  Args:
    defined: {name: Flag, or the default of a flag in SHARED}.
    argv: without the program's name.
  """
  values = flags.FlagValues()
  for name, value in defined.items():
    _flag(name, value).define(name, values)
  values(['program', *argv])
  return values


def options(defined: dict[str, Any], **changes: Any) -> types.SimpleNamespace:
  """The options without a command line: defaults, with some changed."""
  values = {name: _flag(name, value).default
            for name, value in defined.items()}
  unknown = set(changes) - set(values)
  require(not unknown, 'options', sorted(unknown), f'of {sorted(values)}')
  return types.SimpleNamespace(**values | changes)


def asked(chosen: flags.FlagValues | types.SimpleNamespace,
          defined: Iterable[str]) -> dict[str, Any]:
  """{name: value} of a runner's own flags."""
  return {name: getattr(chosen, name) for name in defined}


def fields(chosen: flags.FlagValues | types.SimpleNamespace,
           units: dict[str, tuple[str, float]]) -> dict[str, Any]:
  """{field: value} of the flags that have one; units: {flag: (field, unit)}."""
  return {field: getattr(chosen, name) * unit
          for name, (field, unit) in units.items()
          if getattr(chosen, name) is not None}


def _print_to_nobody(output=1):
  """Nobody reads an output any more: what follows goes nowhere."""
  nowhere = os.open(os.devnull, os.O_WRONLY)
  os.dup2(nowhere, output)
  os.close(nowhere)


def _nobody_reads(output=1):
  """Whether an output is a pipe whose reader has left, or a terminal that is
  gone."""
  poll = select.poll()
  poll.register(output, 0)
  return bool(poll.poll(0))


class _Piped(Console):
  """A Console that is quiet once its reader has left; rich's own exits."""

  def on_broken_pipe(self) -> None:
    self.quiet = True
    _print_to_nobody()


def exit_code(run: Callable[..., int | None], *args: Any) -> int:
  """What run(*args) returns; 2 for bad input and for an instance that does not
  start, 130 for Ctrl-C, each with one line on stderr."""
  try:
    return run(*args) or 0
  except (InputError, StartError, PolicyError, OSError) as error:
    if isinstance(error, BrokenPipeError) and _nobody_reads():
      return 0  # a bare print: nothing but its lines was wanted
    print(f'error: {error}', file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    print('stopped', file=sys.stderr)
    return 130


def _not_raised(lost):
  """Ctrl-C once more, where Python drops it: in a callback of the garbage
  collector (jax has one), a weak reference or a __del__."""
  if isinstance(lost.exc_value, KeyboardInterrupt):
    threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGINT)).start()
  else:
    sys.__unraisablehook__(lost)


def _as_ctrl_c(number, frame):
  """Handles another signal as Ctrl-C would be at this moment."""
  if number == signal.SIGHUP:
    for output in (1, 2):
      if _nobody_reads(output):
        _print_to_nobody(output)
  press = signal.getsignal(signal.SIGINT)
  if not callable(press):  # ignored, as in the background of a shell's script
    press = signal.default_int_handler
  press(signal.SIGINT, frame)


def _threads_work():
  """Whether Python would wait for other threads at its end, such as one that
  compiles, which nothing stops."""
  return any(not thread.daemon for thread in threading.enumerate()
             if thread is not threading.main_thread())


def _read_flags(argv):
  """Of flags.FLAGS: what is left of argv."""
  try:
    return flags.FLAGS(argv)
  except flags.Error as error:
    print(f'error: {error}', file=sys.stderr)
    sys.exit(2)
  except BrokenPipeError:  # of --help
    _print_to_nobody()
  except SystemExit:  # --help, which absl takes for a failure
    _flush()
  sys.exit(0)


def _flush():
  """What is printed so far, where it is read: else Python tells it as an
  error at its end."""
  try:
    if sys.stdout:
      sys.stdout.flush()
  except BrokenPipeError:
    _print_to_nobody()


def main(run: Callable[[Any, Console], int | None], defined: dict[str, Any],
         config: Any = None, verbosity: int = logging.WARNING,
         simulates: bool = False) -> None:
  """Runs a program: run(options, console) returns its exit code, or None.

  Args:
    defined: its flags, see parse.
    config: None, or the dataclass whose fields --set changes; --help lists
      them.
    verbosity: of absl's logging, unless the command line asks for more.
    simulates: it does nothing else; garbage is looked for seldom then: of
      cycles a simulation makes none, and a server would wait for long.
  """
  if simulates:
    gc.set_threshold(finder.OBJECTS)
  sys.unraisablehook = _not_raised
  for name, value in defined.items():
    _flag(name, value).define(name, flags.FLAGS)
    # --help lists them as the program's own.
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])
  program = sys.modules['__main__']
  words = program.__doc__ or ''
  if config is not None:
    words += ('\nWhat --set=FIELD=VALUE changes:\n'
              f'{overrides.describe(config)}')
  # absl puts the program's path where it sees a conversion, as in '95 % so'.
  program.__doc__ = words.replace('%', '%%')

  def start(argv):
    if flags.FLAGS.verbosity <= 0:
      logging.set_verbosity(verbosity)
    if isinstance(sys.stdout, io.TextIOWrapper):  # not UTF-8: '?' for the rest
      sys.stdout.reconfigure(errors='replace')
    code = exit_code(all_read, argv[1:])
    _flush()
    if code == 130 and _threads_work():
      os._exit(code)
    sys.exit(code)

  def all_read(rest):
    if signal.getsignal(signal.SIGINT) is experiments.stop_importing:
      signal.signal(signal.SIGINT, signal.default_int_handler)
    for stop in (signal.SIGTERM, signal.SIGHUP):
      if signal.getsignal(stop) is signal.SIG_DFL:
        signal.signal(stop, _as_ctrl_c)
    require(not rest, 'arguments', ' '.join(rest), 'flags: --name=value')
    if 'out' in defined and flags.FLAGS.out:
      path = pathlib.Path(flags.FLAGS.out)
      is_file = isinstance(defined['out'], Flag)  # of the runner's own
      require_folder('--out', path.parent if is_file else path)
    with naming_flags(flags.FLAGS, defined):
      return run(flags.FLAGS, wide_console())
  app.run(start, flags_parser=_read_flags)


@contextlib.contextmanager
def naming_flags(chosen: flags.FlagValues | types.SimpleNamespace,
                 defined: Iterable[str]) -> Iterator[None]:
  """An InputError about what a flag says, or about a file that a flag names,
  begins with the flag, if it is no other's too.

  defined: names of the runner's own flags.
  """
  try:
    yield
  except InputError as error:
    text, file = str(error), getattr(chosen, 'machines', None)
    if file and re.match('(Mixed)?Cluster[.:]', text):
      raise InputError(f'--machines={file}: {text}') from error
    if re.split('[=:[]', text, maxsplit=1)[0] in defined:
      raise InputError(f'--{text}') from error
    told = {}
    for name, value in asked(chosen, defined).items():
      parts = ([value, *value.split(',')] if isinstance(value, str) else
               value if isinstance(value, list) else [])
      for part in filter(None, map(str, parts)):
        begin = re.match(f"([a-z_]+=)?'?{re.escape(part)}'?[:,=]", text)
        if begin:
          told[name] = ': ' if begin[1] else '='
    if len(told) == 1:
      (name, between), = told.items()
      raise InputError(f'--{name}{between}{text}') from error
    raise


def require_folder(field: str, path: pathlib.Path) -> None:
  """Raises InputError, naming `field`, where there is no such folder and none
  can be made: before a run, not after it."""
  nearest = next(place for place in (path.absolute(), *path.absolute().parents)
                 if place.exists())
  require(nearest.is_dir() and os.access(nearest, os.W_OK), field, str(path),
          f'a folder that can be written to, and {nearest} is none')


def wide_console() -> Console:
  """A Console that takes no text for markup (a policy's error or a path may
  have brackets); off a terminal, wide enough for the widest tables."""
  console = _Piped(markup=False)
  return console if console.is_terminal else _Piped(markup=False, width=150)


def says(console: Console) -> Callable[..., None]:
  """Prints texts on a Console as they are: no markup, no colours, no wraps."""
  return functools.partial(console.print, markup=False, highlight=False,
                           soft_wrap=True)


def prepare(num_devices: int, cache: str | None = CACHE, tp: int = 1) -> None:
  """What JAX must know before it starts.

  Args:
    num_devices: CPU devices to make, where there is no accelerator.
    cache: folder of compiled programs, or nothing.
    tp: most devices of one step. Where they wait for each other in
      collectives, each needs a thread; else a thread a core is fastest.
  """
  if tp > 1:
    os.environ.setdefault('NPROC', '32')
  import jax  # takes seconds, and runners that only simulate need none
  with contextlib.suppress(RuntimeError):  # it has started: use what is there
    jax.config.update('jax_num_cpu_devices', num_devices)
  if cache:
    jax.config.update('jax_compilation_cache_dir', cache)
    least = 'jax_persistent_cache_min_compile_time_secs'
    if least.upper() not in os.environ:
      jax.config.update(least, 0.2)
    # Else the folder's path is part of each key, and a copied one is empty.
    jax.config.update('jax_persistent_cache_enable_xla_caches', 'none')


def machines_flag(names: Iterable[str]) -> Flag:
  """--machines=FILE, in place of the flags of these names."""
  return Flag(None, 'A JSON file of what there is (docs/placement.md), in '
              f'place of the flags --{", --".join(names)}.', str)


def machines(options: types.SimpleNamespace,
                 names: Iterable[str]) -> Any:
  """The cluster of the JSON file that --machines names; None without it.

  names: of the flags that say the same, and are not given beside it.
  """
  if not options.machines:
    return None
  given = [name for name in names if options[name].present]
  require(not given, '--machines', options.machines,
          f'without --{", --".join(given)}')
  return clusters.load(options.machines, options.latency)


def cluster_of(options: types.SimpleNamespace, devices: int | None = None
               ) -> str | None:
  """What --cluster says, for dsjax.serve.

  Args:
    devices: of the placement, where `auto` may be asked for: local, if this
      host has a core for each device and one for the server, and no GPU.

  Raises:
    InputError: it says nothing that there is, or its file does not.
  """
  from dsjax.runtime.cluster import local, starting
  if options.cluster == 'auto' and devices is not None:
    cores = (len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity')
             else 0)
    return ('local' if cores > devices and local.visible_gpus() is None
            else None)
  starting.check(options.cluster or None)
  return options.cluster or None


def token_budgets(field: str, texts: list[str], rows: int) -> tuple[int, ...]:
  """Token budgets of chunked placements, rising, from texts.

  Args:
    rows: of decode, that share one.

  Raises:
    InputError naming `field`.
  """
  require(texts and all(size.isdecimal() and int(size) > rows
                        for size in texts)
          and len(set(map(int, texts))) == len(texts), field, ','.join(texts),
          f'different integers above {rows}, the rows that share them')
  return tuple(sorted(map(int, texts)))


def seeds(texts: list[str]) -> list[int]:
  """Those of --seeds, each once.

  Raises:
    InputError.
  """
  drawn = [int(text) for text in texts if text.isdecimal() and len(text) < 19]
  require(texts and len(set(drawn)) == len(texts), '--seeds', ','.join(texts),
          'different integers, 0 or more, with commas between')
  return drawn


def numbers(field: str, text: str) -> list[float]:
  """Different positive numbers of a text with commas, rising; files and tables
  name them by six digits.

  Raises:
    InputError naming `field`.
  """
  try:
    parsed = [float(part) for part in text.split(',')]
  except ValueError:
    parsed = []
  require(parsed and all(0 < x < math.inf for x in parsed)
          and len({f'{x:g}' for x in parsed}) == len(parsed), field, text,
          'numbers above 0 with commas between that differ in six digits')
  return sorted(parsed)

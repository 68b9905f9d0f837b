"""Latencies by name: published ones, tables, rooflines, files of measured ones.

The tables (`tables/GPU_MODEL.json`, files as `save` writes them) come with
dsjax: each names its source, and how far it is from that.
"""

import dataclasses
import functools
import json
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

from dsjax.config import zoo
from dsjax.config.checks import (
    InputError,
    is_nonnegative,
    is_number,
    is_positive,
    naming,
    naming_file,
    parse_json,
    require,
)
from dsjax.config.model import ModelConfig
from dsjax.config.placement import Plan
from dsjax.simulation import hardware, roofline
from dsjax.simulation.contention import KINDS, Contention, by_name, by_pair
from dsjax.simulation.latency import Affine, Buckets, Costs, Latency, Link

TABLES, ROOFLINE, PEAKS = 'tables:', 'roofline:', 'roofline-peaks:'
STORED = ('bytes_per_weight', 'bytes_per_kv')
_FOLDER = pathlib.Path(__file__).with_name('tables')


@dataclasses.dataclass(frozen=True)
class Profile:
  """What was measured of a model on a device.

  latencies: {Plan: Affine}. links: {(Plan, Plan): Link}, prefill's plan to
  decode's. source: what measured it, in words. contention: of instances of
  one device each, side by side; None: not measured. errors: of the fit, by
  plan and kind of step, relative: (their mean, the worst). typical_s: {kind of
  step: seconds} of one that an idle instance of one device ran then, by which
  a machine is seen to be slower or faster later. bytes_per_weight,
  bytes_per_kv: of a number as the engine stores it, which memory and hand-offs
  are counted with.
  """

  model: str
  device: str
  latencies: dict[Plan, Affine]
  links: dict[tuple[Plan, Plan], Link] = dataclasses.field(
      default_factory=dict)
  source: str = ''
  contention: Contention | None = None
  errors: dict[Plan, dict[str, tuple[float, float]]] = dataclasses.field(
      default_factory=dict)
  typical_s: dict[str, float] = dataclasses.field(default_factory=dict)
  bytes_per_weight: float = 2.0
  bytes_per_kv: float = 2.0

  def of(self, config: ModelConfig) -> Callable[[Plan], Affine | None]:
    """Its latencies by plan, None where it has none.

    Raises:
      InputError: it is of another model.
    """
    own, asked = (re.sub('[^a-z0-9]', '', name.lower().rsplit('/')[-1])
                  for name in (self.model, config.name))
    require(own == asked, 'Profile.model', self.model,
            f'{config.name!r}, the model that is asked about')
    return self.latencies.get


def as_json(profile: Profile) -> dict[str, Any]:
  """A Profile as the JSON object that `load` reads."""
  data: dict[str, Any] = {
      'model': profile.model, 'device': profile.device,
      'source': profile.source,
      'latencies': {str(plan): dataclasses.asdict(x) | {
          'buckets': x.buckets._asdict(),
          'costs': {k: v for k, v in x.costs._asdict().items() if v}}
                    for plan, x in profile.latencies.items()},
      'links': {f'{a}>{b}': dataclasses.asdict(link)
                for (a, b), link in profile.links.items()},
  }
  if profile.contention:
    shared = dataclasses.asdict(profile.contention)
    data['contention'] = by_name(shared.pop('factors')) | {
        field: value for field, value in shared.items()
        if value not in (0.0, (0.0, 0.0))}
  if profile.errors:
    data['errors'] = {str(plan): kinds
                      for plan, kinds in profile.errors.items()}
  if profile.typical_s:
    data['typical_s'] = profile.typical_s
  data |= {field: getattr(profile, field) for field in STORED}
  return data


def save(path: str | pathlib.Path, profile: Profile) -> None:
  """Writes a Profile as JSON that `load` reads."""
  pathlib.Path(path).write_text(json.dumps(as_json(profile), indent=1) + '\n')


def read_json(path: str | pathlib.Path) -> Any:
  """What a JSON file holds.

  Raises:
    InputError naming the file; also where an object has a name twice.
  """
  try:
    text = pathlib.Path(path).read_bytes()
  except OSError as error:
    raise InputError(f'{path}: cannot be read: {error.strerror}') from error
  return parse_json(path, text, unique=True)


def load(path: str | pathlib.Path) -> Profile:
  """Reads a Profile.

  Raises:
    InputError naming the file and the field.
  """
  data = _fields(path, '', read_json(path), ('model', 'device', 'latencies'),
                 ('links', 'source', 'contention', 'errors', 'typical_s',
                  *STORED, 'made_by'))
  for field in ('model', 'device', 'source'):
    if not isinstance(data.get(field, ''), str):
      raise InputError(f'{path}: {field}={data[field]!r}: must be text')
  latencies, links = {}, {}
  for name, value in _fields(path, 'latencies', data['latencies']).items():
    where = f'latencies.{name}'
    plan = Plan.parse(name, f'{path}: latencies')
    latencies[plan] = _made(path, where, Affine, value)
    if latencies[plan].pp != plan.pp:
      raise InputError(f'{path}: {where}.pp={latencies[plan].pp}: must be '
                       f'{plan.pp}')
  for name, value in _fields(path, 'links', data.get('links', {})).items():
    ends = name.split('>')
    if len(ends) != 2:
      raise InputError(f'{path}: links={name!r}: must be PLAN>PLAN, such as '
                       '2x1>1x1')
    links[tuple(Plan.parse(e, f'{path}: links') for e in ends)] = _made(
        path, f'links.{name}', Link, value)
  contention = data.get('contention')
  if contention is not None:
    others = {f.name for f in dataclasses.fields(Contention)} - {'factors'}
    values = _fields(path, 'contention', contention)
    contention = _made(path, 'contention', Contention, {'factors': by_pair({
        name: factor for name, factor in values.items()
        if name not in others})} | {
            name: values[name] for name in others & values.keys()})
  errors = {Plan.parse(name, f'{path}: errors'): _errors(
      path, f'errors.{name}', kinds) for name, kinds in _fields(
          path, 'errors', data.get('errors', {})).items()}
  typical_s = _fields(path, 'typical_s', data.get('typical_s', {}))
  for kind, seconds in typical_s.items():
    with naming(str(path)):
      require(kind in KINDS, 'typical_s', kind, f'one of {KINDS}')
      require(is_positive(seconds),
              f'typical_s.{kind}', seconds, 'seconds, more than 0')
  with naming(str(path)):
    for field in STORED:
      require(is_number(0.25, 8)(data.get(field, 2)), field, data.get(field),
              'bytes of a number, 0.25 to 8')
  return Profile(data['model'], data['device'], latencies, links,
                 data.get('source', ''), contention, errors, typical_s,
                 **{field: data[field] for field in STORED if field in data})


# --- by name ------------------------------------------------------------------


def is_file(kind: str) -> bool:
  """Whether a name of latencies is that of a file."""
  return kind != 'published' and not kind.startswith(
      (TABLES, ROOFLINE, PEAKS))


def device_of(kind: str) -> hardware.Hardware | None:
  """The device that a name of latencies tells; None: it tells none."""
  start, _, gpu = kind.partition(':')
  return (hardware.HARDWARE.get(gpu)
          if start + ':' in (TABLES, ROOFLINE, PEAKS) else None)


@functools.cache
def tables() -> Mapping[str, list[str]]:
  """{GPU: models} of the tables that come with dsjax."""
  out: dict[str, list[str]] = {}
  for path in sorted(_FOLDER.glob('*.json')):
    gpu, _, model = path.stem.partition('_')
    out.setdefault(gpu, []).append(model)
  return out


def table(gpu: str, model: str) -> Profile:
  """One of the `tables`."""
  return load(_FOLDER / f'{gpu}_{model}.json')


def named(kind: str, config: ModelConfig,
          host_s: float = 0.0) -> Callable[[Plan], Latency | None]:
  """A function Plan -> seconds of its steps, None where nothing is known.

  It can be pickled, so that processes may share it.

  Args:
    kind: 'published' (DistServe's A100 profiles of OPT-13B and OPT-66B),
      'tables:h100-80g' and the like (operators measured on that GPU, summed;
      of `tables`, for every model of the same shape), 'roofline:h100-80g' and
      the like (any model's shape against what such operators reach of the
      peaks), 'roofline-peaks:h100-80g' (against the peaks themselves: a
      bound), or a file that `save` wrote.
    host_s: the host's time between steps, where kind does not say.

  Raises:
    InputError.
  """
  if kind == 'published':
    models = sorted({model for model, _ in hardware.released()})
    require(config.name in models, 'latency', kind,
            f'another for {config.name}: published are {", ".join(models)}; '
            f"{ROOFLINE}NAME, of {sorted(hardware.HARDWARE)}, takes any model, "
            f'{TABLES}NAME those of {_models()}, and so does a file that '
            'experiments.measure wrote of it')
    return functools.partial(_published, config.name, host_s)
  for start in (ROOFLINE, PEAKS):
    if kind.startswith(start):
      gpu = kind.removeprefix(start)
      require(gpu in hardware.HARDWARE, 'latency', kind,
              f'{start!r} and one of {sorted(hardware.HARDWARE)}')
      device = hardware.HARDWARE[gpu]
      return of_hardware(
          device, config, host_s,
          device.shares if start == ROOFLINE else hardware.Shares())
  if kind.startswith(TABLES):
    return functools.partial(
        _of_table, _table_of(kind, config).latencies, host_s)
  with naming_file(
      'latency', kind, f"'published', {TABLES!r} or {ROOFLINE!r} and one of "
      f'{sorted(hardware.HARDWARE)}, or a file that experiments.measure wrote'):
    return load(kind).of(config)


def of_hardware(device: hardware.Hardware, config: ModelConfig,
                host_s: float = 0.0, shares: hardware.Shares | None = None
                ) -> Callable[[Plan], Latency]:
  """The rooflines of a device; shares: of its peaks, None: its own. The
  function can be pickled."""
  return functools.partial(_roofline, config, device, shares or device.shares,
                           host_s)


def caveat(kind: str) -> str:
  """What to know of latencies before believing a search; '' if nothing."""
  device = device_of(kind)
  if device and kind.startswith(ROOFLINE):
    return f'{kind}: {device.shares}, {hardware.SHARES_SOURCE}.'
  if kind.startswith(PEAKS):
    return (f'{kind}: every operation at the peaks of the data sheet is a '
            f'bound: served steps took about twice as long ({ROOFLINE}).')
  if not is_file(kind):
    return ''
  shared = load(kind).contention
  most = max(shared.factors.values()) if shared and shared.factors else 1.0
  if most < 1.1:
    return ''
  return (f'{kind}: its instances share cores: side by side a step takes up to '
          f'{most:.2f} times as long, which is left out here (see '
          'dsjax.simulation.contention).')


def _published(model, host_s, plan):
  try:
    return hardware.published(model, plan, host_s=host_s)
  except InputError:
    return None


def _models():
  return ', '.join(sorted(set().union(*tables().values())))


def _shape(config):
  """What a step's seconds depend on: not names, positions, constants."""
  return (config.num_layers, config.num_heads, config.num_kv_heads,
          config.windows, config.experts_per_token,
          *((leaf, config.leaf_shape(leaf))
            for leaf in (*config.layer_leaves, *config.top_leaves)))


def _table_of(kind, config):
  """The Profile of 'tables:GPU' for a model of this shape."""
  gpu, known = kind.removeprefix(TABLES), tables()
  require(gpu in known, 'latency', kind, f'{TABLES!r} and one of '
          f'{sorted(known)}, each of {_models()}')
  of_shape = [model for model in known[gpu]
              if _shape(zoo.config(model)) == _shape(config)]
  require(of_shape, 'latency', kind,
          f'another for {config.name}: {kind} has {", ".join(known[gpu])} and '
          f'models of their shapes; {ROOFLINE}{gpu} takes any model')
  return table(gpu, of_shape[0])


def _of_table(latencies, host_s, plan):
  known = latencies.get(plan)
  return known and dataclasses.replace(known, host_s=host_s)


def _roofline(config, device, shares, host_s, plan):
  return roofline.Roofline(config, device, plan.tp, plan.pp, shares=shares,
                           host_s=host_s)


# --- reading ------------------------------------------------------------------


def _fields(path, where, value, needed=(), more=None):
  name = where or 'the file'
  if not isinstance(value, dict):
    raise InputError(f'{path}: {name}={str(value)[:60]}: must be an object')
  dot = f'{where}.' if where else ''
  for field in needed:
    if field not in value:
      raise InputError(f'{path}: {dot}{field}: must be present')
  known = None if more is None else (*needed, *more)
  for field in value:
    if known is not None and field not in known:
      raise InputError(f'{path}: {dot}{field}: is not known: must be one of '
                       f'{known}')
  return value


def _errors(path, where, kinds):
  """{kind: (mean, worst)} of a file."""
  for kind, pair in _fields(path, where, kinds, (),
                            ('prefill', 'decode', 'mixed')).items():
    if not (isinstance(pair, list) and len(pair) == 2
            and all(map(is_nonnegative, pair))):
      raise InputError(f'{path}: {where}.{kind}={pair!r}: must be [mean, '
                       'worst], each 0 or more')
  return {kind: tuple(pair) for kind, pair in kinds.items()}


def _made(path, where, kind, value):
  fields = dataclasses.fields(kind)
  needed = [f.name for f in fields if f.default is dataclasses.MISSING]
  value = dict(_fields(path, where, value, needed, [
      f.name for f in fields if f.name not in needed]))
  for field, lists, needed in (('buckets', Buckets, Buckets._fields),
                               ('costs', Costs, ())):
    if field in value:
      own = _fields(path, f'{where}.{field}', value[field], needed,
                    lists._fields)
      for name, sizes in own.items():
        if not isinstance(sizes, list):
          raise InputError(f'{path}: {where}.{field}.{name}={sizes!r}: must be '
                           'a list')
      value[field] = lists(**{k: tuple(v) for k, v in own.items()})
  with naming(f'{path}: {where}'):
    return kind(**value)

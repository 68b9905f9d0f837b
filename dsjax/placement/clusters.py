"""What there is to place on: nodes of equal devices, or of several kinds.

A `Cluster` is nodes of one kind. A `MixedCluster` has several, by names of the
user's choice. An instance runs on devices of one kind, with the latency and
the memory of that kind, and `Plan.kind` names it: 'prefill=2x1@fast'. KV moves
over the link of the border that it crosses: inside a node, between nodes of a
kind, or between two kinds.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Self

from dsjax.config import checks
from dsjax.config.checks import InputError, naming, require
from dsjax.config.placement import KIND, Placement, Plan
from dsjax.simulation import hardware, profiles
from dsjax.simulation.hardware import Hardware


@dataclasses.dataclass(frozen=True)
class Border:
  """A KV transfer over a border: hand_off_s + bytes / bytes_per_s.

  reads_beside: pages are read while their source computes, see latency.Link.
  """

  bytes_per_s: float
  hand_off_s: float = 1e-3
  reads_beside: bool = False

  def __post_init__(self) -> None:
    checks.make_plain(self)
    require(checks.is_positive(self.bytes_per_s), 'Border.bytes_per_s',
            self.bytes_per_s, 'a number above 0')
    require(checks.is_nonnegative(self.hand_off_s), 'Border.hand_off_s',
            self.hand_off_s, 'seconds, 0 or more')
    require(isinstance(self.reads_beside, bool), 'Border.reads_beside',
            self.reads_beside, 'true or false')


@dataclasses.dataclass(frozen=True)
class Cluster:
  """Nodes of equal devices; the paper's, where nothing is said.

  Attributes:
    nodes, devices_per_node: how many.
    memory_bytes: of a device.
    intra_bytes_per_s, inter_bytes_per_s: of a KV transfer inside a node and
      between nodes; hand_off_s: its fixed part. reads_beside: pages are
      read while their source computes, see latency.Link.
    host_bytes_per_s: between a device and the memory of its host, one
      direction.
    latency: of its devices, whatever dsjax.search takes, or the peaks of a
      device of your own (Hardware), for a roofline; None: that of the search.
    price: of a device, in any unit. Goodput counts per unit of it.
  """

  nodes: int = 1
  devices_per_node: int = 8
  memory_bytes: float = hardware.HARDWARE['a100-80g'].memory_bytes
  intra_bytes_per_s: float = hardware.HARDWARE['a100-80g'].link_bytes_per_s
  inter_bytes_per_s: float = hardware.PAPER_NODE_BYTES_PER_S
  hand_off_s: float = 1e-3
  reads_beside: bool = False
  host_bytes_per_s: float = hardware.PCIE4_BYTES_PER_S
  latency: Any = None
  price: float = 1.0

  def __post_init__(self) -> None:
    checks.make_plain(self)
    for field in ('nodes', 'devices_per_node'):
      value = getattr(self, field)
      require(checks.is_positive_int(value), f'Cluster.{field}', value,
              'an integer of 1 or more')
    for field in ('memory_bytes', 'intra_bytes_per_s', 'inter_bytes_per_s',
                  'host_bytes_per_s', 'price'):
      value = getattr(self, field)
      require(checks.is_positive(value), f'Cluster.{field}', value,
              'a number above 0')
    require(checks.is_nonnegative(self.hand_off_s), 'Cluster.hand_off_s',
            self.hand_off_s, 'seconds, 0 or more')
    require(isinstance(self.reads_beside, bool), 'Cluster.reads_beside',
            self.reads_beside, 'true or false')

  @property
  def num_devices(self) -> int:
    return self.nodes * self.devices_per_node

  @property
  def kinds(self) -> Mapping[str, Self]:
    """The one kind, which has no name."""
    return {'': self}

  @classmethod
  def of(cls, named: object = None, **given: Any) -> Self:
    """The Cluster of the device that latencies are of.

    Args:
      named: 'tables:h100-80g', 'roofline:...', 'roofline-peaks:...' or a
        Hardware gives memory and links of that device; anything else those
        of the paper. Not read where `given` has a latency.
      given: fields that replace these.
    """
    named = named if given.get('latency') is None else given['latency']
    device = (named if isinstance(named, Hardware) else
              profiles.device_of(named) if isinstance(named, str) else None)
    known: dict[str, Any] = {} if device is None else dict(
        memory_bytes=device.memory_bytes,
        intra_bytes_per_s=device.link_bytes_per_s,
        inter_bytes_per_s=device.node_bytes_per_s,
        host_bytes_per_s=device.host_bytes_per_s)
    return cls(**known | given)


@dataclasses.dataclass(frozen=True)
class MixedCluster:
  """Nodes of several kinds.

  Attributes:
    kinds: {name: the nodes of that kind}. A node with two kinds of device is
      two kinds here, and its inside the link between them.
    links: {(name, name): Border} from prefill's kind to decode's. Where only
      the reverse is given, that; else the slower inter_bytes_per_s of the two
      and the longer hand_off_s.
  """

  kinds: Mapping[str, Cluster]
  links: Mapping[tuple[str, str], Border] = dataclasses.field(
      default_factory=dict)

  def __post_init__(self) -> None:
    kinds = self.kinds
    require(isinstance(kinds, Mapping) and kinds
            and all(isinstance(own, Cluster) for own in kinds.values()),
            'MixedCluster.kinds', kinds, 'names, each with a Cluster')
    for name in kinds:
      require(isinstance(name, str) and re.fullmatch(KIND, name),
              'MixedCluster.kinds', name, 'names of letters, digits, _ . -')
    require(isinstance(self.links, Mapping), 'MixedCluster.links', self.links,
            'pairs of kinds, each with a Border')
    for ends, border in self.links.items():
      require(isinstance(ends, tuple) and len(ends) == 2
              and ends[0] != ends[1] and all(end in kinds for end in ends),
              'MixedCluster.links', ends, f'a pair of {sorted(kinds)}')
      require(isinstance(border, Border), f'MixedCluster.links[{ends}]',
              border, 'a Border')

  @property
  def num_devices(self) -> int:
    return sum(own.num_devices for own in self.kinds.values())


AnyCluster = Cluster | MixedCluster


def nodes_of(cluster: AnyCluster, plan: Plan) -> Cluster:
  """The nodes that an instance of a plan runs on.

  Raises:
    InputError: there is no such kind.
  """
  names = [name or "'' (there is one kind)" for name in cluster.kinds]
  require(plan.kind in cluster.kinds, 'Plan.kind', plan.kind,
          f'one of {names}')
  return cluster.kinds[plan.kind]


def border(cluster: AnyCluster, source: Plan, target: Plan,
           aligned: bool) -> Border:
  """What KV crosses from one instance to another; aligned: inside a node,
  where both are of one kind."""
  a, b = nodes_of(cluster, source), nodes_of(cluster, target)
  if source.kind == target.kind:
    return Border(a.intra_bytes_per_s if aligned else a.inter_bytes_per_s,
                  a.hand_off_s, a.reads_beside)
  links = cluster.links if isinstance(cluster, MixedCluster) else {}
  ends = source.kind, target.kind
  return links.get(ends) or links.get(ends[::-1]) or Border(
      min(a.inter_bytes_per_s, b.inter_bytes_per_s),
      max(a.hand_off_s, b.hand_off_s), a.reads_beside)


def fits(cluster: AnyCluster, placement: Placement, copies: int = 1) -> bool:
  """Whether each kind has the devices of so many copies."""
  return all(copies * sum(
      plan.num_devices for _, plan in placement.instances if plan.kind == name)
             <= own.num_devices for name, own in cluster.kinds.items())


def price(cluster: AnyCluster, *plans: Plan) -> float:
  """What the devices of instances cost: their number, if none has a price."""
  return sum(plan.num_devices * nodes_of(cluster, plan).price
             for plan in plans)


def unit(cluster: AnyCluster) -> str:
  """What goodput counts per, in words."""
  return ('device' if all(own.price == 1 for own in cluster.kinds.values())
          else 'unit of price')


def latencies(cluster: AnyCluster, named: Any) -> list[Any]:
  """What tells the steps of a cluster's kinds, each once: latencies of their
  own, or `named`."""
  return list(dict.fromkeys(own.latency or named
                            for own in cluster.kinds.values()))


def holds(cluster: AnyCluster) -> str:
  """The devices of a cluster, in words."""
  return ', '.join(f'{own.nodes} x {own.devices_per_node}'
                   + (f' of {name}' if name else '')
                   for name, own in cluster.kinds.items())


# --- files --------------------------------------------------------------------


def _object(where: str, value: object, known: list[str]) -> dict[str, Any]:
  require(isinstance(value, dict), where, value, f'an object with {known}')
  assert isinstance(value, dict)
  for field in value:
    require(field in known, f'{where}: field', field, f'one of {known}')
  return value


def _names(kind: type) -> list[str]:
  return [field.name for field in dataclasses.fields(kind)]


def _cluster(where: str, value: object, latency: object) -> Cluster:
  """The Cluster of a JSON object; what it leaves out is as `latency` says."""
  given = dict(_object(where, value, _names(Cluster)))
  own = given.get('latency')
  if isinstance(own, dict):
    with naming(f'{where}: latency'):
      given['latency'] = Hardware.parse(own)
  else:
    require(own is None or isinstance(own, str), f'{where}: latency', own,
            'a name or file that --latency takes, or an object with the peaks '
            f'of a device: {_names(Hardware)}')
  with naming(where):
    return Cluster.of(latency, **given)


def load(path: str, latency: object = None) -> AnyCluster:
  """The cluster of a JSON file: the fields of a Cluster, or of a
  MixedCluster, with links named 'KIND>KIND'.

  Args:
    latency: what gives memory and links, where the file does not; see
      Cluster.of.

  Raises:
    InputError naming the file and the field.
  """
  data = profiles.read_json(path)
  if not isinstance(data, dict) or not {'kinds', 'links'} & set(data):
    return _cluster(path, data, latency)
  data = _object(path, data, _names(MixedCluster))
  kinds, links = ({} if data.get(name) is None else data[name]
                  for name in ('kinds', 'links'))
  for name, value in (('kinds', kinds), ('links', links)):
    require(isinstance(value, dict), f'{path}: {name}', value, 'an object')
  borders: dict[tuple[str, str], Border] = {}
  for name, value in links.items():
    where = f'{path}: links.{name}'
    require(re.fullmatch(f'{KIND}>{KIND}', name), f'{path}: links', name,
            "'KIND>KIND', from prefill's to decode's")
    given = _object(where, value, _names(Border))
    if 'bytes_per_s' not in given:
      raise InputError(f'{where}.bytes_per_s: must be present')
    with naming(where):
      source, _, target = name.partition('>')
      borders[source, target] = Border(**given)
  with naming(path):
    return MixedCluster({
        name: _cluster(f'kinds.{name}', value, latency)
        for name, value in kinds.items()}, borders)

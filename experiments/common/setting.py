"""What simulated runners are asked about: seconds of steps, requests.

What is returned can be pickled, so that processes may share it.
"""

import functools

from dsjax import workload
from dsjax.config.checks import InputError, require
from dsjax.simulation import hardware, profiles, roofline
from dsjax.workload import traffic


def latencies(kind, config, model, host_s):
  """A function Plan -> seconds of its steps, or None where nobody knows them.

  Args:
    kind: 'published' (DistServe's A100 profiles of OPT-13B and OPT-66B),
      'roofline:a100-80g' and the like (shapes against peaks), or a file that
      experiments.measure wrote.
    config: a ModelConfig; model: its name.
    host_s: the host's time between steps, where kind does not say.
  """
  if kind == 'published':
    return functools.partial(_published, model, host_s)
  if kind.startswith('roofline:'):
    name = kind.removeprefix('roofline:')
    require(name in hardware.HARDWARE, '--latency', kind,
            f"'roofline:' and one of {sorted(hardware.HARDWARE)}")
    return functools.partial(_roofline, config, name, host_s)
  return profiles.load(kind).latencies.get


def caveat(kind):
  """What a search over the latencies of a file leaves out; '' if nothing."""
  if kind == 'published' or kind.startswith('roofline:'):
    return ''
  shared = profiles.load(kind).contention
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


def _roofline(config, name, host_s, plan):
  return roofline.Roofline(config, hardware.HARDWARE[name], plan.tp, plan.pp,
                           host_s=host_s)


def requests(lengths, seed, process='poisson', cv=1.0):
  """A workload: ((rate_per_s, n) -> n requests, its longest sequence).

  The same lengths, and the same gaps but for their scale, at every rate
  (common random numbers).

  Args:
    lengths: a name in traffic.MIXTURES, or a file of lengths.
    process: of arrivals, one of workload.KINDS; cv: of 'gamma'. 'trace': the
      file's requests in its order, no more than it has, at its own times
      where rate_per_s is None.
  """
  if lengths in traffic.MIXTURES:
    entries = traffic.draw(lengths, 4096, seed)
  else:
    entries = workload.read_lengths(lengths)

  make = functools.partial(_made, entries, seed, process, cv)
  return make, max(e.prompt_len + e.output_len for e in entries)


def _made(entries, seed, process, cv, rate_per_s, n):
  trace = process == 'trace'
  n = min(n, len(entries)) if trace else n
  at = workload.arrivals(process, rate_per_s, n, seed, cv, entries)
  return workload.from_lengths(entries, n, at, seed=seed, in_order=trace)[0]

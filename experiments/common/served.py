"""Latencies of a placement from what clients saw of a run that it served."""

import pathlib
import re
import types
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from dsjax.checkpoints import hf_config
from dsjax.config.placement import Placement, Plan
from dsjax.placement import candidates
from dsjax.placement.api import make_problem
from dsjax.placement.clusters import Cluster
from dsjax.simulation import profiles, served_fit
from dsjax.simulation.latency import Affine
from dsjax.workload import files
from dsjax.workload.served import read_served
from experiments.common import cli, provenance


def _unknown(plan: Plan) -> Affine:
  """Before the fit: any seconds will do."""
  return Affine((1.0, 0.0, 0.0), (1.0, 0.0, 0.0), pp=plan.pp)


def _errors(fit):
  """'TTFT p50 +1 %, ...' of the requests held out."""
  return ', '.join(f'{name} p{q} {100 * (told / seen - 1):+.0f} %'
                   for name, own in fit.errors.items()
                   for q, (seen, told) in own.items())


def _show(console, fit, kept, held):
  table = Table(title=f'Fitted to {kept} requests; of the {held} after them:',
                title_justify='left')
  for column in ('', 'measured ms', 'simulated ms', 'error'):
    table.add_column(column, justify='right' if column else 'left')
  for name, own in fit.errors.items():
    for q, (seen, told) in own.items():
      table.add_row(f'{name} p{q}', f'{1e3 * seen:.4g}', f'{1e3 * told:.4g}',
                    f'{told / seen - 1:+.1%}')
  console.print(table)
  for plan, model in fit.latencies.items():
    (a, b, c), (a_d, b_d, c_d) = model.prefill, model.decode
    console.print(
        f'plan {plan}: prefill {1e3 * a:.4g} ms + {1e6 * b:.4g} us a token + '
        f'{1e9 * c:.4g} ns a square; decode {1e3 * a_d:.4g} ms + '
        f'{1e9 * b_d:.4g} ns a token of context + {1e6 * c_d:.4g} us a row',
        highlight=False, soft_wrap=True)
  for plan, phase in fit.unseen:
    console.print(f'plan {plan} ran no {phase}: its constants are those of '
                  'another plan.', style='yellow')


def run(options: types.SimpleNamespace, console: Console, path: str,
        stored: tuple[float, float], asked: Mapping[str, Any]) -> int:
  """Fits, shows, and writes the file that --latency takes; 0.

  stored: bytes of a weight, and of a number of KV.
  """
  placement = Placement.parse(options.placement, '--placement')
  weight, kv = stored
  requests, empty = read_served(path)
  if empty:
    console.print(f'{empty} rows without tokens are left out.')
  cluster = Cluster.of(options.hardware and f'roofline:{options.hardware}',
                       **cli.fields(options, cli.CLUSTER))
  problem = make_problem(
      hf_config.named(options.model), latency=_unknown, cluster=cluster,
      lengths=[files.Entry(None, r.prompt_len, r.output_len)
               for r in requests],
      max_len=max(r.prompt_len + r.output_len for r in requests),
      max_seqs=options.max_seqs, itemsize=weight, kv_itemsize=kv)
  config, _, link = candidates.build(problem, placement, options.batch_tokens,
                                     aligned=True)
  with console.status('fitting'):
    fit = served_fit.fit_served(
        config, [plan for _, plan in placement.instances], link, requests)
  held = int(served_fit.HELD_OUT * len(requests))
  _show(console, fit, len(requests) - held, held)
  device = options.hardware or 'own'
  profile = profiles.Profile(
      options.model, device, fit.latencies, source=(
          f'fitted to {len(requests) - held} requests of '
          f'{pathlib.Path(path).name} that {placement} served; {held} held '
          f'out: {_errors(fit)}' + ''.join(
              f'; plan {plan} ran no {phase}' for plan, phase in fit.unseen)),
      bytes_per_weight=weight, bytes_per_kv=kv)
  out = pathlib.Path(options.out)
  out.mkdir(parents=True, exist_ok=True)
  slug = '-'.join(re.sub('[^a-z0-9.]+', '-', x.lower()).strip('-')
                  for x in (device, options.model))
  provenance.save_json(out / f'latency-{slug}.json', profiles.as_json(profile),
                       asked, [path])
  console.print(f'wrote {out / f"latency-{slug}.json"}')
  return 0

"""What experiments.aot reads in compiled programs, and says of them."""

import collections
import json
import math
import pathlib
import re

from rich.table import Table

OURS = {'prefill': {'prefill_attention', 'kv_write'},
        'decode': {'decode_attention', 'kv_write'},
        'pack': {'pack'}, 'unpack': {'unpack'}, 'pieces': set()}
KINDS = ('all-gather', 'all-reduce', 'all-to-all', 'collective-broadcast',
         'collective-permute', 'ragged-all-to-all', 'reduce-scatter')
TOLERANCE = 0.05  # of bytes
MOST = 0.9  # of a device's memory


def collectives(text):
  """{kind: how many} in the text of an optimised HLO module."""
  found = re.findall(rf' ({"|".join(KINDS)})(?:-start)?\(', text)
  return dict(sorted(collections.Counter(found).items()))


def copies(text, least):
  """Copies of arrays of `least` numbers or more in an optimised module."""
  shapes = re.findall(r'= \(?\w+\[([\d,]*)\][^=]* copy(?:-start)?\(', text)
  return sum(math.prod(int(n) for n in shape.split(',') if n) >= least
             for shape in shapes)


def kernels(found):
  """Of {name: compiled.Kernel}: our kernels, and who else spills.

  Returns:
    {'kernels': {name: its registers, spilled bytes, grid, threads, shared
    bytes}, 'spills': {name of XLA's own: bytes}}.
  """
  ours = set().union(*OURS.values())
  return dict(
      kernels={name: k._asdict() | {'grid': ', '.join(map(str, k.grid))}
               for name, k in sorted(found.items()) if name in ours},
      spills={name: k.spilled for name, k in sorted(found.items())
              if k.spilled and name not in ours})


def device_bytes(gpu):
  """Memory of a described GPU."""
  path = pathlib.Path(__file__).parent / 'gpus' / f'{gpu}.txtpb'
  return int(re.search(r'device_memory_size: (\d+)', path.read_text())[1])


def must_hold(row):
  """What is wrong with a row whatever the versions: sentences."""
  if 'error' in row:
    return [row['error']]
  found, size = [], device_bytes(row['gpu'])
  if row['peak_bytes'] > MOST * size:
    found.append(f'peak of {row["peak_bytes"]} bytes is above {MOST} of the '
                 f"device's {size}")
  if not row['kv_bytes'] <= row['donated_bytes'] == row['alias_bytes']:
    found.append(f'{row["alias_bytes"]} bytes are updated in place: KV has '
                 f'{row["kv_bytes"]}, {row["donated_bytes"]} are donated')
  if row['copies']:
    found.append(f'{row["copies"]} copies of a cache array')
  kind = row['step'].split()[0]
  for name in sorted(OURS[kind] - set(row['kernels'])):
    found.append(f'no kernel {name}')
  found += [f'{name} spills {k["spilled"]} bytes'
            for name, k in row['kernels'].items() if k['spilled']]
  return found


def differences(row, want):
  """How a row differs from the golden one: sentences."""
  found = []
  for field in sorted(row.keys() | want.keys()):
    value, was = row.get(field), want.get(field)
    close = (field.endswith('_bytes') and None not in (value, was)
             and abs(value - was) <= TOLERANCE * was)
    if value != was and not close:
      found.append(f'{field} is {value}, was {was}')
  return found


def key(row):
  """What tells rows apart."""
  return row['gpu'], row['model'], row['step']


def faults(rows, golden):
  """Sentences that begin with the row's key; golden: rows, or None."""
  known = {key(row): row for row in golden or ()}
  found = []
  for row in rows:
    wrong = must_hold(row)
    if golden is not None and not wrong:
      want = known.get(key(row))
      wrong = (['it is not in the golden table'] if want is None
               else differences(row, want))
    found += [f'{" ".join(key(row))}: {fault}' for fault in wrong]
  return found


def merge(kept, rows):
  """Golden rows, with those of this run in place of their predecessors."""
  return list(({key(r): r for r in kept} | {key(r): r for r in rows}).values())


def save(path, golden):
  """Writes a golden table, a line a row."""
  rows = ',\n'.join(json.dumps(row) for row in golden['rows'])
  path.write_text(f'{{"versions": {json.dumps(golden["versions"])},\n'
                  f'"rows": [\n{rows}\n]}}\n')


def _launch(name, kernel):
  return (name, kernel.get('grid', '-').replace(', ', 'x'),
          *(str(kernel.get(field, '-')) for field in (
              'threads', 'registers', 'shared', 'spilled')))


def table(rows):
  """A rich table: a line a kernel of each row."""
  out = Table(title='Compiled without a GPU')
  for name in ('GPU', 'step', 'layers', 'tp', 'calls', 'collectives', 'peak',
               'in place', 'copies', 'kernel', 'grid', 'threads', 'regs',
               'shared', 'spills'):
    out.add_column(name, no_wrap=True, justify='left' if name in (
        'GPU', 'step', 'collectives', 'kernel') else 'right')
  last = None
  for r in rows:
    if last not in (None, (r['gpu'], r['model'])):
      out.add_section()
    if last != (r['gpu'], r['model']):
      out.add_row(r['gpu'], f'[bold]{r["model"]}')
    last = r['gpu'], r['model']
    if 'error' in r:
      out.add_row('', r['step'], *[''] * 7, f'[red]{r["error"][:60]}')
      continue
    share = r['peak_bytes'] / device_bytes(r['gpu'])
    own = ['', r['step'], str(r['layers'] or '-'), str(r['tp']),
           str(r['calls']),
           ', '.join(f'{c} {n}' for n, c in r['collectives'].items()) or '-',
           f'{r["peak_bytes"] / 2**30:.1f} GiB {share:4.0%}',
           f'{min(r["alias_bytes"] / r["kv_bytes"], 1):.0%}'
           if r['kv_bytes'] else '-', str(r['copies'])]
    launches = [_launch(*item) for item in r['kernels'].items()] or [
        ('none', *[''] * 5)]
    launches += [(f"XLA's {name}", '', '', '', '', str(spilled))
                 for name, spilled in r['spills'].items()]
    for launch in launches:
      out.add_row(*own, *launch)
      own = [''] * len(own)
  return out

"""Takes what a run on a GPU wrote into the repository.

README.md has the table between two comments, docs/gpu.md the details between
two more; profiles go to experiments/profiles, with the machine they belong to,
tuned configs to kernels/tuned.json, and the figure to docs/figures/gpu.png.
"""

import json
import pathlib
import re
import statistics

from matplotlib.figure import Figure

from dsjax.config.checks import require
from dsjax.kernels import tuned
from experiments.common.cli import ROOT
from experiments.gpu import lines, tasks

BEGIN, END = '<!-- gpu: by experiments.gpu --ingest -->', '<!-- /gpu -->'


def run(folder, console, root=ROOT):
  """Takes in the files of `folder`; the exit code.

  Raises:
    InputError: it holds no results, or they are of a CPU.
  """
  rows = {part: lines.read(folder / f'{part}.jsonl') for part in tasks.PARTS}
  require(any(rows.values()), '--ingest', str(folder),
          'a folder with the files of a run')
  machine = next((row for part in rows.values() for row in part
                  if row['what'] == 'machine'), None)
  require(machine is not None, '--ingest', str(folder),
          'the results of a run that got as far as naming its device')
  require('nvidia' in machine['device'].lower(), '--ingest',
          f'results of {machine["device"]!r}', 'results of a GPU')
  written = [save_profile(rows['measure'], machine, root),
             save_tuned(rows['tune'], root)]
  if draw(rows, machine, root / 'docs' / 'figures' / 'gpu.png'):
    written.append('docs/figures/gpu.png')
  insert(root / 'README.md', summary(rows, machine))
  insert(root / 'docs' / 'gpu.md', details(rows, machine))
  console.print('wrote README.md, docs/gpu.md' + ''.join(
      f', {name}' for name in written if name), soft_wrap=True)
  return 0


def short(device):
  """'h100' of 'NVIDIA H100 80GB HBM3'."""
  return re.sub('[^a-z0-9]+', '-', device.lower().replace(
      'nvidia', '').split()[0])


def save_profile(rows, machine, root):
  """Writes the measured profile; its path, or None."""
  text = next((row['profile'] for row in rows if 'profile' in row), None)
  if text is None:
    return None
  data = json.loads(text)
  data['source'] += f'; {described(machine)}'
  path = pathlib.Path('experiments', 'profiles', (
      f'latency-{short(machine["device"])}-{data["model"]}.json'))
  (root / path).parent.mkdir(parents=True, exist_ok=True)
  (root / path).write_text(json.dumps(data, indent=1) + '\n')
  return str(path)


def save_tuned(rows, root):
  """Adds the kept configs to kernels/tuned.json; its path, or None."""
  kept = [row for row in rows if row.get('kept')]
  if not kept:
    return None
  path = root / 'kernels' / tuned.PATH.name
  held = json.loads(path.read_text()) if path.exists() else {}
  for row in kept:
    held.setdefault(row['kind'], {}).setdefault(row['op'], {})[
        row['shape']] = row['config']
  path.write_text(json.dumps(held, indent=1, sort_keys=True) + '\n')
  return f'kernels/{path.name}'


def described(machine):
  """The machine in words."""
  return (f'{machine["device"]}, driver {machine["driver"]}, jax '
          f'{machine["jax"]}, Python {machine["python"]}, {machine["date"]}')


def verdicts(rows):
  """{part: 'N right, M wrong', or 'measured'} of what was judged."""
  found = {}
  for part, of_part in rows.items():
    judged = [row['ok'] for row in of_part if row['ok'] is not None]
    wrong = judged.count(False)
    found[part] = ('not run' if not of_part else 'measured' if not judged else
                   f'{wrong} of {len(judged)} wrong' if wrong else 'right')
  return found


def summary(rows, machine):
  """The README's table: a line a part."""
  out = [f'On one {described(machine)}:', '', '| part | verdict | figures |',
         '|---|---|---|']
  for part, verdict in verdicts(rows).items():
    figures = '; '.join(f'{row["task"]}: {row["figure"]}'
                        for row in rows[part] if 'figure' in row)
    out.append(f'| {part} | {verdict} | {figures} |')
  return '\n'.join(out)


def details(rows, machine):
  """Tables of docs/gpu.md: kernels, steps, hand-offs, tuning, simulation."""
  out = [f'On one {described(machine)}.', '',
         '| kernel | us | share of what the device reaches | cuDNN us | '
         'XLA us | JAX paged us |', '|---|---|---|---|---|---|']
  for row in rows['speed']:
    if 'op' in row and 'share' in row:
      others = [row['others'].get(n) for n in ('cudnn', 'xla', 'JAX paged')]
      out.append(f'| {row["what"]} | {1e6 * row["seconds"]:.1f} | '
                 f'{row["share"]:.0%} | ' + ' | '.join(
                     f'{1e6 * s:.1f}' if s else '-' for s in others) + ' |')
  out += ['', '| step | ms | floor ms | share | host ms | torch ms |',
          '|---|---|---|---|---|---|']
  for row in rows['speed']:
    if 'least_s' in row and 'op' not in row:
      torch_s = row.get('torch_s')
      out.append(f'| {row["what"]} | {1e3 * row["seconds"]:.2f} | '
                 f'{1e3 * row["least_s"]:.2f} | {row["share"]:.0%} | '
                 f'{1e3 * row["host_s"]:.2f} | '
                 f'{f"{1e3 * torch_s:.2f}" if torch_s else "-"} |')
  out += ['', '| hand-off | GB/s | of a plain copy |', '|---|---|---|']
  out += [f'| {row["what"]} | {row["bytes_per_s"] / 1e9:.1f} | '
          f'{row["of_a_copy"]:.0%} |' for row in rows['speed']
          if 'of_a_copy' in row]
  out += ['', '| served | real, attained | simulated | TTFT | TPOT |',
          '|---|---|---|---|---|']
  for row in rows['simulate']:
    if 'real' in row:
      share, low, high = (100 * x for x in row['real']['attainment'])
      out.append(
          f'| {row["what"]}, {row["requests"]} requests | {share:.1f} '
          f'[{low:.0f}, {high:.0f}] % | '
          f'{100 * row["simulated"]["attainment"][0]:.1f} % | '
          f'{row["errors"]["ttft_s"]["mean"]:+.0%} | '
          f'{row["errors"]["tpot_s"]["mean"]:+.0%} |')
  wrong = [row for part in rows.values() for row in part
           if row['ok'] is False]
  out += ['', 'Wrong:' if wrong else 'Nothing was wrong.', '']
  out += [f'- {row["task"]}: {row["what"]}' for row in wrong]
  return '\n'.join(out).rstrip()


def draw(rows, machine, path):
  """Shares of the floor, and real against simulated; whether there is any."""
  shares = {}
  for row in rows['speed']:
    if 'share' in row:
      key = (f'{row["op"]}, {row["impl"]}' if 'op' in row
             else row['what'].split(': ')[0] + ' ' + row['what'].split(
                 ': ')[1].split()[0])
      shares.setdefault(key, []).append(row['share'])
  served = [row for row in rows['simulate'] if 'real' in row]
  if not shares and not served:
    return False
  figure = Figure(figsize=(11, 4.5), layout='constrained')
  left, right = figure.subplots(1, 2)
  names = list(shares)
  left.barh(names, [100 * statistics.median(shares[n]) for n in names],
            color='0.6', edgecolor='black')
  left.set(xlabel='share of what the device reaches, % (median)')
  left.invert_yaxis()
  for mode, marker in (('colocated', 'o'), ('chunked', 's')):
    own = [row for row in served if row['mode'] == mode]
    rates = [row['rate_per_s'] for row in own]
    right.plot(rates, [100 * row['real']['attainment'][0] for row in own],
               marker, color='black', label=f'{mode}, served')
    right.plot(rates, [100 * row['simulated']['attainment'][0]
                       for row in own], '-' if marker == 'o' else '--',
               color='C0', label=f'{mode}, simulated')
  right.set(xlabel='requests a second', ylabel='attained both, %',
            ylim=(-3, 103))
  right.legend(frameon=False)
  figure.suptitle(described(machine))
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, dpi=110)
  return True


def insert(path, text):
  """Puts text between the two comments of a file, which must be there.

  Raises:
    InputError: they are not.
  """
  held = path.read_text()
  require(held.count(BEGIN) == held.count(END) == 1, path.name, 'its text',
          f'to have {BEGIN} and {END} once')
  before, _, rest = held.partition(BEGIN)
  path.write_text(f'{before}{BEGIN}\n\n{text}\n\n{END}'
                  + rest.partition(END)[2])

"""Compiles production steps for H100 and A100 meshes on a machine without.

  make aot        (its own environment; or: python -m experiments.aot)

Every step of both sides of a disaggregated server, at published widths and
depths, tensor parallel on sub-meshes of an 8-GPU machine, with the Pallas
kernels, down to machine code: the largest prefill and decode step, and the
migration's gather and scatter. One subprocess a model and GPU.

The table says, for each step: calls of our kernels; collectives; peak memory
and its share of the device; bytes donated over bytes of KV (1: the cache is
updated in place) and copies of a whole cache array in the program (0); and
per kernel its grid, threads, registers a thread, shared memory of a program,
and spilled bytes. It must equal
tests/goldens/aot.json, apart from memory, which may differ by 5 %: peak below
0.9 of the device, KV donated, no copy, no spill. --update writes that file.

What it does not show: times, numerics on tensor cores, autotuned choices of
matrix products (XLA needs the device for those). XLA's own kernels may spill.

Exit codes: 0; 1 for a difference; 2 for bad input; 130 when stopped.
"""

import collections
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import sysconfig
import tempfile
import time

from absl import app, flags
from rich.console import Console
from rich.table import Table

ROOT = pathlib.Path(__file__).resolve().parent.parent
GOLDEN = ROOT / 'tests' / 'goldens' / 'aot.json'
# model -> tensor parallelism of prefill and of decode.
PLANS = {'llama-3-8b': (2, 4), 'llama-3-70b': (4, 4), 'opt-13b': (1, 2),
         'opt-66b': (4, 4)}
GPUS = {'h100': 'sm_90a', 'a100': 'sm_80'}
KERNELS = ('prefill_attention', 'decode_attention', 'kv_write', 'pack',
           'unpack')
COLLECTIVES = ('all-reduce', 'all-gather', 'all-to-all', 'reduce-scatter',
               'collective-permute')
TOLERANCE = 0.05  # of bytes, between versions of XLA


def steps(model, gpu):
  """(name, mesh, jitted step, abstract arguments) of each step."""
  import jax
  import numpy as np
  from jax.experimental import topologies

  from dsjax import base, engine, sharding, zoo
  text = (ROOT / 'experiments' / 'gpu' / f'{gpu}.txtpb').read_text()
  devices = topologies.get_topology_desc(
      '', platform='cuda', target_config=text, topology='1x1x8').devices
  config = base.EngineConfig(
      max_len=2048, num_pages=1024, max_seqs=64, prefill_tokens=2048,
      dtype='bfloat16')
  ids = jax.ShapeDtypeStruct((config.transfer_pages,), np.int32)
  at = 0
  for role, tp in zip(('prefill', 'decode'), PLANS[model], strict=True):
    mesh = jax.sharding.Mesh(np.array(devices[at:at + tp]), (sharding.AXIS,))
    at += tp
    limits = config.instance(role)
    shapes, = engine.stage_shapes(zoo.config(model), [mesh], role, config,
                                  limits)
    (step, args), = engine.abstract_steps(shapes, limits)
    yield role, mesh, step, args
    cache = args[1]
    gather = engine.make_step(shapes, 'gather', (None, None))
    if role == 'prefill':
      yield 'gather', mesh, gather, (cache, ids)
    else:
      with jax.set_mesh(mesh):
        pages = jax.tree.map(
            lambda x, like: jax.ShapeDtypeStruct(x.shape, x.dtype,
                                                 sharding=like.sharding),
            jax.eval_shape(gather, cache, ids), cache)
      yield ('scatter', mesh, engine.make_step(shapes, 'scatter'),
             (cache, ids, pages))


def compile_all(model, gpu, dump):
  """A row (dict) for each step of a model; XLA writes PTX to `dump`."""
  import jax
  for name, mesh, step, args in steps(model, gpu):
    with jax.set_mesh(mesh):
      compiled = step.lower(*args).compile()
    text, memory = compiled.as_text(), compiled.memory_analysis()
    cache = jax.tree.leaves(args[0 if name in ('gather', 'scatter') else 1])
    local = cache[0].sharding.shard_shape(cache[0].shape)
    copies = re.findall(r'= \w+\[([\d,]+)\]\S* copy(?:-start)?\(', text)
    found = collections.Counter(re.findall(
        rf' ({"|".join(COLLECTIVES)})(?:-start)?\(', text))
    yield dict(
        gpu=gpu, model=model, step=name, tp=mesh.size,
        calls=text.count('custom_call_target="__gpu$xla.gpu.triton"'),
        collectives=dict(sorted(found.items())),
        copies=sum(math.prod(map(int, c.split(','))) >= math.prod(local)
                   for c in copies if c.split(',')[-1] == str(local[-1])),
        kv_bytes=sum(math.prod(x.sharding.shard_shape(x.shape))
                     * x.dtype.itemsize for x in cache),
        donated_bytes=memory.alias_size_in_bytes,
        peak_bytes=memory.peak_memory_in_bytes,
        kernels=assembled(dump, name, GPUS[gpu]))


def assembled(dump, step, arch):
  """{kernel: what it uses} of a step, from XLA's PTX and launches."""
  found = {}
  for path in pathlib.Path(dump).glob(f'*jit_{step}.*.ptx'):
    if set(re.findall(r'\.entry (\w+)\(', path.read_text())) & set(KERNELS):
      said = subprocess.run(
          ['ptxas', '-v', f'-arch={arch}', str(path), '-o', '/dev/null'],
          capture_output=True, text=True, check=True).stderr
      for part in said.split('Compiling entry function')[1:]:
        if (name := part.split("'")[1]) in KERNELS:
          found[name] = dict(
              registers=int(re.search(r'Used (\d+) registers', part)[1]),
              spilled=sum(map(int, re.findall(r'(\d+) bytes spill', part))))
  launches, = pathlib.Path(dump).glob(f'*jit_{step}.thunk_sequence.txt')
  for name, grid, threads, shared in re.findall(
      r'(\w+) grid: \[([\d, ]+)\] threads: \[(\d+).*?shared_memory: (\d+)',
      launches.read_text()):
    if name in found:
      found[name] |= dict(grid=grid, threads=int(threads), shared=int(shared))
  return dict(sorted(found.items()))


def child(model, gpu):
  """compile_all in a process of its own: rows, or what went wrong."""
  with tempfile.TemporaryDirectory() as dump:
    tools = pathlib.Path(sysconfig.get_path('purelib')) / 'nvidia/cu13/bin'
    env = dict(
        os.environ, JAX_PLATFORMS='cpu', TF_CPP_MIN_LOG_LEVEL='3',
        PATH=f'{tools}{os.pathsep}{os.environ["PATH"]}',
        XLA_FLAGS=f'--xla_dump_to={dump} --xla_dump_emitter_re=ptx')
    done = subprocess.run(
        [sys.executable, '-m', 'experiments.aot', f'--only={model}:{gpu}',
         f'--dump={dump}'], cwd=ROOT, env=env, capture_output=True, text=True,
        timeout=600)
  if done.returncode:
    raise RuntimeError(f'{model} for {gpu}:\n{done.stderr[-2000:]}')
  return [json.loads(line) for line in done.stdout.splitlines()
          if line.startswith('{')]


def key(row):
  return row['gpu'], row['model'], row['step']


def faults(row, golden, device_bytes):
  """What is wrong with a row: sentences."""
  found = []
  if row['peak_bytes'] > 0.9 * device_bytes:
    found.append(f'peak of {row["peak_bytes"]} bytes is above 0.9 of the '
                 f'device\'s {device_bytes}')
  if row['step'] != 'gather' and row['donated_bytes'] < row['kv_bytes']:
    found.append('the KV cache is not updated in place')
  if row['copies']:
    found.append(f'{row["copies"]} copies of a cache array')
  found += [f'{name} spills {k["spilled"]} bytes'
            for name, k in row['kernels'].items() if k['spilled']]
  if golden is None:
    return [*found, 'it is not in the golden table']
  for field, value in row.items():
    want = golden[field]
    close = field.endswith('_bytes') and abs(value - want) <= TOLERANCE * want
    if value != want and not close:
      found.append(f'{field} is {value}, was {want}')
  return found


def show(console, rows, device_bytes):
  table = Table(title='Compiled without a GPU')
  for name in ('GPU', 'model', 'step', 'tp', 'calls', 'collectives', 'peak',
               'share', 'in place', 'copies', 'kernel', 'grid', 'threads',
               'registers', 'shared', 'spilled'):
    table.add_column(name, no_wrap=True, justify='left' if name in (
        'GPU', 'model', 'step', 'collectives', 'kernel') else 'right')
  for r in rows:
    own = [r['gpu'], r['model'], r['step'], str(r['tp']), str(r['calls']),
           ', '.join(f'{n} {c}' for c, n in r['collectives'].items()) or '-',
           f'{r["peak_bytes"] / 2**30:.2f} GiB',
           f'{r["peak_bytes"] / device_bytes[r["gpu"]]:.0%}',
           f'{r["donated_bytes"] / r["kv_bytes"]:.2f}', str(r['copies'])]
    for name, k in r['kernels'].items():
      table.add_row(*own, name, *(str(k[field]) for field in (
          'grid', 'threads', 'registers', 'shared', 'spilled')))
      own = [''] * len(own)
  console.print(table)


def memory(gpu):
  text = (ROOT / 'experiments' / 'gpu' / f'{gpu}.txtpb').read_text()
  return int(re.search(r'device_memory_size: (\d+)', text)[1])


def run(console, pairs, update):
  """Compiles for each (model, gpu); prints; the exit code."""
  began, rows, wrong = time.perf_counter(), [], 0
  golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else []
  known = {key(row): row for row in golden}
  for i, (model, gpu) in enumerate(pairs, 1):
    rows += child(model, gpu)
    console.print(f'{i} of {len(pairs)}: {model} for {gpu}, '
                  f'{time.perf_counter() - began:.0f} s', style='dim')
  sizes = {gpu: memory(gpu) for gpu in GPUS}
  show(console, rows, sizes)
  if update:
    known |= {key(row): row for row in rows}
    GOLDEN.write_text('[\n' + ',\n'.join(
        json.dumps(known[k]) for k in sorted(known)) + '\n]\n')
  for row in rows:
    for fault in faults(row, known.get(key(row)), sizes[row['gpu']]):
      wrong += 1
      console.print(f'{" ".join(key(row))}: {fault}', style='red')
  console.print(f'{len(rows)} steps in {time.perf_counter() - began:.0f} s; '
                f'{wrong} faults')
  return 1 if wrong else 0


def define_flags():
  flags.DEFINE_string('only', '', 'model:gpu compiled in this process, as '
                      'lines of JSON; XLA_FLAGS must dump PTX to --dump')
  flags.DEFINE_string('dump', '', 'where XLA dumps PTX')
  flags.DEFINE_list('models', list(PLANS), f'some of {list(PLANS)}')
  flags.DEFINE_list('gpus', list(GPUS), f'some of {list(GPUS)}')
  flags.DEFINE_bool('update', False, 'write the golden table')
  return flags.FLAGS


def main(_):
  if FLAGS.only:
    for row in compile_all(*FLAGS.only.split(':'), FLAGS.dump):
      print(json.dumps(row), flush=True)
    return
  for name, allowed in (('models', PLANS), ('gpus', GPUS)):
    for value in FLAGS[name].value:
      if value not in allowed:
        print(f'error: --{name}={value}: must be some of {list(allowed)}',
              file=sys.stderr)
        sys.exit(2)
  try:
    console = Console()
    if not console.is_terminal:
      console.width = 180
    pairs = [(m, g) for g in FLAGS.gpus for m in FLAGS.models]
    sys.exit(run(console, pairs, FLAGS.update))
  except RuntimeError as error:
    print(f'error: {error}', file=sys.stderr)
    sys.exit(1)
  except KeyboardInterrupt:
    print('stopped', file=sys.stderr)
    sys.exit(130)


if __name__ == '__main__':
  FLAGS = define_flags()
  app.run(main)

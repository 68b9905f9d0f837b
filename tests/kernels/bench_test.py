"""kernels.bench, its cases and timings; without a GPU, of the references."""

import gc
import io
import json
import types

import jax
import pytest
from jax import ShapeDtypeStruct as Shape
from rich.console import Console

from dsjax.config import zoo
from dsjax.kernels import (
  bench,
  cases,
  compiled,
  decode_attention,
  paged,
  timing,
  tuned,
)
from dsjax.simulation import hardware

A100 = paged.device('NVIDIA A100')


def test_the_shapes_are_those_of_the_models_and_the_devices_known():
  for name, (N, K, H, *_) in cases.MODELS.items():
    model = zoo.config(name)
    assert (N, K, H) == (model.num_heads, model.num_kv_heads, model.head_dim)
  for key, name in (('a100-80g', 'A100'), ('h100-80g', 'H100')):
    peaks = hardware.HARDWARE[key]
    assert bench.PEAKS[name] == (peaks.flop_per_s, peaks.bytes_per_s)
  assert bench.PEAKS.keys() == {d.name for d in paged.DEVICES}


@pytest.mark.parametrize('name', compiled.GPUS)
@pytest.mark.parametrize('model', ['llama-3-8b', 'opt-13b'])
def test_the_steps_that_are_compiled_have_these_kernels(name, model):
  rows = json.loads(bench.GOLDEN.read_text())['rows']
  golden = {(kernel, k['grid'], k['threads']) for row in rows
            if (row['gpu'], row['model']) == (name.lower(), model)
            for kernel, k in row['kernels'].items()}
  for case in cases.of_steps(model, compiled.GPUS[name][1]):
    args, limits = cases.arguments(case), paged.device(name)
    done = cases.count(case, args, cases.plan(case, args, limits)[0])
    assert (case.kernel, ', '.join(cases.cuda_grid(case, done)),
            done.threads) in golden
    assert bench.code(case, args, None, done, name, '').threads == done.threads


# --- the runner --------------------------------------------------------------

TINY = cases.Case('decode', 'llama-3-8b', (4, 2, 16), ((1, 20),) * 2)


@pytest.mark.parametrize('case', [
    TINY, TINY._replace(op='prefill', pieces=((5, 0), (5, 0))),
    TINY._replace(kv='int8'), TINY._replace(op='kv_write', kv='float8_e4m3fn'),
    TINY._replace(op='pack', pieces=(), pages=2),
    TINY._replace(op='unpack', pieces=(), pages=2)], ids=lambda c: c.op)
def test_every_op_can_be_timed(case):
  """Here with the references; what is updated in place is threaded."""
  arrays = timing.fill(cases.arguments(case))
  assert 0 < timing.seconds(cases.call(case, impl='xla'), arrays,
                           cases.UPDATED.get(case.op), 1, 1e-4) < 10
  if other := timing.dense(case, cases.arguments(case)):
    fn, named = other
    assert fn(**named, impl='xla').shape == named['q'].shape


def test_tuning_finds_the_fastest_and_leaves_out_what_does_not_run():
  def build(config):
    if config.num_warps == 8:
      raise ValueError('does not fit')
    return lambda: (abs(config.block_tokens - 32) + abs(config.splits - 6)
                    + abs(config.num_warps - 7) + 1)

  def check(config):
    config.check(Shape((2, 64, 128), 'bfloat16'),
                 Shape((2, 9, 16, 128), 'bfloat16'), A100)

  best = timing.tune(decode_attention.TuningConfig(), check, build)
  assert (best.block_tokens, best.splits, best.num_warps) == (32, 6, 4)


def printed(*args):
  console = Console(width=260, file=io.StringIO())
  code = bench.run(console, *args)
  return code, console.file.getvalue()


def test_without_a_gpu_it_counts_and_says_what_is_missing(monkeypatch):
  monkeypatch.setattr(compiled, 'available', lambda name: False)
  wanted = [c for c in cases.of_model('opt-13b') if c.op != 'kv_write']
  code, text = printed('A100', compiled.GPUS['A100'][1], wanted)
  assert code == 0 and 'Not measured, for want of a GPU: seconds' in text
  line, = (x for x in text.splitlines() if '64 rows of 2048' in x
           and 'bf16' in x.replace('bfloat16', 'bf16'))
  floor = 64 * 40 * 128 * 2 * 2 * (2048 + 1) + 64 * (128 + 1) * 4
  assert f' {floor / 1e6:.2f} ' in line  # keys, values; q, o; tables, lengths
  assert 'missing in' in text and 'roofline ' not in text


def test_with_a_gpu_it_times_and_tunes_and_keeps_the_table_when_stopped(
    monkeypatch, tmp_path):
  calls = iter(range(10))

  def timed(fn, args, name=None, loops=0):
    if next(calls) == 4:
      raise KeyboardInterrupt
    return lambda *_: 1e-3

  monkeypatch.setattr(timing, 'timed', timed)
  monkeypatch.setattr(timing, 'tune', lambda config, *_: config)
  monkeypatch.setattr(tuned, 'PATH', tmp_path / 'tuned.json')
  monkeypatch.setattr(compiled, 'available', lambda name: False)
  gc.disable()  # JAX's callback would report the exception on its way
  try:
    code, text = printed('A100', None, [TINY, TINY], True)
  finally:
    gc.enable()
  assert code == 130 and text.count('2 rows of 21') == 1
  assert '1000.0' in text and 'roofline' in text
  assert list(json.loads(tuned.PATH.read_text())) == ['cpu']


@pytest.mark.parametrize('given, says', [
    (['--gpu=B200'], '--gpu=B200: must be of .*A100'),
    (['--ops=sort'], '--ops=sort: must be of .*decode'),
    (['--models=gpt-5'], '--models=gpt-5: must be of .*llama'),
    (['--tune'], '--tune: there is no GPU here')])
def test_bad_input_is_one_clear_error(given, says):
  flags = types.SimpleNamespace(gpu=None, tune=False, models=[], ops=[])
  for item in given:
    name, _, value = item[2:].partition('=')
    setattr(flags, name, [value] if name in ('models', 'ops')
            else value or True)
  with pytest.raises(ValueError, match=says):
    bench.check_flags(flags)


def test_a_gpu_that_is_not_known_is_one_clear_error(monkeypatch):
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  given = types.SimpleNamespace(gpu=None, tune=True, models=[], ops=[])
  with compiled.described('NVIDIA L4'), pytest.raises(
      ValueError, match="the GPU here, NVIDIA L4: must be one of .*'A100'"):
    bench.check_flags(given)
  with compiled.described():
    assert bench.check_flags(given) == ('H100', None)


@pytest.mark.parametrize('model', cases.MODELS)
def test_no_two_tokens_are_written_to_one_place(model):
  for case in cases.of_model(model):
    if case.op == 'kv_write':
      args = cases.arguments(case)
      places = {*zip(args['page'].tolist(), args['offset'].tolist(),
                     strict=True)}
      assert len(places) == len(case.pieces)
      assert args['page'].max() < args['held'][0].shape[1]


# --- machine code ------------------------------------------------------------

SAID = """
ptxas info    : Compiling entry function 'unpack' for 'sm_80'
    0 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 17 registers, 384 bytes cmem[0]
"""
LAUNCH = ('001: kCustomKernel [x] unpack grid: [64, 2, 1] threads: [128, 1, 1]'
          '  shared_memory: 32 bytes\n')


def test_registers_and_launches_are_read():
  assert compiled.read(SAID, LAUNCH) == {
      'unpack': compiled.Kernel(17, 12, (64, 2, 1), 128, 32)}

"""What experiments.aot reads in compiled programs and calls a fault."""

import importlib.metadata
import sys

import pytest
from rich.console import Console
from rich.measure import Measurement

from dsjax.config.checks import InputError
from dsjax.kernels import compiled
from experiments.aot import __main__ as aot
from experiments.aot import report as aot_report
from experiments.aot import steps as aot_steps
from experiments.common import cli

HLO = """
  %copy.1 = bf16[4,64,16,128]{3,2,1,0} copy(%p.1)
  %copy.2 = s32[8]{0} copy(%p.2)
  %copy-start.3 = (bf16[4,64,16,128]{3,2,1,0}, u32[]) copy-start(%p.3)
  %copy-done.3 = bf16[4,64,16,128]{3,2,1,0} copy-done(%copy-start.3)
  %ar = f32[8,64]{1,0} all-reduce(%x), replica_groups={{0,1}}
  %ars = (f32[8], f32[8]) all-reduce-start(%x), replica_groups={{0,1}}
  %ard = f32[8] all-reduce-done(%ars)
  %ag = f32[8] all-gather(%x), dimensions={0}
"""
PTXAS = """
ptxas info    : Compiling entry function 'kv_write' for 'sm_90a'
ptxas info    : Function properties for kv_write
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 52 registers, used 1 barriers, 128 bytes smem
ptxas info    : Compiling entry function 'sort_2_1' for 'sm_90a'
ptxas info    : Function properties for sort_2_1
    8 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers
"""
LAUNCHES = ('002: kKernel\tkv_write grid: [2048, 1, 1] threads: [32, 1, 1] '
            'shared_memory: 128\n'
            '003: kKernel\tsort_2_1 grid: [8, 1, 1] threads: [64, 1, 1] '
            'shared_memory: 0\n')


MOSAIC = ('%107 = gpu.launch_func async [%9] @decode_attention_mosaic_gpu_'
          'kernel::@decode_attention_mosaic_gpu_kernel blocks in (%c2, %c8_0, '
          '%c64) threads in (%c256, %c1, %c1)  dynamic_shared_memory_size '
          '%c116784_i32 args(%24 : !llvm.ptr)')


def row(**fields):
  return dict(
      gpu='h100', model='opt-13b', step='unpack 64', layers=2, tp=1, calls=1,
      collectives={}, copies=0, kv_bytes=100, donated_bytes=120,
      alias_bytes=120, peak_bytes=1000, kernels=dict(unpack=dict(
          registers=20, spilled=0, grid='1, 1, 1', threads=128, shared=0)),
      spills={}) | fields


def test_collectives_are_counted_once_each():
  assert aot_report.collectives(HLO) == {'all-gather': 1, 'all-reduce': 2}


@pytest.mark.parametrize('least, count', [(4 * 64 * 16 * 128, 2), (8, 3),
                                          (4 * 64 * 16 * 128 + 1, 0)])
def test_copies_of_large_arrays_are_counted(least, count):
  assert aot_report.copies(HLO, least) == count


def test_kernels_are_ours_and_all_that_spill():
  assert aot_report.kernels(compiled.read(PTXAS, LAUNCHES)) == dict(
      kernels=dict(kv_write=dict(registers=52, spilled=0, grid='2048, 1, 1',
                                 threads=32, shared=128)),
      spills=dict(sort_2_1=8))


def test_mosaic_kernels_are_read_once_and_known_by_their_hash(
    tmp_path, monkeypatch):
  (tmp_path / 'a_0.ptxas').write_text(PTXAS.replace(
      'kv_write', 'decode_attention_mosaic_gpu_kernel'))
  (tmp_path / 'a_0.mlir-passes.log').write_text(MOSAIC)
  text = 'x kernel_hash = "\\9A", module = "y" ' * 2
  monkeypatch.setattr(compiled, '_MADE', {})
  parts = tuple(compiled.mosaic(tmp_path, text))
  assert compiled.read(*parts) == {
      'decode_attention': compiled.Kernel(52, 0, (2, 8, 64), 256, 116784)}
  (tmp_path / 'a_0.ptxas').unlink()
  assert tuple(compiled.mosaic(tmp_path, text)) == parts
  with pytest.raises(RuntimeError, match='1 new Mosaic kernels, 0 dumped'):
    compiled.mosaic(tmp_path, text.replace('9A', '9B'))


@pytest.mark.parametrize('fields, says', [
    (dict(peak_bytes=80 * 10**9), 'is above 0.9'),
    (dict(alias_bytes=100), '100 bytes are updated in place'),
    (dict(kv_bytes=121), 'KV has 121'), (dict(copies=3), '3 copies'),
    (dict(kernels={}), 'no kernel unpack'),
    (dict(kernels=dict(unpack=dict(spilled=8))), 'unpack spills 8 bytes'),
    (dict(error='exit code -6: LLVM ERROR'), 'LLVM ERROR')])
def test_what_must_hold(fields, says):
  fault, = aot_report.faults([row(**fields)], None)
  assert fault.startswith('h100 opt-13b unpack 64: ') and says in fault
  assert not aot_report.faults([row()], None)


def test_an_error_is_shown_as_it_is(capsys):
  """No words of markup, and none are taken for it."""
  cli.wide_console().print(aot_report.tables(
      [row(error='exit code 1: [/x] no')], ({}, '')))
  shown = capsys.readouterr().out
  assert 'exit code 1: [/x] no' in shown and '[red]' not in shown


def test_a_row_must_equal_the_golden_one_but_for_a_few_bytes():
  assert not aot_report.faults([row(peak_bytes=1040)], [row()])
  for other in (row(peak_bytes=1060), row(calls=2), row(spills={'a': 1})):
    assert len(aot_report.faults([other], [row()])) == 1
  assert 'not in the golden' in aot_report.faults([row()], [])[0]


def test_a_child_that_crashes_is_a_row_and_the_next_goes_on():
  names = aot_steps.names('opt-13b')
  child = ('import sys, json; print(json.dumps(dict(step="fine")));'
           'print("LLVM ERROR: no", file=sys.stderr); sys.exit(134)')
  rows = aot.compile_all('opt-13b', 'h100', [], lambda: None,
                         [sys.executable, '-c', child])
  assert [r['step'] for r in rows[::2]] == ['fine'] * len(rows[::2])
  assert [r['error'] for r in rows[1::2]] == [
      'exit code 134: LLVM ERROR: no'] * (len(names) // 2)
  assert rows[1]['step'] == names[1] and len(rows) == len(names)


@pytest.mark.parametrize('changes, says', [
    ({'models': ['opt']}, '--models='), ({'gpus': []}, '--gpus='),
    ({'models': ['opt-13b']}, 'nvidia-cuda-nvcc is not installed: `make aot`')])
def test_what_it_cannot_compile_is_one_clear_error(monkeypatch, changes, says):
  def no_compiler():
    raise importlib.metadata.PackageNotFoundError('nvidia-cuda-nvcc')
  monkeypatch.setattr(aot_steps, 'versions', no_compiler)
  with pytest.raises(InputError, match=says):
    aot.main(cli.options(aot.FLAGS, **changes), None)


def test_the_golden_table_holds_and_has_every_step():
  golden = aot_report.golden()
  assert not aot_report.faults(golden['rows'], golden['rows'])
  assert {aot_report.key(r) for r in golden['rows']} == {
      (gpu, model, name) for gpu in aot_steps.GPUS
      for model in aot_steps.SETUPS for name in aot_steps.names(model)}
  shown, console = aot_report.tables(golden['rows']), Console(width=200)
  assert sum(table.row_count for table in shown.renderables[::2]) == len(
      golden['rows'])
  assert Measurement.get(console, console.options, shown).maximum <= 80

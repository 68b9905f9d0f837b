"""The golden table of `make aot`, and what the gate calls a fault."""

import json

import pytest

from experiments import aot

ROWS = json.loads(aot.GOLDEN.read_text())
DECODE = next(r for r in ROWS if r['step'] == 'decode')
DEVICE = 80 * 2**30


def test_the_table_has_every_step_and_no_fault():
  assert {aot.key(r) for r in ROWS} == {
      (gpu, model, step) for gpu in aot.GPUS for model in aot.PLANS
      for step in ('prefill', 'decode', 'gather', 'scatter')}
  for row in ROWS:
    assert aot.faults(row, row, aot.memory(row['gpu'])) == []
    assert row['kernels'] and row['calls'] > 0


@pytest.mark.parametrize('change, message', [
    (dict(peak_bytes=DEVICE), 'above 0.9 of the device'),
    (dict(donated_bytes=0), 'not updated in place'),
    (dict(copies=1), '1 copies of a cache array'),
    (dict(calls=3), 'calls is 3, was '),
    (dict(collectives={'all-gather': 9}), 'collectives is '),
    (dict(kernels={'kv_write': DECODE['kernels']['kv_write']
                   | dict(spilled=8)}), 'kv_write spills 8 bytes')])
def test_each_fault_is_named(change, message):
  assert message in '; '.join(aot.faults(DECODE | change, DECODE, DEVICE))


def test_a_step_that_is_not_in_the_table_is_a_fault():
  assert aot.faults(DECODE, None, DEVICE) == ['it is not in the golden table']
  other = DECODE | dict(peak_bytes=int(DECODE['peak_bytes'] * 1.04))
  assert aot.faults(other, DECODE, DEVICE) == []

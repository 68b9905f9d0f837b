"""What each process of an instance is given: cores, GPUs, environment."""

import os
import types

import pytest

from dsjax.config.checks import InputError
from dsjax.config.placement import Placement, Plan
from dsjax.runtime.cluster import local


def test_instances_share_no_core(monkeypatch):
  placement = Placement(prefill=[Plan(2)], decode=[Plan(), Plan(1, 2)])
  monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: {7, *range(12)})
  assert local.split_cores(placement) == [
      [0, 1, 2, 3], [4, 5], [6, 7, 8, 9]]
  assert local.has_own_core(placement)
  monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: set(range(10)))
  assert not local.has_own_core(placement)
  monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: {0, 1, 2})
  assert local.split_cores(placement) == [[], [], []]
  assert not local.has_own_core(placement)


def test_instances_share_no_gpu(monkeypatch):
  placement = Placement(prefill=[Plan(2)], decode=[Plan()])
  monkeypatch.setattr(local, 'visible_gpus', lambda: ['4', '5', 'GPU-a', '7'])
  assert [env['CUDA_VISIBLE_DEVICES']
          for env in local.environments(placement)] == ['4,5', 'GPU-a']
  assert local.split_cores(placement) == [[], []]
  assert local.has_own_core(placement)
  monkeypatch.setattr(local, 'visible_gpus', lambda: ['0', '1'])
  with pytest.raises(InputError, match='at most the 2 that exist'):
    local.environments(placement)


@pytest.mark.parametrize('listed, names', [
    (None, ['0', '1']), ('', None), ('-1', None), ('NoDevFiles', None),
    ('0', ['0']), ('3, 1', ['3', '1']), ('1,-1,0', ['1']),
    ('GPU-8932f937-d72c,MIG-7', ['GPU-8932f937-d72c', 'MIG-7'])])
def test_gpus_are_those_that_cuda_would_show(monkeypatch, listed, names):
  monkeypatch.setattr(local, 'jax', types.SimpleNamespace(
      config=types.SimpleNamespace(values={'jax_platforms': None})))
  monkeypatch.setattr(local.glob, 'glob', lambda _: [
      '/dev/nvidia0', '/dev/nvidia1', '/dev/nvidiactl'])
  monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
  if listed is not None:
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', listed)
  monkeypatch.setattr(local, '_has_cuda', lambda: True)
  assert local.visible_gpus() == names
  monkeypatch.setattr(local, '_has_cuda', lambda: False)  # jax of a CPU
  assert local.visible_gpus() is None


def test_a_cpu_instance_has_its_own_number_of_devices(monkeypatch):
  monkeypatch.setenv('XLA_FLAGS', '--a --xla_force_host_platform_device_count=8'
                     ' --b')
  prefill, decode = local.environments(Placement(
      prefill=[Plan(2, 2)], decode=[Plan()]))
  assert (prefill['JAX_NUM_CPU_DEVICES'], decode['JAX_NUM_CPU_DEVICES']) == (
      '4', '1')
  assert prefill['XLA_FLAGS'].split() == ['--a', '--b']
  assert prefill['JAX_PLATFORMS'] == 'cpu'

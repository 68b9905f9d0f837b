"""The interpreted kernels serve: the tokens are those of the dense pass."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from dsjax import base, checkpoint, sharding
from dsjax.base import InputError, Placement, Plan
from dsjax.engine import stage_shapes
from dsjax.orchestrator import serve
from experiments import config as configs
from tests import tiny

CONFIG = tiny.UNTIED
MODEL = checkpoint.Model(CONFIG, tiny.params(CONFIG))
LIMITS = base.EngineConfig(
    max_len=48, page_size=8, num_pages=12, max_seqs=2, prefill_tokens=32,
    prefill_seqs=2, chunk_tokens=32, transfer_pages=1,
    attention='pallas_interpret')


def answers(placement, devices, limits=LIMITS):
  prompts = [tiny.prompt(n) for n in (5, 9, 37)]  # 37: in two chunks
  with serve(MODEL, placement, limits, devices=[
      jax.devices()[i] for i in devices]) as server:
    ids = [server.submit(p, max_tokens=4, ignore_eos=True) for p in prompts]
    while not all(server.requests[id].finished for id in ids):
      server.poll()
    return prompts, [list(server.output(id).tokens) for id in ids]


@pytest.mark.parametrize('placement, devices', [
    (Placement(prefill=[Plan(2)], decode=[Plan(1)]), (4, 5, 1)),
    (Placement(chunked=[Plan()]), (0,))], ids=('tp2_tp1', 'chunked'))
def test_the_tokens_are_those_of_the_dense_pass(placement, devices):
  prompts, got = answers(placement, devices)
  assert got == [tiny.greedy(p, 4, CONFIG) for p in prompts]


def test_the_setting_reaches_the_steps():
  config = configs.override(configs.load('demo'), (
      'engine.attention=pallas_interpret',))
  mesh = Mesh(np.array(jax.devices()[:1]), (sharding.AXIS,))
  shapes = [stage_shapes(CONFIG, [mesh], 'decode', c, c.instance('decode'))[0]
            for c in (config.engine, base.EngineConfig())]
  assert [s.attention for s in shapes] == ['pallas_interpret', 'xla']


def test_an_unknown_attention_is_an_error_that_names_the_allowed():
  with pytest.raises(InputError, match="EngineConfig.attention='flash': must "
                     "be None, 'xla', 'pallas' or 'pallas_interpret'"):
    base.EngineConfig(attention='flash')


def test_gpu_kernels_on_cpu_are_an_error_before_anything_is_placed():
  with pytest.raises(InputError, match="attention='pallas': must be None, "
                     "'xla' or 'pallas_interpret' on a cpu"):
    answers(Placement(colocated=[Plan()]), (0,), dataclasses.replace(
        LIMITS, attention='pallas'))

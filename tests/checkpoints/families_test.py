"""Every family against `transformers`, on the folders of make_families.py.

Logits of float32 models at every prompt position (two packed chunks beside
another sequence) and at every decode step agree to 5e-5: up to four layers of
sums of some 50 terms below 10, in another order; the largest seen is 5e-6.
"""

import dataclasses
import functools
import pathlib
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from dsjax.checkpoints import checkpoint
from dsjax.config import rope
from dsjax.config.engine import EngineConfig
from dsjax.config.placement import Placement, Plan
from dsjax.config.request import Request, Sampling
from dsjax.kernels.prefill_attention import prefill_attention
from dsjax.model import kv_cache as kv
from dsjax.model import sampling, sharding, transformer
from dsjax.runtime import orchestrator

FOLDERS = pathlib.Path(__file__).parents[1] / 'goldens' / 'families'
NAMES = sorted(path.name for path in FOLDERS.iterdir())
# All that they have another has too, or another test compares their logits.
ALIKE = ('gemma', 'llama_yarn', 'mixtral', 'olmo2', 'phi3', 'qwen2', 'qwen3')
B, C, T, SIZE = 2, 4, 40, 24  # sequences, page, tokens a slot, packed axis
FIRST, OTHER = 11, 9  # tokens of the first chunk, of the other sequence
ATOL = 5e-5
i32 = functools.partial(np.asarray, dtype=np.int32)
# What a wrong field would be, and a family whose logits must show it.
WRONG = [
    ('gpt2', dict(activation='gelu')),
    ('llama3', dict(rope_divisors=rope.llama3(16, 1e4, 8.0, 64, high=5.0))),
    ('mistral', dict(windows=(7, 8))),
    ('gemma2', dict(attn_softcap=1.6)),
    ('gemma3', dict(rope_local_base=None)),
    ('mixtral', dict(renormalize=False)),
    ('qwen2_yarn', dict(rope_gain=1.0)),
    ('olmo3', dict(rope_local_base=None)),
    ('smollm3', dict(rotated=(True,) * 4)),
    ('granite', dict(residual_scale=0.75)),
    ('gpt_neox', dict(parallel=False)),
]


@functools.cache
def load(name, dtype='float32'):
  """(config, params, tokens, logits, prompt length) of a folder."""
  config, params = checkpoint.load_hf(FOLDERS / name, dtype)
  with np.load(FOLDERS / name / 'logits.npz') as golden:
    return (config, params, golden['tokens_T'].tolist(), golden['logits_TV'],
            int(golden['prompt_len']))


def with_logits(step, config, **static):
  """A jitted step that returns the logits of every token too."""
  run_layers = transformer.run_layers

  def logged(params, *args):
    seen = []

    def spy(*args, **kwargs):
      seen.append(run_layers(*args, **kwargs))
      return seen[0]

    with mock.patch.object(transformer, 'run_layers', spy):
      out = step(config, params, *args, **static)
    logits_SV = transformer.head(config, params, seen[0][0])
    return out, logits_SV[:, :config.vocab_size]  # without padding

  return jax.jit(logged)


class Run:
  """The golden's prompt in slot 1 and another in slot 0, on permuted pages."""

  def __init__(self, config, params, tokens, prompt_len, dtype='float32',
               mesh=None):
    self.config, self.params, self.mesh = config, params, mesh
    self.prompt_len = prompt_len
    M = T // C
    self.table_BM = i32(np.random.default_rng(0).permutation(B * M)).reshape(
        B, M)
    self.cache = jax.tree.map(
        lambda x: jnp.full_like(x, 1e4),
        kv.init(config, B * M, C, jnp.dtype(dtype)))
    self.slots = sampling.init(B, T, config.vocab_size)
    for slot, prompt in enumerate((tokens[:OTHER][::-1], tokens[:prompt_len])):
      self.slots = admit(self.slots, slot, sampling.slot_row(
          prompt, len(prompt), Sampling(), T, config.vocab_size))

  def prefill(self):
    """Logits of the prompt: a chunk beside the other prompt, then the rest."""
    step = with_logits(transformer.prefill_step, self.config, size=SIZE,
                       need=sampling.GREEDY, mesh=self.mesh)
    logits, end = [], self.prompt_len
    for counts, pos, last in (((OTHER, FIRST), (0, 0), (True, False)),
                              ((0, end - FIRST), (OTHER, FIRST),
                               (False, True))):
      packed = transformer.Packed(
          i32(np.cumsum((0, *counts))), i32(pos), i32([0, 1]), np.array(last),
          self.table_BM)
      (self.cache, self.slots, _, _), logits_SV = step(
          self.params, self.cache, self.slots, packed)
      assert np.isfinite(logits_SV).all()  # padding too
      logits.append(logits_SV[counts[0]:sum(counts)])
    return np.concatenate(logits)

  def decode(self, steps):
    """Logits of the steps; the other row is padding."""
    step = with_logits(transformer.decode_step, self.config,
                       need=sampling.GREEDY, mesh=self.mesh)
    rows = transformer.Rows(i32([0, self.prompt_len]), i32([0, 1]),
                            np.array([False, True]), self.table_BM)
    logits = []
    for _ in range(steps):
      (self.cache, self.slots, rows, _), logits_BV = step(
          self.params, self.cache, self.slots, rows)
      logits.append(logits_BV[1])
    return np.stack(logits)


admit = jax.jit(sampling.admit)


@pytest.mark.native
@pytest.mark.parametrize('name', [
    pytest.param(name, marks=[pytest.mark.deep] * (name in ALIKE))
    for name in NAMES])
def test_a_family_gives_the_logits_of_transformers(name):
  config, params, tokens, logits_TV, prompt_len = load(name)
  run = Run(config, params, tokens, prompt_len)
  got_TV = np.concatenate((run.prefill(), run.decode(
      len(tokens) - prompt_len)))
  np.testing.assert_allclose(got_TV, logits_TV, rtol=0, atol=ATOL)
  assert run.slots.tokens_ET[1, :len(tokens)].tolist() == tokens


@pytest.mark.parametrize('name, fields', WRONG, ids=str)
def test_a_wrong_field_shows(name, fields):
  config, params, tokens, logits_TV, prompt_len = load(name)
  wrong = dataclasses.replace(config, **fields)
  got_SV = Run(wrong, params, tokens, prompt_len).prefill()
  assert np.abs(got_SV - logits_TV[:prompt_len]).max() > 5 * ATOL


@pytest.mark.native
@pytest.mark.parametrize('name', ['gemma3', 'mixtral', 'opt'])
def test_bfloat16_weights_and_cache(name):
  """Errors are of bfloat16's 2^-8 and grow through the layers."""
  config, params, tokens, logits_TV, prompt_len = load(name, 'bfloat16')
  run = Run(config, params, tokens, prompt_len, 'bfloat16')
  got_SV = run.prefill()
  np.testing.assert_allclose(got_SV, logits_TV[:prompt_len], rtol=0, atol=0.2)
  run.decode(2)
  assert {x.dtype for x in jax.tree.leaves(run.cache)} == {
      jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize('name, tp', [
    ('gemma3', 4), ('mixtral', 2), ('olmo2', 3), ('phi3_partial', 3)])
def test_devices_change_no_token(name, tp):
  """Four share two kv heads; experts are split; a norm over all heads counts
  none twice, and no padding."""
  config, params, tokens, logits_TV, prompt_len = load(name)
  mesh = Mesh(np.array(jax.devices()[:tp]), (sharding.AXIS,))
  layout = sharding.cut(config, tp)
  placed = sharding.place_params(layout, (0, config.num_layers), mesh, params)
  run = Run(layout.padded, placed, tokens, prompt_len, mesh=mesh)
  run.cache = jax.device_put(run.cache, sharding.kv(mesh))
  run.slots = jax.device_put(run.slots, sharding.replicated(mesh))
  got_TV = np.concatenate((run.prefill(), run.decode(
      len(tokens) - prompt_len)))
  np.testing.assert_allclose(got_TV, logits_TV, rtol=0, atol=ATOL)
  assert run.slots.tokens_ET[1, :len(tokens)].tolist() == tokens


@pytest.mark.parametrize('name', ['gemma3', 'opt'])
def test_stages_of_layers_are_all_of_them(name):
  config, params, tokens, *_ = load(name)
  pos_S = np.arange(len(tokens))
  whole, split = (Run(config, params, tokens, 1) for _ in range(2))
  traced = []

  op = transformer.attention(prefill_attention, config, None, None,
                             jnp.asarray(whole.table_BM[:1]),
                             jnp.array([0, len(tokens)]), jnp.array([0]))

  def attend(layer, q, *held):
    traced.append(config.window(layer))
    return op(layer, q, *held)

  def stages(params, cache, cuts):
    x_SD = transformer.embed(config, params, i32(tokens), pos_S)
    caches = []
    for first, end in zip(cuts, cuts[1:], strict=False):
      part = kv.Cache(cache.k_KPCH[first:end], cache.v_KPCH[first:end])
      x_SD, part = transformer.run_layers(
          config, params['layers'][first:end], first, part, x_SD, pos_S,
          whole.table_BM[0, pos_S // C], attend)
      caches.append(part)
    return x_SD, sum((c.k_KPCH for c in caches), ())

  run = jax.jit(stages, static_argnums=2)
  L = config.num_layers
  want = run(params, whole.cache, (0, L))
  assert sorted(traced) == sorted(set(config.windows or (0,)))  # alike: once
  got = run(params, split.cache, (0, 1, L))
  jax.tree.map(functools.partial(np.testing.assert_allclose, atol=ATOL),
               got, want)


# --- served ------------------------------------------------------------------


def serve(name, prefill, decode, **limits):
  """(tokens, golden tokens) after the prompt, disaggregated.

  Both prompts take two chunks; another request comes after in the same slot
  (one a batch: fewer steps to compile).
  """
  config, params, tokens, _, end = load(name)
  limits = EngineConfig(
      max_len=T, page_size=C, num_pages=2 * T // C, max_seqs=1,
      prefill_tokens=16, prefill_seqs=2, transfer_pages=1, checksum=True,
      **limits)
  placement = Placement(prefill=[Plan(*prefill)],
                        decode=[Plan(*decode)])
  with orchestrator.serve(checkpoint.Model(config, params), placement, limits,
                          report=lambda *_: None) as server:
    records = server.run([
        Request(i, 0.0, tuple(prompt), Sampling(
            max_tokens=len(tokens) - end, ignore_eos=True))
        for i, prompt in enumerate((tokens[:end], tokens[:end][::-1]))])
    assert [r.status for r in records] == ['length'] * 2
    return list(server.output(0).tokens), tokens[end:]


@pytest.mark.parametrize('name, prefill, decode', [
    ('gemma3', (2, 1), (1, 2)), ('opt', (1, 2), (3, 1)),
    pytest.param('mixtral', (2, 1), (1, 2), marks=pytest.mark.deep),
    pytest.param('olmo2', (3, 1), (1, 2), marks=pytest.mark.deep)], ids=str)
def test_served_over_plans_a_family_gives_the_same_tokens(
    name, prefill, decode):
  tokens, want = serve(name, prefill, decode)
  assert tokens == want


def test_served_through_bfloat16_and_int8_pages_most_tokens_are_the_same():
  """bfloat16 rounds by 2^-9 of a number, int8 by 2^-8 of a token's largest:
  logits that are closer than that moves them may trade places (the least
  margin here is 0.013), and what follows would be another text."""
  tokens, want = serve('mistral', (1, 1), (1, 1), kv_dtype='bfloat16',
                       decode_kv_dtype='int8')
  assert sum(a == b for a, b in zip(tokens, want, strict=True)) >= 8

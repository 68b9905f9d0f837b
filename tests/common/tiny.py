"""A tiny model for tests, and its plain dense forward pass in numpy.

The dense pass is the oracle of every test of tokens: no pages, no cache, no
batch, no jax, float64. It follows the llama equations, not our transformer.py.
"""

import dataclasses
import functools

import numpy as np

from dsjax.checkpoints import checkpoint
from dsjax.config.model import ModelConfig

CONFIG = ModelConfig(
    name='tiny', num_layers=2, d_model=32, num_heads=4, num_kv_heads=2,
    head_dim=8, d_ff=48, vocab_size=96, max_len=128, eos_ids=(2,))
UNTIED = dataclasses.replace(CONFIG, name='untied', tied=False)


@functools.cache
def params(config=CONFIG, seed=0):
  """Seeded random weights, numpy float32. Shared: do not write to them."""
  return checkpoint.random_params(config, seed)


def prompt(length, seed=0):
  """A prompt of random token ids."""
  rng = np.random.default_rng((length, seed))
  return tuple(int(t) for t in rng.integers(3, CONFIG.vocab_size, length))


def norm(x_SD, gain_D, eps):
  mean_S = np.mean(x_SD * x_SD, axis=-1)
  return x_SD / np.sqrt(mean_S + eps)[:, None] * gain_D


def rotate(x_SNH, rope_base):
  """Rotary embedding as multiplication by exp(i * position * rate)."""
  S, _, H = x_SNH.shape
  half = H // 2
  rate_h = np.array([rope_base ** (-2 * h / H) for h in range(half)])
  turn_Sh = np.exp(1j * np.arange(S)[:, None] * rate_h[None, :])
  z_SNh = (x_SNH[..., :half] + 1j * x_SNH[..., half:]) * turn_Sh[:, None]
  return np.concatenate((z_SNh.real, z_SNh.imag), -1)


def attention(q_SNH, k_SKH, v_SKH):
  """Full causal attention, a head at a time."""
  S, N, H = q_SNH.shape
  group, seen_ST = N // k_SKH.shape[1], np.tri(S, dtype=bool)
  out_SNH = np.zeros(q_SNH.shape)
  for n in range(N):
    score_ST = q_SNH[:, n] @ k_SKH[:, n // group].T / np.sqrt(H)
    score_ST = np.where(seen_ST, score_ST, -np.inf)
    weight_ST = np.exp(score_ST - score_ST.max(axis=-1, keepdims=True))
    out_SNH[:, n] = weight_ST @ v_SKH[:, n // group]
    out_SNH[:, n] /= weight_ST.sum(axis=-1, keepdims=True)
  return out_SNH


def dense_logits(tokens, config=CONFIG, tree=None):
  """Logits [S, V] at every position of `tokens`, float64."""
  tree = params(config) if tree is None else tree
  f64 = functools.partial(np.asarray, dtype=np.float64)
  x_SD = f64(tree['embed_VD'])[list(tokens)]
  for layer in tree['layers']:
    w = {name: f64(x) for name, x in layer.items()}
    h_SD = norm(x_SD, w['attn_norm_D'], config.norm_eps)
    q, k, v = (np.einsum('sd,nhd->snh', h_SD, w[name])
               for name in ('q_NHD', 'k_KHD', 'v_KHD'))
    o_SNH = attention(rotate(q, config.rope_base),
                      rotate(k, config.rope_base), v)
    x_SD = x_SD + np.einsum('snh,dnh->sd', o_SNH, w['o_DNH'])
    h_SD = norm(x_SD, w['mlp_norm_D'], config.norm_eps)
    gate_SF = h_SD @ w['gate_FD'].T
    h_SF = gate_SF / (1 + np.exp(-gate_SF)) * (h_SD @ w['up_FD'].T)
    x_SD = x_SD + h_SF @ w['down_DF'].T
  head_VD = tree['embed_VD' if config.tied else 'head_VD']
  return norm(x_SD, f64(tree['norm_D']), config.norm_eps) @ f64(head_VD).T


@functools.cache
def greedy(tokens, count, config=CONFIG):
  """The `count` tokens that greedy decoding appends to `tokens`."""
  tokens = list(tokens)
  start = len(tokens)
  for _ in range(count):
    tokens.append(int(np.argmax(dense_logits(tokens, config)[-1])))
  return tokens[start:]


def log_softmax(logits):
  """Over the last axis, float64."""
  logits = np.asarray(logits, np.float64)
  top = logits.max(-1, keepdims=True)
  return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))

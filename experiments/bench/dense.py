"""A hand-written decoder, the rival of an instance's compiled steps."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dsjax.config.model import ModelConfig
from dsjax.model import products, transformer


def dense_forward(
    config: ModelConfig, params: Mapping[str, Any],
    k_LBKTH: Sequence[jax.Array], v_LBKTH: Sequence[jax.Array],
    token_BS: jax.Array, pos_B: jax.Array
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...], jax.Array]:
  """A plain decoder over a dense cache: no pages, no packing, no buckets."""
  B, S = token_BS.shape
  N, K, H = config.num_heads, config.num_kv_heads, config.head_dim
  x_AD = params['embed_VD'][token_BS.reshape(-1)]
  pos_A = (pos_B[:, None] + jnp.arange(S)[None, :]).reshape(-1)
  turn = transformer.angles(config, pos_A)
  put = jax.vmap(lambda c_KTH, new_KSH, at: jax.lax.dynamic_update_slice(
      c_KTH, new_KSH, (0, at, 0)))
  ks, vs = [], []
  for layer, k_BKTH, v_BKTH in zip(params['layers'], k_LBKTH, v_LBKTH,
                                   strict=True):
    def heads(name, h_AD, layer=layer):
      return products.project(layer[name], h_AD)
    h_AD = transformer.rms_norm(x_AD, layer['attn_norm_D'], config.norm_eps)
    q_ANH = transformer.rotary(heads('q_NHD', h_AD), *turn)
    k_AKH = transformer.rotary(heads('k_KHD', h_AD), *turn)
    v_AKH = heads('v_KHD', h_AD)
    k_BKTH = put(k_BKTH, k_AKH.reshape(B, S, K, H).swapaxes(1, 2), pos_B)
    v_BKTH = put(v_BKTH, v_AKH.reshape(B, S, K, H).swapaxes(1, 2), pos_B)
    ks.append(k_BKTH)
    vs.append(v_BKTH)
    q_BKXH = q_ANH.reshape(B, S, K, N // K, H).swapaxes(1, 2).reshape(
        B, K, -1, H) * H**-0.5
    s_BKXT = jnp.einsum('bkxh,bkth->bkxt', q_BKXH, k_BKTH)
    last_BX = jnp.repeat(pos_B[:, None] + jnp.arange(S)[None, :], N // K, 1)
    live = (jnp.arange(k_BKTH.shape[2])[None, None, None, :]
            <= last_BX[:, None, :, None])
    a_BKXT = jax.nn.softmax(jnp.where(live, s_BKXT, -1e30), -1)
    o_BKXH = jnp.einsum('bkxt,bkth->bkxh', a_BKXT, v_BKTH)
    o_AI = o_BKXH.reshape(B, K, S, -1).swapaxes(1, 2).reshape(B * S, N * H)
    x_AD += products.project(
        layer['o_DNH'].reshape(config.d_model, -1), o_AI)
    h_AD = transformer.rms_norm(x_AD, layer['mlp_norm_D'], config.norm_eps)
    x_AD += heads('down_DF', jax.nn.silu(heads('gate_FD', h_AD))
                  * heads('up_FD', h_AD))
  x_BD = x_AD.reshape(B, S, -1)[:, -1]
  token_B = jnp.argmax(transformer.head(config, params, x_BD), -1)
  return tuple(ks), tuple(vs), token_B.astype(jnp.int32)


class Dense:
  """The rival's loop; the cache is exactly as long as it needs to be."""

  def __init__(self, config: ModelConfig, params: Mapping[str, Any],
               batch: int, prompt: int, steps: int) -> None:
    self.steps = steps
    self.step = jax.jit(functools.partial(dense_forward, config),
                        donate_argnums=(1, 2))
    shape = (batch, config.num_kv_heads, prompt + steps + 1, config.head_dim)
    self.params = params
    self.kv: list[Any] = [
        tuple(jnp.zeros(shape) for _ in range(config.num_layers))
        for _ in range(2)]
    self.prompt = jnp.ones((batch, prompt), jnp.int32)
    self.zero = jnp.zeros(batch, jnp.int32)

  def prefill(self) -> jax.Array:
    *self.kv, self.token = self.step(self.params, *self.kv, self.prompt,
                                     self.zero)
    return self.token

  def decode(self) -> jax.Array:
    pos = self.zero + self.prompt.shape[1]
    for _ in range(self.steps):
      *self.kv, self.token = self.step(self.params, *self.kv,
                                       self.token[:, None], pos)
      pos = pos + 1
    return self.token

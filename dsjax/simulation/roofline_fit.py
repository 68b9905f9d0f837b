"""The shares of the peaks that measured steps reach."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dsjax.config.checks import require


def fit_roofline(cells, model, steps=4000):
  """A Roofline with the shares of the peaks that measured steps reach.

  Adam on the mean squared relative error; compute and memory stay in (0, 1)
  as logistic values, step_s above 0 as a softplus of the shortest step.

  Args:
    cells: [Cell]. model: a roofline.Roofline; its compute, memory and step_s
      are replaced.
  """
  require(cells, 'cells', cells, 'at least one')
  parts, messages = zip(*(model.parts(c.pieces, c.batch, c.context)
                          for c in cells), strict=True)
  peaks = (model.hardware.flop_per_s, model.hardware.bytes_per_s)
  y = np.array([c.seconds for c in cells])
  part_s = jnp.asarray(np.array(parts) / np.array(peaks) / y[:, None, None])
  fixed = jnp.asarray(np.array(messages) / y)
  unit_s = float(y.min())
  step = jnp.asarray(unit_s / y)

  def loss(free):
    share = jax.nn.sigmoid(free[:2])
    total = (jnp.max(part_s / share[None, None, :], -1).sum(-1)
             + fixed + jax.nn.softplus(free[2]) * step)
    return jnp.mean((total - 1)**2)

  rate = optax.cosine_decay_schedule(0.05, steps)
  search = optax.adam(rate)

  def update(carry, _):
    free, state = carry
    grad = jax.grad(loss)(free)
    change, state = search.update(grad, state)
    return (optax.apply_updates(free, change), state), None

  free = jnp.array([0.0, 0.0, -2.0])
  (free, _), _ = jax.jit(lambda c: jax.lax.scan(update, c, length=steps))(
      (free, search.init(free)))
  compute, memory = map(float, jax.nn.sigmoid(free[:2]))
  return dataclasses.replace(
      model, compute=compute, memory=memory,
      step_s=float(jax.nn.softplus(free[2])) * unit_s)

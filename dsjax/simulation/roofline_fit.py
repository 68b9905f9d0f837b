"""The shares of a device's peaks that measured steps reach.

From steps of a few plans, or models, they say what others would take:
`fit_shares` finds the shares, `affine_of` writes a plan as the file of a
profile has it.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dsjax.config.checks import require
from dsjax.config.placement import Plan
from dsjax.simulation.fitting import Cell, fit_affine, predict_s
from dsjax.simulation.hardware import Shares
from dsjax.simulation.latency import Affine, Buckets
from dsjax.simulation.roofline import Roofline


def fit_shares(measured: Sequence[tuple[Roofline, Sequence[Cell]]],
               steps: int = 4000) -> Shares:
  """The shares of a device's peaks that measured steps reach.

  One set of them for all plans and models. Adam on the mean squared relative
  error; the shares stay in (0, 1) as logistic values, layer_s above 0 as a
  softplus of the shortest step of a layer.

  Args:
    measured: a Roofline of each plan (and model), all of one device, with its
      cells. Of its shares message_s is kept, and link where no plan has
      messages over it; the others are not read.

  Raises:
    InputError: there are no cells.
  """
  flat = [(model, cell) for model, own in measured for cell in own]
  require(flat, 'measured', measured, 'at least one cell')
  parts, linked, fixed = zip(*(
      model.parts(c.pieces, c.batch, c.context) for model, c in flat),
      strict=True)
  device, given = flat[0][0].hardware, flat[0][0].shares
  y = np.array([c.seconds for _, c in flat])
  layers = np.array([model.config.num_layers for model, _ in flat])
  unit_s = float((y / layers).min())
  part_s = jnp.asarray(np.array(parts) / y[:, None, None] / (
      device.flop_per_s, device.bytes_per_s))
  link_s = jnp.asarray(np.array(linked) / y / device.link_bytes_per_s)
  fixed_s = jnp.asarray(np.array(fixed) / y)
  layer_s = jnp.asarray(unit_s * layers / y)

  def loss(free):
    share = jax.nn.sigmoid(free[:3])
    total = (jnp.max(part_s / share[None, None, :2], -1).sum(-1)
             + link_s / share[2] + fixed_s + jax.nn.softplus(free[3]) * layer_s)
    return jnp.mean((total - 1)**2)

  rate = optax.cosine_decay_schedule(0.05, steps)
  search = optax.adam(rate)

  def update(carry, _):
    free, state = carry
    grad = jax.grad(loss)(free)
    change, state = search.update(grad, state)
    return (optax.apply_updates(free, change), state), None

  free = jnp.array([0.0, 0.0, 0.0, -2.0])
  (free, _), _ = jax.jit(lambda c: jax.lax.scan(update, c, length=steps))(
      (free, search.init(free)))
  compute, memory, link = map(float, jax.nn.sigmoid(free[:3]))
  return Shares(compute, memory, link if any(linked) else given.link,
                float(jax.nn.softplus(free[3])) * unit_s, given.message_s)


def affine_of(model: Roofline, plan: Plan, cells: Sequence[Cell],
              buckets: Buckets, host_s: float = 0.0) -> Affine:
  """The Affine nearest to a Roofline of this plan, over a grid of cells.

  The seconds of the cells are not read.
  """
  of_plan = dataclasses.replace(model, tp=plan.tp, pp=plan.pp)
  return fit_affine(
      [c._replace(seconds=predict_s(of_plan, c)) for c in cells], buckets,
      host_s, plan.pp)

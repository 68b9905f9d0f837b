"""The shares of a device's peaks that measured steps reach.

From steps of a few plans they say what other plans would take: `fit_roofline`
finds the shares, `affine_of` writes a plan as the file of a profile has it.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from dsjax.config.checks import require
from dsjax.config.placement import Plan
from dsjax.simulation.fitting import Cell, fit_affine, predict_s
from dsjax.simulation.latency import Affine, Buckets
from dsjax.simulation.roofline import Roofline


def _at(model, plan):
  return dataclasses.replace(model, tp=plan.tp, pp=plan.pp)


def fit_roofline(cells: Mapping[Plan, Sequence[Cell]], model: Roofline,
                 steps: int = 4000) -> Roofline:
  """A Roofline with the shares of the peaks that measured steps reach.

  One set of shares for all plans. Adam on the mean squared relative error;
  compute and memory stay in (0, 1) as logistic values, step_s above 0 as a
  softplus of the shortest step.

  Args:
    model: its compute, memory and step_s are replaced; tp and pp are read
      from the plans.

  Raises:
    InputError: there are no cells.
  """
  flat = [(plan, cell) for plan, own in cells.items() for cell in own]
  require(flat, 'cells', cells, 'at least one')
  parts, messages = zip(*(
      _at(model, plan).parts(c.pieces, c.batch, c.context)
      for plan, c in flat), strict=True)
  peaks = (model.hardware.flop_per_s, model.hardware.bytes_per_s)
  y = np.array([c.seconds for _, c in flat])
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


def affine_of(model: Roofline, plan: Plan, cells: Sequence[Cell],
              buckets: Buckets, host_s: float = 0.0) -> Affine:
  """The Affine nearest to a Roofline of this plan, over a grid of cells.

  The seconds of the cells are not read.
  """
  at_plan = _at(model, plan)
  return fit_affine(
      [c._replace(seconds=predict_s(at_plan, c)) for c in cells], buckets,
      host_s, plan.pp)

"""Rotary frequencies stretched beyond the trained context, as divisors.

Pair i of the R numbers of a head that rotate turns by base^(-2i / R) / d_i a
token. Each scaling here is a tuple of the R / 2 divisors d_i; formulas as in
transformers (src/transformers/modeling_rope_utils.py).
"""

import math

import numpy as np

from dsjax.config.checks import is_integer, is_number, is_positive, require

Divisors = tuple[float, ...]


def linear(width: int, factor: float) -> Divisors:
  """Every frequency divided alike. width: R."""
  require(is_positive(factor), 'factor', factor, 'a number above 0')
  return (float(factor),) * (width // 2)


def _ramped(kept: np.ndarray, factor: float) -> Divisors:
  """Frequencies of which the share `kept` stays and the rest is divided."""
  return tuple((1 / (kept + (1 - kept) / factor)).tolist())


def _check(base: float, factor: float, original_len: int) -> None:
  require(base > 0, 'rope_theta', base, 'above 0')
  require(is_positive(factor), 'factor', factor, 'a number above 0')
  require(is_integer(1, 2**31 - 1)(original_len),
          'original_max_position_embeddings', original_len, 'tokens')


def llama3(width: int, base: float, factor: float, original_len: int,
           low: float = 1.0, high: float = 4.0) -> Divisors:
  """Frequencies that turn more than `high` times in the original context are
  kept, those that turn fewer than `low` times divided, with a ramp between."""
  _check(base, factor, original_len)
  require(0 < low < high, 'high_freq_factor', high,
          f'above low_freq_factor={low} > 0')
  turns_h = original_len / (2 * np.pi) * base**-(
      np.arange(width // 2) / (width // 2))
  return _ramped(np.clip((turns_h - low) / (high - low), 0, 1), factor)


def yarn(width: int, base: float, factor: float, original_len: int,
         fast: float = 32.0, slow: float = 1.0,
         whole: bool = True) -> Divisors:
  """As llama3, but the ramp is linear in the number of the pair.

  It runs from the pair that turns `fast` times in the original context to the
  one that turns `slow` times; whole: both rounded outwards.
  """
  _check(base, factor, original_len)
  require(base > 1, 'rope_theta', base, 'above 1 (yarn)')
  for name, turns in (('beta_fast', fast), ('beta_slow', slow)):
    require(is_positive(turns), name, turns, 'a number above 0')

  def pair(turns: float) -> float:
    return (width * math.log(original_len / (turns * 2 * math.pi))
            / (2 * math.log(base)))

  low, high = pair(fast), pair(slow)
  if whole:
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, width - 1)
  span = high - low or 0.001
  return _ramped(1 - np.clip((np.arange(width // 2) - low) / span, 0, 1),
                 factor)


def yarn_gain(factor: float, mscale: float | None = None,
              mscale_all_dim: float | None = None) -> float:
  """What yarn multiplies cos and sin by."""
  def gain(mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0

  return gain(mscale) / gain(mscale_all_dim) if (
      mscale and mscale_all_dim) else gain(1)


def longrope(width: int, factors: list[float]) -> Divisors:
  """Divisors as a file lists them."""
  ok = is_number(0, math.inf, low_open=True)
  require(len(factors) == width // 2 and all(map(ok, factors)),
          'short_factor', factors, f'{width // 2} numbers above 0')
  return tuple(map(float, factors))


def longrope_gain(factor: float, original_len: int) -> float:
  """What longrope multiplies cos and sin by."""
  return (math.sqrt(1 + math.log(factor) / math.log(original_len))
          if factor > 1 else 1.0)

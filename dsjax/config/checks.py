"""Bad input is one clear error: the checks that every layer shares."""

import math


class InputError(ValueError):
  """Bad input from outside: names the field and what it may be."""


def require(ok, field, value, allowed):
  """Raises InputError naming the field, its value and the allowed values."""
  if not ok:
    text = repr(value)
    text = text if len(text) <= 120 else f'{text[:100]} ... {text[-15:]}'
    raise InputError(f'{field}={text}: must be {allowed}')


def number(low, high, low_open=False):
  """A test for finite numbers from low (or above it: low_open) to high."""
  def test(value):
    return (isinstance(value, (int, float)) and not isinstance(value, bool)
            and math.isfinite(value) and value <= high
            and (value > low if low_open else value >= low))
  return test


def integer(low, high):
  """A test for integers from low to high."""
  def test(value):
    return (isinstance(value, int) and not isinstance(value, bool)
            and low <= value <= high)
  return test


def finite(value):
  """Whether value is a number, 0 or more."""
  return (isinstance(value, (int, float)) and not isinstance(value, bool)
          and math.isfinite(value) and value >= 0)


def positive(value):
  """Whether value is a number above 0."""
  return finite(value) and value > 0


def whole(value):
  """Whether value is an integer of 1 or more."""
  return (isinstance(value, int) and not isinstance(value, bool)
          and value > 0)

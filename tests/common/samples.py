"""The smaller part of a sample, for `make test`; the rest is marked deep."""

import itertools

import pytest


def thinned(names, every, *axes):
  """A parametrize of all combinations, of which each `every`th is not deep.

  Args:
    axes: the values of each name; or a dict, whose keys are the ids.

  Raises:
    ValueError: a value is in no combination that is not deep.
  """
  labelled = [list(axis.items()) if isinstance(axis, dict) else
              [(str(value), value) for value in axis] for axis in axes]
  rows = list(itertools.product(*labelled))
  for place, axis in enumerate(labelled):
    kept = {row[place][0] for row in rows[::every]}
    if len(kept) < len(axis):
      raise ValueError(f'{names}: {kept} of {axis}; take another `every`')
  return pytest.mark.parametrize(names, [pytest.param(
      *(value for _, value in row), id='-'.join(label for label, _ in row),
      marks=[pytest.mark.deep] * bool(number % every))
                                         for number, row in enumerate(rows)])


def deep(*values):
  """Each as a parameter that is deep: what others of a list stand for."""
  return [pytest.param(*(value if isinstance(value, tuple) else (value,)),
                       marks=pytest.mark.deep) for value in values]


def one_in(every, values):
  """The parameters of a list that only samples something, as thinned."""
  return [deep(value)[0] if number % every else value
          for number, value in enumerate(values)]

"""Array names carry their shapes; `check` makes the names executable.

A name ends in an underscore and one capital letter an axis: `table_BM` has
rank 2, and every array of one call that has a B agrees on its size.
"""

from typing import Any

import jax
import numpy as np

# Arrays, and what stands for one by its shape and dtype.
Shaped = jax.Array | jax.ShapeDtypeStruct | np.ndarray


def check(**arrays: Any) -> dict[str, int]:
  """Raises ValueError unless ranks and equal letters agree; works on tracers.

  Returns the sizes by letter.
  """
  sizes = {}
  for name, array in arrays.items():
    letters = name.rsplit('_', 1)[-1]
    if not letters.isupper() or '_' not in name:
      raise ValueError(f'{name}: a checked array ends in _ and its axes')
    if array.ndim != len(letters):
      raise ValueError(f'{name}: rank {array.ndim}, shape {array.shape}')
    for letter, size in zip(letters, array.shape, strict=True):
      first, known = sizes.setdefault(letter, (name, size))
      if known != size:
        raise ValueError(f'{name}: {letter} is {size}, but {known} in {first}')
  return {letter: size for letter, (_, size) in sizes.items()}

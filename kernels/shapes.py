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


def check_kv(q: Shaped, k_KPCH: Shaped, v_KPCH: Shaped,
             k_scale_KPC: Shaped | None, v_scale_KPC: Shaped | None) -> None:
  """Raises ValueError unless keys and values agree, and queries [., N, H] have
  as many heads for each of theirs."""
  check(k_KPCH=k_KPCH, v_KPCH=v_KPCH)
  if k_scale_KPC is not None:
    check(k_KPCH=k_KPCH, k_scale_KPC=k_scale_KPC, v_scale_KPC=v_scale_KPC)
  if k_KPCH.dtype != v_KPCH.dtype:
    raise ValueError(f'v_KPCH: of {v_KPCH.dtype}, but keys of {k_KPCH.dtype}')
  (_, N, _), K = q.shape, k_KPCH.shape[0]
  if N == 0 or N % K:
    raise ValueError(f'{N} query heads; must be a multiple of K = {K}')

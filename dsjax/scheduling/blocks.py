"""Prompts as hashes of their blocks, so that equal beginnings are seen.

The hash of a block is that of its tokens and of all before them: equal hashes
are equal prefixes. A block has as many tokens as the pages of every instance
have in common (`size_for`); of pages of several blocks the hash is that of
their last one (`of_pages`).
"""

import hashlib
import math
from collections.abc import Iterable, Sequence

import numpy as np

from dsjax.config.checks import is_integer, require

_BYTES = 16  # of a hash: too many for two prefixes to have the same


def size_for(page_sizes: Iterable[int]) -> int:
  """Tokens of a block, for pages of these sizes."""
  return math.gcd(*page_sizes)


def hashes(tokens: Sequence[int], size: int, before: int = 0
           ) -> tuple[int, ...]:
  """The hash of each full block of `size` tokens.

  before: the hash of the block that these tokens follow; 0: they are the
  first.
  """
  data = np.asarray(tokens, np.int32).tobytes()
  last, told = before.to_bytes(_BYTES), []
  for start in range(0, len(tokens) // size * 4 * size, 4 * size):
    last = hashlib.blake2b(last + data[start:start + 4 * size],
                           digest_size=_BYTES).digest()
    told.append(int.from_bytes(last))
  return tuple(told)


def of_pages(blocks: Sequence[int], page_size: int, size: int
             ) -> Sequence[int]:
  """The hash of each full page, of the hashes of blocks of `size` tokens."""
  return blocks if page_size == size else blocks[page_size // size - 1::
                                                 page_size // size]


def resized(blocks: Sequence[int], given: int, size: int) -> tuple[int, ...]:
  """Hashes of blocks of `size` tokens, of hashes of blocks of `given`.

  Smaller blocks are numbered in the one that they are part of.

  Raises:
    InputError: neither size is a multiple of the other, or no hashes.
  """
  require(is_integer(1, math.inf)(given), 'Request.block_tokens', given,
          'an integer of 1 or more where there are blocks')
  require(isinstance(blocks, Sequence) and all(
      [isinstance(hash, int) for hash in blocks]), 'Request.blocks', blocks,
          'integers, the hashes of blocks')
  if size % given == 0:
    return tuple(of_pages(blocks, size, given))
  require(given % size == 0, 'Request.block_tokens', given,
          f'a multiple or a divisor of blocks of {size} tokens')
  parts = given // size
  return tuple([hash * parts + part for hash in blocks
                for part in range(parts)])

"""Requests: arrival times x lengths.

Everything is seeded and reads no clock. Arrivals, lengths and token ids come
from separate random streams of one seed, so that runs at several rates share
their lengths, and their arrivals up to a factor (common random numbers: the
difference between two rates is then not noise of the sample).
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np

from dsjax.config.checks import (
    is_integer,
    is_number,
    is_positive,
    is_positive_int,
    naming,
    require,
)
from dsjax.config.request import Request, Sampling
from dsjax.workload.files import Entry

KINDS = ('poisson', 'gamma', 'uniform', 'burst', 'trace')
MOST = 10**7  # requests: more fill the memory
MOST_ARRIVAL_S = 1e8  # a clock's time of day is more
_ARRIVALS, _LENGTHS, _TOKENS = range(3)  # streams of one seed


def _rng(seed, stream):
  require(is_integer(0, math.inf)(seed), 'seed', seed, 'an integer, 0 or more')
  return np.random.default_rng((seed, stream))


def _trace_arrivals(entries, n, rate_per_s):
  times = [e.arrival_s for e in entries or ()]
  require(times and None not in times, 'arrivals.kind', 'trace',
          'another one: the entries have no arrival times')
  require(n <= len(times), 'arrivals.n', n,
          f'at most {len(times)}, the length of the trace')
  times = np.array(times[:n])
  if rate_per_s is not None:
    require(times[-1] > times[0], 'arrivals.kind', 'trace',
            f'another one, or at its own times: the first {n} arrivals are at '
            f'one time, which nothing scales to {rate_per_s:g} a second')
    times *= (n - 1) / (times[-1] - times[0]) / rate_per_s
  return times


def arrivals(kind: str, rate_per_s: float | None, n: int, seed: int = 0,
             cv: float = 1.0, entries: Sequence[Entry] | None = None
             ) -> tuple[float, ...]:
  """Arrival times of n requests.

  Kinds: 'poisson'; 'gamma' (gaps whose standard deviation is cv times their
  mean: 1 is Poisson, above 1 bursty); 'uniform' (equal gaps); 'burst' (all at
  0); 'trace' (the first n of `entries`, at their own times, or scaled so that
  their mean gap is 1 / rate_per_s). With one seed, the times at two rates are
  the same up to a factor, and a shorter list is a prefix of a longer one.

  Args:
    rate_per_s: unused by 'burst'; None for the trace's own times.
    cv: from 0.01 to 100, 'gamma' only.

  Returns:
    A tuple of n seconds, not decreasing, after a first gap from 0.

  Raises:
    InputError.
  """
  require(kind in KINDS, 'arrivals.kind', kind, f'one of {KINDS}')
  require(is_integer(1, MOST)(n), 'arrivals.n', n,
          f'an integer from 1 to {MOST}, the most requests')
  if rate_per_s is not None or kind not in ('burst', 'trace'):
    require(is_positive(rate_per_s), 'arrivals.rate_per_s', rate_per_s,
            'a number above 0')
  require(is_number(0.01, 100)(cv), 'arrivals.cv', cv,
          'a number from 0.01 to 100')
  rng = _rng(seed, _ARRIVALS)
  if kind == 'trace':
    return tuple(_trace_arrivals(entries, n, rate_per_s).tolist())
  if kind == 'burst':
    return (0.0,) * n
  if kind == 'uniform':
    gaps = np.ones(n)
  elif kind == 'poisson':
    gaps = rng.standard_exponential(n)
  else:
    gaps = rng.standard_gamma(cv**-2, n) * cv**2
  return tuple((np.cumsum(gaps) / (rate_per_s or 1.0)).tolist())


def draws(seed: int, n: int, count: int) -> list[int]:
  """n indices below count, of a seed's stream for lengths."""
  return _rng(seed, _LENGTHS).integers(count, size=n).tolist()


def from_lengths(entries: Sequence[Entry], n: int,
                 arrivals_s: Sequence[float], vocab_size: int | None = None,
                 seed: int = 0, max_prompt: int | None = None,
                 max_output: int | None = None, in_order: bool = False
                 ) -> tuple[list[Request], int]:
  """Requests with the lengths of a trace and prompts without meaning.

  Args:
    n: requests; each takes the lengths of an entry drawn with replacement,
      or, in_order (with 'trace' arrivals), of the next entry.
    arrivals_s: n seconds.
    vocab_size: ids are drawn below it. None: each prompt is a `range`, for
      simulation, where the ids of a long trace would fill the memory.
    max_prompt, max_output: longer ones are cut to this many tokens.

  Returns:
    (requests, clipped): a list of n Request, ids 0 to n - 1, that generate
    exactly their output length (ignore_eos); and how many of them were cut.

  Raises:
    InputError.
  """
  require(entries, 'from_lengths.entries', entries, 'at least one entry')
  require(is_positive_int(n), 'from_lengths.n', n, 'an integer of 1 or more')
  require(not in_order or n <= len(entries), 'from_lengths.n', n,
          f'at most {len(entries)} in order, the length of the trace')
  require(len(arrivals_s) == n, 'from_lengths.arrivals_s', len(arrivals_s),
          f'{n} times')
  for field, value in (('vocab_size', vocab_size),
                       ('max_prompt', max_prompt), ('max_output', max_output)):
    require(value is None or is_positive_int(value), f'from_lengths.{field}',
            value, 'None or an integer of 1 or more')
  picks = range(n)
  if not in_order:
    picks = draws(seed, n, len(entries))
  rng = _rng(seed, _TOKENS)
  requests, clipped = [], 0
  for i, (pick, arrival_s) in enumerate(zip(picks, arrivals_s, strict=True)):
    _, prompt_len, output_len = entries[pick]
    p = min(prompt_len, max_prompt or prompt_len)
    o = min(output_len, max_output or output_len)
    clipped += (p, o) != (prompt_len, output_len)
    prompt = range(p)
    if vocab_size is not None:
      prompt = tuple(rng.integers(vocab_size, size=p).tolist())
    requests.append(Request(i, arrival_s, prompt, exactly(o)))
  return requests, clipped


@functools.lru_cache(2**14)  # its checks take longer than all else here
def exactly(num_tokens: int) -> Sampling:
  """The Sampling of an output of so many tokens."""
  return Sampling(max_tokens=num_tokens, ignore_eos=True)


def check_requests(field: str, given: Sequence[object]) -> list[Request]:
  """A user's own Requests, checked; whether a model has such token ids is not
  looked at.

  Raises:
    InputError naming `field`, the index and what it may be.
  """
  requests: list[Request] = []
  ids: set[int] = set()
  for index, request in enumerate(given):
    where = f'{field}[{index}]'
    if not isinstance(request, Request):
      require(False, where, request, 'a Request')
      continue
    prompt, sampling = request.prompt, request.sampling
    with naming(f'{where}, request {request.id}'):
      require(is_integer(0, math.inf)(request.id), 'Request.id', request.id,
              'an integer of 0 or more')
      require(request.id not in ids, 'Request.id', request.id,
              'different for each request')
      require(is_number(0, MOST_ARRIVAL_S)(request.arrival_s),
              'Request.arrival_s', request.arrival_s,
              f'seconds from the start, 0 to {MOST_ARRIVAL_S:.0e}')
      require(isinstance(prompt, list | tuple | range | np.ndarray)
              and getattr(prompt, 'ndim', 1) == 1 and len(prompt) > 0,
              'Request.prompt', prompt, 'token ids, not empty')
      require(isinstance(sampling, Sampling), 'Request.sampling', sampling,
              'a Sampling')
      require(sampling.max_tokens is not None, 'Sampling.max_tokens', None,
              'set in a workload')
    ids.add(request.id)
    requests.append(request)
  return requests


def from_prompts(prompts: Sequence[Sequence[int]],
                 arrivals_s: Sequence[float],
                 sampling: Sampling | Sequence[Sampling] | None = None,
                 max_tokens: Sequence[int | None] | None = None
                 ) -> list[Request]:
  """Requests of given token ids.

  Args:
    prompts: token ids of each prompt. arrivals_s: seconds of each.
    sampling: one Sampling for all, or one for each.
    max_tokens: of each prompt, None or a limit in place of its sampling's.

  Returns:
    A list of Request, ids 0, 1, ...

  Raises:
    InputError: lists of different lengths, or an empty prompt.
  """
  n = len(prompts)
  sampling = sampling or Sampling()
  each = [sampling] * n if isinstance(sampling, Sampling) else sampling
  limits = max_tokens or (None,) * n
  for field, values in (('arrivals_s', arrivals_s), ('sampling', each),
                        ('max_tokens', limits)):
    require(len(values) == n, f'from_prompts.{field}', len(values),
            f'as many as the {n} prompts')
  requests = []
  for i, prompt in enumerate(prompts):
    require(len(prompt) > 0, f'from_prompts.prompts[{i}]', prompt,
            'at least one token id')
    choice = each[i]
    if limits[i] is not None:
      choice = dataclasses.replace(choice, max_tokens=limits[i])
    requests.append(Request(i, arrivals_s[i], tuple(prompt), choice))
  return requests

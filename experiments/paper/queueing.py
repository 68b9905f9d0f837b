"""Closed forms of queues: the paper's analysis and the simulator's oracle.

Seconds and requests a second throughout. R (`rate_per_s`) is the rate of
Poisson arrivals, D (`service_s`) the seconds of one request's service, rho =
R D the load. Each form says where it holds; outside, InputError. Unless said
otherwise a server takes one request at a time, first come first served, with
room for all, in steady state.

Sources: [P] DistServe (OSDI 2024), 3.1; [F] Friedman 1965, tandem queues of
deterministic servers; [I] Inoue 2021, arXiv 1912.06322; the rest are identities
derived where they stand.
"""

import fractions
from collections.abc import Sequence

from dsjax.config.checks import is_nonnegative, is_positive, require


def _positive(**values):
  for field, value in values.items():
    require(is_positive(value), field, value, 'a number above 0')


def _nonnegative(**values):
  for field, value in values.items():
    require(is_nonnegative(value), field, value, 'a number of 0 or more')


def _stable(load):
  require(load < 1, 'load', load, 'below 1, or the queue grows for ever')


def load(rate_per_s: float, service_s: float, servers: int = 1) -> float:
  """rho = R D / c: the share of time each of c servers works (any law).

  Above 1 there is no steady state. Units: none.
  """
  _nonnegative(rate_per_s=rate_per_s)
  _positive(service_s=service_s)
  require(isinstance(servers, int) and servers >= 1, 'servers', servers,
          'an integer of 1 or more')
  return rate_per_s * service_s / servers


def md1_wait_s(rate_per_s: float, service_s: float) -> float:
  """Mean wait W = R D^2 / (2 (1 - R D)) of M/D/1; R D < 1 [P eq. 1]."""
  rho = load(rate_per_s, service_s)
  _stable(rho)
  return rate_per_s * service_s**2 / (2 * (1 - rho))


def md1_ttft_s(rate_per_s: float, service_s: float) -> float:
  """TTFT = D + R D^2 / (2 (1 - R D)): prefill of equal prompts [P eq. 1].

  Poisson arrivals, no batching, R D < 1. Seconds.
  """
  return service_s + md1_wait_s(rate_per_s, service_s)


def md1_wait_cdf(rate_per_s: float, service_s: float, wait_s: float) -> float:
  """P(W <= t) of M/D/1 (Erlang 1909; Crommelin 1932).

  (1 - rho) sum_{k <= t / D} e^{-x} x^k / k! with x = R (k D - t) <= 0. The
  terms alternate and grow: summed in exact fractions, e^{-x} too as a Taylor
  series, so it is good to 1e-12 for t up to some hundred services. rho < 1.
  """
  _nonnegative(wait_s=wait_s)
  rho = load(rate_per_s, service_s)
  _stable(rho)
  if not rate_per_s:
    return 1.0
  rate, service = fractions.Fraction(rate_per_s), fractions.Fraction(service_s)
  wait, total = fractions.Fraction(wait_s), fractions.Fraction(0)
  # Rounded to a grid far below the size of the cancellation.
  most = int(wait / service)
  bits = 128 + int(8 * float(rate * wait)) + 4 * most
  grid, step = 1 << bits, int(rate * service * (1 << bits))
  x0 = int(rate * wait * grid)
  for k in range(most + 1):
    x = max(0, x0 - k * step)  # -x of the formula
    power = exp = grid
    n = 0
    while exp:  # e^x = sum x^n / n!
      n += 1
      exp = exp * x // grid // n
      power += exp
    for n in range(1, k + 1):
      power = power * x // grid // n
    total += -power if k % 2 else power
  return min(1.0, max(0.0, (1 - rho) * float(total / grid)))


def mdc_ttft_bounds_s(rate_per_s: float, service_s: float, servers: int
                      ) -> tuple[float, float]:
  """(low, high) of mean TTFT of c servers that share Poisson arrivals.

  low: D + max(0, W - (c - 1) D / (2 c)), W the wait at one server of service
  D / c (Brumelle 1971). high: a random split, M/D/1 at R / c each. One
  queue, shortest-backlog and round-robin dispatch lie between. rho < 1.
  """
  load(rate_per_s, service_s, servers)
  fast = md1_wait_s(rate_per_s, service_s / servers)
  idle = (servers - 1) * service_s / (2 * servers)
  return (service_s + max(0.0, fast - idle),
          md1_ttft_s(rate_per_s / servers, service_s))


def pipeline_ttft_s(rate_per_s: float, service_s: float,
                    stages: int = 2) -> float:
  """TTFT = D + R (D/p)^2 / (2 (1 - R D/p)): p equal stages [P eq. 2].

  At p = 2, D + R D^2 / (4 (2 - R D)). Requests queue at stage 1 only [F], if
  prompts are equal. D: seconds through all stages. R D / p < 1.
  """
  require(isinstance(stages, int) and stages >= 1, 'stages', stages,
          'an integer of 1 or more')
  return service_s + md1_wait_s(rate_per_s, service_s / stages)


def tensor_ttft_s(rate_per_s: float, service_s: float, speedup: float
                  ) -> float:
  """TTFT = D/K + R D^2 / (2 K (K - R D)): tensor parallel [P eq. 3].

  K: how much faster the shards run together (1 < K < 2 of two). R D < K.
  """
  _positive(speedup=speedup)
  return md1_ttft_s(rate_per_s, service_s / speedup)


def crossover_rate_per_s(service_s: float, speedup: float,
                         stages: int = 2) -> float:
  """The rate at which pipeline and tensor TTFT are equal [P 3.1, Fig. 4].

  Below it tensor parallelism is faster, above it the pipeline. By bisection
  up to the lesser capacity K/D; 1 < K < stages.
  """
  _positive(service_s=service_s)
  require(1 < speedup < stages, 'speedup', speedup, f'in (1, {stages})')
  low, high = 0.0, speedup / service_s * (1 - 1e-12)
  for _ in range(200):
    middle = (low + high) / 2
    if (tensor_ttft_s(middle, service_s, speedup)
        < pipeline_ttft_s(middle, service_s, stages)):
      low = middle
    else:
      high = middle
  return low


def dd1_time_s(interval_s: float, service_s: float, n: int) -> float:
  """Sojourn of the n-th request (from 0) of D/D/1: D + n max(0, D - 1/R).

  Arrivals every interval_s; exact at any load.
  """
  _positive(interval_s=interval_s, service_s=service_s)
  require(isinstance(n, int) and n >= 0, 'n', n, 'an integer of 0 or more')
  return service_s + n * max(0.0, service_s - interval_s)


def batch_ttft_bound_s(rate_per_s: float, fixed_s: float, each_s: float
                       ) -> float:
  """Upper bound of mean TTFT where a batch takes all that waits [I].

  Poisson, equal prompts, a batch of b takes tau + alpha b: min(phi0, phi1),
  phi0 = (alpha + tau) / (2 (1 - R alpha)) (1 + 2 R tau + (1 - R tau) / (1 +
  R alpha)), phi1 = 3/2 tau / (1 - R alpha) + alpha/2 (R alpha + 2) / (1 -
  R^2 alpha^2). R alpha < 1. Within 2 % of simulation.
  """
  _nonnegative(rate_per_s=rate_per_s, fixed_s=fixed_s)
  _positive(each_s=each_s)
  rho, fixed = rate_per_s * each_s, rate_per_s * fixed_s
  _stable(rho)
  return min((each_s + fixed_s) / (2 * (1 - rho))
             * (1 + 2 * fixed + (1 - fixed) / (1 + rho)),
             1.5 * fixed_s / (1 - rho)
             + each_s / 2 * (rho + 2) / (1 - rho**2))


def mean_context(prompt_lens: Sequence[int], output_lens: Sequence[int]
                 ) -> float:
  """Mean tokens c attended by a decoding row: E[p o]/E[o] + E[o^2]/(2 E[o]).

  Weighted by how long each request decodes; lengths pair up.
  """
  require(len(prompt_lens) == len(output_lens) > 0, 'output_lens',
          len(output_lens), 'as many as prompt_lens, 1 or more')
  total = sum(output_lens)
  return (sum(p * o for p, o in zip(prompt_lens, output_lens, strict=True))
          / total + sum(o * o for o in output_lens) / (2 * total))


def decode_tpot_s(rate_per_s: float, output_len: float, fixed_s: float,
                  row_s: float, token_s: float = 0.0,
                  context: float = 0.0) -> float:
  """Fluid TPOT = A / (1 - R o (g + beta c)) of continuous batching.

  A step of B rows takes A + (g + beta c) B: A = fixed_s, g = row_s, beta =
  token_s, c = context (mean_context). By Little's law B = R o TPOT. Stable
  while R o (g + beta c) < 1; memory and batch unbounded; 3 to 5 % below
  simulation, which waits for step boundaries and fluctuates.
  """
  _positive(output_len=output_len, fixed_s=fixed_s)
  _nonnegative(rate_per_s=rate_per_s, row_s=row_s, token_s=token_s,
               context=context)
  rho = rate_per_s * output_len * (row_s + token_s * context)
  _stable(rho)
  return fixed_s / (1 - rho)

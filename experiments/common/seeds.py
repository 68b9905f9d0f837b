"""What runs of several seeds say together."""

import math
import statistics
from collections.abc import Sequence


def half_width(values: Sequence[float]) -> float:
  """Of the 95 % interval of independent runs' mean: Student's t."""
  from scipy import stats  # takes a second to import

  count = len(values)
  return (float(stats.t.ppf(0.975, count - 1)) * statistics.stdev(values)
          / math.sqrt(count))


def together(intervals: Sequence[tuple[float, float, float]]
             ) -> tuple[float, float, float]:
  """(mean, low, high) of independent runs of the same length, from those of
  each, such as of metrics.difference.

  Half widths add as the deviations of independent means do, by their squares.
  So no batch holds the end of one run and the beginning of the next.
  """
  mean = statistics.fmean(mean for mean, *_ in intervals)
  half = math.sqrt(sum(max(high - own, own - low) ** 2
                       for own, low, high in intervals)) / len(intervals)
  return mean, mean - half, mean + half

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

"""What a request experienced."""

import dataclasses
from collections.abc import Iterable
from typing import Any, Self

from dsjax.config.checks import require

STAGES = ('prefill_queue', 'prefill', 'migrate', 'decode_queue', 'decode')


@dataclasses.dataclass
class Record:
  """One request's life. Times in seconds on the run's clock.

  token_s holds the completion time of each output token. stage_s sums the
  seconds spent in each of STAGES over the whole life (a preempted request
  visits some twice); they add up to finish_s - arrival_s. finish_s is the
  time of the event that ended it; status is then its Finish's reason.
  preemptions: times its pages were taken for want of pages. retries: times it
  was taken up again after a fault (a lost instance, a failed hand-off).
  cached_tokens: of the prompt, whose KV was kept when the prefill began that
  gave the first token; of these loaded_tokens came from host memory, and
  fetched_tokens from another instance. migrated_tokens: whose KV was moved
  between instances. reasons: why the policy sent it
  where it did, where its hooks say so.
  """

  id: int
  arrival_s: float
  prompt_len: int
  max_tokens: int
  token_s: list[float] = dataclasses.field(default_factory=list)
  stage_s: dict[str, float] = dataclasses.field(
      default_factory=dict.fromkeys(STAGES, 0.0).copy)
  finish_s: float | None = None
  # running | stop | length | cancelled | rejected | refused | failed
  status: str = 'running'
  reason: str = ''
  preemptions: int = 0
  cached_tokens: int = 0
  migrated_tokens: int = 0
  loaded_tokens: int = 0
  fetched_tokens: int = 0
  instances: tuple[int, ...] = ()
  reasons: tuple[str, ...] = ()
  retries: int = 0

  @property
  def ttft_s(self) -> float | None:
    """Arrival to first token."""
    return self.token_s[0] - self.arrival_s if self.token_s else None

  @property
  def tpot_s(self) -> float | None:
    """Mean time per output token after the first; 0 for a single token."""
    if not self.token_s:
      return None
    if len(self.token_s) == 1:
      return 0.0
    return (self.token_s[-1] - self.token_s[0]) / (len(self.token_s) - 1)

  @property
  def itl_s(self) -> list[float]:
    """Gaps between successive output tokens."""
    return [b - a for a, b in zip(self.token_s, self.token_s[1:],
                                  strict=False)]

  def row(self) -> dict[str, Any]:
    """Its fields by name with ttft_s and tpot_s, each stage a column: plain
    values, which JSON and a table of pandas take."""
    row = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
    stages = {f'{stage}_s': seconds
              for stage, seconds in row.pop('stage_s').items()}
    return row | {'instances': list(self.instances),
                  'reasons': list(self.reasons), 'ttft_s': self.ttft_s,
                  'tpot_s': self.tpot_s} | stages

  @classmethod
  def of_row(cls, row: dict[str, Any]) -> Self:
    """The Record that a row tells of; more columns may stand by.

    Raises:
      KeyError: a column is missing.
    """
    fields = {f.name: row[f.name] for f in dataclasses.fields(cls)
              if f.name not in ('stage_s', 'instances', 'reasons')}
    return cls(**fields, instances=tuple(row['instances']),
               reasons=tuple(row['reasons']),
               stage_s={stage: row[f'{stage}_s'] for stage in STAGES})


def rows(items: Iterable) -> list[dict[str, Any]]:
  """The row() of each Record or Output: `pandas.DataFrame(rows(records))`.

  Raises:
    InputError: one is neither.
  """
  require(isinstance(items, Iterable), 'rows', items, 'Records or Outputs')
  each = list(items)
  for item in each:
    require(callable(getattr(item, 'row', None)), 'rows', item,
            'one of Records or Outputs')
  return [item.row() for item in each]

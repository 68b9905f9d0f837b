"""What a request experienced."""

import dataclasses

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
  """

  id: int
  arrival_s: float
  prompt_len: int
  max_tokens: int
  token_s: list[float] = dataclasses.field(default_factory=list)
  stage_s: dict[str, float] = dataclasses.field(
      default_factory=lambda: dict.fromkeys(STAGES, 0.0))
  finish_s: float | None = None
  # running | stop | length | cancelled | rejected | failed
  status: str = 'running'
  reason: str = ''
  preemptions: int = 0
  migrated_tokens: int = 0
  instances: tuple[int, ...] = ()
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

"""What policies predict, in seconds, from the latency of an instance."""

import math
from collections.abc import Callable, Sequence

from dsjax.scheduling.policy import InstanceView, Load, RequestView, View

MOST_ROWS = 4096  # of a batch that is asked for
GRAIN = 16  # tokens
LISTED = 64  # prompts that are looked at one by one
CATCH_UP = 16  # tokens over which a row makes up for what it is late
MOST_CV = 3  # of lengths
LEAST_S = 1e-9  # of a step
LONG = 1e4  # tokens of an output of which nothing is known
TOO_LATE = 'its first token would come too late: try again later'  # of a Refuse
RARE = 1.645  # standard deviations below the mean: one of twenty is there


def queue_s(instance: InstanceView,
            requests: Sequence[RequestView] | None = None) -> float:
  """Seconds of prompts that wait here or are being prefilled, all or these; of
  those in flight half is left, on average. Of more than LISTED, the others
  count by their tokens."""
  listed: Sequence[RequestView]
  if requests is None:
    listed = (*instance.waiting(LISTED), *instance.prefilling())
    tokens = instance.backlog if instance.num_waiting > LISTED else 0
  else:
    listed, tokens = requests[:LISTED], tokens_of(requests)
  seconds = sum([instance.latency.prefill_s(((
      known_tokens(instance, request), request.stop),)) for request in listed])
  if tokens:
    seconds *= max(1.0, tokens / tokens_of(listed))
  return instance.latency.prefill_s(instance.pieces) / 2 + seconds


def tokens_of(requests: Sequence[RequestView]) -> int:
  """Tokens of their prompts that are to be computed."""
  return sum([request.stop - request.done for request in requests])


def known_tokens(instance: InstanceView, request: RequestView) -> int:
  """Tokens of a prompt that are done, or kept there."""
  return request.done or instance.hit_tokens(request)


def unknown_tokens(instance: InstanceView, requests: Sequence[RequestView]
                   ) -> int:
  """Tokens of their prompts that are neither done nor kept there."""
  return sum([request.stop - known_tokens(instance, request)
              for request in requests])


def prefill_s(instance: InstanceView, request: RequestView) -> float:
  """Seconds of a request's prefill, alone in its batch; what is kept here of
  its prompt is left out, but for the load of what is in host memory, where
  that is sooner than to compute it. (In queue_s others are computed
  meanwhile.)"""
  prompt_len, compute_s = request.prompt_len, instance.latency.prefill_s
  if request.done:
    return compute_s(((request.done, prompt_len),))
  hit, more = instance.hits(request)
  alone_s = compute_s(((hit, prompt_len),))
  return min(alone_s, instance.load_s(more) + compute_s(
      ((hit + more, prompt_len),))) if more else alone_s


def flight_s(instance: InstanceView) -> float:
  """Seconds of what is in flight: what is read there comes behind it."""
  pieces, steps = instance.pieces, instance.num_steps
  return ((instance.latency.prefill_s(pieces) if pieces else 0.0)
          + (steps * decode_s(instance) if steps else 0.0))


def decode_s(instance: InstanceView, rows: int = 0, tokens: int = 0) -> float:
  """Seconds of a decode step here, with so many rows more, and their tokens.

  What is on its way here counts as well.
  """
  coming = instance.pulls()
  return instance.latency.decode_s(
      instance.num_rows + len(coming) + rows,
      instance.context + sum([r.prompt_len for r in coming]) + tokens)


def room(view: View, instance: InstanceView,
         most_s: Callable[[InstanceView], float]) -> int:
  """Prompts that may begin there now, up to LISTED for each instance that
  decodes: with as many rows the most of them a second take most_s(instance) a
  token at most. Negative where there are too many rows. As many as LISTED where
  there are none, or where even a lone one takes longer.

  A row waits for its first step: for its copy, for half of a step that it does
  not join, and, where all places are taken, for an end for each row that comes
  before it. A short output has few tokens to make up for that. Rows that end
  while a prompt is computed make room for its row. Before the first output has
  ended they are taken for long. A prompt whose last tokens are in flight, and
  one whose KV is being copied, will be rows too.
  """
  lone = [i.latency.host_s + i.latency.decode_s(1, 1) <= most_s(i)
          for i in view.decodes]
  if not any(lone) or not any([i.num_rows for i in view.decodes]):
    return LISTED * max(1, len(lone))
  load = view.load
  if not load.lives:  # nothing has ended
    load = load._replace(output_len=LONG)
  prompt_len = max(1, round(load.prompt_len))
  output_len = max(1.0, load.output_len)
  copy_s = view.link.migrate_s(prompt_len) if view.knows_link else 0.0
  prompt_s = instance.latency.prefill_s(((0, prompt_len),))
  begun = {i.index: len(i.prefilling()) + i.num_last for i in view.instances}

  def rows_more(home: InstanceView) -> int:
    latency, coming, limit_s = home.latency, home.pulls(), most_s(home)
    each = home.context // max(1, home.num_rows)
    copied = max(0, home.residents - home.num_rows - begun[home.index])
    rows, places = home.num_rows + copied + len(coming), home.config.max_seqs
    context = (home.context + copied * prompt_len
               + sum([r.prompt_len for r in coming]))
    ends = min(home.num_rows, round(
        home.num_rows * prompt_s / output_len
        / max(latency.decode_s(rows, context), LEAST_S)))

    def attain_per_s(more: int) -> float:
      """Rows that end a second and attain it, with so many rows more."""
      there = min(rows + more, places)
      if there < 1:
        return 0.0
      step_s = max(LEAST_S, latency.host_s + latency.decode_s(
          there, max(0, context + (there - rows) * each)))
      saved_s = limit_s - step_s  # a token
      if saved_s <= 0:
        return 0.0
      waits_s = (rows + more - there) * step_s * output_len / places
      if home.index != instance.index:
        waits_s += copy_s + step_s / 2
      return there / step_s * longer(load, waits_s / saved_s)

    def fits(more: int) -> bool:
      share = attain_per_s(more - ends)
      return 0 < share >= attain_per_s(more - ends - 1)

    return most(fits, LISTED)

  return sum(map(rows_more, view.decodes)) - sum(begun.values())


def rest_s(view: View, instance: InstanceView, request: RequestView) -> float:
  """Seconds of a finished prefill from now on, if it decodes here: its copy,
  less what is kept here, and steps for as many tokens as others have had.

  Both count, or all requests that begin alike would go to one instance.
  """
  steps = max(1.0, view.load.output_len)
  step_s = decode_s(instance, 1, request.prompt_len)
  if instance.index == request.instance:
    return steps * step_s
  return steps * step_s + view.link.migrate_s(
      max(1, request.prompt_len - instance.hit_tokens(request)))


def free_tokens(instance: InstanceView) -> int:
  """Tokens that its free pages hold."""
  return instance.free_pages * instance.config.page_size


def most(fits: Callable[[int], bool], limit: int) -> int:
  """The largest number up to a limit that fits; what is less fits too."""
  low, high = 0, limit
  while low < high:
    middle = (low + high + 1) // 2
    low, high = (middle, high) if fits(middle) else (low, middle - 1)
  return low


def mixed_time(instance: InstanceView) -> Callable[[int], float]:
  """What predicts the seconds of a step with so many prompt tokens beside the
  rows; of a prompt that goes on where it is now."""
  rows, context, latency = (
      instance.turn_rows, instance.context, instance.latency)
  start = max([request.done for request in instance.prefilling()], default=0)
  return lambda tokens: latency.host_s + latency.mixed_s(
      ((start, start + tokens),), rows, context)


def prompt_tokens(instance: InstanceView, step_s: float,
                  limit: int | None = None) -> int:
  """Most prompt tokens, up to a limit, that a step takes beside the rows within
  step_s, in multiples of GRAIN."""
  if limit is None:
    limit = instance.config.prefill_tokens - instance.turn_rows
  seconds_of = mixed_time(instance)
  return GRAIN * most(lambda count: seconds_of(GRAIN * count) <= step_s,
                      limit // GRAIN)


def sigma_of(cv: float) -> float:
  """The sigma of lognormal lengths with this standard deviation over the
  mean."""
  return math.sqrt(math.log(1 + min(max(cv, 0.05), MOST_CV)**2))


def least_output(load: Load) -> float:
  """Tokens that all outputs but one of twenty have, of lognormal lengths."""
  sigma = sigma_of(load.output_cv)
  return load.output_len * math.exp(-sigma * (sigma / 2 + RARE))


def longer(load: Load, tokens: float) -> float:
  """The share of outputs that have more tokens, of lognormal lengths."""
  sigma = sigma_of(load.output_cv)
  place = math.log(max(tokens, 1e-9) / max(load.output_len, 1.0)) / sigma
  return math.erfc((place + sigma / 2) / math.sqrt(2)) / 2


def allowed_s(view: View, instance: InstanceView, tpot_s: float,
              least: int = 0, sure: float = 0.0) -> float:
  """Seconds that the rows with at least so many tokens allow a step: tpot_s,
  and what all of them have saved; a row that is late makes up for it over
  CATCH_UP tokens. One that cannot, in steps without prompts, does not count.
  Those with fewer than `sure` tokens have saved also what they will up to
  there, in such steps."""
  latency = instance.latency
  token_s = max(0.0, tpot_s - latency.host_s - latency.decode_s(
      instance.num_rows, instance.context))
  saved = [(row.first_s or view.time_s) + (row.num_out - 1) * tpot_s
           + max(0.0, sure - row.num_out) * token_s - view.time_s
           for row in instance.rows() if row.num_out >= least]
  saved_s = min([s for s in saved if s >= -CATCH_UP * token_s], default=0.0)
  return tpot_s + (saved_s if saved_s > 0 else saved_s / CATCH_UP)


def rows_within(instance: InstanceView, tpot_s: float, tokens: float) -> int:
  """Most rows of so many tokens each whose step stays within tpot_s."""
  config = instance.config
  held = int(config.num_pages * config.page_size / max(tokens, 1))
  return most(lambda rows: instance.latency.decode_s(rows, rows * tokens)
              <= tpot_s, min(MOST_ROWS, config.max_seqs, held))

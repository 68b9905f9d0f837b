"""What clients have asked of a server, and what they have not had yet."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

from dsjax.analysis.record import Record
from dsjax.checkpoints.checkpoint import Model
from dsjax.config.checks import (
  InputError,
  is_integer,
  is_number,
  naming,
  require,
)
from dsjax.config.request import Request, Sampling
from dsjax.runtime.loop import Loop
from dsjax.runtime.output import Output, RequestOutputState, Update
from dsjax.runtime.prompts import Prompt, check_ids, prompt_ids
from dsjax.runtime.replay import Replay
from dsjax.workload import check_requests

PARAMETERS = tuple(field.name for field in dataclasses.fields(Sampling))


class Requests:
  """The requests of a server, each until its output has been taken.

  Any thread may call `prepare` and `check`; the rest is for the thread of the
  loop alone.

  Attributes:
    states: {id: RequestOutputState}, until its output is asked for.
    seen: ids that were served and not forgotten.
    next_id: of a request that is given none.
    closing: nothing is taken any more.
  """

  def __init__(self, model: Model, loop: Loop) -> None:
    self.model, self.loop = model, loop
    self.states: dict[int, RequestOutputState] = {}
    self.seen: set[int] = set()
    self.next_id, self.closing = 0, False

  @property
  def is_open(self) -> bool:
    """Whether requests are taken."""
    return not (self.loop.closed or self.closing)

  def prepare(self, prompt: Prompt, **params: Any
              ) -> tuple[tuple[int, ...], Sampling]:
    """Checked token ids and Sampling of a request.

    Without max_tokens, as many as the context and the pools leave.

    Raises:
      InputError: bad prompt (see prompts.prompt_ids) or parameters.
    """
    ids = prompt_ids(self.model, prompt)
    for name in params:
      require(name in PARAMETERS, 'parameter', name, f'one of {PARAMETERS}')
    sampling = Sampling(**params)
    if sampling.max_tokens is None:
      room = max(1, self.loop.scheduler_config.longest - len(ids))
      sampling = dataclasses.replace(sampling, max_tokens=room)
    self._check_sampling(sampling)
    return ids, sampling

  def check(self, prompt: Sequence[int], sampling: Sampling) -> None:
    """Raises InputError unless these ids and this Sampling suit the model.

    Whether they fit is the scheduler's to say (scheduler.never_fits).
    """
    check_ids(self.model, prompt)
    self._check_sampling(sampling)

  def _check_sampling(self, sampling: Sampling) -> None:
    size = self.model.config.vocab_size
    require(isinstance(sampling, Sampling), 'Request.sampling', sampling,
            'a Sampling')
    require(sampling.max_tokens is not None, 'Sampling.max_tokens', None,
            'set in a workload')
    require(all(t < size for t, _ in sampling.logit_bias),
            'Sampling.logit_bias', sampling.logit_bias, f'ids below {size}')
    require(not sampling.stop or self.model.tokenizer is not None,
            'Sampling.stop', sampling.stop, 'empty without a tokenizer')

  def enqueue(self, request: Request, more: bool = False) -> None:
    """Queues a Request that `check` has passed.

    Raises:
      InputError: the server is closed, or has served this id.
    """
    self.check_new(request)
    ends = set(request.sampling.stop_token_ids)
    if not request.sampling.ignore_eos:
      ends.update(self.model.config.eos_ids)
    output = self.states[request.id] = RequestOutputState(
        request, ends, self.model.tokenizer)
    self.seen.add(request.id)
    self.next_id = max(self.next_id, request.id + 1)
    self.loop.arrive(output, more)

  def check_open(self) -> None:
    """Raises InputError where the server is closed."""
    require(self.is_open, 'server', self.loop.broken or 'closed', 'open')

  def check_new(self, request: Request) -> None:
    """Raises InputError unless the server takes this id at this time."""
    self.check_open()
    self.loop.check_room()
    require(is_integer(0, math.inf)(request.id), 'Request.id', request.id,
            'an integer of 0 or more')
    require(request.id not in self.seen, 'Request.id', request.id,
            'new to this server')
    require(is_number(-math.inf, math.inf)(request.arrival_s),
            f'request {request.id}: Request.arrival_s', request.arrival_s,
            'seconds')

  def check_workload(self, requests: Iterable[Request]) -> list[Request]:
    """The requests, checked, by arrival."""
    checked = check_requests('requests', listed('requests', requests,
                                                'a list of Requests'))
    for index, request in enumerate(checked):
      with naming(f'requests[{index}], request {request.id}'):
        self.check_new(request)
        require(request.after is None, 'Request.after', request.after,
                'None: a server sends each at its time (simulate knows more)')
        self.check(request.prompt, request.sampling)
    return sorted(checked, key=lambda r: r.arrival_s)

  def replayed(self, replay: Replay) -> bool | None:
    """Queues what is due; True once all that `run` asked for has ended."""
    for request, more in replay.arrive(self.loop.now):
      self.enqueue(request, more)
    self.loop.next_s = min(self.loop.next_s, replay.next_s)
    others = bool(self.loop.unfinished)
    return True if replay.ended(self.loop.unfinished) and (
        others or not self.loop.busy) else None

  def queue(self, ids: list[int],
            requests: Sequence[tuple[tuple[int, ...], Sampling]],
            arrival_s: float | None = None, refuse: bool = True) -> None:
    """Queues requests that arrive together, and adds their ids to `ids`.

    Raises:
      InputError, RequestFailed: one cannot be served, if it is to refuse.
    """
    now = self.loop.now if arrival_s is None else arrival_s
    for index, (prompt, sampling) in enumerate(requests):
      ids.append(self.next_id)
      self.enqueue(Request(ids[-1], now, prompt, sampling),
                   more=index + 1 < len(requests))
      state = self.states[ids[-1]]
      if state.error and refuse and not (state.refused and len(requests) > 1):
        raise (state.failure if state.failure and len(requests) == 1
               else InputError(state.error if len(requests) == 1 else
                               f'prompts[{index}]: {state.error}'))

  def take(self, ids: Iterable[int]) -> list[tuple[int, Update]]:
    """(id, what came since the last call) of those of `ids` that have news.

    Raises:
      InputError: there is none of this id any more.
    """
    states = [(id, self.known(id)) for id in ids]
    return [(id, state.take()) for id, state in states if state.has_news]

  def known(self, id: int) -> RequestOutputState:
    """The state of a request; InputError where there is none any more."""
    require(is_integer(0, math.inf)(id) and id in self.states, 'id', id,
            'that of a request whose output has not been taken')
    return self.states[id]

  def output(self, id: int) -> Output:
    """The Output of a request, which stays; InputError unless it has ended."""
    state = self.known(id)
    require(state.finished, 'id', id, 'that of a request that has ended: this '
            'one is running')
    request = state.request
    lost = Record(id, request.arrival_s, len(request.prompt),
                  request.sampling.max_tokens or 0, status='failed',
                  reason=state.error or '')  # given up before it was told of
    record = next((r for r in reversed(self.loop.recorder.records)
                   if r.id == id), lost)
    return Output(id, state.text, tuple(state.tokens), record.status, record,
                  tuple(state.logprobs))

  def forget(self, id: int) -> Record:
    """Drops all memory of a request; InputError unless it has ended."""
    require(self.known(id).finished, 'id', id,
            'that of a request that has ended: this one is running')
    del self.states[id]
    self.seen.discard(id)
    return self.loop.recorder.forget(id)

  def collect(self, ids: Sequence[int], outputs: list[Output]) -> bool | None:
    """True once all of these have ended, and their outputs are in `outputs`."""
    for id in ids:
      if not self.known(id).finished:
        return None
    outputs += self.take_outputs(ids)
    return True

  def take_outputs(self, ids: Sequence[int]) -> list[Output]:
    """The Outputs of requests that have ended, which are dropped."""
    outputs = [self.output(id) for id in ids]
    for id in ids:
      del self.states[id]
    return outputs

  def end_all(self, ids: Sequence[int], outputs: Sequence[Output]
              ) -> Sequence[Output]:
    """Cancels the requests that have not ended; the outputs of all, unless
    there are `outputs` already."""
    for id in ids:
      self.loop.cancel(id)
    self.loop.log_raised()  # its client hears of the Ctrl-C
    return outputs or self.take_outputs(
        [id for id in ids if id in self.states])

  def drop(self, ids: Sequence[int], keep: bool) -> None:
    """Cancels requests of an interrupted client, and forgets their outputs;
    keep: but for those that have ended."""
    for id in ids:
      if id in self.loop.unfinished or not keep:
        self.loop.cancel(id)
        self.states.pop(id, None)
    self.loop.log_raised()  # its client has an error already

  def cancel_all(self) -> None:
    """Cancels what is left, and takes nothing more."""
    self.closing = True
    for id in list(self.loop.unfinished):
      self.loop.cancel(id)


def listed(field: str, values: Iterable[Any], allowed: str) -> list[Any]:
  """What may be given once only, as a list."""
  require(isinstance(values, Iterable) and getattr(values, 'ndim', 1)
          and not isinstance(values, str | bytes | dict | set),
          field, values, allowed)
  return list(values)

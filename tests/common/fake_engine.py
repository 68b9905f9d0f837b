"""An engine without a model: it compiles nothing, and its tokens are a hash.

A token depends on the request's tokens so far and its Sampling alone, so an
answer is the same whatever serves it, as it must be on the real engine;
`expected` is the oracle. Results are not ready at their first look, so that
commands of several steps come apart and hand-offs take a poll or two; how many
steps an engine completes is up to its Pace, never to the machine.
"""

import dataclasses
import threading
import time
import zlib

import numpy as np

from dsjax.config.request import MAX_LOGPROBS
from dsjax.model.sampling import Sampled

PAGE_BYTES = 1024


class Pace:
  """How many steps an engine may still complete; None: any number."""

  def __init__(self):
    self.left, self.lock = None, threading.Lock()


class Late:
  """An array that is ready from its second look on, if the pace allows."""

  def __init__(self, values, pace):
    self._values, self._pace = np.asarray(values), pace
    self._looked = self._ready = self._deleted = False
    self.size = self._values.size

  def is_ready(self):
    with self._pace.lock:
      if self._looked and not self._ready and self._pace.left != 0:
        self._ready = True
        if self._pace.left is not None:
          self._pace.left -= 1
      self._looked = True
      return self._ready

  def block_until_ready(self):
    while not self.is_ready():
      time.sleep(1e-4)
    return self

  def is_deleted(self):
    return self._deleted

  def delete(self):
    self._deleted = True

  def __array__(self, *args, **kwargs):
    return self._values


def ends_of(sampling, eos_ids):
  """The ids that end a request."""
  return {*sampling.stop_token_ids, *(() if sampling.ignore_eos else eos_ids)}


def next_token(tokens, sampling, vocab_size, banned=()):
  """The token after `tokens`. Ids that a bias of 100 asks for are the only
  ones; greedy tokens know no seed; none of `banned`."""
  if not sampling.temperature:
    sampling = dataclasses.replace(sampling, seed=0)
  draws = dataclasses.astuple(dataclasses.replace(
      sampling, max_tokens=None, min_tokens=0, stop=(), stop_token_ids=(),
      ignore_eos=False, logprobs=None))
  draw = zlib.crc32(repr((tuple(map(int, tokens)), draws)).encode())
  wanted = [id for id, bias in sampling.logit_bias
            if bias >= 100 and id not in banned]
  token = wanted[draw % len(wanted)] if wanted else draw % vocab_size
  while token in banned:
    token = (token + 1) % vocab_size
  return token


def expected(prompt, sampling, eos_ids, vocab_size):
  """The tokens that a request must give, unless a stop string ends it."""
  ends = ends_of(sampling, eos_ids)
  tokens = []
  while len(tokens) < sampling.max_tokens:
    tokens.append(next_token(
        [*prompt, *tokens], sampling, vocab_size,
        ends if len(tokens) < sampling.min_tokens else ()))
    if tokens[-1] in ends:
      break
  return tuple(tokens)


class FakeEngine:
  """Stands for engine.Engine: a maker of engines for `serve`."""

  news = None

  def __init__(self, model, meshes, role, config, capacity):
    self.role, self.config, self.capacity = role, config, capacity
    self.vocab_size = model.config.vocab_size
    self.eos_ids = model.config.eos_ids
    self.devices = tuple(d for mesh in meshes for d in mesh.devices.flat)
    self.pace = Pace()
    self.start()

  def start(self):
    self.slot_of, self.spare = {}, list(range(self.config.max_seqs))
    self.requests = {}  # id -> (tokens so far, Sampling, prompt length)
    return True

  def check(self):
    pass

  def close(self):
    pass

  def stop(self):
    self.slot_of, self.spare, self.requests = {}, [], {}

  def is_sound(self):
    return True

  def shapes_needed(self):
    return [(0, 1)]

  def warm(self):
    yield 'nothing'

  def admit(self, id, tokens, prompt_len, sampling):
    assert id not in self.slot_of and 0 < prompt_len <= len(tokens)
    self.slot_of[id] = self.spare.pop()
    self.requests[id] = list(tokens), sampling, prompt_len

  def forget(self, id):
    if id in self.slot_of:
      self.spare.append(self.slot_of.pop(id))
      del self.requests[id]

  def prefill(self, command):
    rows = [self._sample(row.id, row.base + command.tick + 1)
            for row in command.rows]
    chunks = [self._sample(chunk.id, chunk.stop) if chunk.last else 0
              for chunk in command.chunks]
    return [self._output(rows + chunks)], []

  def decode(self, command):
    return [self._output([
        self._sample(row.id, row.base + command.tick + step + 1)
        for row in command.rows]) for step in range(command.steps)], []

  def sequences(self, command):
    return len(command.chunks)

  def route_to(self, target):
    return FakeRoute(self, target)

  def host_memory(self, checksum):
    return FakeHost()

  def _sample(self, id, position):
    """The token at a position, which must be the request's next."""
    if id not in self.slot_of:
      return 0  # it has ended since
    tokens, sampling, prompt_len = self.requests[id]
    assert len(tokens) == position, f'request {id}: {len(tokens)}, {position}'
    early = position - prompt_len < sampling.min_tokens
    tokens.append(next_token(
        tokens, sampling, self.vocab_size,
        ends_of(sampling, self.eos_ids) if early else ()))
    return tokens[-1]

  def _output(self, tokens):
    """A step's output; its token is always the likeliest."""
    token_R = np.array(tokens, np.int32)
    rank_A = np.arange(MAX_LOGPROBS, dtype=np.int32)
    return Sampled(Late(token_R, self.pace),
                   np.full(len(tokens), -1, np.float32),
                   (token_R[:, None] + rank_A[None]) % self.vocab_size,
                   np.tile(-1 - rank_A.astype(np.float32), (len(tokens), 1)))


class FakeRoute:
  """Stands for migration.Route."""

  def __init__(self, source, target):
    self.source, self.target = source, target

  def warm(self, checksum=False):
    pass

  def start(self, command, checksum=False):
    # With the first parts of a stream the target has nothing of it yet.
    there = () if command.kept else (self.source, self.target)
    for engine in there[:2 - command.more]:
      tokens, *_ = engine.requests[command.id]
      # By more: a part of a prompt.
      assert len(tokens) > command.hit + command.num_tokens
    return FakeTransfer(command, checksum)


class FakeHost:
  """Stands for host_memory.HostMemory: a copy takes a poll or two. fails: the
  kind of copies that fail."""

  def __init__(self):
    self.copied_bytes, self.copies, self.fails = 0, [], ()

  @property
  def busy(self):
    return bool(self.copies)

  def clear(self):
    self.copies.clear()

  def warm(self):
    pass

  def offload(self, command):
    assert len(set(command.slots)) == len(command.pages) == len(command.slots)
    self.copies.append((command, Late(0, Pace())))

  load = offload

  def poll(self, lease_s):
    for command, late in list(self.copies):
      if late.is_ready():
        self.copies.remove((command, late))
        self.copied_bytes += PAGE_BYTES * len(command.pages)
        yield command, (RuntimeError('a fake fault')
                        if isinstance(command, self.fails) else None)


class FakeTransfer:
  """Stands for migration.Transfer."""

  def __init__(self, command, checksum):
    self.command, self.checksum, self.landed = command, checksum, False
    self.bytes = PAGE_BYTES * len(command.source_pages)
    self.start_s, self._kv = time.perf_counter(), Late(0, Pace())

  def has_arrived(self):
    return self._kv.is_ready()

  def land(self):
    self.landed = True

  def is_ready(self):
    return self.landed

  def check(self):
    pass

  def drop(self):
    pass

"""Requests under load while roles flip and rows move; tokens as without.

First some of the requests are served by instances that keep their role, so
that each job is served once: its tokens are what it must give from then on.
Then all of them, while after every so many arrivals the next instance takes
the next role, and rows move to where there are fewer. As many requests live at
a time as instances hold, so there is always work of each kind.

A pause is the time between two tokens of one request.
"""

import contextlib
import dataclasses
import random
import time
import types
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

import dsjax
from dsjax.checkpoints.checkpoint import Model
from dsjax.config.engine import EngineConfig
from dsjax.config.placement import Placement
from dsjax.scheduling import prefix_cache, scheduler
from dsjax.scheduling.events import Flip, Migrate
from dsjax.scheduling.policy import Move, Policy
from experiments.common import machine
from experiments.verify.held import counted

CONFIG = EngineConfig(max_len=32, max_seqs=8, prefill_tokens=64,
                      prefill_seqs=8, least_tokens=64, checksum=True)
ROLES = ('prefill', 'decode', 'chunked', 'colocated')
JOBS = 32
LIVE = 2  # times the places of all instances
CALM = 10  # one in so many requests is served without flips first


def restless(flips: int, count: int) -> Policy:
  """A policy that flips so often in `count` requests, of which there are as
  many at least; a function of what it sees, so that the log replays.

  It is asked at every arrival: between two that are further apart several
  instances would be due, and one that is due twice flips once.
  """
  def resize(view):
    seen = [request.order for i in view.instances for request in (
        *i.waiting(), *i.prefilling(), *i.pulls(), *i.rows())]
    step = (max(seen, default=-1) + 1) * (flips + 2) // count
    most = len(view.instances)
    return {i.index: ROLES[(2 + (step + most - 1 - i.index) // most) % 4]
            for i in view.instances}

  def rebalance(view):
    by_rows = sorted(view.may_decode, key=lambda i: i.num_rows)
    few, many = by_rows[0], by_rows[-1]
    if many.num_rows - few.num_rows < 3:
      return []
    return [Move(many.rows()[-1].id, few.index)]

  return dataclasses.replace(dsjax.DISTSERVE, name='restless', tick_s=1e-9,
                             resize=resize, rebalance=rebalance)


def make_jobs(vocab_size: int, config: EngineConfig, seed: int
              ) -> list[tuple[list[int], dict[str, Any]]]:
  """[(prompt ids, parameters)]: short ones, greedy and drawn in turn."""
  draw, jobs = random.Random(seed), []
  for n in range(JOBS):
    prompt = [draw.randrange(3, vocab_size)
              for _ in range(draw.randint(1, 7))]
    drawn = {'temperature': 0.9, 'seed': n} if n % 2 else {}
    jobs.append((prompt, {'max_tokens': draw.randint(2, 5),
                          'ignore_eos': True, **drawn}))
  return jobs


def serve(model: Model, placement: Placement, config: EngineConfig,
          policy: Policy, jobs: Sequence[tuple[list[int], dict[str, Any]]],
          count: int, show: Any, cluster: str | None = None
          ) -> dict[str, Any]:
  """A dict of what `count` requests for these jobs, in turn, came to."""
  seen = {'flips': 0, 'hand_offs': 0}

  def observe(_, commands):
    for command in commands:
      seen['flips'] += isinstance(command, Flip)
      seen['hand_offs'] += isinstance(command, Migrate)

  with contextlib.ExitStack() as stack:
    server = stack.enter_context(dsjax.serve(
        model, placement, config, policy=policy, keep_events=1,
        report=show.warming, cluster=cluster))
    compiled = stack.enter_context(machine.compilations())
    server.observers.append(observe)
    most = LIVE * config.max_seqs * len(server.engines)
    began, live, tokens, pauses, lost = time.perf_counter(), {}, [], [], []
    for n in range(count):
      prompt, params = jobs[n % len(jobs)]
      live[server.submit(prompt, **params)] = n
      while len(live) >= most or n + 1 == count and live:
        server.poll()
        for id in [id for id in live if server.requests[id].finished]:
          job = live.pop(id) % len(jobs)
          tokens.append((job, tuple(server.requests[id].tokens)))
          record = server.forget(id)
          lost += [id] * (record.status not in ('stop', 'length'))
          pauses += record.itl_s
        show(len(tokens), count, seen['flips'])
    scheduler.check(server.state)
    told = counted(server) if cluster else []
    leaked = sum(c.requests + c.offers + c.pulls for c in told)
    leaked += sum(inst.pool.num_pages - prefix_cache.num_free(inst.pool)
                  for inst in server.state.instances)
    leaked += sum(config.max_seqs - len(e.spare) for e in server.engines)
    return {'requests': len(tokens), 'tokens': tokens, 'lost': len(lost),
            'leaked': leaked, 'compiled': len(compiled) + sum(
                c.compiled for c in told), **seen,
            'faults': len(server.faults),
            'longest_pause_s': max(pauses), 'seconds':
            time.perf_counter() - began}


def compare(model: Model, placement: Placement, config: EngineConfig,
            options: types.SimpleNamespace, show: Any,
            cluster: str | None = None) -> dict[str, Any]:
  """The dict of a whole comparison; 'failed checks' names those that did."""
  jobs = make_jobs(model.config.vocab_size, config, options.seed)
  count = options.requests
  calm, live = (serve(model, placement, config, policy, jobs, n, show, cluster)
                for policy, n in (
                    (dsjax.DISTSERVE, max(len(jobs), count // CALM)),
                    (restless(options.flips, count), count)))
  want = dict(calm.pop('tokens'))
  live['wrong'] = sum(tokens != want[job] for job, tokens in live.pop('tokens'))
  failed = [name for name in ('lost', 'leaked', 'compiled', 'wrong', 'faults')
            if live[name]]
  failed += ['flips'] * (live['flips'] < options.flips)
  failed += ['requests'] * (live['requests'] != count)
  return {'without flips': calm, 'with flips': live, 'failed checks': failed}


def table(result: Mapping[str, Any]) -> Table:
  """A rich Table of a comparison."""
  shown = Table('', 'without flips', 'with flips')
  calm, live = result['without flips'], result['with flips']
  for name, value in live.items():
    before = calm.get(name, 0)
    shown.add_row(name.replace('_', ' '), *[
        f'{x:.2f}' if isinstance(x, float) else f'{x:,}'
        for x in (before, value)])
  return shown

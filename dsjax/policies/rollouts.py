"""Rollouts: the simulator plays the load of late, before a decision.

The lengths are rounded to steps of STEP, and the rate is between two that are
played: so a constant load asks few questions, an answer does not jump where the
load changes a little, and it is a function of the view.

A rollout begins with as many rows as the load has in the long run: to fill an
empty system with long outputs takes longer than a rollout, and until then
steps have room for prompts that they will not have.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from dsjax.analysis.metrics import slo_scale
from dsjax.config.engine import InstanceConfig
from dsjax.config.latency import Latency, LinkLike
from dsjax.config.placement import Slo
from dsjax.config.request import Request, Sampling
from dsjax.policies.predict import least_output, sigma_of
from dsjax.policies.roles import usable
from dsjax.policies.static import ONCE_S
from dsjax.scheduling.pace import Paced
from dsjax.scheduling.policy import Load, Policy, View
from dsjax.scheduling.state import Config
from dsjax.simulation import simulator
from dsjax.simulation.running import Running

STEP = 1.15
CV_STEP = 1.5  # of the spread of outputs, which is known less well
LIVES = 5  # that a rollout lasts, each as long as objectives allow one
LEAST, MOST = 200, 800  # requests of it
LEAST_KNOWN = 0.25  # of Load.lives: with fewer nothing is decided
WELL_KNOWN = 0.75  # of Load.lives: with fewer a change must win as much more
SEEN = 1 / 3  # weight of what is seen of the roles of now, where it is more
GRAIN = 0.05  # of the share that a rollout must beat
NOISE = 0.05  # of a rollout's share: a change of roles must win more
SETTLES = 20  # times that a step is predicted from the rows that it makes
MOST_LEN = 16  # times the mean of lengths
UNCOUNTED = 5  # one of so many requests, the first, does not count
QUEUED = 0.5  # of TTFT, whose arrivals wait already: no more than do not count
ERRORS = (0, -1, 1)  # of the rate, in standard errors: of draws of requests
CUTS = 8  # times that lengths are made longer for what is cut off them
LEAST_TOLD = 100  # requests: told from fewer, a rate has the error of so many
DRAWN = 1000  # lengths that rows are drawn from
TIE = 0.01  # of a share: choices so near to the best are equal

Roles = tuple[str, ...]


class Played(NamedTuple):
  """Of a rollout: the share that attains, and the least factor on both
  objectives at which half of them would."""

  share: float
  scale: float


LOST = Played(0.0, math.inf)


def rounded(load: Load) -> tuple[Load, Load, float]:
  """Two loads in steps of STEP (of spread: CV_STEP), a lighter and a heavier
  one, and how near to the second it is: from 0 to 1.

  Where lengths are rounded up the rate is lower, and the other way round."""
  lengths = [step ** round(math.log(max(value, 1e-6), step)) for value, step in
             zip(load[1:5], (STEP, STEP, CV_STEP, CV_STEP), strict=True)]
  longest = math.ceil(STEP ** math.ceil(
      math.log(max(load.longest_prompt, 1), STEP)))
  rate_per_s = load.rate_per_s * math.sqrt(
      load.prompt_len / lengths[0] * load.output_len / lengths[1])
  place = math.log(rate_per_s, STEP)
  light = math.floor(place)
  lighter, heavier = [Load(STEP**step, *lengths, longest_prompt=longest)
                      for step in (light, light + 1)]
  return lighter, heavier, place - light


def settled(latency: Paced) -> Paced:
  """A latency whose corrections are in steps of a tenth."""
  return Paced(latency.base, round(latency.prefill, 1),
               round(latency.decode, 1))


def hopeless(latencies: Sequence[Latency], load: Load, slo: Slo) -> bool:
  """Whether even a lone request with a prompt of one token would miss, where it
  prefills and decodes best. Outputs of one token miss no TPOT: it counts where
  all but one of twenty have more. The host's time is left out, as several steps
  may share it."""
  first_s = min([latency.prefill_s(((0, 1),)) for latency in latencies])
  step_s = min([latency.decode_s(1, 1) for latency in latencies])
  return first_s > slo.ttft_s or (
      step_s > slo.tpot_s and least_output(load) >= 2)


def better(policy: Policy, slo: Slo, view: View, choices: Sequence[Roles],
           attained: float = 0.0) -> dict[int, str]:
  """The roles of the choice that attains most under the load of late.

  Of those that are equal within TIE, the one that is furthest from missing.
  None change unless it attains more than those of now with each draw of
  requests: at the rate that is told, at one less and one more by its standard
  error, and with the load as it is. And by NOISE on average, or more where
  little is known of outputs: so nothing swings at a constant load. Where those
  of now attain all but NOISE nothing else is played; nor where objectives are
  such that nothing attains.

  Args:
    policy: of each step. choices: of the flexible instances that are there.
      Others play their own role.
    attained: the share that attains with the roles of now, as far as is seen.
      Where a rollout tells less of them this counts too, by SEEN: near what
      they hold it depends on little.
  """
  load = view.load
  if not choices or load.rate_per_s <= 0 or load.lives < LEAST_KNOWN:
    return {}  # nothing to choose, or too little is known
  instances = usable(view)
  latencies = tuple([settled(instance.latency) for instance in instances])
  if hopeless(latencies, load, slo):
    return {}
  play_load = functools.partial(
      played, policy, slo, tuple([dataclasses.replace(
          i.config, host_pages=0) for i in instances]), latencies, view.link)
  error = 1 / math.sqrt(max(load.arrived, LEAST_TOLD))
  plays = [functools.partial(
      between, functools.partial(play_load, seed=seed), *rounded(
          load._replace(rate_per_s=load.rate_per_s * (1 + errors * error))))
           for seed, errors in enumerate(ERRORS)]
  now = tuple([i.role for i in instances])

  def of_all(roles: Roles) -> Roles:
    given = iter(roles)
    return tuple([next(given) if i.flips else i.role for i in instances])

  def of_now(play: Callable[[Roles, float], Played]) -> float:
    share = play(now, 0.0).share
    return share + SEEN * max(0.0, attained - share)

  now_share = of_now(plays[0])
  if now_share + NOISE >= 1:
    return {}
  ahead: dict[Roles, Played] = {}
  least = now_share + NOISE / 2  # other draws may tell more
  for roles in map(of_all, choices):
    if roles == now:
      continue
    outcome = plays[0](roles, least)
    if outcome.share > least:
      ahead[roles] = outcome
      least = max(least, outcome.share - TIE)
  best = min([roles for roles in ahead if ahead[roles].share >= least],
             key=lambda roles: ahead[roles].scale, default=now)
  if best == now:
    return {}
  gains = []
  for play in (*plays, functools.partial(play_load, load)):  # the dearest last
    share = of_now(play)
    gains.append(play(best, share).share - share)
    if gains[-1] <= 0:
      return {}
  if sum(gains) / len(gains) <= NOISE * max(1.0, WELL_KNOWN / load.lives):
    return {}
  return {i.index: role for i, role in zip(instances, best, strict=True)
          if role != i.role}


def between(play_load: Callable[[Load, Roles, float], Played], light: Load,
            heavy: Load, weight: float, roles: Roles, least: float) -> Played:
  """What comes of a load between two, of which the second one has this
  weight; less than that where a smaller share than `least` attains."""
  def grain(share: float) -> float:  # so that answers are shared
    return math.floor(min(max(share, 0.0), 1.0) / GRAIN) * GRAIN

  more = Played(1.0, 1.0)
  if weight > 0:
    more = play_load(heavy, roles, grain((least - 1 + weight) / weight))
    if more is LOST:
      return LOST
  less = play_load(light, roles, grain(
      (least - weight * more.share) / (1 - weight)))
  return Played(*[weight * high + (1 - weight) * low
                  for high, low in zip(more, less, strict=True)])


def played(policy: Policy, slo: Slo, configs: tuple[InstanceConfig, ...],
           latencies: tuple[Latency, ...], link: LinkLike, load: Load,
           roles: Roles, least: float, seed: int = 0) -> Played:
  """What comes of these roles under the load; LOST where a smaller share than
  `least` attains, as it is not played on then."""
  known = remembered(policy, slo, configs, latencies, link, load, roles, seed)
  asked, outcome = known[0]
  if least < asked > outcome.share:  # not played to its end, nor for as little
    outcome = _play(policy, slo, configs, latencies, link, load, roles, least,
                    seed)
    known[0] = least, outcome
  return outcome if outcome.share >= least else LOST


@functools.lru_cache(maxsize=4096)
def remembered(*question: object) -> list[tuple[float, Played]]:
  """What is known of a rollout, one entry: the least share that was asked for,
  and what came of it. At first nothing; where at least that share attained, it
  was played to its end, which answers for any."""
  del question
  return [(math.inf, LOST)]


def _play(policy: Policy, slo: Slo, configs: tuple[InstanceConfig, ...],
          latencies: tuple[Latency, ...], link: LinkLike, load: Load,
          roles: Roles, least: float, seed: int) -> Played:
  """What comes of these roles under the load; or of those that ended before
  it was clear that a smaller share than `least` attains."""
  homes = homes_of(roles, configs)
  token_s = settled_token_s(load, slo, latencies, roles, homes)
  sent = requests_like(load, slo, seed)
  rows = rows_like(load, seed, token_s, homes)
  fixed = dataclasses.replace(policy, tick_s=ONCE_S, resize=functools.partial(
      _always, tuple([(index, role) for index, role in enumerate(roles)
                      if configs[index].flips])))
  longest = max([len(r.prompt) + (r.sampling.max_tokens or 0) for r in sent]
                + [r.prompt_len + r.so_far + r.more for r in rows])
  config = Config(configs, longest, depth=1, policy=fixed)
  first = len(sent) // UNCOUNTED
  most_missed = (1 - least) * (len(sent) - first)
  due = sorted([(r.arrival_s + slo.ttft_s + slo.tpot_s * (
      r.sampling.max_tokens or 1), r.id) for r in sent[first:]], reverse=True)
  scales: list[float] = []
  ended, missed = set(), set()
  for record in simulator.stream(config, sent, latencies, link,
                                 rows=rows):
    ended.add(record.id)
    if first <= record.id < len(sent):
      scales.append(slo_scale(record, slo))
      if scales[-1] > 1:
        missed.add(record.id)
    now_s = record.finish_s or 0.0
    while due and due[-1][0] < now_s:
      _, id = due.pop()
      if id not in ended:
        missed.add(id)  # it will
    if len(missed) > most_missed:
      break
  hits = sum([scale <= 1 for scale in scales])
  scales.sort()
  return Played(hits / (len(sent) - first),
                scales[len(scales) // 2] if scales else math.inf)


def _always(roles: tuple[tuple[int, str], ...], view: View) -> dict[int, str]:
  del view
  return dict(roles)


def homes_of(roles: Roles, configs: Sequence[InstanceConfig]) -> list[int]:
  """Instances that decode. Where none has such a role, as those that had are
  lost, those that are able to."""
  return [index for index, role in enumerate(roles) if role != 'prefill'] or [
      index for index, config in enumerate(configs) if config.decodes]


def settled_token_s(load: Load, slo: Slo, latencies: Sequence[Latency],
                    roles: Roles, homes: Sequence[int]) -> float:
  """Seconds that a row takes a token in the long run, TPOT at most.

  The least at which as many rows as it makes (Little's law) take so long a
  step, with as many tokens of prompts as arrive meanwhile where they are mixed.
  """
  steps = [(latencies[index], roles[index] != 'decode') for index in homes]
  tokens_per_s = load.rate_per_s * load.prompt_len / max(
      sum([role != 'decode' for role in roles]), 1)
  seconds = 0.0
  for _ in range(SETTLES):
    rows = max(1, round(load.rate_per_s * max(load.output_len - 1, 0) * seconds
                        / len(steps)))
    context = rows * (load.prompt_len + load.output_len / 2)
    piece = ((0, round(tokens_per_s * seconds)),)
    seconds = min(slo.tpot_s, sum([
        latency.host_s + (latency.mixed_s(piece, rows, context) if mixes
                          and piece[0][1] else latency.decode_s(rows, context))
        for latency, mixes in steps]) / len(steps))
  return seconds


@functools.lru_cache(maxsize=64)
def requests_like(load: Load, slo: Slo, seed: int) -> list[Request]:
  """Requests at a load's rate, Poisson, with lengths of its means and
  spreads."""
  life_s = slo.ttft_s + slo.tpot_s * load.output_len
  count = int(min(max(LIVES * life_s * load.rate_per_s, LEAST), MOST))
  rng = np.random.default_rng([seed, 0])
  prompts, outputs = _lengths_like(load, rng, count)
  times = np.cumsum(rng.exponential(1 / load.rate_per_s, count))
  waited_s = min(QUEUED * slo.ttft_s, times[count // UNCOUNTED])
  times = np.maximum(0.0, times - waited_s).tolist()
  return [Request(i, time_s, range(prompt), Sampling(max_tokens=output))
          for i, (time_s, prompt, output) in enumerate(
              zip(times, prompts.tolist(), outputs.tolist(), strict=True))]


def rows_like(load: Load, seed: int, token_s: float, homes: Sequence[int]
              ) -> list[Running]:
  """The rows of a system that has served this load for long, in turn on the
  instances that are their homes, where a token takes token_s. One that runs at
  a random time is the likelier the longer its output is."""
  count = min(int(load.rate_per_s * token_s * (load.output_len - 1)), MOST)
  if count < 1:
    return []
  rng = np.random.default_rng([seed, 1])
  prompts, outputs = _lengths_like(load, rng, max(DRAWN, count))
  tokens = outputs - 1  # the first one makes it a row
  if not tokens.any():
    return []
  drawn = rng.choice(len(tokens), count, p=tokens / tokens.sum())
  rows = []
  for number, (place, share) in enumerate(
      zip(drawn.tolist(), rng.random(count).tolist(), strict=True)):
    so_far = 1 + int(share * tokens[place])
    rows.append(Running(MOST + number, homes[number % len(homes)],
                        int(prompts[place]), so_far,
                        int(tokens[place]) + 1 - so_far, -so_far * token_s))
  return rows


def _lengths_like(load: Load, rng: np.random.Generator, count: int
                  ) -> tuple[np.ndarray, np.ndarray]:
  """Lengths of prompts and of outputs: lognormal, no prompt longer than the
  longest of the load."""
  lengths = []
  for mean, cv, longest in (
      (load.prompt_len, load.prompt_cv, load.longest_prompt),
      (load.output_len, load.output_cv, 0)):
    sigma = sigma_of(cv)
    drawn = np.exp(rng.normal(-sigma**2 / 2, sigma, count))
    most = max(longest, mean) if longest else MOST_LEN * mean
    scale = mean
    for _ in range(CUTS):  # what is cut off is made up for by the others
      scale *= mean / np.minimum(scale * drawn, most).mean()
    lengths.append(np.rint(np.clip(scale * drawn, 1, most)).astype(int))
  return lengths[0], lengths[1]

"""Flexible instances: roles that change, rows that move, requests refused."""

import asyncio
import dataclasses
import random

import pytest

import dsjax
from dsjax.config.request import Sampling
from dsjax.runtime.output import RequestFailed
from dsjax.scheduling.events import Flip, Migrate, Reject, RunDecode
from dsjax.scheduling.policy import DISTSERVE, Move, Refuse
from tests.common import fake_engine, serving
from tests.common.serving import LONG, MIXED, PAGES_4, job

pytestmark = pytest.mark.usefixtures('no_hang')
FEW_STEPS = dataclasses.replace(PAGES_4, least_tokens=48)
ROLES = ('prefill', 'decode', 'chunked', 'colocated')


def next_roles(view):
  """Each instance has the next role, no two of them the same."""
  return {i.index: ROLES[(ROLES.index(i.role) + 1 + i.index) % 4]
          for i in view.instances}


def even_out(view):
  """A row goes from the instance with the most to the one with the fewest."""
  by_rows = sorted(view.may_decode, key=lambda i: i.num_rows)
  fewest, most = by_rows[0], by_rows[-1]
  return ([Move(most.rows()[0].id, fewest.index)]
          if most.num_rows > fewest.num_rows else [])


def to_the_fewest(view, request, avoid):
  """Hands off whenever another instance holds fewer requests."""
  return min(view.may_decode, key=lambda i: (
      i.index == avoid, i.residents + i.num_pulls, i.index)).index


RESTLESS = dataclasses.replace(
    DISTSERVE, name='restless', tick_s=1e-9, resize=next_roles,
    rebalance=even_out, hand_off=to_the_fewest)


def commands_of(server, kind):
  return [c for _, commands in server.log for c in commands
          if type(c) is kind]


def moved(server):
  """Ids of rows that went on elsewhere."""
  decoded, moves = {}, []
  for _, commands in server.log:
    for command in commands:
      if isinstance(command, RunDecode):
        decoded.update(dict.fromkeys([r.id for r in command.rows], True))
      elif isinstance(command, Migrate) and decoded.get(command.id):
        moves.append(command.id)
  return moves


def test_hundreds_of_flips_and_moves_lose_nothing():
  """On fake engines: tokens equal, nothing leaked, nobody passed over."""
  draw = random.Random(0)
  work = [job(draw.randint(1, 30), draw.randint(1, 25), n)
          for n in range(300)]
  with serving.fake_server_of('2flexible', policy=RESTLESS) as server:
    outputs = serving.play(server, work, between=2)
    serving.check_tokens(work, outputs, serving.expected_of_fakes)
    assert len(commands_of(server, Flip)) > 60
    assert len(moved(server)) > 60
    assert any(len(o.record.instances) > 1 for o in outputs)


def test_an_instance_lost_between_flips():
  with serving.fake_server_of('2flexible', policy=RESTLESS) as server:
    ids = [server.submit(prompt, **params) for prompt, params in MIXED]
    for n in range(40):
      server.poll()
      if n in (7, 23):
        server.kill(n % 2, back_s=0.0)
    serving.drain(server, faulty=True)
    work = [dataclasses.replace(server.output(id)) for id in ids]
    serving.check_tokens(MIXED, work, serving.expected_of_fakes)


def test_tokens_of_the_real_engine_are_those_without_flips():
  """And nothing is compiled by a flip."""
  work = (*MIXED, *LONG)
  with serving.server_of('2flexible', FEW_STEPS, policy=RESTLESS) as server:
    with serving.compilations() as compiled:
      outputs = serving.play(server, work)
    serving.check_tokens(work, outputs)
    assert len(commands_of(server, Flip)) > 60 and moved(server)
  assert not compiled


def refuse_long(view, request):
  if request.input_len > 10:
    return Refuse(f'{request.input_len} tokens are too many now')
  return view.prefills[0].index


def test_a_refused_request_is_told_why_and_others_go_on():
  policy = dataclasses.replace(DISTSERVE, name='short only',
                               route=refuse_long)
  with serving.fake_server_of('1p1d', policy=policy) as server:
    short, params = job(5)
    with pytest.raises(RequestFailed, match='20 tokens are too many now'):
      server.submit(job(20)[0], **params)
    output, = server.generate_all([short], **params)
    assert output.tokens == serving.expected_of_fakes(
        short, Sampling(**params))
    refused, = commands_of(server, Reject)
    assert refused.refused
    with pytest.raises(RequestFailed, match='20 tokens are too many') as e:
      server.generate_all([short, job(20)[0]], **params)
    assert [o.reason for o in e.value.outputs] == [output.reason, 'refused']
    one, other = server.generate_all([job(20)[0], short], errors='return',
                                     **params)
    assert (one.reason, one.tokens) == ('refused', ())
    assert other.tokens == output.tokens


def test_a_refusal_of_an_async_server():
  policy = dataclasses.replace(DISTSERVE, name='short only',
                               route=refuse_long)

  async def run():
    async with dsjax.serve_async(
        serving.MODEL, 'prefill=1x1,decode=1x1', serving.PAGES_4,
        make_engine=fake_engine.FakeEngine, policy=policy) as server:
      with pytest.raises(RequestFailed, match='20 tokens are too many'):
        await server.generate(job(20)[0], max_tokens=4)
      return await server.generate(job(5)[0], max_tokens=4)

  assert len(asyncio.run(run()).tokens) == 4

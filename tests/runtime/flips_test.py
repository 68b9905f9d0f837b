"""Flexible instances: roles change, rows move, prompts are split."""

import asyncio
import dataclasses
import random

import pytest

import dsjax
from dsjax.config.request import Sampling
from dsjax.runtime.output import RequestFailed
from dsjax.scheduling.events import (
  Flip,
  Migrate,
  Reject,
  RunDecode,
  RunPrefill,
)
from dsjax.scheduling.policy import DISTSERVE, Move, Refuse, Split, may_go_on
from tests.common import fake_engine, serving
from tests.common.serving import LONG, MIXED, PAGES_4, job

pytestmark = pytest.mark.usefixtures('no_hang')
ROLES = ('prefill', 'decode', 'chunked', 'colocated')


def next_roles(view):
  """Each instance has the next role, no two of them the same."""
  return {i.index: ROLES[(ROLES.index(i.role) + 1 + i.index) % 4]
          for i in view.instances if i.flips}


def even_out(view):
  """A row goes from the instance with the most to the one with the fewest."""
  fewest = min(view.may_decode, key=lambda i: i.num_rows)
  return [Move(most.rows()[0].id, fewest.index) for most in view.instances
          if most.flips and most.num_rows > fewest.num_rows][:1]


def to_the_fewest(view, request, avoid):
  """Hands off whenever another instance holds fewer requests."""
  return min(view.may_decode, key=lambda i: (
      i.index == avoid, i.residents + i.num_pulls, i.index)).index


def in_parts(view, request):
  """Cuts every prompt, anywhere or where a page ends; parts go elsewhere."""
  places = may_go_on(view, request) if request.done else view.may_prefill
  places = [i for i in places if i.index != request.instance] or places
  place = places[(request.id + request.done) % len(places)]
  left = request.prompt_len - request.done
  cut = request.done + 1 + (7 * request.id + request.done) % left
  if request.id // 2 % 2:
    page = place.config.page_size
    cut = min(-(-cut // page) * page, request.prompt_len)
  if cut == request.prompt_len or place.config.decodes and not place.flips:
    return place.index
  return Split(place.index, cut)


RESTLESS = dataclasses.replace(
    DISTSERVE, name='restless', tick_s=1e-9, resize=next_roles,
    rebalance=even_out, hand_off=to_the_fewest)
SPLITTING = dataclasses.replace(RESTLESS, name='splitting', route=in_parts)


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


def parts(server):
  """(tokens, page size) of each hand-off of a part of a prompt."""
  last, sent = {}, []
  for _, commands in server.log:
    for command in commands:
      if isinstance(command, RunPrefill):
        last.update({chunk.id: chunk.last for chunk in command.chunks})
      elif isinstance(command, Migrate) and not last[command.id]:
        sent.append((command.num_tokens, server.config.page_size))
  return sent


@pytest.mark.parametrize('policy', (RESTLESS, SPLITTING))
def test_hundreds_of_flips_and_moves_lose_nothing(policy):
  """On fake engines: tokens equal, nothing leaked, nobody passed over."""
  draw = random.Random(0)
  work = [job(draw.randint(1, 30), draw.randint(1, 25), n)
          for n in range(300)]
  with serving.fake_server_of('2flexible', policy=policy) as server:
    outputs = serving.play(server, work, between=2)
    serving.check_tokens(work, outputs, serving.expected_of_fakes)
    assert len(commands_of(server, Flip)) > 60
    assert len(moved(server)) > 60
    sent = parts(server)
    assert (len(sent) > 60) == (policy is SPLITTING)
    assert {count % size == 0 for count, size in sent} == (
        {True, False} if policy is SPLITTING else set())
    assert any(len(o.record.instances) > 1 for o in outputs)


@pytest.mark.parametrize('policy', (RESTLESS, SPLITTING))
def test_an_instance_lost_between_flips(policy):
  with serving.fake_server_of('2flexible', policy=policy) as server:
    ids = [server.submit(prompt, **params) for prompt, params in MIXED]
    for n in range(40):
      server.poll()
      if n in (7, 23):
        server.kill(n % 2, back_s=0.0)
    serving.drain(server, faulty=True)
    work = [dataclasses.replace(server.output(id)) for id in ids]
    serving.check_tokens(MIXED, work, serving.expected_of_fakes)


PAGES_OF_16 = dataclasses.replace(PAGES_4, page_size=16, num_pages=6)
DEEP = pytest.mark.deep
MATRIX = (
    pytest.param('2flexible', PAGES_4, id='pages of 4'),
    pytest.param('2flexible', PAGES_OF_16, marks=DEEP, id='pages of 16'),
    pytest.param('2flexible', dataclasses.replace(
        PAGES_OF_16, kv_dtype='int8'), marks=DEEP, id='int8 on pages of 16'),
    pytest.param('flexible_pp2', PAGES_4, marks=DEEP, id='pp'),
    pytest.param('mixed', PAGES_4, marks=DEEP, id='prefill and chunked'))


@pytest.mark.parametrize('mode, config', MATRIX)
def test_tokens_of_the_real_engine_are_those_of_one_that_stays(mode, config):
  """Roles change, rows move, prompts are split; nothing is compiled by it."""
  work = (*MIXED, *LONG)
  config = dataclasses.replace(config, checksum=True)
  with serving.server_of(mode, config) as server:
    want = [output.tokens for output in serving.play(server, work)]
  with serving.server_of(mode, config, policy=SPLITTING) as server:
    with serving.compilations() as compiled:
      outputs = serving.play(server, work)
    assert [output.tokens for output in outputs] == want
    if config.kv_dtype is None:
      serving.check_tokens(work, outputs)
    assert parts(server)
    if 'flexible' in mode:
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

"""Policies on a server: what one answers wrongly is told, and nothing hangs."""

import dataclasses
import time

import pytest

import dsjax
from dsjax.config.checks import InputError
from dsjax.config.placement import Slo
from dsjax.policies import named
from dsjax.scheduling.policy import DISTSERVE, PolicyError
from dsjax.simulation import latency
from tests.common import fake_engine, serving
from tests.common.serving import MODEL, MODES

pytestmark = pytest.mark.usefixtures('no_hang')
PROMPTS = [[5] * n for n in (3, 9, 6, 12)]


def server_of(**hooks):
  return serving.server_of(
      '1p1d', make_engine=fake_engine.FakeEngine,
      policy=dataclasses.replace(DISTSERVE, name='mine', **hooks))


def late(good, answers):
  """A hook that answers badly after so many good answers."""
  left = [answers]

  def hook(*args):
    left[0] -= 1
    return good(*args) if left[0] >= 0 else 7

  return hook


@pytest.mark.parametrize('good', (0, 1, 2))
@pytest.mark.parametrize('hook', ('route', 'hand_off'))
def test_a_bad_answer_fails_every_request_and_closes(hook, good):
  bad = late(getattr(DISTSERVE, hook), good)
  with server_of(**{hook: bad}) as server:
    with pytest.raises(PolicyError, match=f'hook {hook}: answered 7'):
      server.generate_all(PROMPTS, max_tokens=4)
    assert server.closed and not server.busy and not server.unfinished
    assert all(r.status in ('failed', 'length') for r in server.records)
    with pytest.raises(InputError, match='closed'):
      server.generate([3])


def test_what_a_hook_raises_comes_out_of_stream_too():
  def fails(view, request):
    raise KeyError('cost')

  with server_of(route=fails) as server:
    with pytest.raises(PolicyError, match="route: raised KeyError: 'cost'"):
      list(server.stream([3]))
    assert server.closed


def test_a_policy_that_lets_nothing_start_is_an_error_and_no_hang():
  with server_of(admit=lambda *_: False) as server:
    with pytest.raises(PolicyError, match='lets none of the 4 requests'):
      server.generate_all(PROMPTS, max_tokens=4)
    assert server.closed


def test_back_pressure_is_asked_again():
  """Prompts wait while two rows decode; all end."""
  def admit(view, instance, request, pages):
    return instance.decodes or view.decodes[0].residents < 2

  with server_of(admit=admit) as server:
    outputs = server.generate_all(PROMPTS * 3, max_tokens=4, ignore_eos=True)
    assert [len(o.tokens) for o in outputs] == [4] * 12


@pytest.mark.parametrize('options, text', [
    (dict(policy=None), 'policy=None: must be a dsjax.Policy'),
    (dict(placement='prefill=1x1'), 'instances that prefill and'),
    (dict(placement=5), 'placement=5: must be a Placement or its text')])
def test_bad_input_is_named(options, text):
  options = dict(placement=MODES['1p1d'][0]) | options
  with pytest.raises(InputError, match=text):
    dsjax.serve(MODEL, **options)


def test_prompts_are_a_list():
  with server_of() as server:
    with pytest.raises(InputError, match="prompts='abc'"):
      server.generate_all('abc')


LINK = latency.Link(1e-3, 1e9, 100)


@pytest.mark.parametrize('down', (0, 1))
@pytest.mark.parametrize('mode, name', [
    *[('2flexible', name) for name in named.NAMES],
    # The others mix rows with prompts, or predict copies.
    *[('1p1d', name) for name in named.NAMES
      if name not in ('chunked', 'dynaserve', 'ppd', 'taichi')]])
def test_a_named_policy_waits_for_the_only_instance_of_a_phase(
    mode, name, down):
  with serving.fake_server_of(
      mode, policy=named.named(name, Slo(1.0, 1.0)),
      latency='roofline:h100-80g', link=LINK) as server:
    server.kill(down, 60.0)
    server.poll()
    id = server.submit([5, 6, 7], max_tokens=4)
    for _ in range(20):
      server.poll()
    server.restore(down)
    serving.drain(server, faulty=True)
    assert server.output(id).reason in ('length', 'stop')


@pytest.mark.parametrize('lost', ((0, 1), (2, 3)))
def test_arrow_flips_no_instance_of_a_fixed_role(lost):
  with serving.fake_server_of(
      '2p2d', policy=named.named('arrow:tick_s=0.001', Slo(1.0, 1.0)),
      latency='roofline:h100-80g') as server:
    for index in lost:
      server.kill(index, 60.0)
    id = server.submit([5, 6, 7], max_tokens=4)
    for _ in range(5):
      time.sleep(0.002)
      server.poll()
    for index in lost:
      server.restore(index)
    serving.drain(server, faulty=True)
    assert server.output(id).reason in ('length', 'stop')

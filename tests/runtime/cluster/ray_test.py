"""Instances that Ray starts: two nodes on one machine (15 to 40 s)."""

import importlib.util
import json
import os
import re
import secrets
import socket
import subprocess
import sys

import pytest

import dsjax
from dsjax.config.checks import InputError
from dsjax.config.placement import Placement
from dsjax.runtime.cluster import local, starting
from tests.common.processes import CONFIG, MODEL

HAS_RAY = importlib.util.find_spec('ray') is not None
pytestmark = pytest.mark.usefixtures('no_hang')


@pytest.mark.skipif(HAS_RAY, reason='Ray is installed')
def test_without_ray_one_clear_error_says_what_to_install():
  with pytest.raises(InputError, match=r"pip install 'dsjax\[cluster\]'"):
    dsjax.serve(MODEL, 'colocated=1x1', CONFIG, cluster='ray')


@pytest.mark.parametrize('address', ['127.0.0.1:{}', '[::1]:{}',
                                     'no.host.example:{}', '127.0.0.1:99999'])
def test_a_cluster_that_is_not_there_is_told_before_ray_looks_for_it(address):
  with socket.create_server(('127.0.0.1', 0)) as listens:
    port = listens.getsockname()[1]
    starting.check(f'ray:127.0.0.1:{port}')
  address = address.format(port)
  with pytest.raises(InputError, match=re.escape(
      f"cluster='ray:{address}': must be the address of a Ray cluster")):
    starting.check(f'ray:{address}')


@pytest.mark.skipif(not HAS_RAY, reason="Ray is not installed: pip install "
                    "'dsjax[cluster]'")
def test_a_node_that_is_killed_costs_no_request():
  """Each node has a prefill instance beside its decode instance. One node is
  killed under load: the other ends its requests, and what was lost starts on a
  node that joins."""
  done = subprocess.run(
      [sys.executable, '-m', 'tests.runtime.cluster.two_nodes'],
      capture_output=True, text=True, env=os.environ | {
          'PYTHONPATH': local.settings()['PYTHONPATH'],
          'RAY_USAGE_STATS_ENABLED': '0',
          'RAY_raylet_start_wait_time_s': '300',  # on a loaded machine
          'RAY_AUTH_TOKEN': secrets.token_hex(16)})
  assert not done.returncode, done.stderr[-4000:]
  saw = json.loads(done.stdout.splitlines()[-1])
  assert 'over several hosts' in saw['refused'][0]
  assert 'side by side' in saw['refused'][1]
  nodes = saw['nodes']
  assert nodes[0] == nodes[2] != nodes[1] == nodes[3]
  assert all(saw['before']) and all(saw['after']) and saw['tried_again']
  assert saw['down'] == saw['there'] and len(saw['there']) == 2
  assert saw['lost'] not in saw['again'] and len(set(saw['again'])) == 2
  assert set(saw['bundles']) <= {'REMOVED'}


@pytest.mark.parametrize('text, groups', [
    ('prefill=1x1,decode=1x1', ((0,), (1,))),
    ('prefill=1x1,decode=1x1,aligned', ((0, 1),)),
    ('prefill=1x1,1x1,decode=1x1,aligned', ((0, 1, 2),)),
    ('prefill=2x1,2x1,decode=1x1,1x1,1x1,1x1,aligned',
     ((0, 2, 3), (1, 4, 5))),
    ('prefill=1x1,decode=1x1,colocated=1x1,aligned', ((0, 1), (2,))),
    ('colocated=1x1,1x1,aligned', ((0,), (1,)))])
def test_what_is_aligned_shares_a_node(text, groups):
  placement = Placement.parse(text)
  assert placement.groups == groups
  assert Placement.parse(str(placement)).aligned == placement.aligned

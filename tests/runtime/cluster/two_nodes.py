"""Two nodes of Ray on this machine, one of which is killed under load.

ray_test runs it in a process of its own, as Ray stays in one that has joined
it. The last line that it prints is JSON: what it saw.
"""

import json
import os
import signal

import ray
from ray.cluster_utils import Cluster

import dsjax
from dsjax.config.checks import InputError
from tests.common import processes as here
from tests.common import serving

PLACEMENT = 'prefill=1x1,1x1,decode=1x1,1x1,aligned'
TOO_LARGE = ('colocated=3x1', 'prefill=2x1,decode=1x1,aligned')


def refusals():
  """What is said of placements that no node has room for."""
  said = []
  for text in TOO_LARGE:
    try:
      dsjax.serve(here.MODEL, text, here.CONFIG, cluster='ray')
    except InputError as error:
      said.append(str(error))
  return said


def node_of_each(server):
  """The process id of the raylet of each instance: its process's parent."""
  parents = []
  for engine in server.engines:
    with open(f'/proc/{engine.pid}/stat') as file:
      parents.append(int(file.read().rsplit(') ', 1)[1].split()[1]))
  return parents


def raylet(node):
  """The process id of a node's raylet."""
  return node.all_processes['raylet'][0].process.pid


def main():
  cluster = Cluster()
  try:
    saw = serve(cluster)
  finally:
    ray.shutdown()
    cluster.shutdown()
  print(json.dumps(saw))


def serve(cluster):
  """What is seen of a server on two nodes, one of which is killed."""
  nodes = [cluster.add_node(num_cpus=1, resources={'device': 2},
                            include_dashboard=False) for _ in range(2)]
  ray.init(cluster.address, log_to_driver=False)
  saw = {'refused': refusals()}
  work = here.WORK * 2
  with dsjax.serve(here.MODEL, PLACEMENT, here.CONFIG, cluster='ray',
                   report=lambda *_: None) as server:
    saw['nodes'] = node_of_each(server)
    first = serving.play(server, work)
    saw['before'] = [o.tokens == serving.want(one)
                     for o, one in zip(first, work, strict=True)]
    lost = saw['lost'] = raylet(nodes[1])
    there = [i for i, node in enumerate(saw['nodes']) if node == lost]
    # Stopped first: what is sent there cannot end before the node is killed.
    pids = [server.engines[i].pid for i in there]
    for pid in pids:
      os.kill(pid, signal.SIGSTOP)
    ids = [server.submit(prompt, **params) for prompt, params in work]
    serving.until(lambda: any(server.state.instances[i].residents
                           for i in there), server)
    cluster.remove_node(nodes[1], allow_graceful=False)
    for pid in pids:
      os.kill(pid, signal.SIGKILL)
    serving.until(lambda: not server.busy, server)
    outputs = [server.output(id) for id in ids]
    saw['after'] = [o.tokens == serving.want(one)
                    for o, one in zip(outputs, work, strict=True)]
    saw['tried_again'] = sum(o.record.retries for o in outputs)
    saw['down'], saw['there'] = sorted(server.fleet.down), there
    cluster.add_node(num_cpus=1, resources={'device': 2})
    serving.until(lambda: not server.fleet.down, server)
    saw['again'] = node_of_each(server)
  return saw | {'bundles': [table['state'] for table in (
      ray.util.placement_group_table().values())]}


if __name__ == '__main__':
  main()

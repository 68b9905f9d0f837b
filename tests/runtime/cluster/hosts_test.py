"""Hosts without Ray: the file, who goes where, and two hosts on loopback.

Each host is what is typed there, in a folder of its own; a host that is gone is
its process group, killed.
"""

import contextlib
import itertools
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
import types

import pytest

import dsjax
from dsjax.config.checks import InputError
from dsjax.config.placement import Placement, Plan
from dsjax.runtime.cluster import channel, hosts, local, messages, watch
from dsjax.runtime.cluster import host as runtime_host
from dsjax.scheduling.events import InstanceDown, InstanceUp
from experiments import host
from tests.common import fake_engine, serving
from tests.common.processes import CONFIG, MODEL, WORK, alive, children
from tests.common.serving import check_tokens, expected_of_fakes, play, until

pytestmark = pytest.mark.usefixtures('no_hang')

SILENT_S = 30.0
KEY = '0123456789abcdef' * 4
TWO = {'a': {'address': '127.0.0.1', 'devices': 1},
       'b': {'address': '127.0.0.2', 'devices': 1}}


def write(folder, secret=KEY, mode=0o600, **fields):
  """A hosts file and its key; gives the name of the file."""
  (folder / 'key').write_text(secret + '\n')
  (folder / 'key').chmod(mode)
  fields = {'server': '127.0.0.1:7000', 'key': 'key', 'hosts': TWO} | fields
  (folder / 'hosts.json').write_text(json.dumps(fields))
  return str(folder / 'hosts.json')


def test_a_file_says_what_hosts_there_are(tmp_path):
  group = hosts.read(write(tmp_path))
  assert (group.address, group.port) == ('127.0.0.1', 7000)
  assert group.hosts[1] == hosts.Host('b', '127.0.0.2', 1)
  assert group.number('b') == 1 and len(group.key) == 32
  for text in ('[::1]:7000', '::1:7000'):
    other = hosts.read(write(tmp_path, server=text))
    assert (other.address, other.port) == ('::1', 7000)
  with pytest.raises(InputError, match="host='c': must be one of"):
    group.number('c')


@pytest.mark.parametrize('fields, error', [
    *(({'server': server}, 'server=.*ADDRESS:PORT') for server in (
        '127.0.0.1', 7, None, '127.0.0.1:99999', '127.0.0.1:0', '127.0.0.1:',
        '127.0.0.1:-1', '127.0.0.1:\xb2', '127.0.0.1:\u0663', '127.0.0.1: 7',
        '0.0.0.0:7', '[::]:7', 'a.example:7', 'localhost:7', ':7')),
    *(({'hosts': {'a': {'address': address, 'devices': 1}}},
       'hosts=.*the IP address') for address in (
           'b.example', '0.0.0.0', '::', '127.1', 2130706433, None, [])),
    ({'hosts': TWO | {'c': {'address': '127.0.0.2', 'devices': 1}}},
     'of another address each'),
    ({'hosts': {'a': {'address': '::1', 'devices': 1},
                'b': {'address': '0:0:0:0:0:0:0:1', 'devices': 1}}},
     'of another address each'),
    ({'hosts': TWO | {'b': {'address': '::1', 'devices': 1}}},
     'all of IPv4 or all of IPv6'),
    ({'hosts': {'a': {'address': '127.0.0.1', 'devices': True}}}, 'hosts='),
    ({'key': 'a\0b'}, 'key=.*can be read'), ({'key': '.'}, 'key=.*can be read'),
    ({'hosts': {}}, 'hosts='), ({'hosts': []}, 'hosts='),
    ({'hosts': {'a': {'address': '127.0.0.1'}}}, 'hosts='),
    ({'hosts': {'a': {'address': '127.0.0.1', 'devices': 0}}}, 'hosts='),
    ({'hosts': {'a': {'address': '', 'devices': 1}}}, 'hosts='),
    ({'more': 1}, "an object of 'server'"), ({'key': ''}, 'key='),
    ({'key': 'nothing'}, 'key=.*can be read'), ({'key': 7}, 'key=')])
def test_a_file_that_says_something_else_is_refused(tmp_path, fields, error):
  with pytest.raises(InputError, match=error):
    hosts.read(write(tmp_path, **fields))


@pytest.mark.parametrize('text', ['', '[]', '{', 'null', '\xff', '[' * 10**5],
                         ids=lambda text: text[:9])
def test_what_is_no_object_is_refused(tmp_path, text):
  path = tmp_path / 'hosts.json'
  path.write_bytes(text.encode('latin1'))
  with pytest.raises(InputError, match='^.*/hosts.json[:=]'):
    hosts.read(str(path))
  with pytest.raises(InputError, match='/none: cannot be read'):
    hosts.read(str(tmp_path / 'none'))


def test_a_host_that_is_given_twice_is_refused(tmp_path):
  file = write(tmp_path)
  text = (tmp_path / 'hosts.json').read_text()
  (tmp_path / 'hosts.json').write_text(text.replace('"b"', '"a"'))
  with pytest.raises(InputError, match="hosts.json: .*'a' is given twice"):
    hosts.read(file)


def test_a_key_is_of_one_file(tmp_path):
  """Hosts whose files differ would not agree on who is who."""
  keys = {hosts.read(write(tmp_path, **fields)).key for fields in (
      {}, {'hosts': dict(reversed(TWO.items()))}, {'server': '127.0.0.1:7001'},
      {'secret': KEY[::-1]},
      {'hosts': TWO | {'b': {'address': '127.0.0.2', 'devices': 2}}})}
  assert len(keys) == 5
  assert hosts.read(write(tmp_path)).key in keys


def test_a_key_must_be_long_and_its_owners_alone(tmp_path):
  with pytest.raises(InputError, match='chmod 600'):
    hosts.read(write(tmp_path, mode=0o640))
  with pytest.raises(InputError, match='32 at least'):
    hosts.read(write(tmp_path, secret='short'))
  assert not stat.S_IMODE((tmp_path / 'key').stat().st_mode) & 0o77


@pytest.mark.parametrize('text, devices, places', [
    ('prefill=1x1,decode=1x1', (1, 1), [(0, 0), (1, 0)]),
    ('prefill=1x1,decode=1x1', (2, 2), [(0, 0), (0, 1)]),
    ('prefill=1x1,1x1,decode=1x1,1x1', (2, 2),
     [(0, 0), (0, 1), (1, 0), (1, 1)]),
    ('prefill=1x1,1x1,decode=1x1,1x1,aligned', (2, 2),
     [(0, 0), (1, 0), (0, 1), (1, 1)]),
    ('prefill=2x1,decode=1x1,1x1,aligned', (3, 4), [(1, 0), (1, 2), (1, 3)]),
    ('colocated=2x1,1x1', (1, 2), [(1, 0), (0, 0)])])
def test_instances_are_put_where_there_is_room(text, devices, places):
  assert hosts.assign(Placement.parse(text), devices) == places


@pytest.mark.parametrize('text, devices, error', [
    ('prefill=4x1,decode=1x1', (2, 2), 'an instance over several hosts'),
    ('prefill=1x2,decode=1x1', (1, 1, 1), 'an instance over several hosts'),
    ('prefill=2x1,decode=1x1', (2,), r'fit into hosts of \(2,\)'),
    ('prefill=1x1,decode=1x1,aligned', (1, 1), 'aligned into one')])
def test_what_does_not_fit_is_refused(text, devices, error):
  with pytest.raises(InputError, match=error):
    hosts.assign(Placement.parse(text), devices)


def test_a_key_is_for_one_process():
  made = {hosts.instance_key(KEY.encode(), nonce) for nonce in ('1', '2')}
  assert len(made) == 2 and all(len(key) == 32 for key in made)


# --- two hosts on loopback ---------------------------------------------------


def free_port():
  """One that nothing listens on."""
  with socket.create_server(('127.0.0.1', 0)) as listens:
    return listens.getsockname()[1]


def begin(file, name):
  """What is typed on a host, in a folder of its own."""
  folder = os.path.join(os.path.dirname(file), name)
  os.makedirs(folder, exist_ok=True)
  return subprocess.Popen(
      [sys.executable, '-m', 'experiments.host', f'--hosts={file}',
       f'--name={name}'], cwd=folder, stdout=subprocess.PIPE, text=True,
      start_new_session=True,
      env=os.environ | {
          'PYTHONPATH': local.settings()['PYTHONPATH']})


@contextlib.contextmanager
def two_hosts(folder):
  """The hosts file, and what runs on each host."""
  file = write(folder, server=f'127.0.0.1:{free_port()}')
  there = {name: begin(file, name) for name in TWO}
  try:
    yield file, there
  finally:
    for process in there.values():
      process.kill()
      process.communicate()


@pytest.mark.slow
def test_two_hosts_serve_and_one_that_is_gone_costs_no_request(tmp_path):
  before = children()
  work = [serving.job(4 + n % 9, 8 + n % 7, n) for n in range(24)]
  with two_hosts(tmp_path) as (file, there):
    with dsjax.serve(MODEL, 'colocated=1x1,1x1', CONFIG,
                     cluster=f'hosts:{file}',
                     make_engine=fake_engine.FakeEngine) as server:
      check_tokens(work, play(server, work), expected_of_fakes)
      ids = [server.submit(prompt, **params) for prompt, params in work]
      until(lambda: server.state.instances[1].residents, server)
      gone = server.engines[1].pid
      os.kill(gone, signal.SIGKILL)  # all that runs there
      there['b'].kill()
      until(lambda: not server.busy, server)
      check_tokens(work, [server.output(id) for id in ids], expected_of_fakes)
      assert 1 in server.fleet.down
      there['b'].communicate()
      there['b'] = begin(file, 'b')  # it comes again
      until(lambda: not server.fleet.down, server)
      told = [type(event) for event, _ in server.log]
      assert InstanceDown in told and InstanceUp in told
      pids = [engine.pid for engine in server.engines]
      assert gone not in pids and all(map(alive, pids))
    until(lambda: not any(map(alive, pids)))
    assert all(process.poll() is None for process in there.values())
    with dsjax.serve(MODEL, 'colocated=1x1', CONFIG, cluster=f'hosts:{file}',
                     make_engine=fake_engine.FakeEngine) as server:
      check_tokens(work[:4], play(server, work[:4]), expected_of_fakes)
      pid = server.engines[0].pid
      os.kill(pid, signal.SIGSTOP)  # it does not see that anything has ended
      there['a'].kill()
      until(lambda: not alive(pid))
  assert children() <= before


@pytest.mark.slow
def test_kv_goes_from_host_to_host(tmp_path):
  with two_hosts(tmp_path) as (file, _), dsjax.serve(
      MODEL, Placement(prefill=[Plan()], decode=[Plan()]), CONFIG,
      cluster=f'hosts:{file}') as server:
    check_tokens(WORK, play(server, WORK))
    assert server.copied_bytes


def test_another_key_is_refused(tmp_path):
  port = free_port()
  file = write(tmp_path, server=f'127.0.0.1:{port}')
  (tmp_path / 'other').mkdir()
  other = write(tmp_path / 'other', secret=KEY[::-1],
                server=f'127.0.0.1:{port}')
  remote = hosts.RemoteHost(hosts.read(file), 0, SILENT_S)
  try:
    with begin(other, 'a') as process:
      assert process.wait() == 1 and 'another key' in process.stdout.read()
    assert remote.channel() is None
  finally:
    remote.close()


def test_a_host_that_is_refused_says_why(tmp_path):
  """It is another than that which was awaited on this port."""
  port = free_port()
  group = hosts.read(write(tmp_path, server=f'127.0.0.1:{port}'))
  remote = hosts.RemoteHost(group, 0, SILENT_S)
  try:
    agent = runtime_host.Agent(group._replace(port=port - 1), 1)
    with pytest.raises(InputError, match='not let this host in: .*was awaited'):
      agent.serve()
    until(lambda: remote._door.failed)
    assert remote.channel() is None and not remote._door.failed
    agent = runtime_host.Agent(group, 0)  # the right one still comes in
    until(remote.channel)
    agent.channel.close()
  finally:
    remote.close()


def test_a_host_that_is_another_one_says_so(tmp_path):
  """What is meant for host b was typed on host a."""
  group = hosts.read(write(tmp_path, hosts=TWO | {
      'b': {'address': '192.0.2.1', 'devices': 1}}))
  with pytest.raises(InputError, match='hosts: b: address=.*of this host'):
    runtime_host.serve(group, 1, print)


def test_a_host_says_what_it_waits_for_once(tmp_path, monkeypatch):
  group, said = hosts.read(write(
      tmp_path, server=f'127.0.0.1:{free_port()}')), []
  tries = itertools.count()

  def rest(_):
    if next(tries) == 2:
      raise KeyboardInterrupt

  monkeypatch.setattr(runtime_host, 'time', types.SimpleNamespace(sleep=rest))
  with pytest.raises(KeyboardInterrupt):
    runtime_host.serve(group, 1, said.append)
  assert len(said) == 1 and f'port {group.port + 1}: ' in said[0]
  assert 'refused' in said[0]


def test_what_a_host_sends_that_is_none_of_its_words_is_passed_over(tmp_path):
  port = free_port()
  group = hosts.read(write(tmp_path, server=f'127.0.0.1:{port}'))
  remote = hosts.RemoteHost(group, 0, SILENT_S)
  try:
    agent = runtime_host.Agent(group, 0)
    until(remote.channel)
    agent.channel.send(messages.Ready())
    agent.channel.send(messages.Ended(3, 1, 7))
    until(lambda: remote.channel() and remote.codes)
    assert remote.codes == {(3, 1): 7}
    agent.channel.close()
  finally:
    remote.close()


@pytest.mark.parametrize('answers', [True, False])
def test_a_host_that_is_stopped_is_gone_and_may_come_again(
    tmp_path, monkeypatch, answers):
  """Its socket stays open, and nothing answers: the kernel's part is done."""
  now_s, reads = [100.0], itertools.count()
  clock = types.SimpleNamespace(  # no two reads of it are alike
      monotonic=lambda: now_s[0] + 1e-6 * next(reads), sleep=time.sleep,
      perf_counter=time.perf_counter)
  monkeypatch.setattr(watch, 'time', clock)
  monkeypatch.setattr(channel, 'time', clock)
  group = hosts.read(write(tmp_path, server=f'127.0.0.1:{free_port()}'))
  remote = hosts.RemoteHost(group, 0, SILENT_S)
  try:
    agent = runtime_host.Agent(group, 0)
    serves = threading.Thread(target=agent.serve)
    if answers:
      serves.start()
    first = until(remote.channel)
    for later_s in (0.0, 3600.0, *[1.0] * 28):  # away, then looking
      now_s[0] += later_s
      assert remote.channel()
      if answers:  # before the clock goes on
        until(lambda: first.heard_s >= remote._watch.asked_s)
    assert (remote._watch.asked_s > 3720.0) == answers  # again and again
    now_s[0] += 1.0  # silent for 30 s and 1e-6 for each read of the clock
    assert (remote.channel() is first) == answers
    assert bool(first.ended) != answers
    if not answers:
      until(lambda: agent.channel.ended)
      again = runtime_host.Agent(group, 0)
      assert until(remote.channel) is not first
      again.channel.close()
  finally:
    agent.channel.close()
    remote.close()
    if answers:
      serves.join()


def test_a_port_that_is_taken_is_one_clear_error(tmp_path):
  with socket.create_server(('127.0.0.1', 0)) as taken:
    port = taken.getsockname()[1]
    file = write(tmp_path, server=f'127.0.0.1:{port}')
    with pytest.raises(InputError, match='server=.*of this host.*in use'):
      hosts.HostsLauncher(Placement(colocated=[Plan()]), file, SILENT_S)


@pytest.mark.skipif(sys.platform != 'linux', reason='names of Linux')
@pytest.mark.parametrize('later', [0, 2])
def test_a_second_server_on_the_same_ports_is_refused(tmp_path, later):
  """Also once its hosts have come, when nobody listens there: an instance of
  the first may start again at any time."""
  port = free_port()
  file = write(tmp_path, server=f'127.0.0.1:{port}')
  (tmp_path / 'other').mkdir()
  other = write(tmp_path / 'other', server=f'127.0.0.1:{port + later}')
  first = hosts.HostsLauncher(Placement(colocated=[Plan()] * 2), file, SILENT_S)
  try:
    for remote in first.hosts:
      remote._door.close()  # as when it has come
    with pytest.raises(InputError, match='server=.*of this host.*in use'):
      hosts.HostsLauncher(Placement(colocated=[Plan()]), other, SILENT_S)
  finally:
    first.close()
  hosts.HostsLauncher(Placement(colocated=[Plan()]), other, SILENT_S).close()


@pytest.mark.parametrize('server, error', [
    ('192.0.2.1:7000', 'server=.*of this host'),  # of nobody, by RFC 5737
    ('127.0.0.1:65533', 'server=65533: must be a port of 65532 at most'),
    ('127.0.0.1:65535', "server='127.0.0.1:65535': must be a port of 65533")])
def test_a_server_that_cannot_listen_where_it_is_to_is_refused(
    tmp_path, server, error):
  with pytest.raises(InputError, match=error):
    hosts.HostsLauncher(Placement(colocated=[Plan()] * 2),
                        write(tmp_path, server=server), SILENT_S)


@pytest.mark.parametrize('hosts, name, error', [
    ('', 'a', '--hosts'), ('hosts.json', '', '--name'),
    ('hosts.json', 'c', "host='c'"),
    ('none.json', 'a', 'none.json: cannot be read')])
def test_what_is_typed_is_checked(tmp_path, hosts, name, error):
  write(tmp_path)
  options = types.SimpleNamespace(
      hosts=hosts and str(tmp_path / hosts), name=name)
  with pytest.raises(InputError, match=error):
    host.run(options, None)

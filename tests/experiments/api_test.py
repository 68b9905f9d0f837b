"""The server's runner without a server: what it writes beside it."""

import errno
import logging
import socket

import pytest

import dsjax
from dsjax.config.checks import InputError, StartError
from dsjax.http import socket_server
from experiments import api
from experiments.common import cli


@pytest.fixture
def logger(monkeypatch):
  """That of a process which has written nothing yet."""
  logger = logging.getLogger('dsjax')
  monkeypatch.setattr(logger, 'handlers', [])
  monkeypatch.setattr(logger, 'propagate', True)
  monkeypatch.setattr(logger, 'level', logging.NOTSET)
  monkeypatch.setattr(cli, 'prepare', lambda *_: None)
  return logger


def test_the_log_is_in_a_file_too(tmp_path, logger, monkeypatch, capsys):
  served = []

  def serve(app, service, bound):
    served.append((app, service))
    logging.getLogger('dsjax.runtime').info('ready')
  monkeypatch.setattr(socket_server, 'run', serve)
  options = cli.options(api.FLAGS, config='tiny', port=0, cors=['*'],
                        set=['limits.keep_alive_s=30'], out=str(tmp_path / 'a'))
  assert api.run(options, None) == 0
  for handler in logger.handlers:
    handler.close()
  (app, service), = served
  assert service.limits.keep_alive_s == 30 and app.cors.allow_all_origins
  assert (tmp_path / 'a' / 'server.log').read_text().endswith(' ready\n')
  said = capsys.readouterr()
  assert said.err.endswith(' ready\n') and 'answers once' in said.out


def test_a_log_file_that_is_full_ends_with_a_line(tmp_path, capsys,
                                                  monkeypatch):
  class Full:
    def write(self, text):
      raise OSError(errno.ENOSPC, 'No space left on device')

    flush = close = lambda self: self.write('')

  logger = logging.getLogger('dsjax')
  handler = api._LogFile(tmp_path / 'server.log')
  handler.stream.close()
  handler.stream = Full()
  monkeypatch.setattr(logger, 'handlers', [handler])
  monkeypatch.setattr(logger, 'level', logging.INFO)
  for _ in range(3):
    logger.info('ready')
  said = capsys.readouterr().err
  assert said.startswith('warning: ') and said.count('\n') == 1
  assert f'{tmp_path}/server.log ends here: No space left' in said


@pytest.mark.parametrize('error', [
    InputError('model=7: must be a name'), StartError('instance 0: no'),
    TypeError('ours')])
def test_what_fails_at_the_start_is_one_line_unless_it_is_a_mistake_of_ours(
    error, logger, monkeypatch, capsys):
  def load(*_, **__):
    raise error

  monkeypatch.setattr(dsjax, 'load', load)
  options = cli.options(api.FLAGS, config='tiny', port=0)
  assert cli.exit_code(api.run, options, None) == 2
  said = capsys.readouterr().err
  ours = isinstance(error, TypeError)
  assert ('Traceback' in said) == ours
  assert said.count('error: ') == 1 and said.endswith(
      f'error: {"TypeError: " * ours}{error}\n')


def test_an_address_that_cannot_be_bound_is_told_with_its_flags(logger):
  with socket.create_server(('127.0.0.1', 0)) as taken:
    port = taken.getsockname()[1]
    for host in ('127.0.0.1', '192.0.2.1', '::2', 'a..b', 'é..b', 'a' * 300):
      options = cli.options(api.FLAGS, config='tiny', port=port, host=host)
      with pytest.raises(InputError, match=f'^--host={host} --port={port}: '
                         'must be an address of this host and a port'):
        api.run(options, None)


def test_an_empty_host_is_not_all_of_them(logger):
  options = cli.options(api.FLAGS, config='tiny', port=0, host='')
  with pytest.raises(InputError, match="^--host='': must be an address"):
    api.run(options, None)


def test_the_address_of_ipv6_is_told_in_brackets(logger, monkeypatch, capsys):
  try:
    socket.create_server(('::1', 0), family=socket.AF_INET6).close()
  except OSError:
    pytest.skip('no IPv6 here')
  monkeypatch.setattr(socket_server, 'run', lambda *_: None)
  options = cli.options(api.FLAGS, config='tiny', port=0, host='::1')
  assert cli.exit_code(api.run, options, None) == 0
  said = capsys.readouterr()
  assert said.out.startswith('http://[::1]:') and not said.err

"""The server's runner without a server: what it writes beside it."""

import errno
import logging

from dsjax.http import socket_server
from experiments import api
from experiments.common import cli


def test_the_log_is_in_a_file_too(tmp_path, monkeypatch, capsys):
  logger, served = logging.getLogger('dsjax'), []
  monkeypatch.setattr(logger, 'handlers', [])
  monkeypatch.setattr(logger, 'propagate', True)
  monkeypatch.setattr(logger, 'level', logging.NOTSET)
  monkeypatch.setattr(cli, 'prepare', lambda *_: None)

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

"""The server's runner without a server: what it writes beside it."""

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

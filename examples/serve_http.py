r"""An OpenAI-compatible server in a script of one's own (extra `serve`).

  python examples/serve_http.py            # random weights, port 8000
  python examples/serve_http.py smollm2-135m-instruct 8080
  curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \
    -d '{"model": "tiny", "max_tokens": 16,
         "messages": [{"role": "user", "content": "Hi!"}]}'

Ctrl-C lets running requests finish; a live page is at /.
"""

import socket
import sys

import dsjax
from dsjax.http import routes, socket_server, telemetry
from dsjax.http.service import Limits, Service

name = sys.argv[1] if len(sys.argv) > 1 else 'tiny'
port = int(sys.argv[2]) if len(sys.argv) > 2 else 8000


def make(report):
  """The orchestrator; the service calls this in a thread of its own."""
  return dsjax.serve(
      dsjax.load(name), dsjax.Placement.parse('prefill=1x1,decode=1x1'),
      dsjax.EngineConfig(max_len=256, max_seqs=4, prefill_tokens=64),
      report=report, keep_events=1)


gauges = telemetry.Gauges(name)
service = Service(make, Limits(max_waiting=64), gauges)
app = routes.make_app(service, gauges, name, None,
                      dsjax.Slo(ttft_s=2.0, tpot_s=0.2))
with socket.create_server(('127.0.0.1', port)) as listener:
  print(f'http://127.0.0.1:{listener.getsockname()[1]}', flush=True)
  sys.exit(socket_server.run(app, service, listener))

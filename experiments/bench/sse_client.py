"""A client that costs next to nothing, in a process of its own.

Reads a JSON line of jobs on stdin, sends each at its time and answers with a
JSON line of what came when: so that a bench can tell the server's cost from
the client's. Times are of time.perf_counter, which on Linux all processes
share. It parses no event: it notes when one came.
"""

import asyncio
import json
import resource
import sys
import time
from collections.abc import Iterable
from typing import Any


async def send(host: str, port: int, job: dict[str, Any]) -> list[float]:
  """One streamed request; when each of its events came. [] if refused."""
  body = json.dumps(job['body']).encode()
  head = (f'POST {job["path"]} HTTP/1.1\r\nHost: {host}\r\nContent-Type: '
          f'application/json\r\nConnection: close\r\n'
          f'Content-Length: {len(body)}\r\n\r\n').encode()
  await asyncio.sleep(max(0.0, job['at_s'] - time.perf_counter()))
  reader, writer = await asyncio.open_connection(host, port)
  times, last = [], b''
  try:
    writer.write(head + body)
    if b' 200 ' not in await reader.readline():
      return []
    while data := await reader.read(2**16):
      now_s, last = time.perf_counter(), last[-8:] + data
      times += [now_s] * (last.count(b'data: {') - last[:8].count(b'data: {'))
  finally:
    writer.close()
  return times


async def send_all(host: str, port: int, jobs: Iterable[dict[str, Any]]
                   ) -> list[list[float]]:
  """The event times of every job."""
  return await asyncio.gather(*(send(host, port, job) for job in jobs))


def main() -> None:
  """Answers each line of stdin with one."""
  for line in sys.stdin:
    ask = json.loads(line)
    before = resource.getrusage(resource.RUSAGE_SELF)
    times = asyncio.run(send_all(ask['host'], ask['port'], ask['jobs']))
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu_s = (after.ru_utime + after.ru_stime
             - before.ru_utime - before.ru_stime)
    print(json.dumps({'times': times, 'cpu_s': cpu_s}), flush=True)


if __name__ == '__main__':
  main()

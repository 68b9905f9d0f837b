"""A headless Chromium, asked through its debugging pipe; no driver needed.

Messages are JSON, ended by a zero byte, on the browser's descriptors 3 and 4
(https://chromedevtools.github.io/devtools-protocol/).
"""

import base64
import json
import os
import pathlib
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time

NAMES = ('chromium', 'chromium-browser', 'google-chrome', 'chrome')
WAIT_S = 60
# No look at the network, no sandbox (root has none), no GPU.
FLAGS = ('--headless', '--no-sandbox', '--disable-gpu', '--disable-quic',
         '--no-first-run', '--disable-background-networking',
         '--disable-component-update', '--disable-sync', '--disable-extensions',
         '--disable-dev-shm-usage', '--hide-scrollbars',
         '--remote-debugging-pipe')


def find():
  """Path of a browser, or None."""
  return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
  """One page. errors: what its scripts threw."""

  def __init__(self, path, folder, width=1180, height=680):
    """folder: for its profile, a new one."""
    ours_in, theirs_out = os.pipe()
    theirs_in, ours_out = os.pipe()
    # bash gives the descriptors their numbers.
    command = (f'exec 3<&{theirs_in} 4>&{theirs_out}; exec "$@"')
    with open(folder / 'browser.log', 'w') as log:
      self._process = subprocess.Popen(
          ['bash', '-c', command, 'bash', path, *FLAGS,
           f'--user-data-dir={folder}', f'--window-size={width},{height}'],
          pass_fds=(theirs_in, theirs_out), stdout=log, stderr=log,
          start_new_session=True)
    os.close(theirs_in)
    os.close(theirs_out)
    self._in, self._out = ours_in, ours_out
    self._rest, self._count, self._session = b'', 0, None
    self.errors = []

  def __enter__(self):
    target = self.call('Target.createTarget', url='about:blank')['targetId']
    self._session = self.call('Target.attachToTarget', targetId=target,
                              flatten=True)['sessionId']
    self.call('Runtime.enable')
    self.call('Page.enable')
    return self

  def __exit__(self, *_):
    os.close(self._out)
    os.close(self._in)
    os.killpg(self._process.pid, signal.SIGKILL)
    self._process.wait()

  def call(self, method, **params):
    """The result of one command."""
    self._count += 1
    message = {'id': self._count, 'method': method, 'params': params}
    if self._session:
      message['sessionId'] = self._session
    os.write(self._out, json.dumps(message).encode() + b'\0')
    while True:
      answer = self._read()
      if answer.get('method') == 'Runtime.exceptionThrown':
        self.errors.append(answer['params']['exceptionDetails'])
      if answer.get('id') == self._count:
        assert 'error' not in answer, answer
        return answer['result']

  def _read(self):
    end_s = time.monotonic() + WAIT_S
    while b'\0' not in self._rest:
      left_s = end_s - time.monotonic()
      ready = select.select([self._in], [], [], max(0.0, left_s))[0]
      assert ready, 'the browser does not answer'
      data = os.read(self._in, 2**16)
      assert data, 'the browser has ended'
      self._rest += data
    message, _, self._rest = self._rest.partition(b'\0')
    return json.loads(message)

  def open(self, url):
    """Goes to a page."""
    self.call('Page.navigate', url=url)

  def value(self, expression):
    """What a JavaScript expression gives, as JSON."""
    answer = self.call('Runtime.evaluate', expression=expression,
                       returnByValue=True)
    assert 'exceptionDetails' not in answer, answer
    return answer['result'].get('value')

  def screenshot(self, path):
    """Writes what is seen to a PNG."""
    data = self.call('Page.captureScreenshot')['data']
    path.write_bytes(base64.b64decode(data))


def main(url, path, wait_s='5'):
  """Looks at a page for some seconds, then writes what is seen."""
  with tempfile.TemporaryDirectory() as folder, Browser(
      find(), pathlib.Path(folder)) as page:
    page.open(url)
    time.sleep(float(wait_s))
    page.screenshot(pathlib.Path(path))


if __name__ == '__main__':  # python -m tests.browser URL PNG [SECONDS]
  main(*sys.argv[1:])

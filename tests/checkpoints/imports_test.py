"""What reads one kind of file is imported only when such a file is read."""

import subprocess
import sys

from tests.checkpoints.gguf_model_test import save

_SCRIPT = """
import sys
for name in ('gguf', 'jinja2', 'orbax', 'safetensors', 'tensorstore',
             'tokenizers'):
  sys.modules[name] = None  # importing it is an ImportError

import dataclasses
import dsjax
from dsjax.config import zoo

small = dataclasses.replace(
    zoo.config('llama-3-8b'), num_layers=1, d_model=8, num_heads=2,
    num_kv_heads=1, head_dim=4, d_ff=8, vocab_size=16)
zoo.config = {'small': small}.get
model = dsjax.load('dummy:small')
assert model.config is small and model.params['embed_VD'].shape == (16, 8)
try:
  dsjax.load(sys.argv[1])
except dsjax.InputError as error:
  print(error)
"""


def test_a_model_of_no_file_needs_no_reader(tmp_path):
  path = save(tmp_path / 'a.gguf')
  found = subprocess.run([sys.executable, '-c', _SCRIPT, path], text=True,
                         capture_output=True, timeout=300, check=False)
  assert found.returncode == 0, found.stderr
  assert 'needs the package gguf: pip install gguf' in found.stdout

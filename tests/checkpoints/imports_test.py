"""What reads one kind of file is imported only when such a file is read."""

import pathlib
import subprocess
import sys

_FOLDER = pathlib.Path(__file__).parents[1] / 'goldens/families/llama'
_BLOCK = """
import sys
for name in sys.argv[1].split(','):
  sys.modules[name] = None  # importing it is an ImportError
"""
_DUMMY = _BLOCK + """
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
  dsjax.load(sys.argv[2])
except dsjax.InputError as error:
  print(error)
"""
_SERVE = _BLOCK + """
import dsjax

limits = dsjax.EngineConfig(max_len=16, page_size=8, num_pages=4, max_seqs=1,
                            prefill_tokens=16, prefill_seqs=1)
model = dsjax.load(sys.argv[2])
with dsjax.serve(model, dsjax.Placement.parse('colocated=1x1'),
                 limits) as server:
  print(len(server.generate((5, 6, 7), max_tokens=3).tokens), 'tokens')
"""


def run(script: str, *args: object) -> str:
  """What a fresh interpreter prints."""
  ended = subprocess.run([sys.executable, '-c', script, *map(str, args)],
                         text=True, capture_output=True, timeout=300,
                         check=False)
  assert ended.returncode == 0, ended.stderr
  return ended.stdout


def test_a_model_of_no_file_needs_no_reader(tmp_path):
  path = tmp_path / 'a.gguf'
  path.write_bytes(b'GGUF' + bytes(64))
  printed = run(_DUMMY, 'gguf,jinja2,orbax,safetensors,tensorstore,tokenizers',
                path)
  assert 'needs the package gguf: pip install gguf' in printed


def test_a_folder_is_served_without_gguf():
  assert '3 tokens' in run(_SERVE, 'gguf', _FOLDER)


def test_tiny_has_its_tokenizer_without_gguf():
  script = _BLOCK + "import dsjax\nprint(dsjax.load(sys.argv[2]).tokenizer)"
  assert 'Tokenizer' in run(script, 'gguf,orbax,safetensors,tensorstore',
                            'tiny')

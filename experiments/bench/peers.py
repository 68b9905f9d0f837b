"""llama.cpp, transformers and vLLM on the weights, threads and prompts of ours.

Used by `python -m experiments.bench.engine --peers`. Make installs them once,
into an environment of their own; each runs in a process of its own (peer.py),
and what is not to be had is said in the table.
"""

import contextlib
import json
import pathlib
import subprocess
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import save_file

from dsjax.checkpoints.checkpoint import Model
from dsjax.checkpoints.families import llama
from dsjax.config.checks import InputError
from experiments.common import cli

ENVIRONMENT = cli.ROOT / '.venv-peers'
NAMES = ('vllm', 'llama.cpp', 'transformers')
LONGEST_S = 1800  # of one answer; vLLM compiles when it first starts


def save_gguf(source: pathlib.Path, target: pathlib.Path) -> None:
  """Rewrites a GGUF with every tensor dequantised to float32."""
  reader = gguf.GGUFReader(source)
  writer = gguf.GGUFWriter(target, 'llama')
  for key, field in reader.fields.items():
    if key.startswith('GGUF.') or key == 'general.architecture':
      continue
    if key == 'general.file_type':
      writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    elif field.types[0] == gguf.GGUFValueType.ARRAY:
      writer.add_array(key, field.contents())
    else:
      writer.add_key_value(key, field.contents(), field.types[0])
  for tensor in reader.tensors:
    writer.add_tensor(tensor.name, np.ascontiguousarray(
        gguf.dequantize(tensor.data, tensor.tensor_type), np.float32))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


def save_folder(loaded: Model, folder: pathlib.Path) -> None:
  """Writes a Llama as a Hugging Face folder, float32."""
  config, tensors = loaded.config, {}
  params: Any = loaded.params
  for layer in (None, *range(config.num_layers)):
    held = params if layer is None else params['layers'][layer]
    for leaf, array in held.items():
      if leaf != 'layers':
        flat = np.asarray(array)
        if flat.ndim > 2:  # of heads
          flat = flat.reshape(*((config.d_model, -1) if leaf == 'o_DNH' else
                                (-1, config.d_model)))
        name = llama.TENSORS[leaf].format(l=layer)
        tensors[f'model.{name}'] = np.ascontiguousarray(flat)
  save_file(tensors, folder / 'model.safetensors', {'format': 'pt'})
  (folder / 'config.json').write_text(json.dumps(dict(
      architectures=['LlamaForCausalLM'], model_type='llama',
      hidden_size=config.d_model, intermediate_size=config.d_ff,
      num_hidden_layers=config.num_layers, num_attention_heads=config.num_heads,
      num_key_value_heads=config.num_kv_heads, head_dim=config.head_dim,
      vocab_size=config.vocab_size, max_position_embeddings=config.max_len,
      rms_norm_eps=config.norm_eps, rope_theta=config.rope_base,
      hidden_act='silu', tie_word_embeddings=config.tied, dtype='float32',
      bos_token_id=1, eos_token_id=2)))


class Peer:
  """A peer's process; `lacks` says why there is none."""

  def __init__(self, name: str, folder: pathlib.Path, batches: Sequence[int]
               ) -> None:
    self.name, self.lacks = name, ''
    with contextlib.ExitStack() as stack:
      log = stack.enter_context((folder / f'{name}.log').open('w'))
      self.process = subprocess.Popen(
          [ENVIRONMENT / 'bin' / 'python', pathlib.Path(__file__).with_name(
              'peer.py'), name, folder, ','.join(map(str, batches))],
          stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
    self.lacks = self._read().get('error', '')

  def _read(self):
    late = threading.Timer(LONGEST_S, self.process.kill)
    late.start()
    assert self.process.stdout  # a pipe
    line = self.process.stdout.readline()
    late.cancel()
    return json.loads(line) if line else {
        'error': f'it ended, or gave no answer within {LONGEST_S} s'}

  def ask(self, *request: Any) -> tuple[float, list[list[int]] | None]:
    """(seconds, tokens) of [what, batch, prompts, steps]."""
    assert self.process.stdin  # a pipe
    self.process.stdin.write(json.dumps(request) + '\n')
    self.process.stdin.flush()
    answer = self._read()
    if 'error' in answer:
      self.lacks = self.lacks or answer['error']
    return answer.get('seconds', float('nan')), answer.get('tokens')

  def close(self) -> None:
    self.process.kill()
    self.process.wait()


@contextlib.contextmanager
def opened(loaded: Model, source: pathlib.Path, folder: pathlib.Path,
           batches: Sequence[int]) -> Iterator[list[Peer]]:
  """The peers, set up where that has not been done.

  Args:
    source: the GGUF that the model was loaded from. folder: for the weights.
  """
  if subprocess.run(['make', '--quiet', '.venv-peers/installed'],
                    cwd=cli.ROOT, check=False).returncode:
    raise InputError("--peers: 'make .venv-peers/installed' failed; see above")
  save_folder(loaded, folder)
  save_gguf(source, folder / 'float32.gguf')
  with contextlib.ExitStack() as stack:
    peers = []
    for name in NAMES:
      print(f'    starting {name}', flush=True)
      peers.append(Peer(name, folder, batches))
      stack.callback(peers[-1].close)
      if peers[-1].lacks:
        print(f'    {name}: not to be had: {peers[-1].lacks}', flush=True)
    yield [peer for peer in peers if not peer.lacks]

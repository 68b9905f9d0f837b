"""llama.cpp and transformers on the weights, threads and prompts of ours.

Used by `python -m experiments.bench.engine --peers` (extra `peers`). Each has
prefill() and decode() like bench_engine's own, so that all are timed in turn.
"""

import pathlib
import tempfile

import gguf
import numpy as np

from dsjax.checkpoints import checkpoint

THREADS = 2


def save_float32(source, target):
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


class LlamaCpp:
  """llama.cpp, float32 weights, native kernels, KV in float16 (its default)."""

  name = 'llama.cpp'

  def __init__(self, path, batch, prompt, steps):
    import llama_cpp
    self.api, self.shape = llama_cpp, (batch, prompt, steps)
    log = llama_cpp.llama_log_callback(lambda *_: None)
    self.log = log  # keeps the callback alive
    llama_cpp.llama_log_set(log, None)
    self.model = llama_cpp.llama_model_load_from_file(
        str(path).encode(), llama_cpp.llama_model_default_params())
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = batch * (prompt + steps + 8)
    params.n_batch = batch * prompt
    params.n_ubatch = 512
    params.n_seq_max = batch
    params.n_threads = params.n_threads_batch = THREADS
    self.context = llama_cpp.llama_init_from_model(self.model, params)
    self.batch = llama_cpp.llama_batch_init(batch * prompt, 0, batch)

  def _run(self, tokens):
    """tokens: (id, position, sequence, wants logits)."""
    self.batch.n_tokens = len(tokens)
    for i, (token, position, sequence, wanted) in enumerate(tokens):
      self.batch.token[i], self.batch.pos[i] = token, position
      self.batch.n_seq_id[i], self.batch.seq_id[i][0] = 1, sequence
      self.batch.logits[i] = wanted
    assert self.api.llama_decode(self.context, self.batch) == 0
    self.api.llama_synchronize(self.context)

  def prefill(self):
    batch, prompt, _ = self.shape
    self.api.llama_memory_clear(
        self.api.llama_get_memory(self.context), True)
    self._run([(1, t, b, t == prompt - 1) for b in range(batch)
               for t in range(prompt)])

  def decode(self):
    batch, prompt, steps = self.shape
    memory = self.api.llama_get_memory(self.context)
    for b in range(batch):
      self.api.llama_memory_seq_rm(memory, b, prompt, -1)
    for step in range(steps):
      self._run([(1, prompt + step, b, True) for b in range(batch)])


class Transformers:
  """transformers' forward loop on torch, float32, sdpa, dynamic cache."""

  name = 'transformers'

  def __init__(self, path, batch, prompt, steps):
    import torch
    import transformers
    torch.set_num_threads(THREADS)
    self.torch, self.steps = torch, steps
    self.model = transformers.AutoModelForCausalLM.from_pretrained(
        str(path.parent), gguf_file=path.name, dtype=torch.float32).eval()
    self.prompt = torch.ones((batch, prompt), dtype=torch.long)

  def prefill(self):
    with self.torch.inference_mode():
      out = self.model(self.prompt, use_cache=True, logits_to_keep=1)
    self.cache = out.past_key_values
    self.token = out.logits[:, -1:].argmax(-1)

  def decode(self):
    extra = self.cache.get_seq_length() - self.prompt.shape[1]
    if extra:
      self.cache.crop(-extra)
    token = self.token
    with self.torch.inference_mode():
      for _ in range(self.steps):
        out = self.model(token, past_key_values=self.cache, use_cache=True)
        token = out.logits[:, -1:].argmax(-1)


def bench(batches, prompt, steps, make_ours, in_turn, add):
  """Times every peer in turn with ours at each batch size."""
  source = checkpoint.find('smollm2-135m-instruct')
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / 'float32.gguf'
    save_float32(source, path)
    for batch in batches:
      rivals = [LlamaCpp(path, batch, prompt, steps),
                Transformers(path, batch, prompt, steps)]
      everyone = [make_ours(batch), *rivals]
      for phase, count in (('prefill', prompt), ('decode', steps)):
        took = in_turn(*(getattr(side, phase) for side in everyone))
        for rival, seconds in zip(rivals, took[1:], strict=True):
          add(f'(f) {phase}, batch {batch}', 'tokens/s',
              batch * count / took[0], batch * count / seconds, rival.name)

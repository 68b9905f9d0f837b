"""One peer of experiments.bench.peers, in a process and environment of its own.

  .venv-peers/bin/python experiments/bench/peer.py NAME FOLDER BATCH,...

FOLDER: weights as model.safetensors and config.json, and as float32.gguf.
Lines of JSON come in, [what, batch, prompts, steps], and go out, {seconds} or
{error}: what is prefill, decode (of a batch that was prefilled) or serve, which
gives tokens too. It imports nothing of dsjax.
"""

import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

THREADS = 2
os.environ |= {
    'OMP_NUM_THREADS': str(THREADS), 'HF_HUB_OFFLINE': '1',
    'VLLM_ENABLE_V1_MULTIPROCESSING': '0', 'VLLM_CPU_KVCACHE_SPACE': '1',
    'VLLM_CPU_OMP_THREADS_BIND': 'nobind', 'VLLM_LOGGING_LEVEL': 'ERROR',
    'VLLM_NO_USAGE_STATS': '1', 'KMP_BLOCKTIME': '1',
    'VLLM_CACHE_ROOT': os.path.join(sys.prefix, 'cache'),
    'TORCHINDUCTOR_CACHE_DIR': os.path.join(sys.prefix, 'cache', 'inductor'),
    'TOKENIZERS_PARALLELISM': 'false'}


class LlamaCpp:
  """llama.cpp, float32 weights, native kernels, KV in float16 (its default)."""

  def __init__(self, folder: str, batches: Sequence[int]) -> None:
    import llama_cpp
    import numpy as np
    self.api, self.np = llama_cpp, np
    self.log = llama_cpp.llama_log_callback(lambda *_: None)  # kept alive
    llama_cpp.llama_log_set(self.log, None)
    self.model = llama_cpp.llama_model_load_from_file(
        os.path.join(folder, 'float32.gguf').encode(),
        llama_cpp.llama_model_default_params())
    self.vocab = llama_cpp.llama_vocab_n_tokens(
        llama_cpp.llama_model_get_vocab(self.model))
    self.contexts, self.batch = {}, llama_cpp.llama_batch_init(
        512 * max(batches), 0, max(batches))
    for batch in batches:
      params = llama_cpp.llama_context_default_params()
      params.n_ctx, params.n_batch = 512 * batch, 512 * batch
      params.n_ubatch, params.n_seq_max = 512, batch
      params.n_threads = params.n_threads_batch = THREADS
      self.contexts[batch] = llama_cpp.llama_init_from_model(self.model, params)

  def _run(self, batch, rows):
    """rows: (token, position, sequence, wants logits). The next tokens."""
    context, to = self.contexts[batch], self.batch
    to.n_tokens = len(rows)
    for i, (token, position, sequence, wanted) in enumerate(rows):
      to.token[i], to.pos[i], to.logits[i] = token, position, wanted
      to.n_seq_id[i], to.seq_id[i][0] = 1, sequence
    assert self.api.llama_decode(context, to) == 0
    return [int(self.np.ctypeslib.as_array(self.api.llama_get_logits_ith(
        context, i), (self.vocab,)).argmax())
            for i, row in enumerate(rows) if row[3]]

  def prefill(self, batch: int, prompts: Sequence[Sequence[int]]) -> list[int]:
    self.api.llama_memory_clear(
        self.api.llama_get_memory(self.contexts[batch]), True)
    return self._run(batch, [
        (token, at, b, at == len(prompt) - 1)
        for b, prompt in enumerate(prompts) for at, token in enumerate(prompt)])

  def decode(self, batch: int, prompts: Sequence[Sequence[int]], steps: int,
             tokens: list[int] | None = None) -> list[list[int]]:
    memory = self.api.llama_get_memory(self.contexts[batch])
    for b, prompt in enumerate(prompts):
      self.api.llama_memory_seq_rm(memory, b, len(prompt), -1)
    answers = [tokens or [1] * batch]
    for step in range(steps):
      answers.append(self._run(batch, [
          (token, len(prompts[b]) + step, b, True)
          for b, token in enumerate(answers[-1])]))
    return answers

  def serve(self, batch: int, prompts: Sequence[Sequence[int]], steps: int
            ) -> list[list[int]]:
    return self.decode(batch, prompts, steps - 1, self.prefill(batch, prompts))


class Transformers:
  """transformers' forward loop on torch, float32, sdpa, dynamic cache."""

  def __init__(self, folder: str, batches: Sequence[int]) -> None:
    del batches
    import torch
    import transformers
    torch.set_num_threads(THREADS)
    self.torch, self.held = torch, {}
    self.model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32).eval()

  def prefill(self, batch: int, prompts: Sequence[Sequence[int]]) -> Any:
    with self.torch.inference_mode():
      out = self.model(self.torch.tensor(prompts), use_cache=True,
                       logits_to_keep=1)
      token = out.logits[:, -1:].argmax(-1)
    self.held[batch] = out.past_key_values, token
    return token

  def decode(self, batch: int, prompts: Sequence[Sequence[int]], steps: int
             ) -> list[list[int]]:
    cache, token = self.held[batch]
    extra = cache.get_seq_length() - len(prompts[0])
    if extra:
      cache.crop(-extra)
    answers = [token]
    with self.torch.inference_mode():
      for _ in range(steps):
        out = self.model(answers[-1], past_key_values=cache, use_cache=True)
        answers.append(out.logits[:, -1:].argmax(-1))
    return [token.flatten().tolist() for token in answers]

  def serve(self, batch: int, prompts: Sequence[Sequence[int]], steps: int
            ) -> list[list[int]]:
    self.prefill(batch, prompts)
    return self.decode(batch, prompts, steps - 1)


class Vllm:
  """vLLM on CPUs, float32, compiled, its scheduler and all; no tokenizer.

  It has no steps of its own to call: prefill is to serve one token, decode is
  to serve `steps` more, less that.
  """

  def __init__(self, folder: str, batches: Sequence[int]) -> None:
    import vllm
    self.api = vllm
    self.model = vllm.LLM(
        model=folder, dtype='float32', skip_tokenizer_init=True,
        max_model_len=512, max_num_seqs=max(batches), seed=0,
        max_num_batched_tokens=1024, enable_prefix_caching=False)

  def serve(self, batch: int, prompts: Sequence[Sequence[int]], steps: int
            ) -> list[tuple[int, ...]]:
    del batch
    out = self.model.generate(
        [{'prompt_token_ids': prompt} for prompt in prompts],
        self.api.SamplingParams(temperature=0, max_tokens=steps,
                                ignore_eos=True, detokenize=False),
        use_tqdm=False)
    return list(zip(*(row.outputs[0].token_ids for row in out), strict=True))

  def prefill(self, batch: int, prompts: Sequence[Sequence[int]]) -> None:
    self.serve(batch, prompts, 1)

  def decode(self, batch: int, prompts: Sequence[Sequence[int]], steps: int
             ) -> list[tuple[int, ...]]:
    start = time.perf_counter()
    self.serve(batch, prompts, 1)
    self.first_s = time.perf_counter() - start
    return self.serve(batch, prompts, steps + 1)


PEERS = {'llama.cpp': LlamaCpp, 'transformers': Transformers, 'vllm': Vllm}


def main(name: str, folder: str, batches: str) -> None:
  told, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer

  def tell(**answer):
    print(json.dumps(answer), file=told, flush=True)

  try:
    peer = PEERS[name](folder, [int(batch) for batch in batches.split(',')])
  except Exception as error:
    return tell(error=f'{type(error).__name__}: {error}'.strip()[-300:])
  tell(ready=True)
  for line in sys.stdin:
    what, batch, prompts, *steps = json.loads(line)
    start = time.perf_counter()
    answers = getattr(peer, what)(batch, prompts, *steps)
    seconds = time.perf_counter() - start
    if what == 'decode':
      seconds -= 2 * getattr(peer, 'first_s', 0)  # vLLM's: see there
    tell(seconds=seconds, tokens=[list(row) for row in zip(
        *answers, strict=True)] if what == 'serve' else None)


if __name__ == '__main__':
  if len(sys.argv) != 4:
    sys.exit(__doc__)
  main(*sys.argv[1:])

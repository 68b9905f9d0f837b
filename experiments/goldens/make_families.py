"""Writes tiny random models of every family, and their logits.

For each family of _FAMILIES a folder as published models come (config.json and
safetensors), with logits.npz: `tokens_T` (a prompt of `prompt_len` tokens and
its greedy continuation) and `logits_TV` at each of them, by `transformers` in
float32 on the saved folder. Biases and norms are random too, since the usual
zeros and ones would hide a mistake. A model whose two best logits come closer
than --min_margin at a continued token takes the next seed. Run where the extra
`peers` is installed (dsjax itself need not be):

  python -m experiments.goldens.make_families --out=tests/goldens/families

defaults.json beside it has the defaults of the configuration classes. A minute
on two CPU cores. Expected last line: `24 families, ... KB, smallest margin
0.0...`.
"""

import json
import pathlib
import shutil

import numpy as np
from absl import app, flags

from experiments.common.extras import needs

with needs('peers'):
  import torch
  import transformers

_OUT = flags.DEFINE_string('out', 'tests/goldens/families',
                           'folder to write to')
_MIN_MARGIN = flags.DEFINE_float('min_margin', 0.01, 'smallest margin allowed')

_ONLY = flags.DEFINE_list('only', [], 'families to write; all by default')

_PROMPT, _STEPS = 20, 16  # tokens
_LLAMA = dict(
    vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    max_position_embeddings=512, bos_token_id=1, eos_token_id=2)
_MHA = _LLAMA | dict(num_key_value_heads=4, head_dim=8)

# Name -> (model type, its configuration, dtype, fields as older releases of
# transformers wrote them, in place of rope_parameters and layer_types).
_FAMILIES = {
    'opt': ('opt', dict(
        vocab_size=128, hidden_size=32, ffn_dim=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64,
        word_embed_proj_dim=32), 'float16', None),
    'gpt2': ('gpt2', dict(
        vocab_size=128, n_embd=32, n_layer=2, n_head=4, n_inner=64,
        n_positions=64, bos_token_id=0, eos_token_id=0), 'float32', None),
    'llama': ('llama', _MHA, 'bfloat16', None),
    'llama3': ('llama', _LLAMA, 'bfloat16', dict(
        rope_theta=10000.0, rope_scaling=dict(
            rope_type='llama3', factor=8.0, low_freq_factor=1.0,
            high_freq_factor=4.0, original_max_position_embeddings=64))),
    'llama_linear': ('llama', _MHA | dict(tie_word_embeddings=True),
                     'bfloat16', dict(
        rope_theta=10000.0, rope_scaling=dict(type='linear', factor=4.0))),
    'mistral': ('mistral', _LLAMA | dict(sliding_window=7), 'bfloat16', None),
    'qwen2': ('qwen2', _MHA | dict(tie_word_embeddings=True,
                                   num_key_value_heads=2), 'bfloat16', dict(
        rope_theta=1000000.0, use_sliding_window=False, sliding_window=6,
        max_window_layers=1)),
    'qwen3': ('qwen3', _LLAMA | dict(rms_norm_eps=1e-3), 'bfloat16', None),
    'gemma2': ('gemma2', _LLAMA | dict(
        num_hidden_layers=3, query_pre_attn_scalar=12,
        attn_logit_softcapping=1.5, final_logit_softcapping=4.0,
        sliding_window=6), 'bfloat16', dict(rope_theta=10000.0)),
    'gemma3': ('gemma3_text', _LLAMA | dict(
        num_hidden_layers=4, query_pre_attn_scalar=20, sliding_window=6),
        'bfloat16', dict(
            rope_theta=1000000.0, rope_local_base_freq=10000.0,
            rope_scaling=dict(rope_type='linear', factor=8.0),
            sliding_window_pattern=3)),
    'mixtral': ('mixtral', _LLAMA | dict(
        intermediate_size=24, num_local_experts=4, num_experts_per_tok=2),
        'bfloat16', None),
    'qwen3_moe': ('qwen3_moe', _LLAMA | dict(
        moe_intermediate_size=16, num_experts=6, num_experts_per_tok=3,
        norm_topk_prob=False, decoder_sparse_step=1), 'bfloat16', dict(
            rope_theta=10000.0, num_experts=6)),
    # As Qwen2.5 is stretched; every prompt here is beyond the original length.
    'qwen2_yarn': ('qwen2', _LLAMA, 'bfloat16', dict(
        rope_theta=10000.0, use_sliding_window=False, rope_scaling=dict(
            type='yarn', factor=4.0, original_max_position_embeddings=16))),
    'llama_yarn': ('llama', _MHA | dict(mlp_bias=True, attention_bias=True),
                   'bfloat16', dict(rope_theta=10000.0, rope_scaling=dict(
                       rope_type='yarn', factor=8.0, beta_fast=4.0,
                       beta_slow=0.5, mscale=0.7, mscale_all_dim=0.9,
                       original_max_position_embeddings=16))),
    'llama_dynamic': ('llama', _MHA, 'bfloat16', dict(
        rope_theta=10000.0, rope_scaling=dict(type='dynamic', factor=4.0))),
    'gemma': ('gemma', _LLAMA | dict(num_hidden_layers=4), 'bfloat16', dict(
        rope_theta=10000.0, hidden_act='gelu')),
    'olmo2': ('olmo2', _LLAMA, 'bfloat16', None),
    'olmo3': ('olmo3', _LLAMA | dict(num_hidden_layers=4, sliding_window=6),
              'bfloat16', dict(rope_theta=500000.0, rope_scaling=dict(
                  rope_type='yarn', factor=8.0, attention_factor=1.2,
                  original_max_position_embeddings=16))),
    'smollm3': ('smollm3', _LLAMA | dict(
        num_hidden_layers=4, no_rope_layers=[1, 0, 1, 0],
        use_sliding_window=True, sliding_window=6, pad_token_id=0),
        'bfloat16', None),
    'phi3': ('phi3', _LLAMA | dict(head_dim=8, sliding_window=9,
                                   pad_token_id=0), 'bfloat16', dict(
        rope_theta=10000.0, original_max_position_embeddings=64,
        rope_scaling=dict(type='longrope', short_factor=[1.0, 1.1, 1.3, 1.8],
                          long_factor=[2.0, 3.0, 5.0, 8.0]))),
    # As Phi-4-mini: a part of each head rotates.
    'phi3_partial': ('phi3', _LLAMA | dict(head_dim=8, pad_token_id=0),
                     'bfloat16', dict(
        rope_theta=10000.0, original_max_position_embeddings=64,
        partial_rotary_factor=0.5, rope_scaling=dict(
            type='longrope', short_factor=[1.0, 1.3], long_factor=[2.0, 8.0]),
        )),
    'granite': ('granite', _LLAMA | dict(
        embedding_multiplier=6.0, attention_multiplier=0.2,
        residual_multiplier=0.7, logits_scaling=2.5), 'bfloat16', None),
    'gpt_neox': ('gpt_neox', dict(
        vocab_size=128, hidden_size=32, intermediate_size=48,
        num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, bos_token_id=0, eos_token_id=0),
        'float16', dict(rotary_pct=0.25, rotary_emb_base=10000)),
    'starcoder2': ('starcoder2', _LLAMA | dict(
        head_dim=8, sliding_window=9), 'bfloat16', None),
}
_SHARDED = ('qwen3',)  # saved as several files


def _randomize(model, seed):
  """Weights of unit gain; biases and norms away from zero and one."""
  generator = torch.Generator().manual_seed(seed)
  for name, weight in model.named_parameters():
    new = torch.randn(weight.shape, generator=generator)
    if weight.ndim == 1:
      new = 0.3 * new + (0 if name.endswith('bias') else weight)
    elif any(part in name for part in ('embed', 'wte', 'wpe')):
      new = 0.15 * new  # or a tied head would repeat its input
    else:
      new = new / 32**0.5
    weight.copy_(new)


def _save(name, folder, seed):
  """Saves a model as published ones are."""
  kind, fields, dtype, older = _FAMILIES[name]
  fields = dict(model_type=kind) | fields | (older or {})
  folder.mkdir(parents=True)
  path = folder / 'config.json'
  path.write_text(json.dumps(fields))
  config = transformers.AutoConfig.from_pretrained(folder)
  model = transformers.AutoModelForCausalLM.from_config(
      config, dtype=torch.float32)
  _randomize(model, seed)
  model.to(getattr(torch, dtype)).save_pretrained(
      folder, max_shard_size='20KB' if name in _SHARDED else '1GB')
  (folder / 'generation_config.json').unlink(missing_ok=True)
  written = json.loads(path.read_text())
  if older is not None:
    for key in ('rope_parameters', 'layer_types', '_sliding_window_pattern',
                'num_local_experts'):
      written.pop(key, None)
    written |= older
    written['torch_dtype'] = written.pop('dtype')
  path.write_text(json.dumps(written, indent=2, sort_keys=True) + '\n')


def _logits(folder, seed):
  """(tokens, logits at each, smallest margin of a continued token)."""
  model = transformers.AutoModelForCausalLM.from_pretrained(
      folder, dtype=torch.float32, attn_implementation='eager').eval()
  rng = np.random.default_rng(seed)
  tokens = rng.integers(3, 128, _PROMPT).tolist()
  margins = []
  for _ in range(_STEPS):
    best = model(torch.tensor([tokens]), use_cache=False).logits[0, -1].topk(2)
    margins.append((best.values[0] - best.values[1]).item())
    tokens.append(best.indices[0].item())
  logits_TV = model(torch.tensor([tokens]), use_cache=False).logits[0].numpy()
  return tokens, logits_TV, min(margins)


def _write_defaults(path):
  """What each family's configuration class says where a file does not."""
  common = transformers.PreTrainedConfig().to_dict().keys() - {
      'tie_word_embeddings'}
  kinds = sorted({kind for kind, *_ in _FAMILIES.values()})
  defaults = {kind: {
      key: value
      for key, value in transformers.CONFIG_MAPPING[kind]().to_dict().items()
      if key not in common} for kind in kinds}
  path.write_text(json.dumps(defaults, indent=1, sort_keys=True) + '\n')


@torch.inference_mode()
def main(argv: list[str]) -> None:
  del argv
  smallest, total = np.inf, 0
  _write_defaults(pathlib.Path(_OUT.value).parent / 'defaults.json')
  for name in _ONLY.value or _FAMILIES:
    folder = pathlib.Path(_OUT.value) / name
    for seed in range(60):
      shutil.rmtree(folder, ignore_errors=True)
      _save(name, folder, seed)
      tokens, logits_TV, margin = _logits(folder, seed)
      distinct = len(set(tokens[_PROMPT:]))
      if margin >= _MIN_MARGIN.value and distinct >= 4:
        break
    else:
      raise ValueError(f'{name}: no seed of 60 gives clear, varied tokens')
    np.savez(folder / 'logits.npz', tokens_T=np.array(tokens, np.int32),
             logits_TV=logits_TV, prompt_len=_PROMPT)
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f'{name}: seed {seed}, margin {margin:.4f}, {distinct} tokens, '
          f'{size / 1e3:.0f} KB')
    smallest, total = min(smallest, margin), total + size
  print(f'{len(_ONLY.value or _FAMILIES)} families, {total / 1e3:.0f} KB, '
        f'smallest margin {smallest:.4f}')


if __name__ == '__main__':
  app.run(main)

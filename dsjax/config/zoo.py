"""Published models' shapes by name, as their authors' config.json has them.

Shapes only: no weights, and no special token ids. Qwen2.5 is the Instruct
release, whose context and epsilon differ from the base model's; Gemma 3 4B is
its text part. OPT 350M is left out: it norms after the residual and projects
its embeddings. Of DeepSeek-V2 there is only what it keeps of a token, for
plans.
"""

from typing import Any

from dsjax.config import rope
from dsjax.config.checks import require
from dsjax.config.model import ModelConfig

Fields = dict[str, Any]  # of a ModelConfig, by name
_LEARNED: Fields = dict(norm='layer', positions='learned', gated=False,
                        qkv_bias=True, out_bias=True, mlp_bias=True)


def _opt(num_layers: int, d_model: int, num_heads: int) -> Fields:
  return dict(num_layers=num_layers, d_model=d_model, num_heads=num_heads,
              vocab_size=50272, max_len=2048, activation='relu',
              **_LEARNED)


def _gpt2(num_layers: int, d_model: int, num_heads: int) -> Fields:
  return dict(num_layers=num_layers, d_model=d_model, num_heads=num_heads,
              vocab_size=50257, max_len=1024, activation='gelu_tanh',
              **_LEARNED)


def _rotary(num_layers: int, d_model: int, num_heads: int, num_kv_heads: int,
            d_ff: int, vocab_size: int, max_len: int, *,
            head_dim: int | None = None, tied: bool = False,
            **fields: Any) -> Fields:
  return dict(num_layers=num_layers, d_model=d_model, num_heads=num_heads,
              num_kv_heads=num_kv_heads, d_ff=d_ff, vocab_size=vocab_size,
              max_len=max_len, tied=tied, **fields) | (
                  {} if head_dim is None else {'head_dim': head_dim})


def _pythia(num_layers: int, d_model: int, num_heads: int,
            vocab_size: int = 50304) -> Fields:
  return dict(num_layers=num_layers, d_model=d_model, num_heads=num_heads,
              vocab_size=vocab_size, max_len=2048, tied=False, parallel=True,
              rope_width=d_model // num_heads // 4, activation='gelu',
              **(_LEARNED | dict(positions='rope')))


def _gemma1(*shape: int, d_model: int) -> Fields:
  return _rotary(shape[0], d_model, *shape[1:], vocab_size=256000,
                 max_len=8192, head_dim=256, tied=True, norm_eps=1e-6,
                 activation='gelu_tanh', embed_scale=d_model**0.5)


def _starcoder2(*shape: int, **fields: Any) -> Fields:
  return _rotary(*shape, vocab_size=49152, max_len=16384, tied=True,
                 norm='layer', gated=False, qkv_bias=True, out_bias=True,
                 mlp_bias=True, activation='gelu_tanh',
                 windows=(4096,) * shape[0], **fields)


def _olmo(num_layers: int, d_model: int, num_heads: int, d_ff: int,
          max_len: int, **fields: Any) -> Fields:
  return _rotary(num_layers, d_model, num_heads, num_heads, d_ff, 100352,
                 max_len, rope_base=5e5, norm_eps=1e-6, qk_norm=True,
                 joint_norm=(num_heads, num_heads), pre_norms=False,
                 post_norms=True, **fields)


def _latent(num_layers: int, d_model: int, num_heads: int, d_ff: int,
            experts: int, width: int = 576) -> Fields:
  """A token's latent vector as one head of keys and one of values, half each:
  what is kept, copied and replicated is exact, weights and FLOPs are not.
  Of experts, the two that every token uses count as chosen ones."""
  return _rotary(num_layers, d_model, num_heads, 1, d_ff, 102400, 163840,
                 head_dim=width // 2, num_experts=experts, experts_per_token=8)


def _qwen2(*shape: int, **fields: Any) -> Fields:
  release: Fields = dict(max_len=32768, rope_base=1e6, norm_eps=1e-6,
                         qkv_bias=True)
  return _rotary(*shape, **(release | fields))


def _qwen3(*shape: int, **fields: Any) -> Fields:
  return _rotary(*shape, vocab_size=151936, max_len=40960, head_dim=128,
                 rope_base=1e6, norm_eps=1e-6, qk_norm=True, **fields)


def _gemma(num_layers: int, d_model: int, *shape: int, window: int,
           full_every: int, scale: float = 256, **fields: Any) -> Fields:
  windows = tuple(window * bool((layer + 1) % full_every)
                  for layer in range(num_layers))
  return _rotary(num_layers, d_model, *shape, tied=True, norm_eps=1e-6,
                 activation='gelu_tanh', post_norms=True, windows=windows,
                 embed_scale=d_model**0.5, attn_scale=scale**-0.5, **fields)


def _gemma2(*shape: int, **fields: Any) -> Fields:
  return _gemma(*shape, 256000, 8192, window=4096, full_every=2,
                attn_softcap=50.0, logit_softcap=30.0, **fields)


def _gemma3(*shape: int, **fields: Any) -> Fields:
  return _gemma(*shape, head_dim=256, full_every=6, rope_base=1e6,
                rope_local_base=1e4, qk_norm=True, **fields)


_LLAMA_31: Fields = dict(
    rope_base=5e5, rope_divisors=rope.llama3(128, 5e5, 8.0, 8192))

_SHAPES: dict[str, Fields] = {
    # facebook/opt-*: L, D, N
    'opt-125m': _opt(12, 768, 12),
    'opt-1.3b': _opt(24, 2048, 32),
    'opt-2.7b': _opt(32, 2560, 32),
    'opt-6.7b': _opt(32, 4096, 32),
    'opt-13b': _opt(40, 5120, 40),
    'opt-30b': _opt(48, 7168, 56),
    'opt-66b': _opt(64, 9216, 72),
    'opt-175b': _opt(96, 12288, 96),  # metaseq's model card
    # openai-community/gpt2*: L, D, N
    'gpt2': _gpt2(12, 768, 12),
    'gpt2-medium': _gpt2(24, 1024, 16),
    'gpt2-large': _gpt2(36, 1280, 20),
    'gpt2-xl': _gpt2(48, 1600, 25),
    # meta-llama/*: L, D, N, K, F, V, context
    'llama-2-7b': _rotary(32, 4096, 32, 32, 11008, 32000, 4096),
    'llama-2-13b': _rotary(40, 5120, 40, 40, 13824, 32000, 4096),
    'llama-2-70b': _rotary(80, 8192, 64, 8, 28672, 32000, 4096),
    'llama-3-8b': _rotary(32, 4096, 32, 8, 14336, 128256, 8192,
                          rope_base=5e5),
    'llama-3-70b': _rotary(80, 8192, 64, 8, 28672, 128256, 8192,
                           rope_base=5e5),
    'llama-3.1-8b': _rotary(32, 4096, 32, 8, 14336, 128256, 131072,
                            **_LLAMA_31),
    'llama-3.1-70b': _rotary(80, 8192, 64, 8, 28672, 128256, 131072,
                             **_LLAMA_31),
    # mistralai/Mistral-7B-v0.1, Mixtral-8x7B-v0.1
    'mistral-7b': _rotary(32, 4096, 32, 8, 14336, 32000, 32768,
                          windows=(4096,) * 32),
    'mixtral-8x7b': _rotary(32, 4096, 32, 8, 14336, 32000, 32768,
                            rope_base=1e6, num_experts=8,
                            experts_per_token=2),
    # Qwen/*: L, D, N, K, F (V)
    'qwen2.5-0.5b': _qwen2(24, 896, 14, 2, 4864, 151936, tied=True),
    'qwen2.5-7b': _qwen2(28, 3584, 28, 4, 18944, 152064),
    'qwen2.5-72b': _qwen2(80, 8192, 64, 8, 29568, 152064),
    'qwen3-0.6b': _qwen3(28, 1024, 16, 8, 3072, tied=True),
    'qwen3-8b': _qwen3(36, 4096, 32, 8, 12288),
    'qwen3-32b': _qwen3(64, 5120, 64, 8, 25600),
    'qwen3-30b-a3b': _qwen3(48, 2048, 32, 4, 768, num_experts=128,
                            experts_per_token=8),
    # google/gemma-*: L, D, N, K, F (V, context)
    'gemma-2b': _gemma1(18, 8, 1, 16384, d_model=2048),
    'gemma-7b': _gemma1(28, 16, 16, 24576, d_model=3072),
    'gemma-2-2b': _gemma2(26, 2304, 8, 4, 9216, head_dim=256),
    'gemma-2-9b': _gemma2(42, 3584, 16, 8, 14336, head_dim=256),
    'gemma-2-27b': _gemma2(46, 4608, 32, 16, 36864, head_dim=128, scale=144),
    'gemma-3-1b': _gemma3(26, 1152, 4, 1, 6912, 262144, 32768, window=512),
    'gemma-3-4b': _gemma3(34, 2560, 8, 4, 10240, 262208, 131072, window=1024,
                          rope_divisors=rope.linear(256, 8.0)),
    # EleutherAI/pythia-*: L, D, N (V)
    'pythia-160m': _pythia(12, 768, 12),
    'pythia-1.4b': _pythia(24, 2048, 16),
    'pythia-2.8b': _pythia(32, 2560, 32),
    'pythia-6.9b': _pythia(32, 4096, 32, 50432),
    'pythia-12b': _pythia(36, 5120, 40, 50688),
    # allenai/OLMo-2-1124-*: L, D, N, F, context
    'olmo-2-7b': _olmo(32, 4096, 32, 11008, 4096),
    'olmo-2-13b': _olmo(40, 5120, 40, 13824, 4096),
    # HuggingFaceTB, microsoft, bigcode: L, D, N, K, F (V, context)
    'smollm3-3b': _rotary(
        36, 2048, 16, 4, 11008, 128256, 65536, tied=True, rope_base=5e6,
        norm_eps=1e-6, rotated=(True, True, True, False) * 9),
    'phi-3-mini-4k': _rotary(32, 3072, 32, 32, 8192, 32064, 4096,
                             windows=(2047,) * 32),
    'starcoder2-3b': _starcoder2(30, 3072, 24, 2, 12288,
                                 rope_base=999999.4420358813),
    'starcoder2-7b': _starcoder2(32, 4608, 36, 4, 18432, rope_base=1e6),
    # deepseek-ai/DeepSeek-V2*, as what they keep: L, D, N, F, E
    'deepseek-v2-lite-kv': _latent(27, 2048, 16, 1408, 64),
    'deepseek-v2-kv': _latent(60, 5120, 128, 1536, 160),
}

NAMES = tuple(_SHAPES)


def config(name: str) -> ModelConfig:
  """The ModelConfig of a published model. Raises InputError: another name."""
  require(name in NAMES, 'model', name, f'one of {sorted(NAMES)}')
  fields = _SHAPES[name]
  d_model, num_heads = fields['d_model'], fields['num_heads']
  return ModelConfig(name=name, **{
      'num_kv_heads': num_heads, 'head_dim': d_model // num_heads,
      'd_ff': 4 * d_model} | fields)

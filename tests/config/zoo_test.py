import dataclasses
import json
import math

import pytest

from dsjax.checkpoints.hf_config import read_config
from dsjax.config import zoo
from dsjax.config.checks import InputError
from dsjax.model import sharding
from dsjax.runtime import migration

# Parameters as published: the safetensors headers of the Hub, tied heads
# counted once; OPT 66B and 175B by their papers' tables.
PUBLISHED = {
    'opt-125m': 125_239_296, 'opt-1.3b': 1_315_758_080,
    'opt-2.7b': 2_651_596_800, 'opt-6.7b': 6_658_473_984,
    'opt-13b': 12_853_473_280, 'opt-30b': 29_974_540_288,
    'opt-66b': 66e9, 'opt-175b': 175e9,
    'gpt2': 124_439_808, 'gpt2-medium': 354_823_168,
    'gpt2-large': 774_030_080, 'gpt2-xl': 1_557_611_200,
    'llama-2-7b': 6_738_415_616, 'llama-2-13b': 13_015_864_320,
    'llama-2-70b': 68_976_648_192, 'llama-3-8b': 8_030_261_248,
    'llama-3-70b': 70_553_706_496, 'llama-3.1-8b': 8_030_261_248,
    'llama-3.1-70b': 70_553_706_496, 'mistral-7b': 7_241_732_096,
    'mixtral-8x7b': 46_702_792_704, 'qwen2.5-0.5b': 494_032_768,
    'qwen2.5-7b': 7_615_616_512, 'qwen2.5-72b': 72_706_203_648,
    'qwen3-0.6b': 596_049_920, 'qwen3-8b': 8_190_735_360,
    'qwen3-32b': 32_762_123_264, 'qwen3-30b-a3b': 30_532_122_624,
    'gemma-2-2b': 2_614_341_888, 'gemma-2-9b': 9_241_705_984,
    'gemma-2-27b': 27_227_128_320, 'gemma-3-1b': 999_885_952,
    'gemma-3-4b': 3_880_263_168,
    'gemma-2b': 2_506_172_416, 'gemma-7b': 8_537_680_896,
    'pythia-160m': 162_322_944, 'pythia-1.4b': 1_414_647_808,
    'pythia-2.8b': 2_775_208_960, 'pythia-6.9b': 6_857_302_016,
    'pythia-12b': 11_846_072_320, 'olmo-2-7b': 7_298_617_344,
    'olmo-2-13b': 13_716_198_400, 'smollm3-3b': 3_075_098_624,
    'phi-3-mini-4k': 3_821_079_552, 'starcoder2-3b': 3_030_371_328,
    'starcoder2-7b': 7_173_923_840, 'deepseek-v2-lite-kv': 15_706_484_224,
    'deepseek-v2-kv': 235_741_434_880}


def count(config):
  def size(leaves):
    return sum(math.prod(config.leaf_shape(leaf)) for leaf in leaves)
  return (size(config.top_leaves)
          + config.num_layers * size(config.layer_leaves))


@pytest.mark.parametrize('name', zoo.NAMES)
def test_parameters_are_as_many_as_published(name):
  counted = count(zoo.config(name))
  published = PUBLISHED[name]
  if name.startswith('opt'):  # published tables have two rows more
    assert counted == pytest.approx(published, rel=0.01)
  elif name.endswith('-kv'):  # what it keeps of a token is exact
    assert counted == pytest.approx(published, rel=0.08)
  else:
    assert counted == published


def test_every_model_is_checked():
  assert PUBLISHED.keys() == set(zoo.NAMES)


@pytest.mark.parametrize('name, layers', [('deepseek-v2-lite-kv', 27),
                                          ('deepseek-v2-kv', 60)])
def test_a_latent_is_planned_for_as_it_is_kept(name, layers):
  """512 numbers and 64 rotated ones a layer, on every shard."""
  config = zoo.config(name)
  assert config.kv_bytes_per_token(2) == layers * (512 + 64) * 2
  source, target = sharding.cut(config, 8), sharding.cut(config, 2)
  for layout in (source, target):  # a replica on every shard
    assert layout.padded.kv_bytes_per_token(2) == layout.tp * (
        config.kv_bytes_per_token(2))
  spans = sharding.spans(layers, 3), sharding.spans(layers, 2)
  pieces = migration.plan_pieces(source, spans[0], target, spans[1])
  assert migration.ratio(pieces, source) == target.tp


def test_gemma_alternates():
  two, three = zoo.config('gemma-2-2b'), zoo.config('gemma-3-1b')
  assert two.windows[:4] == (4096, 0, 4096, 0)
  assert three.windows[:7] == (512,) * 5 + (0, 512)


_COMMON = dict(
    attention_bias=False, attention_dropout=0.0, bos_token_id=2,
    eos_token_id=[1, 106], initializer_range=0.02, use_cache=True,
    torch_dtype='bfloat16', transformers_version='4.50.0.dev0')
# What config.json of the published models says, but for special tokens.
FILES = {
    'opt-125m': dict(
        model_type='opt', activation_function='relu', ffn_dim=3072,
        do_layer_norm_before=True, dropout=0.1, hidden_size=768,
        max_position_embeddings=2048, num_attention_heads=12, prefix='</s>',
        num_hidden_layers=12, vocab_size=50272, word_embed_proj_dim=768),
    'llama-3.1-8b': _COMMON | dict(
        model_type='llama', hidden_act='silu', hidden_size=4096,
        intermediate_size=14336, max_position_embeddings=131072,
        mlp_bias=False, num_attention_heads=32, num_hidden_layers=32,
        num_key_value_heads=8, pretraining_tp=1, rms_norm_eps=1e-5,
        rope_theta=500000.0, tie_word_embeddings=False, vocab_size=128256,
        rope_scaling=dict(
            factor=8.0, high_freq_factor=4.0, low_freq_factor=1.0,
            original_max_position_embeddings=8192, rope_type='llama3')),
    'mistral-7b': dict(
        model_type='mistral', hidden_act='silu', hidden_size=4096,
        intermediate_size=14336, max_position_embeddings=32768,
        num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=8,
        rms_norm_eps=1e-5, rope_theta=10000.0, sliding_window=4096,
        tie_word_embeddings=False, vocab_size=32000),
    'qwen3-30b-a3b': _COMMON | dict(
        model_type='qwen3_moe', decoder_sparse_step=1, head_dim=128,
        hidden_act='silu', hidden_size=2048, intermediate_size=6144,
        max_position_embeddings=40960, max_window_layers=48,
        mlp_only_layers=[], moe_intermediate_size=768, norm_topk_prob=True,
        num_attention_heads=32, num_experts=128, num_experts_per_tok=8,
        num_hidden_layers=48, num_key_value_heads=4, rms_norm_eps=1e-6,
        output_router_logits=False, rope_scaling=None, rope_theta=1000000.0,
        router_aux_loss_coef=0.001, sliding_window=None, vocab_size=151936,
        tie_word_embeddings=False, use_sliding_window=False),
    'gemma-2-27b': _COMMON | dict(
        model_type='gemma2', attn_logit_softcapping=50.0, head_dim=128,
        cache_implementation='hybrid', final_logit_softcapping=30.0,
        hidden_act='gelu_pytorch_tanh', hidden_activation='gelu_pytorch_tanh',
        hidden_size=4608, intermediate_size=36864, pad_token_id=0,
        max_position_embeddings=8192, num_attention_heads=32,
        num_hidden_layers=46, num_key_value_heads=16, rms_norm_eps=1e-6,
        query_pre_attn_scalar=144, rope_theta=10000.0, sliding_window=4096,
        sliding_window_size=4096, vocab_size=256000),
    'gemma-3-1b': _COMMON | dict(
        model_type='gemma3_text', attn_logit_softcapping=None, head_dim=256,
        cache_implementation='hybrid', final_logit_softcapping=None,
        hidden_activation='gelu_pytorch_tanh', hidden_size=1152,
        intermediate_size=6912, max_position_embeddings=32768,
        num_attention_heads=4, num_hidden_layers=26, num_key_value_heads=1,
        query_pre_attn_scalar=256, rms_norm_eps=1e-6, rope_scaling=None,
        rope_local_base_freq=10000, rope_theta=1000000, sliding_window=512,
        sliding_window_pattern=6, vocab_size=262144),
    'pythia-160m': dict(
        model_type='gpt_neox', hidden_act='gelu', hidden_size=768,
        initializer_range=0.02, intermediate_size=3072, layer_norm_eps=1e-5,
        max_position_embeddings=2048, num_attention_heads=12,
        num_hidden_layers=12, rotary_emb_base=10000, rotary_pct=0.25,
        tie_word_embeddings=False, torch_dtype='float16', use_cache=True,
        use_parallel_residual=True, vocab_size=50304),
    'smollm3-3b': _COMMON | dict(
        model_type='smollm3', hidden_act='silu', hidden_size=2048,
        intermediate_size=11008, is_llama_config=True,
        layer_types=['full_attention'] * 36, max_position_embeddings=65536,
        max_window_layers=28, mlp_bias=False, no_rope_layer_interval=4,
        no_rope_layers=[1, 1, 1, 0] * 9, num_attention_heads=16,
        num_hidden_layers=36, num_key_value_heads=4, rms_norm_eps=1e-6,
        pretraining_tp=2, rope_scaling=None, rope_theta=5000000.0,
        sliding_window=None, use_sliding_window=False, vocab_size=128256),
    'phi-3-mini-4k': _COMMON | dict(
        model_type='phi3', auto_map={'AutoConfig': 'configuration_phi3.X'},
        embd_pdrop=0.0, hidden_act='silu', hidden_size=3072,
        intermediate_size=8192, max_position_embeddings=4096,
        num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=32,
        original_max_position_embeddings=4096, resid_pdrop=0.0,
        rms_norm_eps=1e-5, rope_scaling=None, rope_theta=10000.0,
        sliding_window=2047, tie_word_embeddings=False, vocab_size=32064),
    'olmo-2-7b': _COMMON | dict(
        model_type='olmo2', hidden_act='silu', hidden_size=4096,
        intermediate_size=11008, max_position_embeddings=4096,
        num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=32,
        rms_norm_eps=1e-6, rope_scaling=None, rope_theta=500000,
        tie_word_embeddings=False, vocab_size=100352),
    'starcoder2-3b': _COMMON | dict(
        model_type='starcoder2', activation_function='gelu_pytorch_tanh',
        architectures=['Starcoder2ForCausalLM'], embedding_dropout=0.1,
        hidden_act='gelu_pytorch_tanh', hidden_size=3072,
        intermediate_size=12288, max_position_embeddings=16384,
        mlp_type='default', norm_epsilon=1e-5, norm_type='layer_norm',
        num_attention_heads=24, num_hidden_layers=30, num_key_value_heads=2,
        residual_dropout=0.1, rope_theta=999999.4420358813,
        sliding_window=4096, use_bias=True, vocab_size=49152)}


@pytest.mark.parametrize('name', sorted(FILES))
def test_config_files_say_the_same(tmp_path, name):
  (tmp_path / 'config.json').write_text(json.dumps(FILES[name]))
  config, _ = read_config(tmp_path)
  assert dataclasses.replace(config, name=name, bos_id=None,
                             eos_ids=()) == zoo.config(name)


def test_an_unknown_name_lists_the_known():
  with pytest.raises(InputError, match='opt-125m'):
    zoo.config('opt-350m')

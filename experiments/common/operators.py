"""Steps of a model on a GPU, summed from operators that NVIDIA measured.

The optional package aiconfigurator-core (`pip install -e '.[tables]'`) has the
tables: matrix products, attention, all-reduces, of GPUs and serving engines.
It sums the operators of a prefill or a decode step. The tables that come with
dsjax were fitted to such sums.
"""

import contextlib
import importlib
import importlib.metadata
import json
import logging
import os
import pathlib
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from dsjax.checkpoints import hf_config
from dsjax.config.checks import InputError, require
from dsjax.config.model import ModelConfig
from dsjax.config.placement import Plan
from dsjax.simulation import fitting, latency, profiles, roofline

START, PACKAGE = 'aiconfigurator:', 'aiconfigurator-core'
ENGINES = {'vllm': 'vLLM', 'sglang': 'SGLang', 'trtllm': 'TensorRT-LLM'}
# Of a prefill of fewer tokens, seconds are those of so many: it reads the
# weights all the same. 0: seconds of its own tokens.
FLOORS = (0, 64, 128, 192, 256, 384, 512)
MOST_TOKENS, MOST_CONTEXT, FREE = 16384, 32768, 0.9

Shape = tuple[int, int, int, int]  # prompts, start, stop; or 0, 0, rows, each


class Asked(NamedTuple):
  """What is summed.

  system: a GPU as the package names it. engine: one of ENGINES. version: of
  the engine, or 'current', 'previous', 'next'. weights, kv: how they are
  stored, as the package names it. tables: a folder of other tables, or ''.
  """

  system: str
  engine: str = 'vllm'
  version: str = 'current'
  weights: str = 'bfloat16'
  kv: str = 'bfloat16'
  tables: str = ''

  @property
  def folder(self) -> str | None:
    """The folder of other tables, None without one."""
    return self.tables or None


class Tables(NamedTuple):
  """The package, and what it has of what was asked for.

  version: of the engine. bytes_per_weight, bytes_per_kv: of a number.
  memory_bytes: of a GPU. moe_weights: how weights of experts are stored.
  """

  compile: Any
  package: str
  version: str
  bytes_per_weight: float
  bytes_per_kv: float
  memory_bytes: float
  moe_weights: str


# --- what the package has -----------------------------------------------------


@contextlib.contextmanager
def quiet() -> Iterator[None]:
  """Without what the package prints, in Rust too, to the standard output."""
  logger = logging.getLogger('aiconfigurator_core')
  level = logger.level
  sys.stdout.flush()
  kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
  try:
    os.dup2(nowhere, 1)
    logger.setLevel(logging.CRITICAL)
    yield
  finally:
    logger.setLevel(level)
    os.dup2(kept, 1)
    os.close(kept)
    os.close(nowhere)


def load_tables(asked: Asked) -> Tables:
  """Raises InputError: no package, or none of its names, with those it has."""
  require(not asked.tables or pathlib.Path(asked.tables).is_dir(), '--tables',
          asked.tables, 'a folder')
  try:
    sdk, common, database = (
        importlib.import_module(f'aiconfigurator_core.sdk{name}')
        for name in ('', '.common', '.perf_database'))
  except ImportError as error:
    raise InputError(
        f'--from={START}{asked.system}: {PACKAGE} is not installed: pip '
        f"install -e '.[tables]', with Python 3.11 to 3.13 ({error})"
    ) from error
  with quiet():
    slots = _slots(database, common, asked)
    memory_bytes = database.load_system_spec(
        asked.system, asked.folder)['gpu']['mem_capacity']
  versions = sorted(set(slots.values()))
  require(asked.version in (*slots, *versions), '--version', asked.version,
          f'one of {versions}, or of {list(slots)}')
  kinds = {}
  for flag, mode, name in (
      ('--weights', common.GEMMQuantMode, asked.weights),
      ('--kv', common.KVCacheQuantMode, asked.kv)):
    known = mode.__members__
    require(name in known, flag, name, f'one of {list(known)}')
    kinds[flag] = known[name].value.memory
  experts = common.MoEQuantMode.__members__
  return Tables(
      sdk.EngineHandle.compile, importlib.metadata.version(PACKAGE),
      slots.get(asked.version, asked.version), kinds['--weights'],
      kinds['--kv'], memory_bytes, asked.weights if asked.weights in experts
      else asked.weights.removesuffix('_static'))


def _slots(database, common, asked):
  """{'current': version, ...} of an engine on a GPU."""
  def of(system, engine):
    return database.get_version_slots(system, engine,
                                      systems_paths=asked.folder) or {}
  slots = of(asked.system, asked.engine)
  if not slots:
    known = {system: [name for name in ENGINES if of(system, name)]
             for system in sorted(common.SupportedSystems)}
    require(any(known.values()) or not asked.tables, '--tables', asked.tables,
            f'a folder of tables of {PACKAGE}')
    require(known.get(asked.system), '--from', START + asked.system,
            f'{START}GPU, GPU one of '
            f'{[system for system, names in known.items() if names]}')
    require(False, '--engine', asked.engine,
            f'one of {known[asked.system]} on {asked.system}')
  return slots


# --- the model ----------------------------------------------------------------


def model_config(model: str) -> ModelConfig:
  """Of a name of dsjax.config.zoo, or of a folder with a config.json.

  Raises:
    InputError: neither, or a shape whose operators were not measured.
  """
  config = hf_config.named(model)
  for ok, what in (
      (config.norm == 'rms' and config.pre_norms and not config.post_norms,
       'RMS norms of inputs only'),
      (config.gated and config.activation == 'silu', 'a gate with silu'),
      (config.positions == 'rope' and not config.parallel,
       'rotary positions, attention before the feed-forward'),
      (not any(config.windows), 'no windows'),
      (not config.attn_softcap, 'no cap of attention'),
      (not config.name.endswith('-kv'), 'a shape that is exact')):
    require(ok, '--model', model, 'of a shape whose operators were measured '
            f'(as Llama, Qwen and Mixtral have): {what}')
  return config


def hugging_face(config: ModelConfig) -> dict[str, Any]:
  """The config.json of a model of this shape, as the package reads it."""
  experts = {'num_experts_per_tok': config.experts_per_token}
  if not config.num_experts:
    name, experts = ('Qwen3' if config.qk_norm else 'Qwen2' if config.qkv_bias
                     else 'Llama'), {}
  elif config.qk_norm:
    name, experts = 'Qwen3Moe', experts | {
        'num_experts': config.num_experts,
        'moe_intermediate_size': config.d_ff}
  else:
    name, experts = 'Mixtral', experts | {
        'num_local_experts': config.num_experts}
  return experts | {
      'architectures': [f'{name}ForCausalLM'],
      'num_hidden_layers': config.num_layers, 'hidden_size': config.d_model,
      'num_attention_heads': config.num_heads,
      'num_key_value_heads': config.num_kv_heads,
      'head_dim': config.head_dim, 'intermediate_size': config.d_ff,
      'vocab_size': config.vocab_size,
      'max_position_embeddings': config.max_len, 'hidden_act': 'silu',
      'tie_word_embeddings': config.tied}


# --- steps --------------------------------------------------------------------


def shapes(capacity: float, held: bool = False) -> list[Shape]:
  """Steps to sum: prompts from 0 and behind others, rows of decode.

  Args:
    capacity: tokens of KV that there is room for.
    held: others, to test a fit with: one and a half times as large.
  """
  def sizes(least, most):
    each = [least * 2**i for i in range(32) if least * 2**i <= most]
    return [n * 3 // 2 for n in each[:-1]] if held else each

  prompts = [(count, 0, n) for count in ([1, *sizes(2, 16)] if held else
                                         sizes(1, 16))
             for n in sizes(32, MOST_TOKENS) if count * n <= MOST_TOKENS]
  prompts += [(1, start, start + n) for start in (
      (1536, 12288) if held else (1024, 4096, 8192, 16384))
              for n in sizes(256, 4096)]
  most = max(capacity, MOST_CONTEXT)
  contexts = sizes(256, MOST_CONTEXT) if held else [
      128, *sizes(512, MOST_CONTEXT)]
  return [(*prompt, 0) for prompt in prompts] + [
      (0, 0, rows, n) for rows in ([1, *sizes(2, 512)] if held else
                                   sizes(1, 512))
      for n in contexts if rows * n <= most]


def _cell(engine, shape):
  """The seconds of a step; a row of decode attends to its own token too."""
  count, start, stop, each = shape
  if count:
    return fitting.Cell(
        ((start, stop),) * count, 0, 0,
        engine.predict_prefill_latency(count, stop, start) / 1e3)
  return fitting.Cell((), stop, stop * (each + 1),
                      engine.predict_decode_latency(stop, each) / 1e3)


def _capacity(tables, config, plan):
  """Tokens of KV that an instance has room for."""
  weights = roofline.num_params(config) * tables.bytes_per_weight
  room = FREE * tables.memory_bytes * plan.num_devices - weights
  return room / (config.kv_bytes_per_token(1) * tables.bytes_per_kv)


def _summed(tables, asked, config, folder, plan, held):
  """[Cell] of a plan."""
  experts = {'moe_tp_size': plan.tp, 'moe_ep_size': 1,
             'moe_quant_mode': tables.moe_weights} if config.num_experts else {}
  try:
    engine = tables.compile(
        folder, asked.system, asked.engine, backend_version=tables.version,
        tp_size=plan.tp, pp_size=plan.pp, systems_path=asked.folder,
        gemm_quant_mode=asked.weights, kvcache_quant_mode=asked.kv,
        fmha_quant_mode='bfloat16' if asked.kv == 'bfloat16' else None,
        **experts)
    cells = [_cell(engine, shape) for shape in shapes(
        _capacity(tables, config, plan), held)]
  except Exception as error:  # of many kinds, and it panics in Rust
    said = ' '.join(str(error).split())
    raise InputError(f'--plans={plan}: {PACKAGE} cannot sum it: '
                     f'{said[:400] or type(error).__name__}') from error
  return cells


def fit_floor(cells: Sequence[fitting.Cell], pp: int) -> latency.Affine:
  """The Affine nearest to the cells, of those with one of FLOORS."""
  def error(model):
    return sum((fitting.predict_s(model, cell) / cell.seconds - 1)**2
               for cell in cells if cell.kind == 'prefill')
  return min((fitting.fit_affine(cells, latency.Buckets(
      tokens=(floor,) if floor else ()), pp=pp, compiled=False)
              for floor in FLOORS), key=error)


def fit_operators(asked: Asked, model: str, plans: Sequence[Plan], device: str
                  ) -> tuple[profiles.Profile,
                             Mapping[Plan, list[fitting.Cell]],
                             Mapping[Plan, list[fitting.Cell]]]:
  """(Profile, {Plan: Cells} that it was fitted to, others not fitted to).

  Plans whose weights have no room are left out.

  Args:
    device: what the Profile calls the GPU.

  Raises:
    InputError: see load_tables, model_config; no plan has room, or the package
      does not know its operators.
  """
  config = model_config(model)
  for plan in plans:
    require(config.num_layers % plan.pp == 0, '--plans', str(plan),
            f'of stages that divide the {config.num_layers} layers of '
            f'{config.name}')
  tables = load_tables(asked)
  fitting_plans = [plan for plan in plans
                   if _capacity(tables, config, plan) > 0]
  require(fitting_plans, '--plans', [str(plan) for plan in plans],
          f'of more devices: {asked.weights} weights of {config.name} leave no '
          f'room in {FREE:.0%} of {tables.memory_bytes / 1e9:.0f} GB each')
  fitted, held = {}, {}
  with tempfile.TemporaryDirectory() as folder, quiet():
    (pathlib.Path(folder) / 'config.json').write_text(
        json.dumps(hugging_face(config)))
    for plan in fitting_plans:
      fitted[plan], held[plan] = (
          _summed(tables, asked, config, folder, plan, other)
          for other in (False, True))
  latencies = {plan: fit_floor(cells, plan.pp)
               for plan, cells in fitted.items()}
  return profiles.Profile(
      config.name, device, latencies, source=_source(tables, asked, config),
      errors={plan: {kind: (error.mape, error.worst) for kind, error in
                     fitting.residuals(latencies[plan], cells).items()}
              for plan, cells in fitted.items()},
      bytes_per_weight=tables.bytes_per_weight,
      bytes_per_kv=tables.bytes_per_kv), fitted, held


def _source(tables, asked, config):
  stored = (f'{asked.weights} weights and KV' if asked.weights == asked.kv
            else f'{asked.weights} weights, {asked.kv} KV')
  package = f'{PACKAGE} {tables.package}'
  return (
      f'{ENGINES[asked.engine]} {tables.version} on {asked.system}, {stored}: '
      'operators measured by NVIDIA, tables of ' + (
          f'{pathlib.Path(asked.tables).resolve().parent.name}, read by '
          f'{package}' if asked.tables else package)
      + ' (Apache-2.0), summed and fitted' + (
          ', experts tensor-parallel and unevenly chosen (power law 1.2)'
          if config.num_experts else '')
      + f"; without the host's time; of 32 to {MOST_TOKENS:,} prefill tokens "
      f'and 128 to {MOST_CONTEXT:,} tokens a decode row')

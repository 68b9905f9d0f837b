"""Operators that NVIDIA measured, by a fake of the package and by its own."""

import enum
import importlib.metadata
import importlib.util
import io
import json
import os
import sys
import types

import pytest
from rich.console import Console

from dsjax.checkpoints import hf_config
from dsjax.config import zoo
from dsjax.config.placement import Plan
from dsjax.scheduling.policy import DISTSERVE
from dsjax.simulation import fitting, latency, profiles
from experiments import measure, place, simulate
from experiments.common import cli, operators

# Below 192 tokens a prefill costs as much as one of 192.
TRUTH = latency.Affine((2e-3, 4e-5, 1e-9), (5e-3, 3e-8, 1e-5),
                       buckets=latency.Buckets((192,)), piece_s=2e-5)


def modes(**bytes_each):
  return enum.Enum('Mode', {name: types.SimpleNamespace(memory=size, own=name)
                            for name, size in bytes_each.items()})


class Engine:
  """The package's EngineHandle, of an instance that TRUTH describes."""

  asked: list[dict] = []

  @classmethod
  def compile(cls, path, system, backend, **options):
    os.write(1, b'printed by Rust, with a path')
    config, _ = hf_config.read_config(path)
    assert config.num_heads % options['tp_size'] == 0, 'heads are not divisible'
    cls.asked.append(dict(options, config=config, system=system,
                          engine=backend))
    return cls()

  def predict_prefill_latency(self, count, stop, start):
    return 1e3 * TRUTH.prefill_s(((start, stop),) * count)

  def predict_decode_latency(self, rows, context):
    return 1e3 * TRUTH.decode_s(rows, rows * (context + 1))


def slots(system, engine, systems_paths=None):
  return {} if systems_paths else {
      ('h100_sxm', 'vllm'): {'current': '0.24.0', 'next': '0.27.0'},
      ('gb300', 'sglang'): {'current': '0.5.14'}}.get((system, engine))


@pytest.fixture
def package(monkeypatch):
  """A small fake of aiconfigurator-core."""
  for name, fields in {
      'aiconfigurator_core': {}, 'aiconfigurator_core.sdk': dict(
          EngineHandle=Engine),
      'aiconfigurator_core.sdk.common': dict(
          SupportedSystems={'h100_sxm', 'gb300', 'l4'},
          GEMMQuantMode=modes(bfloat16=2, fp8=1, fp8_static=1),
          MoEQuantMode=modes(bfloat16=2, fp8=1),
          KVCacheQuantMode=modes(bfloat16=2, fp8=1)),
      'aiconfigurator_core.sdk.perf_database': dict(
          get_version_slots=slots, load_system_spec=lambda *_: {
              'gpu': {'mem_capacity': 86e9}})}.items():
    module = types.ModuleType(name)
    vars(module).update(fields)
    monkeypatch.setitem(sys.modules, name, module)
  monkeypatch.setattr(importlib.metadata, 'version', lambda _: '9.8')
  monkeypatch.setattr(Engine, 'asked', [])


def run(tmp_path, *flags, errors=None):
  text = io.StringIO()
  options = cli.parse(measure.FLAGS, [
      '--model=llama-3-8b', f'--out={tmp_path / "out"}', *flags])
  code = cli.exit_code(measure.run, options, Console(file=text, width=400))
  return code, text.getvalue() or errors.readouterr().err


def test_the_operators_of_a_model_become_a_file(tmp_path, package, capfd):
  code, text = run(tmp_path, '--from=aiconfigurator:h100_sxm',
                   '--plans=1x1,2x2')
  assert code == 0 and 'by Rust' not in capfd.readouterr().out
  profile = profiles.load(next((tmp_path / 'out').glob('latency-*.json')))
  assert (profile.model, profile.device) == ('llama-3-8b', 'h100_sxm')
  assert 'vLLM 0.24.0 on h100_sxm, bfloat16 weights and KV' in profile.source
  assert 'aiconfigurator-core 9.8 (Apache-2.0)' in profile.source
  for plan in (Plan(), Plan(2, 2)):
    fitted = profile.latencies[plan]
    assert fitted.buckets.tokens == (192,) and fitted.pp == plan.pp
    for field in ('prefill', 'decode'):
      assert getattr(fitted, field) == pytest.approx(getattr(TRUTH, field),
                                                     rel=1e-3)
    assert max(profile.errors[plan]['prefill']) < 1e-6
    assert f'plan {plan}, sizes not fitted to' in text
  # What NVIDIA's package was asked for, and the model that it read.
  ends = [(asked['tp_size'], asked['pp_size']) for asked in Engine.asked]
  assert sorted(set(ends)) == [(1, 1), (2, 2)]
  asked, config = Engine.asked[0], zoo.config('llama-3-8b')
  for field in ('num_layers', 'd_model', 'num_heads', 'num_kv_heads',
                'head_dim', 'd_ff', 'vocab_size', 'max_len', 'tied'):
    assert getattr(asked['config'], field) == getattr(config, field)
  assert (asked['backend_version'], asked['gemm_quant_mode'],
          asked['kvcache_quant_mode'], asked['fmha_quant_mode']) == (
              '0.24.0', 'bfloat16', 'bfloat16', 'bfloat16')
  assert 'moe_tp_size' not in asked


def test_experts_and_fp8_by_the_names_of_the_package(tmp_path, package):
  code, _ = run(tmp_path, '--from=aiconfigurator:h100_sxm', '--plans=2x1',
                '--model=qwen3-30b-a3b', '--weights=fp8_static', '--kv=fp8',
                '--version=next', '--hardware=h100-80g')
  asked = Engine.asked[0]
  assert code == 0 and asked['backend_version'] == '0.27.0'
  assert [asked[f'{kind}_quant_mode'] for kind in (
      'gemm', 'moe', 'kvcache', 'fmha')] == ['fp8_static', 'fp8', 'fp8', None]
  assert (asked['moe_tp_size'], asked['moe_ep_size']) == (2, 1)
  assert (asked['config'].num_experts, asked['config'].d_ff) == (128, 768)
  profile = profiles.load(next((tmp_path / 'out').glob('latency-*.json')))
  assert profile.device == 'h100-80g'
  assert 'vLLM 0.27.0' in profile.source and 'power law' in profile.source
  assert 'fp8_static weights, fp8 KV' in profile.source
  assert (profile.bytes_per_weight, profile.bytes_per_kv) == (1, 1)


def test_a_plan_without_room_is_left_out(tmp_path, package, capsys):
  flags = ('--from=aiconfigurator:h100_sxm', '--model=llama-3-70b')
  code, text = run(tmp_path, *flags, '--plans=1x1,2x1')
  assert code == 0 and 'plan 1x1: left out' in text
  profile = profiles.load(next((tmp_path / 'out').glob('latency-*.json')))
  assert list(profile.latencies) == [Plan(2, 1)]
  code, text = run(tmp_path, *flags, errors=capsys)
  assert code == 2 and 'no room in 90% of 86 GB' in text
  assert run(tmp_path, *flags, '--weights=fp8')[0] == 0


@pytest.mark.parametrize('flags, parts', [
    (['--from=aiconfigurator:h100'], ["--from='aiconfigurator:h100'",
                                      "['gb300', 'h100_sxm']"]),
    (['--from=aiconfigurator:'], ["['gb300', 'h100_sxm']"]),
    (['--engine=trtllm'], ["--engine='trtllm'", "['vllm'] on h100_sxm"]),
    (['--version=0.1'], ["--version='0.1'", "['0.24.0', '0.27.0']",
                         "'current'"]),
    (['--version=previous'], ["--version='previous'", "'next'"]),
    (['--weights=int3'], ["--weights='int3'", "'fp8_static'"]),
    (['--kv=int3'], ["--kv='int3'", "'fp8'"]),
    (['--tables=/nowhere'], ["--tables='/nowhere'", 'a folder']),
    (['--tables=.'], ["--tables='.'", 'tables of aiconfigurator-core']),
    (['--plans=3x1'], ['--plans=3x1', 'heads are not divisible']),
    (['--plans=1x3'], ["--plans='1x3'", 'divide the 32 layers']),
    (['--placement=colocated=1x1'], ["--from='aiconfigurator:h100_sxm'",
                                     'a file of requests']),
    (['--model=opt-13b'], ["--model='opt-13b'", 'RMS norms']),
    (['--model=gemma-2-2b'], ['--model=', 'RMS norms of inputs only']),
    (['--model=mistral-7b'], ['--model=', 'no windows']),
    (['--model=deepseek-v2-kv'], ['--model=', 'exact']),
    (['--model=nothing'], ["model='nothing'", 'llama-3-8b'])])
def test_what_is_not_there_is_named_with_what_is(
    tmp_path, package, capsys, flags, parts):
  code, text = run(tmp_path, '--from=aiconfigurator:h100_sxm', *flags,
                   errors=capsys)
  assert code == 2 and text.startswith('error: ')
  for part in parts:
    assert part in text
  assert not (tmp_path / 'out').exists()


def test_a_model_of_ones_own(tmp_path, package):
  """A folder with a config.json, as those of Hugging Face."""
  own = tmp_path / 'my-model'
  own.mkdir()
  config = operators.hugging_face(zoo.config('qwen2.5-7b'))
  (own / 'config.json').write_text(json.dumps(config | {'hidden_size': 3072}))
  assert run(tmp_path, '--from=aiconfigurator:h100_sxm',
             f'--model={own}')[0] == 0
  profile = profiles.load(next((tmp_path / 'out').glob('latency-*.json')))
  assert profile.model == 'my-model'
  assert Engine.asked[0]['config'].d_model == 3072
  # What reads the file takes the folder as well.
  flags = [f'--model={own}', f'--out={tmp_path}',
           f'--latency={next((tmp_path / "out").glob("latency-*.json"))}']
  for found in (place._problem(cli.parse(place.FLAGS, flags)), simulate.problem(
      cli.parse(simulate.FLAGS, flags), None, DISTSERVE, 0)):
    assert found.model.d_model == 3072
    assert found.latency_of(Plan()) == profile.latencies[Plan()]


def test_the_package_is_missing(tmp_path, monkeypatch, capsys):
  for name in [name for name in sys.modules
               if name.startswith('aiconfigurator_core')]:
    monkeypatch.delitem(sys.modules, name)
  monkeypatch.setitem(sys.modules, 'aiconfigurator_core', None)
  code, text = run(tmp_path, '--from=aiconfigurator:h100_sxm', errors=capsys)
  assert code == 2 and text.count('\n') == 1
  assert "pip install -e '.[tables]'" in text


@pytest.mark.parametrize('name', [
    name for name in zoo.NAMES if name.startswith(('llama', 'qwen', 'mixtral'))
    or name == 'smollm3-3b'])
def test_the_config_of_each_shape_reads_back(tmp_path, name):
  config = operators.model_config(name)
  (tmp_path / 'config.json').write_text(json.dumps(
      operators.hugging_face(config)))
  read = hf_config.read_config(tmp_path)[0]
  for field in ('num_layers', 'd_model', 'num_heads', 'num_kv_heads',
                'head_dim', 'd_ff', 'vocab_size', 'max_len', 'tied', 'qk_norm',
                'qkv_bias', 'num_experts', 'experts_per_token'):
    assert getattr(read, field) == getattr(config, field)


def test_prefills_grow_beyond_the_least_that_they_cost():
  """The least is a line's, not a mean of what shorter prompts took: with that
  a longer prompt would be faster."""
  cells = [fitting.Cell(((0, n),), 0, 0, 1.1 * TRUTH.prefill_s(((0, n),))
                        if n < 192 else TRUTH.prefill_s(((0, n),)))
           for n in (32, 64, 128, 256, 512, 1024, 2048)]
  fitted = operators.fit_floor([*cells, fitting.Cell((), 1, 500, 0.01)], 1)
  assert fitted.buckets.tokens and fitted.costs == latency.Costs()
  seconds = [fitted.prefill_s(((0, n),)) for n in range(1, 600)]
  assert seconds == sorted(seconds)


def test_sizes_held_out_are_not_those_that_are_fitted():
  fitted, held = (operators.shapes(4e5, held) for held in (False, True))
  assert not set(fitted) & set(held)
  assert len(set(fitted)) == len(fitted) == 119
  for shapes in (fitted, held):
    assert all(count * stop <= 16384 * 5 // 4 or count == 1
               for count, _, stop, _ in shapes if count)
    assert all(rows * each <= 4e5 for count, _, rows, each in shapes
               if not count)


# --- with the package ---------------------------------------------------------


@pytest.mark.skipif(not importlib.util.find_spec('aiconfigurator_core'),
                    reason="pip install -e '.[tables]'")
@pytest.mark.parametrize('plan', [Plan(), Plan(8, 1)])
def test_the_table_that_comes_with_dsjax_comes_out_again(plan):
  shipped = profiles.table('h100-80g', 'llama-3-8b')
  profile, cells, held = operators.fit_operators(
      operators.Asked('h100_sxm', version='0.24.0'), 'llama-3-8b', [plan],
      'h100-80g')
  ours, theirs = profile.latencies[plan], shipped.latencies[plan]
  assert (ours.buckets, ours.split) == (theirs.buckets, theirs.split)
  for cell in cells[plan]:
    assert fitting.predict_s(ours, cell) == pytest.approx(
        fitting.predict_s(theirs, cell), rel=1e-3)
  for kind, (mean, worst) in shipped.errors[plan].items():
    assert profile.errors[plan][kind] == (pytest.approx(mean, abs=1e-3),
                                          pytest.approx(worst, abs=1e-2))
  assert all(error.mape < 0.06 for error in fitting.residuals(
      ours, held[plan]).values())

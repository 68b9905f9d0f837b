import dataclasses
import json
import math

import numpy as np
import pytest

from configs.serve import Serve, Workload
from dsjax.config import zoo
from dsjax.config.checks import (
    InputError,
    is_integer,
    is_nonnegative,
    is_number,
    is_positive,
    is_positive_int,
    parse_json,
)
from dsjax.config.engine import EngineConfig, InstanceConfig
from dsjax.config.placement import Plan, Slo
from dsjax.config.request import Request, Sampling
from dsjax.http.service import Limits
from dsjax.placement.clusters import Border, Cluster
from dsjax.simulation import hardware
from dsjax.simulation.latency import Affine, Link


@pytest.mark.parametrize('test, good, bad', [
    (is_nonnegative, (0, 0.5, 3), (-1, -0.5)),
    (is_positive, (0.5, 3), (0, 0.0, -1)),
    (is_positive_int, (1, 10**400), (0, -1, 1.0)),
    (is_integer(2, 3), (2, 3), (1, 4, 2.0)),
    (is_number(-1, 1), (-1, 0.5, 1), (-1.1, 1.1)),
    (is_number(-1, 1, low_open=True), (-0.9, 1), (-1,))])
def test_numbers(test, good, bad):
  assert all(map(test, good))
  never = (True, None, '1', math.nan, math.inf, -math.inf, [1])
  assert not any(map(test, (*bad, *never)))


NUMPYS = {int: (np.int8, np.int64, np.uint16),
          float: (np.float16, np.float32, np.float64), bool: (np.bool_,)}


def test_numpys_scalars_are_numbers():
  whole, some = is_integer(1, 9), is_number(1, 9)
  for kind in NUMPYS[int]:
    assert whole(kind(5)) and some(kind(5)) and not whole(kind(0))
  for kind in NUMPYS[float]:
    assert some(kind(2.5)) and not whole(kind(2.0)) and not some(kind(0))
    assert not some(kind('nan')) and not is_positive(kind('inf'))
  for other in (np.bool_(True), np.array(5), np.array([5]), np.str_('5'),
                np.complex64(5)):
    assert not whole(other) and not some(other)


RECORDS = (
    Sampling(max_tokens=20, temperature=0.5, top_k=3, top_p=0.5, min_p=0.25,
             repetition_penalty=1.5, presence_penalty=0.5, seed=9, logprobs=2,
             frequency_penalty=0.5, stop_token_ids=(4, 5), ignore_eos=True,
             logit_bias=((5, 1.5),), min_tokens=3),
    Request(7, 1.5, (5,)), Plan(2, 1), Slo(0.5, 0.25), Cluster(2, 4),
    EngineConfig(max_len=128, num_pages=32, memory_bytes=100, run_ahead=3,
                 restart_s=0.25, lease_s=0.5, checksum=True),
    InstanceConfig('decode', 8, 16, 4, 32, 2),
    Limits(max_waiting=5, max_ttft_s=0.5))


def as_numpys(value, kinds):
  """The value with each of its numbers as one of numpy's."""
  if isinstance(value, tuple):
    return tuple(as_numpys(item, kinds) for item in value)
  kind = kinds.get(type(value))
  return kind(value) if kind else value


@pytest.mark.parametrize('record', RECORDS, ids=lambda r: type(r).__name__)
@pytest.mark.parametrize('number', (np.float32, np.float64))
def test_a_record_of_numpys_numbers_is_one_of_pythons(record, number):
  kinds = {int: np.int64, float: number, bool: np.bool_}
  for field in dataclasses.fields(record):
    value = getattr(record, field.name)
    if isinstance(value, float) and float(number(value)) != value:
      continue  # it has fewer digits
    changed = dataclasses.replace(record, **{
        field.name: as_numpys(value, kinds)})
    own = getattr(changed, field.name)
    if field.name == 'prompt':
      continue  # of any integers
    assert own == value and type(own) is type(value)
    json.dumps(own, default=vars)


@pytest.mark.parametrize('value', [
    True, 4.0, np.float32(4), np.bool_(True), np.array(4), '4'])
def test_what_is_no_integer_is_refused(value):
  for make in (lambda v: Sampling(max_tokens=v), lambda v: Sampling(top_k=v),
               lambda v: Sampling(seed=v), lambda v: Plan(v),
               lambda v: Sampling(stop_token_ids=(v,)),
               lambda v: Sampling(logit_bias=((v, 1.0),)),
               lambda v: EngineConfig(max_len=v), lambda v: Cluster(nodes=v),
               lambda v: Limits(max_waiting=v)):
    with pytest.raises(InputError, match='must be'):
      make(value)


def test_an_instance_has_a_dtype_of_a_cache():
  with pytest.raises(InputError, match="kv_dtype='float64': must be .*int8"):
    InstanceConfig('decode', 8, 16, 4, 32, 2, kv_dtype='float64')


MADE = (
    Sampling(), Plan(), Slo(0.5, 0.25), EngineConfig(), Limits(),
    InstanceConfig('decode', 8, 16, 4, 32, 2), zoo.config('qwen3-30b-a3b'),
    Cluster(), Border(1.0, 1.0), Link(1e-3, 1e6, 100.0),
    hardware.HARDWARE['a100-80g'],
    Affine((0.01, 1e-4, 0.0), (0.01, 1e-6, 1e-4)), Workload(), Serve())


@pytest.mark.parametrize('record', MADE, ids=lambda r: type(r).__name__)
def test_a_field_that_is_a_number_takes_nothing_else(record):
  """In every class alike, and the error names the field."""
  fields = {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}
  numbers = {name: value for name, value in fields.items()
             if type(value) in (int, float)}
  assert numbers
  for name, value in numbers.items():
    wrong = [math.nan, -math.inf, True, '1', [1], 1j, np.array(1)]
    wrong += [10**400] if type(value) is float else [1.5, math.inf]
    for bad in wrong:
      with pytest.raises(InputError, match=rf'{name}=.*must be'):
        dataclasses.replace(record, **{name: bad})


def test_an_integer_beyond_every_float_is_no_number():
  assert not is_positive(10**400) and not is_number(-math.inf, 0)(-10**400)


@pytest.mark.parametrize('text', ['', '{', '[' * 99999, b'\xff'])
def test_what_is_not_json_is_named(text):
  with pytest.raises(InputError, match='^a.json, line 3: is not JSON: '):
    parse_json('a.json, line 3', text)

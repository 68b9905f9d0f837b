"""What docs/extending.md changes in one file; its other sections run in
docs_test, and examples_test runs a policy in a file of its own."""

import dataclasses
import re
from collections.abc import Sequence

import jax
import pytest

import dsjax
from dsjax.config import placement as placements
from dsjax.workload import files
from tests.common import serving
from tests.common.fake_engine import FakeEngine


@dataclasses.dataclass(frozen=True)
class WithHelpers(dsjax.Placement):
  """A role more: its field, beside its entry in ROLES."""

  helper: Sequence[dsjax.Plan] = ()


@pytest.fixture
def placement(monkeypatch):
  """A prefill instance and one that decodes and prefills in pieces."""
  monkeypatch.setitem(placements.ROLES, 'helper', placements.Role(
      prefills=True, decodes=True, mixes=True))
  made = WithHelpers.parse('prefill=1x1,helper=1x1')
  assert str(made) == 'prefill=1x1,helper=1x1' and made.mode == 'mixed'
  return made


def test_a_role_of_ones_own_is_simulated(placement):
  run = dsjax.simulate(placement, rate_per_s=2.0, requests=60)
  assert {record.status for record in run.records} <= {'stop', 'length'}
  assert {record.instances for record in run.records} == {(0, 1), (1,)}


def test_a_role_of_ones_own_serves(placement):
  engine = dataclasses.replace(serving.PAGES_4, chunk_tokens=16)
  with dsjax.serve(serving.MODEL, placement, engine, devices=jax.devices()[:2],
                   make_engine=FakeEngine) as server:
    # It prefills in pieces, as every instance that mixes does.
    assert [instance.prefill_tokens for instance in
            server.scheduler_config.instances] == [48, 16]
    outputs = serving.play(server, serving.MIXED)
  serving.check_tokens(serving.MIXED, outputs, serving.expected_of_fakes)


def test_a_column_of_ones_own_is_a_word_in_a_pattern(tmp_path, monkeypatch):
  path = tmp_path / 'trace.csv'
  path.write_text('sent_ms,words read,output_len\n0,5,2\n1500,7,3\n')
  with pytest.raises(dsjax.InputError, match='words read'):
    files.read_lengths(path)
  monkeypatch.setattr(files, 'PROMPT', re.compile(
      f'{files.PROMPT.pattern}|wordsread'))
  assert files.read_lengths(path) == ((0.0, 5, 2), (1.5, 7, 3))

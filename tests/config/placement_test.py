"""Plans and placements as text."""

import pytest

from dsjax.config.checks import InputError
from dsjax.config.placement import Placement, Plan


@pytest.mark.parametrize('text, placement', [
    ('prefill=2x1,decode=1x1',
     Placement(prefill=[Plan(2)], decode=[Plan()])),
    ('prefill=1x1,decode=1x2,1x1',
     Placement(prefill=[Plan()], decode=[Plan(1, 2), Plan()])),
    ('colocated=10x4', Placement(colocated=[Plan(10, 4)])),
    ('chunked=1x1,1x1', Placement(chunked=[Plan(), Plan()]))])
def test_a_placement_is_read_and_written(text, placement):
  assert Placement.parse(text) == placement and str(placement) == text
  for _, plan in placement.instances:
    assert Plan.parse(str(plan)) == plan
  assert [name.split()[1:] for name in placement.names] == [
      [role, str(plan)] for role, plan in placement.instances]


def test_spaces_and_the_order_of_roles_do_not_matter():
  assert str(Placement.parse('decode=1x1, 2x1, prefill=1x1')) == (
      'prefill=1x1,decode=1x1,2x1')


@pytest.mark.parametrize('text', ['1by1', '0x1', '1x0', '1x', '1x1x1', '-1x1',
                                  '1x12345', '', '1x1 ', '\u0661x1'])
def test_a_bad_plan_names_its_field(text):
  with pytest.raises(InputError, match=r"--plans='.*': must be a plan TPxPP"):
    Plan.parse(text, '--plans')


@pytest.mark.parametrize('text', ['1x1', 'prefil=1x1', 'prefill=1by1', '',
                                  'prefill=1x1,decode=0x1', 'decode'])
def test_a_bad_placement_names_its_field_and_the_roles(text):
  with pytest.raises(InputError, match="--placement=.*TPxPP.*'prefill'"):
    Placement.parse(text, '--placement')


@pytest.mark.parametrize('kind', [Plan, Placement])
@pytest.mark.parametrize('text', [None, 5, b'1x1', ['1x1']])
def test_what_is_no_text_is_named(kind, text):
  with pytest.raises(InputError, match='^--it=.*: must be .*TPxPP'):
    kind.parse(text, '--it')


def test_half_a_placement_is_none():
  with pytest.raises(InputError, match='instances that prefill and'):
    Placement.parse('prefill=1x1')

"""What `make test` leaves out of a sample (tests/common/samples.py)."""

import pytest

from tests.common.samples import deep, one_in, thinned


def kept(params):
  return [param for param in params if not getattr(param, 'marks', ())]


def test_a_thinned_sample_keeps_every_value():
  names, params = thinned('a, b', 2, 'xyz', {'one': 1, 'two': 2, 'three': 3}
                          ).args
  assert names == 'a, b' and len(params) == 9
  assert [param.id for param in kept(params)] == [
      'x-one', 'x-three', 'y-two', 'z-one', 'z-three']
  assert kept(params)[2].values == ('y', 2)


@pytest.mark.parametrize('every, axes', [(2, ('xyz', 'ab')), (9, ('x', 'ab'))])
def test_one_that_would_lose_a_value_is_refused(every, axes):
  with pytest.raises(ValueError, match='take another'):
    thinned('a, b', every, *axes)


def test_what_is_deep_is_a_parameter_as_it_was():
  assert [param.values for param in deep(1, (2, 3), ((4, 5),))] == [
      (1,), (2, 3), ((4, 5),)]
  assert kept(one_in(2, [1, 2, 3])) == [1, 3]

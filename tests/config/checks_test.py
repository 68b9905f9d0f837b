import math

import pytest

from dsjax.config.checks import (
    InputError,
    is_integer,
    is_nonnegative,
    is_number,
    is_positive,
    is_positive_int,
    parse_json,
)


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


def test_an_integer_beyond_every_float_is_no_number():
  assert not is_positive(10**400) and not is_number(-math.inf, 0)(-10**400)


@pytest.mark.parametrize('text', ['', '{', '[' * 99999, b'\xff'])
def test_what_is_not_json_is_named(text):
  with pytest.raises(InputError, match='^a.json, line 3: is not JSON: '):
    parse_json('a.json, line 3', text)

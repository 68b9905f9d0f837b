"""Records as plain rows."""

import json

import pytest

from dsjax.analysis.record import STAGES, Record, rows
from dsjax.config.checks import InputError

DONE = Record(3, 1.0, 10, 4, token_s=[1.5, 1.75, 2.0], finish_s=2.0,
              status='length', instances=(0, 2), migrated_tokens=10)
WAITS = Record(4, 1.5, 8, 4)


def test_a_row_is_flat_and_plain():
  row = DONE.row()
  assert json.loads(json.dumps(row)) == row
  assert (row['ttft_s'], row['tpot_s'], row['instances']) == (0.5, 0.25, [0, 2])
  assert all(row[f'{stage}_s'] == 0.0 for stage in STAGES)
  assert not any(isinstance(value, dict) for value in row.values())


def test_rows_have_the_same_columns_and_come_back():
  made = rows([DONE, WAITS])
  assert list(made[0]) == list(made[1])
  assert [Record.of_row(row) for row in made] == [DONE, WAITS]
  assert Record.of_row(made[0] | {'mode': 'chunked'}) == DONE
  with pytest.raises(KeyError, match='prompt_len'):
    Record.of_row({'id': 1, 'arrival_s': 0.0})


@pytest.mark.parametrize('items', [None, 'ab', DONE, [DONE, None], [{}]])
def test_what_has_no_rows_is_named(items):
  with pytest.raises(InputError, match='^rows=.*Records or Outputs'):
    rows(items)

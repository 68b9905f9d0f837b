"""Traces, samples of lengths and prompt files."""

import csv
import datetime
import io
import math
import pathlib
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from dsjax.config.checks import InputError, is_integer, parse_json

MAX_LEN = 2**31 - 1
Path = str | pathlib.Path


class Entry(NamedTuple):
  """One request of a trace. arrival_s counts from the trace's first arrival,
  None where the file holds lengths only; lengths are in tokens."""

  arrival_s: float | None
  prompt_len: int
  output_len: int


class Prompt(NamedTuple):
  """One prompt of a file: either text or chat messages."""

  text: str | None
  messages: tuple[dict, ...] | None
  max_tokens: int | None


def _bad(path, line, column, value, allowed):
  return InputError(f'{path}, line {line}: {column}={repr(value)[:80]}: must '
                    f'be {allowed}')


def _read(path):
  try:
    return pathlib.Path(path).read_text(encoding='utf-8-sig')
  except OSError as error:
    raise InputError(f'{path}: cannot be read: {error.strerror}') from error
  except UnicodeDecodeError as error:
    raise InputError(f'{path}: is not UTF-8 text: {error}') from error


def _lines(text):
  """Yields (number, line), neither blank nor a comment."""
  # Not splitlines: JSON strings and prompts may hold U+2028 and its kind.
  for number, line in enumerate(text.split('\n'), 1):
    line = line.strip()
    if line and not line.startswith('#'):
      yield number, line


def _is_jsonl(path, text):
  _, first = next(_lines(text), (0, ''))
  return pathlib.Path(path).suffix == '.jsonl' or first.startswith('{')


def _json_lines(path, text):
  for number, line in _lines(text):
    value = parse_json(f'{path}, line {number}', line)
    if not isinstance(value, dict):
      raise InputError(f'{path}, line {number}: must be a JSON object '
                       f'{{...}}, is {line[:40]!r}')
    yield number, value


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
  """Yields (line number, dict) of a JSON-lines file; # begins a comment.

  InputError names the file and the line.
  """
  yield from _json_lines(path, _read(path))


def _length(path, line, column, value):
  length = value
  if isinstance(value, str) and re.fullmatch(' *[0-9]{1,10} *', value):
    length = int(value)
  if not is_integer(1, MAX_LEN)(length):
    raise _bad(path, line, column, value,
               f'an integer from 1 to {MAX_LEN} (tokens)')
  return length


def _date(path, line, column, value):
  """Microseconds of an ISO date; no zone means UTC."""
  try:
    date = datetime.datetime.fromisoformat(str(value).strip())
  except ValueError as error:
    raise _bad(path, line, column, value, 'a date and time such as '
               '2023-11-16 18:15:46.680590') from error
  if date.tzinfo is None:
    date = date.replace(tzinfo=datetime.UTC)
  epoch = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
  return (date - epoch) // datetime.timedelta(microseconds=1)


def _time(path, line, column, value):
  try:
    number = float(value) if not isinstance(value, bool) else math.nan
  except (TypeError, ValueError, OverflowError):
    number = math.nan
  if not (math.isfinite(number) and number >= 0):
    raise _bad(path, line, column, value, 'a number, 0 or more')
  return number


# Names of (arrival, prompt, output), the arrival's reader, and its units in a
# second. An arrival of None: the file holds lengths only.
_COLUMNS = (
    ('TIMESTAMP', 'ContextTokens', 'GeneratedTokens', _date, 1e6),  # Azure
    ('timestamp', 'input_length', 'output_length', _time, 1e3),  # Mooncake
    ('arrival_s', 'prompt_len', 'output_len', _time, 1.0),
    (None, 'prompt_len', 'output_len', None, 1.0),
    (None, 'num_prefill_tokens', 'num_decode_tokens', None, 1.0),
)


def _choose_columns(path, line, names):
  for columns in _COLUMNS:
    if {c for c in columns[:3] if c} <= set(names):
      return columns
  choices = '; or '.join(', '.join(c for c in columns[:3] if c)
                         for columns in _COLUMNS)
  raise InputError(f'{path}, line {line}: columns {", ".join(map(str, names))}'
                   f': must include {choices}')


def _csv_rows(path, text):
  reader = csv.DictReader(io.StringIO(text, newline=''),
                          skipinitialspace=True)
  try:
    for row in reader:
      if None in row:
        raise InputError(f'{path}, line {reader.line_num}: has more fields '
                         f'than the {len(reader.fieldnames)} columns')
      yield reader.line_num, row
  except csv.Error as error:
    raise InputError(f'{path}, line {reader.reader.line_num}: is not CSV: '
                     f'{error}') from error


def _field(path, line, row, column):
  value = row.get(column)
  if value is None:
    raise _bad(path, line, column, None, 'present in every row')
  return value


def read_lengths(path: Path) -> tuple[Entry, ...]:
  """Reads a trace or a sample of lengths.

  CSV with a header, or JSON lines (.jsonl, or the first line begins with a
  brace), with the columns of the Azure traces (TIMESTAMP, ContextTokens,
  GeneratedTokens), Mooncake's (timestamp in ms, input_length, output_length;
  hash_ids are ignored), `prompt_len, output_len` with or without arrival_s,
  or `num_prefill_tokens, num_decode_tokens`. More columns may stand by.

  Returns:
    A tuple of Entry, sorted by arrival, the first at 0 s; in the file's order
    where there are no arrivals. Dates keep microseconds.

  Raises:
    InputError naming the file, the line, the column and what it may hold.
  """
  text = _read(path)
  rows = _json_lines if _is_jsonl(path, text) else _csv_rows
  columns, entries = None, []
  for line, row in rows(path, text):
    columns = columns or _choose_columns(path, line, list(row))
    arrival, prompt, output, read_time, _ = columns
    time = arrival and read_time(
        path, line, arrival, _field(path, line, row, arrival))
    entries.append(Entry(time, *(
        _length(path, line, name, _field(path, line, row, name))
        for name in (prompt, output))))
  if not entries:
    raise InputError(f'{path}: must hold at least one row')
  if columns[0] is None:
    return tuple(entries)
  entries.sort(key=lambda e: e.arrival_s)
  first, unit = entries[0].arrival_s, columns[4]
  return tuple(e._replace(arrival_s=(e.arrival_s - first) / unit)
               for e in entries)


def _prompt(path, line, row):
  text, messages = row.get('prompt'), row.get('messages')
  if (text is None) == (messages is None):
    raise InputError(f"{path}, line {line}: must have either 'prompt' or "
                     f"'messages', has {', '.join(row) or 'neither'}")
  if text is not None and not (isinstance(text, str) and text):
    raise _bad(path, line, 'prompt', text, 'a non-empty string')
  if messages is not None:
    ok = isinstance(messages, list) and messages and all(
        isinstance(m, dict) and isinstance(m.get('role'), str)
        and isinstance(m.get('content'), str) for m in messages)
    if not ok:
      raise _bad(path, line, 'messages', messages,
                 "a list of {'role': string, 'content': string}")
    messages = tuple(messages)
  limit = row.get('max_tokens')
  if limit is not None:
    limit = _length(path, line, 'max_tokens', limit)
  return Prompt(text, messages, limit)


def read_prompts(path: Path) -> tuple[Prompt, ...]:
  """Reads prompts: one a line, or JSON lines with prompt or messages.

  Blank lines and lines that begin with # are skipped. A file named .jsonl, or
  one whose first prompt begins with a brace, is JSON lines: {"prompt": string}
  or {"messages": [{"role", "content"}, ...]}, either with "max_tokens"; other
  keys are ignored.

  Returns:
    A tuple of Prompt.

  Raises:
    InputError naming the file, the line and what it may hold.
  """
  text = _read(path)
  if _is_jsonl(path, text):
    prompts = [_prompt(path, *line) for line in _json_lines(path, text)]
  else:
    prompts = [Prompt(line, None, None) for _, line in _lines(text)]
  if not prompts:
    raise InputError(f'{path}: must hold at least one prompt')
  return tuple(prompts)

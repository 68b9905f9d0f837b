"""Workloads: arrival times x lengths, traces and prompt files.

Everything is seeded and reads no clock. Arrivals, lengths and token ids come
from separate random streams of one seed, so that runs at several rates share
their lengths, and their arrivals up to a factor (common random numbers: the
difference between two rates is then not noise of the sample).
"""

import csv
import dataclasses
import datetime
import io
import json
import math
import pathlib
import re
from typing import NamedTuple

import numpy as np

from dsjax.base import InputError, Request, Sampling, require

KINDS = ('poisson', 'gamma', 'uniform', 'burst', 'trace')
MAX_LEN = 2**31 - 1
_ARRIVALS, _LENGTHS, _TOKENS = range(3)  # streams of one seed


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


# --- files ------------------------------------------------------------------


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
    try:
      value = json.loads(line)
    except (ValueError, RecursionError) as error:
      raise InputError(f'{path}, line {number}: is not JSON: {error}'
                       ) from error
    if not isinstance(value, dict):
      raise InputError(f'{path}, line {number}: must be a JSON object '
                       f'{{...}}, is {line[:40]!r}')
    yield number, value


def json_lines(path):
  """Yields (line number, dict) of a JSON-lines file; # begins a comment.

  InputError names the file and the line.
  """
  yield from _json_lines(path, _read(path))


def _length(path, line, column, value):
  length = value
  if isinstance(value, str) and re.fullmatch(' *[0-9]{1,10} *', value):
    length = int(value)
  if not (_whole(length, 1) and length <= MAX_LEN):
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


def read_lengths(path):
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


def read_prompts(path):
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


# --- arrivals and requests --------------------------------------------------


def _whole(value, low):
  return (isinstance(value, int) and not isinstance(value, bool)
          and value >= low)


def _rng(seed, stream):
  require(_whole(seed, 0), 'seed', seed, 'an integer, 0 or more')
  return np.random.default_rng((seed, stream))


def _trace_arrivals(entries, n, rate_per_s):
  times = [e.arrival_s for e in entries or ()]
  require(times and None not in times, 'arrivals.kind', 'trace',
          'another one: the entries have no arrival times')
  require(n <= len(times), 'arrivals.n', n,
          f'at most {len(times)}, the length of the trace')
  times = np.array(times[:n])
  if rate_per_s is not None:
    require(times[-1] > times[0], 'arrivals.rate_per_s', rate_per_s,
            f'None: the first {n} arrivals are at one time, nothing to scale')
    times *= (n - 1) / (times[-1] - times[0]) / rate_per_s
  return times


def arrivals(kind, rate_per_s, n, seed=0, cv=1.0, entries=None):
  """Arrival times of n requests.

  Kinds: 'poisson'; 'gamma' (gaps whose standard deviation is cv times their
  mean: 1 is Poisson, above 1 bursty); 'uniform' (equal gaps); 'burst' (all at
  0); 'trace' (the first n of `entries`, at their own times, or scaled so that
  their mean gap is 1 / rate_per_s). With one seed, the times at two rates are
  the same up to a factor, and a shorter list is a prefix of a longer one.

  Args:
    rate_per_s: unused by 'burst'; None for the trace's own times.
    cv: from 0.01 to 100, 'gamma' only.

  Returns:
    A tuple of n seconds, not decreasing, after a first gap from 0.

  Raises:
    InputError.
  """
  require(kind in KINDS, 'arrivals.kind', kind, f'one of {KINDS}')
  require(_whole(n, 1), 'arrivals.n', n, 'an integer of 1 or more')
  if rate_per_s is not None or kind not in ('burst', 'trace'):
    require(isinstance(rate_per_s, (int, float))
            and math.isfinite(rate_per_s) and rate_per_s > 0,
            'arrivals.rate_per_s', rate_per_s, 'a number above 0')
  require(isinstance(cv, (int, float)) and 0.01 <= cv <= 100, 'arrivals.cv',
          cv, 'a number from 0.01 to 100')
  rng = _rng(seed, _ARRIVALS)
  if kind == 'trace':
    return tuple(_trace_arrivals(entries, n, rate_per_s).tolist())
  if kind == 'burst':
    return (0.0,) * n
  if kind == 'uniform':
    gaps = np.ones(n)
  elif kind == 'poisson':
    gaps = rng.standard_exponential(n)
  else:
    gaps = rng.standard_gamma(cv**-2, n) * cv**2
  return tuple((np.cumsum(gaps) / rate_per_s).tolist())


def from_lengths(entries, n, arrivals_s, vocab_size=None, seed=0,
                 max_prompt=None, max_output=None, in_order=False):
  """Requests with the lengths of a trace and prompts without meaning.

  Args:
    n: requests; each takes the lengths of an entry drawn with replacement,
      or, in_order (with 'trace' arrivals), of the next entry.
    arrivals_s: n seconds.
    vocab_size: ids are drawn below it. None: each prompt is a `range`, for
      simulation, where the ids of a long trace would fill the memory.
    max_prompt, max_output: longer ones are cut to this many tokens.

  Returns:
    (requests, clipped): a list of n Request, ids 0 to n - 1, that generate
    exactly their output length (ignore_eos); and how many of them were cut.

  Raises:
    InputError.
  """
  require(entries, 'from_lengths.entries', entries, 'at least one entry')
  require(_whole(n, 1), 'from_lengths.n', n, 'an integer of 1 or more')
  require(not in_order or n <= len(entries), 'from_lengths.n', n,
          f'at most {len(entries)} in order, the length of the trace')
  require(len(arrivals_s) == n, 'from_lengths.arrivals_s', len(arrivals_s),
          f'{n} times')
  for field, value in (('vocab_size', vocab_size),
                       ('max_prompt', max_prompt), ('max_output', max_output)):
    require(value is None or _whole(value, 1), f'from_lengths.{field}', value,
            'None or an integer of 1 or more')
  picks = range(n)
  if not in_order:
    picks = _rng(seed, _LENGTHS).integers(len(entries), size=n)
  rng = _rng(seed, _TOKENS)
  requests, clipped = [], 0
  for i, (pick, arrival_s) in enumerate(zip(picks, arrivals_s, strict=True)):
    _, prompt_len, output_len = entries[pick]
    p = min(prompt_len, max_prompt or prompt_len)
    o = min(output_len, max_output or output_len)
    clipped += (p, o) != (prompt_len, output_len)
    prompt = range(p)
    if vocab_size is not None:
      prompt = tuple(rng.integers(vocab_size, size=p).tolist())
    requests.append(Request(i, arrival_s, prompt,
                            Sampling(max_tokens=o, ignore_eos=True)))
  return requests, clipped


def from_prompts(prompts, arrivals_s, sampling=None, max_tokens=None):
  """Requests of given token ids.

  Args:
    prompts: token ids of each prompt. arrivals_s: seconds of each.
    sampling: one Sampling for all, or one for each.
    max_tokens: of each prompt, None or a limit in place of its sampling's.

  Returns:
    A list of Request, ids 0, 1, ...

  Raises:
    InputError: lists of different lengths, or an empty prompt.
  """
  n = len(prompts)
  sampling = sampling or Sampling()
  each = [sampling] * n if isinstance(sampling, Sampling) else sampling
  limits = max_tokens or (None,) * n
  for field, values in (('arrivals_s', arrivals_s), ('sampling', each),
                        ('max_tokens', limits)):
    require(len(values) == n, f'from_prompts.{field}', len(values),
            f'as many as the {n} prompts')
  requests = []
  for i, prompt in enumerate(prompts):
    require(len(prompt) > 0, f'from_prompts.prompts[{i}]', prompt,
            'at least one token id')
    choice = each[i]
    if limits[i] is not None:
      choice = dataclasses.replace(choice, max_tokens=limits[i])
    requests.append(Request(i, arrivals_s[i], tuple(prompt), choice))
  return requests

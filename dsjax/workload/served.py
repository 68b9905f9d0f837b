"""What clients saw of a served run: files of any load generator."""

import datetime
import itertools
import math
import re
from typing import Any, NamedTuple

from dsjax.config.checks import InputError, is_integer
from dsjax.workload import files


class Served(NamedTuple):
  """A request as its client saw it. Seconds of one clock: sent, and first and
  last token received; lengths in tokens."""

  arrival_s: float
  prompt_len: int
  output_len: int
  first_s: float
  last_s: float

  @property
  def ttft_s(self) -> float:
    """Arrival to first token."""
    return self.first_s - self.arrival_s

  @property
  def tpot_s(self) -> float | None:
    """Mean seconds of a token after the first; None: there is none."""
    more = self.output_len - 1
    return (self.last_s - self.first_s) / more if more else None


# What others call a column, without case, spaces and punctuation, each of a
# time with its unit behind; of several that say the same, the first counts.
_AT = '(at|time|timestamp|ts|received)?'
_UNIT = '(?P<unit>s|sec|secs|seconds?|[mun]s|(milli|micro|nano)s(econds?)?)?'
_TIMES = {
    'arrival': (f'(request)?(arrival|arrived){_AT}',
                f'(request)?(sent|send|submitted|submit|start|started){_AT}',
                f'(created|requested|request){_AT}|timestamp|ts'),
    'first': (f'(first|1st)(output)?token{_AT}',),
    'ttft': ('ttft|(time|latency)to(first|1st)(output)?token',),
    'last': (f'last(output)?token{_AT}',
             f'(request)?(finish|finished|end|ended|completed|done){_AT}',
             'completion(at|time|timestamp)'),
    'tpot': ('(mean|avg|average)?(tpot|timeperoutputtoken|'
             'itl|intertokenlatency)',),
    'latency': ('(e2e|endtoend|request|total)?(latency|duration)|e2el?',),
}
_FACTOR = {'n': 1e-9, 'u': 1e-6, 'm': 1e-3}


def _columns(names: list[str]) -> dict[str, tuple[str, float | None]]:
  """{meaning: (column, seconds of the unit that its name tells, if any)}."""
  chosen: dict[str, tuple[str, float | None]] = {}
  plain = {name: re.sub('[^a-z0-9]', '', str(name).lower()) for name in names}
  for meaning, patterns in _TIMES.items():
    for pattern, name in itertools.product(patterns, names):
      match = re.fullmatch(f'({pattern}){_UNIT}', plain[name])
      if match and meaning not in chosen:
        unit = (match['unit'] or '').replace('micro', 'u')
        chosen[meaning] = name, _FACTOR.get(unit[0], 1.0) if unit else None
  for meaning, known in (('prompt', files.PROMPT), ('output', files.OUTPUT)):
    for name in names:
      if known.fullmatch(plain[name]):
        chosen.setdefault(meaning, (name, 1.0))
  return chosen


def _seconds(where: str, value: Any, unit_s: float | None) -> float:
  """Seconds of a number in a unit, or of a date; None: in seconds, or a time
  since 1970 in the unit that its size tells."""
  try:
    if isinstance(value, str) and not re.fullmatch(r'[-+.0-9eE ]+', value):
      date = datetime.datetime.fromisoformat(value.strip())
      return (date if date.tzinfo else date.replace(
          tzinfo=datetime.UTC)).timestamp()
    number = math.nan if isinstance(value, bool) else float(value)
    seconds = number * (unit_s or 1 / (files.epoch_per_s(number) or 1))
  except (TypeError, ValueError, OverflowError):
    seconds = math.nan
  if not abs(seconds) < files.MAX_TIME_S:
    raise InputError(f'{where}={value!r}: must be a number of seconds (or of '
                     'the unit that the column is named after, such as '
                     'start_ms), or a date such as 2023-11-16 18:15:46.680590')
  return seconds


def _tokens(where: str, value: Any) -> int:
  number = _seconds(where, value, 1.0)
  if not (number.is_integer() and is_integer(1, files.MAX_LEN)(int(number))):
    raise InputError(f'{where}={value!r}: must be a whole number of tokens, 1 '
                     'or more')
  return int(number)


def _missing(value: Any) -> bool:
  return value is None or value == '' or (
      isinstance(value, float) and math.isnan(value))


def _served(where: str, row: files.Row,
            columns: dict[str, tuple[str, float | None]]) -> Served | None:
  """The Served of a row; None of a request that had no tokens."""

  def at(meaning: str) -> float:
    name, unit_s = columns[meaning]
    return _seconds(f'{where}: {name}', row.get(name), unit_s)

  arrival_s, prompt = at('arrival'), columns['prompt'][0]
  prompt_len = _tokens(f'{where}: {prompt}', row.get(prompt))
  each = row.get('token_s')  # a dsjax.Record
  if isinstance(each, list):
    if not each:
      return None
    ends = [_seconds(f'{where}: token_s', s, 1.0) for s in (each[0], each[-1])]
    return Served(arrival_s, prompt_len, len(each), *ends)
  output = columns['output'][0]
  starts = columns['first' if 'first' in columns else 'ttft'][0]
  if _missing(row.get(starts)) or row.get(output) in (None, '', 0, '0'):
    return None
  output_len = _tokens(f'{where}: {output}', row.get(output))
  first_s = at('first') if 'first' in columns else arrival_s + at('ttft')
  if output_len == 1:
    last_s = first_s
  elif 'last' in columns:
    last_s = at('last')
  elif 'tpot' in columns:
    last_s = first_s + at('tpot') * (output_len - 1)
  else:
    last_s = arrival_s + at('latency')
  return Served(arrival_s, prompt_len, output_len, first_s, last_s)


def read_served(path: files.Path) -> tuple[list[Served], int]:
  """Reads a served run as its clients saw it: CSV, JSON lines or a JSON array.

  Columns are known by the names that load generators give them: arrival
  (start, sent, timestamp), tokens of prompt and output, the first token's time
  or TTFT, the last token's time (end, finish), or TPOT, or the latency of the
  whole; with _ms or _us behind where they are not seconds. Rows of dsjax's own
  records.jsonl too.

  Returns:
    (requests by arrival, the first at 0 s; rows without tokens, left out).

  Raises:
    InputError naming the file, the line, the column and what it may hold.
  """
  columns: dict[str, tuple[str, float | None]] = {}
  out, empty = [], 0
  for line, row in files.table(path):
    where = f'{path}, line {line}'
    if not columns:
      columns = _columns(list(row))
      own = 'token_s' in row
      for needed in (('arrival',), ('prompt',), ('output',),
                     ('first', 'ttft'), ('last', 'tpot', 'latency')):
        if not (own and needed[0] in ('output', 'first', 'last') or any(
            meaning in columns for meaning in needed)):
          raise InputError(
              f'{where}: columns {", ".join(map(str, row))}: must include '
              'arrival_s, prompt_tokens, output_tokens, first_token_s (or '
              'ttft_s), last_token_s (or tpot_s or latency_s): the '
              f'{" or ".join(needed)} is missing')
    request = _served(where, row, columns)
    if request is None:
      empty += 1
      continue
    if not request.arrival_s < request.first_s <= request.last_s:
      raise InputError(f'{where}: arrival, first token, last token='
                       f'{request.arrival_s}, {request.first_s}, '
                       f'{request.last_s}: must be in this order')
    out.append(request)
  if not out:
    raise InputError(f'{path}: must hold at least one request with tokens')
  out.sort()
  start_s = out[0].arrival_s
  return [request._replace(
      arrival_s=request.arrival_s - start_s, first_s=request.first_s - start_s,
      last_s=request.last_s - start_s) for request in out], empty

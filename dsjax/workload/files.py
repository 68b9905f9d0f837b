"""Traces, samples of lengths and prompt files."""

import codecs
import csv
import datetime
import gzip
import io
import json
import math
import pathlib
import re
import warnings
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from dsjax.config.checks import (
  InputError,
  check_fetched,
  is_integer,
  parse_json,
)

MAX_LEN = 2**31 - 1
Path = str | pathlib.Path
Row = dict[str, Any]


class Entry(NamedTuple):
  """One request of a trace. arrival_s counts from the trace's first arrival,
  None where the file holds lengths only; lengths are in tokens."""

  arrival_s: float | None
  prompt_len: int
  output_len: int


class Prompt(NamedTuple):
  """One prompt of a file: either text or chat messages."""

  text: str | None
  messages: tuple[dict[str, Any], ...] | None
  max_tokens: int | None


def _bad(path, line, column, value, allowed):
  return InputError(f'{path}, line {line}: {column}={repr(value)[:80]}: must '
                    f'be {allowed}')


MAX_BYTES = 2**31  # of a file, decompressed
_GZIP = b'\x1f\x8b'
# How files begin that hold no rows of text, and what they are.
_OTHERS_BEGIN = {
    rb'PK\x03\x04': 'a zip file or a spreadsheet', b'PAR1': 'Parquet',
    b'BZh': 'bzip2', rb'\xfd7zXZ': 'xz', rb'\(\xb5/\xfd': 'zstd',
    b'SQLite format': 'a database', b'ARROW1': 'Arrow', rb'\x89HDF': 'HDF5',
    rb'\x93NUMPY': 'numpy', b'%PDF': 'PDF',
    rb'(?i)\s*<(!doctype|html|\?xml)': 'a page of the web or XML'}


def _read(path):
  """The text of a file: UTF-8, UTF-16 where it says so, or either in gzip."""
  try:
    data = pathlib.Path(path).read_bytes()
    if data.startswith(_GZIP):
      with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
        data = file.read(MAX_BYTES + 1)
      if len(data) > MAX_BYTES:
        raise InputError(f'{path}: has more than {MAX_BYTES} bytes')
  except (OSError, EOFError, zlib.error) as error:
    why = getattr(error, 'strerror', None) or error
    raise InputError(f'{path}: cannot be read: {why}') from error
  check_fetched(path, data[:24])
  for begin, name in _OTHERS_BEGIN.items():
    if re.match(begin, data):
      raise InputError(f'{path}: is {name}: must be rows of text, plain or in '
                       'gzip')
  utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
  try:
    text = data.decode('utf-16' if utf16 else 'utf-8-sig')
  except UnicodeDecodeError as error:
    raise InputError(f'{path}: is not UTF-8 text: {error}') from error
  if '\0' in text:
    raise InputError(f'{path}: is not UTF-8 text: it has zero bytes, as UTF-16 '
                     'without its mark')
  return text.replace('\r\n', '\n').replace('\r', '\n')


def _suffix(path):
  path = pathlib.Path(path)
  return (path.with_suffix('') if path.suffix == '.gz' else path
          ).suffix.lower()


# --- rows of JSON -----------------------------------------------------------


def _lines(text: str) -> Iterator[tuple[int, str]]:
  """Yields (number, line), neither blank nor a comment."""
  # Not splitlines: JSON strings and prompts may hold U+2028 and its kind.
  for number, line in enumerate(text.split('\n'), 1):
    line = line.strip()
    if line and not line.startswith('#'):
      yield number, line


def _is_json_lines(path, text):
  _, first = next(_lines(text), (0, ''))
  return _suffix(path) == '.jsonl' or first.startswith('{')


def _json_array(path, text):
  """The items of a text that is one JSON array; None where it is not.

  InputError of one object, over several lines.
  """
  is_json = _suffix(path) == '.json'
  if not text.lstrip().startswith(('[', '{') if is_json else '['):
    return None
  try:
    items = json.loads(text)
  except (ValueError, RecursionError) as error:
    # A prompt may begin with a bracket, and an object be one of several lines.
    if not is_json or text.lstrip().startswith('{'):
      return None
    raise InputError(f'{path}: is not JSON: {error}') from error
  if isinstance(items, list):
    return items
  if '\n' in text.strip():
    raise InputError(f'{path}: is one JSON object, of '
                     f'{", ".join(items)[:80]}: must be an array of objects, '
                     'or an object a line')
  return None


def _json_lines(path, text):
  for number, line in _lines(text):
    value = parse_json(f'{path}, line {number}', line)
    if not isinstance(value, dict):
      raise InputError(f'{path}, line {number}: must be a JSON object '
                       f'{{...}}, is {line[:40]!r}')
    yield number, value


def json_lines(path: Path) -> Iterator[tuple[int, Row]]:
  """Yields (line number, dict) of a JSON-lines file; # begins a comment.

  InputError names the file and the line.
  """
  yield from _json_lines(path, _read(path))


# --- lengths ----------------------------------------------------------------

# What others call a column, without case, spaces and punctuation.
_TOKENS = '(num)?({})(num)?(tokens?|toks?|len|length|size|count)+|{}'
PROMPT = re.compile(_TOKENS.format('prompt|input|context|prefill|request',
                                    'isl'))
OUTPUT = re.compile(_TOKENS.format(
    'output|generated|generation|decode|response|completion', 'osl'))
_ARRIVAL = re.compile(
    '((request|start|arrival|submit|submission|send)?(time(stamp)?|date)'
    '|(request)?arrival(offset|time|timestamp|date)?|ts|datetime'
    '|(arrived|requested|started|created|submitted|sent)(at)?)'
    '(?P<unit>s|sec|secs|seconds?|[mun]s|(milli|micro|nano)s(econds?)?)?')
_TIME_LIKE = re.compile('time|date|arriv|stamp|clock|offset|delay|interval|gap'
                        '|second|epoch|start|begin|when|^t$|^at')
# Known, and not read.
_OTHERS = re.compile(
    'hashids|(num)?total(tokens|len|length)|pdratio|ratio|id|index|.+id|model'
    '|logtype|elapsedtime|priority|type|category|source|dataset|')
_UNITS = {'n': 1e9, 'u': 1e6, 'm': 1e3}  # in a second
MAX_TIME_S = 1e11  # after 1970: the year 5138


class _Columns(NamedTuple):
  """The columns of a file by what they say; units of arrivals in a second,
  and whether the column's name tells the unit."""

  arrival: str | None
  prompt: str
  output: str
  per_s: float
  named_unit: bool


def epoch_per_s(number: float) -> float | None:
  """Units in a second of a time since 1970, seconds down to nanoseconds; None
  of a number that is none from 2001 to 2103."""
  return next((per_s for per_s in (1.0, 1e3, 1e6, 1e9)
               if 1e9 <= number / per_s < 4.2e9), None)


def _plain(name: str) -> str:
  return re.sub('[^a-z0-9]', '', str(name).lower())


def _columns(path, line: int, names: list[str]) -> _Columns:
  """What the columns of a file say.

  Warns of those that say nothing to us. Raises InputError where one may be
  meant for what is missing, or two say the same.
  """
  chosen = {}
  rest = list(names)
  for meaning, known in (('prompt', PROMPT), ('output', OUTPUT),
                         ('arrival', _ARRIVAL)):
    fits = [name for name in names if known.fullmatch(_plain(name))]
    rest = [name for name in rest if name not in fits]
    if len(fits) > 1:
      raise InputError(f'{path}, line {line}: columns {", ".join(fits)}: must '
                       f'be one, the {meaning}')
    chosen[meaning] = fits[0] if fits else None
  rest = [name for name in rest if not _OTHERS.fullmatch(_plain(name))]
  arrival, prompt, output = (chosen[x] for x in ('arrival', 'prompt', 'output'))
  if prompt is None or output is None:
    raise InputError(
        f'{path}, line {line}: columns {", ".join(map(str, names))[:100]}: '
        'must include the tokens of prompt and output, such as prompt_len, '
        'output_len, and may include arrival_s')
  unclear = [name for name in rest if _TIME_LIKE.search(_plain(name))]
  if arrival is None and unclear:
    raise InputError(
        f'{path}, line {line}: column {unclear[0]}: must be called arrival_s '
        'if it says when requests arrive (or arrival_ms, timestamp, '
        'arrived_at), and be left out if it does not')
  if rest:
    warnings.warn(f'{path}: not read: column {", ".join(rest)}', stacklevel=2)
  per_s, unit = 1.0, ''
  if arrival is not None:
    matched = _ARRIVAL.fullmatch(_plain(arrival))
    unit = matched and matched['unit'] or ''
    per_s = _UNITS.get(unit.replace('micro', 'u')[:1], 1.0)
    if not unit and (_plain(arrival), _plain(prompt), _plain(output)) == (
        'timestamp', 'inputlength', 'outputlength'):
      per_s = 1e3  # Mooncake
  return _Columns(arrival, prompt, output, per_s, bool(unit))


def _csv_rows(path, text):
  """Yields (line, row) of CSV with a header, its fields apart by , ; or tab.

  Blank lines and comments are passed over.
  """
  _, header = next(_lines(text), (0, ''))
  reader = csv.reader(
      io.StringIO(text, newline=''), skipinitialspace=True,
      delimiter=max(',;\t', key=header.count))
  names: list[str] | None = None
  try:
    for cells in reader:
      if not any(cell.strip() for cell in cells) or cells[0].startswith('#'):
        continue
      if names is None:
        names = [cell.strip() for cell in cells]
        if len(set(names)) < len(names):
          raise InputError(f'{path}, line {reader.line_num}: columns '
                           f'{", ".join(names)}: must be different')
        continue
      if any(cell.strip() for cell in cells[len(names):]):
        raise InputError(f'{path}, line {reader.line_num}: has more fields '
                         f'than the {len(names)} columns')
      yield reader.line_num, dict.fromkeys(names) | dict(
          zip(names, cells, strict=False))
  except csv.Error as error:
    raise InputError(f'{path}, line {reader.line_num}: is not CSV: '
                     f'{error}') from error


def table(path: Path) -> Iterator[tuple[int, Row]]:
  """Yields (line, row) of CSV, JSON lines or a JSON array (then the item).

  InputError names the file and the line.
  """
  text = _read(path)
  items = _json_array(path, text)
  if items is None:
    rows = _json_lines if _is_json_lines(path, text) else _csv_rows
    yield from rows(path, text)
    return
  for number, item in enumerate(items, 1):
    if not isinstance(item, dict):
      raise InputError(f'{path}, item {number}: must be a JSON object {{...}}, '
                       f'is {str(item)[:40]!r}')
    yield number, item


def _length(path, line, column, value):
  length = value
  if isinstance(value, str) and re.fullmatch(r' *[0-9]{1,10}(\.0+)? *', value):
    length = int(float(value))
  elif isinstance(value, float) and value.is_integer():
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
               '2023-11-16 18:15:46.680590, or seconds, in every row'
               ) from error
  if date.tzinfo is None:
    date = date.replace(tzinfo=datetime.UTC)
  epoch = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
  return (date - epoch) // datetime.timedelta(microseconds=1)


def _is_date(value):
  return isinstance(value, str) and bool(re.match(r' *\d{4}-?\d\d-?\d\d[ T]|'
                                                  r' *\d{4}-\d\d-\d\d', value))


def _time(path, line, column, value):
  try:
    number = float(value) if not isinstance(value, bool) else math.nan
  except (TypeError, ValueError, OverflowError):
    number = math.nan
  if not (math.isfinite(number) and number >= 0):
    raise _bad(path, line, column, value, 'a number, 0 or more, in every row '
               '(or in every row a date and time such as '
               '2023-11-16 18:15:46.680590)')
  return number


def _field(path, line, row, column):
  value = row.get(column)
  if value is None:
    raise _bad(path, line, column, None, 'present in every row')
  return value


def _check_arrivals(path, line, row, known):
  """Raises InputError of a row that arrives where the first one does not."""
  for name in row:
    if name not in known and row[name] is not None and (
        _ARRIVAL.fullmatch(_plain(name)) or _TIME_LIKE.search(_plain(name))):
      raise _bad(path, line, name, row[name], 'in every row, or in none')


def read_lengths(path: Path) -> tuple[Entry, ...]:
  """Reads a trace or a sample of lengths; the text may be in gzip.

  CSV with a header, JSON lines or a JSON array of objects. Columns are known
  by the names that others gave them, whatever their case and punctuation:
  those of dsjax (arrival_s, prompt_len, output_len), of the Azure traces,
  Mooncake (its timestamp is in milliseconds), BurstGPT, Vidur and the like. An
  arrival is a date or a number: what its name ends in (_ms, _us), or else
  seconds, or any unit of a time since 1970, which its size tells. Without one
  the file holds lengths only. A warning names the columns that are not read.

  Returns:
    A tuple of Entry, sorted by arrival, the first at 0 s; in the file's order
    where there are no arrivals. Dates keep microseconds.

  Raises:
    InputError naming the file, the line, the column and what it may hold;
    also where a column may be an arrival but is not known as one.
  """
  columns: _Columns | None = None
  names: list[str] = []
  read_time: Callable[..., float] = _time
  times, lengths = [], []
  for line, row in table(path):
    if columns is None:
      names = list(row)
      columns = _columns(path, line, names)
      if columns.arrival and _is_date(row.get(columns.arrival)):
        read_time, columns = _date, columns._replace(per_s=1e6)
    if columns.arrival:
      times.append(read_time(path, line, columns.arrival,
                             _field(path, line, row, columns.arrival)))
    else:
      _check_arrivals(path, line, row, names)
    lengths.append(tuple(
        _length(path, line, name, _field(path, line, row, name))
        for name in (columns.prompt, columns.output)))
  if columns is None:
    raise InputError(f'{path}: must hold at least one row')
  if not columns.arrival:
    return tuple(Entry(None, *pair) for pair in lengths)
  first, per_s = min(times), columns.per_s
  if not (columns.named_unit or read_time is _date):
    per_s = epoch_per_s(first) or per_s
  if first / per_s >= MAX_TIME_S:
    raise InputError(
        f'{path}: {columns.arrival}={first:.16g}: must be seconds, or a number '
        'of the unit that the column is named after, such as timestamp_ms')
  order = sorted(range(len(times)), key=times.__getitem__)
  return tuple(Entry((times[i] - first) / per_s, *lengths[i])
               for i in order)


# --- prompts ----------------------------------------------------------------

_FORMATS = ('one prompt a line, JSON lines or a JSON array of '
            '{"prompt": ...} or {"messages": [...]}, or ShareGPT\'s JSON')

_LIMITS = 'max_tokens', 'max_completion_tokens', 'max_new_tokens'


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
  for name in _LIMITS:
    if row.get(name) is not None:
      return Prompt(text, messages, _length(path, line, name, row[name]))
  return Prompt(text, messages, None)


def _item_prompt(path, number, item):
  """The Prompt of a row of JSON; None of a ShareGPT conversation in which no
  human speaks."""
  if isinstance(item, str):
    item = {'prompt': item}
  if not isinstance(item, dict):
    raise InputError(f'{path}, item {number}: is {str(item)[:40]!r}: the file '
                     f'must be {_FORMATS}')
  turns = item.get('conversations')
  if turns is None:
    return _prompt(path, number, item)
  if not isinstance(turns, list) or not all(
      isinstance(turn, dict) and isinstance(turn.get('value'), str)
      for turn in turns):
    raise _bad(path, number, 'conversations', turns,
               "a list of {'from': string, 'value': string}")
  human = next((turn['value'] for turn in turns
                if turn.get('from') in ('human', 'user') and turn['value']),
               None)
  return human and Prompt(human, None, None)


def read_prompts(path: Path) -> tuple[Prompt, ...]:
  """Reads prompts: one a line, JSON lines, or a JSON array.

  Blank lines and lines that begin with # are skipped. A file named .jsonl, or
  one whose first prompt begins with a brace, is JSON lines: {"prompt": string}
  or {"messages": [{"role", "content"}, ...]}, either with "max_tokens" (or
  max_completion_tokens, max_new_tokens), or conversations of ShareGPT, of which
  the first human turn is the prompt (a warning counts those without one);
  other keys are ignored. An array holds such objects or strings.

  Returns:
    A tuple of Prompt.

  Raises:
    InputError naming the file, the line and what it may hold; also of a file
    that holds a table, lengths or a trace.
  """
  text, suffix = _read(path), _suffix(path)
  items = _json_array(path, text)
  if items is not None or _is_json_lines(path, text):
    rows = list(_json_lines(path, text) if items is None else
                enumerate(items, 1))
    made = [_item_prompt(path, *row) for row in rows]
    prompts = [prompt for prompt in made if prompt]
    if len(prompts) < len(made):
      warnings.warn(f'{path}: {len(made) - len(prompts)} of {len(made)} '
                    'conversations have no human turn', stacklevel=2)
  else:
    _, header = next(_lines(text), (0, ''))
    names = [_plain(name) for name in re.split('[,;\t]', header)]
    if suffix in ('.json', '.csv', '.tsv') or (
        any(map(PROMPT.fullmatch, names))
        and any(map(OUTPUT.fullmatch, names))):
      raise InputError(f'{path}: {header[:60]!r}: prompts must be {_FORMATS} '
                       '(lengths in tokens are a workload of lengths)')
    prompts = [Prompt(line, None, None) for _, line in _lines(text)]
  if not prompts:
    raise InputError(f'{path}: must hold at least one prompt')
  return tuple(prompts)

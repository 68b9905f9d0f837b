"""Arrivals, lengths, trace readers and prompt files."""

import gzip
import json
import math
import pathlib
import statistics
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax import workload
from dsjax.config.checks import InputError
from dsjax.config.request import Sampling
from dsjax.workload import Entry, Prompt
from dsjax.workload import requests as streams

TRACES = pathlib.Path(__file__).parents[3] / 'shared' / 'traces'
AZURE = 'TIMESTAMP,ContextTokens,GeneratedTokens\n'
LENGTHS = (Entry(None, 5, 2), Entry(None, 9, 4), Entry(None, 70, 30))


def _write(path, text):
  path.write_bytes(text if isinstance(text, bytes) else text.encode())
  return path


@pytest.mark.parametrize('text, entries', [
    # Out of order, seven digits of a second, a zone: sorted from time 0.
    (AZURE + '2023-11-16 18:00:01.5000000,30,4\n'
     '2023-11-16 18:00:00.2500009,10,2\n'
     '2023-11-16 18:00:02.250000+00:00,20,3',
     [(0.0, 10, 2), (1.25, 30, 4), (2.0, 20, 3)]),
    ('{"timestamp": 500, "input_length": 7, "output_length": 1, '
     '"hash_ids": [0]}\n\n'
     '{"timestamp": 2000, "input_length": 8, "output_length": 2}\n',
     [(0.0, 7, 1), (1.5, 8, 2)]),
    ('\ufeffprompt_len, output_len\r\n55,4\r\n829,170\r\n',
     [(None, 55, 4), (None, 829, 170)]),
    ('arrival_s,prompt_len,output_len\n2,5,6\n1,3,4\n',
     [(0.0, 3, 4), (1.0, 5, 6)]),
    ('num_prefill_tokens,num_decode_tokens,pd_ratio\n3772,54,69.8\n',
     [(None, 3772, 54)]),
    # Vidur; vLLM's and BurstGPT's words; other cases, spaces and units.
    ('arrived_at,num_prefill_tokens,num_decode_tokens\n3.5,10,2\n3,20,1\n',
     [(0.0, 20, 1), (0.5, 10, 2)]),
    ('timestamp,prompt_len,output_len\n0.5,5,6\n2,7,8\n',
     [(0.0, 5, 6), (1.5, 7, 8)]),
    ('Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,'
     'Total tokens,Log Type\n5,,1,ChatGPT,472,18,490,API log\n'
     '45,,2,GPT-4,1087,230,1317,API log\n',
     [(0.0, 472, 18), (40.0, 1087, 230)]),
    (' Arrival Time (ms) ; Input Tokens ; Output-Tokens\r\n\r\n'
     '1500;10;2\r\n ; ;\r\n1000;11;3\r\n',
     [(0.0, 11, 3), (0.5, 10, 2)]),
    ('# made by hand\nisl\tosl\tts\n# more\n7\t8.0\t1700000000.5\n',
     [(0.0, 7, 8)]),
    ('time,PROMPT_TOKENS,completion_tokens\n2024-05-12T00:00:01Z,4,5\n'
     '2024-05-12T02:00:00+02:00,6,7\n', [(0.0, 6, 7), (1.0, 4, 5)]),
    ('arrival_us,input_len,output_len,\n2000000,1,2,\n1000000,3,4,\n',
     [(0.0, 3, 4), (1.0, 1, 2)]),
    ('Time (microseconds),isl,osl\n2000000,1,2\n1000000,3,4\n',
     [(0.0, 3, 4), (1.0, 1, 2)]),
    # Times since 1970 in any unit.
    *((f'timestamp,isl,osl\n{start}{"500000000"[:zeros]},1,2\n'
       f'{start}{"0" * zeros},3,4\n', [(0.0, 3, 4), (0.5, 1, 2)])
      for start in (1000000000, 1700000000, 2200000000)
      for zeros in (3, 6, 9)),
    # By Mooncake's names, where small numbers are milliseconds.
    ('timestamp,input_length,output_length\n1700000002.5,1,2\n'
     '1700000000,3,4\n', [(0.0, 3, 4), (2.5, 1, 2)]),
    ('timestamp,input_length,output_length\n1700000002500,1,2\n'
     '1700000000000,3,4\n', [(0.0, 3, 4), (2.5, 1, 2)]),
    ('[{"prompt_len": 3, "output_len": 4, "id": "a"},\n'
     ' {"prompt_len": 5.0, "output_len": 6}]', [(None, 3, 4), (None, 5, 6)]),
])
def test_read_lengths(tmp_path, text, entries):
  with warnings.catch_warnings():
    warnings.simplefilter('error')  # every column is read, or known
    assert workload.read_lengths(_write(tmp_path / 'x', text)) == tuple(
        entries)


def test_columns_that_are_not_read_are_named(tmp_path):
  path = _write(tmp_path / 'x', 'isl,osl,user,colour\n1,2,3,4\n')
  with pytest.warns(UserWarning, match='not read: column user, colour'):
    assert workload.read_lengths(path) == ((None, 1, 2),)


@pytest.mark.parametrize('text, parts', [
    ('prompt_len,output_len\n5,6\n-1,4\n', ['line 3', 'prompt_len', "'-1'",
                                            '1 to']),
    ('prompt_len,output_len\n5,nan\n', ['line 2', 'output_len', "'nan'"]),
    ('prompt_len,output_len\n5,2.5\n', ['line 2', 'output_len', "'2.5'"]),
    ('prompt_len,output_len\n5,0\n', ['line 2', 'output_len', "'0'"]),
    ('prompt_len,output_len\n5,99999999999\n', ['line 2', 'output_len']),
    ('prompt_len,output_len\n5\n', ['line 2', 'output_len', 'present']),
    ('prompt_len,output_len\n5,6,7\n', ['line 2', 'more fields']),
    ('prompt_len,outputs\n5,6\n', ['line 2', 'outputs', 'output_len']),
    ('prompt_len,output_len\n', ['at least one row']),
    *(('{"isl": 1, "osl": 2}\n' + json.dumps({'isl': 1, 'osl': 2, name: 3}),
       ['line 2', name, 'every row, or in none'])
      for name in ('arrival_s', 'timestamp', 'started_at', 'epoch')),
    ('p\0r\0o\0m\0p\0t\0', ['zero bytes', 'UTF-16']),
    ('', ['at least one row']),
    (b'\xff', ['UTF-8']), (b'\xff\xfe', ['at least one row']),
    (b'\xff\xfea', ['is not UTF-8 text']),
    (b'PAR1\xff\xfe', ['is Parquet: must be rows of text, plain or in gzip']),
    (b'%PDF-1.4\n%\xe2', ['is PDF']),
    ('\n<!DOCTYPE HTML>\n<p>404', ['is a page of the web']),
    ('version https://git-lfs.github.com/spec/v1\noid sha256:a\n',
     ['pointer of Git LFS']),
    (b'PK\x03\x04\x00', ['is a zip file or a spreadsheet']),
    (b'\x1f\x8b\x08\x00', ['cannot be read']),
    (gzip.compress(b'isl,osl\n1,2\n', mtime=0)[:-9], ['cannot be read']),
    (gzip.compress(b'isl,osl\n1,2\n', mtime=0)[:10] + bytes(40),
     ['cannot be read']),
    (gzip.compress(b'\xff', mtime=0), ['UTF-8']),
    ('prompt_len,output_len\n' + '1' * 140000 + ',1\n', ['line 2', 'CSV']),
    (AZURE + '2023-11-16 18:00:00,1,1\nyesterday,1,1\n',
     ['line 3', 'TIMESTAMP', "'yesterday'"]),
    (AZURE + '2023-11-16 18:00:00,1,0\n', ['line 2', 'GeneratedTokens']),
    ('{"timestamp": 0, "input_length": 1, "output_length": 1}\n{oops\n',
     ['line 2', 'not JSON']),
    ('{"timestamp": 0, "input_length": 1, "output_length": 1}\n[1]\n',
     ['line 2', 'JSON object']),
    ('{"timestamp": 0, "input_length": 1, "output_length": 1}\n'
     '{"timestamp": 0, "input_length": 1}\n', ['line 2', 'output_length']),
    ('{"timestamp": NaN, "input_length": 1, "output_length": 1}',
     ['line 1', 'timestamp', 'nan']),
    ('{"timestamp": -5, "input_length": 1, "output_length": 1}',
     ['line 1', 'timestamp', '-5']),
    ('{"timestamp": true, "input_length": 1, "output_length": 1}',
     ['line 1', 'timestamp']),
    ('{"timestamp": 0, "input_length": 1.5, "output_length": 1}',
     ['line 1', 'input_length', '1.5']),
    ('{"timestamp": 0, "input_length": true, "output_length": 1}',
     ['line 1', 'input_length', 'True']),
    ('arrival_s,isl,osl\n1700000000000,1,1\n',
     ['arrival_s=1700000000000', 'timestamp_ms']),
    ('timestamp_ms,isl,osl\n1700000000000000,1,1\n', ['timestamp_ms=17']),
    ('timestamp,isl,osl\n50000000000000,1,1\n', ['timestamp=5', 'seconds']),
    ('timestamp,isl,osl\n5,1,1\n2023-11-16 18:00:00,1,1\n',
     ['line 3', 'timestamp', "'2023", 'every row']),
    # What may be an arrival is not passed over; no meaning is given twice.
    *((f'{name},prompt_len,output_len\n1,5,6\n', ['line 2', name])
      for name in ('start', 'epoch', 'begin_s', 'at_s', 'session_start')),
    ('when (clock),prompt_len,output_len\n1,5,6\n',
     ['line 2', 'when (clock)', 'arrival_s']),
    ('prompt_len,input_tokens,output_len\n1,5,6\n',
     ['prompt_len, input_tokens', 'must be one, the prompt']),
    ('time,timestamp,isl,osl\n1,1,5,6\n', ['time, timestamp', 'arrival']),
    ('isl,isl,osl\n1,5,6\n', ['line 1', 'isl, isl', 'different']),
    ('100,20\n200,30\n', ['line 2', '100, 20', 'prompt_len']),
    ('[{"isl": 1, "osl": 2}, 3]', ['item 2', 'JSON object', '3']),
    ('[{"isl": 1, "osl": 2}, {"isl": 1}]', ['line 2', 'osl', 'present']),
    ('{"a": ' + '[' * 100000, ['line 1', 'not JSON']),
])
def test_read_lengths_names_what_is_wrong(tmp_path, text, parts):
  path = _write(tmp_path / 'trace', text)
  with pytest.raises(InputError) as error:
    workload.read_lengths(path)
  for part in [str(path), *parts]:
    assert part in str(error.value)


@pytest.mark.parametrize('text', [
    'arrival_s,isl,osl\n0,1,2\n1,3,4\n', 'arrival_s;isl;osl\r\n0;1;2\r\n1;3;4',
    'arrival_s\tisl\tosl\r0\t1\t2\r1\t3\t4\r',
    '[{"arrival_s": 0, "isl": 1, "osl": 2},\n{"arrival_s": 1, "isl": 3, '
    '"osl": 4}]'])
@pytest.mark.parametrize('encoding', ('utf-8', 'utf-8-sig', 'utf-16'))
def test_a_text_in_any_usual_coat(tmp_path, text, encoding):
  data = text.encode(encoding)
  for name, coat in (('a.csv', data), ('a.csv.gz', gzip.compress(data)),
                     ('a', gzip.compress(data))):
    path = _write(tmp_path / name, coat)
    assert workload.read_lengths(path) == ((0.0, 1, 2), (1.0, 3, 4))
  prompt = Prompt('Hi', None, None)
  path = _write(tmp_path / 'p.jsonl.gz', gzip.compress(
      '{"prompt": "Hi"}\n'.encode(encoding)))
  assert workload.read_prompts(path) == (prompt,)


def test_missing_file_is_an_input_error(tmp_path):
  for read in (workload.read_lengths, workload.read_prompts):
    with pytest.raises(InputError, match='nowhere.csv: cannot be read'):
      read(tmp_path / 'nowhere.csv')


@pytest.mark.skipif(not TRACES.exists(), reason='no ../shared/traces here')
@pytest.mark.parametrize('name, rows, first, timed', [
    ('azure/AzureLLMInferenceTrace_conv.csv', 19366, (374, 44), True),
    ('azure/AzureLLMInferenceTrace_code.csv', 8819, (4808, 10), True),
    ('mooncake/conversation_trace.jsonl', 12031, (6758, 500), True),
    ('lengths/sharegpt_lengths_distserve.csv', 1600, (55, 4), False),
    ('lengths/arxiv_summarization.csv', 28257, (3772, 54), False),
])
def test_real_traces(name, rows, first, timed):
  entries = workload.read_lengths(TRACES / name)
  assert len(entries) == rows and entries[0][1:] == first
  times = [e.arrival_s for e in entries]
  if timed:
    assert times[0] == 0 and times == sorted(times)
    assert 3000 < times[-1] < 4000  # each is about an hour
  else:
    assert set(times) == {None}


def test_read_prompts_text(tmp_path):
  path = _write(tmp_path / 'p.txt', '# comment\n\n Hello \u2028there \r\nBye')
  assert workload.read_prompts(path) == (
      Prompt('Hello \u2028there', None, None), Prompt('Bye', None, None))


def test_read_prompts_jsonl(tmp_path):
  chat = [{'role': 'user', 'content': 'Hi'}]
  rows = [{'prompt': 'a\nb', 'task_id': 3},
          {'messages': chat, 'max_tokens': 7}]
  text = '# note\n' + '\n\n'.join(map(json.dumps, rows))
  for name in ('p.jsonl', 'p.txt'):
    assert workload.read_prompts(_write(tmp_path / name, text)) == (
        Prompt('a\nb', None, None), Prompt(None, tuple(chat), 7))


@pytest.mark.parametrize('name', (
    'max_tokens', 'max_completion_tokens', 'max_new_tokens'))
def test_a_limit_of_an_answer_has_several_names(tmp_path, name):
  path = tmp_path / 'prompts.jsonl'
  path.write_text('\n'.join(json.dumps({'prompt': 'Hi', name: limit})
                            for limit in (5, None)))
  assert [p.max_tokens for p in workload.read_prompts(path)] == [5, None]
  path.write_text(json.dumps({'prompt': 'Hi', name: 0}))
  with pytest.raises(InputError, match=f'{name}=0: must be'):
    workload.read_prompts(path)


def test_read_prompts_of_an_array(tmp_path):
  chat = [{'role': 'user', 'content': 'Hi'}]
  turns = [{'from': 'gpt', 'value': 'Yes?'}, {'from': 'human', 'value': 'So'}]
  items = ['plain', {'prompt': 'b', 'max_tokens': 2}, {'messages': chat},
           {'id': 'x', 'conversations': turns}, {'conversations': []}]
  path = _write(tmp_path / 'p.json', json.dumps(items, indent=1))
  with pytest.warns(UserWarning, match='1 of 5 conversations'):
    assert workload.read_prompts(path) == (
        Prompt('plain', None, None), Prompt('b', None, 2),
        Prompt(None, tuple(chat), None), Prompt('So', None, None))
  lines = _write(tmp_path / 'p.jsonl', json.dumps(items[3]) + '\n')
  assert workload.read_prompts(lines) == (Prompt('So', None, None),)
  bracket = _write(tmp_path / 'p.txt', '[INST] Hi [/INST]')
  assert workload.read_prompts(bracket)[0].text == '[INST] Hi [/INST]'


@pytest.mark.parametrize('name, text, part', [
    ('p.csv', 'act,prompt\na,b\n', 'one prompt a line'),
    ('p.tsv', 'prompt\na\n', 'one prompt a line'),
    ('p.txt', 'prompt_len,output_len\n5,6\n', 'workload of lengths'),
    ('p.json', '[1]', "item 1: is '1'"),
    ('p.json', '[{"prompt": "a"}', 'Expecting'),
    ('p.json', 'a prompt', 'JSON array'), ('p.json', '[]', 'at least one'),
    ('p.json', '{\n "prompts": []\n}', 'is one JSON object, of prompts'),
    ('p.json', '{\n "prompts": [\n}', 'not JSON'),
    ('p.html', '<html><body>404</body></html>', 'is a page of the web'),
    ('p.txt', '<?xml version="1.0"?>\n<a/>', 'is a page of the web or XML'),
    ('p.txt', 'version https://git-lfs.github.com/spec/v1\noid sha256:a\n',
     'pointer of Git LFS'),
    ('p.json', '[{"conversations": [{"value": 3}]}]', 'conversations='),
    ('p.json', '[{"text": "a"}]', "'messages', has text"),
    ('p.parquet', b'PAR1\xff\xfe', 'is Parquet')])
def test_what_is_no_prompt_file_is_one_error(tmp_path, name, text, part):
  with pytest.raises(InputError, match=part) as error:
    workload.read_prompts(_write(tmp_path / name, text))
  assert str(tmp_path / name) in str(error.value)


@pytest.mark.parametrize('text, parts', [
    ('{"prompt": "a"}\n{"prompt": 3}', ['line 2', 'prompt', '3']),
    ('{"prompt": ""}', ['line 1', 'non-empty']),
    ('{"text": "a"}', ['line 1', "'messages'", 'has text']),
    ('{"prompt": "a", "messages": []}', ['line 1', 'either']),
    ('{"messages": []}', ['line 1', 'role']),
    ('{"messages": [{"role": "user"}]}', ['line 1', 'content']),
    ('{"prompt": "a", "max_tokens": 0}', ['line 1', 'max_tokens']),
    ('{"prompt": "a"}\nplain', ['line 2', 'not JSON']),
    ('# only\n', ['at least one prompt']),
])
def test_read_prompts_names_what_is_wrong(tmp_path, text, parts):
  with pytest.raises(InputError) as error:
    workload.read_prompts(_write(tmp_path / 'p', text))
  for part in parts:
    assert part in str(error.value)


@settings(deadline=None)
@given(kind=st.sampled_from(['poisson', 'gamma', 'uniform']),
       seed=st.integers(0, 2**40), n=st.integers(1, 50),
       rate=st.floats(1e-3, 1e4), cv=st.floats(0.1, 10))
def test_arrivals_share_their_randomness(kind, seed, n, rate, cv):
  times = workload.arrivals(kind, rate, n, seed, cv)
  assert len(times) == n and list(times) == sorted(times) and times[0] >= 0
  assert times == workload.arrivals(kind, rate, n, seed, cv)
  assert times == workload.arrivals(kind, rate, n + 7, seed, cv)[:n]
  # Common random numbers: another rate is another unit of time.
  unit = workload.arrivals(kind, 1.0, n, seed, cv)
  assert times == pytest.approx([t / rate for t in unit])


@pytest.mark.parametrize('kind, cv, spread', [
    ('poisson', 1.0, 1.0), ('gamma', 1.0, 1.0), ('gamma', 3.0, 3.0),
    ('gamma', 0.2, 0.2), ('uniform', 1.0, 0.0)])
def test_gaps_have_the_mean_and_spread_asked_for(kind, cv, spread):
  times = (0.0, *workload.arrivals(kind, 4.0, 40000, 1, cv))
  gaps = [b - a for a, b in zip(times, times[1:], strict=False)]
  assert statistics.fmean(gaps) == pytest.approx(0.25, rel=0.05)
  cv = statistics.pstdev(gaps) / statistics.fmean(gaps)
  assert cv == pytest.approx(spread, rel=0.05, abs=1e-9)


def test_burst_and_trace_arrivals():
  entries = [Entry(t, 1, 1) for t in (0.0, 1.0, 4.0, 9.0)]
  assert workload.arrivals('burst', None, 3) == (0.0,) * 3
  assert workload.arrivals('trace', None, 3, entries=entries) == (0, 1, 4)
  scaled = workload.arrivals('trace', 2.0, 3, entries=entries)
  assert scaled == pytest.approx((0, 0.25, 1.0))


@pytest.mark.parametrize('change', [
    {'rate_per_s': 0}, {'rate_per_s': -1}, {'rate_per_s': math.nan},
    {'rate_per_s': math.inf}, {'rate_per_s': None}, {'rate_per_s': '2'},
    {'n': 0}, {'n': 2.0}, {'n': True}, {'n': 10**14}, {'seed': -1},
    {'seed': None},
    {'cv': 0}, {'cv': math.nan}, {'kind': 'often'}, {'kind': 'trace'},
    {'kind': 'trace', 'entries': LENGTHS},
    {'kind': 'trace', 'entries': [Entry(0.0, 1, 1)]},
    {'kind': 'trace', 'entries': [Entry(0.0, 1, 1)] * 2},
])
def test_arrivals_refuses(change):
  good = {'kind': 'poisson', 'rate_per_s': 1.0, 'n': 2}
  with pytest.raises(InputError):
    workload.arrivals(**good | change)


def test_from_lengths_draws_and_cuts():
  times = workload.arrivals('poisson', 3.0, 200, seed=5)
  requests, clipped = workload.from_lengths(
      LENGTHS, 200, times, vocab_size=11, seed=5, max_prompt=64,
      max_output=29)
  shapes = [(len(r.prompt), r.sampling.max_tokens) for r in requests]
  assert set(shapes) == {(5, 2), (9, 4), (64, 29)}
  assert clipped == shapes.count((64, 29))
  assert [r.id for r in requests] == list(range(200))
  assert [r.arrival_s for r in requests] == list(times)
  assert {t for r in requests for t in r.prompt} == set(range(11))
  assert all(r.sampling.ignore_eos and type(r.prompt) is tuple
             for r in requests)
  # The same lengths and ids at another rate; others with another seed.
  faster = workload.arrivals('poisson', 30.0, 200, seed=5)
  again, _ = workload.from_lengths(LENGTHS, 200, faster, 11, 5, 64, 29)
  assert [r.prompt for r in again] == [r.prompt for r in requests]
  other, _ = workload.from_lengths(LENGTHS, 200, times, 11, 6, 64, 29)
  assert [len(r.prompt) for r in other] != [s[0] for s in shapes]


def test_streams_of_a_seed_differ():
  # One stream for all would tie long gaps to certain lengths.
  draws = {streams._rng(seed, stream).random()
           for seed in range(4) for stream in range(3)}
  assert len(draws) == 12


def test_from_lengths_in_order_without_ids():
  requests, clipped = workload.from_lengths(LENGTHS, 2, (0.0, 1.0),
                                            in_order=True)
  assert [r.prompt for r in requests] == [range(5), range(9)]
  assert clipped == 0


@pytest.mark.parametrize('change', [
    {'entries': ()}, {'n': 0}, {'arrivals_s': (0.0,)}, {'vocab_size': 0},
    {'max_prompt': 0}, {'max_output': -1}, {'seed': -1},
    {'n': 4, 'arrivals_s': (0.0,) * 4, 'in_order': True},
])
def test_from_lengths_refuses(change):
  good = {'entries': LENGTHS, 'n': 2, 'arrivals_s': (0.0, 1.0)}
  with pytest.raises(InputError):
    workload.from_lengths(**good | change)


def test_from_prompts():
  sampling = Sampling(temperature=0.5)
  requests = workload.from_prompts([[1, 2], (3,)], (0.0, 2.0), sampling,
                                   max_tokens=[None, 9])
  assert [r.prompt for r in requests] == [(1, 2), (3,)]
  assert [r.arrival_s for r in requests] == [0.0, 2.0]
  assert [r.sampling for r in requests] == [
      sampling, Sampling(max_tokens=9, temperature=0.5)]
  each = [Sampling(seed=1), Sampling(seed=2)]
  requests = workload.from_prompts([[1], [2]], (0, 0), each)
  assert [r.sampling for r in requests] == each
  for bad in ({'prompts': [[1], []]}, {'arrivals_s': (0.0,)},
              {'sampling': each[:1]}, {'max_tokens': [1]}):
    with pytest.raises(InputError):
      workload.from_prompts(
          **{'prompts': [[1], [2]], 'arrivals_s': (0.0, 0.0)} | bad)

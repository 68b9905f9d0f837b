"""Files of what clients saw, of any load generator."""

import json

import pytest

from dsjax.analysis.record import Record
from dsjax.config.checks import InputError
from dsjax.workload.served import Served, read_served

WANTED = [Served(0.0, 100, 3, 0.5, 1.5), Served(2.0, 7, 1, 2.25, 2.25)]


def write(tmp_path, text, name='records.csv'):
  path = tmp_path / name
  path.write_text(text)
  return path


@pytest.mark.parametrize('text', (
    'arrival_s,prompt_tokens,output_tokens,first_token_s,last_token_s\n'
    '10,100,3,10.5,11.5\n12,7,1,12.25,12.25\n',
    'Start Time;Input Length;Completion Tokens;TTFT (ms);E2E Latency (ms)\n'
    '1700000002;7;1;250;250\n1700000000;100;3;500;1500\n',
    'start,isl,osl,first_token,end\n'
    '1700000002000,7,1,1700000002250,1700000002250\n'
    '1700000000000,100,3,1700000000500,1700000001500\n',
    'start,isl,osl,ttft,latency\n1700000002000000000,7,1,.25,.25\n'
    '1700000000000000000,100,3,.5,1.5\n',
    'request_start_time,isl,osl,time_to_first_token_ms,tpot_ms\n'
    '0,100,3,500,500\n2,7,1,250,\n',
    'timestamp,num_prompt_tokens,num_generated_tokens,first_token_time,end\n'
    '2023-11-16 18:15:46,100,3,2023-11-16T18:15:46.5,2023-11-16 18:15:47.5\n'
    '2023-11-16 18:15:48,7,1,2023-11-16 18:15:48.25,2023-11-16 18:15:48.25\n',
    'sent_at_us,prompt_len,output_len,first_token_microseconds,finished_at_us,junk\n'
    '5e6,100,3,5.5e6,6.5e6,a\n7e6,7,1,7.25e6,7.25e6,b\n'))
def test_columns_have_many_names(tmp_path, text):
  read, empty = read_served(write(tmp_path, text))
  assert empty == 0
  assert read == [pytest.approx(request) for request in WANTED]


def test_json_lines_and_records_of_ones_own(tmp_path):
  rows = [dict(arrival=1.0, input_tokens=100, output_tokens=3, ttft=0.5,
               latency=1.5),
          dict(arrival=3.0, input_tokens=7, output_tokens=1, ttft=0.25,
               latency=0.25),
          dict(arrival=3.5, input_tokens=7, output_tokens=0, ttft=None,
               latency=0.1)]
  text = '\n'.join(map(json.dumps, rows))
  read, empty = read_served(write(tmp_path, text, 'a.jsonl'))
  assert read == [pytest.approx(request) for request in WANTED] and empty == 1
  records = [Record(0, 4.0, 100, 9, [4.5, 5.0, 5.5], finish_s=5.6),
             Record(1, 6.0, 7, 1, [6.25], finish_s=6.25),
             Record(2, 6.0, 7, 1, [], finish_s=7.0, status='failed')]
  text = '\n'.join(json.dumps(record.row()) for record in records)
  assert read_served(write(tmp_path, text, 'b.jsonl')) == (WANTED, 1)


HEADER = 'arrival_s,prompt_len,output_len,first_token_s,last_token_s\n'


@pytest.mark.parametrize('text, message', (
    ('', 'at least one request'), (HEADER, 'at least one request'),
    (HEADER + '0,10,0,,\n', 'at least one request'),
    (HEADER.replace('arrival_s', 'when'), 'arrival is missing'),
    (HEADER.replace('prompt_len', 'p'), 'prompt is missing'),
    (HEADER.replace('output_len', 'o'), 'output is missing'),
    (HEADER.replace('first_token_s', 'f'), 'first or ttft is missing'),
    (HEADER.replace('last_token_s', 'l'), 'last or tpot or latency is missing'),
    (HEADER + 'x,10,2,1,2\n', "line 2: arrival_s='x': must be a number"),
    (HEADER + '17e11,9,2,17e11,17e11\n', "arrival_s='17e11': must .* start_ms"),
    (HEADER + '0,1.5,2,1,2\n', "line 2: prompt_len='1.5': must be a whole"),
    (HEADER + '0,10,-2,1,2\n', "output_len='-2': must be a whole"),
    (HEADER + '0,10,2,inf,2\n', "first_token_s='inf'"),
    (HEADER + '0,10,2,1,\n', "last_token_s=''"),
    (HEADER + '0,10,2,1,0.5\n', 'must be in this order'),
    (HEADER + '3,10,2,1,5\n', 'must be in this order')))
def test_bad_files(tmp_path, text, message):
  if text and text.count('\n') == 1 and text != HEADER:
    text += '0,10,2,1,2\n'
  with pytest.raises(InputError, match=message) as error:
    read_served(write(tmp_path, text))
  assert 'records.csv' in str(error.value)

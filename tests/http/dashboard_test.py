"""The Grafana dashboard asks for what the server tells, and for all of it."""

import json
import pathlib
import re

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.common.web import Running, post

PATH = pathlib.Path(__file__).parents[2] / 'docs/grafana.json'
GROUPED = re.compile(r'\b(?:by|on) ?\(([^)]*)\)')
CHOSEN = re.compile(r'\{(\w+)=')
SHOWN = re.compile(r'\{\{(\w+)\}\}')


@pytest.fixture(scope='module')
def told():
  """{name of a sample: its labels} of a server that served and refused."""
  running = Running()
  try:
    running.await_status('ready')
    for prompt in ('Why?', ''):
      post(running, '/v1/completions', {'model': 'tiny', 'prompt': prompt})
    text = httpx.get(running.url + '/metrics').text
  finally:
    running.stop()
  return {sample.name: set(sample.labels)
          for family in text_string_to_metric_families(text)
          for sample in family.samples}


def wrong(board, told):
  """What a dashboard's queries ask for and no sample has."""
  for panel in board['panels']:
    for target in panel['targets']:
      query = target['expr']
      names = set(re.findall(r'dsjax_\w+', query))
      yield from names - told.keys()
      labels = {label.strip() for group in GROUPED.findall(query)
                for label in group.split(',') if label}
      labels |= {*CHOSEN.findall(query), *SHOWN.findall(
          target.get('legendFormat', ''))}
      known = set().union(*(told.get(name, ()) for name in names))
      yield from labels - known


def test_every_query_is_answered(told):
  board = json.loads(PATH.read_text())
  assert not list(wrong(board, told))
  asked = set(re.findall(r'dsjax_\w+', PATH.read_text()))
  untold = {name for name in told if name.endswith(('_total', '_info'))}
  assert not untold - asked
  places = [tuple(panel['gridPos'].values()) for panel in board['panels']]
  assert len(set(places)) == len(places)


@pytest.mark.parametrize('query, legend, name', [
    ('rate(dsjax_songs_total[1m])', '', 'dsjax_songs_total'),
    ('sum by (le, key) (dsjax_ttft_seconds_bucket)', '', 'key'),
    ('dsjax_requests{colour="red"}', '', 'colour'),
    ('dsjax_requests', '{{owner}}', 'owner')])
def test_what_is_not_told_is_found(told, query, legend, name):
  board = {'panels': [{'targets': [{'expr': query, 'legendFormat': legend}]}]}
  assert list(wrong(board, told)) == [name]

"""The placement runner."""

import io
import json
import math

import pytest
from rich.console import Console

from dsjax.config.checks import InputError
from dsjax.config.placement import Placement
from dsjax.placement import clusters
from dsjax.placement.clusters import Cluster
from dsjax.placement.goodput import Goodput
from dsjax.placement.search import SearchResult
from dsjax.placement.verdict import RankedPlacement
from experiments import place
from experiments.common import cli
from tests.common.legible import hidden
from tests.common.programs import ended
from tests.common.results import check_written, made_by

SMALL = ('--model=opt-13b', '--lengths=longbench', '--ttft_s=1',
         '--requests=20', '--tolerance=0.5', '--chunks=512', '--processes=1')


def test_it_writes_a_table_a_figure_and_a_verdict(tmp_path):
  cluster = tmp_path / 'cluster.json'
  cluster.write_text(json.dumps({'nodes': 1, 'devices_per_node': 2}))
  done = ended(place, *SMALL, '--algorithms=low', f'--machines={cluster}',
               f'--out={tmp_path / "out"}')
  assert done.code == 0, done.error
  check_written(done.text, tmp_path / 'out')
  assert set(made_by(tmp_path / 'out')['data']) == {
      'longbench', 'published', 'cluster.json'}
  written = json.loads((tmp_path / 'out' / 'placement.json').read_text())
  row = written['rows'][0]
  assert row['placement'] == 'prefill=1x1,decode=1x1'
  assert row['placement'].split(',')[0] in done.text
  assert 0 < row['low'] <= row['per_device'] <= row['high']
  assert written['verdict'] in done.text.replace('\n', ' ')
  assert written['strict'][0]['per_device'] <= row['per_device']
  assert 'What binds the best disaggregated placement' in done.text
  assert (tmp_path / 'out' / 'placement.png').read_bytes()[:4] == b'\x89PNG'
  # What serves takes the printed text.
  best = Placement.parse(row['placement'])
  assert str(best) == row['placement']
  assert best.mode == 'disaggregated'


@pytest.mark.parametrize('flag, message', (
    ('--algorithms=best', '--algorithms'), ('--ttft_s=0.001', 'Slo.ttft_s'),
    ('--latency=roofline:tpu', 'a100-80g'),
    ('--algorithms=low --devices=1', 'disaggregation takes 2 devices'),
    ('--chunks=64', "--chunks='64'"),
    ('--host_ms=-5', 'host_ms=-5'), ('--host_ms=nan', 'host_ms=nan'),
    ('--lengths=fixed:4000x10', '--cut'), ('--ttft_s=nan', 'Slo.ttft_s=nan'),
    ('--model=llama-3-8b', 'opt-13b, opt-66b'), ('--cv=nan', 'cv=nan'),
    ('--strict=2', 'SearchProblem.strict=2'), ('--rate=inf', 'rate_per_s=inf'),
    ('--hand_off_ms=nan', 'hand_off_s=nan'),
    ('--machines=nowhere.json', 'without --devices')))
def test_bad_input_is_one_clear_error(flag, message, capsys):
  options = cli.parse(place.FLAGS, ['--devices=2', *flag.split()])
  assert cli.exit_code(place.run, options, Console(file=io.StringIO())) == 2
  line, = capsys.readouterr().err.splitlines()
  assert line.startswith('error: ') and message in line


def rows(placement, count=3):
  each = Goodput(1234.5, 1000.25, 2000.75, 'samples', 1.0, 9)
  return [RankedPlacement(Placement.parse(placement), each, True, 12288)
          for _ in range(count)]


def test_the_table_fits_80_columns():
  text = io.StringIO()
  Console(file=text, width=150).print(place.table(rows(
      'prefill=2x4,2x4,2x4,decode=4x2,4x2'), 0.9))
  lines = text.getvalue().splitlines()
  assert max(map(len, lines)) == 80 and any('samples' in x for x in lines)


def test_a_picture_hides_nothing_and_draws_whole_intervals(monkeypatch):
  drawn = []
  monkeypatch.setattr(place.pictures, 'save', lambda figure, _: drawn.append(
      figure))
  place.draw('x', [RankedPlacement(Placement.parse(where), Goodput(
      rate, low, high, 'samples', .9, 1, True)) for where, rate, low, high in (
          ('colocated=1x1', 2.0, 1.0, 3.0), ('chunked=1x1', 1.9, 1.0, math.inf),
          ('prefill=1x1,1x1,1x1,decode=1x1', 2.0, 0.0, 8.0))], 'title',
             'unit of price')
  figure, = drawn
  axes, = figure.axes
  assert not hidden(figure) and not axes.get_legend()
  words = axes.xaxis.label.get_window_extent()
  assert words.x0 >= 0 and words.x1 <= figure.bbox.width
  legend, = figure.legends
  assert not legend.get_window_extent().overlaps(axes.get_window_extent())
  ends = [tuple(line.get_xdata()) for line in axes.lines]
  assert ends == [(1.0, 3.0), (1.0, 3.8), (3.8,), (0.0, 2.0)]
  assert axes.lines[2].get_marker() == '>'


def test_what_was_stopped_exits_130(capsys, monkeypatch):
  monkeypatch.setattr(place.search, 'search', lambda *_: SearchResult(
      (), 'Stopped before a placement was judged.', 0, 0, (), (),
      stopped=True))
  options = cli.parse(place.FLAGS, ['--devices=2', '--processes=1'])
  text = io.StringIO()
  assert cli.exit_code(place.run, options, Console(file=text)) == 130
  assert 'Stopped before' in text.getvalue()


@pytest.mark.parametrize('text, message', (
    ('{"nodes": 0}', 'Cluster.nodes=0'), ('{"nodes": "2"}', 'Cluster.nodes='),
    ('{"nodes": true}', 'Cluster.nodes='), ('{"gpus": 2}', "one of .'nodes'"),
    ('[1]', 'an object'), ('{', 'is not JSON'),
    ('{"nodes": 1, "nodes": 2}', "nodes.*twice"),
    ('{"kinds": {"a": {}}, "links": {"a-b": {}}}', "links='a-b'.*'KIND>KIND'"),
    ('{"memory_bytes": -1}', 'Cluster.memory_bytes=-1'),
    ('{"hand_off_s": null}', 'Cluster.hand_off_s=None')))
def test_bad_cluster_files(tmp_path, text, message):
  path = tmp_path / 'cluster.json'
  path.write_text(text)
  with pytest.raises(InputError, match=message) as error:
    clusters.load(str(path), 'published')
  assert str(path) in str(error.value)


def test_a_cluster_file(tmp_path):
  path = tmp_path / 'cluster.json'
  path.write_text('{"nodes": 4, "inter_bytes_per_s": 1e10}')
  assert clusters.load(str(path), 'published') == Cluster(
      4, inter_bytes_per_s=1e10)
  assert clusters.load(str(path), 'tables:h200-141g') == Cluster(
      4, memory_bytes=150e9, intra_bytes_per_s=450e9, inter_bytes_per_s=1e10,
      host_bytes_per_s=64e9)
  with pytest.raises(InputError, match='cannot be read'):
    clusters.load(str(tmp_path / 'none.json'), 'published')


@pytest.mark.parametrize('flags, cluster', (
    ('', Cluster(2, 3)),
    ('--latency=roofline:l40s-48g', Cluster(2, 3, 48e9, 32e9, 50e9)),
    ('--latency=tables:b200-180g --memory_gb=100 --hand_off_ms=2',
     Cluster(2, 3, 100e9, 900e9, 100e9, 2e-3, host_bytes_per_s=64e9))))
def test_a_cluster_is_of_the_gpu_that_the_latency_names(flags, cluster):
  options = cli.parse(place.FLAGS, ['--nodes=2', '--model=llama-3-8b', *(
      flags or '--model=opt-13b').split()])
  assert place._problem(options).cluster == cluster

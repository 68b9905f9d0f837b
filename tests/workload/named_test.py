"""Workloads by what a user writes."""

import math
import pickle

import numpy as np
import pytest

from dsjax.config.checks import InputError
from dsjax.config.request import Request
from dsjax.workload import Entry, arrivals_of, lengths_of, source, traffic


@pytest.fixture
def trace(tmp_path):
  """200 arrivals in bursts of four, one a second."""
  path = tmp_path / 'trace.csv'
  times = np.cumsum(np.tile([0.1, 0.1, 0.1, 3.7], 50))
  path.write_text('arrival_s,prompt_len,output_len\n' + ''.join(
      f'{t},{5 + i},3\n' for i, t in enumerate(times)))
  return str(path)


def test_lengths_of_every_form(trace):
  assert lengths_of('fixed:12x3') == (Entry(None, 12, 3),)
  assert lengths_of([(4, 5), Entry(0.0, 6, 7)]) == (
      Entry(None, 4, 5), Entry(0.0, 6, 7))
  assert lengths_of('sharegpt', 50, 1) == traffic.draw('sharegpt', 50, 1)
  assert lengths_of(traffic.MIXTURES['longbench'], 5) == lengths_of(
      'longbench', 5)
  assert len(lengths_of(trace)) == 200


NO_SIZE = (math.nan, math.inf, -1, 0, 4.0, np.float64(4.0), True, np.True_,
           '4', None, [4], 2**31, 10**400)
NO_TIME = (math.nan, math.inf, -1.0, 1e9, True, '4', [1.0])


@pytest.mark.parametrize('bad, named', [
    *(((size, 3), r'\.prompt_len=') for size in NO_SIZE),
    *(((3, size), r'\.output_len=') for size in NO_SIZE),
    *((Entry(None, size, 3), r'\.prompt_len=') for size in NO_SIZE),
    *((Entry(2.0, 3, size), r'\.output_len=') for size in NO_SIZE),
    *((Entry(time_s, 3, 3), r'\.arrival_s=') for time_s in NO_TIME),
    *((pair, '=') for pair in (
        None, 7, 'ab', (), (3,), (1, 2, 3), [3, 4], {3: 4},
        Request(0, 0.0, (1,))))])
def test_a_bad_pair_is_named_by_its_index(bad, named):
  with pytest.raises(InputError, match=rf'lengths\[1\]{named}.*must be'):
    lengths_of([(4, 5), bad, (0, 0)])
  with pytest.raises(InputError, match=rf'lengths\[0\]{named}.*must be'):
    source((bad,))


def test_numpys_integers_and_times_out_of_order_are_read():
  pairs = np.array([[4, 5], [6, 7]])
  assert lengths_of([tuple(pair) for pair in pairs]) == (
      Entry(None, 4, 5), Entry(None, 6, 7))
  late, early = Entry(np.float32(2.5), 4, 5), Entry(np.int64(1), 6, 7)
  found = lengths_of([late, early])
  assert found == (early, late)
  assert {type(x) for entry in found for x in entry} == {int, float}


@pytest.mark.parametrize('lengths', ['sharegtp', 'fixed:0x3', 'fixed:3', [],
                                     (), 7, None, {(3, 4)}, np.ones((2, 2)),
                                     iter([(3, 4)])])
def test_bad_lengths_name_what_there_is(lengths):
  with pytest.raises(InputError, match='(?s)lengths=.*must be'):
    lengths_of(lengths)


def test_a_missing_file_is_named():
  with pytest.raises(InputError, match='^no/file.csv: cannot be read'):
    lengths_of('no/file.csv')


def test_the_rate_swings():
  even, daily = (np.array(arrivals_of('poisson', 2.0, 400, swing=swing,
                                      period_s=200.0)) for swing in (0, 1.0))
  upper = [(times % 200 < 100).mean() for times in (even, daily)]
  assert 0.4 < upper[0] < 0.6 and 0.75 < upper[1] < 0.9  # 1/2 + 1/pi
  assert daily[-1] == pytest.approx(even[-1], rel=0.2)


def test_a_trace_is_resampled_with_its_burstiness(trace):
  gaps = np.diff(arrivals_of('resample', None, 4000,
                             entries=lengths_of(trace)))
  assert gaps.mean() == pytest.approx(1.0, rel=0.15)
  assert gaps.std() / gaps.mean() == pytest.approx(1.56, rel=0.15)


@pytest.mark.parametrize('process, more, message', [
    ('daily', {}, 'process'), ('burst', {'swing': 0.5}, 'swing'),
    ('resample', {}, 'fit.entries'), ('trace', {}, 'arrival times')])
def test_bad_arrivals(process, more, message):
  with pytest.raises(InputError, match=message):
    arrivals_of(process, 1.0, 5, **more)


def test_two_rates_share_lengths_and_gaps():
  make = pickle.loads(pickle.dumps(source('humaneval', seed=3)))
  slow, fast = make(1.0, 40), make(4.0, 40)
  for a, b in zip(slow, fast, strict=True):
    assert (len(a.prompt), a.sampling) == (len(b.prompt), b.sampling)
    assert a.arrival_s == pytest.approx(4 * b.arrival_s)
  assert make.longest >= max(
      len(r.prompt) + r.sampling.max_tokens for r in slow)
  assert source('humaneval', seed=4)(1.0, 40) != slow


def test_every_request_of_a_mixture_has_lengths_of_its_own():
  make = source('sharegpt', seed=1)
  lengths = make.lengths(3 * 4096)
  assert lengths[:40] == make.lengths(40)
  # Of so many pairs few come twice; drawn of 4,096 pairs, most would.
  assert len(set(lengths)) > 2 * 4096
  assert make.longest == 2030 + 1800
  cut = make.within(1000)
  assert cut.cut == make.beyond(1000) and cut.longest == 1000
  assert max(map(sum, cut.lengths(500))) == 1000
  assert cut.lengths(500)[0] == make.within(10**6).lengths(1)[0]


def test_a_trace_runs_in_its_order_and_at_its_times(trace):
  requests = source(trace, process='trace')(None, 1000)
  assert [len(r.prompt) for r in requests] == list(range(5, 205))
  assert requests[3].arrival_s - requests[2].arrival_s == pytest.approx(3.7)

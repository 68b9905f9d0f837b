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
  drawn = lengths_of([late, early])
  assert drawn == (early, late)
  assert {type(x) for entry in drawn for x in entry} == {int, float}


@pytest.mark.parametrize('lengths', ['sharegtp', 'fixed:0x3', 'fixed:3', [],
                                     (), 7, None, {(3, 4)}, np.ones((2, 2)),
                                     iter([(3, 4)])])
def test_bad_lengths_name_what_there_is(lengths):
  with pytest.raises(InputError, match='(?s)lengths=.*must be'):
    lengths_of(lengths)


def test_a_missing_file_is_named():
  with pytest.raises(InputError, match='^lengths=no/file.csv: cannot be read'):
    lengths_of('no/file.csv')


def test_a_sine_has_its_rates_and_a_step_has_two():
  sine = np.array(arrivals_of('sine:low=5:high=45:period_s=60', None, 15000))
  counts, _ = np.histogram(sine[sine < 600] % 60, 12)
  assert counts.argmax() in (2, 3) and counts.argmin() in (8, 9)
  assert counts.max() / 50 == pytest.approx(44.5, rel=0.08)  # 10 x 5 s
  assert counts.min() / 50 == pytest.approx(5.5, rel=0.25)
  step = np.array(arrivals_of('step:period_s=20:low=0:high=4', None, 4000))
  assert (step % 20 >= 10).all()
  assert step[-1] == pytest.approx(2000, rel=0.1)


def test_a_rate_of_a_wave_is_its_mean():
  process = 'sine:low=5:high=45:period_s=60'
  own = arrivals_of(process, 25.0, 3000)
  assert own == arrivals_of(process, None, 3000)
  twice = np.array(arrivals_of(process, 50.0, 3000))
  assert twice[-1] == pytest.approx(60, rel=0.1)
  with pytest.raises(InputError, match='rate_per_s=0: must be None or'):
    arrivals_of(process, 0, 5)


@pytest.mark.parametrize('process, error', [
    ('sine', 'process=.sine.: must be sine:low=5'),
    ('sine:low=5:high=45', 'each of'),
    ('sine:low=5:high=45:period=60', 'each of'),
    ('sine:low=5:low=5:high=45:period_s=60', 'each of'),
    ('sine:low=5:high=45:period_s=60:cv=2', 'each of'),
    ('sine:low=-1:high=45:period_s=60', 'process sine: low=.-1.'),
    ('sine:low=5:high=nan:period_s=60', 'process sine: high=.nan.'),
    ('sine:low=5:high=45:period_s=inf', 'process sine: period_s=.inf.'),
    ('sine:low=5:high=45:period_s=1e-9', 'process sine: period_s=1e-09: .*0.1'),
    ('step:low=5:high=x:period_s=60', 'process step: high=.x.'),
    ('step:low=5:high=5:period_s=60', 'low=5.0: must be below high=5'),
    ('ramp:low=5:high=45:period_s=60', 'must be one of'), (7, 'process=7')])
def test_a_wave_that_is_none_is_one_clear_error(process, error):
  for call in (lambda: arrivals_of(process, 1.0, 5),
               lambda: source('humaneval', process=process)):
    with pytest.raises(InputError, match=error):
      call()


def test_lengths_mix():
  make = pickle.loads(pickle.dumps(source('mix:fixed:10x2+fixed:500x3')))
  sizes = make.lengths(400)
  assert set(sizes) == {(10, 2), (500, 3)}
  assert 160 < sizes.count((10, 2)) < 240
  assert make.lengths(40) == sizes[:40] and make.longest == 503
  assert make.phases is None
  assert max(map(sum, make.within(100).lengths(50))) == 100
  slow, fast = make(1.0, 40), make(4.0, 40)
  assert [len(r.prompt) for r in slow] == [len(r.prompt) for r in fast]


def test_lengths_shift_with_time():
  make = source('shift:10:sharegpt+fixed:7x2+longbench', seed=2)
  for request in make(5.0, 600):
    is_fixed = len(request.prompt) == 7 and request.sampling.max_tokens == 2
    assert is_fixed == (int(request.arrival_s / 10) % 3 == 1)
  assert make.phases == (30.0, ('sharegpt', 'fixed:7x2', 'longbench'))
  assert (7, 2) in make.lengths(9)  # of each kind, at no rate
  both = source('shift:10:humaneval+longbench',
                process='step:low=1:high=9:period_s=60')
  assert both.phases.names == ('humaneval', 'longbench')
  assert source('humaneval', process='step:low=1:high=9:period_s=60'
                ).phases == (60.0, ('low', 'high'))


@pytest.mark.parametrize('lengths, process, error', [
    ('mix:sharegpt', 'poisson', 'mix:NAME'), ('mix:', 'poisson', 'mix:NAME'),
    ('shift:sharegpt+longbench', 'poisson', 'mix:NAME'),
    ('shift:0:sharegpt+longbench', 'poisson', 'mix:NAME'),
    ('shift:nan:sharegpt+longbench', 'poisson', 'mix:NAME'),
    ('shift:9:sharegpt+web', 'poisson', 'lengths=.web.'),
    ('mix:sharegpt+mix', 'poisson', 'lengths=.mix.'),
    ('mix:sharegpt+longbench', 'trace', 'process=.trace.'),
    ('mix:sharegpt+longbench', 'burst', 'process=.burst.'),
    ('mix:sharegpt+longbench', 'resample', 'process=.resample.')])
def test_lengths_that_neither_mix_nor_shift(lengths, process, error):
  with pytest.raises(InputError, match=error):
    source(lengths, process=process)


def test_a_trace_is_resampled_with_its_burstiness(trace):
  gaps = np.diff(arrivals_of('resample', None, 4000,
                             entries=lengths_of(trace)))
  assert gaps.mean() == pytest.approx(1.0, rel=0.15)
  assert gaps.std() / gaps.mean() == pytest.approx(1.56, rel=0.15)


@pytest.mark.parametrize('process, more, message', [
    ('daily', {}, 'process'),
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

"""Real runs against their simulation, like Table 2 of the DistServe paper.

  python -m experiments.validate --out=out/validate      # about 10 minutes
  python -m experiments.validate --quick --out=out/quick # tiny model, seconds
  python -m experiments.validate --cluster=local --out=out/processes

Steps are profiled (dsjax.runtime.profiling), then each mode serves the same
seeded requests at several rates, really and simulated, with the server's own
scheduler.Config. Two profiles are simulated:
  bench       what was profiled: each device alone, and two
              side by side;
  calibrated  the same, moved onto the steps of one served run (fit.observe,
              fit.calibrate) whose rate is not among the validated ones.
Modes are of two 1x1 instances: disaggregated (1 + 1) and chunked (2). A machine
that others share is a tenth faster or slower from one hour to the next: before
and after each run a few steps of the idle instances are timed, and both
profiles count at that pace (pace.py); so are steps of one beside the other's,
which is how much instances slow each other by the bench profile.

CPU devices of one process share its threads (jax 0.10 splits a matrix product
over them whatever --xla_cpu_multi_thread_eigen says), so instances slow each
other, which both simulate as contention.Contention. With --cluster=local each
instance is a process, on cores of its own where there are enough: steps and KV
are profiled in such processes, and so is what they still share. Rates, if not
given, are shares of what a burst really achieves, below 1: beyond it the queue
grows for as long as a run lasts, and so does every error. Objectives, if not
given, are multiples of medians of the calibration runs, the same for all modes.

With --seeds=0,1,2,3,4 the requests of a row are of five workloads, served one
after another: intervals are of the five runs, and so is that of how far the
simulated share is from the real one, run by run.

--minutes=25 begins no row later than that, and --resume goes on with a folder
whose rows are not all there: with its profile, rates and objectives. With
--latency too, what the folder has is simulated once more, with that one.

Files in --out: summary.json (a row for each mode and rate, kept by Ctrl-C),
validate.png, latency.json (bench), events-MODE-RATE-SEED.jsonl.

Exit codes: 0; 2 for bad input; 130 when stopped by Ctrl-C.
"""

import dataclasses
import math
import pathlib
import statistics
import time
import types
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

import dsjax
from dsjax.config import checks
from dsjax.config.checks import require
from dsjax.config.engine import EngineConfig
from dsjax.config.placement import Plan, Slo
from dsjax.runtime import profiling
from dsjax.simulation import profiles
from experiments import measure
from experiments.common import cli, machine, provenance, report, terminal
from experiments.common import overrides as configs
from experiments.common.served_mode import LEAST, PLACEMENTS, Mode
from experiments.common.validate_report import PROFILES, draw, show

ENGINE = EngineConfig(max_len=192, max_seqs=8, prefill_tokens=128,
                      chunk_tokens=128, prefill_seqs=4, prefix_cache=False)
QUICK = EngineConfig(max_len=96, max_seqs=4, prefill_tokens=32,
                     chunk_tokens=32, prefill_seqs=2, prefix_cache=False)
SHARES = (0.3, 0.5, 0.7, 0.9)  # of a burst's throughput
TTFT_TIMES, TPOT_TIMES = 2.0, 1.25  # objectives over calibration's medians


FLAGS = {
    'model': cli.Flag('smollm2-135m-instruct', 'See dsjax.load.'),
    'out': 'out/validate',
    'quick': cli.Flag(False, 'The tiny model, few requests.'),
    'modes': cli.Flag(['disaggregated', 'chunked'],
                      f'Of {", ".join(PLACEMENTS)}.'),
    'rates': cli.Flag(None, 'Requests a second, with commas between; none: '
                      f'shares {SHARES} of what a burst achieves.', str),
    'seconds': cli.Flag(40.0, 'Arrivals of a run last about this long.',
                        low=1e-3),
    'requests': cli.Flag(150, 'Most of a row, of all its seeds together.',
                         low=LEAST),
    'seeds': cli.Flag(['0'], 'Of the workloads of a row, with commas between.'),
    'ttft_s': None, 'tpot_s': None,
    'latency': cli.Flag(None, 'A file that experiments.measure wrote of this '
                        'engine; none: measure now.', str),
    'minutes': cli.Flag(None, 'After so many no row begins.', float, low=0.01),
    'resume': cli.Flag(False, 'Rows that --out has stay.'),
    'cluster': cli.CLUSTER_FLAG, 'rounds': 3, 'set': (),
    'compilation_cache': cli.CACHE,
}


def objectives(modes: Sequence[Mode], ttft_s: float | None,
               tpot_s: float | None) -> Slo:
  """A Slo; what is not given follows from the calibration runs."""
  def most(name):
    return max(statistics.median(getattr(r, name)
                                 for r in m.calibration.records)
               for m in modes)
  return Slo(ttft_s or TTFT_TIMES * most('ttft_s'),
             tpot_s or TPOT_TIMES * most('tpot_s'))


def run(options: types.SimpleNamespace, console: Console) -> int:
  """Profiles, serves, simulates and shows; returns the exit code.

  Args:
    options: values of FLAGS.
  """
  quick = options.quick
  name = 'tiny' if quick else options.model
  config = configs.override(QUICK if quick else ENGINE, options.set)
  rates, cluster = _checked(options), cli.cluster_of(options)
  seeds = cli.seeds(options.seeds)
  out = pathlib.Path(options.out)
  out.mkdir(parents=True, exist_ok=True)
  cli.prepare(2, options.compilation_cache)
  loaded = dsjax.load(name, config.dtype, weights=cluster is None)
  others, rows, slo, stopped = machine.Others(), [], None, False
  before = _before(options, out)
  until_s = (time.monotonic() + 60 * options.minutes if options.minutes
             else math.inf)

  def size(rate):
    return max(LEAST, min(options.requests, round(rate * options.seconds)))
  with terminal.Interrupts() as interrupts, Progress(
      TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn(),
      console=console) as bar:
    try:
      if options.latency:
        profile = profiles.load(options.latency)
      elif before:
        profile = profiles.load(out / 'latency.json')
      else:
        profile, _ = profiling.measure(
            loaded, (Plan(),), config, options.rounds, 3,
            measure.reporter(bar, interrupts.halt), name, cluster=cluster)
        interrupts.halt()
      _check_profile(profile, options)
      provenance.save_json(out / 'latency.json', profiles.as_json(profile),
                           *_made_by(options))
      modes = [Mode(m, loaded, config, profile, seeds, bar, cluster)
               for m in options.modes]
      for mode in modes:
        mode.prepare(min(size(1e9), 24), size, interrupts.halt,
                     before and before['modes'][mode.name]['capacity_per_s'])
      slo = (Slo(**before['slo']) if before else
             objectives(modes, options.ttft_s, options.tpot_s))
      todo = [(m, rate) for m in modes for rate in (rates or [
          share * m.capacity_per_s for share in SHARES])]
      rows = before['rows'] if before else []
      if options.latency:
        by_name = {mode.name: mode for mode in modes}
        for index, row in enumerate(rows):
          interrupts.halt()
          rows[index] = by_name[row['mode']].again(row, [
              report.load_log(_log_path(out, row['mode'], row['rate_per_s'],
                                        seed)) for seed in seeds], slo)
          _tell(bar.console, rows[index])
      done = {(row['mode'], row['rate_per_s']) for row in rows}
      todo = [(m, rate) for m, rate in todo if (m.name, rate) not in done]
      _write(out, options, name, slo, modes, rows)  # for --resume
      for row, (mode, rate) in enumerate(todo):
        if time.monotonic() > until_s:
          bar.console.print(f'{len(todo) - row} rows are left: --resume goes '
                            'on.', highlight=False)
          break
        rows.append(mode.row(
            rate, size(rate), slo, interrupts.halt,
            lambda seed, log, mode=mode, rate=rate: report.save_log(
                _log_path(out, mode.name, rate, seed), log)))
        _write(out, options, name, slo, modes, rows)
        _tell(bar.console, rows[-1])
    except KeyboardInterrupt:
      stopped = True
  if not rows or slo is None:
    console.print('Stopped before any row was done: nothing to show.')
    return 130 if stopped else 0
  show(console, rows, slo)
  draw(out / 'validate.png', rows)
  _close(console, rows, others, out)
  return 130 if stopped else 0


def _log_path(out, mode, rate_per_s, seed):
  return out / f'events-{mode}-{rate_per_s:.2f}-{seed}.jsonl'


def _tell(console, row):
  console.print(f'{row["mode"]} {row["rate_per_s"]:.2f}/s: attained, %: '
                + ', '.join(f'{k} {100 * row[k]["attainment"][0]:.1f}'
                            for k in ('real', *PROFILES)), highlight=False)


def _before(options, out):
  """What --resume goes on with: a summary.json, or None.

  Raises:
    InputError: it is not one of these modes.
  """
  path = out / 'summary.json'
  if not options.resume or not path.exists():
    return None
  before = profiles.read_json(path)
  require(isinstance(before, dict) and 'rows' in before
          and set(before.get('modes', ())) == set(options.modes), '--resume',
          path, f'what this command wrote of {options.modes}')
  seeds = cli.seeds(options.seeds)
  require(all(row.get('seeds') == seeds for row in before['rows']), '--seeds',
          seeds, f'those of the rows of {path}')
  return before


def _checked(options):
  """The rates. Raises InputError for flags that make no sense."""
  require(options.modes and all(m in PLACEMENTS for m in options.modes)
          and len(set(options.modes)) == len(options.modes), '--modes',
          options.modes, f'different ones of {list(PLACEMENTS)}')
  for field in ('ttft_s', 'tpot_s'):
    value = getattr(options, field)
    require(value is None or checks.is_positive(value), f'--{field}',
            value, 'seconds above 0')
  return cli.numbers('--rates', options.rates) if options.rates else []


def _check_profile(profile, options):
  plan = Plan()
  require(plan in profile.latencies, '--latency', options.latency,
          'a profile of plan 1x1')
  require((plan, plan) in profile.links
          or 'disaggregated' not in options.modes, '--latency',
          options.latency, 'one with a link 1x1>1x1 (where the machine '
          'was too noisy to fit it, measure again)')


def _made_by(options):
  """(options, data) as provenance.save_json takes them."""
  return cli.asked(options, FLAGS), [options.latency]


def _write(out, options, name, slo, modes, rows):
  provenance.save_json(out / 'summary.json', {
      'model': name, 'slo': dataclasses.asdict(slo),
      'modes': {m.name: {
          'capacity_per_s': m.capacity_per_s,
          'profiles': {k: {
              'latencies': [dataclasses.asdict(x) for x in p.latencies],
              'link': p.link and dataclasses.asdict(p.link)}
                       for k, p in m.profiles.items()}} for m in modes},
      'rows': rows}, *_made_by(options))


def _close(console, rows, others, out):
  """The verdict in words, and who else was there."""
  for kind in PROFILES:
    misses = [r['errors'][kind] for r in rows]
    console.print(
        f'{kind}: attainment within '
        f'{max(abs(e["attainment"]) for e in misses):.1f} points; mean TTFT '
        f'within {max(abs(e["ttft_s"]["mean"]) for e in misses):.0%}, mean '
        f'TPOT within {max(abs(e["tpot_s"]["mean"]) for e in misses):.0%} '
        'at every rate', highlight=False)
  cores = others.cores()
  if cores is not None:
    most = max(r['others_cores'] or 0.0 for r in rows)
    console.print(f'Other programs used {cores:.2f} cores, at most '
                  f'{most:.2f} in a row.' + (
                      ' These figures are disturbed.' if most > 0.2 else ''),
                  highlight=False)
  terminal.written(console, out, 'summary.json', 'validate.png', *sorted(
      file.name for name in ('latency.json', 'events-*.jsonl')
      for file in out.glob(name)))


if __name__ == '__main__':
  cli.main(run, FLAGS, ENGINE)

"""Measures a model on this machine, then asks which placement it needs.

  python examples/placement_from_measurements.py                  # seconds
  python examples/placement_from_measurements.py smollm2-135m-instruct

The steps of a live engine are timed; from then on everything is simulated, by
the scheduler that serves. Objectives and rate follow from the measurement.
"""

import sys

import jax

import dsjax

jax.config.update('jax_num_cpu_devices', 2)  # KV moves from one to the other
model = dsjax.load(sys.argv[1] if len(sys.argv) > 1 else 'tiny')
engine = dsjax.EngineConfig(max_len=256, max_seqs=4, prefill_tokens=128,
                            chunk_tokens=128, prefill_seqs=2)
profile = dsjax.profile(model, [dsjax.Plan()], engine, rounds=2, points=2,
                        side_by_side=False)

steps = profile.latencies[dsjax.Plan()]
prefill_s = steps.prefill_s(((0, 100),)) + steps.host_s
decode_s = steps.decode_s(4, 4 * 120) + steps.host_s
print(f'{profile.device}: a prompt of 100 tokens {1e3 * prefill_s:.2f} ms, '
      f'a step of 4 rows {1e3 * decode_s:.2f} ms, the host included')

question = {
    'model': model.config, 'latency': profile, 'max_seqs': engine.max_seqs,
    'lengths': [(100, 40), (60, 20), (120, 60)],  # prompt, output
    'slo': dsjax.Slo(ttft_s=10 * prefill_s, tpot_s=2 * decode_s)}
rate_per_s = 1 / (prefill_s + 40 * decode_s / 4)  # what a device can do
for placement in ('prefill=1x1,decode=1x1', 'colocated=1x1,1x1',
                  'chunked=1x1,1x1'):
  print(dsjax.simulate(placement, rate_per_s=rate_per_s, chunk=128,
                       requests=200, **question))

answer = dsjax.search(devices=2, chunks=[128], requests=50, tolerance=0.2,
                      effort=1.0, **question)
for row in answer.rows[:3]:
  print(f'{row.placement}: {row.per_device:.3g} requests/s a device')
print(answer.verdict)

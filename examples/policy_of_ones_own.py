"""A policy of one's own: short prompts first, but none waits for ever.

The same lines are simulated, served, and explored for faults:

  python examples/policy_of_ones_own.py
  python -m experiments.explore --policy=examples/policy_of_ones_own.py:patient
"""

import dataclasses

import dsjax

PATIENCE_S = 1.0  # a request that has waited longer goes first


def short_but_patient(view, instance, waiting):
  """Prompts by length, behind those that have lost patience."""
  def key(request):
    waited_s = view.time_s - request.arrival_s
    return waited_s < PATIENCE_S, request.prompt_len

  return sorted(waiting, key=key)


patient = dataclasses.replace(dsjax.DISTSERVE, name='patient',
                              order=short_but_patient)


def main() -> None:
  for policy in (dsjax.DISTSERVE, patient):
    result = dsjax.simulate('prefill=2x1,decode=1x1', 'opt-13b', rate_per_s=8,
                            requests=400, policy=policy)
    print(f'{policy.name:10} {result}')

  model = dsjax.load('tiny')
  placement = dsjax.Placement.parse('prefill=1x1,decode=1x1')
  limits = dsjax.EngineConfig(max_len=64, prefill_tokens=32)
  with dsjax.serve(model, placement, limits, policy=patient) as server:
    for output in server.generate_all(['Hi', 'And you?'], max_tokens=8):
      print(len(output.tokens), 'tokens of request', output.id)


if __name__ == '__main__':
  main()

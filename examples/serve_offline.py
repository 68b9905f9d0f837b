"""Answers prompts with prefill and decode on devices of their own.

  python examples/serve_offline.py                         # random weights
  python examples/serve_offline.py smollm2-135m-instruct   # or a file, a folder

On a machine without accelerators the two devices are CPU devices.
"""

import sys

import dsjax

model = dsjax.load(sys.argv[1] if len(sys.argv) > 1 else 'tiny')
placement = dsjax.Placement.parse('prefill=1x1,decode=1x1')
engine = dsjax.EngineConfig(max_len=256, max_seqs=4, prefill_tokens=64)
questions = ['Name three rivers.', 'What is a prime number?',
             'Translate "good night" into French.', 'Tell me a joke.']

with dsjax.serve(model, placement, engine) as server:
  answers = server.generate_all(questions, max_tokens=16, temperature=0.7)

  print('streamed:', end=' ')
  for piece in server.stream('Why is the sky blue?', max_tokens=16):
    print(piece, end='', flush=True)
  print()

for question, answer in zip(questions, answers, strict=True):
  print(f'{question} -> {answer.text!r}')
for row in dsjax.rows(answers):  # or pandas.DataFrame(dsjax.rows(answers))
  print(f'request {row["id"]}: TTFT {1e3 * row["ttft_s"]:.1f} ms, '
        f'TPOT {1e3 * row["tpot_s"]:.1f} ms, instances {row["instances"]}, '
        f'KV of {row["migrated_tokens"]} tokens moved')

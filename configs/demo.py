"""The demo: 16 chat prompts, disaggregated against both colocated modes.

  python -m experiments.serve --config=demo --out=out/demo     (make demo)

SmolLM2-135M-Instruct in float32 on two CPU devices: one prefill and one decode
instance, then two colocated instances, then two that chunk. Requests arrive at
random, two a second (of seed 1, whose 16 come in 7 seconds and not in 11),
and write 32 tokens at most. run_ahead is 1, since whatever waits behind a step
waits for all of it. No mode keeps prefixes, as the baselines that are
published do not.
least_tokens is 64, since few prompts are of 32 tokens or fewer: 16 programs
are compiled for the three modes together, not 22.

It should say that every mode answered 16 of 16, that nothing was compiled
while serving and that all answers are equal token for token; then the tables,
the verdict and where the files are. On a 2-core CPU machine that did nothing
else: no clear winner; attained 100 %, 69 % and 63 %; TPOT p90 47, 70 and
70 ms; TTFT p90 414, 542 and 515 ms.
"""

from configs.serve import Serve, Workload
from dsjax import EngineConfig, Sampling, Slo

config = Serve(
    engine=EngineConfig(max_len=512, max_seqs=8, prefill_tokens=128,
                        prefill_seqs=4, chunk_tokens=64, least_tokens=64,
                        run_ahead=1, prefix_cache=False),
    workload=Workload(requests=16, rate_per_s=2.0, seed=1),
    sampling=Sampling(max_tokens=32),
    slo=Slo(ttft_s=0.75, tpot_s=0.06),
)

"""Random weights, eight short prompts: every path of the runner in seconds.

  python -m experiments.serve --config=tiny --out=out/tiny

prints the same tables as the demo, of a model that says nothing: only that
everything runs is to be read from it. About 15 s on a 2-core CPU machine the
first time, most of it compilation.
"""

from configs.serve import Serve, Workload
from dsjax import EngineConfig, Sampling, Slo

config = Serve(
    model='tiny',
    engine=EngineConfig(max_len=1536, max_seqs=2, prefill_tokens=64,
                        prefill_seqs=4, chunk_tokens=64, least_tokens=64,
                        least_rows=2, prefix_cache=False),
    workload=Workload(requests=8, rate_per_s=20.0),
    sampling=Sampling(max_tokens=12),
    slo=Slo(ttft_s=0.5, tpot_s=0.05),
)

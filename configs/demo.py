"""x"""

from configs.serve import PROMPTS, Serve, Workload
from dsjax import EngineConfig, Sampling, Slo

config = Serve(
    engine=EngineConfig(max_len=512, max_seqs=8, prefill_tokens=128,
                        prefill_seqs=4, chunk_tokens=64, run_ahead=1),
    workload=Workload(path=str(PROMPTS), rate_per_s=1.0),
    sampling=Sampling(max_tokens=32),
    slo=Slo(ttft_s=1.5, tpot_s=0.15),
)

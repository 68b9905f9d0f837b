"""Lengths and arrivals of an Azure LLM inference trace, on the real model.

  python -m experiments.serve --config=azure \\
    --set=workload.lengths=AzureLLMInferenceTrace_conv.csv --out=out/azure

The traces of 2023 are published in github.com/Azure/AzurePublicDataset. The
first 48 requests keep the shape of their arrivals, slowed to 0.4 a second;
prompts are cut to 768 tokens and answers to 64, which two CPU devices can
serve. A Mooncake trace (.jsonl) or a CSV of prompt_len, output_len works too
(the latter with --set=workload.process=poisson).
"""

from configs.serve import Serve, Workload
from dsjax import EngineConfig, Slo

config = Serve(
    engine=EngineConfig(max_len=1024, max_seqs=8, prefill_tokens=256,
                        prefill_seqs=4, chunk_tokens=128,
                        prefix_cache=False),
    workload=Workload(lengths='AzureLLMInferenceTrace_conv.csv', requests=48,
                      process='trace', rate_per_s=0.4, max_prompt=768,
                      max_output=64),
    slo=Slo(ttft_s=4.0, tpot_s=0.25),
)

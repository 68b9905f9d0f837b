"""Published policies and ours, one file each.

Each file has `policy(slo, ...)`, which makes the Policy for latency
objectives. They want flexible instances, whose roles they give; what they
predict they read from the latencies that `simulate` and `serve` are given.
What is described in a paper only in part is said in the file, with our choice.
"""

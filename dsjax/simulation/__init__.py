"""The scheduler under virtual time: latencies, links, contention."""

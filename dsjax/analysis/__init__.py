"""What requests experienced: records, statistics, causes of misses."""

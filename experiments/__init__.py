"""Runners, one a claim; what they share and what they draw lies in folders."""

"""Instances as processes: each owns an engine, and speaks over a socket."""

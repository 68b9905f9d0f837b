"""The placement that serves the most within both objectives."""

"""One command for a GPU: is it right, does it serve, how fast, simulated."""

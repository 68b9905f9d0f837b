"""The simulator compiled by mypyc, as an option: `make fast`."""

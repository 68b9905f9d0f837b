"""What runners share: configs, the terminal, reports, a tiny model."""

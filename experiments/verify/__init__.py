"""Every order of events over small worlds, and faults in real ones."""

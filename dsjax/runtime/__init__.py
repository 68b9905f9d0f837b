"""The effects: compiled steps, instances, migration, the orchestrator."""

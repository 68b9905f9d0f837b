"""An OpenAI-compatible server over an orchestrator."""

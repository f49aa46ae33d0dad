"""Text environments of LLM-agent research behind Gymnasium; importing registers ``pz/...`` ids."""

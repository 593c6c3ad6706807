"""Rollout engines: vLLM and transformers."""

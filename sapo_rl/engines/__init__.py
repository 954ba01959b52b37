"""Inference engines: what they are asked and promise, vLLM in a process beside the trainer, and rollout servers."""

"""Rollouts: vLLM in a process of its own, the weights on their way to it, and the samples on their way back."""

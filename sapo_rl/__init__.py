"""Reinforcement-learning fine-tuning of language models under the SAPO objective."""

__version__ = "0.1.0"

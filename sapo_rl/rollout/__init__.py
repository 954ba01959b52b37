"""Prompts in, groups of samples out: requests over the engines, and batches ahead of the trainer."""

"""Reward functions in processes that can be killed: the pool, its workers, and the scoring that they do."""

"""Environments in processes that can be killed: the pool, its workers, and what passes between them."""

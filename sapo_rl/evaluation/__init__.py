"""Held-out prompts to numbers: sets of them, what is measured, and how sure it is. Importing it loads no torch."""

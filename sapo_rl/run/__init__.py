"""From the command line to a run: a user's files, and what other programs call our keys."""

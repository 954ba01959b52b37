"""The command line, and what starts, connects and ends the processes of a run."""
